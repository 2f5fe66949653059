"""How the store in SQL runs its transactions, and hands on the jobs that they bring forth."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection, Executable, RowMapping, Table, make_url, select, union_all
from sqlalchemy.exc import ArgumentError
from sqlalchemy.sql import ColumnElement

from penstock.errors import InvalidSettings
from penstock.model import Job, ProjectId
from penstock.store import migrations
from penstock.store.base import JobSink
from penstock.store.sqlite import SqliteDatabase

T = TypeVar("T")

_MOST_IDS = 1000
"""How many IDs one statement names; SQLite takes 32,766 values."""


class Database(Protocol):
    """What the databases have in common; their own docstrings say more."""

    async def write(
        self,
        work: Callable[[Connection], T],
        *,
        durable: bool,
        finish: Callable[[object | None], Awaitable[None]],
    ) -> T: ...
    async def read(self, work: Callable[[Connection], T]) -> T: ...
    async def read_clock(self) -> float: ...
    async def ping(self) -> None: ...
    async def prepare(self) -> None: ...
    async def migrate(self) -> None: ...
    async def close(self) -> None: ...


class SqlTransactions:
    """The ground of `SqlStore`: the database, its schema and its transactions."""

    def __init__(self, url: str, *, jobs: JobSink | None = None) -> None:
        self._db = _find_database(url)
        self._jobs = jobs
        self._writes: set[asyncio.Task[Any]] = set()

    async def open(self) -> None:
        try:
            await self._db.prepare()
        except Exception:
            await self.close()
            raise

    async def migrate(self) -> None:
        """Bring the schema to this version, before `open`. Safe from two hosts at once.

        Raises:
            InvalidSettings: The schema is newer than this version of Penstock.
            StorageUnavailable: The database does not answer, or its tables stay locked.
        """
        await self._db.migrate()

    async def find_version(self) -> str | None:
        """The version of the schema; None if the database is empty."""
        return await self._db.read(migrations.find_version)

    async def close(self) -> None:
        await asyncio.gather(*self._writes, return_exceptions=True)
        await self._db.close()

    async def ping(self) -> None:
        await self._db.ping()

    async def read_clock(self) -> float:
        return await self._db.read_clock()

    # Transactions

    async def _read(
        self, statement: Executable, values: Mapping[str, object] | None = None
    ) -> Sequence[RowMapping]:
        return await self._db.read(lambda db: db.execute(statement, values).mappings().all())

    async def _write(
        self,
        work: Callable[[Connection], T],
        *,
        jobs: list[Job] | None = None,
        durable: bool = True,
    ) -> T:
        """Run `work` as one transaction and enqueue `jobs`, to which `work` may add: within
        the transaction where the engine can take part in it, else after it.

        A task of its own sees both through when the caller is cancelled: a change without
        its jobs would leave a batch standing until the next start.
        """
        jobs = [] if jobs is None else jobs
        task = asyncio.create_task(self._transact(work, jobs, durable))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        return await asyncio.shield(task)

    async def _transact(
        self, work: Callable[[Connection], T], jobs: list[Job], durable: bool
    ) -> T:
        given = len(jobs)

        def work_anew(db: Connection) -> T:
            del jobs[given:]  # what an attempt has added that came to nothing
            return work(db)

        async def enqueue(connection: object | None) -> None:
            if jobs and self._jobs is not None:
                await self._jobs.enqueue(jobs, connection=connection)

        return await self._db.write(work_anew, durable=durable, finish=enqueue)


def _find_database(url: str) -> Database:
    try:
        place = make_url(url)
    except ArgumentError:
        raise InvalidSettings(f"The database URL cannot be understood. {_URLS}") from None
    match place.drivername:
        case "postgresql" | "postgres" | "postgresql+asyncpg":
            # Imported where it is used, for it costs memory that SQLite does not need.
            from penstock.store.postgres import PostgresDatabase  # noqa: PLC0415

            return PostgresDatabase(url)
        case "sqlite" if place.database not in (None, "", ":memory:"):
            return SqliteDatabase(place)
        case _:
            # Without what stands behind the "?", which may be a password as well.
            shown = place.set(query={}).render_as_string()
            raise InvalidSettings(
                f"The database URL {shown} is none that Penstock can use. {_URLS}"
            )


_URLS = (
    "It must be of the form postgresql://user:password@host:port/database or "
    "sqlite:////folder/penstock.db."
)


def portions(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """The items in runs that one statement can name."""
    for start in range(0, len(items), _MOST_IDS):
        yield items[start : start + _MOST_IDS]


def after(
    table: Table,
    project_id: ProjectId | None,
    id_: str | None,
    *,
    descending: bool,
    deleted: Table | None = None,
) -> list[ColumnElement[bool]]:
    """The condition that a page begins after an ID; nothing is after one that never was.

    Args:
        project_id: Whose it must be; None asks for no owner.
        deleted: Where it is told at which place deleted objects stood.
    """
    if id_ is None:
        return []
    places = [
        select(where.c.seq).where(
            where.c.id == id_,
            *([] if project_id is None else [where.c.project_id == project_id]),
        )
        for where in (table, deleted)
        if where is not None
    ]
    seq = union_all(*places).scalar_subquery()
    return [table.c.seq < seq if descending else table.c.seq > seq]
