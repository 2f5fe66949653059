"""Object stores for tests, as processes of their own, and ways to make them misbehave.

with moto() as server:
    bucket = S3Bucket(server.url)
    with Proxy(server.url) as proxy:
        proxy.rule = lambda method, path: "stall" if method == "PUT" else None
"""

import contextlib
import functools
import http.client
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore.config

PREFIX = "some/prefix"
"""Where in its bucket a storage under test lies."""


@dataclass(frozen=True)
class S3Server:
    """A server that speaks S3, and who may use it."""

    url: str
    access_key_id: str = "reader"
    secret_access_key: str = "not-a-real-secret"

    def options(self, endpoint: str | None = None) -> dict[str, str]:
        """What `open_blobs` must be told."""
        return {
            "endpoint": endpoint or self.url,
            "region": "us-east-1",
            "access_key_id": self.access_key_id,
            "secret_access_key": self.secret_access_key,
        }

    @functools.cache  # noqa: B019  (servers are few, clients slow to make)
    def client(self) -> Any:
        """The same server by another way than ours: Amazon's own client."""
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=self.access_key_id,
            aws_secret_access_key=self.secret_access_key,
            config=botocore.config.Config(
                s3={"addressing_style": "path"}, retries={"max_attempts": 2}
            ),
        )


class S3Bucket:
    """A new bucket of a server, and what really lies in it."""

    def __init__(self, server: S3Server) -> None:
        self.server = server
        self.name = f"bucket-{secrets.token_hex(6)}"
        self.url = f"s3://{self.name}/{PREFIX}"
        self._client = server.client()
        self._client.create_bucket(Bucket=self.name)

    def get(self, key: str) -> bytes | None:
        try:
            found = self._client.get_object(Bucket=self.name, Key=f"{PREFIX}/{key}")
        except self._client.exceptions.NoSuchKey:
            return None
        return found["Body"].read()

    def set(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=self.name, Key=f"{PREFIX}/{key}", Body=data)

    def everything(self) -> list[str]:
        """Objects without the prefix, and uploads in parts that were not ended."""
        objects = self._client.list_objects_v2(Bucket=self.name).get("Contents", [])
        uploads = self._client.list_multipart_uploads(Bucket=self.name).get("Uploads", [])
        names = [each["Key"].removeprefix(f"{PREFIX}/") for each in objects]
        return sorted(names + [f"unfinished {each['Key']}" for each in uploads])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_until_up(url: str, process: "subprocess.Popen[bytes]", *, within_s: float) -> None:
    """Wait until something answers HTTP at an address."""
    give_up_at = time.monotonic() + within_s
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except urllib.error.HTTPError:
            return  # an answer all the same
        except OSError:
            if process.poll() is not None or time.monotonic() > give_up_at:
                raise
            time.sleep(0.05)


@contextlib.contextmanager
def ended(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def moto() -> Iterator[S3Server]:
    """An S3 in memory."""
    port = free_port()
    command = Path(sys.executable).with_name("moto_server")
    process = subprocess.Popen(
        [str(command), "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "MOTO_S3_CUSTOM_ENDPOINTS": f"http://127.0.0.1:{port}"},
    )
    with ended(process):
        server = S3Server(f"http://127.0.0.1:{port}")
        wait_until_up(f"{server.url}/moto-api/", process, within_s=30)
        yield server


Rule = Callable[[str, str], int | str | None]
"""What to do with a request, by method and path with query: None hands it on; a status is the
answer; "stall" never answers, "cut" breaks the connection, "cut answer" does so in the middle
of the server's answer, "lose answer" in place of it."""

_CODES = {403: "AccessDenied", 404: "NoSuchUpload", 503: "SlowDown", 507: "InsufficientStorage"}


class Proxy:
    """Stands before a server that speaks S3, and misbehaves by a rule."""

    def __init__(self, server_url: str) -> None:
        self.rule: Rule = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        """Method and path of all that came."""
        self._stop = threading.Event()
        target = urlsplit(server_url)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:
                    self.close_connection = True

            def _do(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.requests.append((self.command, self.path))
                action = proxy.rule(self.command, self.path)
                if action == "stall":
                    proxy._stop.wait()
                if action in ("stall", "cut"):
                    self._cut()
                elif isinstance(action, int):
                    code = _CODES.get(action, "InternalError")
                    text = f"<Error><Code>{code}</Code><Message>no</Message></Error>"
                    self._answer(action, [("Content-Type", "application/xml")], text.encode())
                else:
                    self._hand_on(body, action)

            def _hand_on(self, body: bytes, action: str | None) -> None:
                there = http.client.HTTPConnection(target.hostname or "", target.port)
                with contextlib.closing(there):
                    there.request(self.command, self.path, body, dict(self.headers.items()))
                    answer = there.getresponse()
                    data = answer.read()
                    if action == "lose answer":
                        self._cut()
                        return
                    headers = [
                        (name, value)
                        for name, value in answer.getheaders()
                        if name.lower() not in ("transfer-encoding", "connection")
                    ]
                    if self.command != "HEAD":
                        headers = [h for h in headers if h[0].lower() != "content-length"]
                    self._answer(answer.status, headers, data, cuts=action == "cut answer")

            def _answer(
                self,
                status: int,
                headers: list[tuple[str, str]],
                data: bytes,
                *,
                cuts: bool = False,
            ) -> None:
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                if self.command != "HEAD":
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data[: len(data) // 2] if cuts else data)
                if cuts:
                    self._cut()

            def _cut(self) -> None:
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _do  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> "Proxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
