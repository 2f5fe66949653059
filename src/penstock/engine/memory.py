"""The engine of one process: PgQueuer in its in-memory form.

Nothing is kept here: the store is the truth, and whoever opens a data directory fills the
engine from it. Cancellation, due times and handing out are PgQueuer's; that a job is not
taken twice while it waits, that it may become due sooner, and that one which is being done
comes again after it, is ours.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import anyio
import structlog
from pgqueuer.adapters.inmemory import InMemoryDriver, InMemoryQueries
from pgqueuer.core.applications import PgQueuer
from pgqueuer.domain.models import Context
from pgqueuer.domain.models import Job as QueuedJob
from pgqueuer.domain.types import JobId

from penstock.engine.base import Handler
from penstock.model import Job, JobKind

_log = structlog.get_logger()

_Key = tuple[JobKind, str]
_FORGET_S = 60.0
_HAND_OUT = 64
_LOOK_AGAIN_S = 0.005
_LONG_AGO = timedelta(days=-3650)
"""When a job that is due was due: PgQueuer asks the wall clock, and that may be set back."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A job that waits to be handed out."""

    id: JobId
    due_at: float


class MemoryEngine:
    """Hands out jobs within one process."""

    def __init__(self) -> None:
        driver = InMemoryDriver()
        self._jobs = InMemoryQueries(driver=driver)
        self._queue = PgQueuer(driver, queries=self._jobs)
        # How soon it looks again when a notice was lost; in memory a look costs nothing.
        self._queue.qm.min_dequeue_poll_interval = timedelta(seconds=_LOOK_AGAIN_S)
        self._waiting: dict[_Key, _Waiting] = {}
        self._doing: dict[_Key, JobId] = {}
        self._again: dict[_Key, Job] = {}
        self._ended = asyncio.Event()
        self._ended.set()

    def handle(self, kind: JobKind, handler: Handler) -> None:
        async def do(queued: QueuedJob, context: Context) -> None:
            key = (kind, (queued.payload or b"").decode())
            await self._do(key, queued.id, handler, context)

        self._queue.entrypoint(kind.value, accepts_context=True)(do)

    async def enqueue(self, jobs: Sequence[Job], *, connection: object | None = None) -> None:
        del connection  # there is no transaction to be part of
        now = time.time()
        fresh: dict[_Key, Job] = {}
        late: list[JobId] = []
        for job in jobs:
            key = (job.kind, job.id)
            if key in self._doing:
                self._again[key] = _sooner(job, self._again.get(key))
            elif (waiting := self._waiting.get(key)) is None:
                fresh[key] = _sooner(job, fresh.get(key))
            elif waiting.due_at > max(job.due_at or 0.0, now):
                late.append(self._waiting.pop(key).id)
                fresh[key] = job
        if late:
            await self._jobs.mark_job_as_cancelled(late)
        if not fresh:
            return
        ids = await self._jobs.enqueue(
            [job.kind.value for job in fresh.values()],
            [job.id.encode() for job in fresh.values()],
            [0] * len(fresh),
            execute_after=[
                timedelta(seconds=job.due_at - now)
                if job.due_at is not None and job.due_at > now
                else _LONG_AGO
                for job in fresh.values()
            ],
        )
        for (key, job), job_id in zip(fresh.items(), ids, strict=True):
            self._waiting[key] = _Waiting(job_id, job.due_at or 0.0)

    async def cancel(self, jobs: Sequence[Job]) -> None:
        ids: list[JobId] = []
        for job in jobs:
            key = (job.kind, job.id)
            self._again.pop(key, None)
            if (waiting := self._waiting.pop(key, None)) is not None:
                ids.append(waiting.id)
            elif (doing := self._doing.get(key)) is not None:
                ids.append(doing)
        if ids:
            await self._jobs.mark_job_as_cancelled(ids)

    async def run(self) -> None:
        self._ended.clear()
        forgetting = asyncio.create_task(self._forget())
        try:
            await self._queue.run(batch_size=_HAND_OUT, log_aggregation_interval=timedelta(0))
        finally:
            forgetting.cancel()
            self._ended.set()

    async def stop(self) -> None:
        self._queue.shutdown.set()
        await self._ended.wait()

    async def _do(self, key: _Key, job_id: JobId, handler: Handler, context: Context) -> None:
        waiting = self._waiting.get(key)
        if waiting is None or waiting.id != job_id:
            return  # cancelled or moved up between being handed out and being begun
        del self._waiting[key]
        self._doing[key] = job_id
        stop = asyncio.Event()
        watching = asyncio.create_task(_watch(context.cancellation, stop))
        try:
            await handler(key[1], stop)
        except Exception:
            _log.exception("A job failed.", kind=key[0].value, id=key[1])
        finally:
            watching.cancel()
            del self._doing[key]
            if (again := self._again.pop(key, None)) is not None:
                await self.enqueue([again])

    async def _forget(self) -> None:
        """Keep PgQueuer's in-memory log of finished jobs from growing for ever."""
        while True:
            await asyncio.sleep(_FORGET_S)
            await self._jobs.clear_queue_log()


def soonest(jobs: Sequence[Job]) -> list[Job]:
    """Of jobs of the same kind and ID, the one due first."""
    found: dict[_Key, Job] = {}
    for job in jobs:
        found[job.kind, job.id] = _sooner(job, found.get((job.kind, job.id)))
    return list(found.values())


def _sooner(job: Job, other: Job | None) -> Job:
    return other if other is not None and (other.due_at or 0) <= (job.due_at or 0) else job


async def _watch(scope: anyio.CancelScope, stop: asyncio.Event) -> None:
    with scope:
        await anyio.sleep_forever()
    stop.set()
