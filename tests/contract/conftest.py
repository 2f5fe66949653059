"""Real servers and the upstream that they send to, for the tests of the wire contract.

Two `penstock serve` run for the whole session: one with the default limits and one that is
strict and allows little. Both send to one upstream, which does what each request asks it to:
the text of its first message says what is answered, and when. So tests share servers without
seeing each other.
"""

import asyncio
import base64
import json
import os
import re
import secrets
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.upstreams import (
    Action,
    ScriptedUpstream,
    answer,
    chat_completion,
    hold,
    model_list,
    stall,
)

KEY = "sk-contract-0123456789abcdef"
PATIENCE_S = 30.0
DAY_S = 86400
FINAL = frozenset({"completed", "failed", "expired", "cancelled"})
STRICT = {
    "requests_per_batch": 6,
    "line_bytes": 2000,
    "embedding_inputs": 4,
    "reported_faults": 5,
    "strict_openai": True,
}
"""The limits of the strict server."""

# Nothing here is encrypted, and to load the world's certificates takes long.
TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

Body = dict[str, Any]


# What the upstream is asked for


def say(
    body: object = None,
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    until: str | None = None,
) -> str:
    """A message that makes the upstream answer so.

    Args:
        body: Sent as it is if it is bytes, and as JSON otherwise; None is a good answer.
        until: The name of a gate that must be opened first; None answers at once.
    """
    if not isinstance(body, bytes):
        body = json.dumps(chat_completion("Hello.") if body is None else body).encode()
    return json.dumps(
        {
            "body": base64.b64encode(body).decode(),
            "status": status,
            "headers": dict(headers or {}),
            "until": until,
        }
    )


def refuse(status: int = 400, *, until: str | None = None) -> str:
    """A message that makes the upstream answer an error in the shape of OpenAI's API."""
    error = {"message": "No.", "type": "invalid_request_error", "param": None, "code": None}
    return say({"error": error}, status=status, until=until)


STALL = json.dumps({"stall": True})
"""A message that is never answered."""


def new_gate() -> str:
    return secrets.token_hex(8)


class Upstream:
    """The upstream, on a loop and thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._gates: dict[str, asyncio.Event] = {}
        self._scripted = ScriptedUpstream(self._behave)

    @property
    def base_url(self) -> str:
        return self._scripted.base_url

    def open(self, gate: str) -> None:
        """Let go the answers that wait for this gate."""
        self._loop.call_soon_threadsafe(lambda: self._gate(gate).set())

    def open_all(self) -> None:
        def opened() -> None:
            for gate in self._gates.values():
                gate.set()

        self._loop.call_soon_threadsafe(opened)

    def asked(self, words: str) -> int:
        """How many requests came whose body holds these words."""
        return sum(words.encode() in body for body in self._scripted.bodies)

    @contextmanager
    def running(self) -> Iterator["Upstream"]:
        ready, stopped = threading.Event(), asyncio.Event()

        async def serve() -> None:
            async with self._scripted:
                ready.set()
                await stopped.wait()

        thread = threading.Thread(target=self._loop.run_until_complete, args=(serve(),))
        thread.start()
        try:
            assert ready.wait(PATIENCE_S)
            yield self
        finally:
            self._loop.call_soon_threadsafe(stopped.set)
            thread.join()
            self._loop.close()

    def _gate(self, name: str) -> asyncio.Event:
        return self._gates.setdefault(name, asyncio.Event())

    def _behave(self, path: str, headers: dict[str, str], body: bytes, nth: int) -> Action:
        if path.endswith("/models"):
            return answer(model_list("m"))
        asked: Body = json.loads(body)
        if "messages" not in asked:
            return answer({"object": "list", "data": []})
        script = json.loads(asked["messages"][0]["content"])
        if script.get("stall"):
            return stall()
        reply = answer(
            base64.b64decode(script["body"]),
            status=script["status"],
            headers=script["headers"],
        )
        gate = script["until"]
        return reply if gate is None else hold(reply, until=self._gate(gate))


# Input files


def request(custom_id: object = "a", content: str | None = None, **changed: object) -> Body:
    """A good line; None in `changed` takes a field away."""
    line: Body = {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": chat(content),
    }
    line |= changed
    return {name: value for name, value in line.items() if value is not None}


def chat(content: str | None = None, **changed: object) -> Body:
    """A good body; None in `changed` takes a parameter away."""
    message = {"role": "user", "content": say() if content is None else content}
    body: Body = {"model": "m", "messages": [message]}
    body |= changed
    return {name: value for name, value in body.items() if value is not None}


def jsonl(*lines: Body | bytes) -> bytes:
    """An input file; bytes are lines as they are, without their line end."""
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    return b"".join(text + b"\n" for text in texts)


# Servers


@dataclass(frozen=True, slots=True)
class Server:
    """A served Penstock as a client sees it."""

    http: httpx2.Client
    upstream: Upstream

    def upload(self, data: bytes, *, name: str = "in.jsonl") -> Body:
        answered = self.try_upload(data, name=name)
        assert answered.status_code == 200, answered.text
        return answered.json()

    def try_upload(self, data: bytes, *, name: str = "in.jsonl") -> httpx2.Response:
        return self.http.post("/files", data={"purpose": "batch"}, files={"file": (name, data)})

    def try_create(self, file_id: str, **changed: object) -> httpx2.Response:
        body: Body = {
            "input_file_id": file_id,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        }
        return self.http.post("/batches", json=body | changed)

    def create(self, file_id: str, **changed: object) -> Body:
        answered = self.try_create(file_id, **changed)
        assert answered.status_code == 200, answered.text
        return answered.json()

    def start(self, *lines: Body | bytes, **changed: object) -> Body:
        """Upload lines and create a batch of them."""
        return self.create(self.upload(jsonl(*lines))["id"], **changed)

    def get(self, batch_id: str) -> Body:
        answered = self.http.get(f"/batches/{batch_id}")
        assert answered.status_code == 200, answered.text
        return answered.json()

    def cancel(self, batch_id: str) -> httpx2.Response:
        return self.http.post(f"/batches/{batch_id}/cancel")

    def wait(
        self,
        batch_id: str,
        is_so: Callable[[Body], bool] | None = None,
        *,
        every_s: float = 0.01,
    ) -> Body:
        """Poll a batch until `is_so`; None waits for its end."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            batch = self.get(batch_id)
            if is_so(batch) if is_so else batch["status"] in FINAL:
                return batch
            assert batch["status"] not in FINAL, batch
            assert time.monotonic() < deadline, batch
            time.sleep(every_s)

    def run(self, *lines: Body | bytes, **changed: object) -> Body:
        """Create a batch and wait for its end."""
        return self.wait(self.start(*lines, **changed)["id"])

    def content(self, file_id: str) -> bytes:
        answered = self.http.get(f"/files/{file_id}/content")
        assert answered.status_code == 200, answered.text
        return answered.content

    def lines(self, file_id: str | None) -> dict[str, Body]:
        """The lines of a result file by `custom_id`; none if there is no file."""
        if file_id is None:
            return {}
        parsed = [json.loads(line) for line in self.content(file_id).splitlines()]
        by_id = {line["custom_id"]: line for line in parsed}
        assert len(by_id) == len(parsed)
        return by_id


@pytest.fixture(scope="session")
def upstream() -> Iterator[Upstream]:
    with Upstream().running() as upstream:
        yield upstream


@pytest.fixture(scope="session")
def server(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the default limits."""
    with _serve(tmp_path_factory.mktemp("default"), upstream, {}) as server:
        yield server


@pytest.fixture(scope="session")
def strict(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that allows no more than OpenAI does, and little of that."""
    with _serve(tmp_path_factory.mktemp("strict"), upstream, STRICT) as server:
        yield server


@contextmanager
def _serve(
    directory: Path, upstream: Upstream, limits: Mapping[str, int | bool]
) -> Iterator[Server]:
    # The names of the models say how their upstream treats its lines.
    settings = [
        "[limits]",
        *(f"{name} = {str(limit).lower()}" for name, limit in limits.items()),
    ]
    for name, more in (
        ("m", ""),
        ("n-*", ""),
        ("narrow", "max_concurrency = 2"),
        ("impatient", "request_timeout_s = 0.2"),
    ):
        settings += [
            "[[upstreams]]",
            f'name = "{name.removesuffix("-*")}"',
            f'base_url = "{upstream.base_url}"',
            f'models = ["{name}"]',
            "max_attempts = 1",
            more,
        ]
    config, log = directory / "penstock.toml", directory / "server.log"
    config.write_text("\n".join(settings))
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "penstock", "serve", "--port", "0"),
                *("--config", str(config), "--data-dir", str(directory / "data")),
                *("--api-key", KEY),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
        )
    try:
        url = _address(process, log)
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx2.Client(
            base_url=f"{url}/v1",
            headers=headers,
            timeout=PATIENCE_S,
            verify=TLS,
            trust_env=False,
        ) as http:
            yield Server(http, upstream)
        # Lines in flight would make the end slow.
        upstream.open_all()
        process.terminate()
        assert process.wait(PATIENCE_S) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"listens on (http://\S+)", log.read_text()):
            return found[1]
        time.sleep(0.02)
    raise AssertionError(f"The server did not start: {log.read_text()}")
