"""A connection to PostgreSQL that outlives the server's restarts.

PgQueuer gives up when a statement fails. Here a statement waits instead: the connection is
made anew, with growing pauses, and the statement is run again. So it may be run twice, which
all of PgQueuer's bear: a job whose handing out was not heard of goes stale and is handed out
again.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Self, TypeVar, cast

import asyncpg  # pyright: ignore[reportMissingTypeStubs]
import structlog
from pgqueuer.core.tm import TaskManager
from pgqueuer.ports.driver import NotifyCallback

_log = structlog.get_logger()

T = TypeVar("T")

# asyncpg has no types that a checker could use.
Connection = Any
"""An `asyncpg.Connection`, or what a pool of them lends."""
Pool = Any
"""An `asyncpg.Pool`."""

FAILURES = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError)
"""What goes wrong between us and a server."""
ANSWER_TIMEOUT_S = 10.0
"""How long a connection may take to open, and a statement to be answered."""
_CLOSE_S = 2.0
_TABLE_CHANGED = "table_changed_event"
"""Stands in the notices of PgQueuer's trigger."""
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 5.0

_connect = cast(Callable[..., Awaitable[Connection]], asyncpg.connect)  # pyright: ignore[reportUnknownMemberType]
_create_pool = cast(Callable[..., Awaitable[Pool]], asyncpg.create_pool)  # pyright: ignore[reportUnknownMemberType]
_OPTIONS: dict[str, object] = {
    "timeout": ANSWER_TIMEOUT_S,
    "command_timeout": ANSWER_TIMEOUT_S,
    "server_settings": {
        "application_name": "penstock",
        # A process that was stopped in the midst of a transaction must not hold its rows.
        "idle_in_transaction_session_timeout": "20s",
    },
}


async def open_pool(dsn: str, *, max_size: int) -> Pool:
    """Make a pool that connects when a connection is asked for."""
    return await _create_pool(dsn, min_size=0, max_size=max_size, **_OPTIONS)


async def connect(dsn: str) -> Connection:
    """One connection, for a moment."""
    return await _connect(dsn, **_OPTIONS)


class Link:
    """PgQueuer's driver over one connection, which `run` keeps up.

    Args:
        dsn: Where the database is: `postgresql://user@host/name`.
    """

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: Connection | None = None
        self._listeners: list[tuple[str, NotifyCallback]] = []
        self._is_woken = False
        self._turn = asyncio.Lock()
        self._may_go = asyncio.Event()
        """There is a connection, or none is waited for any more."""
        self._lost = asyncio.Event()
        self._gave_up = False
        self._pause_s = _FIRST_PAUSE_S
        self._down_since: float | None = None
        self._shutdown = asyncio.Event()

    async def run(self) -> None:
        """Keep the connection up until cancelled."""
        try:
            while True:
                self._lost.clear()
                await self._connect()
                await self._lost.wait()
                await asyncio.sleep(self._pause_s)
                self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)
        finally:
            self.give_up()
            if self._connection is not None:
                connection, self._connection = self._connection, None
                with suppress(*FAILURES):
                    await connection.close(timeout=_CLOSE_S)

    def give_up(self) -> None:
        """From now on let a statement fail at once while there is no connection."""
        self._gave_up = True
        self._may_go.set()

    def note_look(self) -> None:
        """The queue is being looked at: what changes from now on is worth another look."""
        self._is_woken = False

    # What PgQueuer asks of a driver

    async def fetch(self, query: str, *args: object) -> list[dict[str, object]]:
        rows = await self._do(lambda connection: connection.fetch(query, *args))
        return [dict(row) for row in rows]

    async def execute(self, query: str, *args: object) -> str:
        return await self._do(lambda connection: connection.execute(query, *args))

    async def notify(self, channel: str, payload: str) -> None:
        await self.execute("SELECT pg_notify($1, $2)", channel, payload)

    async def add_listener(self, channel: str, callback: NotifyCallback) -> None:
        """Also on each connection that is made later."""

        def hear(payload: str | bytes | bytearray) -> None:
            if self._is_news(payload):
                callback(payload)

        await self._do(lambda connection: _listen(connection, channel, hear))
        self._listeners.append((channel, hear))

    @property
    def shutdown(self) -> asyncio.Event:
        return self._shutdown

    @property
    def tm(self) -> TaskManager:
        return TaskManager()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing: `run` closes the connection."""

    def _is_news(self, payload: str | bytes | bytearray) -> bool:
        """PgQueuer looks once for each notice, so that after a rush it would look in vain for
        as long; one notice for each look is enough."""
        if _TABLE_CHANGED not in str(payload):
            return True
        was_woken, self._is_woken = self._is_woken, True
        return not was_woken

    async def _do(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        async with self._turn:
            while True:
                connection = await self._wait_for_connection()
                try:
                    result = await work(connection)
                except FAILURES as error:
                    self._lose(connection, error)
                else:
                    self._note_success()
                    return result

    async def _wait_for_connection(self) -> Connection:
        while self._connection is None:
            if self._gave_up:
                raise ConnectionError("There is no connection to the database.")
            await self._may_go.wait()
        return self._connection

    async def _connect(self) -> None:
        try:
            connection = await _connect(self._dsn, **_OPTIONS)
        except FAILURES as error:
            self._lose(None, error)
            return
        try:
            for channel, callback in self._listeners:
                await _listen(connection, channel, callback)
        except BaseException as error:
            connection.terminate()
            if not isinstance(error, FAILURES):
                raise
            self._lose(None, error)
            return
        connection.add_termination_listener(self._note_end)
        self._connection = connection
        self._may_go.set()

    def _note_end(self, connection: Connection) -> None:
        self._lose(connection, ConnectionError("The server has closed the connection."))

    def _lose(self, connection: Connection | None, error: BaseException) -> None:
        if connection is not self._connection:
            return  # of one that was replaced already
        self._connection = None
        if not self._gave_up:
            self._may_go.clear()
        self._lost.set()
        if connection is not None:
            connection.terminate()
        if self._down_since is None:
            self._down_since = time.monotonic()
            _log.warning(
                "The database does not answer; jobs wait until it does.",
                error=str(error) or type(error).__name__,
            )

    def _note_success(self) -> None:
        self._pause_s = _FIRST_PAUSE_S
        if self._down_since is not None:
            down_s = round(time.monotonic() - self._down_since, 1)
            self._down_since = None
            _log.info("The database answers again.", down_s=down_s)


async def _listen(connection: Connection, channel: str, callback: NotifyCallback) -> None:
    def hear(_connection: object, _pid: int, _channel: str, payload: str) -> None:
        callback(payload)

    await connection.add_listener(channel, hear)
