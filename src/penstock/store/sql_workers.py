"""Workers that are known to live, in SQL."""

from sqlalchemy import Connection, bindparam, delete, select

from penstock.store.dialects import upsert
from penstock.store.tables import budget_leases, workers
from penstock.store.transactions import SqlTransactions


class WorkerStore(SqlTransactions):
    """The part of the store that keeps workers."""

    async def keep_worker(self, worker_id: str, *, version: str, now: float) -> None:
        def work(db: Connection) -> None:
            statement = upsert(db, workers).values(
                id=worker_id, version=version, started_at=now, seen_at=now
            )
            db.execute(
                statement.on_conflict_do_update(
                    index_elements=["id"], set_={"version": version, "seen_at": now}
                )
            )

        await self._write(work, durable=False)

    async def list_workers(self, *, seen_after: float) -> list[str]:
        return [row["id"] for row in await self._read(_WORKERS, {"seen_after": seen_after})]

    async def forget_worker(self, worker_id: str) -> None:
        def work(db: Connection) -> None:
            db.execute(delete(budget_leases).where(budget_leases.c.worker_id == worker_id))
            db.execute(delete(workers).where(workers.c.id == worker_id))

        await self._write(work, durable=False)


_WORKERS = (
    select(workers.c.id)
    .where(workers.c.seen_at > bindparam("seen_after"))
    .order_by(workers.c.id)
)
