"""The queue in PostgreSQL: PgQueuer's tables, and what we put beside its statements.

There is one row for each job (kind and ID), by `dedupe_key`. What must hold when several
processes meet at a job holds because they meet at its row:

- A job that comes while its row waits makes it due sooner. One that comes while it is being
  done is noted in the row (`again_at`), and when the row is deleted, a trigger puts a new one
  in its place. So nobody has to look whether there is something to do again.
- Who ends a job or keeps it alive names itself. A process that was thought dead and wakes up
  changes nothing of a job that another has taken over.
- A cancel is noted in the row, for whoever does not hear of it.

PgQueuer's log is kept empty by a trigger: a job that has ended leaves nothing behind.
"""

import asyncio
import hashlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import msgspec
from pgqueuer.adapters.drivers.asyncpg import AsyncpgDriver
from pgqueuer.adapters.persistence.qb import (
    QueryBuilderEnvironment,
    QueryQueueBuilder,
    QuerySchedulerBuilder,
)
from pgqueuer.adapters.persistence.queries import Queries
from pgqueuer.domain.models import Job as QueuedJob
from pgqueuer.domain.models import TracebackRecord
from pgqueuer.domain.settings import DBSettings, Durability
from pgqueuer.domain.types import (
    JOB_STATUS,
    Channel,
    JobId,
    QueueEntrypoint,
    QueueManagerId,
)
from pgqueuer.ports.driver import Driver
from pgqueuer.ports.repository import EntrypointExecutionParameter

from penstock.engine.postgres_link import Connection, Link
from penstock.model import Job, JobKind

T = TypeVar("T")

SCHEMA = "penstock_jobs"
"""PostgreSQL's schema, in which all tables of the queue are."""
CHANNEL = Channel(SCHEMA)
CANCEL_CHANNEL = f"{SCHEMA}_cancel"
CANCELLED = "cancelled"
"""In the headers of a job that is being done: it was cancelled since."""
_LOCK = 0x70656E_6A6F6273
_TRIES = 20
_TRY_AGAIN_S = 0.1
_JOBS_PER_NOTICE = 50
"""A notice holds at most 8,000 bytes."""

# Not read from the environment, as PgQueuer would: all processes must agree.
_NAMES = DBSettings.model_construct(
    prefix="",
    db_schema=SCHEMA,
    channel=CHANNEL,
    function="fn_pgqueuer_changed",
    statistics_table="pgqueuer_statistics",
    queue_status_type="pgqueuer_status",
    queue_table="pgqueuer",
    queue_table_log="pgqueuer_log",
    trigger="tg_pgqueuer_changed",
    schedules_table="pgqueuer_schedules",
    durability=Durability.durable,
    widen_id=True,
)
_QUEUE = f"{SCHEMA}.pgqueuer"
_STATUS = f"{SCHEMA}.pgqueuer_status"
_IS_ALIVE = f"status IN ('queued'::{_STATUS}, 'picked'::{_STATUS}) AND dedupe_key IS NOT NULL"

_INSTALL = f"""
ALTER TABLE {_QUEUE} ADD COLUMN IF NOT EXISTS again_at timestamptz;

CREATE OR REPLACE FUNCTION {SCHEMA}.put_again() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO {_QUEUE} (priority, entrypoint, payload, dedupe_key, execute_after, status)
    VALUES (
        OLD.priority, OLD.entrypoint, OLD.payload, OLD.dedupe_key, OLD.again_at, 'queued'
    );
    RETURN NULL;
END $$;

CREATE OR REPLACE TRIGGER put_again AFTER DELETE ON {_QUEUE}
FOR EACH ROW WHEN (OLD.again_at IS NOT NULL) EXECUTE FUNCTION {SCHEMA}.put_again();

CREATE OR REPLACE FUNCTION {SCHEMA}.give_back(ids bigint[], owner uuid) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    free bigint[] := ARRAY(
        SELECT id FROM {_QUEUE} WHERE id = ANY(ids) AND queue_manager_id = owner
        FOR UPDATE SKIP LOCKED
    );
BEGIN
    UPDATE {_QUEUE} SET again_at = least(again_at, now())
    WHERE id = ANY(free) AND NOT coalesce(headers ? '{CANCELLED}', false);
    DELETE FROM {_QUEUE} WHERE id = ANY(free);
END $$;

CREATE OR REPLACE FUNCTION {SCHEMA}.log_nothing() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RETURN NULL;
END $$;

CREATE OR REPLACE TRIGGER log_nothing BEFORE INSERT ON {SCHEMA}.pgqueuer_log
FOR EACH ROW EXECUTE FUNCTION {SCHEMA}.log_nothing();
"""

_VERSION = hashlib.sha256(_INSTALL.encode()).hexdigest()
_FIND_VERSION = f"SELECT obj_description(to_regnamespace('{SCHEMA}'), 'pg_namespace')"
_NOTE_VERSION = f"COMMENT ON SCHEMA {SCHEMA} IS '{_VERSION}'"

# In the order of their keys: two that enqueue the same jobs wait for each other, and never
# each for the other.
_PUT = f"""
INSERT INTO {_QUEUE} AS job (priority, entrypoint, payload, dedupe_key, execute_after, status)
SELECT 0, kind, convert_to(id, 'UTF8'), kind || ':' || id,
    coalesce(to_timestamp(due_at), now()), 'queued'
FROM unnest($1::text[], $2::text[], $3::float8[]) AS new (kind, id, due_at)
ORDER BY kind || ':' || id
ON CONFLICT (dedupe_key) WHERE {_IS_ALIVE}
"""
# Where nothing changes, nothing is written.
_ENQUEUE = f"""{_PUT} DO UPDATE SET
    execute_after = CASE job.status
        WHEN 'queued' THEN excluded.execute_after ELSE job.execute_after END,
    again_at = CASE job.status WHEN 'picked' THEN excluded.execute_after END
WHERE CASE job.status
    WHEN 'queued' THEN excluded.execute_after < job.execute_after
    ELSE job.again_at IS NULL OR excluded.execute_after < job.again_at END
"""
# A row that is put in, or found waiting, is held until it is deleted below. So a job cannot
# slip through between one state and the next.
_CANCEL = f"""{_PUT} DO UPDATE SET again_at = NULL, headers = '{{"{CANCELLED}": true}}'
RETURNING id, status::text
"""
_DELETE = f"DELETE FROM {_QUEUE} WHERE id = ANY($1::bigint[])"
# The statements below run on the one connection by which a process lives, so they wait for
# nobody: a row that another transaction holds is passed over.
_MINE = "id = ANY($1::bigint[]) AND queue_manager_id = $2"
_FREE = f"free AS (SELECT id FROM {_QUEUE} WHERE {_MINE} FOR UPDATE SKIP LOCKED)"
_END = f"""
WITH {_FREE}, gone AS (DELETE FROM {_QUEUE} WHERE id IN (SELECT id FROM free))
SELECT id FROM {_QUEUE} WHERE {_MINE} AND id NOT IN (SELECT id FROM free)
"""
_GIVE_BACK = f"SELECT {SCHEMA}.give_back($1, $2)"
_KEEP_ALIVE = f"""
WITH {_FREE},
alive AS (UPDATE {_QUEUE} SET heartbeat = now() WHERE id IN (SELECT id FROM free))
SELECT id, coalesce(headers ? '{CANCELLED}', false) AS is_cancelled
FROM {_QUEUE} WHERE {_MINE}
"""


class CancelNotice(msgspec.Struct, frozen=True):
    """What all processes are told of a cancel."""

    by: str
    """Who cancelled."""
    rows: list[int] = []
    """Jobs of the queue that are being done, by row."""
    local: list[tuple[JobKind, str]] = []
    """Jobs that each process hands out to itself."""


async def install(connection: Connection) -> None:
    """Make the tables of the queue, or bring them to this version.

    Safe to run twice and from two hosts at once, and beside processes that are at work: it is
    one transaction, or a part of the one that is open on `connection`, and if all is there it
    locks no table.
    """
    queries = make_queries(AsyncpgDriver(connection))
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
        if await queries.schema_is_installed():
            await queries.upgrade()
        else:
            await queries.install()
            await queries.optimize_autovacuum()
        if await connection.fetchval(_FIND_VERSION) != _VERSION:
            await connection.execute(_INSTALL)
            await connection.execute(_NOTE_VERSION)


async def is_installed(connection: Connection) -> bool:
    """Whether the tables of the queue are there, as this version needs them."""
    queries = make_queries(AsyncpgDriver(connection))
    if not await queries.schema_is_installed():
        return False
    return await queries.table_has_column(_NAMES.queue_table, "again_at")


async def put_jobs(connection: Connection, jobs: Sequence[Job]) -> None:
    """Enqueue jobs, no two of which are of the same kind and ID."""
    await connection.execute(
        _ENQUEUE,
        [job.kind.value for job in jobs],
        [job.id for job in jobs],
        [job.due_at for job in jobs],
    )


async def take_back(connection: Connection, jobs: Sequence[Job], *, by: str) -> None:
    """Delete jobs that wait, and tell who does one of the others. One transaction."""
    keys = sorted({(job.kind.value, job.id) for job in jobs})
    async with connection.transaction():
        rows = await connection.fetch(
            _CANCEL, [kind for kind, _ in keys], [name for _, name in keys], [None] * len(keys)
        )
        await connection.execute(_DELETE, [id_ for id_, status in rows if status == "queued"])
        for some in _chunks([id_ for id_, status in rows if status == "picked"]):
            await notify(connection, CancelNotice(by=by, rows=list(some)))


async def take_back_local(connection: Connection, jobs: Sequence[Job], *, by: str) -> None:
    """Tell all processes of cancelled jobs that they hand out to themselves."""
    for some in _chunks([(job.kind, job.id) for job in jobs]):
        await notify(connection, CancelNotice(by=by, local=list(some)))


async def notify(connection: Connection, notice: CancelNotice) -> None:
    text = msgspec.json.encode(notice).decode()
    await connection.execute("SELECT pg_notify($1, $2)", CANCEL_CHANNEL, text)


def _chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), _JOBS_PER_NOTICE):
        yield items[start : start + _JOBS_PER_NOTICE]


def make_queries(driver: Driver) -> Queries:
    return Queries(
        driver,
        QueryBuilderEnvironment(_NAMES),
        QueryQueueBuilder(_NAMES),
        QuerySchedulerBuilder(_NAMES),
    )


class JobQueue(Queries):
    """The queue as PgQueuer's manager works with it, in the name of one process.

    Args:
        on_cancel: Called with the row of a job that was cancelled while it is done here.
        on_loss: Called with the row of a job that was taken over by another process.
    """

    def __init__(
        self,
        link: Link,
        *,
        on_cancel: Callable[[int], None],
        on_loss: Callable[[int], None],
    ) -> None:
        super().__init__(
            link,
            QueryBuilderEnvironment(_NAMES),
            QueryQueueBuilder(_NAMES),
            QuerySchedulerBuilder(_NAMES),
        )
        self.owner = QueueManagerId(uuid.uuid4())
        self._link = link
        self._on_cancel = on_cancel
        self._on_loss = on_loss

    async def dequeue(
        self,
        batch_size: int,
        entrypoints: dict[QueueEntrypoint, EntrypointExecutionParameter],
        queue_manager_id: QueueManagerId,
        global_concurrency_limit: int | None,
        heartbeat_timeout: timedelta,
    ) -> list[QueuedJob]:
        self._link.note_look()
        return await super().dequeue(
            batch_size,
            entrypoints,
            queue_manager_id,
            global_concurrency_limit,
            heartbeat_timeout,
        )

    async def has_our_parts(self) -> bool:
        return await self.table_has_column(_NAMES.queue_table, "again_at")

    async def log_jobs(
        self, job_status: list[tuple[QueuedJob, JOB_STATUS, TracebackRecord | None]]
    ) -> None:
        """End jobs; `canceled` ones were not done here and go back to the queue."""
        back = [job.id for job, status, _ in job_status if status == "canceled"]
        if back:
            await self.driver.execute(_GIVE_BACK, back, self.owner)
        ended: list[object] = [job.id for job, status, _ in job_status if status != "canceled"]
        for _ in range(_TRIES):
            held = await self.driver.fetch(_END, ended, self.owner)
            if not held:
                return
            ended = [row["id"] for row in held]
            await asyncio.sleep(_TRY_AGAIN_S)
        # Left to go stale, and to be done once more.

    async def update_heartbeat(self, job_ids: list[JobId]) -> None:
        rows = await self.driver.fetch(_KEEP_ALIVE, list(set(job_ids)), self.owner)
        kept = {row["id"]: row["is_cancelled"] for row in rows}
        for job_id in job_ids:
            if job_id not in kept:
                self._on_loss(job_id)
            elif kept[job_id]:
                self._on_cancel(job_id)
