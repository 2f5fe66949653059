"""An SQLite database: who writes, who reads, and what a loss of power may take.

A transaction runs whole in a thread, one hop there and back, because a hop for each statement
costs more than the statement. One thread writes, on one connection; a few read beside it (WAL).
A write begins with `BEGIN IMMEDIATE`: it sees what it is going to change, and it waits for
other processes, such as `penstock keys create`, instead of failing half-way.

Every commit survives the death of the process. A commit on which others rely survives the loss
of power too (`durable`): files, batches and their moves, because a client is told of them and
bytes are deleted after them; and claims, because an attempt number that is given out twice
names a segment that holds replies already. Reports need not survive it: a slice whose end is
forgotten is claimed again, its replies are found in its segments, and nothing of it is sent
again. A sync covers all that was committed before it.
"""

import asyncio
import sqlite3
import time
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import msgspec
from sqlalchemy import URL, Connection, create_engine, event
from sqlalchemy.exc import DBAPIError

from penstock.errors import StorageUnavailable
from penstock.store import migrations

T = TypeVar("T")

_BUSY_S = 10
"""How long to wait for another process that writes."""
_READERS = 4
_TOUCH = "UPDATE alembic_version SET version_num = version_num"


class SqliteDatabase:
    """Runs transactions.

    Args:
        url: `sqlite:///` and the path of the file, which is made if it is not there.
    """

    def __init__(self, url: URL) -> None:
        self._engine = create_engine(
            url,
            # The driver begins no transaction: `_begin` does, and a read is its own.
            connect_args={"isolation_level": None, "timeout": _BUSY_S},
            pool_size=_READERS + 1,
            max_overflow=0,
            pool_reset_on_return=None,
            json_serializer=_encode_json,
            json_deserializer=msgspec.json.decode,
        )
        event.listen(self._engine, "connect", _prepare)
        self._writers = ThreadPoolExecutor(1, "penstock-write")
        self._readers = ThreadPoolExecutor(_READERS, "penstock-read")
        self._writer: Connection | None = None
        self._is_closed = False

    async def write(
        self,
        work: Callable[[Connection], T],
        *,
        durable: bool,
        finish: Callable[[object | None], Awaitable[None]],
    ) -> T:
        """Run `work` as one transaction, alone; if it raises, nothing was changed.

        Args:
            durable: Whether it must survive a loss of power once this returns.
            finish: Called with None after the commit: nobody else has a part in it.

        Raises:
            StorageUnavailable: The database cannot be opened or written for now.
        """
        result = await self._run(self._writers, lambda: self._write(work, durable))
        await finish(None)
        return result

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work`, of which each statement sees the database at one moment.

        Raises:
            StorageUnavailable: The database cannot be opened or read for now.
        """
        return await self._run(self._readers, lambda: self._read(work))

    async def read_clock(self) -> float:
        return time.time()

    async def ping(self) -> None:
        """Make sure that the database takes writes."""
        await self._run(
            self._writers, lambda: self._write(lambda db: db.exec_driver_sql(_TOUCH), False)
        )

    async def prepare(self) -> None:
        """Bring the schema to this version: only processes on this machine work with it.

        Raises:
            InvalidSettings: It is newer, and this version cannot work with it.
        """
        await self._run(self._writers, lambda: self._write(migrations.upgrade, True))

    async def migrate(self) -> None:
        """As `prepare`."""
        await self.prepare()

    async def close(self) -> None:
        """Let go of the file, after what is being written. A second call does nothing."""
        if self._is_closed:
            return
        await self._run(self._writers, self._disconnect)
        self._is_closed = True
        self._writers.shutdown()
        self._readers.shutdown()
        self._engine.dispose()

    async def _run(self, threads: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        if self._is_closed:
            raise StorageUnavailable("The database is closed.")
        return await asyncio.get_running_loop().run_in_executor(threads, call)

    def _write(self, work: Callable[[Connection], T], durable: bool) -> T:
        with _storage_errors():
            if self._writer is None:
                self._writer = self._engine.connect()
            with self._writer.begin():
                _begin(self._writer, durable)
                return work(self._writer)

    def _read(self, work: Callable[[Connection], T]) -> T:
        with _storage_errors(), self._engine.connect() as db:
            return work(db)

    def _disconnect(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _prepare(connection: sqlite3.Connection, _: object) -> None:
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").close()
            break
        except sqlite3.OperationalError as error:
            # SQLite does not wait by itself for another process that makes the same change.
            is_busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not is_busy or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    connection.execute("PRAGMA foreign_keys = ON").close()


def _begin(db: Connection, durable: bool) -> None:
    if db.info.get("durable") != durable:
        db.exec_driver_sql(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        db.info["durable"] = durable
    db.exec_driver_sql("BEGIN IMMEDIATE")


def _encode_json(value: object) -> str:
    return msgspec.json.encode(value).decode()


_TROUBLES = {
    sqlite3.SQLITE_PERM: "may not be accessed",
    sqlite3.SQLITE_BUSY: "is locked by another process",
    sqlite3.SQLITE_LOCKED: "is locked",
    sqlite3.SQLITE_READONLY: "cannot be written to",
    sqlite3.SQLITE_IOERR: "cannot be read or written, its disk fails",
    # SQLite says so of a read that fails with EIO as well.
    sqlite3.SQLITE_CORRUPT: "is damaged, or its disk fails",
    sqlite3.SQLITE_FULL: "is full, there is no room left on its disk",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened",
}
"""What goes wrong without a fault of the program. https://www.sqlite.org/rescode.html"""


@contextmanager
def _storage_errors() -> Generator[None]:
    try:
        yield
    except (DBAPIError, sqlite3.Error) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        # The low byte is the primary code, the others say more.
        trouble = _TROUBLES.get(getattr(cause, "sqlite_errorcode", 0) & 0xFF)
        if trouble is None:
            raise
        raise StorageUnavailable(f"The database {trouble} ({cause}).") from error
