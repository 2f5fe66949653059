"""Many workers on one database, whose lines take their time and are never sent.

Each has a store, a feeder, claims, reports, heartbeats, budget leases and upkeep, as a real
worker has them; lines are left out, and so the database is what is measured. They share one
process, or two, so that a machine has room for them.
"""

import asyncio
import multiprocessing
import random
import secrets
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks import measured_cluster
from penstock import clock
from penstock.errors import StorageUnavailable
from penstock.executor.feeder import Feeder
from penstock.executor.group import GroupCommit
from penstock.executor.members import Members
from penstock.executor.upkeep import find_lost_work, watch_deliveries
from penstock.model import (
    Batch,
    BatchId,
    BatchStatus,
    Counts,
    FileId,
    Job,
    SegmentObject,
    Slice,
    SliceId,
    Usage,
)
from penstock.store.base import Backlog, BatchChange, BudgetRequest, ClaimedSlice, SliceReport
from penstock.store.sql import SqlStore
from penstock.telemetry import Health

_LINES = 256
_LINE_BYTES = 1024
_PROGRESS_S = 0.5  # as in `executor.worker`
_PROGRESS_PER_S = 50.0
_FLUSH_S = 1.0
_BUDGET_S = 2.0  # as in `executor.budgets`
_BUDGETS_PER_S = 25.0
_UPSTREAMS = 1
_PROCESSES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is measured."""

    workers: int
    batches: int
    slices: int
    """Of each batch."""
    held: int
    """How many slices a worker holds at the same time."""
    slice_s: float
    """How long a slice takes."""
    seconds: float

    @property
    def wanted_per_s(self) -> float:
        return self.workers * self.held / self.slice_s


def measure(*, smoke: bool) -> Iterator[dict[str, Any]]:
    for name, load in _loads(smoke):
        with measured_cluster.postgres() as server:
            yield {"of": name, **_measure(server, load)}


def _loads(smoke: bool) -> list[tuple[str, Load]]:
    if smoke:
        load = Load(workers=8, batches=2, slices=200, held=2, slice_s=1.0, seconds=3)
        return [("steady", load)]
    idle = Load(workers=100, batches=0, slices=0, held=4, slice_s=1.0, seconds=30)
    slow = Load(workers=100, batches=20, slices=1000, held=4, slice_s=60.0, seconds=30)
    steady = Load(workers=25, batches=20, slices=1000, held=4, slice_s=8.0, seconds=30)
    rush = Load(workers=10, batches=20, slices=1000, held=4, slice_s=0.4, seconds=20)
    rush_on_one = Load(workers=10, batches=1, slices=20_000, held=4, slice_s=0.4, seconds=20)
    return [
        ("idle", idle),
        ("100 workers, slow lines", slow),
        ("25 workers", steady),
        ("as fast as it goes, 20 batches", rush),
        ("as fast as it goes, 1 batch", rush_on_one),
    ]


def _measure(server: measured_cluster.Postgres, load: Load) -> dict[str, Any]:
    asyncio.run(_fill(server.url, load))
    server.ask("VACUUM ANALYZE")
    context = multiprocessing.get_context("spawn")
    results: Any = context.SimpleQueue()
    start_at = time.monotonic() + 8 + load.workers / 20
    processes = [
        context.Process(target=_run, args=(server.url, load, part, start_at, results))
        for part in range(_PROCESSES)
    ]
    for process in processes:
        process.start()
    time.sleep(max(start_at - time.monotonic(), 0))
    before = server.tally()
    waits, looks = _watch(server, load.seconds)
    done = server.tally().since(before)
    told = [results.get() for _ in processes]
    for process in processes:
        process.join()
    failures = [failure for each in told for failure in each["failures"]]
    assert not failures, failures[:3]
    return _summary(load, done, told, waits, looks)


def _watch(server: measured_cluster.Postgres, seconds: float) -> tuple[Counter[str], int]:
    """What the connections that do something do or wait for, looked at again and again."""
    waits: Counter[str] = Counter()
    looks = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        looks += 1
        for row in server.ask(_ACTIVITY):
            waits[row["what"]] += row["count"]
        time.sleep(min(0.25, max(end - time.monotonic(), 0)))
    return waits, looks


_ACTIVITY = """
SELECT CASE WHEN state = 'idle in transaction' THEN 'between statements'
    ELSE coalesce(wait_event_type || ' ' || wait_event, 'processor') END AS what, count(*)
FROM pg_stat_activity
WHERE application_name = 'penstock' AND state <> 'idle'
GROUP BY 1
"""


def _summary(
    load: Load,
    done: measured_cluster.Tally,
    told: list[dict[str, Any]],
    waits: Counter[str],
    looks: int,
) -> dict[str, Any]:
    claims_s = sorted(s for each in told for s in each["claims_s"])
    reports_s = sorted(s for each in told for s in each["reports_s"])
    counts: Counter[str] = sum((Counter(each["counts"]) for each in told), Counter())
    per_s = {f"{name}_per_s": round(n / load.seconds, 1) for name, n in counts.items()}
    ended = counts["ended"]
    return {
        **asdict(load),
        "wanted_slices_per_s": load.wanted_per_s,
        **per_s,
        "lines_per_s": round(_LINES * ended / load.seconds),
        "claim_ms": _spread(claims_s),
        "report_ms": _spread(reports_s),
        "lost_races": round(counts["lost"] / max(counts["claimed"] + counts["lost"], 1), 3),
        "database_cores": round(done.cpu_s / done.at, 2),
        "database_cpu_ms_per_slice": round(1000 * done.cpu_s / ended, 2) if ended else None,
        "our_cores": round(sum(each["cpu_s"] for each in told) / load.seconds, 2),
        "commits_per_s": round(done.commits / done.at),
        "wal_bytes_per_slice": round(done.wal_bytes / ended) if ended else None,
        "at_any_time": {name: round(n / looks, 1) for name, n in waits.most_common(8)},
    }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    if len(seconds) < 100:
        return {}
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50": round(1000 * cuts[49], 1), "p99": round(1000 * cuts[98], 1)}


# The work that there is


async def _fill(url: str, load: Load) -> None:
    store = SqlStore(url)
    await store.migrate()
    await store.open()
    now = int(time.time())
    for number in range(load.batches):
        project = await store.ensure_project(f"project-{number % 4}")
        batch_id = BatchId(f"batch_{number:032x}")
        batch = Batch(
            id=batch_id,
            project_id=project.id,
            status=BatchStatus.VALIDATING,
            endpoint="/v1/chat/completions",
            input_file_id=FileId("file-none"),
            input_blob_key="files/none",
            completion_window="24h",
            expires_at=now + 86_400,
            created_at=now,
        )
        await store.add_batch(batch, needs_file=False)
        slices = [_slice(batch_id, index) for index in range(load.slices)]
        change = BatchChange(counts=Counts(total=_LINES * load.slices), slices=slices)
        await store.move_batch(batch_id, BatchStatus.IN_PROGRESS, now=now, change=change)
    await store.close()


def _slice(batch_id: BatchId, index: int) -> Slice:
    size = _LINES * _LINE_BYTES
    return Slice(
        batch_id=batch_id,
        index=index,
        start=index * size,
        end=(index + 1) * size,
        first_line=1 + index * _LINES,
        requests=_LINES,
        models=("sim",),
    )


# The workers


@dataclass(slots=True)
class _Told:
    """What the workers of a process have seen."""

    is_counting: bool = False
    counts: Counter[str] = field(default_factory=Counter[str])
    claims_s: list[float] = field(default_factory=list[float])
    reports_s: list[float] = field(default_factory=list[float])

    def note(self, name: str, count: int = 1) -> None:
        if self.is_counting:
            self.counts[name] += count


class _AtOnce:
    """An engine that begins each job at once."""

    def __init__(self) -> None:
        self._handler: Callable[[str], Any] | None = None
        self._doing: set[asyncio.Task[None]] = set()

    def handle(self, handler: Callable[[str], Any]) -> None:
        self._handler = handler

    async def enqueue(self, jobs: Sequence[Job], *, connection: object | None = None) -> None:
        assert self._handler is not None
        for job in jobs:
            if job.kind == "slice":
                task = asyncio.create_task(self._handler(job.id))
                self._doing.add(task)
                task.add_done_callback(self._doing.discard)


@dataclass(slots=True)
class _Held:
    slice: Slice
    begun_at: float
    objects: int = 0

    def share(self, slice_s: float) -> float:
        return min((time.monotonic() - self.begun_at) / slice_s, 1.0)


class _Worker:
    """A worker without lines."""

    def __init__(self, url: str, name: str, load: Load, told: _Told) -> None:
        self._load = load
        self._told = told
        self._name = name
        self._store = SqlStore(url)
        self._members = Members(store=self._store, worker_id=name, version="bench")
        self._engine = _AtOnce()
        self._engine.handle(self._run_slice)
        self._feeder = Feeder(
            store=self._store,
            engine=self._engine,
            share=self._members.share,
            pace=self._members.pace,
        )
        self._feeder.serve(self)
        health = Health()
        self._claims = GroupCommit(self._claim, health=health)
        self._reports = GroupCommit(self._report, health=health)
        self._held: dict[SliceId, _Held] = {}
        self._expected = 0

    async def run(self) -> None:
        await self._store.open()
        await self._members.join()
        async with asyncio.TaskGroup() as tasks:
            for loop in (
                self._members.run(),
                self._feeder.run(),
                self._claims.run(),
                self._reports.run(),
                self._tell(),
                self._flush(),
                self._lease(),
                find_lost_work(
                    store=self._store,
                    engine=self._engine,
                    lease_s=30,
                    is_first=lambda: self._members.share()[0] == 0,
                ),
                watch_deliveries(
                    store=self._store,
                    engine=self._engine,
                    pace=self._members.pace,
                ),
            ):
                tasks.create_task(loop)

    async def close(self) -> None:
        await self._store.close()

    # What the feeder asks

    def has_room(self, piece: Slice, batch: Backlog) -> bool:
        return len(self._held) + self._expected < self._load.held

    def is_blocked(self, piece: Slice) -> bool:
        return False

    def expect(self, piece: Slice, batch: Backlog, *, sign: int = 1) -> None:
        self._expected += sign

    # A slice

    async def _run_slice(self, name: str) -> None:
        begun = time.monotonic()
        claimed = await self._claims.submit(SliceId(name))
        if self._told.is_counting:
            self._told.claims_s.append(time.monotonic() - begun)
        if claimed is None:
            self._told.note("lost")
            self._feeder.hold(name, False)
            return
        self._told.note("claimed")
        held = self._held[claimed.slice.id] = _Held(claimed.slice, time.monotonic())
        self._feeder.hold(name)
        await asyncio.sleep(self._load.slice_s * random.uniform(0.8, 1.2))
        del self._held[claimed.slice.id]
        try:
            await self._store.replace_segment_objects(self._object(held))
        except StorageUnavailable:
            self._told.note("refused")
        begun = time.monotonic()
        await self._reports.submit(self._made(held, _LINES, ends=True))
        if self._told.is_counting:
            self._told.reports_s.append(time.monotonic() - begun)
        self._told.note("ended")
        self._feeder.has_room()

    def _made(self, held: _Held, lines: int, *, ends: bool | None) -> SliceReport:
        return SliceReport(
            id=held.slice.id,
            attempt=held.slice.attempt,
            completed=lines,
            failed=0,
            usage=Usage(input_tokens=180 * lines, total_tokens=244 * lines),
            ends=ends,
        )

    async def _claim(self, ids: list[SliceId]) -> list[ClaimedSlice | None]:
        self._told.note("claims")
        claimed = await self._store.claim_slices(
            ids, worker_id=self._name, lease_s=30, now=clock.now()
        )
        by_id = {each.slice.id: each for each in claimed}
        return [by_id.get(name) for name in ids]

    async def _report(self, reports: list[SliceReport]) -> list[bool]:
        self._told.note("reports")
        latest = {report.id: report for report in reports}
        lost = await self._store.report_slices(
            list(latest.values()), lease_s=30, now=clock.now()
        )
        return [report.id not in lost for report in reports]

    # What goes on beside it

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(self._members.pace(_PROGRESS_S, _PROGRESS_PER_S))
            for held in list(self._held.values()):
                lines = int(_LINES * held.share(self._load.slice_s))
                self._reports.submit(self._made(held, lines, ends=None))

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_S)
            if self._held:
                objects = [self._object(held) for held in self._held.values()]
                try:
                    await self._store.add_segment_objects(objects)
                except StorageUnavailable:
                    self._told.note("refused")

    def _object(self, held: _Held) -> SegmentObject:
        held.objects += 1
        piece = held.slice
        key = f"segments/{piece.batch_id}/{piece.index:08d}.{secrets.token_hex(8)}"
        return SegmentObject(
            batch_id=piece.batch_id,
            index=piece.index,
            attempt=piece.attempt,
            number=held.objects,
            key=key,
            bytes=100_000,
        )

    async def _lease(self) -> None:
        while True:
            requests = [_budget_request(f"upstream-{n}") for n in range(_UPSTREAMS)]
            try:
                await self._store.lease_budgets(
                    self._name, requests, lease_s=15, now=clock.now()
                )
            except StorageUnavailable:
                self._told.note("refused")
            every_s = self._members.pace(_BUDGET_S, _BUDGETS_PER_S)
            await asyncio.sleep(every_s * random.uniform(0.95, 1.05))


def _budget_request(upstream: str) -> BudgetRequest:
    return BudgetRequest(
        upstream=upstream,
        max_concurrency=10_000,
        requests_per_minute=0,
        tokens_per_minute=0,
        demand=256,
        in_flight=0,
    )


def _run(url: str, load: Load, part: int, start_at: float, results: Any) -> None:
    """Run a part of the workers in this process, and tell what they saw."""
    import logging

    import structlog
    import uvloop

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    uvloop.run(_work(url, load, part, start_at, results))


async def _work(url: str, load: Load, part: int, start_at: float, results: Any) -> None:
    told = _Told()
    workers = [
        _Worker(url, f"worker-{number:03d}", load, told)
        for number in range(part, load.workers, _PROCESSES)
    ]
    running: list[asyncio.Task[None]] = []
    for worker in workers:
        running.append(asyncio.create_task(worker.run()))
        await asyncio.sleep(0.03)
    await asyncio.sleep(max(start_at - time.monotonic(), 0))
    told.is_counting, cpu_s = True, -time.process_time()
    await asyncio.sleep(load.seconds)
    told.is_counting = False
    cpu_s += time.process_time()
    results.put(
        {
            "counts": dict(told.counts),
            "claims_s": told.claims_s,
            "reports_s": told.reports_s,
            "cpu_s": cpu_s,
            "failures": [repr(task.exception()) for task in running if task.done()],
        }
    )
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    for worker in workers:
        await worker.close()
