"""The contract kit of what a store keeps of objects that hold replies.

Inherit from `SegmentContract` beside `StoreContract`, whose fixtures it uses.
"""

import asyncio
from dataclasses import replace

from penstock.model import BatchId, SegmentObject
from penstock.store.base import Store
from penstock.testing.store import (
    BOB,
    NOON,
    claim,
    end_all,
    ended,
    ids_of,
    report,
    so_far,
    start,
)

LATE = NOON + 3600
"""When every lease has ended."""


def an_object(
    index: int, attempt: int, number: int = 0, *, batch: str = "batch-1", key: str = ""
) -> SegmentObject:
    return SegmentObject(
        batch_id=BatchId(batch),
        index=index,
        attempt=attempt,
        number=number,
        key=key or f"segments/{batch}/{index}.{attempt}.{number}",
        bytes=100 + number,
    )


async def named(store: Store, batch: str = "batch-1") -> list[SegmentObject]:
    return await store.list_segment_objects(BatchId(batch))


class SegmentContract:
    """Inherit, beside `StoreContract`."""

    async def test_objects_are_listed_as_they_were_named_by_slice_attempt_and_number(
        self, store: Store
    ) -> None:
        await start(store, 3)
        await claim(store, ids_of(0, 1, 2))
        objects = [an_object(2, 1), an_object(0, 1, 1), an_object(1, 1), an_object(0, 1, 0)]

        assert await store.add_segment_objects(objects) == set()

        assert await named(store) == [objects[3], objects[1], objects[2], objects[0]]
        assert await named(store, "batch-2") == []

    async def test_no_objects_are_named_at_once(self, store: Store) -> None:
        assert await store.add_segment_objects([]) == set()

    async def test_a_range_of_slices_has_both_its_ends(self, store: Store) -> None:
        await start(store, 4)
        await claim(store, ids_of(0, 1, 2, 3))
        objects = [an_object(index, 1) for index in range(4)]
        await store.add_segment_objects(objects)

        list_objects = store.list_segment_objects
        batch = BatchId("batch-1")
        assert await list_objects(batch, first=1, last=2) == objects[1:3]
        assert await list_objects(batch, first=2) == objects[2:]
        assert await list_objects(batch, last=0) == objects[:1]
        assert await list_objects(batch, first=4) == []

    async def test_what_a_worker_puts_that_lost_its_slice_is_not_named(
        self, store: Store
    ) -> None:
        await start(store, 3)
        await claim(store, ids_of(0, 1, 2))
        [first] = await claim(store, ids_of(0), BOB, now=LATE)
        assert first.slice.attempt == 2

        told = await store.add_segment_objects(
            [an_object(0, 1), an_object(0, 1, 1), an_object(1, 1), an_object(2, 2)]
        )

        assert told == {*ids_of(0), *ids_of(2)}
        assert await named(store) == [an_object(1, 1)]
        assert await store.add_segment_objects([an_object(0, 2)]) == set()

    async def test_no_object_of_a_slice_that_does_not_run_is_named(self, store: Store) -> None:
        await start(store, 3)
        [given_back, done] = await claim(store, ids_of(0, 1))
        await report(store, so_far(given_back, 3, ends=False), ended(done))
        objects = [an_object(0, 1), an_object(1, 1), an_object(2, 0), an_object(7, 1)]

        told = await store.add_segment_objects(objects)

        assert told == set(ids_of(0, 1, 2, 7))
        assert await named(store) == []

    async def test_objects_of_earlier_attempts_stay_named(self, store: Store) -> None:
        await start(store, 1)
        [held] = await claim(store, ids_of(0))
        await store.add_segment_objects([an_object(0, 1)])
        await report(store, so_far(held, 3, ends=False))
        await claim(store, ids_of(0))

        await store.add_segment_objects([an_object(0, 2)])

        assert await named(store) == [an_object(0, 1), an_object(0, 2)]

    async def test_one_object_takes_the_place_of_all_of_its_slice(self, store: Store) -> None:
        await start(store, 2)
        [held, _] = await claim(store, ids_of(0, 1))
        await store.add_segment_objects([an_object(0, 1), an_object(1, 1)])
        await report(store, so_far(held, 3, ends=False))
        await claim(store, ids_of(0))
        await store.add_segment_objects([an_object(0, 2, 0), an_object(0, 2, 1)])
        whole = an_object(0, 2, 1, key="segments/whole")

        assert await store.replace_segment_objects(whole)
        assert await store.replace_segment_objects(whole)  # an answer may have been lost

        assert await named(store) == [whole, an_object(1, 1)]

    async def test_who_lost_the_slice_replaces_nothing(self, store: Store) -> None:
        await start(store, 2)
        await claim(store, ids_of(0))
        await store.add_segment_objects([an_object(0, 1)])
        await claim(store, ids_of(0), BOB, now=LATE)
        await store.add_segment_objects([an_object(0, 2)])

        for late in (an_object(0, 1, 9), an_object(0, 3, 9), an_object(1, 0, 9)):
            assert not await store.replace_segment_objects(late)

        assert await named(store) == [an_object(0, 1), an_object(0, 2)]

    async def test_of_a_claim_and_a_late_object_one_comes_first(self, store: Store) -> None:
        """So a worker either finds the object in its way or keeps it from being named."""
        await start(store, 8)
        await claim(store, ids_of(*range(8)))

        async def put(index: int) -> bool:
            return not await store.add_segment_objects([an_object(index, 1)])

        async def take_over(index: int) -> list[SegmentObject]:
            await claim(store, ids_of(index), BOB, now=LATE)
            return await store.list_segment_objects(BatchId("batch-1"), first=index, last=index)

        both = [(put(index), take_over(index)) for index in range(8)]
        told = await asyncio.gather(*(doing for pair in both for doing in pair))

        for was_named, found in zip(told[::2], told[1::2], strict=True):
            assert bool(found) == was_named

    async def test_a_batch_is_forgotten_and_others_are_not(self, store: Store) -> None:
        await start(store, 1, "batch-1")
        await start(store, 1, "batch-2")
        for batch in ("batch-1", "batch-2"):
            await claim(store, ids_of(0, batch=batch))
            await store.add_segment_objects([an_object(0, 1, batch=batch)])
        assert await store.list_segment_batches() == ["batch-1", "batch-2"]

        await store.forget_segment_objects(BatchId("batch-1"))
        await store.forget_segment_objects(BatchId("batch-1"))

        assert await named(store) == []
        assert await named(store, "batch-2") == [an_object(0, 1, batch="batch-2")]
        assert await store.list_segment_batches() == ["batch-2"]

    async def test_objects_outlive_the_end_of_their_slices(self, store: Store) -> None:
        """The finalizer reads them after it."""
        await start(store, 2)
        await claim(store, ids_of(0, 1))
        objects = [replace(an_object(index, 1), bytes=2**40) for index in (0, 1)]
        await store.add_segment_objects(objects)
        await store.recover_slices()
        await end_all(store, 2)

        assert await named(store) == objects
