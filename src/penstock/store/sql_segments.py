"""The objects that hold replies, in SQL."""

from collections.abc import Sequence
from dataclasses import asdict

from sqlalchemy import Connection, bindparam, delete, insert, select

from penstock.model import BatchId, SegmentObject, SliceId, SliceStatus, slice_id
from penstock.store.tables import segment_objects, slices
from penstock.store.transactions import SqlTransactions, portions


class SegmentStore(SqlTransactions):
    """The part of the store that names objects."""

    async def add_segment_objects(self, objects: Sequence[SegmentObject]) -> set[SliceId]:
        def work(db: Connection) -> set[SliceId]:
            attempts = _lock(db, [slice_id(each.batch_id, each.index) for each in objects])
            lost: set[SliceId] = set()
            named: list[SegmentObject] = []
            for each in objects:
                id_ = slice_id(each.batch_id, each.index)
                if attempts.get(id_) == each.attempt:
                    named.append(each)
                else:
                    lost.add(id_)
            if named:
                db.execute(insert(segment_objects), [asdict(each) for each in named])
            return lost

        return await self._write(work)

    async def replace_segment_objects(self, whole: SegmentObject) -> bool:
        def work(db: Connection) -> bool:
            id_ = slice_id(whole.batch_id, whole.index)
            if _lock(db, [id_]).get(id_) != whole.attempt:
                return False
            values = asdict(whole)
            db.execute(_FORGET_UP_TO, {f"of_{name}": values[name] for name in _PLACE})
            db.execute(insert(segment_objects), values)
            return True

        return await self._write(work)

    async def list_segment_objects(
        self, batch_id: BatchId, *, first: int = 0, last: int | None = None
    ) -> list[SegmentObject]:
        statement, values = _LIST_FROM, {"batch_id": batch_id, "first": first}
        if last is not None:
            statement, values = _LIST_FROM_TO, {**values, "last": last}
        return [SegmentObject(**row) for row in await self._read(statement, values)]

    async def forget_segment_objects(self, batch_id: BatchId) -> None:
        await self._write(lambda db: db.execute(_FORGET, {"of_batch_id": batch_id}))

    async def list_segment_batches(self) -> list[BatchId]:
        return [BatchId(row["batch_id"]) for row in await self._read(_BATCHES)]


_PLACE = ("batch_id", "index", "attempt")

_LOCK_RUNNING = (
    select(slices.c.id, slices.c.attempt)
    .where(
        slices.c.id.in_(bindparam("ids", expanding=True)),
        slices.c.status == SliceStatus.RUNNING,
    )
    # In one order, so that two that lock the same ones do not wait for each other.
    .order_by(slices.c.id)
    .with_for_update()
)

_FORGET_UP_TO = delete(segment_objects).where(
    segment_objects.c.batch_id == bindparam("of_batch_id"),
    segment_objects.c.index == bindparam("of_index"),
    segment_objects.c.attempt <= bindparam("of_attempt"),
)

_LIST_FROM = (
    select(segment_objects)
    .where(
        segment_objects.c.batch_id == bindparam("batch_id"),
        segment_objects.c.index >= bindparam("first"),
    )
    .order_by(
        segment_objects.c.index,
        segment_objects.c.attempt,
        segment_objects.c.number,
    )
)

_LIST_FROM_TO = _LIST_FROM.where(segment_objects.c.index <= bindparam("last"))

_FORGET = delete(segment_objects).where(segment_objects.c.batch_id == bindparam("of_batch_id"))

_BATCHES = select(segment_objects.c.batch_id).distinct().order_by(segment_objects.c.batch_id)


def _lock(db: Connection, ids: Sequence[SliceId]) -> dict[SliceId, int]:
    """The attempts of those slices that are running, which stay so until the end of the
    transaction."""
    attempts: dict[SliceId, int] = {}
    for some in portions(sorted(set(ids))):
        rows = db.execute(_LOCK_RUNNING, {"ids": some}).mappings()
        attempts.update((row["id"], row["attempt"]) for row in rows)
    return attempts
