"""A server that speaks as much of the API as the client commands need, from memory."""

import json
import re
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-stub-0123456789"
NOON = 1_795_000_000


def a_batch(number: int = 1, **fields: Any) -> dict[str, Any]:
    """A `Batch` object as a server sends it."""
    names = (
        "in_progress",
        "finalizing",
        "completed",
        "failed",
        "expired",
        "cancelling",
        "cancelled",
    )
    return {
        "id": f"batch_{number:032x}",
        "object": "batch",
        "endpoint": "/v1/chat/completions",
        "model": None,
        "errors": None,
        "input_file_id": "file-in",
        "completion_window": "24h",
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": NOON,
        "expires_at": NOON + 86400,
        **{f"{name}_at": None for name in names},
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "usage": None,
        "metadata": None,
        "job_name": None,
    } | fields


class Stub:
    """What the server holds and what it was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.key: str | None = KEY
        self.batches: list[dict[str, Any]] = []
        """Newest first."""
        self.stages: list[dict[str, Any]] = []
        """What becomes of the first batch, one stage each time it is got.
        `then_fails`: how many of the next requests are answered with 503."""
        self.files: dict[str, bytes] = {}
        self.broken_files: set[str] = set()
        """Files whose transfer ends before the end."""
        self.refusal: tuple[int, dict[str, Any] | None] | None = None
        """How batches are refused instead of created."""
        self.metrics = ""
        """What `/metrics` shows; empty answers 404."""
        self.costs: dict[str, Any] | None = None
        """What any batch cost; None: as a server that does not tell."""
        self.failures = 0
        """How many of the next requests are answered with 503."""
        self.asked: list[tuple[str, str]] = []
        self.bodies: list[bytes] = []


@contextmanager
def run_stub() -> Generator[Stub]:
    stub = Stub()
    handler = type("Handler", (_Handler,), {"stub": stub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    stub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    stub: Stub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def _answer(self, method: str) -> None:
        stub = self.stub
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        stub.asked.append((method, self.path))
        stub.bodies.append(body)
        if stub.failures:
            stub.failures -= 1
            self._send(503, _error("Try again later."))
        elif stub.key is not None and self.headers.get("Authorization") != f"Bearer {stub.key}":
            self._send(401, _error("Incorrect API key provided.", code="invalid_api_key"))
        elif (method, path) == ("POST", "/v1/files"):
            stub.files["file-in"] = _file_part(body)
            self._send(200, {"id": "file-in", "object": "file"})
        elif (method, path) == ("POST", "/v1/batches"):
            self._create(json.loads(body))
        elif (method, path) == ("GET", "/v1/batches"):
            self._list(dict(pair.split("=") for pair in query.split("&")))
        elif (method, path) == ("GET", "/v1/models"):
            self._send(200, {"object": "list", "data": [{"id": "qwen-7b"}, {"id": "qwen-72b"}]})
        elif path == "/metrics" and stub.metrics:
            self.send_response(200)
            self.send_header("Content-Length", str(len(stub.metrics)))
            self.end_headers()
            self.wfile.write(stub.metrics.encode())
        elif path.endswith("/costs") and stub.costs is not None:
            self._send(200, stub.costs)
        elif match := re.fullmatch(r"/v1/batches/(\w+)(/cancel)?", path):
            self._batch(match[1], cancel=match[2] is not None)
        elif match := re.fullmatch(r"/v1/files/([\w-]+)(/content)?", path):
            self._file(method, match[1])
        else:
            self._send(404, {"detail": "Not Found"})

    def _create(self, fields: dict[str, Any]) -> None:
        if self.stub.refusal is not None:
            self._send(*self.stub.refusal)
            return
        self.stub.batches.insert(0, a_batch(len(self.stub.batches) + 1, **fields))
        self._send(200, self.stub.batches[0])

    def _list(self, query: dict[str, str]) -> None:
        found = [
            batch
            for batch in self.stub.batches
            if batch["status"] == query.get("status", batch["status"])
            and batch["job_name"] == query.get("job_name", batch["job_name"])
        ]
        if "after" in query:
            ids = [batch["id"] for batch in found]
            found = found[ids.index(query["after"]) + 1 :]
        limit = int(query["limit"])
        self._send(
            200, {"object": "list", "data": found[:limit], "has_more": len(found) > limit}
        )

    def _batch(self, batch_id: str, *, cancel: bool) -> None:
        for batch in self.stub.batches:
            if batch["id"] == batch_id:
                if cancel and batch["status"] == "completed":
                    message = "Cannot cancel a batch with status 'completed'."
                    self._send(409, _error(message))
                    return
                if cancel:
                    batch["status"] = "cancelling"
                elif self.stub.stages:
                    batch.update(stage := self.stub.stages.pop(0))
                    self.stub.failures = stage.get("then_fails", 0)
                self._send(200, batch)
                return
        self._send(404, _error(f"No batch found with id '{batch_id}'."))

    def _file(self, method: str, file_id: str) -> None:
        content = self.stub.files.get(file_id)
        if content is None:
            self._send(404, _error(f"No such File object: {file_id}"))
        elif method == "DELETE":
            del self.stub.files[file_id]
            self._send(200, {"id": file_id, "object": "file", "deleted": True})
        else:
            last = re.fullmatch(r"bytes=0-(\d+)", self.headers.get("Range") or "")
            content = content[: int(last[1]) + 1] if last else content
            self.send_response(206 if last else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if file_id in self.stub.broken_files:
                content = content[: len(content) // 2]
                self.close_connection = True
            self.wfile.write(content)

    def _send(self, status: int, document: object) -> None:
        body = b"<html>" if document is None else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _error(message: str, *, code: str | None = None) -> dict[str, Any]:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return {"error": error}


def _file_part(body: bytes) -> bytes:
    """The content of the part called `file` in a multipart body."""
    boundary = body[: body.index(b"\r\n")]
    for part in body.split(boundary)[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        if b'name="file"' in head:
            return content.removesuffix(b"\r\n")
    raise ValueError("no file")
