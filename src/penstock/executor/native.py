"""Native runs: slices that a provider's own batch API runs, step by step.

    waiting ──► submitting ──► submitted ──► collecting ──► ended
       ▲            │               │
       └─ not taken ┘◄── failed, nothing was run: another key

A step reads the run from the store, does one thing, and keeps what came of it before the next
begins. Before the provider is asked to take a job, the run is kept as `submitting`: whoever
finds it so later, after a crash or a time-out, asks the provider for the job by its key, and
submits it only if there is none. So no job is paid twice, wherever the process dies. Who
submits holds the run by a lease and gives up when it cannot extend it: then it is either still
at work, or nothing of it is on its way any more when others look.
"""

import asyncio
import contextlib
import random
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec
import structlog

from penstock import clock
from penstock.blobs.base import Blobs
from penstock.engine.base import Engine
from penstock.errors import (
    JobNotTaken,
    JobRefused,
    NotFound,
    PenstockError,
    StorageUnavailable,
    UpstreamDown,
)
from penstock.executor.native_lines import (
    LACKS,
    Collector,
    Records,
    SliceBusy,
    Verdict,
    count_up,
)
from penstock.executor.native_plan import parts_of, stop_at
from penstock.model import (
    Batch,
    BatchStatus,
    Job,
    JobKind,
    NativeRun,
    NativeRunId,
    NativeRunStatus,
    Slice,
    find_endpoint,
)
from penstock.store.base import Store
from penstock.upstream.base import (
    BatchUpstream,
    Details,
    Lack,
    NativeJob,
    NativeResult,
    NativeState,
    NativeStatus,
)
from penstock.upstream.routes import NativeUse, Routes

_log = structlog.get_logger()

_T = TypeVar("_T")

_AGAIN_S = 1.0
_AT_ONCE = 2
"""How many jobs are submitted to an upstream, or their results fetched, at the same time."""
_HEAVY = (NativeRunStatus.WAITING, NativeRunStatus.COLLECTING)
_DOUBLINGS = 64
"""More of them than any wait needs, and few enough for a float."""
_CLEAN_UP_S = 60.0
_HAND_OVER_S = 2.0
"""How long it may take to write down, after the grace of a stop, what was not ended in it."""
_REFUSED = "refused"
"""The outcome of a job that the provider never took, or does not know any more."""
_BY_LINE = "by_line"
"""The outcome of a run whose lines could not be a job: they are sent one by one."""
_GONE = "No upstream of the settings has this name and a batch API any more."


@dataclass(frozen=True, slots=True, kw_only=True)
class NativePolicy:
    """How patient to be with a provider."""

    first_poll_s: float = 10.0
    """How long after it was submitted a job is looked at."""
    max_poll_s: float = 300.0
    first_wait_s: float = 5.0
    """How long to wait after a first call that brought nothing."""
    max_wait_s: float = 600.0
    submit_patience_s: float = 1800.0
    """How long a submission may take, upload and all."""
    lease_s: float = 30.0
    """How long who submits a job is taken to live without a sign of life."""
    call_s: float = 60.0
    """How long a call may be on its way whose caller is gone: no less than its time-out."""
    cancel_grace_s: float = 600.0
    """How long a provider may take to cancel a job of a batch that is to end."""

    def poll_wait_s(self, *, age_s: float, jitter: float) -> float:
        """How long to wait before a job is looked at again: a tenth of its age, between
        `first_poll_s` and `max_poll_s`. `jitter`, from 0 to 1, adds up to a quarter."""
        wait = min(max(age_s / 10, self.first_poll_s), self.max_poll_s)
        return wait * (1 + jitter / 4)

    def wait_s(self, *, attempt: int, jitter: float, asked_s: float | None) -> float:
        """How long to wait after so many calls in a row that brought nothing: doubled with
        each, and at least what the provider asked for, up to `max_wait_s`."""
        wait = self.first_wait_s * 2.0 ** min(attempt - 1, _DOUBLINGS)
        return min(max(wait, asked_s or 0.0), self.max_wait_s) * (1 + jitter / 4)


class _Lost(Exception):
    """The run was written by somebody else meanwhile."""


class _Submission:
    """A run that is held while its job is submitted.

    Others look for the job when the lease has ended and what its holder had sent must have
    arrived, or never will. The lease is extended as long as the holder lives and the database
    takes it; who cannot extend it gives the submission up before it ends.

    Args:
        run: As it is to be kept while it is submitted, but for `due_at`.
        keep: Keeps a run, or raises `_Lost`.
        lease_s: How long the holder is taken to live without a sign of life.
        wait_s: How long to wait after that before the provider is asked.
        patience_s: How long the submission may take.
    """

    def __init__(
        self,
        run: NativeRun,
        keep: Callable[[NativeRun], Awaitable[NativeRun]],
        *,
        lease_s: float,
        wait_s: float,
        patience_s: float,
    ) -> None:
        self.run = run
        self._keep = keep
        self._lease_s = lease_s
        self._wait_s = wait_s
        self._writing = asyncio.Lock()
        self._ends_at = asyncio.get_running_loop().time() + patience_s
        self._held_until = self._ends_at
        self._limit: asyncio.Timeout | None = None

    async def hold(self) -> None:
        """Take the lease, or extend it.

        Raises:
            _Lost: Somebody else has written the run.
        """
        asked_at = asyncio.get_running_loop().time()
        # Of now, also where the database takes it only after a while.
        await self._write(due_at=clock.now() + self._lease_s + self._wait_s)
        self._held_until = asked_at + self._lease_s
        self._reschedule()

    async def note(self, details: Details) -> None:
        """Keep what the adapter wants to be reminded of.

        Raises:
            _Lost: Somebody else has written the run.
        """
        await self._write(details=dict(details))

    def end_by(self, at: float) -> None:
        """Let it take no longer than to a time of the event loop."""
        self._ends_at = min(self._ends_at, at)
        self._reschedule()

    @contextlib.asynccontextmanager
    async def limited(self) -> AsyncGenerator[None]:
        """Cancel what takes too long, or goes on when the lease has ended.

        Raises:
            TimeoutError: It was cancelled.
        """
        extending = asyncio.create_task(self._extend())
        try:
            async with asyncio.timeout(None) as self._limit:
                self._reschedule()
                yield
        finally:
            self._limit = None
            try:
                async with self._writing:  # a write that is cut off may be done all the same
                    extending.cancel()
            finally:
                extending.cancel()

    async def _extend(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            try:
                await self.hold()
            except _Lost:
                self.end_by(0.0)
                return

    async def _write(self, **changes: object) -> None:
        async with self._writing:
            changed = replace(self.run, **changes)  # pyright: ignore[reportArgumentType]
            self.run = await self._keep(changed)

    def _reschedule(self) -> None:
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(min(self._ends_at, self._held_until))


@dataclass(frozen=True, slots=True)
class _Scene:
    """What a step knows beside the run."""

    batch: Batch
    use: NativeUse

    @property
    def upstream(self) -> BatchUpstream:
        return self.use.upstream

    def is_over(self, now: float) -> bool:
        """Whether nothing is to be begun for the batch any more."""
        status = self.batch.status
        is_open = status in (BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING)
        return not is_open or now >= self.batch.expires_at

    def is_to_stop(self, run: NativeRun, now: float) -> bool:
        """Whether a run is to be cancelled."""
        if run.cancel_wanted_at is not None or self.is_over(now):
            return True
        return now >= stop_at(self.batch, falls_back=self.use.falls_back)

    def is_given_up(self, run: NativeRun, now: float, grace_s: float) -> bool:
        """Whether the batch waits no longer for what the provider still has."""
        wanted_at = run.cancel_wanted_at
        return wanted_at is not None and self.is_over(now) and now >= wanted_at + grace_s

    def job(self, run: NativeRun) -> NativeJob:
        endpoint = find_endpoint(self.batch.endpoint)
        return NativeJob(
            key=run.key,
            display_name=self.batch.job_name or self.batch.id,
            endpoint=endpoint.path if endpoint else self.batch.endpoint,
            model=self.batch.asked_model or run.model,
            requests=run.requests,
            expires_at=stop_at(self.batch, falls_back=self.use.falls_back),
            metadata=self.batch.metadata or {},
            parameters=self.batch.parameters or {},
        )


class NativeRunner:
    """Takes native runs from step to step.

    Args:
        feed: Called when slices may have been let go.
        stop_grace_s: How long steps may go on after `stop`.
    """

    def __init__(
        self,
        *,
        store: Store,
        engine: Engine,
        blobs: Blobs,
        routes: Routes,
        collector: Collector,
        policy: NativePolicy,
        feed: Callable[[], None],
        stop_grace_s: float,
    ) -> None:
        self._store = store
        self._engine = engine
        self._blobs = blobs
        self._routes = routes
        self._collector = collector
        self._policy = policy
        self._feed = feed
        self._stop_grace_s = stop_grace_s
        self._is_stopping = False
        self._places: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(_AT_ONCE)
        )
        self._deadlines: set[asyncio.Timeout] = set()
        self._submissions: set[_Submission] = set()
        self._steps: Mapping[
            NativeRunStatus, Callable[[NativeRun, _Scene], Awaitable[NativeRun]]
        ] = {
            NativeRunStatus.WAITING: self._submit,
            NativeRunStatus.SUBMITTING: self._find,
            NativeRunStatus.SUBMITTED: self._look,
            NativeRunStatus.COLLECTING: self._collect,
        }

    async def advance(self, run_id: str, stop: asyncio.Event) -> None:
        """Take a run as far as it goes now. The engine's handler for `native_poll` jobs."""
        del stop  # the wish to cancel stands in the store
        try:
            async with asyncio.timeout(None) as deadline:
                self._deadlines.add(deadline)
                try:
                    await self._advance(NativeRunId(run_id))
                finally:
                    self._deadlines.discard(deadline)
        except (NotFound, _Lost):
            pass  # its batch was forgotten meanwhile, or somebody else goes on with it
        except TimeoutError:
            pass  # the process ends; the next one goes on

    def stop(self) -> None:
        """Begin no step any more; those that were begun may end. A submission that does not
        end in time is handed over."""
        self._is_stopping = True
        over_at = asyncio.get_running_loop().time() + self._stop_grace_s
        for submission in self._submissions:
            submission.end_by(over_at)
        for deadline in self._deadlines:
            deadline.reschedule(over_at + _HAND_OVER_S)

    async def _advance(self, run_id: NativeRunId) -> None:
        while not self._is_stopping:
            run = await self._get_run(run_id)
            if run.status not in _HEAVY:
                goes_on = await self._step(run)
            else:
                async with self._places[run.upstream]:
                    # Much may have happened to it while it waited for its place.
                    goes_on = await self._step(await self._get_run(run_id))
            if not goes_on:
                return

    async def _step(self, run: NativeRun) -> bool:
        """Take a run one step further, if it is time.

        Returns:
            Whether to look at it again at once.
        """
        if run.due_at is None or self._is_stopping:
            return False
        if run.due_at > clock.now():
            job = Job(kind=JobKind.NATIVE, id=run.id, due_at=run.due_at)
            await self._engine.enqueue([job])
            return False
        batch = await self._get_batch(run)
        route = self._routes.get(run.upstream)
        if route is None or route.native is None:
            await self._without_upstream(run, batch)
            return True
        scene = _Scene(batch, route.native)
        try:
            await self._steps[run.status](run, scene)
        except NotFound as error:  # somebody took the input file, and may put it back
            await self._again(
                await self._get_run(run.id),
                scene,
                error,
                "A batch waits for its input file, which is gone from the storage.",
            )
        return True

    async def _get_run(self, run_id: NativeRunId) -> NativeRun:
        return await self._until_stored(lambda: self._store.get_native_run(run_id))

    async def _get_batch(self, run: NativeRun) -> Batch:
        return await self._until_stored(lambda: self._store.get_batch(run.batch_id))

    async def _get_slices(self, run: NativeRun) -> list[Slice]:
        return await self._until_stored(lambda: self._store.get_native_slices(run.id))

    # Submit

    async def _submit(self, run: NativeRun, scene: _Scene) -> NativeRun:
        """Hand a job to the provider that surely does not have it."""
        now = clock.now()
        if scene.is_to_stop(run, now):
            return await self._settle(run, NativeState.CANCELLED)
        upstream = scene.upstream
        records = Records(
            blobs=self._blobs,
            batch=scene.batch,
            slices=await self._get_slices(run),
            upstream=upstream,
            job=scene.job(run),
        )
        await self._until_stored(records.measure)
        limits = upstream.limits
        if records.bytes > limits.max_bytes or records.count > limits.max_requests:
            return await self._split(run)
        if records.count < limits.min_requests:
            return await self._settle(run, _BY_LINE)
        if self._is_stopping:
            return run
        return await self._hand_in(run, scene, records)

    async def _hand_in(self, run: NativeRun, scene: _Scene, records: Records) -> NativeRun:
        """Submit a job, of which all is known, and hold its run meanwhile."""
        upstream = scene.upstream
        job = msgspec.structs.replace(
            scene.job(run), requests=records.count, bytes=records.bytes
        )
        submission = _Submission(
            replace(
                run, status=NativeRunStatus.SUBMITTING, begun_at=run.begun_at or clock.now()
            ),
            self._keep,
            lease_s=self._policy.lease_s,
            wait_s=self._policy.call_s + upstream.find_after_s,
            patience_s=self._policy.submit_patience_s,
        )
        self._submissions.add(submission)
        try:
            await submission.hold()
            async with submission.limited():
                native_id = await upstream.submit(job, records.read(), submission.note)
        except _Lost:
            raise
        except JobRefused as error:
            if error.is_too_large:
                return await self._split(submission.run)
            return await self._settle(submission.run, _REFUSED, str(error))
        except Exception as error:
            return await self._not_submitted(
                submission.run, scene, error, is_whole=records.is_whole
            )
        finally:
            self._submissions.discard(submission)
        run = submission.run
        _log.info(
            "A provider has taken a batch.",
            batch_id=run.batch_id,
            upstream=run.upstream,
            native_id=native_id,
            requests=records.count,
        )
        return await self._pin(run, native_id)

    async def _not_submitted(
        self, run: NativeRun, scene: _Scene, error: Exception, *, is_whole: bool
    ) -> NativeRun:
        """What to do after a submission that brought no native ID.

        Args:
            is_whole: Whether the provider may have the job: it was given all lines.
        """
        if not isinstance(error, (PenstockError, OSError, TimeoutError)):
            _log.error("An upstream adapter failed.", upstream=run.upstream, exc_info=error)
        is_known = isinstance(error, JobNotTaken) or not is_whole
        is_handed_over = self._is_stopping and isinstance(error, TimeoutError)
        wait_s = 0.0 if is_handed_over else self._wait_s(run, error)
        if is_known:
            status = NativeRunStatus.WAITING
        else:
            status = NativeRunStatus.SUBMITTING
            wait_s = max(wait_s, scene.upstream.find_after_s)
        _log.warning(
            "A provider has not taken a batch; trying again."
            if is_known
            else "Whether a provider has taken a batch is to be found out.",
            batch_id=run.batch_id,
            upstream=run.upstream,
            error=str(error) or "It was not done in time.",
        )
        attempts = run.attempts if is_handed_over else run.attempts + 1
        return await self._keep(
            run, status=status, attempts=attempts, due_at=clock.now() + wait_s
        )

    async def _find(self, run: NativeRun, scene: _Scene) -> NativeRun:
        """Find out whether the provider has a job whose submission brought no answer."""
        now = clock.now()
        begun_at = now if run.begun_at is None else run.begun_at
        try:
            native_id = await scene.upstream.find(scene.job(run), run.details, since=begun_at)
        except (UpstreamDown, JobNotTaken, JobRefused) as error:
            return await self._again(run, scene, error)
        if native_id is None:
            return await self._keep(run, status=NativeRunStatus.WAITING, due_at=now)
        _log.info(
            "A provider has a batch already.",
            batch_id=run.batch_id,
            upstream=run.upstream,
            native_id=native_id,
        )
        return await self._pin(run, native_id)

    async def _pin(self, run: NativeRun, native_id: str) -> NativeRun:
        now = clock.now()
        return await self._keep(
            run,
            status=NativeRunStatus.SUBMITTED,
            native_id=native_id,
            submitted_at=now,
            attempts=0,
            due_at=now + self._policy.poll_wait_s(age_s=0, jitter=random.random()),
        )

    async def _split(self, run: NativeRun) -> NativeRun:
        """Let two smaller runs take the place of one that is too large."""
        now = clock.now()
        pieces = await self._get_slices(run)
        parts = parts_of(run, pieces, now=now)
        if not parts:
            return await self._settle(run, _BY_LINE)
        by_id = [(part, [piece.id for piece in mine]) for part, mine in parts]
        if not await self._until_stored(
            lambda: self._store.split_native_run(run, by_id, now=now)
        ):
            raise _Lost
        return run

    # Look

    async def _look(self, run: NativeRun, scene: _Scene) -> NativeRun:
        """See how a job stands, and cancel it if it is to stop."""
        now = clock.now()
        if run.cancel_wanted_at is None and scene.is_to_stop(run, now):
            run = await self._keep(run, cancel_wanted_at=now)
        native_id = run.native_id or ""
        job = scene.job(run)
        try:
            if run.cancel_wanted_at is not None:
                await self._cancel(run, scene, job)
            status = await scene.upstream.check(job, native_id)
        except JobRefused as error:
            return await self._settle(run, _REFUSED, str(error))
        except (UpstreamDown, JobNotTaken) as error:
            return await self._again(run, scene, error)
        if status.is_final:
            return await self._job_is_over(run, scene, status)
        if scene.is_given_up(run, now, self._policy.cancel_grace_s):
            return await self._give_up(run)
        age_s = 0.0 if run.cancel_wanted_at else now - (run.submitted_at or now)
        wait_s = self._policy.poll_wait_s(age_s=age_s, jitter=random.random())
        return await self._keep(
            run,
            attempts=0,
            completed=status.completed,
            failed=status.failed,
            due_at=clock.now() + wait_s,
        )

    async def _cancel(self, run: NativeRun, scene: _Scene, job: NativeJob) -> None:
        try:
            await scene.upstream.cancel(job, run.native_id or "")
        except JobRefused as error:  # `check` tells what there is to know
            _log.warning(
                "A provider does not cancel a batch.",
                batch_id=run.batch_id,
                upstream=run.upstream,
                error=str(error),
            )

    async def _job_is_over(
        self, run: NativeRun, scene: _Scene, status: NativeStatus
    ) -> NativeRun:
        now = clock.now()
        details = run.details | dict(status.details)
        log = _log.bind(batch_id=run.batch_id, upstream=run.upstream, native_id=run.native_id)
        if status.state is NativeState.FAILED:
            log.warning("A provider has failed a batch.", error=status.message)
            if status.may_pass and not scene.is_to_stop(run, now):
                await self._clean_up(scene, scene.job(run), details, run)
                wait_s = self._policy.wait_s(
                    attempt=run.submission, jitter=random.random(), asked_s=None
                )
                return await self._keep(
                    run,
                    status=NativeRunStatus.WAITING,
                    submission=run.submission + 1,
                    native_id=None,
                    begun_at=None,
                    submitted_at=None,
                    details={},
                    attempts=0,
                    message=status.message,
                    due_at=now + wait_s,
                )
        else:
            log.info("A provider has ended a batch.", state=status.state.value)
        return await self._keep(
            run,
            status=NativeRunStatus.COLLECTING,
            outcome=status.state.value,
            message=status.message,
            details=details,
            completed=status.completed,
            failed=status.failed,
            attempts=0,
            due_at=now,
        )

    # Collect

    async def _collect(self, run: NativeRun, scene: _Scene) -> NativeRun:
        """Write what became of each line, and let go of the slices."""
        job = scene.job(run)
        results = _none()
        if run.native_id is not None and run.outcome in set(NativeState):
            state = NativeState(run.outcome)
            status = NativeStatus(state=state, details=run.details, message=run.message)
            results = scene.upstream.results(job, run.native_id, status)
        try:
            longest_input = await self._write(run, scene, job, results)
        except JobRefused as error:
            message = f"Its results are not to be had: {error}"
            return await self._settle(run, _REFUSED, message)
        except (UpstreamDown, JobNotTaken, SliceBusy) as error:
            if scene.is_given_up(run, clock.now(), self._policy.cancel_grace_s):
                return await self._give_up(run)
            return await self._again(run, scene, error)
        await self._clean_up(scene, job, run.details, run)
        if run.native_id is not None and run.outcome in set(NativeState):
            # Kept with the end of the run, which happens once however often it is collected.
            pieces = await self._get_slices(run)
            spent = count_up(run, pieces, scene.batch, longest_input=longest_input)
            run = replace(run, spent=spent)
        return await self._end(run)

    async def _clean_up(
        self, scene: _Scene, job: NativeJob, details: Details, run: NativeRun
    ) -> None:
        try:
            async with asyncio.timeout(_CLEAN_UP_S):
                await scene.upstream.clean_up(job, details)
        except (PenstockError, TimeoutError) as error:
            _log.warning(
                "What a batch has left at its provider could not be deleted.",
                batch_id=run.batch_id,
                upstream=run.upstream,
                error=str(error),
            )

    async def _write(
        self,
        run: NativeRun,
        scene: _Scene,
        job: NativeJob,
        results: AsyncGenerator[NativeResult],
    ) -> int | None:
        is_over = scene.is_over(clock.now())
        falls_back = (scene.use.falls_back or run.outcome == _BY_LINE) and not is_over
        verdict = Verdict(
            leaves_lacking=is_over or falls_back,
            sends_again=falls_back,
            default=_what_became(run),
        )
        return await self._collector.collect(
            run,
            scene.batch,
            results=results,
            verdict=verdict,
            upstream=scene.upstream,
            job=job,
        )

    async def _settle(self, run: NativeRun, outcome: str, message: str = "") -> NativeRun:
        """Go on to collecting what a job without results leaves."""
        log = _log.bind(batch_id=run.batch_id, upstream=run.upstream)
        if outcome == _BY_LINE:
            log.info("Lines are sent one by one that could not be a batch of the provider.")
        if message:
            log.warning("A provider has refused a batch.", error=message)
        return await self._keep(
            run,
            status=NativeRunStatus.COLLECTING,
            outcome=outcome,
            message=message,
            attempts=0,
            due_at=clock.now(),
        )

    async def _give_up(self, run: NativeRun) -> NativeRun:
        _log.error(
            "A provider has not ended a batch in time; what it still does is lost.",
            batch_id=run.batch_id,
            upstream=run.upstream,
            native_id=run.native_id,
        )
        return await self._end(run)

    async def _end(self, run: NativeRun) -> NativeRun:
        kept = await self._keep(run, status=NativeRunStatus.ENDED, due_at=None)
        self._feed()
        return kept

    # Trouble

    async def _again(
        self,
        run: NativeRun,
        scene: _Scene,
        error: Exception,
        told: str = "A provider cannot be asked for now; trying again.",
    ) -> NativeRun:
        """Try the same later, for as long as somebody waits for it."""
        now = clock.now()
        if run.cancel_wanted_at is None and scene.is_to_stop(run, now):
            run = replace(run, cancel_wanted_at=now)
        if scene.is_given_up(run, now, self._policy.cancel_grace_s):
            return await self._give_up(run)
        _log.warning(
            told,
            batch_id=run.batch_id,
            upstream=run.upstream,
            error=str(error),
        )
        wait_s = self._wait_s(run, error)
        return await self._keep(run, attempts=run.attempts + 1, due_at=now + wait_s)

    async def _without_upstream(self, run: NativeRun, batch: Batch) -> None:
        """Wait for an upstream to come back that is not in the settings any more."""
        now = clock.now()
        if batch.status is BatchStatus.CANCELLING or now >= batch.expires_at:
            await self._give_up(run)
            return
        _log.error(_GONE, upstream=run.upstream, batch_id=run.batch_id)
        wait_s = self._policy.wait_s(
            attempt=run.attempts + 1, jitter=random.random(), asked_s=None
        )
        await self._keep(run, attempts=run.attempts + 1, due_at=now + wait_s)

    def _wait_s(self, run: NativeRun, error: Exception) -> float:
        asked_s = None
        if isinstance(error, (UpstreamDown, JobNotTaken)):
            asked_s = error.retry_after_s
        return self._policy.wait_s(
            attempt=run.attempts + 1, jitter=random.random(), asked_s=asked_s
        )

    async def _keep(self, run: NativeRun, **changes: object) -> NativeRun:
        """Keep a run as changed.

        Raises:
            _Lost: Somebody else has written it since.
        """
        changed = replace(run, **changes)  # pyright: ignore[reportArgumentType]
        kept = await self._until_stored(
            lambda: self._store.keep_native_run(changed, now=clock.now())
        )
        if kept is None:
            raise _Lost
        return kept

    async def _until_stored(self, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """Try again every second while the database takes nothing."""
        while True:
            try:
                return await attempt()
            except (StorageUnavailable, OSError) as error:
                _log.error("A batch cannot go on for now; trying again.", error=str(error))
                await asyncio.sleep(_AGAIN_S)


def _what_became(run: NativeRun) -> tuple[str, str]:
    """Code and message for lines of which the provider says nothing."""
    match run.outcome:
        case NativeState.EXPIRED:
            return LACKS[Lack.EXPIRED]
        case NativeState.CANCELLED:
            return LACKS[Lack.CANCELLED]
        case NativeState.ENDED:
            return LACKS[Lack.LOST]
        case _:
            reason = run.message or "It did not say why."
            return "upstream_batch_failed", f"The batch at the provider failed: {reason}"


async def _none() -> AsyncGenerator[NativeResult]:
    """No results."""
    for result in ():
        yield result
