"""The SQL store on PostgreSQL: the contract, and what is PostgreSQL's own."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import asyncpg
import pytest
from sqlalchemy import Engine, event

from penstock.errors import InvalidSettings, StorageUnavailable
from penstock.model import BatchId, BatchStatus, Job, Usage
from penstock.store.sql import SqlStore
from penstock.testing.store import (
    NOON,
    RecordedJobs,
    StoreContract,
    claim,
    end_all,
    ended,
    ids_of,
    move,
    report,
    so_far,
    start,
)
from penstock.testing.store_budgets import BudgetContract
from penstock.testing.store_creations import CreationContract
from penstock.testing.store_files import FileContract
from penstock.testing.store_natives import NativeRunContract
from penstock.testing.store_segments import SegmentContract
from penstock.testing.store_slices import SliceContract
from penstock.testing.store_uploads import UploadContract
from penstock.testing.store_webhooks import WebhookContract


@pytest.fixture
def jobs() -> RecordedJobs:
    return RecordedJobs()


@pytest.fixture
async def store(migrated_url: str, jobs: RecordedJobs) -> AsyncIterator[SqlStore]:
    store = SqlStore(migrated_url, jobs=jobs)
    await store.open()
    yield store
    await store.close()


class TestSqlStore(
    StoreContract,
    FileContract,
    SliceContract,
    BudgetContract,
    SegmentContract,
    NativeRunContract,
    CreationContract,
    UploadContract,
    WebhookContract,
):
    @pytest.fixture
    async def store(self, migrated_url: str, jobs: RecordedJobs) -> AsyncIterator[SqlStore]:
        store = SqlStore(migrated_url, jobs=jobs)
        await store.open()
        yield store
        await store.close()


# Jobs within the transaction


class TableJobs:
    """A sink that writes into the same database, by the connection that it is given."""

    def __init__(self) -> None:
        self.fails = False

    async def enqueue(self, jobs: Sequence[Job], *, connection: object | None = None) -> None:
        assert isinstance(connection, asyncpg.Connection)
        rows = [(job.kind, job.id) for job in jobs]
        await connection.executemany("INSERT INTO queue VALUES ($1, $2)", rows)
        if self.fails:
            raise RuntimeError("the engine fails")


@pytest.fixture
async def queue(migrated_url: str) -> AsyncIterator[asyncpg.Connection]:
    """What has been committed, as another process sees it."""
    connection = await asyncpg.connect(migrated_url)
    await connection.execute("CREATE TABLE queue (kind text, id text)")
    yield connection
    await connection.close()


@pytest.fixture
def table_jobs(queue: asyncpg.Connection) -> TableJobs:
    return TableJobs()


@pytest.fixture
async def enqueuing(migrated_url: str, table_jobs: TableJobs) -> AsyncIterator[SqlStore]:
    store = SqlStore(migrated_url, jobs=table_jobs)
    await store.open()
    yield store
    await store.close()


async def kinds_in(queue: asyncpg.Connection) -> list[str]:
    return [row["kind"] for row in await queue.fetch("SELECT kind FROM queue ORDER BY ctid")]


async def test_jobs_are_committed_with_the_change_that_brings_them_forth(
    enqueuing: SqlStore, queue: asyncpg.Connection
) -> None:
    await start(enqueuing, 1)
    assert await kinds_in(queue) == ["validate", "expire"]

    await end_all(enqueuing, 1)
    assert await kinds_in(queue) == ["validate", "expire", "finalize"]


async def test_jobs_of_a_change_that_fails_are_not_enqueued(
    enqueuing: SqlStore, queue: asyncpg.Connection
) -> None:
    await start(enqueuing)
    await queue.execute(
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '53100'; END $$;"
        "CREATE CONSTRAINT TRIGGER fail AFTER UPDATE ON batches DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION fail()"
    )

    with pytest.raises(StorageUnavailable):  # at the commit, after the jobs
        await move(enqueuing, BatchStatus.CANCELLING)

    assert await kinds_in(queue) == ["validate", "expire"]


async def test_a_change_whose_jobs_cannot_be_enqueued_is_undone(
    enqueuing: SqlStore, queue: asyncpg.Connection, table_jobs: TableJobs
) -> None:
    await start(enqueuing)
    table_jobs.fails = True

    with pytest.raises(RuntimeError, match="the engine fails"):
        await move(enqueuing, BatchStatus.CANCELLING)

    batch = await enqueuing.get_batch(BatchId("batch-1"))
    assert batch.status is BatchStatus.IN_PROGRESS
    assert await kinds_in(queue) == ["validate", "expire"]


# Round trips


@contextmanager
def statements() -> Iterator[list[str]]:
    """What is sent to the database meanwhile; many rows of one statement are one."""
    seen: list[str] = []

    def watch(_: object, __: object, statement: str, *___: object) -> None:
        seen.append(statement.split(maxsplit=1)[0])

    event.listen(Engine, "before_cursor_execute", watch)
    try:
        yield seen
    finally:
        event.remove(Engine, "before_cursor_execute", watch)


async def test_a_claim_and_a_report_cost_the_same_for_one_slice_and_for_many(
    store: SqlStore,
) -> None:
    await start(store, 300)
    for ids in (ids_of(0), ids_of(*range(1, 256))):
        with statements() as seen:
            claims = await claim(store, ids)
        assert seen == ["SELECT", "SELECT", "UPDATE"]

        with statements() as seen:
            await report(store, *(so_far(each, 5) for each in claims))
        assert seen == ["SELECT", "UPDATE"]

        with statements() as seen:
            await report(store, *(ended(each) for each in claims))
        assert seen == ["SELECT", "UPDATE", "SELECT", "SELECT"]


# Plans


@pytest.mark.parametrize(
    ("call", "index"),
    [
        (lambda store: claim(store, ids_of(3, 5, 7)), "uq_slices_id"),
        (lambda store: store.list_pending(BatchId("batch-1"), limit=9), "ix_slices_status"),
        (lambda store: store.release_slices(now=NOON), "ix_slices_lease"),
        (lambda store: store.tally_slices(BatchId("batch-1")), "ix_slices_status"),
    ],
    ids=["claim", "pending", "release", "tally"],
)
async def test_what_is_asked_often_is_found_by_index(
    migrated_url: str, store: SqlStore, call: Callable[[SqlStore], Awaitable[Any]], index: str
) -> None:
    for number in range(1, 21):
        await start(store, 500, f"batch-{number}")
    raw = await asyncpg.connect(migrated_url)
    await raw.execute("ANALYZE")

    await call(store)

    await raw.execute("SELECT pg_stat_force_next_flush()")
    await store.close()  # what a connection has counted is known once it ends
    await asyncio.sleep(0.2)
    used = await raw.fetchval(
        "SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = $1", index
    )
    assert used > 0
    await raw.close()


# Which database


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg"])
async def test_a_url_may_name_postgresql_in_three_ways(migrated_url: str, scheme: str) -> None:
    store = SqlStore(f"{scheme}://{migrated_url.partition('://')[2]}?sslmode=prefer")

    await store.open()
    await store.ping()
    await store.close()


@pytest.mark.parametrize(
    "url",
    [
        "mysql://user:secret@host/db",
        "postgresql+psycopg://user:secret@host/db?password=secret",
        "not a URL: secret",
    ],
)
def test_another_database_is_refused_and_its_password_is_not_shown(url: str) -> None:
    with pytest.raises(InvalidSettings, match="postgresql://user:password@host") as caught:
        SqlStore(url)

    assert "secret" not in str(caught.value)


async def test_the_clock_is_the_databases(store: SqlStore, queue: asyncpg.Connection) -> None:
    before = await queue.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
    clock = await store.read_clock()
    after = await queue.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")

    assert before <= clock <= after


async def test_numbers_that_need_more_than_32_bits_come_back(store: SqlStore) -> None:
    project = await store.ensure_project("red", weight=2**40)
    assert project.weight == 2**40

    await start(store, 1)
    [only] = await claim(store, ids_of(0))
    usage = Usage(input_tokens=2**50, total_tokens=2**50)
    await report(store, replace(ended(only), usage=usage))

    assert (await store.get_batch(BatchId("batch-1"))).usage == usage
