"""How the store in SQL runs its transactions, and hands on the jobs that they bring forth."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import Connection, Executable, RowMapping, Table, make_url, select, union_all
from sqlalchemy.sql import ColumnElement

from penstock.errors import InvalidSettings
from penstock.model import Job, ProjectId
from penstock.store import migrations
from penstock.store.base import JobSink
from penstock.store.sqlite import SqliteDatabase

T = TypeVar("T")

_MOST_IDS = 1000
"""How many IDs one statement names; SQLite takes 32,766 values."""
_TOUCH = "UPDATE alembic_version SET version_num = version_num"


class SqlTransactions:
    """The ground of `SqlStore`: the database, its schema and its transactions."""

    def __init__(self, url: str, *, jobs: JobSink | None = None) -> None:
        place = make_url(url)
        if place.get_backend_name() != "sqlite" or place.database in (None, "", ":memory:"):
            raise InvalidSettings(
                f"The database URL {place.render_as_string()} is none that Penstock can use: "
                "it must be of the form sqlite:////folder/penstock.db."
            )
        self._db = SqliteDatabase(place.set(drivername="sqlite"))
        self._jobs = jobs
        self._writes: set[asyncio.Task[Any]] = set()

    async def open(self) -> None:
        try:
            await self._write(migrations.upgrade)
        except Exception:
            await self.close()
            raise

    async def close(self) -> None:
        await asyncio.gather(*self._writes, return_exceptions=True)
        await self._db.close()

    async def ping(self) -> None:
        await self._write(lambda db: db.exec_driver_sql(_TOUCH), durable=False)

    # Transactions

    async def _read(
        self, statement: Executable, values: Mapping[str, object] | None = None
    ) -> Sequence[RowMapping]:
        return await self._db.read(lambda db: db.execute(statement, values).mappings().all())

    async def _write(
        self,
        work: Callable[[Connection], T],
        *,
        jobs: Sequence[Job] = (),
        durable: bool = True,
    ) -> T:
        """Run `work` as one transaction, then enqueue `jobs`, to which `work` may add.

        A task of its own sees both through when the caller is cancelled: a change without
        its jobs would leave a batch standing until the next start.
        """
        task = asyncio.create_task(self._transact(work, jobs, durable))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        return await asyncio.shield(task)

    async def _transact(
        self, work: Callable[[Connection], T], jobs: Sequence[Job], durable: bool
    ) -> T:
        result = await self._db.write(work, durable=durable)
        # An engine beside SQLite has no part in the transaction: it learns of it afterwards.
        if jobs and self._jobs is not None:
            await self._jobs.enqueue(jobs)
        return result


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
