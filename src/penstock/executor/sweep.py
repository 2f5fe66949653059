"""The sweep: deletes bytes that nothing names, and rows of batches that have ended.

They are left by processes that were killed: a file that was written and not published, an
upload that was cut off, replies of a batch whose end was not tidied up. Alone, a process sweeps
at its start, when nobody writes. In a cluster somebody always does: there one process at a time
sweeps every hour, by a job, and spares what is younger than a day.
"""

import asyncio
from collections.abc import Callable

import structlog

from penstock import clock
from penstock.blobs.base import Blobs
from penstock.blobs.segments import Segments
from penstock.errors import StorageUnavailable
from penstock.model import Job, JobKind
from penstock.store.base import Store

_log = structlog.get_logger()

EVERY_S = 3600.0
SPARED_S = 86_400.0
"""How old bytes must be that nothing names. No write takes so long, and no two clocks differ by
so much."""
_AT_ONCE = 100


def next_sweep(now: float) -> Job:
    """The job of the next sweep; where one waits already, that one stays as it is."""
    return Job(kind=JobKind.SWEEP, id="storage", due_at=now + EVERY_S)


class Sweeper:
    """Sweeps storage and store.

    Args:
        delete_leftovers: Deletes what cut writes left that is no blob, if it was not touched
            since a time; None where the storage itself does. Called in a thread.
    """

    def __init__(
        self,
        *,
        store: Store,
        blobs: Blobs,
        segments: Segments,
        delete_leftovers: Callable[[float], None] | None = None,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._segments = segments
        self._delete_leftovers = delete_leftovers
        self._is_stopping = False

    async def sweep(self, name: str, stop: asyncio.Event) -> None:
        """Delete what is old. The engine's handler for `sweep` jobs."""
        del name  # there is one storage
        before = clock.now() - SPARED_S
        try:
            if self._delete_leftovers is not None:
                await asyncio.to_thread(self._delete_leftovers, before)
            await self.delete_unnamed(written_before=before, stop=stop)
        except (StorageUnavailable, OSError) as error:
            _log.warning("The storage cannot be swept for now.", error=str(error))

    async def delete_unnamed(
        self, *, written_before: float | None = None, stop: asyncio.Event | None = None
    ) -> None:
        """Delete blobs that no row names, and what is left of batches that have ended.

        Args:
            written_before: Spare younger blobs. None is for a process that has the storage to
                itself, before anything is written.
            stop: Set when another process does it.
        """
        is_over = stop or asyncio.Event()
        gone = 0
        keys: list[str] = []
        for prefix in ("files", "parts"):
            async for key in self._blobs.iter_keys(prefix, written_before=written_before):
                if self._is_stopping or is_over.is_set():
                    return
                keys.append(key)
                if len(keys) >= _AT_ONCE:
                    gone += await self._delete_unused(keys)
                    keys = []
        gone += await self._delete_unused(keys)
        if gone:
            _log.info("Bytes that nothing named were deleted.", blobs=gone)
        kept = await asyncio.to_thread(self._segments.batches)
        # Asked for afterwards: a batch that begins meanwhile must not look as if it had ended.
        unfinished = {batch.id for batch in await self._store.list_unfinished()}
        for batch_id in kept:
            if self._is_stopping or is_over.is_set():
                return
            if batch_id not in unfinished:
                await asyncio.to_thread(self._segments.delete, batch_id)
        await self._store.forget_final_slices()

    def stop(self) -> None:
        """End early, for the process ends. The rest is for the next sweep."""
        self._is_stopping = True

    async def _delete_unused(self, keys: list[str]) -> int:
        if not keys:
            return 0
        unused = await self._store.unused_blobs(keys)
        await self._blobs.delete(list(unused))
        return len(unused)
