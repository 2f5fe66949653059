"""The engine of a cluster: PgQueuer on PostgreSQL.

Any process that runs the engine takes a job, one of them at a time. A process that does a job
says every few seconds that it is alive; if it does not for `heartbeat_timeout_s`, another takes
the job over. Kinds in `local` are not handed over: each process hands them out to itself, in
memory, as on one machine; only their cancels go round.

While the server is away, what is being done goes on, jobs of `local` kinds are handed out, and
all else waits until it is back. A job may then be done twice, and one that is lost in any way
is found by upkeep, because the store is the truth.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import timedelta

import msgspec
import structlog
from pgqueuer.core.qm import QueueManager
from pgqueuer.domain.models import Context
from pgqueuer.domain.models import Job as QueuedJob
from pgqueuer.domain.types import JobId

from penstock.engine.base import Handler
from penstock.engine.memory import MemoryEngine, soonest
from penstock.engine.postgres_link import FAILURES, Connection, Link, Pool, connect, open_pool
from penstock.engine.postgres_queue import (
    CANCEL_CHANNEL,
    CANCELLED,
    CHANNEL,
    SCHEMA,
    CancelNotice,
    JobQueue,
    install,
    is_installed,
    put_jobs,
    take_back,
    take_back_local,
)
from penstock.errors import InvalidSettings, StorageUnavailable
from penstock.model import Job, JobKind

_log = structlog.get_logger()

_LOCAL = frozenset({JobKind.SLICE})
_HAND_OUT = 16
_LOOK_AGAIN_S = 5.0
"""How long a job that nobody told of may lie."""
_NO_QUEUE = (
    f"The database has no job queue of this version in its schema {SCHEMA}; make it with "
    "`penstock migrate`."
)
_CONNECTIONS = 2
_REMEMBER = 1000
_CLOSE_S = 2.0


class PostgresEngine:
    """Hands out jobs to all processes that run it on the same database.

    The schema is made by `postgres_queue.install`.

    Args:
        dsn: Where the database is: `postgresql://user@host/name`. A pooler in between must
            pool sessions, not transactions, for the engine listens.
        local: What each process hands out to itself alone.
        heartbeat_timeout_s: After how long a process that gives no sign of life loses what it
            does.
    """

    def __init__(
        self,
        dsn: str,
        *,
        local: frozenset[JobKind] = _LOCAL,
        heartbeat_timeout_s: float = 20.0,
    ) -> None:
        self._dsn = f"postgresql://{dsn.partition('://')[2]}"
        self._local_kinds = local
        self._local = MemoryEngine()
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._link = Link(self._dsn)
        self._queue = JobQueue(self._link, on_cancel=self._tell, on_loss=self._lose)
        self._manager = QueueManager(self._queue, CHANNEL)
        self._manager.queue_manager_id = self._queue.owner
        self._doing: dict[int, asyncio.Event] = {}
        """The events of the jobs that are being done here, by row."""
        self._cancelled: deque[int] = deque(maxlen=_REMEMBER)
        """Rows that were cancelled and are not done here, or not yet."""
        self._pool: Pool | None = None
        self._opening = asyncio.Lock()
        self._telling: set[asyncio.Future[None]] = set()
        self._is_stopping = False
        self._ended = asyncio.Event()
        self._ended.set()

    def handle(self, kind: JobKind, handler: Handler) -> None:
        if kind in self._local_kinds:
            self._local.handle(kind, handler)
            return

        async def do(queued: QueuedJob, context: Context) -> None:
            await self._do(kind, handler, queued, context)

        self._manager.entrypoint(kind.value, accepts_context=True)(do)

    async def enqueue(self, jobs: Sequence[Job], *, connection: object | None = None) -> None:
        """As the contract says.

        Args:
            connection: An asyncpg connection with an open transaction, READ COMMITTED. Jobs of
                `local` kinds are taken at once all the same.

        Raises:
            StorageUnavailable: There is no `connection`, and the database does not answer.
            ValueError: No transaction is open on `connection`.
        """
        local, shared = self._split(jobs)
        await self._local.enqueue(local)
        if not shared:
            return
        shared = soonest(shared)
        if connection is None:
            await self._with_connection(lambda own: put_jobs(own, shared))
        else:
            await put_jobs(_in_transaction(connection), shared)

    async def cancel(self, jobs: Sequence[Job]) -> None:
        """As the contract says, in all processes.

        Raises:
            StorageUnavailable: The database does not answer; in this process, jobs of `local`
                kinds were cancelled.
        """
        local, shared = self._split(jobs)
        await self._local.cancel(local)
        by = str(self._queue.owner)
        if shared:
            await self._with_connection(lambda own: take_back(own, shared, by=by))
        if local:
            await self._with_connection(lambda own: take_back_local(own, local, by=by))

    async def run(self) -> None:
        """Hand out jobs until `stop` is called, also while the database comes and goes.

        Raises:
            InvalidSettings: The queue's tables are not there, or not of this version.
        """
        self._ended.clear()
        linking = asyncio.create_task(self._link.run())
        handing = [asyncio.create_task(self._share()), asyncio.create_task(self._local.run())]
        try:
            await asyncio.gather(*handing)
        finally:
            for task in handing:
                task.cancel()
            await asyncio.gather(*handing, return_exceptions=True)
            linking.cancel()
            await asyncio.gather(linking, return_exceptions=True)
            self._ended.set()

    async def stop(self) -> None:
        self._is_stopping = True
        self._manager.shutdown.set()
        self._link.give_up()
        await self._local.stop()
        await self._ended.wait()

    async def close(self) -> None:
        """Let go of the database. A second call does nothing."""
        if self._pool is not None:
            pool, self._pool = self._pool, None
            with suppress(TimeoutError):
                await asyncio.wait_for(pool.close(), _CLOSE_S)

    def _split(self, jobs: Sequence[Job]) -> tuple[list[Job], list[Job]]:
        local = [job for job in jobs if job.kind in self._local_kinds]
        return local, [job for job in jobs if job.kind not in self._local_kinds]

    async def _share(self) -> None:
        """Hand out what all processes share."""
        try:
            await self._link.add_listener(CANCEL_CHANNEL, self._hear_cancel)
            await self._check_tables()
            await self._manager.run(
                batch_size=_HAND_OUT,
                dequeue_timeout=timedelta(
                    seconds=min(_LOOK_AGAIN_S, self._heartbeat_timeout_s / 4)
                ),
                heartbeat_timeout=timedelta(seconds=self._heartbeat_timeout_s),
                log_aggregation_interval=timedelta(0),
            )
        except ConnectionError:
            if not self._is_stopping:  # nothing else lets a statement fail
                raise

    async def _check_tables(self) -> None:
        try:
            await self._manager.verify_structure()
            is_ours = await self._queue.has_our_parts()
        except RuntimeError:
            is_ours = False
        if not is_ours:
            raise InvalidSettings(_NO_QUEUE)

    async def _do(
        self, kind: JobKind, handler: Handler, queued: QueuedJob, context: Context
    ) -> None:
        if self._is_stopping:
            context.cancellation.cancel()  # it goes back to the queue
            return
        if CANCELLED in (queued.headers or {}) or queued.id in self._cancelled:
            return
        name = (queued.payload or b"").decode()
        stop = self._doing[queued.id] = asyncio.Event()
        try:
            await handler(name, stop)
        except Exception:
            _log.exception("A job failed.", kind=kind.value, id=name)
        finally:
            del self._doing[queued.id]

    def _hear_cancel(self, payload: str | bytes | bytearray) -> None:
        try:
            notice = msgspec.json.decode(payload, type=CancelNotice)
        except msgspec.DecodeError as error:  # of another version
            _log.warning("A cancel is not understood.", error=str(error))
            return
        for row in notice.rows:
            self._tell(row)
            self._cancelled.append(row)
        if notice.local and notice.by != str(self._queue.owner):
            jobs = [Job(kind=kind, id=name) for kind, name in notice.local]
            task = asyncio.ensure_future(self._local.cancel(jobs))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    def _tell(self, row: int) -> None:
        if (stop := self._doing.get(row)) is not None:
            stop.set()

    def _lose(self, row: int) -> None:
        """Another process does the job now. Should it come back, it is not taken as done."""
        self._tell(row)
        if (context := self._manager.job_context.get(JobId(row))) is not None:
            context.cancellation.cancel()

    async def _with_connection(self, work: Callable[[Connection], Awaitable[None]]) -> None:
        try:
            pool = await self._open_pool()
            async with pool.acquire() as connection:
                await work(connection)
        except FAILURES as error:
            raise StorageUnavailable(
                f"The job queue cannot be written to for now ({error or type(error).__name__})."
            ) from error

    async def _open_pool(self) -> Pool:
        async with self._opening:
            if self._pool is None:
                self._pool = await open_pool(self._dsn, max_size=_CONNECTIONS)
            return self._pool


async def check_queue(dsn: str) -> None:
    """
    Raises:
        InvalidSettings: The queue's tables are not there, or not of this version.
        StorageUnavailable: The database does not answer.
    """
    try:
        connection = await connect(dsn)
        try:
            if not await is_installed(connection):
                raise InvalidSettings(_NO_QUEUE)
        finally:
            await connection.close(timeout=_CLOSE_S)
    except FAILURES as error:
        raise StorageUnavailable(
            f"The job queue cannot be looked at ({error or type(error).__name__})."
        ) from error


async def install_queue(dsn: str) -> None:
    """Make the tables of the queue, or bring them to this version. Safe to run twice and from
    two hosts at once.

    Raises:
        StorageUnavailable: The database does not answer.
    """
    try:
        connection = await connect(dsn)
        try:
            await install(connection)
        finally:
            await connection.close(timeout=_CLOSE_S)
    except FAILURES as error:
        raise StorageUnavailable(
            f"The job queue's tables cannot be made ({error or type(error).__name__})."
        ) from error


def _in_transaction(connection: Connection) -> Connection:
    if not connection.is_in_transaction():
        raise ValueError("No transaction is open on the connection that jobs belong to.")
    return connection
