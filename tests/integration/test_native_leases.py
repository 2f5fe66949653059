"""A native run keeps its slices for as long as its results are written.

Beside it, somebody hands on what has lost its lease, as each worker of a cluster does.
"""

import asyncio
import time
from pathlib import Path

from penstock.blobs.folder import FolderBlobs
from penstock.blobs.segments import Kind
from tests.integration.test_native_crash import (
    Clockwork,
    Process,
    Provider,
    add_batch,
    results_of,
)

LEASE_S = 1.0
READ_S = 0.4
NAMES = [f"line-{n}" for n in range(1, 13)]


class SlowBlobs(FolderBlobs):
    """Takes its time for each slice, once the provider has the job."""

    def __init__(self, root: Path, provider: Provider) -> None:
        super().__init__(root)
        self._provider = provider

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        if self._provider.jobs:
            await asyncio.sleep(READ_S)
        return await super().get_range(key, start, end)


async def test_slices_are_held_while_the_others_are_opened(tmp_path: Path) -> None:
    await add_batch(tmp_path, *NAMES)
    provider = Provider()
    blobs = SlowBlobs(tmp_path / "blobs", provider)
    process = Process(tmp_path, provider, Clockwork(), blobs=blobs, lease_s=LEASE_S)
    handed_on = 0

    async def hand_on() -> None:
        nonlocal handed_on
        while True:
            await asyncio.sleep(LEASE_S / 10)
            handed_on += await process.store.release_slices(now=time.time())

    handing = asyncio.create_task(hand_on())
    await process.run_to_the_end()
    handing.cancel()

    assert handed_on == 0
    found, have_ended = await results_of(tmp_path)
    assert have_ended
    assert found == dict.fromkeys(range(1, len(NAMES) + 1), Kind.OUTPUT)


async def test_a_run_does_not_end_whose_slices_were_lost_at_the_last_moment(
    tmp_path: Path,
) -> None:
    await add_batch(tmp_path, *NAMES)
    provider = Provider()
    process = Process(
        tmp_path, provider, Clockwork(), blobs=SlowBlobs(tmp_path / "blobs", provider)
    )

    async def take_away() -> None:
        while not await process.store.release_slices(now=time.time() + 60):
            await asyncio.sleep(READ_S / 10)

    taking = asyncio.create_task(take_away())
    await process.run_to_the_end()
    await taking

    found, have_ended = await results_of(tmp_path)
    assert have_ended
    assert found == dict.fromkeys(range(1, len(NAMES) + 1), Kind.OUTPUT)
