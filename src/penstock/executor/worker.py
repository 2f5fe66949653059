"""The worker: claims slices, sends their lines, keeps the replies.

It holds many slices at once. A slice is claimed when a lane is short of lines, read from the
input file, spread over the lanes, and ended when each of its lines has a durable reply.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import structlog

from penstock import clock
from penstock.blobs.base import Blobs
from penstock.blobs.segments import Kind, Segments, SegmentWriter
from penstock.errors import NotFound, StorageUnavailable
from penstock.executor.admission import Admission, AdmissionPolicy
from penstock.executor.group import GroupCommit
from penstock.executor.keeper import AGAIN_S, Keeper, explain
from penstock.executor.lanes import Lane, Queued
from penstock.executor.members import Pace, alone
from penstock.executor.order import by_prefix
from penstock.executor.renaming import rename
from penstock.executor.replies import reply_line
from penstock.executor.waiting import Waiting, flow_of
from penstock.model import BatchId, Slice, SliceId
from penstock.request_lines import RequestLine, iter_requests
from penstock.store.base import Backlog, ClaimedSlice, SliceReport, Store
from penstock.telemetry import Health, LaneGauges, Metrics
from penstock.upstream.base import Failure, Reply
from penstock.upstream.routes import Route, Routes

_log = structlog.get_logger()
_R = TypeVar("_R")

_OUTPUT = Kind.OUTPUT  # looking up a member takes as long as a call
_READ_FAULT = "input_files"
_MOST_WAITING = 100_000
"""Of how many slices it is remembered at most what they wait for."""
_PROGRESS_S = 0.5
"""How often the counts of running slices go to the store."""
_PROGRESS_PER_S = 50.0
"""How often all workers together send theirs, at most."""
_LOAD_S = 0.5
"""How often an engine is asked for its load while it has work."""
_LOAD_PATIENCE_S = 2.0
_NO_LOAD_S = 60.0
"""How long one that tells nothing is not asked again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """How a worker works; the settings of `[worker]`."""

    worker_id: str
    lease_s: float
    flush_interval_s: float
    flush_bytes: int
    cancel_grace_s: float
    """How long lines in flight may go on after a cancel."""
    shutdown_grace_s: float
    """How long lines in flight may go on after a stop."""
    held_bytes: int = 8 << 20
    """How many bytes of unsent bodies are held, shared evenly by the upstreams; each may go
    beyond its share by one slice, and up to twice the share for projects that have none."""
    parked_patience_s: float = 5.0
    """How long a slice is held of which nothing is left but lines that are parked."""
    lines_ahead: int = 512
    """With fewer lines than this ready to be sent, a lane is given another slice. Projects
    that have none in it are given one at any time."""


class HeldSlice:
    """A slice while this worker holds it: the owner of its lines in the lanes."""

    def __init__(self, claimed: ClaimedSlice, keeper: Keeper, metrics: Metrics) -> None:
        self.slice = claimed.slice
        self.endpoint = claimed.endpoint
        self.flow = flow_of(claimed)
        self.expires_at = float(claimed.expires_at)
        self.asked_model = claimed.asked_model
        self.writer = SegmentWriter()  # until its own is opened
        self.is_stopping = False
        self.is_aborted = False
        self.flights: dict[int, asyncio.Task[None]] = {}
        self.timers: dict[int, tuple[asyncio.TimerHandle, RequestLine, Lane]] = {}
        self.remaining = 0
        self.parked = 0
        """How many of them wait for an upstream that is left alone."""
        self.idle = asyncio.Event()
        """Set while there is nothing to do but to wait for such an upstream."""
        self.wakes = 0
        """How often that came to an end."""
        self.done = asyncio.Event()
        """Set when no line is on its way or waits."""
        self.durable = asyncio.Event()
        self.reported: tuple[int, int] = (0, 0)
        """The counts that the store knows."""
        self.is_ending = False
        """The last report is on its way."""
        self._keeper = keeper
        self._stats = metrics.work

    def keep(self, line: RequestLine, reply: Reply) -> None:
        """Append the reply of a line."""
        kind, payload = reply_line(line.custom_id, reply)
        tokens = (
            reply.input_tokens,
            reply.cached_tokens,
            reply.output_tokens,
            reply.reasoning_tokens,
            reply.total_tokens,
        )
        self.writer.append(line.line, kind, payload, tokens)
        if kind is _OUTPUT:
            self._stats.completed_lines += 1
        else:
            self._stats.failed_lines += 1
        self.durable.clear()
        self._end_line()
        self._keeper.note(self, len(payload))

    def drop(self, line: RequestLine) -> None:
        """Leave a line without a reply; another attempt at the slice finds it missing."""
        del line
        self._end_line()

    def park(self, count: int) -> None:
        """Hear that so many lines are parked, or with a minus are so no more."""
        self.parked += count
        self._look_whether_idle()

    def _look_whether_idle(self) -> None:
        if self.remaining and self.parked >= self.remaining:
            self.idle.set()
        elif self.idle.is_set():
            self.idle.clear()
            self.wakes += 1

    def begin(self, requests: int) -> None:
        """Say how many lines lack a reply, before the first of them is queued."""
        self.remaining = requests
        if requests:
            self._keeper.busy_slices += 1
        else:
            self.done.set()

    def _end_line(self) -> None:
        self.remaining -= 1
        if not self.remaining:
            self._keeper.busy_slices -= 1
            self.done.set()
        if self.parked:
            self._look_whether_idle()

    def stop(self) -> None:
        """Send nothing more. What is in flight may end."""
        self.is_stopping = True
        timers, self.timers = self.timers, {}
        for timer, line, lane in timers.values():
            timer.cancel()
            lane.drop(self, line)

    def abort(self) -> None:
        """Send nothing more and drop what is in flight."""
        self.stop()
        self.is_aborted = True
        for task in list(self.flights.values()):
            task.cancel()

    def report(self, *, ends: bool | None) -> SliceReport:
        """How far it has durably come."""
        tally = self.writer.durable
        return SliceReport(
            id=self.slice.id,
            attempt=self.slice.attempt,
            completed=tally.completed,
            failed=tally.failed,
            usage=tally.total_usage(),
            ends=ends,
        )


class Worker:
    """Runs slices.

    Args:
        wants_more: Called when a lane is short of lines.
        took: Called with the ID of a slice once its lines are in the lanes, or when it turns
            out that they never will be, and with whether they are.
        lacks: Called with the batch of a slice, and why, before such a slice is given back
            because its input is gone.
        pace: How often each of several workers tells of its progress.
    """

    def __init__(
        self,
        *,
        store: Store,
        blobs: Blobs,
        segments: Segments,
        routes: Routes,
        policies: Mapping[str, AdmissionPolicy],
        health: Health,
        metrics: Metrics,
        options: WorkerOptions,
        wants_more: Callable[[], None],
        took: Callable[[str, bool], None],
        lacks: Callable[[BatchId, str], None],
        pace: Pace = alone,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._segments = segments
        self._routes = routes
        self._policies = policies
        self._metrics = metrics
        self._options = options
        self._wants_more = wants_more
        self._took = took
        self._lacks = lacks
        self._pace = pace
        self._gate = asyncio.Event()
        self._gate.set()
        self._stopping = asyncio.Event()
        self._closed = asyncio.Event()
        self._lanes: dict[str, Lane] = {}
        self._unserved = 0
        self._held: dict[SliceId, HeldSlice] = {}
        self._waiting: dict[SliceId, tuple[str, ...]] = {}
        """Slices that were given back because all that is left of them waits for these
        models."""
        self._keeper = Keeper(
            segments=segments,
            gate=self._gate,
            health=health,
            stats=metrics.work,
            flush_interval_s=options.flush_interval_s,
            flush_bytes=options.flush_bytes,
        )
        self._claims = GroupCommit(self._claim, health=health)
        self._reports = GroupCommit(self._report, health=health)
        self._tasks: asyncio.TaskGroup | None = None

    # What the feeder asks

    def has_room(self, piece: Slice, batch: Backlog) -> bool:
        """Whether a slice of a batch would find a lane that is short of its project's lines
        and may send some of it."""
        if self._tasks is None or not self._gate.is_set() or self._stopping.is_set():
            return False
        lanes = list(self._lanes_of(piece))
        if not lanes:  # lines that no upstream serves any more are read to fail at once
            return self._unserved < self._options.held_bytes
        if self.is_blocked(piece):
            return False
        flow = flow_of(batch)
        # A mixed slice waits for its slowest upstream; slices of other models do not. One of a
        # background project finds room only where it is in no one's way.
        find = all if flow.is_background else any
        return find(lane.has_room(flow) for lane in lanes) and not any(
            lane.is_full(flow) for lane in lanes
        )

    def is_blocked(self, piece: Slice) -> bool:
        """Whether all lines of a slice would wait for upstreams that are left alone."""
        # Of a slice that was given back because of them, only these models are left.
        models = self._waiting.get(piece.id, piece.models)
        return bool(models) and all(
            self._is_model_blocked(model, piece.upstream) for model in models
        )

    def _is_model_blocked(self, model: str, upstream: str | None) -> bool:
        route = self._routes.find(model, upstream=upstream)
        lane = self._lanes.get(route.name) if route else None
        return lane is not None and lane.is_blocked(model)

    def expect(self, piece: Slice, batch: Backlog, *, sign: int = 1) -> None:
        """Count a slice that was handed to the engine (or, with -1, is held or came back)."""
        lanes = list(self._lanes_of(piece))
        for lane in lanes:
            lane.expect(
                flow_of(batch),
                sign * (piece.requests // len(lanes)),
                sign * ((piece.end - piece.start) // len(lanes)),
            )
        if not lanes:
            self._unserved += sign * (piece.end - piece.start)

    # What its budgets ask

    @property
    def lanes(self) -> Iterable[Lane]:
        """Its lanes; none before it runs."""
        return self._lanes.values()

    # The life of the worker

    async def run(self) -> None:
        """Work until `close` is called."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            for route in self._routes:
                self._lanes[route.name] = self._make_lane(route)
            self._metrics.watch(lanes=self._measure, held_slices=lambda: len(self._held))
            loops = [
                tasks.create_task(loop)
                for loop in (
                    self._keeper.run(),
                    self._claims.run(),
                    self._reports.run(),
                    self._extend_leases(),
                    *(
                        self._watch_load(lane, admission)
                        for lane in self._lanes.values()
                        for admission in lane.admissions
                    ),
                )
            ]
            await self._closed.wait()
            for loop in loops:
                loop.cancel()

    def stop(self) -> None:
        """Claim nothing more, let lines in flight end within the grace time, let go."""
        self._stopping.set()

    def close(self) -> None:
        """End `run`, once every slice was let go."""
        self._closed.set()

    async def run_slice(self, name: str, stop: asyncio.Event) -> None:
        """Run one slice. The engine's handler for `slice` jobs.

        Args:
            name: The slice's ID.
            stop: Set when its batch was cancelled.
        """
        held = None
        try:
            held = await self._take(SliceId(name))
        finally:
            self._took(name, held is not None)
        if held is None:
            return
        try:
            await self._until_done(held, stop)
            while held.writer.is_dirty:
                await held.durable.wait()
            ends = len(held.writer.lines) == held.slice.requests
        except Exception:
            _log.exception("A slice could not be run; it is given back.", slice_id=name)
            held.abort()
            ends = False
        await self._give_back(held, ends=ends)

    async def _take(self, name: SliceId) -> HeldSlice | None:
        """Claim a slice and queue its lines; None if it is not to be had."""
        if self._stopping.is_set() or name in self._held:
            return None
        claimed = await self._claims.submit(name)
        if claimed is None:
            return None
        held = HeldSlice(claimed, self._keeper, self._metrics)
        self._held[name] = held
        try:
            await self._fill(held, claimed.input_blob_key)
        except NotFound as error:
            self._lacks(held.slice.batch_id, str(error))
            await self._give_back(held)
            return None
        except Exception as error:
            _log.warning("A slice could not be begun; it is given back.", error=str(error))
            if not self._stopping.is_set():
                await asyncio.sleep(AGAIN_S)  # or it would be back at once
            await self._give_back(held)
            return None
        return held

    async def _give_back(self, held: HeldSlice, *, ends: bool = False) -> None:
        """Tell the store that an attempt is over, and forget it."""
        try:
            held.is_ending = True
            await self._reports.submit(held.report(ends=ends))
        finally:
            del self._held[held.slice.id]
            held.writer.close()

    async def _fill(self, held: HeldSlice, blob_key: str) -> None:
        """Open the slice's segment, read its lines and queue those without a reply."""
        piece = held.slice
        held.writer = await self._persist(lambda: self._open_segment(piece))
        data = await self._persist(
            lambda: self._blobs.get_range(blob_key, piece.start, piece.end)
        )
        missing = [
            line
            for line in rename(
                iter_requests(data, first_line=piece.first_line, models=piece.models),
                held.asked_model,
            )
            if line.line not in held.writer.lines
        ]
        held.begin(len(missing))
        if clock.now() < held.expires_at and not self._stopping.is_set():
            self._queue(held, missing)
        else:
            for line in missing:
                held.drop(line)

    async def _open_segment(self, piece: Slice) -> SegmentWriter:
        place = (piece.batch_id, piece.index, piece.attempt)
        if piece.attempt == 1:  # which touches no disk, so a thread would only cost time
            return self._segments.open(*place, requests=piece.requests)
        return await asyncio.to_thread(self._segments.open, *place, requests=piece.requests)

    def _queue(self, held: HeldSlice, lines: list[RequestLine]) -> None:
        by_lane: dict[str, list[RequestLine]] = {}
        for line in lines:
            route = self._routes.find(line.model, upstream=held.slice.upstream)
            if route is None:
                # It was there when the file was checked: the settings have changed since.
                held.keep(line, _no_upstream(line.model))
            else:
                by_lane.setdefault(route.name, []).append(line)
        for name, mine in by_lane.items():
            self._lanes[name].put(held, by_prefix(mine))

    async def _until_done(self, held: HeldSlice, stop: asyncio.Event) -> None:
        """Wait until no line is on its way, or stop them when there is a reason to."""
        self._waiting.pop(held.slice.id, None)
        ends = (held.done, stop, self._stopping)
        while True:
            await _first_of(*ends, held.idle, timeout_s=_left_s(held))
            if not held.idle.is_set():
                break
            # A short pause is waited for; in a long one its place is of more use to others.
            wakes = held.wakes
            await _first_of(
                *ends, timeout_s=min(self._options.parked_patience_s, _left_s(held))
            )
            if held.wakes == wakes or any(event.is_set() for event in ends):
                break
        if held.done.is_set():
            return
        if held.idle.is_set() and not stop.is_set():
            if len(self._waiting) >= _MOST_WAITING:
                self._waiting.clear()
            models = (model for lane in self._lanes.values() for model in lane.parked_of(held))
            self._waiting[held.slice.id] = tuple(set(models))
        self._stop(held)
        if not self._stopping.is_set():
            patience_s = min(self._options.cancel_grace_s, _left_s(held))
            await _first_of(held.done, self._stopping, timeout_s=patience_s)
        if self._stopping.is_set():
            patience_s = min(self._options.shutdown_grace_s, _left_s(held))
            await _first_of(held.done, timeout_s=patience_s)
        held.abort()
        await held.done.wait()

    def _stop(self, held: HeldSlice) -> None:
        held.stop()
        for lane in self._lanes.values():
            lane.withdraw(held)

    async def _persist(self, attempt: Callable[[], Awaitable[_R]]) -> _R:
        """Try what needs the disk until it works.

        Raises:
            StorageUnavailable: It did not work, and the worker is to stop.
            NotFound: What is to be read is not there, and will not be.
        """
        has_failed = False
        while True:
            try:
                result = await attempt()
            except (OSError, StorageUnavailable) as error:
                if self._stopping.is_set():
                    raise StorageUnavailable(str(error)) from error
                has_failed = True
                message = explain(error) if isinstance(error, OSError) else str(error)
                self._keeper.close_gate(_READ_FAULT, message)
            else:
                if has_failed:
                    self._keeper.open_gate(_READ_FAULT)
                return result
            await asyncio.sleep(AGAIN_S)

    # The store

    async def _claim(self, ids: list[SliceId]) -> list[ClaimedSlice | None]:
        claimed = await self._store.claim_slices(
            ids,
            worker_id=self._options.worker_id,
            lease_s=self._options.lease_s,
            now=clock.now(),
        )
        by_id = {each.slice.id: each for each in claimed}
        return [by_id.get(name) for name in ids]

    async def _report(self, reports: list[SliceReport]) -> list[bool]:
        # Of a slice that reports twice in one group, only the later report counts.
        latest = {report.id: report for report in reports}
        lost = await self._store.report_slices(
            list(latest.values()), lease_s=self._options.lease_s, now=clock.now()
        )
        for name in lost:
            _log.warning("A slice was claimed by another worker meanwhile.", slice_id=name)
            if held := self._held.get(name):
                held.abort()
        return [report.id not in lost for report in reports]

    async def _extend_leases(self) -> None:
        """Tell the store of progress, and extend all leases in good time."""
        extended_at = time.monotonic()
        while True:
            pace_s = self._pace(_PROGRESS_S, _PROGRESS_PER_S)
            await asyncio.sleep(min(pace_s, self._options.lease_s / 6))
            is_due = time.monotonic() - extended_at > self._options.lease_s / 3
            reports: list[SliceReport] = []
            for held in self._held.values():
                tally = held.writer.durable
                counts = (tally.completed, tally.failed)
                if not held.is_ending and (is_due or counts != held.reported):
                    held.reported = counts
                    reports.append(held.report(ends=None))
            if is_due:
                extended_at = time.monotonic()
            await asyncio.gather(*[self._reports.submit(report) for report in reports])

    # Lanes

    def _make_lane(self, route: Route) -> Lane:
        assert self._tasks is not None  # noqa: S101
        return Lane(
            [Admission(each, self._policies[each.name]) for each in route.upstreams],
            [self._metrics.upstream(each.name) for each in route.upstreams],
            gate=self._gate,
            spawn=self._tasks.create_task,
            wants_more=self._wants_more,
            waiting=Waiting[Queued](
                low_water=self._options.lines_ahead,
                held_bytes=self._options.held_bytes // len(tuple(self._routes)),
            ),
        )

    def _lanes_of(self, piece: Slice):
        routes = (self._routes.find(each, upstream=piece.upstream) for each in piece.models)
        names = {route.name for route in routes if route}
        return (self._lanes[name] for name in names if name in self._lanes)

    def _measure(self) -> Mapping[str, LaneGauges]:
        return {name: lane.measure() for name, lane in self._lanes.items()}

    async def _watch_load(self, lane: Lane, admission: Admission) -> None:
        """Ask an engine how many wait in its queue, while lines are sent to it."""
        while True:
            await asyncio.sleep(_LOAD_S)
            if not lane.is_busy:
                continue
            try:
                async with asyncio.timeout(_LOAD_PATIENCE_S):
                    load = await admission.upstream.read_load()
            except TimeoutError:
                continue
            limit = admission.limit.current
            admission.note_load(load, time.monotonic())
            if admission.limit.current > limit:
                lane.start()
            if load is None:
                await asyncio.sleep(_NO_LOAD_S)


def _left_s(held: HeldSlice) -> float:
    """Until the completion window closes, in seconds."""
    return max(held.expires_at - clock.now(), 0.0)


async def _first_of(*events: asyncio.Event, timeout_s: float) -> None:
    """Wait until one of the events is set, or the time is up."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _no_upstream(model: str) -> Reply:
    return Reply(
        failure=Failure.UNREACHABLE,
        message=f"No upstream in the settings serves the model {model!r} any more.",
    )
