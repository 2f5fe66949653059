"""The keeper makes replies durable, for all held slices together.

Replies of all segments are written and synced in groups: at the latest `flush_interval_s`
after the first of them came, at once when no other slice has lines to come or `flush_bytes`
wait.
While the disk takes nothing the gate is closed, so nothing more is sent, and what has come is
kept in memory and tried again every second.
"""

import asyncio
import contextlib
import errno
import time
from typing import Protocol

import structlog

from penstock.blobs.segments import Segments, SegmentWriter
from penstock.errors import StorageUnavailable
from penstock.telemetry import Health, WorkStats

_log = structlog.get_logger()

AGAIN_S = 1.0


class Written(Protocol):
    """Whose segment it is."""

    writer: SegmentWriter
    durable: asyncio.Event
    """Set when all that was appended is durable."""

    def abort(self) -> None:
        """Hear that the slice was claimed anew: nothing more of it is kept."""
        ...


class Keeper:
    """Flushes segments in groups.

    Args:
        gate: Cleared while the disk takes no replies.
    """

    def __init__(
        self,
        *,
        segments: Segments,
        gate: asyncio.Event,
        health: Health,
        stats: WorkStats,
        flush_interval_s: float,
        flush_bytes: int,
    ) -> None:
        self._segments = segments
        self._gate = gate
        self._troubles: set[str] = set()
        self._health = health
        self._stats = stats
        self._flush_interval_s = flush_interval_s
        self._flush_bytes = flush_bytes
        self._dirty: set[Written] = set()
        self._waiting_bytes = 0
        self.busy_slices = 0
        """How many held slices have lines without a reply."""
        self._some = asyncio.Event()
        self._urgent = asyncio.Event()

    def note(self, written: Written, appended_bytes: int) -> None:
        """Say that something was appended to a segment."""
        self._waiting_bytes += appended_bytes
        self._dirty.add(written)
        self._some.set()
        if not self.busy_slices or self._waiting_bytes >= self._flush_bytes:
            self._urgent.set()

    async def run(self) -> None:
        """Flush until cancelled."""
        while True:
            await self._some.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._flush_interval_s):
                    await self._urgent.wait()
            await self.flush()

    async def flush(self) -> None:
        """Make all durable that was noted before the call, however long that takes."""
        group, self._dirty = self._dirty, set()
        appended_bytes, self._waiting_bytes = self._waiting_bytes, 0
        self._some.clear()
        self._urgent.clear()
        writers = [written.writer for written in group]
        for writer in writers:
            writer.prepare()
        while True:
            try:
                begun = time.monotonic()
                await asyncio.to_thread(self._segments.flush, writers)
                self._stats.flushes.note(time.monotonic() - begun)
                self._stats.flushed_bytes += appended_bytes
                break
            except (OSError, StorageUnavailable) as error:
                message = explain(error) if isinstance(error, OSError) else str(error)
                self.close_gate("storage", message)
                await asyncio.sleep(AGAIN_S)
        self.open_gate("storage")
        for written in group:
            if written.writer.is_lost:
                written.abort()
            if not written.writer.is_dirty:
                written.durable.set()

    def close_gate(self, trouble: str, message: str) -> None:
        """Stop the sending, because of what `message` tells.

        Args:
            trouble: The name of the fault, under which it is told and taken back.
        """
        self._troubles.add(trouble)
        self._gate.clear()
        if self._health.fail(trouble, message):
            _log.error("Nothing is sent until this is mended.", fault=trouble, error=message)

    def open_gate(self, trouble: str) -> None:
        """Take a fault back, and let the sending go on if it was the last one."""
        self._troubles.discard(trouble)
        if not self._troubles:
            self._gate.set()
        if self._health.recover(trouble):
            _log.info("A fault is mended.", fault=trouble)


def explain(error: OSError) -> str:
    """What a person should know of a disk that fails."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "The disk that holds the data directory is full. Make room; work then goes on."
    return f"The disk that holds the data directory fails: {error.strerror or error}."
