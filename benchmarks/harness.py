"""What the benchmarks share: an upstream, a served Penstock, a client, input files.

Server and client work on core 0 and the upstream on core 1, if there are two, so that neither
takes the other's time. All addresses are of the loopback; processes are ended by their ID.
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY = "sk-benchmark-0123456789abcdef"
CORES = sorted(os.sched_getaffinity(0))
WORK_CORE = {CORES[0]}
OTHER_CORE = {CORES[-1]}
_PATIENCE_S = 60
_PIECE = 1 << 20


@dataclass(slots=True)
class Process:
    """A process of ours and the port it listens on."""

    popen: subprocess.Popen[str]
    port: int
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def memory_mb(self, name: str = "VmHWM") -> float:
        """Peak (`VmHWM`) or present (`VmRSS`) memory, in MiB."""
        text = Path(f"/proc/{self.popen.pid}/status").read_text()
        line = next(line for line in text.splitlines() if line.startswith(name))
        return int(line.split()[1]) / 1024

    def cpu_s(self) -> float:
        """Processor time so far, of all its threads, in seconds."""
        fields = Path(f"/proc/{self.popen.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """End it at once, as a loss of power would."""
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait()


@contextlib.contextmanager
def upstream(
    latency_ms: float = 0.0, *, spread: float = 0.0, wild: int | None = None
) -> Generator[Process]:
    """Run `benchmarks.upstream` on a free port.

    Args:
        spread: By which part of it the latency differs from line to line.
        wild: Starts the chance by which it misbehaves; None makes it behave.
    """
    command = [sys.executable, "-m", "benchmarks.upstream", "--latency-ms", str(latency_ms)]
    if spread:
        command += ["--spread", str(spread)]
    if wild is not None:
        command += ["--wild", str(wild)]
    popen = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
    )
    try:
        os.sched_setaffinity(popen.pid, OTHER_CORE)
        assert popen.stdout is not None
        yield Process(popen, int(popen.stdout.readline()))
    finally:
        popen.kill()
        popen.communicate()


def start_server(
    data_dir: Path,
    upstream_url: str,
    *,
    port: int = 0,
    settings: dict[str, str] | None = None,
    wait: bool = True,
) -> Process:
    """Start `penstock serve`.

    Args:
        port: 0 chooses a free one.
        settings: More settings, by environment variable.
        wait: Whether to wait until it is ready.
    """
    port = port or free_port()
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "server.log").open("a") as log:
        popen = subprocess.Popen(
            [
                *(sys.executable, "-m", "penstock", "serve"),
                *("--data-dir", str(data_dir), "--port", str(port)),
                *("--api-key", KEY),
            ],
            stdout=log,
            stderr=log,
            text=True,
            env={
                **os.environ,
                "PENSTOCK_UPSTREAMS__0__NAME": "upstream",
                "PENSTOCK_UPSTREAMS__0__BASE_URL": upstream_url + "/v1",
                **(settings or {}),
            },
        )
    os.sched_setaffinity(popen.pid, WORK_CORE)
    process = Process(popen, port)
    if not wait:
        return process
    if not becomes_ready(process):
        popen.kill()
        log_text = (data_dir / "server.log").read_text()
        raise SystemExit(f"The server did not start: {log_text}")
    return process


def becomes_ready(process: Process) -> bool:
    """Wait until a server is ready; False if it ends before, or takes too long."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            get(f"{process.url}/readyz")
            return True
        if process.popen.poll() is not None:
            break
        time.sleep(0.02)
    return False


@contextlib.contextmanager
def server(data_dir: Path, upstream_url: str, **rest: Any) -> Generator[Process]:
    """A server, ended in good order."""
    process = start_server(data_dir, upstream_url, **rest)
    try:
        yield process
    finally:
        process.popen.terminate()
        process.popen.wait()


class Client:
    """The few calls that a benchmark needs, with as little work as can be."""

    def __init__(self, process: Process) -> None:
        self._port = process.port

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        data = json.dumps(body).encode() if body is not None else None
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        connection.request(method, f"/v1{path}", data, headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        if response.status != 200:
            raise SystemExit(f"{method} {path} answered {response.status}: {answer}")
        return answer

    def upload(self, path: Path) -> str:
        head = (
            b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\n'
            b'content-disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n'
        )
        tail = b"\r\n--x--\r\n"
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        connection.putrequest("POST", "/v1/files")
        connection.putheader("Authorization", f"Bearer {KEY}")
        connection.putheader("Content-Type", "multipart/form-data; boundary=x")
        size = len(head) + path.stat().st_size + len(tail)
        connection.putheader("Content-Length", str(size))
        connection.endheaders()
        connection.send(head)
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                connection.send(piece)
        connection.send(tail)
        answer = json.loads(connection.getresponse().read())
        connection.close()
        if "id" not in answer:
            raise SystemExit(f"The upload was refused: {answer}")
        return answer["id"]

    def create(self, file_id: str) -> str:
        body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions"}
        return self.call("POST", "/batches", body)["id"]

    def wait(self, batch_id: str, *, every_s: float = 0.02) -> dict[str, Any]:
        while True:
            batch = self.call("GET", f"/batches/{batch_id}")
            if batch["status"] in ("completed", "failed", "expired", "cancelled"):
                return batch
            time.sleep(every_s)

    def download(self, file_id: str, target: Path) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        headers = {"Authorization": f"Bearer {KEY}"}
        connection.request("GET", f"/v1/files/{file_id}/content", headers=headers)
        response = connection.getresponse()
        size = 0
        with target.open("wb") as file:
            while piece := response.read(_PIECE):
                size += file.write(piece)
        connection.close()
        return size


def stats(process: Process) -> dict[str, Any]:
    """What the upstream has seen."""
    return json.loads(get(f"{process.url}/stats"))


def get(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:
        return answer.read()


def write_input(path: Path, lines: int, line_bytes: int, *, first: int = 0) -> None:
    """Write an input file; each line names itself, and is `line_bytes` long.

    Args:
        first: The number of the first line.
    """
    with path.open("w") as file:
        for number in range(first, first + lines):
            request = {
                "custom_id": f"request-{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"model": "sim", "messages": [{"role": "user", "content": ""}]},
            }
            content = f"line-{number} "
            content += "x" * (line_bytes - len(json.dumps(request)) - len(content) - 1)
            request["body"]["messages"][0]["content"] = content
            file.write(json.dumps(request) + "\n")


def count_results(path: Path) -> tuple[int, int]:
    """How many lines a result file has, and how many different `custom_id`."""
    ids: list[str] = []
    with path.open() as file:
        ids.extend(json.loads(line)["custom_id"] for line in file)
    return len(ids), len(set(ids))


def free_port() -> int:
    """A port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def workspace() -> Generator[Path]:
    """A directory that is deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as name:
        yield Path(name)
