"""The feeder hands slices to the engine, only as many as the lanes need.

So the order is decided late: background projects after all others, then fair between projects
(stride scheduling by weight), then the earliest deadline, then the input's own order.

Of several workers on one store, each begins with its own part of a batch.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import structlog

from penstock import clock
from penstock.engine.base import Engine
from penstock.errors import StorageUnavailable
from penstock.executor.absent import Absences
from penstock.executor.members import Pace, alone
from penstock.model import BatchId, Job, JobKind, ProjectId, Slice, SliceId
from penstock.store.base import Backlog, Store

_log = structlog.get_logger()

_LOOK_S = 1.0
"""How often it looks for batches that nobody told it of."""
_LOOKS_PER_S = 50.0
"""How often all workers together look, at most."""
_AHEAD = 64
"""How many slices of a batch are read from the store at once."""


class Lanes(Protocol):
    """What the feeder asks of the worker."""

    def has_room(self, piece: Slice, batch: Backlog) -> bool: ...
    def is_blocked(self, piece: Slice) -> bool: ...
    def expect(self, piece: Slice, batch: Backlog, *, sign: int = 1) -> None: ...


def whole_batch() -> tuple[int, int]:
    """The part of a batch that a worker begins with which is alone."""
    return 0, 1


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
        has had least, of a background project only if there is no other; None if there is no
        candidate.
    """
    return min(
        candidates,
        key=lambda batch: (
            batch.is_background,
            strides.get(batch.project_id, 0.0),
            batch.project_id,
            batch.expires_at,
            batch.created_at,
            batch.batch_id,
        ),
        default=None,
    )


def _first_with_room(waiting: Iterable[Slice], batch: Backlog, lanes: Lanes) -> Slice | None:
    full: set[object] = set()
    for piece in waiting:
        # Fresh slices of the same models go to the same lanes, so one of them tells of all.
        alike = piece.id if piece.attempt else piece.models
        if alike not in full:
            if lanes.has_room(piece, batch):
                return piece
            full.add(alike)
    return None


class Feeder:
    """Keeps the next few slices in the engine.

    Args:
        share: Says with which part of a batch this worker begins, as `Store.list_pending`
            understands it.
        pace: How often each of several workers looks for batches.
    """

    def __init__(
        self,
        *,
        store: Store,
        engine: Engine,
        share: Callable[[], tuple[int, int]] = whole_batch,
        pace: Pace = alone,
    ) -> None:
        self._store = store
        self._engine = engine
        self._share = share
        self._pace = pace
        self._lanes: Lanes | None = None
        self._wake = asyncio.Event()
        self._looked_at = float("-inf")
        self._read_as = share()
        self._backlog: dict[BatchId, Backlog] = {}
        self._next: dict[BatchId, deque[Slice]] = {}
        self._aside: dict[BatchId, set[SliceId]] = {}
        self._handed: dict[SliceId, tuple[Slice, Backlog]] = {}
        self._strides: dict[ProjectId, float] = {}
        self._absences = Absences()

    def serve(self, lanes: Lanes) -> None:
        """Say who runs the slices. Once, before `run`."""
        self._lanes = lanes

    def poke(self) -> None:
        """Say that batches have slices to hand out that had none before."""
        self._looked_at = float("-inf")
        self._wake.set()

    def has_room(self) -> None:
        """Say that a lane may be short of lines."""
        self._wake.set()

    def hold(self, name: str, is_taken: bool = True) -> None:
        """Say that the worker has taken a slice in, or did not get it: it is no longer only
        expected."""
        handed = self._let_go(SliceId(name))
        if handed is None:
            return
        if not is_taken:  # another was faster, and will have taken more of those
            self._next.pop(handed.batch_id, None)
        elif self._absences.end(handed.batch_id, handed.id):
            _log.info("An input file is back.", batch_id=handed.batch_id)

    def _let_go(self, name: SliceId) -> Slice | None:
        """Expect a slice no longer; None if it was not expected."""
        handed = self._handed.pop(name, None)
        if handed is None or self._lanes is None:
            return None
        self._lanes.expect(*handed, sign=-1)
        self._wake.set()
        return handed[0]

    def lacks(self, batch_id: BatchId, reason: str) -> None:
        """Say that a slice was not taken because its batch's input is gone."""
        if self._absences.note(batch_id, time.monotonic()):
            _log.error(
                "A batch waits for its input file, which is gone from the storage. Put it "
                "back, or cancel the batch, which keeps what has ended.",
                batch_id=batch_id,
                error=reason,
            )

    async def run(self) -> None:
        """Feed until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._wake.wait()
            self._wake.clear()
            try:
                await self.feed()
            except StorageUnavailable as error:
                _log.warning("The next slices cannot be read; trying again.", error=str(error))
                await asyncio.sleep(_LOOK_S)

    async def feed(self) -> None:
        """Hand out what the lanes have room for now.

        Raises:
            StorageUnavailable: The next slices cannot be read; those before are handed out.
        """
        look_s = self._pace(_LOOK_S, _LOOKS_PER_S)
        if (now := time.monotonic()) - self._looked_at >= look_s:
            self._looked_at, before = now, self._looked_at
            try:
                backlog = await self._store.list_backlog(now=int(clock.now()))
            except StorageUnavailable:
                self._looked_at = before
                raise
            self._backlog = {batch.batch_id: batch for batch in backlog}
            self._forget_the_gone()
        if (share := self._share()) != self._read_as:
            # Other parts are its own now, and what it has read is others' to begin with.
            self._read_as = share
            self._next.clear()
        lanes = self._lanes
        assert lanes is not None  # noqa: S101
        jobs: list[Job] = []
        candidates = {
            batch_id: batch
            for batch_id, batch in self._backlog.items()
            if self._absences.may_try(batch_id, now)
        }
        try:
            while batch := next_batch(candidates.values(), self._strides):
                waiting = await self._read_ahead(batch.batch_id, lanes)
                # One whose upstream is busy does not hold up those behind it.
                piece = _first_with_room(waiting, batch, lanes)
                if piece is None:
                    del candidates[batch.batch_id]
                    if not waiting and not self._aside.get(batch.batch_id):
                        self._backlog.pop(batch.batch_id, None)
                else:
                    waiting.remove(piece)
                    self._handed[piece.id] = (piece, batch)
                    lanes.expect(piece, batch)
                    self._charge(batch, piece)
                    jobs.append(Job(kind=JobKind.SLICE, id=piece.id))
                    if self._absences.tries(batch.batch_id, piece.id, now):
                        del candidates[batch.batch_id]
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
            part, parts = self._read_as
            waiting.extend(await self._read(batch_id, (part, parts), aside))
            if not waiting and parts > 1:
                # Nobody begins where the others do.
                pending = await self._read(batch_id, whole_batch(), aside)
                start = len(pending) * part // parts
                waiting.extend(pending[start:] + pending[:start])
            if not waiting:
                return waiting

    async def _read(
        self, batch_id: BatchId, share: tuple[int, int], aside: set[SliceId]
    ) -> list[Slice]:
        """The next slices of a part of a batch, without those that are known."""
        # Those that are taken in meanwhile may still be among what is read.
        known = aside | self._handed.keys()
        handed = sum(piece.batch_id == batch_id for piece, _ in self._handed.values())
        pending = await self._store.list_pending(
            batch_id, limit=_AHEAD + handed + len(aside), share=share
        )
        return [piece for piece in pending if piece.id not in known]

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
        self._absences.forget(self._looked_at, but=self._backlog)
        for name in [
            n for n, (piece, _) in self._handed.items() if piece.batch_id not in self._backlog
        ]:
            # It was cancelled with its batch before a worker saw it, or is being taken in.
            self._let_go(name)
        self._strides = begin_strides(self._backlog.values(), self._strides)


def begin_strides(
    backlog: Iterable[Backlog], strides: Mapping[ProjectId, float]
) -> dict[ProjectId, float]:
    """Forget the projects that have nothing waiting, and start newcomers beside the one of
    their tier that had least."""
    begun: dict[ProjectId, float] = {}
    tiers: dict[bool, set[ProjectId]] = {}
    for batch in backlog:
        tiers.setdefault(batch.is_background, set()).add(batch.project_id)
    for present in tiers.values():
        least = min((strides[p] for p in present if p in strides), default=0.0)
        begun.update((p, strides.get(p, least)) for p in present)
    return begun
