"""What upkeep looks for, in SQL."""

from sqlalchemy import bindparam, delete, exists, or_, select
from sqlalchemy.sql import ColumnElement

from penstock.model import FINAL, BatchStatus, Job, JobKind, SliceStatus
from penstock.store.tables import batches, slices
from penstock.store.transactions import SqlTransactions


class UpkeepStore(SqlTransactions):
    """The part of the store that finds what was left undone."""

    async def list_lost_jobs(self, *, now: float) -> list[Job]:
        rows = await self._read(_LOST_JOBS, {"now": now})
        return [
            Job(
                kind=(
                    JobKind.VALIDATE
                    if row["status"] == BatchStatus.VALIDATING
                    else JobKind.FINALIZE
                ),
                id=row["id"],
            )
            for row in rows
        ]

    async def forget_final_slices(self) -> None:
        await self._write(lambda db: db.execute(FORGET_ALL_FINAL), durable=False)


def has_slices(status: SliceStatus, *conditions: ColumnElement[bool]) -> ColumnElement[bool]:
    return (
        exists()
        .where(slices.c.batch_id == batches.c.id, slices.c.status == status, *conditions)
        .correlate(batches)
    )


_LOST_JOBS = (
    select(batches.c.id, batches.c.status)
    .where(
        batches.c.status.in_([status for status in BatchStatus if status not in FINAL]),
        or_(
            batches.c.status.in_([BatchStatus.VALIDATING, BatchStatus.CANCELLING]),
            batches.c.expires_at <= bindparam("now"),
            ~or_(has_slices(SliceStatus.PENDING), has_slices(SliceStatus.RUNNING)),
        ),
    )
    .order_by(batches.c.seq)
)

FORGET_ALL_FINAL = delete(slices).where(
    # What a native run holds is still to be counted.
    slices.c.native_run.is_(None),
    exists().where(batches.c.id == slices.c.batch_id, batches.c.status.in_(FINAL)),
)

FORGET_FINAL = FORGET_ALL_FINAL.where(slices.c.batch_id == bindparam("batch_id"))
