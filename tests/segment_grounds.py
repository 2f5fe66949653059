"""Where segments lie in tests: files, and objects with a store in a thread beside."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from penstock.blobs.base import Blobs
from penstock.blobs.local_segments import LocalSegments
from penstock.blobs.object_segments import ObjectSegments
from penstock.model import BatchId, slice_id
from penstock.store.sql import SqlStore
from penstock.testing.blobs import RawBlobs
from penstock.testing.segments import BATCH
from penstock.testing.store import NOON, start

T = TypeVar("T")

LEASE_S = 60
Ground = TypeVar("Ground", bound="ObjectGround")


class LocalGround:
    """Files."""

    def __init__(self, folder: Path) -> None:
        self.segments = LocalSegments(folder)
        self._folder = folder
        self._attempts: dict[tuple[BatchId, int], int] = {}

    def claim(self, index: int = 0, *, batch_id: BatchId = BATCH) -> int:
        attempt = self._attempts.get((batch_id, index), 0) + 1
        self._attempts[batch_id, index] = attempt
        return attempt

    def stored(self) -> list[str]:
        files = (path for path in self._folder.rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self._folder)) for path in files)

    def get(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def set(self, name: str, data: bytes) -> None:
        (self._folder / name).write_bytes(data)

    def remove(self, name: str) -> None:
        (self._folder / name).unlink()


class ObjectGround:
    """Objects, and the store that names them, whose event loop runs in a thread."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, blobs: Blobs, store: SqlStore, raw: RawBlobs
    ) -> None:
        self.segments = ObjectSegments(blobs=blobs, store=store, loop=loop)
        self.blobs = blobs
        self.store = store
        self._loop = loop
        self._raw = raw
        self._now = float(NOON)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def claim(self, index: int = 0, *, batch_id: BatchId = BATCH) -> int:
        self._now += LEASE_S + 1
        claims = self.store.claim_slices(
            [slice_id(batch_id, index)], worker_id="one", lease_s=LEASE_S, now=self._now
        )
        [claimed] = self.run(claims)
        return claimed.slice.attempt

    def settle(self) -> None:
        """Wait until what is done in the background is done."""

        async def others() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*tasks, return_exceptions=True)

        self.run(others())

    def stored(self) -> list[str]:
        return self._raw.everything()

    def named(self) -> list[str]:
        """The keys that count."""
        return [each.key for each in self.run(self.store.list_segment_objects(BATCH))]

    def get(self, name: str) -> bytes:
        return self._raw.get(name) or b""

    def set(self, name: str, data: bytes) -> None:
        self._raw.set(name, data)

    def remove(self, name: str) -> None:
        self.run(self.blobs.delete([name]))


@contextmanager
def running(
    ground_class: type[Ground], blobs: Blobs, store: SqlStore, raw: RawBlobs
) -> Iterator[Ground]:
    """A ground with its store opened, and two batches in it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    ground = ground_class(loop, blobs, store, raw)

    async def begin() -> None:
        await store.open()
        for name in ("batch-1", "batch-2"):
            await start(store, 10, name)

    async def end() -> None:
        await store.close()
        await loop.shutdown_asyncgens()
        await loop.shutdown_default_executor()

    try:
        ground.run(begin())
        yield ground
    finally:
        ground.settle()
        ground.run(end())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
