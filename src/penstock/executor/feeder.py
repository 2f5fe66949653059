"""The feeder hands slices to the engine, only as many as the lanes need.

So the order is decided late: fair between projects first (stride scheduling by weight), then
the earliest deadline, then the input's own order.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Protocol

import structlog

from penstock import clock
from penstock.engine.base import Engine
from penstock.errors import StorageUnavailable
from penstock.model import BatchId, Job, JobKind, ProjectId, Slice, SliceId
from penstock.store.base import Backlog, Store

_log = structlog.get_logger()

_LOOK_S = 1.0
"""How often it looks for batches that nobody told it of."""
_AHEAD = 64
"""How many slices of a batch are read from the store at once."""


class Lanes(Protocol):
    """What the feeder asks of the worker."""

    def has_room(self, piece: Slice) -> bool: ...
    def is_blocked(self, piece: Slice) -> bool: ...
    def expect(self, piece: Slice, *, sign: int = 1) -> None: ...


def next_batch(
    candidates: Iterable[Backlog], strides: Mapping[ProjectId, float]
) -> Backlog | None:
    """Choose whose slice is next.

    Args:
        candidates: The batches that have a slice to hand out.
        strides: How much each project has had, in lines divided by its weight. One that is
            not in it has had nothing.

    Returns:
        The batch with the earliest deadline (of equal ones the oldest) of the project that
        has had least; None if there is no candidate.
    """
    return min(
        candidates,
        key=lambda batch: (
            strides.get(batch.project_id, 0.0),
            batch.project_id,
            batch.expires_at,
            batch.created_at,
            batch.batch_id,
        ),
        default=None,
    )


class Feeder:
    """Keeps the next few slices in the engine."""

    def __init__(self, *, store: Store, engine: Engine) -> None:
        self._store = store
        self._engine = engine
        self._lanes: Lanes | None = None
        self._wake = asyncio.Event()
        self._looked_at = -_LOOK_S
        self._backlog: dict[BatchId, Backlog] = {}
        self._next: dict[BatchId, deque[Slice]] = {}
        self._aside: dict[BatchId, set[SliceId]] = {}
        self._handed: dict[SliceId, Slice] = {}
        self._strides: dict[ProjectId, float] = {}

    def serve(self, lanes: Lanes) -> None:
        """Say who runs the slices. Once, before `run`."""
        self._lanes = lanes

    def poke(self) -> None:
        """Say that batches have slices to hand out that had none before."""
        self._looked_at = -_LOOK_S
        self._wake.set()

    def has_room(self) -> None:
        """Say that a lane may be short of lines."""
        self._wake.set()

    def hold(self, name: str) -> None:
        """Say that the worker has taken a slice in, or did not get it: it is no longer only
        expected."""
        if (piece := self._handed.pop(SliceId(name), None)) and self._lanes:
            self._lanes.expect(piece, sign=-1)
            self._wake.set()

    async def run(self) -> None:
        """Feed until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._wake.wait()
            self._wake.clear()
            try:
                await self._feed()
            except StorageUnavailable as error:
                _log.warning("The next slices cannot be read; trying again.", error=str(error))
                await asyncio.sleep(_LOOK_S)

    async def _feed(self) -> None:
        if (now := time.monotonic()) - self._looked_at >= _LOOK_S:
            self._looked_at, before = now, self._looked_at
            try:
                backlog = await self._store.list_backlog(now=int(clock.now()))
            except StorageUnavailable:
                self._looked_at = before
                raise
            self._backlog = {batch.batch_id: batch for batch in backlog}
            self._forget_the_gone()
        lanes = self._lanes
        assert lanes is not None  # noqa: S101
        jobs: list[Job] = []
        candidates = dict(self._backlog)
        try:
            while batch := next_batch(candidates.values(), self._strides):
                waiting = await self._read_ahead(batch.batch_id, lanes)
                # One whose upstream is busy does not hold up those behind it.
                piece = next(filter(lanes.has_room, waiting), None)
                if piece is None:
                    del candidates[batch.batch_id]
                    if not waiting and not self._aside.get(batch.batch_id):
                        self._backlog.pop(batch.batch_id, None)
                else:
                    waiting.remove(piece)
                    self._handed[piece.id] = piece
                    lanes.expect(piece)
                    self._charge(batch, piece)
                    jobs.append(Job(kind=JobKind.SLICE, id=piece.id))
        finally:  # those that were taken out stay handed out, whatever stopped the rest
            if jobs:
                await self._engine.enqueue(jobs)

    async def _read_ahead(self, batch_id: BatchId, lanes: Lanes) -> deque[Slice]:
        """The batch's next slices that are not handed out, without those at their head whose
        upstreams take nothing: they are set aside until the next look."""
        waiting = self._next.setdefault(batch_id, deque())
        aside = self._aside.setdefault(batch_id, set())
        while True:
            while waiting and lanes.is_blocked(waiting[0]):
                aside.add(waiting.popleft().id)
            if waiting:
                return waiting
            handed = sum(piece.batch_id == batch_id for piece in self._handed.values())
            pending = await self._store.list_pending(
                batch_id, limit=_AHEAD + handed + len(aside)
            )
            waiting.extend(
                piece
                for piece in pending
                if piece.id not in self._handed and piece.id not in aside
            )
            if not waiting:
                return waiting

    def _charge(self, batch: Backlog, piece: Slice) -> None:
        had = self._strides.get(batch.project_id, 0.0)
        self._strides[batch.project_id] = had + piece.requests / batch.weight

    def _forget_the_gone(self) -> None:
        """Forget finished batches, and start newcomers beside the project that had least."""
        self._next = {
            batch_id: deque()
            if self._aside.get(batch_id)
            else self._next.get(batch_id, deque())
            for batch_id in self._backlog
        }
        self._aside.clear()
        for name in [
            n for n, piece in self._handed.items() if piece.batch_id not in self._backlog
        ]:
            # It was cancelled with its batch before a worker saw it, or is being taken in.
            self.hold(name)
        present = {batch.project_id for batch in self._backlog.values()}
        least = min((self._strides[p] for p in present if p in self._strides), default=0.0)
        self._strides = {p: self._strides.get(p, least) for p in present}
