"""A native run survives the end of its process between any two steps, and is paid once.

A step is a call to the store, to the provider or to the engine, before or after it has done
its work. The process ends at the nth step, for each n: what was not kept is gone, and new
parts are put together over the same data directory. In a cluster nobody knows that it has
ended: the other worker looks at what is due, by a clock that the test moves on.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from penstock import clock as shared_clock
from penstock.blobs.folder import FolderBlobs
from penstock.blobs.local_segments import LocalSegments
from penstock.blobs.segments import Kind
from penstock.errors import StorageUnavailable, UpstreamDown
from penstock.executor.native import NativePolicy, NativeRunner
from penstock.executor.native_lines import Collector
from penstock.executor.native_plan import NativePlanner
from penstock.jsonl import SlicePlan
from penstock.model import (
    Batch,
    BatchId,
    BatchStatus,
    File,
    FileId,
    Job,
    NativeRun,
    NativeRunStatus,
    Purpose,
    SliceStatus,
    Spent,
    Usage,
)
from penstock.places import store_url
from penstock.store.base import BatchChange
from penstock.store.sql import SqlStore
from penstock.telemetry import Health, WorkStats
from penstock.upstream.base import (
    BatchLimits,
    Details,
    NativeJob,
    NativeLine,
    NativeResult,
    NativeState,
    NativeStatus,
    Note,
    Reply,
)
from penstock.upstream.routes import NativeUse, Route, Routes
from tests.integration.bench import CHAT, line

LINES = 6
SLICE = 3
BATCH = BatchId("batch_1")
NOW = NativePolicy(
    first_poll_s=0.0,
    max_poll_s=0.0,
    first_wait_s=0.0,
    max_wait_s=0.0,
    submit_patience_s=5.0,
    cancel_grace_s=60.0,
)


class Died(BaseException):
    """The process ended here."""


@dataclass
class Clockwork:
    """Counts steps, and lets the process end at one of them."""

    ends_at: int = -1
    steps: int = 0
    trace: list[str] = field(default_factory=list[str])

    def step(self, name: str) -> None:
        self.steps += 1
        if self.steps == self.ends_at:
            self.trace.append(name)
            raise Died(name)

    def wind(self, thing: Any, *names: str) -> Any:
        """Let each call of these methods be two steps."""
        for name in names:
            setattr(thing, name, self._wound(getattr(thing, name), name))
        return thing

    def _wound(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        async def wound(*args: Any, **more: Any) -> Any:
            self.step(f"before {name}")
            result = await call(*args, **more)
            self.step(f"after {name}")
            return result

        return wound


class Provider:
    """What outlives our process: the jobs that were paid."""

    def __init__(self) -> None:
        self.jobs: dict[str, tuple[str, list[bytes]]] = {}
        self.cancelled: set[str] = set()
        self.is_deaf = False
        """Whether the answer to a submission is lost."""
        self.looks = 0
        self.created_at = 0.0
        """When it took the last job, by the clock that all share."""
        self.shows_after_s = 0.0
        """After how long its list shows a job."""
        self.slow_at = ""
        """Where a submission is held up until `goes_on`: "upload", "create" or "answer"."""
        self.is_held_up = asyncio.Event()
        self.goes_on = asyncio.Event()

    async def hold_up(self, at: str) -> None:
        if self.slow_at == at:
            self.is_held_up.set()
            await self.goes_on.wait()


class Adapter:
    """Speaks to the provider, and is wound up by the clockwork."""

    name = "hosted"
    limits = BatchLimits(endpoints=frozenset({CHAT}), max_requests=1000, max_bytes=10**6)

    def __init__(self, provider: Provider, clock: Clockwork) -> None:
        self._provider = provider
        self._clock = clock
        self.find_after_s = provider.shows_after_s

    def encode(self, job: NativeJob, line: NativeLine) -> bytes | Reply:
        if b"refuse-me" in line.body:
            return Reply(status_code=400, body=b'{"error":{"message":"No."}}')
        return line.custom_id.encode()

    async def submit(self, job: NativeJob, records: AsyncIterator[bytes], note: Note) -> str:
        self._clock.step("before upload")
        await self._provider.hold_up("upload")
        lines: list[bytes] = []
        async for record in records:
            lines.append(record)
            if len(lines) == job.requests:
                break  # as HTTP does with a body whose length it knows
        assert (len(lines), sum(len(each) + 1 for each in lines)) == (job.requests, job.bytes)
        self._clock.step("after upload")
        await note({"file": "f"})
        self._clock.step("before create")
        await self._provider.hold_up("create")
        native_id = f"job-{len(self._provider.jobs) + 1}"
        self._provider.jobs[native_id] = (job.key, lines)
        self._provider.created_at = shared_clock.now()
        self._clock.step("after create")
        await self._provider.hold_up("answer")
        if self._provider.is_deaf:
            self._provider.is_deaf = False
            raise UpstreamDown("No answer.")
        return native_id

    async def find(self, job: NativeJob, details: Details, *, since: float) -> str | None:
        self._clock.step("before find")
        found = [name for name, (key, _) in self._provider.jobs.items() if key == job.key]
        if shared_clock.now() < self._provider.created_at + self._provider.shows_after_s:
            found = []
        self._clock.step("after find")
        return found[0] if found else None

    async def check(self, job: NativeJob, native_id: str) -> NativeStatus:
        self._clock.step("before check")
        self._provider.looks += 1
        state = NativeState.RUNNING if self._provider.looks % 2 else NativeState.ENDED
        if native_id in self._provider.cancelled:
            state = NativeState.CANCELLED
        self._clock.step("after check")
        return NativeStatus(state=state, details={"output": "o"})

    async def results(
        self, job: NativeJob, native_id: str, status: NativeStatus
    ) -> AsyncGenerator[NativeResult]:
        assert status.details == {"file": "f", "output": "o"}
        lines = self._provider.jobs[native_id][1]
        if native_id in self._provider.cancelled:
            lines = lines[:3]
        for record in reversed(lines):
            self._clock.step("a result")
            number = int(record[1:])
            reply = Reply(
                status_code=200,
                body=b'{"n":%d}' % number,
                input_tokens=10 * number,
                cached_tokens=1,
                output_tokens=2,
                total_tokens=10 * number + 2,
            )
            yield NativeResult(custom_id=record.decode(), reply=reply)

    async def cancel(self, job: NativeJob, native_id: str) -> None:
        self._clock.step("before cancel")
        self._provider.cancelled.add(native_id)
        self._clock.step("after cancel")

    async def clean_up(self, job: NativeJob, details: Details) -> None:
        self._clock.step("clean up")

    async def close(self) -> None: ...


class NoEngine:
    """Keeps no job: `run_to_the_end` asks the store what is due."""

    async def enqueue(self, jobs: list[Job], *, connection: object | None = None) -> None: ...


class Process:
    """A process over a data directory, until it ends."""

    def __init__(
        self,
        data_dir: Path,
        provider: Provider,
        clock: Clockwork,
        *,
        blobs: FolderBlobs | None = None,
        lease_s: float = 30.0,
        policy: NativePolicy = NOW,
        stop_grace_s: float = 0.0,
        store: SqlStore | None = None,
    ) -> None:
        self.store = SqlStore(store_url(data_dir))
        self.segments = LocalSegments(data_dir / "segments")
        self.blobs = blobs or FolderBlobs(data_dir / "blobs")
        self.wound = clock.wind(
            store or SqlStore(store_url(data_dir)),
            "keep_native_run",
            "claim_slices",
            "report_slices",
            "get_native_slices",
        )
        use = NativeUse(upstream=Adapter(provider, clock))
        self.routes = Routes([Route(name="hosted", upstreams=(), models=("*",), native=use)])
        self.runner = NativeRunner(
            store=self.wound,
            engine=NoEngine(),
            blobs=self.blobs,
            routes=self.routes,
            collector=Collector(
                store=self.wound,
                blobs=self.blobs,
                segments=self.segments,
                health=Health(),
                stats=WorkStats(),
                worker_id="w",
                lease_s=lease_s,
            ),
            policy=policy,
            feed=lambda: None,
            stop_grace_s=stop_grace_s,
        )

    async def run_to_the_end(self) -> None:
        """What `upkeep.recover` and the engine do."""
        await self.store.open()
        try:
            await self.store.recover_slices()
            await self.store.recover_native_runs(due_at=time.time())
            async with asyncio.timeout(20):
                while jobs := await self.store.list_native_jobs(until=None):
                    for job in jobs:
                        await self.runner.advance(job.id, asyncio.Event())
        finally:
            await self.store.close()
            await self.wound.close()

    async def work_in_a_cluster(self) -> None:
        """What the engine and `upkeep.find_lost_work` do where others may be at work, too:
        what is due is done, and if nothing is, time goes by."""
        await self.store.open()
        try:
            async with asyncio.timeout(20):
                while await self.store.list_native_jobs(until=None):
                    now = shared_clock.now()
                    await self.store.release_slices(now=now)
                    for job in await self.store.list_native_jobs(until=now):
                        await self.runner.advance(job.id, asyncio.Event())
                    pass_time(1.0)
        finally:
            await self.store.close()
            await self.wound.close()

    async def get_run(self) -> NativeRun:
        await self.store.open()
        [run] = await self.store.list_native_runs(BATCH)
        return run


def pass_time(s: float) -> None:
    """Move the clock on that all share."""
    at = time.monotonic()
    shared_clock.follow(shared_clock.now() + s, asked_at=at, heard_at=at)


@pytest.fixture(autouse=True)
def own_clock() -> Iterator[None]:
    yield
    shared_clock.follow_machine()


async def add_batch(data_dir: Path, *custom_ids: str) -> None:
    """A batch whose input is good, as validation leaves it."""
    clock = Clockwork()
    process = Process(data_dir, Provider(), clock)
    lines = [line(name) for name in custom_ids]

    async def pieces() -> AsyncIterator[bytes]:
        yield b"".join(lines)

    await process.store.open()
    project = await process.store.ensure_project("red")
    await process.blobs.put("files/in", pieces())
    file = File(
        id=FileId("file-1"),
        project_id=project.id,
        purpose=Purpose.BATCH,
        filename="in.jsonl",
        bytes=sum(map(len, lines)),
        sha256="0" * 64,
        blob_key="files/in",
        created_at=0,
    )
    await process.store.add_file(file)
    now = int(time.time())
    batch = Batch(
        id=BATCH,
        project_id=project.id,
        status=BatchStatus.VALIDATING,
        endpoint=CHAT,
        input_file_id=file.id,
        input_blob_key=file.blob_key,
        completion_window="24h",
        created_at=now,
        expires_at=now + 86400,
    )
    await process.store.add_batch(batch)
    plans: list[SlicePlan] = []
    for first in range(0, len(lines), SLICE):
        mine = lines[first : first + SLICE]
        start = sum(map(len, lines[:first]))
        size = sum(map(len, mine))
        plans.append(
            SlicePlan(
                start=start,
                end=start + size,
                first_line=first + 1,
                requests=len(mine),
                models=("m",),
                bytes=size,
            )
        )
    planned = NativePlanner(process.routes).plan(batch, plans, now=now)
    change = BatchChange(slices=planned.slices, native_runs=planned.runs)
    await process.store.move_batch(BATCH, BatchStatus.IN_PROGRESS, now=now, change=change)
    await process.store.close()
    await process.wound.close()


async def live(
    data_dir: Path, provider: Provider, ends_at: int, *, cancels: bool = False
) -> tuple[bool, Clockwork]:
    """Let a process work until it ends by itself or at a step.

    Returns:
        Whether it ended by itself, and its clockwork.
    """
    clock = Clockwork(ends_at)
    process = Process(data_dir, provider, clock)
    if cancels:
        await process.store.open()
        batch = await process.store.get_batch(BATCH)
        if batch.status is BatchStatus.IN_PROGRESS:
            await process.store.move_batch(BATCH, BatchStatus.CANCELLING, now=int(time.time()))
            await process.store.cancel_native_runs(BATCH, now=time.time())
    try:
        await process.run_to_the_end()
    except Died:
        return False, clock
    return True, clock


async def results_of(data_dir: Path) -> tuple[dict[int, Kind], bool]:
    """The lines that have a result, and whether all slices have ended."""
    process = Process(data_dir, Provider(), Clockwork())
    await process.store.open()
    slices = await process.store.get_slices(BATCH)
    [run] = await process.store.list_native_runs(BATCH)
    assert run.status is NativeRunStatus.ENDED
    found: dict[int, Kind] = {}
    for piece in slices:
        assert piece.native_run is None
        is_over = piece.status is SliceStatus.ENDED
        attempt = piece.attempt if is_over else None
        with process.segments.read(BATCH, piece.index, attempt=attempt) as replies:
            for record, _ in replies.iter_records():
                assert record.line not in found
                found[record.line] = record.kind
    await process.store.close()
    await process.wound.close()
    return found, all(piece.status is SliceStatus.ENDED for piece in slices)


async def spent_in(data_dir: Path) -> Spent | None:
    """What the job of the one run took."""
    store = SqlStore(store_url(data_dir))
    await store.open()
    [run] = await store.list_native_runs(BATCH)
    await store.close()
    return run.spent


ALL_ANSWERED = Spent(
    answered=LINES - 1,
    usage=Usage(
        input_tokens=10 * sum(range(1, LINES)),
        cached_tokens=LINES - 1,
        output_tokens=2 * (LINES - 1),
        total_tokens=10 * sum(range(1, LINES)) + 2 * (LINES - 1),
    ),
    model="m",
    longest_input=10 * (LINES - 1),
)
NAMES = [f"line-{n}" for n in range(1, LINES)] + ["refuse-me"]


async def submit(data_dir: Path, provider: Provider) -> None:
    """Let a process end just after the provider has taken the job."""
    for ends_at in range(1, 100):
        is_over, _ = await live(data_dir, provider, ends_at)
        assert not is_over
        if provider.jobs:
            return


@pytest.mark.parametrize("is_deaf", [False, True], ids=["answers", "is deaf"])
async def test_wherever_the_process_ends_a_job_is_paid_once_and_each_line_has_a_result(
    tmp_path: Path, is_deaf: bool
) -> None:
    await add_batch(tmp_path / "new", *NAMES)
    seen: list[str] = []
    was_over, ends_at = False, 0
    while not was_over:
        ends_at += 1
        data_dir, provider = tmp_path / f"at-{ends_at}", Provider()
        provider.is_deaf = is_deaf
        copytree(tmp_path / "new", data_dir)

        is_over, clock = await live(data_dir, provider, ends_at)
        was_over = is_over
        seen += clock.trace
        if not is_over:
            is_over, _ = await live(data_dir, provider, -1)

        assert is_over
        assert len(provider.jobs) == 1, clock.trace
        [(_, records)] = provider.jobs.values()
        assert len(records) == LINES - 1
        found, have_ended = await results_of(data_dir)
        assert have_ended, clock.trace
        assert found == {
            n: Kind.ERROR if n == LINES else Kind.OUTPUT for n in range(1, LINES + 1)
        }
        spent = await spent_in(data_dir)
        # Whoever finds all slices ended does not look at the results again.
        assert spent in (ALL_ANSWERED, replace(ALL_ANSWERED, longest_input=None)), clock.trace
    assert {"before create", "after create", "a result", "clean up"} <= set(seen)
    assert {f"{when} keep_native_run" for when in ("before", "after")} <= set(seen)


async def test_a_process_that_ends_at_every_step_gets_there_and_pays_once(
    tmp_path: Path,
) -> None:
    await add_batch(tmp_path, *NAMES)
    provider = Provider()
    lives = 0
    for ends_at in range(1, 200):
        lives += 1
        is_over, _ = await live(tmp_path, provider, ends_at)
        if is_over:
            break
    assert lives > 5
    assert len(provider.jobs) == 1
    found, have_ended = await results_of(tmp_path)
    assert have_ended
    assert len(found) == LINES
    spent = await spent_in(tmp_path)
    assert spent is not None
    assert (spent.answered, spent.usage) == (ALL_ANSWERED.answered, ALL_ANSWERED.usage)


async def test_a_wish_to_cancel_survives_and_what_was_run_is_kept(tmp_path: Path) -> None:
    await add_batch(tmp_path / "new", *NAMES)
    taken = Provider()
    await submit(tmp_path / "new", taken)
    was_over, ends_at = False, 0
    while not was_over:
        ends_at += 1
        data_dir, provider = tmp_path / f"at-{ends_at}", Provider()
        provider.jobs = dict(taken.jobs)
        copytree(tmp_path / "new", data_dir)

        is_over, clock = await live(data_dir, provider, ends_at, cancels=True)
        was_over = is_over
        if not is_over:
            is_over, _ = await live(data_dir, provider, -1, cancels=True)

        assert is_over
        assert len(provider.jobs) == len(provider.cancelled) == 1, clock.trace
        found, _ = await results_of(data_dir)
        assert {n for n, kind in found.items() if kind is Kind.OUTPUT} == {1, 2, 3}
    assert ends_at > 20


# In a cluster

SHOWS_AFTER_S = 60.0
LEASE_S = 30.0
CALL_S = 60.0
IN_CLUSTER = replace(
    NOW,
    submit_patience_s=1800.0,
    lease_s=LEASE_S,
    call_s=CALL_S,
    first_wait_s=1.0,
    max_wait_s=1.0,
)


def slow_provider() -> Provider:
    provider = Provider()
    provider.shows_after_s = SHOWS_AFTER_S
    return provider


async def find_run(data_dir: Path) -> NativeRun:
    process = Process(data_dir, Provider(), Clockwork())
    run = await process.get_run()
    await process.store.close()
    await process.wound.close()
    return run


async def take_over(data_dir: Path, provider: Provider) -> float:
    """Let another worker do what is left.

    Returns:
        How long that took, in seconds, by the clock that all share.
    """
    begun_at = shared_clock.now()
    await Process(data_dir, provider, Clockwork(), policy=IN_CLUSTER).work_in_a_cluster()
    return shared_clock.now() - begun_at


@pytest.mark.parametrize("is_deaf", [False, True], ids=["answers", "is deaf"])
async def test_another_worker_takes_over_soon_and_pays_nothing_again(
    tmp_path: Path, is_deaf: bool
) -> None:
    await add_batch(tmp_path / "new", *NAMES)
    delays: dict[str, float] = {}
    was_over, ends_at = False, 0
    while not was_over:
        ends_at += 1
        data_dir, provider = tmp_path / f"at-{ends_at}", slow_provider()
        provider.is_deaf = is_deaf
        copytree(tmp_path / "new", data_dir)
        clock = Clockwork(ends_at)
        try:
            await Process(data_dir, provider, clock, policy=IN_CLUSTER).work_in_a_cluster()
            was_over = True
        except Died:
            was_submitting = (await find_run(data_dir)).status is NativeRunStatus.SUBMITTING
            provider.is_deaf = False
            took_s = await take_over(data_dir, provider)
            if was_submitting:
                [name] = clock.trace
                delays[name] = max(took_s, delays.get(name, 0))

        assert len(provider.jobs) == 1, clock.trace
        [(_, records)] = provider.jobs.values()
        assert len(records) == LINES - 1
        found, have_ended = await results_of(data_dir)
        assert have_ended, clock.trace
        assert len(found) == LINES
    assert {"before upload", "before create", "after create"} <= delays.keys()
    looked_after_s = LEASE_S + CALL_S + SHOWS_AFTER_S
    assert SHOWS_AFTER_S < delays["after create"] <= looked_after_s + 10
    assert max(delays.values()) <= looked_after_s + 10


async def test_a_submission_that_goes_on_is_not_taken_for_a_dead_one(tmp_path: Path) -> None:
    await add_batch(tmp_path, *NAMES)
    provider = slow_provider()
    provider.slow_at = "answer"
    policy = replace(IN_CLUSTER, lease_s=0.3)
    worker = Process(tmp_path, provider, Clockwork(), policy=policy)
    due: set[float] = set()

    run = await worker.get_run()
    working = asyncio.create_task(worker.runner.advance(run.id, asyncio.Event()))
    await provider.is_held_up.wait()
    async with asyncio.timeout(20):
        while len(due) < 5:  # for longer than a lease
            run = await find_run(tmp_path)
            assert run.status is NativeRunStatus.SUBMITTING
            due.add(run.due_at or 0)
            await asyncio.sleep(0.02)
    provider.goes_on.set()
    await working

    assert (await find_run(tmp_path)).status is NativeRunStatus.ENDED
    assert len(provider.jobs) == 1
    await worker.store.close()
    await worker.wound.close()


class StoreAway(SqlStore):
    """A database that takes no native runs while it is away."""

    is_away = False

    async def keep_native_run(self, run: NativeRun, *, now: float) -> NativeRun | None:
        if self.is_away:
            raise StorageUnavailable("The database is away.")
        return await super().keep_native_run(run, now=now)


async def test_who_cannot_extend_its_hold_ends_its_submission_before_others_look(
    tmp_path: Path,
) -> None:
    await add_batch(tmp_path, *NAMES)
    provider = slow_provider()
    provider.slow_at = "create"
    policy = replace(IN_CLUSTER, lease_s=0.3)
    store = StoreAway(store_url(tmp_path))
    cut_off = Process(tmp_path, provider, Clockwork(), policy=policy, store=store)
    run = await cut_off.get_run()
    working = asyncio.create_task(cut_off.runner.advance(run.id, asyncio.Event()))
    await provider.is_held_up.wait()

    store.is_away = True
    await asyncio.sleep(2 * policy.lease_s)
    provider.slow_at = ""
    provider.goes_on.set()
    await asyncio.sleep(0.1)
    assert provider.jobs == {}
    await take_over(tmp_path, provider)
    store.is_away = False
    await working

    assert len(provider.jobs) == 1
    assert (await find_run(tmp_path)).status is NativeRunStatus.ENDED
    await cut_off.store.close()
    await cut_off.wound.close()


async def stop_during(
    data_dir: Path, provider: Provider, at: str, *, goes_on: bool = False
) -> NativeRun:
    """Tell a worker to stop while it submits.

    Args:
        goes_on: Whether the submission ends within the grace of the stop.

    Returns:
        The run as it leaves it.
    """
    provider.slow_at = at
    grace_s = 20.0 if goes_on else 0.0
    stopped = Process(data_dir, provider, Clockwork(), policy=IN_CLUSTER, stop_grace_s=grace_s)
    run = await stopped.get_run()
    working = asyncio.create_task(stopped.runner.advance(run.id, asyncio.Event()))
    await provider.is_held_up.wait()
    stopped.runner.stop()
    if goes_on:
        provider.goes_on.set()
    await working
    provider.slow_at = ""
    await stopped.store.close()
    await stopped.wound.close()
    return await find_run(data_dir)


async def test_a_worker_that_is_told_to_stop_waits_for_the_answer_to_its_submission(
    tmp_path: Path,
) -> None:
    await add_batch(tmp_path, *NAMES)
    provider = slow_provider()

    run = await stop_during(tmp_path, provider, "answer", goes_on=True)

    assert (run.status, run.native_id) == (NativeRunStatus.SUBMITTED, "job-1")
    assert await take_over(tmp_path, provider) < 10


async def test_a_submission_that_outlasts_the_grace_of_a_stop_is_handed_over(
    tmp_path: Path,
) -> None:
    await add_batch(tmp_path, *NAMES)
    provider = slow_provider()

    run = await stop_during(tmp_path, provider, "answer")

    assert (run.status, run.attempts) == (NativeRunStatus.SUBMITTING, 0)
    assert SHOWS_AFTER_S < await take_over(tmp_path, provider) < SHOWS_AFTER_S + 10
    assert len(provider.jobs) == 1


async def test_an_upload_that_a_stop_cuts_off_is_begun_anew_at_once(tmp_path: Path) -> None:
    await add_batch(tmp_path, *NAMES)
    provider = slow_provider()

    run = await stop_during(tmp_path, provider, "upload")

    assert (run.status, run.attempts) == (NativeRunStatus.WAITING, 0)
    assert await take_over(tmp_path, provider) < 10
    assert len(provider.jobs) == 1
