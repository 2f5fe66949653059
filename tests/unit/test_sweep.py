"""The sweep: what is deleted of a storage, and what never is."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from penstock.blobs.folder import FolderBlobs
from penstock.blobs.local_segments import LocalSegments
from penstock.blobs.segments import Kind
from penstock.executor.sweep import SPARED_S, Sweeper, next_sweep
from penstock.model import BatchId, BatchStatus, JobKind
from penstock.store.sql import SqlStore
from penstock.testing.store import move, start

LONG_AGO = time.time() - SPARED_S - 60


class Ground:
    """A sweeper, and what it sweeps."""

    def __init__(self, folder: Path, store: SqlStore) -> None:
        self.root = folder / "blobs"
        self.blobs = FolderBlobs(self.root)
        (folder / "segments").mkdir()
        self.segments = LocalSegments(folder / "segments")
        self.store = store
        self.sweeper = Sweeper(
            store=store,
            blobs=self.blobs,
            segments=self.segments,
            delete_leftovers=self.blobs.delete_leftovers,
        )

    def put(self, key: str, *, is_old: bool = True) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"abc")
        if is_old:
            os.utime(path, (LONG_AGO, LONG_AGO))

    async def sweep(self) -> None:
        await self.sweeper.sweep("storage", asyncio.Event())

    def keys(self) -> list[str]:
        return sorted(
            str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()
        )


@pytest.fixture
async def ground(tmp_path: Path) -> AsyncIterator[Ground]:
    store = SqlStore(f"sqlite:///{tmp_path}/penstock.db")
    await store.open()
    yield Ground(tmp_path, store)
    await store.close()


async def test_old_bytes_that_no_row_names_are_deleted(ground: Ground) -> None:
    batch = await start(ground.store)
    ground.put(batch.input_blob_key)
    ground.put("files/unnamed")
    ground.put("parts/upload-1/unnamed")
    ground.put("other/not-ours")
    ground.put("files/cut#1")

    await ground.sweep()

    assert ground.keys() == sorted([batch.input_blob_key, "other/not-ours"])


async def test_what_is_younger_than_a_day_is_spared(ground: Ground) -> None:
    """It may be named in a moment."""
    ground.put("files/young", is_old=False)
    ground.put("files/cut#1", is_old=False)

    await ground.sweep()

    assert ground.keys() == ["files/cut#1", "files/young"]


async def test_a_process_that_is_alone_spares_nothing(ground: Ground) -> None:
    ground.put("files/young", is_old=False)

    await ground.sweeper.delete_unnamed()

    assert ground.keys() == []


async def test_replies_of_batches_that_have_ended_are_deleted_and_no_others(
    ground: Ground,
) -> None:
    for name in ("batch-1", "batch-2", "batch-3"):
        writer = ground.segments.open(BatchId(name), 0, 1, requests=2)
        writer.append(0, Kind.OUTPUT, b"{}", (0, 0, 0, 0, 0))
        writer.prepare()
        ground.segments.flush([writer])
        writer.close()
    await start(ground.store, 1, "batch-1")
    await start(ground.store, 1, "batch-2")
    await move(ground.store, BatchStatus.FINALIZING, BatchStatus.COMPLETED, name="batch-2")

    await ground.sweep()

    assert ground.segments.batches() == ["batch-1"]
    assert await ground.store.get_slices(BatchId("batch-2")) == []


@pytest.mark.parametrize("is_taken_over", [True, False])
async def test_a_sweep_ends_early_when_it_is_told_to(
    ground: Ground, is_taken_over: bool
) -> None:
    ground.put("files/unnamed")
    stop = asyncio.Event()
    if is_taken_over:
        stop.set()
    else:
        ground.sweeper.stop()

    await ground.sweeper.sweep("storage", stop)

    assert ground.keys() == ["files/unnamed"]


def test_the_next_sweep_is_due_in_an_hour_and_has_always_the_same_name() -> None:
    assert next_sweep(5.0).due_at == 3605.0
    assert next_sweep(5.0).kind is JobKind.SWEEP
    assert next_sweep(5.0).id == next_sweep(6.0).id
