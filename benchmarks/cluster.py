"""A whole cluster on this machine, whose parts may be hurt.

with Cluster(space, upstream.url, database_url, {"PENSTOCK_STORAGE_URL": "/srv/x"}) as cluster:
    cluster.workers[0].kill()
    cluster.heal()

Each part is a process as a person would start it: `migrate`, `serve --no-workers` and `work`.
Used by tests, too. All addresses are of the loopback unless a caller says otherwise; processes
are ended by their ID.
"""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from benchmarks import harness

PATIENCE_S = 120.0
FINAL = ("completed", "failed", "expired", "cancelled")


def until(is_so: Callable[[], object], what: str, *, patience_s: float = PATIENCE_S) -> None:
    """Wait until something is so.

    Raises:
        TimeoutError: It is not; the message names it.
    """
    deadline = time.monotonic() + patience_s
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"Waited in vain until {what}.")
        time.sleep(0.02)


class Cluster:
    """One API and some workers on a database and a storage.

    Args:
        space: Where logs and data directories are put.
        storage: The variables that say where bytes are kept.
        settings: More of them, for all processes.
        workers: How many there are.
    """

    def __init__(
        self,
        space: Path,
        upstream_url: str,
        database_url: str,
        storage: Mapping[str, str],
        *,
        settings: Mapping[str, str] | None = None,
        workers: int = 3,
    ) -> None:
        self.space = space
        self.environment = {
            "PENSTOCK_UPSTREAMS__0__NAME": "upstream",
            "PENSTOCK_UPSTREAMS__0__BASE_URL": f"{upstream_url}/v1",
            "PENSTOCK_DATABASE_URL": database_url,
            "PENSTOCK_API_KEY": harness.KEY,
            **storage,
            **(settings or {}),
        }
        self.of_worker: list[dict[str, str]] = [{} for _ in range(workers)]
        """What each worker is told beside that."""
        self.before: list[list[str]] = [[] for _ in range(workers)]
        """What each worker's command begins with: another command that starts it."""
        self.hosts = ["127.0.0.1"] * workers
        """Where each worker tells how it is."""
        self.workers: list[harness.Process] = []
        self._api: harness.Process | None = None
        self._count = workers

    @property
    def api(self) -> harness.Process:
        assert self._api is not None
        return self._api

    @property
    def client(self) -> harness.Client:
        return harness.Client(self.api)

    def __enter__(self) -> Self:
        try:
            done = self.run("migrate")
            if done.returncode:
                raise SystemExit(f"`penstock migrate` failed: {done.stderr}")
            self._api = self._start_api(harness.free_port())
            self.workers = [self.start_worker(number) for number in range(self._count)]
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self.workers, *([self._api] if self._api else [])]:
            resume(process)
            process.popen.terminate()
        for process in [*self.workers, *([self._api] if self._api else [])]:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.popen.wait(30)
            if process.popen.poll() is None:
                process.kill()

    def run(
        self, *arguments: str, more: Mapping[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command of the cluster, to its end.

        Args:
            more: Variables for it alone.
        """
        return subprocess.run(
            [sys.executable, "-m", "penstock", *arguments],
            env=self._variables("command") | dict(more or {}),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    def start_worker(self, number: int) -> harness.Process:
        """Start a worker; it is not waited for."""
        port = harness.free_port()
        more = {
            "PENSTOCK_WORKER__HEALTH_PORT": str(port),
            "PENSTOCK_SERVER__HOST": self.hosts[number],
            **self.of_worker[number],
        }
        process = self._start(f"worker-{number}", ["work"], port, more, self.before[number])
        process.host = self.hosts[number]
        return process

    def restart_api(self) -> None:
        """Start an API that was killed again, at the same address; it is not waited for."""
        self._api = self._start_api(self.api.port)

    def revive(self) -> None:
        """Start again what has ended, and let go on what was stopped."""
        for number, process in enumerate(self.workers):
            if process.popen.poll() is None:
                resume(process)
            else:
                self.workers[number] = self.start_worker(number)
        if self.api.popen.poll() is None:
            resume(self.api)
        else:
            self.restart_api()

    def heal(self) -> None:
        """Make all of it work again, and wait until it does."""
        self.revive()
        self._wait_until_ready()

    def busy_worker(self) -> harness.Process:
        """The worker that has most lines in flight, once one has some."""
        flights: list[float] = []

        def look() -> bool:
            flights[:] = map(lines_in_flight, self.workers)
            return any(flights)

        until(look, "a worker has lines in flight")
        return self.workers[flights.index(max(flights))]

    def wait(self, batch_id: str) -> dict[str, Any]:
        """Wait for the end of a batch, also while the API comes and goes."""
        return self.wait_until(batch_id, lambda batch: batch["status"] in FINAL, "it has ended")

    def wait_until(
        self, batch_id: str, is_so: Callable[[dict[str, Any]], object], what: str
    ) -> dict[str, Any]:
        """Wait until something is so of a batch."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            batch: dict[str, Any] | None = None
            with contextlib.suppress(OSError, http.client.HTTPException, SystemExit):
                batch = self.client.call("GET", f"/batches/{batch_id}")
            if batch and is_so(batch):
                return batch
            if time.monotonic() > deadline:
                raise TimeoutError(f"Waited in vain for {batch_id} until {what}: {batch}")
            time.sleep(0.05)

    def logs(self) -> str:
        """What all processes have printed last."""
        texts = [
            f"--- {path.stem}\n{path.read_text()[-3000:]}" for path in self.space.glob("*.log")
        ]
        return "\n".join(texts)

    def _start_api(self, port: int) -> harness.Process:
        arguments = ["serve", "--no-workers", "--port", str(port)]
        return self._start("api", arguments, port, {}, [])

    def _start(
        self,
        name: str,
        arguments: Sequence[str],
        port: int,
        more: Mapping[str, str],
        before: Sequence[str],
    ) -> harness.Process:
        with (self.space / f"{name}.log").open("a") as log:
            popen = subprocess.Popen(
                [*before, sys.executable, "-m", "penstock", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
                env=self._variables(name) | more,
            )
        return harness.Process(popen, port)

    def _variables(self, name: str) -> dict[str, str]:
        # Nothing is shared by way of a data directory.
        own = {"PENSTOCK_DATA_DIR": str(self.space / f"data-{name}")}
        return {**os.environ, **own, **self.environment}

    def _wait_until_ready(self) -> None:
        for process in [self.api, *self.workers]:
            until(lambda process=process: self._is_ready(process), "a process is ready")

    def _is_ready(self, process: harness.Process) -> bool:
        if process.popen.poll() is not None:
            raise SystemExit(f"A process has ended: {self.logs()}")
        return readiness(process)[0] == 200


def stop(process: harness.Process) -> None:
    """Stop a process in its tracks; `resume` lets it go on."""
    process.popen.send_signal(signal.SIGSTOP)


def resume(process: harness.Process) -> None:
    process.popen.send_signal(signal.SIGCONT)


def lines_in_flight(worker: harness.Process) -> float:
    """How many lines a worker waits for, as it says itself; 0 if it says nothing."""
    try:
        text = harness.get(f"{worker.url}/metrics").decode()
    except OSError:
        return 0.0
    found = re.findall(r"^penstock_upstream_in_flight_requests\{.*\} (\S+)", text, re.M)
    return sum(map(float, found))


def readiness(process: harness.Process) -> tuple[int, dict[str, str]]:
    """What a process says at `/readyz`: the status, and each fault in a sentence."""
    try:
        with urllib.request.urlopen(f"{process.url}/readyz", timeout=5) as answer:
            return answer.status, json.load(answer)["faults"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)["faults"]
    except OSError:
        return 0, {}
