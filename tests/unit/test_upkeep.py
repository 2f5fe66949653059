"""Lost work of a cluster is looked for by one worker, and handed on by any."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from penstock.executor.sweep import next_sweep
from penstock.executor.upkeep import find_lost_work
from penstock.model import BatchId, BatchStatus, JobKind
from penstock.store.sql import SqlStore
from penstock.testing.store import RecordedJobs, claim, ids_of, move, start


class Recorder(RecordedJobs):
    """An engine that takes down what it is given."""

    def handle(self, kind: object, handler: object) -> None: ...
    async def cancel(self, jobs: object) -> None: ...
    async def run(self) -> None: ...
    async def stop(self) -> None: ...


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqlStore]:
    store = SqlStore(f"sqlite:///{tmp_path}/penstock.db")
    await store.open()
    yield store
    await store.close()


async def look(
    store: SqlStore, *, is_first: bool, lease_s: float = 30
) -> list[tuple[JobKind, str]]:
    """What is enqueued within half a second."""
    engine = Recorder()
    with suppress(TimeoutError):
        async with asyncio.timeout(0.5):
            await find_lost_work(
                store=store, engine=engine, lease_s=lease_s, is_first=lambda: is_first
            )
    return [(job.kind, job.id) for job in engine.jobs]


async def test_the_first_worker_enqueues_what_was_lost_and_the_next_sweep(
    store: SqlStore,
) -> None:
    await start(store)
    await move(store, BatchStatus.CANCELLING)

    found = await look(store, is_first=True)

    assert found == [(JobKind.FINALIZE, "batch-1"), (JobKind.SWEEP, next_sweep(0).id)]
    assert await look(store, is_first=False) == []


@pytest.mark.parametrize("is_first", [True, False])
async def test_any_worker_hands_on_the_slices_of_one_that_is_gone(
    store: SqlStore, is_first: bool
) -> None:
    await start(store, 3)
    await claim(store, ids_of(0, 1))

    await look(store, is_first=is_first, lease_s=0.1)

    assert (await store.tally_slices(BatchId("batch-1"))).pending == 3


async def test_nobody_is_taken_for_gone_before_the_database_has_answered_for_a_lease(
    store: SqlStore,
) -> None:
    await start(store, 3)
    await claim(store, ids_of(0, 1))

    await look(store, is_first=True, lease_s=30)

    assert (await store.tally_slices(BatchId("batch-1"))).running == 2
