"""A server that really listens, over a real store and real blobs, for all tests of the API.

It is started once; each test has a project of its own, so tests do not see each other.
"""

import asyncio
import hashlib
import secrets
import socket
import ssl
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI
from openai import DefaultHttpxClient, OpenAI

from penstock.api.routes import create_api
from penstock.blobs.folder import FolderBlobs
from penstock.blobs.local_segments import LocalSegments
from penstock.blobs.segments import Kind
from penstock.executor.partial import PartialResults
from penstock.model import (
    ApiKey,
    BatchId,
    BatchStatus,
    File,
    FileId,
    KeyId,
    ProjectId,
    Purpose,
    Slice,
    Usage,
    slice_id,
)
from penstock.service import Service, ServiceLimits, UpstreamChoices
from penstock.store.base import BatchChange, SliceReport
from penstock.store.sql import SqlStore
from penstock.telemetry import Health, Metrics
from penstock.uploads import Uploads
from penstock.upstream.base import Reply
from penstock.upstream.routes import Route, Routes

T = TypeVar("T")

# Nothing here is encrypted, and to load the world's certificates for each client takes long.
TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
LIMITS = ServiceLimits(input_file_bytes=1 << 20, upload_file_bytes=2 << 20)
LINE = b'{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"model":"m"}}\n'


class Upstream:
    """An upstream that serves one model."""

    name = "local"
    max_concurrency = 1

    async def send(self, endpoint: str, body: bytes) -> Reply:
        return Reply(status_code=200, body=b"{}")

    async def list_models(self) -> list[str]:
        return ["tiny"]

    async def close(self) -> None:
        return


class Server:
    """The application on a free port, in a thread of its own."""

    def __init__(self, folder: Path, *, open_project: str | None = None) -> None:
        self.store = SqlStore(f"sqlite:///{folder / 'penstock.db'}")
        self.blobs = FolderBlobs(folder / "blobs")
        self.blob_folder = folder / "blobs"
        self.segments = LocalSegments(folder / "segments")
        self.health = Health()
        self.choices: dict[ProjectId, UpstreamChoices] = {}
        """The upstreams that projects may choose."""
        self._open_project = open_project
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx2.Client(base_url=self.url, verify=TLS, timeout=20)
        """A client without a key."""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> "Server":
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join(20)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something on the server's own loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def add_project(self) -> "Tenant":
        project = self.call(self.store.ensure_project(f"p{secrets.token_hex(8)}"))
        key = f"sk-test-{secrets.token_hex(16)}"
        record = ApiKey(
            id=KeyId(f"key_{secrets.token_hex(8)}"),
            project_id=project.id,
            project=project.name,
            hint="sk-test…",
            created_at=1,
        )
        digest = hashlib.sha256(key.encode()).hexdigest()
        self.call(self.store.add_key(record, digest=digest))
        return Tenant(server=self, project_id=project.id, key=key)

    def stored_keys(self) -> set[str]:
        """Every file that lies in the blob folder, also one that is being written."""
        paths = self.blob_folder.rglob("*")
        return {str(p.relative_to(self.blob_folder)) for p in paths if p.is_file()}

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self.store.open()
        open_project = None
        if self._open_project is not None:
            open_project = (await self.store.ensure_project(self._open_project)).id
        service = Service(
            store=self.store,
            blobs=self.blobs,
            partial=PartialResults(store=self.store, segments=self.segments),
            upstreams=Routes([Route(name="local", upstreams=(Upstream(),), models=("*",))]),
            limits=LIMITS,
            choices=self.choices,
        )

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
            self._ready.set()
            yield

        uploads = Uploads(store=self.store, blobs=self.blobs, limits=LIMITS)
        app = create_api(
            service,
            uploads,
            self.health,
            Metrics(self.health),
            open_project=open_project,
            lifespan=lifespan,
        )
        config = uvicorn.Config(app, lifespan="on", log_level="warning", http="httptools")
        self._server = uvicorn.Server(config)
        try:
            await self._server.serve([self._socket])
        finally:
            await self.store.close()
            self._socket.close()


@dataclass
class Tenant:
    """A project, its key and its clients."""

    server: Server
    project_id: ProjectId
    key: str
    _clients: list[OpenAI | httpx2.Client] = field(default_factory=list[OpenAI | httpx2.Client])

    def openai(self, path: str = "/v1") -> OpenAI:
        client = OpenAI(
            base_url=self.server.url + path,
            api_key=self.key,
            max_retries=0,
            http_client=DefaultHttpxClient(verify=TLS),
        )
        self._clients.append(client)
        return client

    def http(self) -> httpx2.Client:
        headers = {"authorization": f"Bearer {self.key}"}
        url = f"{self.server.url}/v1"
        client = httpx2.Client(base_url=url, headers=headers, verify=TLS, timeout=20)
        self._clients.append(client)
        return client

    @cached_property
    def _http(self) -> httpx2.Client:
        return self.http()

    def close(self) -> None:
        for client in self._clients:
            client.close()

    def add_input(self, content: bytes = LINE) -> str:
        files = {"file": ("in.jsonl", content)}
        answer = self._http.post("/files", data={"purpose": "batch"}, files=files)
        return answer.raise_for_status().json()["id"]

    def add_batch(self, **body: Any) -> str:
        body = {"input_file_id": self.add_input(), "endpoint": "/v1/chat/completions"} | body
        return self._http.post("/batches", json=body).raise_for_status().json()["id"]

    def add_result(self, name: str, content: bytes) -> File:
        """The record of a result file whose bytes are stored."""
        file_id = FileId(f"file-{secrets.token_hex(16)}")

        async def chunks() -> AsyncIterator[bytes]:
            yield content

        self.server.call(self.server.blobs.put(f"files/{file_id}", chunks()))
        return File(
            id=file_id,
            project_id=self.project_id,
            purpose=Purpose.BATCH_OUTPUT,
            filename=name,
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            blob_key=f"files/{file_id}",
            created_at=int(time.time()),
        )

    def move(self, batch_id: str, to: BatchStatus, change: BatchChange | None = None) -> None:
        now = int(time.time())
        store = self.server.store
        self.server.call(store.move_batch(BatchId(batch_id), to, now=now, change=change))

    def start(self, batch_id: str, lines: int) -> None:
        """Move a batch to `in_progress`, with one slice that a worker holds."""
        piece = Slice(
            batch_id=BatchId(batch_id),
            index=0,
            start=0,
            end=100,
            first_line=1,
            requests=lines,
            models=("m",),
        )
        self.move(batch_id, BatchStatus.IN_PROGRESS, BatchChange(slices=[piece]))
        claim = self.server.store.claim_slices(
            [piece.id], worker_id="w", lease_s=600, now=time.time()
        )
        assert len(self.server.call(claim)) == 1

    def write_reply(self, batch_id: str, line: int, payload: bytes, *, is_good: bool) -> None:
        """Write one reply as a worker does, and make it durable."""
        attempt = 1
        writer = self.server.segments.open(BatchId(batch_id), 0, attempt, requests=0)
        writer.append(line, Kind.OUTPUT if is_good else Kind.ERROR, payload, (0,) * 5)
        writer.prepare()
        writer.flush()
        writer.close()

    def finish(self, batch_id: str, *, output: bytes | None, error: bytes | None) -> None:
        """Move a batch that was started to `completed` with these result files."""
        report = SliceReport(
            id=slice_id(BatchId(batch_id), 0),
            attempt=1,
            completed=1,
            failed=0,
            usage=Usage(),
            ends=True,
        )
        store = self.server.store
        self.server.call(store.report_slices([report], lease_s=1, now=time.time()))
        self.move(batch_id, BatchStatus.FINALIZING)
        change = BatchChange(
            output=None if output is None else self.add_result("output.jsonl", output),
            error=None if error is None else self.add_result("error.jsonl", error),
        )
        self.move(batch_id, BatchStatus.COMPLETED, change)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def tenant(server: Server) -> Iterator[Tenant]:
    tenant = server.add_project()
    yield tenant
    tenant.close()


@pytest.fixture
def client(tenant: Tenant) -> OpenAI:
    return tenant.openai()


@pytest.fixture
def http(tenant: Tenant) -> httpx2.Client:
    return tenant.http()
