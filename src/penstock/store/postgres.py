"""A PostgreSQL database: connections, time limits, and what is wrong with it in words.

Transactions are the same functions as on SQLite, run by SQLAlchemy over asyncpg. They read
what is committed (READ COMMITTED) and lock the rows that they decide about; one that PostgreSQL
gives up because of another, by deadlock, is run again.

No call waits for ever. The server ends what takes too long; should the server itself not
answer, because its machine is gone or it is stopped, the connection is cut from this side.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import asyncpg  # pyright: ignore[reportMissingTypeStubs]
import msgspec
from sqlalchemy import Connection, NullPool, event, exc, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from penstock.errors import InvalidRequest, InvalidSettings, StorageUnavailable
from penstock.store import migrations
from penstock.store.dialects import number_of

T = TypeVar("T")
_driver: Any = asyncpg  # it has no types

_CONNECTIONS = 5
"""How many a process has at most, beside that of a migration."""
_CONNECT_S = 5
_POOL_S = 10
"""How long to wait for one of our own connections."""
_STATEMENT_S = 15
_LOCK_S = 10
"""How long to wait for a row that another transaction holds."""
_TRANSACTION_S = 20
"""After this the connection is cut."""
_CLOSE_S = 5
_ATTEMPTS = 5
"""How often to run a transaction that others get in the way of."""

_MIGRATION_LOCK_S = 3
"""How long a migration may wait for a table, for all others wait behind it."""
_MIGRATION_ATTEMPTS = 20
_MIGRATION_WAIT_S = 600
"""How long to wait for another host that migrates."""

_SERVER_SETTINGS = {
    "application_name": "penstock",
    "statement_timeout": f"{_STATEMENT_S}s",
    "lock_timeout": f"{_LOCK_S}s",
    # A process that was stopped in the midst of a transaction must not hold its rows for ever.
    "idle_in_transaction_session_timeout": f"{_TRANSACTION_S}s",
    "jit": "off",  # each statement touches few rows
}
_MIGRATION_SETTINGS = _SERVER_SETTINGS | {
    "statement_timeout": "0",  # an index of a large table takes its time
    "lock_timeout": f"{_MIGRATION_LOCK_S}s",
    "idle_in_transaction_session_timeout": "0",
}


class PostgresDatabase:
    """Runs transactions.

    Args:
        url: `postgresql://user:password@host:port/database`, with what libpq takes behind `?`.
    """

    def __init__(self, url: str) -> None:
        self._url = f"postgresql://{url.partition('://')[2]}"
        self._open: set[Any] = set()
        self._stale_before = 0.0
        """The server has gone that connections made earlier than this lead to."""
        self._is_closed = False
        self._engine = self._make_engine(
            _SERVER_SETTINGS,
            pool_size=_CONNECTIONS,
            max_overflow=0,
            pool_timeout=_POOL_S,
        )
        event.listen(self._engine.sync_engine, "connect", self._note_connection)
        event.listen(self._engine.sync_engine, "checkout", self._check_connection)
        self._reader = self._engine.execution_options(isolation_level="AUTOCOMMIT")

    async def write(
        self,
        work: Callable[[Connection], T],
        *,
        durable: bool,
        finish: Callable[[object | None], Awaitable[None]],
    ) -> T:
        """Run `work` as one transaction; if it raises, nothing was changed.

        It may be run several times, and only the last one counts.

        Args:
            durable: Each commit is as durable as the server is told to make it, which is
                at least what is asked for.
            finish: Called with the asyncpg connection before the commit; if it raises,
                nothing was changed.

        Raises:
            StorageUnavailable: The database does not answer or take writes for now.
        """

        async def run() -> T:
            async with self._connection(self._engine) as (db, raw), db.begin():
                result = await db.run_sync(work)
                await finish(raw)
                return result

        return await self._run(run)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work`, of which each statement sees the database at one moment.

        Raises:
            StorageUnavailable: The database does not answer for now.
        """

        async def run() -> T:
            async with self._connection(self._reader) as (db, _):
                return await db.run_sync(work)

        return await self._run(run)

    async def read_clock(self) -> float:
        return await self.read(lambda db: db.execute(_CLOCK).scalar_one())

    async def ping(self) -> None:
        """Make sure that the database takes writes, without waiting for another who asks."""
        await self.write(lambda db: db.execute(_TOUCH), durable=False, finish=_nothing_more)

    async def prepare(self) -> None:
        """Make sure that this version of Penstock can work with the schema.

        Raises:
            InvalidSettings: It cannot.
        """
        await self.read(migrations.check)

    async def migrate(self) -> None:
        """Bring the schema to this version, beside processes that are at work.

        Of several hosts that call it at once, one migrates and the others wait for it.

        Raises:
            InvalidSettings: The schema is newer than this version of Penstock.
            StorageUnavailable: The database does not answer, or tables stay locked.
        """
        engine = self._make_engine(_MIGRATION_SETTINGS, poolclass=NullPool)
        try:
            with _storage_errors():
                async with engine.connect() as db:
                    await _wait_for_turn(db)
                    await _migrate(db)
        finally:
            await engine.dispose()

    async def close(self) -> None:
        """Let go of all connections. A second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self._engine.dispose()
        except TimeoutError:
            for raw in list(self._open):
                raw.terminate()

    # Connections

    def _make_engine(self, settings: dict[str, str], **options: Any) -> AsyncEngine:
        async def connect() -> Any:
            return await _driver.connect(
                self._url, timeout=_CONNECT_S, server_settings=settings
            )

        return create_async_engine(
            "postgresql+asyncpg://",
            async_creator=connect,
            json_serializer=_encode_json,
            json_deserializer=msgspec.json.decode,
            **options,
        )

    @asynccontextmanager
    async def _connection(
        self, engine: AsyncEngine
    ) -> AsyncGenerator[tuple[AsyncConnection, object]]:
        """A connection and what asyncpg calls so, for no longer than a transaction may take."""
        timer: asyncio.TimerHandle | None = None
        try:
            async with engine.connect() as db:
                raw = (await db.get_raw_connection()).driver_connection
                loop = asyncio.get_running_loop()
                timer = loop.call_later(_TRANSACTION_S, self._cut, raw)
                yield db, raw
        finally:
            # Not before the connection is given back: that may need an answer as well.
            if timer is not None:
                timer.cancel()

    def _cut(self, raw: Any) -> None:
        self._stale_before = time.monotonic()
        raw.terminate()

    def _note_connection(self, connection: Any, record: Any) -> None:
        raw = connection.driver_connection
        record.info["made_at"] = time.monotonic()
        self._open.add(raw)
        raw.add_termination_listener(self._open.discard)

    def _check_connection(self, connection: Any, record: Any, _: object) -> None:
        """Let nobody have a connection to a server that has gone; it costs no round trip."""
        raw = connection.driver_connection
        if raw.is_closed() or record.info["made_at"] < self._stale_before:
            raw.terminate()
            raise exc.DisconnectionError("The server has gone.")

    async def _run(self, run: Callable[[], Awaitable[T]]) -> T:
        """Run a transaction, again if others got in its way."""
        for attempt in range(1, _ATTEMPTS + 1):
            if self._is_closed:
                raise StorageUnavailable("The database is closed.")
            try:
                with _storage_errors():
                    return await run()
            except _Collision as collision:
                if attempt == _ATTEMPTS:
                    raise StorageUnavailable(str(collision)) from collision
                await asyncio.sleep(random.uniform(0, 0.02 * 2**attempt))
        raise AssertionError


# Migrations


async def _wait_for_turn(db: AsyncConnection) -> None:
    """Hold the right to migrate for as long as the connection lasts."""
    deadline = time.monotonic() + _MIGRATION_WAIT_S
    while True:
        # Asked for again and again, for one that waits in a statement would hold up the
        # other's `CREATE INDEX CONCURRENTLY`, which waits for all transactions.
        is_mine = (await db.execute(_TAKE_TURN, {"turn": _TURN})).scalar_one()
        await db.commit()
        if is_mine:
            return
        if time.monotonic() > deadline:
            raise StorageUnavailable(
                f"Another host has been migrating the database for {_MIGRATION_WAIT_S} s."
            )
        await asyncio.sleep(0.2)


async def _migrate(db: AsyncConnection) -> None:
    for attempt in range(1, _MIGRATION_ATTEMPTS + 1):
        try:
            await db.run_sync(migrations.upgrade_beside)
            return
        except exc.DBAPIError as error:
            if _state_of(error) not in _IN_THE_WAY or attempt == _MIGRATION_ATTEMPTS:
                raise
            await db.rollback()
            await asyncio.sleep(random.uniform(0.1, 0.5) * attempt)


# Statements

_CLOCK = text("SELECT extract(epoch FROM clock_timestamp())::float8")
_TOUCH = text("SELECT version_num FROM alembic_version FOR UPDATE SKIP LOCKED")
_TAKE_TURN = text("SELECT pg_try_advisory_lock(:turn)")
_TURN = number_of("migrate")


# Troubles


class _Collision(Exception):
    """Another transaction got in the way of this one, which has changed nothing."""


_COLLISIONS = {
    "40001": "is too busy: transactions get in each other's way",
    "40P01": "is too busy: transactions wait for each other",
}

_IN_THE_WAY = ("55P03", "40P01")
"""A table was not to be had in time."""

_TROUBLES = {
    "08": "has cut the connection, or did not answer in time",
    "25006": "cannot be written to: it is a standby, or set to be read only",
    "28": "refuses the user or the password",
    "3D000": "does not exist",
    "42501": "does not give this user the right to what Penstock must do",
    "53100": "is full, there is no room left on its disk",
    "53300": "takes no more connections",
    "53": "lacks resources",
    "55P03": "is locked: another transaction holds what is needed",
    "57014": "did not finish a statement in time",
    "57": "is starting, shutting down or has crashed",
    "25P03": "ended a transaction that stood still",
    "58": "cannot be read or written, its disk fails",
    "XX001": "is damaged",
    "XX002": "is damaged",
}
"""What goes wrong without a fault of the program, by SQLSTATE or the class of it.
https://www.postgresql.org/docs/current/errcodes-appendix.html"""

_UNREACHABLE = "cannot be reached"

_ADVICE = {
    _UNREACHABLE: "start it, or correct the host and port of database_url",
    _TROUBLES["28"]: "correct them in database_url",
    _TROUBLES["3D000"]: "create it, or correct its name in database_url",
    _TROUBLES["42501"]: "grant it, or name the user in database_url that made the tables",
    _TROUBLES["53300"]: "raise its max_connections, or run fewer processes",
}
"""What to do, where a person must do something."""

_NO_TEXT = ("22021", "22P05")
"""A text has U+0000 in it, or is no UTF-8."""


@contextmanager
def _storage_errors() -> Generator[None]:
    try:
        yield
    except (
        exc.SQLAlchemyError,
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        OSError,
    ) as error:
        cause = _cause_of(error)
        state = _state_of(error)
        if isinstance(cause, asyncpg.ClientConfigurationError):
            raise InvalidSettings(f"The database URL cannot be used: {cause}.") from error
        if state in _NO_TEXT:
            raise InvalidRequest(
                "A text holds the character U+0000, which the database cannot keep."
            ) from error
        if isinstance(cause, asyncpg.InvalidCachedStatementError):
            # It was prepared before another host migrated; SQLAlchemy forgets it now.
            raise _Collision(_sentence("was migrated meanwhile", cause)) from error
        if state in _COLLISIONS:
            raise _Collision(_sentence(_COLLISIONS[state], cause)) from error
        trouble = _trouble(cause, state)
        if trouble is None:
            raise
        raise StorageUnavailable(_sentence(trouble, cause)) from error


def _trouble(cause: BaseException, state: str) -> str | None:
    if isinstance(cause, exc.TimeoutError):
        return "is too busy: all connections to it are in use"
    if isinstance(cause, TimeoutError):
        return "does not answer"
    if isinstance(cause, OSError):
        return _UNREACHABLE
    if isinstance(cause, asyncpg.InterfaceError):
        return _TROUBLES["08"] if "closed" in str(cause) else None
    return _TROUBLES.get(state) or _TROUBLES.get(state[:2])


def _sentence(trouble: str, cause: BaseException) -> str:
    said = str(cause).partition("\n")[0].rstrip(".")
    advice = f"; {_ADVICE[trouble]}" if trouble in _ADVICE else ""
    return f"The database {trouble}{f' ({said})' if said else ''}{advice}."


def _cause_of(error: BaseException) -> BaseException:
    """What asyncpg said, beneath what SQLAlchemy makes of it."""
    if isinstance(error, exc.DBAPIError) and error.orig is not None:
        return error.orig.__cause__ or error.orig
    return error


def _state_of(error: BaseException) -> str:
    return getattr(_cause_of(error), "sqlstate", None) or ""


async def _nothing_more(_: object | None) -> None:
    pass


def _encode_json(value: object) -> str:
    return msgspec.json.encode(value).decode()
