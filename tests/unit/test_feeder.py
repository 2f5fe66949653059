"""The order in which slices are handed out, and that no more are than the lanes need."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.engine.memory import MemoryEngine
from penstock.executor.feeder import Feeder, begin_strides, next_batch, whole_batch
from penstock.model import (
    Batch,
    BatchId,
    BatchStatus,
    File,
    FileId,
    Job,
    JobKind,
    ProjectId,
    Purpose,
    Slice,
    SliceId,
)
from penstock.store.base import Backlog, BatchChange
from penstock.store.sql import SqlStore
from penstock.testing.store import RecordedJobs

TIMEOUT_S = 10.0
REQUESTS = 10
"""In each slice."""


# Whose turn it is


def waiting(
    batch: str,
    *,
    project: str = "p",
    weight: int = 1,
    expires_at: int = 100,
    created_at: int = 0,
) -> Backlog:
    return Backlog(
        batch_id=BatchId(batch),
        project_id=ProjectId(project),
        weight=weight,
        expires_at=expires_at,
        created_at=created_at,
    )


def test_without_a_candidate_there_is_no_next_one() -> None:
    assert next_batch([], {}) is None


def test_the_earliest_deadline_is_next_and_of_equal_ones_the_oldest() -> None:
    batches = [
        waiting("late", expires_at=300, created_at=1),
        waiting("newer", expires_at=200, created_at=9),
        waiting("older", expires_at=200, created_at=8),
    ]

    order: list[str] = []
    while batch := next_batch(batches, {}):
        order.append(batch.batch_id)
        batches.remove(batch)

    assert order == ["older", "newer", "late"]


def test_the_project_that_had_least_is_next_whatever_its_deadline() -> None:
    batches = [
        waiting("urgent", project="greedy", expires_at=1),
        waiting("patient", project="modest", expires_at=999),
    ]

    found = next_batch(batches, {ProjectId("greedy"): 10.0, ProjectId("modest"): 9.5})

    assert found is not None
    assert found.batch_id == "patient"


def test_a_project_that_has_had_nothing_goes_first() -> None:
    batches = [waiting("a", project="a"), waiting("b", project="b")]

    found = next_batch(batches, {ProjectId("a"): 0.1})

    assert found is not None
    assert found.batch_id == "b"


def test_a_background_project_is_next_only_if_there_is_no_other() -> None:
    grey = replace(waiting("grey", project="grey", expires_at=1), is_background=True)
    red = waiting("red", project="red", expires_at=999)

    assert next_batch([grey, red], {ProjectId("red"): 99.0}) == red
    assert next_batch([grey], {}) == grey


def test_a_newcomer_begins_beside_the_project_of_its_tier_that_had_least() -> None:
    grey = replace(waiting("g", project="grey"), is_background=True)
    backlog = [waiting("a", project="old"), waiting("b", project="new"), grey]
    had = {ProjectId("old"): 9.0, ProjectId("grey"): 1.0, ProjectId("gone"): 3.0}

    assert begin_strides(backlog, had) == {"old": 9.0, "new": 9.0, "grey": 1.0}


@given(
    weights=st.dictionaries(
        st.sampled_from(["a", "b", "c", "d"]), st.integers(1, 10), min_size=1
    ),
    sizes=st.lists(st.integers(1, 50), min_size=20, max_size=300),
)
def test_projects_share_by_weight_within_a_slice(
    weights: dict[str, int], sizes: list[int]
) -> None:
    batches = [waiting(name, project=name, weight=weight) for name, weight in weights.items()]
    strides: dict[ProjectId, float] = {}
    had: Counter[str] = Counter()

    for size in sizes:
        batch = next_batch(batches, strides)
        assert batch is not None
        had[batch.project_id] += size
        strides[batch.project_id] = strides.get(batch.project_id, 0.0) + size / batch.weight

    shares = [had[name] / weight for name, weight in weights.items()]
    assert max(shares) - min(shares) <= max(sizes)


# The feeder at work


class Lanes:
    """Lanes that have room for so many requests."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.expected = 0
        self.busy: set[str] = set()
        """Slices of which a lane has enough."""
        self.blocked: set[str] = set()
        """Slices whose upstreams are left alone."""

    def has_room(self, piece: Slice, batch: Backlog) -> bool:
        del batch
        return self.expected < self.room and piece.id not in self.busy

    def is_blocked(self, piece: Slice) -> bool:
        return piece.id in self.blocked

    def expect(self, piece: Slice, batch: Backlog, *, sign: int = 1) -> None:
        del batch
        self.expected += sign * piece.requests


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqlStore]:
    store = SqlStore(f"sqlite:///{tmp_path / 'penstock.db'}", jobs=RecordedJobs())
    await store.open()
    yield store
    await store.close()


class Handed(RecordedJobs):
    """The jobs that were handed over, as names."""

    @property
    def names(self) -> list[str]:
        return [job.id for job in self.jobs]

    async def cancel(self, jobs: object) -> None:
        raise NotImplementedError

    async def until(self, is_so: Callable[[list[str]], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not is_so(self.names):
                await asyncio.sleep(0.005)


async def begin(
    store: SqlStore,
    name: str,
    *,
    slices: int,
    project: str = "p",
    weight: int = 1,
    life_s: int = 3600,
) -> None:
    """Add a batch whose slices wait to be handed out."""
    now = int(time.time())
    owner = await store.ensure_project(project, weight=weight)
    file = File(
        id=FileId(f"file-{name}"),
        project_id=owner.id,
        purpose=Purpose.BATCH,
        filename="f",
        bytes=1,
        sha256="",
        blob_key=f"files/{name}",
        created_at=now,
    )
    await store.add_file(file)
    batch = Batch(
        id=BatchId(name),
        project_id=owner.id,
        status=BatchStatus.VALIDATING,
        endpoint="/v1/embeddings",
        input_file_id=file.id,
        input_blob_key=file.blob_key,
        completion_window="1h",
        expires_at=now + life_s,
        created_at=now,
    )
    await store.add_batch(batch)
    pieces = [
        Slice(
            batch_id=batch.id,
            index=index,
            start=index,
            end=index + 1,
            first_line=index * REQUESTS + 1,
            requests=REQUESTS,
            models=("m",),
        )
        for index in range(slices)
    ]
    await store.move_batch(
        batch.id, BatchStatus.IN_PROGRESS, now=now, change=BatchChange(slices=pieces)
    )


@asynccontextmanager
async def feeding(
    store: SqlStore,
    lanes: Lanes,
    engine: object,
    *,
    share: Callable[[], tuple[int, int]] = whole_batch,
) -> AsyncIterator[Feeder]:
    feeder = Feeder(store=store, engine=engine, share=share)  # pyright: ignore[reportArgumentType]
    feeder.serve(lanes)
    task = asyncio.create_task(feeder.run())
    feeder.poke()
    try:
        yield feeder
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_no_more_slices_are_handed_out_than_the_lanes_have_room_for(
    store: SqlStore,
) -> None:
    await begin(store, "a", slices=200)
    lanes, handed = Lanes(room=3 * REQUESTS), Handed()
    async with feeding(store, lanes, handed) as feeder:
        await handed.until(lambda names: len(names) == 3)
        feeder.hold("a:0")
        await handed.until(lambda names: len(names) == 4)
        feeder.hold("a:0")
        feeder.hold("nobody:0")
        feeder.has_room()
        feeder.hold("a:1")
        feeder.hold("a:2")
        await handed.until(lambda names: len(names) == 6)

    assert handed.names == [f"a:{n}" for n in range(6)]
    assert {job.kind for job in handed.jobs} == {JobKind.SLICE}


async def test_slices_of_a_batch_are_handed_out_in_input_order_and_once(
    store: SqlStore,
) -> None:
    await begin(store, "a", slices=150)
    lanes, handed = Lanes(room=100_000), Handed()
    async with feeding(store, lanes, handed):
        await handed.until(lambda names: len(names) >= 150)

    assert handed.names == [f"a:{n}" for n in range(150)]
    assert lanes.expected == 150 * REQUESTS


async def test_the_batch_with_the_earliest_deadline_goes_first(store: SqlStore) -> None:
    await begin(store, "later", slices=2, life_s=7200)
    await begin(store, "sooner", slices=2, life_s=3600)
    handed = Handed()
    async with feeding(store, Lanes(room=100_000), handed):
        await handed.until(lambda names: len(names) == 4)

    assert handed.names == ["sooner:0", "sooner:1", "later:0", "later:1"]


async def test_a_batch_whose_window_has_closed_is_passed_over(store: SqlStore) -> None:
    await begin(store, "closed", slices=2, life_s=-1)
    await begin(store, "open", slices=2)
    handed = Handed()
    async with feeding(store, Lanes(room=100_000), handed):
        await handed.until(lambda names: len(names) == 2)

    assert handed.names == ["open:0", "open:1"]


async def test_projects_share_the_lanes_by_weight(store: SqlStore) -> None:
    await begin(store, "heavy", slices=40, project="heavy", weight=3)
    await begin(store, "light", slices=40, project="light", weight=1)
    lanes, handed = Lanes(room=REQUESTS), Handed()
    async with feeding(store, lanes, handed) as feeder:
        for count in range(1, 41):
            await handed.until(lambda names, count=count: len(names) == count)
            feeder.hold(handed.names[-1])

    had = Counter(name.partition(":")[0] for name in handed.names[:40])
    assert had == {"heavy": 30, "light": 10}
    runs = [len(list(group)) for _, group in groupby(n[0] for n in handed.names[:40])]
    assert max(runs) <= 4


async def test_a_project_that_comes_late_does_not_make_up_for_the_past(
    store: SqlStore,
) -> None:
    await begin(store, "first", slices=60, project="first")
    lanes, handed = Lanes(room=REQUESTS), Handed()
    async with feeding(store, lanes, handed) as feeder:
        for count in range(1, 21):
            await handed.until(lambda names, count=count: len(names) == count)
            feeder.hold(handed.names[-1])
        await begin(store, "second", slices=60, project="second")
        feeder.poke()
        for count in range(22, 43):
            await handed.until(lambda names, count=count: len(names) >= count - 1)
            feeder.hold(handed.names[-1])

    had = Counter(name.partition(":")[0] for name in handed.names[21:41])
    assert abs(had["first"] - had["second"]) <= 2


async def test_slices_that_come_back_are_handed_out_again(store: SqlStore) -> None:
    await begin(store, "a", slices=1)
    lanes, handed = Lanes(room=100_000), Handed()
    async with feeding(store, lanes, handed) as feeder:
        await handed.until(lambda names: names == ["a:0"])
        feeder.hold("a:0")  # but the worker did not get it
        feeder.poke()
        await handed.until(lambda names: names == ["a:0", "a:0"])


async def test_slices_whose_jobs_were_taken_back_take_no_room_for_ever(
    store: SqlStore,
) -> None:
    await begin(store, "a", slices=5)
    lanes, engine = Lanes(room=100_000), MemoryEngine()
    async with feeding(store, lanes, engine):
        async with asyncio.timeout(TIMEOUT_S):
            while lanes.expected < 5 * REQUESTS:
                await asyncio.sleep(0.005)
        await store.move_batch(BatchId("a"), BatchStatus.CANCELLING, now=int(time.time()))
        await engine.cancel([Job(kind=JobKind.SLICE, id=f"a:{n}") for n in range(5)])

        async with asyncio.timeout(TIMEOUT_S):
            while lanes.expected:
                await asyncio.sleep(0.005)


async def test_a_worker_begins_with_its_own_part_and_goes_on_with_the_others(
    store: SqlStore,
) -> None:
    await begin(store, "a", slices=9)
    lanes, handed = Lanes(room=100_000), Handed()
    async with feeding(store, lanes, handed, share=lambda: (1, 3)):
        await handed.until(lambda names: len(names) == 9)

    assert handed.names == [f"a:{n}" for n in (1, 4, 7, 3, 5, 6, 8, 0, 2)]


async def test_what_was_read_ahead_is_read_anew_when_the_workers_change(
    store: SqlStore,
) -> None:
    await begin(store, "a", slices=9)
    lanes, handed = Lanes(room=REQUESTS), Handed()
    part = (0, 1)
    async with feeding(store, lanes, handed, share=lambda: part) as feeder:
        await handed.until(lambda names: names == ["a:0"])
        part, lanes.room = (1, 3), 4 * REQUESTS
        feeder.has_room()
        await handed.until(lambda names: len(names) == 4)

    assert handed.names == ["a:0", "a:1", "a:4", "a:7"]


async def test_what_was_read_ahead_is_read_anew_when_another_was_faster(
    store: SqlStore,
) -> None:
    await begin(store, "a", slices=4)
    lanes, handed = Lanes(room=REQUESTS), Handed()
    async with feeding(store, lanes, handed) as feeder:
        await handed.until(lambda names: names == ["a:0"])
        taken = [SliceId(f"a:{number}") for number in range(3)]
        await store.claim_slices(taken, worker_id="other", lease_s=60, now=time.time())
        feeder.hold("a:0", False)
        await handed.until(lambda names: len(names) == 2)

    assert handed.names == ["a:0", "a:3"]
