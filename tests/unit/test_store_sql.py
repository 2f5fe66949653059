"""The SQL store on SQLite: the contract, and what is SQLite's own."""

import asyncio
import re
import resource
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event

from penstock.errors import InvalidSettings, StorageUnavailable
from penstock.model import BatchId, BatchStatus, NativeRunId, Project
from penstock.store import migrations
from penstock.store.base import BatchFilter, Page
from penstock.store.sql import SqlStore
from penstock.testing.store import (
    NOON,
    RecordedJobs,
    StoreContract,
    claim,
    end_all,
    finalize,
    ids_of,
    move,
    new_file,
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

VERSIONS = Path(migrations.__file__).parent / "versions"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "penstock.db"


@pytest.fixture
def jobs() -> RecordedJobs:
    return RecordedJobs()


@pytest.fixture
async def store(path: Path, jobs: RecordedJobs) -> AsyncIterator[SqlStore]:
    store = SqlStore(f"sqlite:///{path}", jobs=jobs)
    await store.open()
    yield store
    await store.close()


@pytest.fixture
async def other(path: Path, store: SqlStore) -> AsyncIterator[SqlStore]:
    """A second process, as far as the database can tell."""
    other = SqlStore(f"sqlite:///{path}")
    await other.open()
    yield other
    await other.close()


class TestSqlStore(
    StoreContract,
    FileContract,
    SliceContract,
    BudgetContract,
    CreationContract,
    UploadContract,
    WebhookContract,
    SegmentContract,
    NativeRunContract,
):
    @pytest.fixture
    async def store(self, path: Path, jobs: RecordedJobs) -> AsyncIterator[SqlStore]:
        store = SqlStore(f"sqlite:///{path}", jobs=jobs)
        await store.open()
        yield store
        await store.close()


# Two processes


async def test_two_processes_may_open_an_empty_database_at_once(path: Path) -> None:
    stores = [SqlStore(f"sqlite:///{path}") for _ in range(8)]

    await asyncio.gather(*(store.open() for store in stores))

    made = await asyncio.gather(*(store.ensure_project("red") for store in stores))
    assert len(set(made)) == 1
    for store in stores:
        await store.close()


async def test_of_two_processes_that_claim_at_once_each_slice_has_one(
    store: SqlStore, other: SqlStore
) -> None:
    await start(store, 300)

    for first in range(0, 300, 5):
        ids = ids_of(*range(first, first + 5))
        mine, theirs = await asyncio.gather(claim(store, ids), claim(other, ids))
        assert len(mine) + len(theirs) == 5


async def test_a_write_waits_for_another_process(store: SqlStore, path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as rival:
        rival.execute("BEGIN IMMEDIATE")
        rival.execute("INSERT INTO projects VALUES ('proj_1', 'red', 5, 0)")
        waiting = asyncio.create_task(store.ensure_project("red"))
        assert await store.list_keys() == []  # reads go on beside a write
        assert not waiting.done()

        rival.execute("COMMIT")

    assert await waiting == Project(id="proj_1", name="red", weight=5)


async def test_a_store_without_a_sink_drops_its_jobs(other: SqlStore) -> None:
    await start(other)


# Cancelled callers


async def test_a_move_whose_caller_is_cancelled_still_brings_its_job(
    store: SqlStore, jobs: RecordedJobs
) -> None:
    await start(store)
    jobs.take()
    moving = asyncio.create_task(move(store, BatchStatus.CANCELLING))
    await asyncio.sleep(0)

    moving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await moving

    await store.close()
    assert jobs.take() == [finalize()]


# Trouble


@contextmanager
def on_connect(statement: str) -> Iterator[None]:
    """Every connection made meanwhile begins with `statement`."""

    def prepare(connection: sqlite3.Connection, _: object) -> None:
        connection.execute(statement).close()

    event.listen(Engine, "connect", prepare)
    try:
        yield
    finally:
        event.remove(Engine, "connect", prepare)


async def test_a_full_disk_is_storage_unavailable_and_leaves_nothing(
    store: SqlStore, path: Path
) -> None:
    batch = await start(store)
    await store.close()
    full = SqlStore(f"sqlite:///{path}")
    with on_connect("PRAGMA max_page_count = 1"):
        await full.open()
        added = 0
        with pytest.raises(StorageUnavailable, match="full"):
            while True:
                file = new_file(await full.ensure_project("red"), f"file-{added}")
                await full.add_file(file)
                added += 1

        page = Page(limit=1000)
        project = batch.project_id
        files = await full.list_files(project, page, purpose=None, newest_first=True)
        assert len(files) == added + 1  # with the input file of the batch
        assert len(await claim(full, ids_of(0))) == 1
        await full.close()


async def test_a_disk_that_may_only_be_read_is_storage_unavailable(
    store: SqlStore, path: Path
) -> None:
    read_only = SqlStore(f"sqlite:///file:{path}?mode=ro&uri=true")
    await read_only.open()

    with pytest.raises(StorageUnavailable, match="cannot be written to"):
        await read_only.ping()

    assert await read_only.list_keys() == []
    await read_only.close()


async def test_a_disk_that_fails_is_storage_unavailable(store: SqlStore) -> None:
    project = await store.ensure_project("red")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, before[1]))
    try:
        with pytest.raises(StorageUnavailable, match="disk"):
            for number in range(1000):
                await store.add_file(new_file(project, f"file-{number}"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    await store.ping()


async def test_a_folder_that_is_not_there_is_storage_unavailable(tmp_path: Path) -> None:
    store = SqlStore(f"sqlite:///{tmp_path}/nowhere/penstock.db")

    with pytest.raises(StorageUnavailable, match="cannot be opened"):
        await store.open()


async def test_a_lock_that_is_not_let_go_is_storage_unavailable(
    store: SqlStore, path: Path
) -> None:
    await store.close()
    hasty = SqlStore(f"sqlite:///{path}")
    with on_connect("PRAGMA busy_timeout = 0"):
        await hasty.open()
    with closing(sqlite3.connect(path, isolation_level=None)) as rival:
        rival.execute("BEGIN IMMEDIATE")

        with pytest.raises(StorageUnavailable, match="locked"):
            await hasty.ping()

    await hasty.ping()
    await hasty.close()


async def test_a_closed_store_is_storage_unavailable(store: SqlStore) -> None:
    await store.close()

    with pytest.raises(StorageUnavailable):
        await store.ping()
    with pytest.raises(StorageUnavailable):
        await store.list_keys()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://host/db"])
def test_a_database_that_is_no_file_is_refused(url: str) -> None:
    with pytest.raises(InvalidSettings, match="sqlite:////folder"):
        SqlStore(url)


# What the tables refuse


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE slices SET status = 'running'",
        "UPDATE slices SET worker_id = 'worker-1', lease_expires_at = 1",
        "UPDATE slices SET status = 'lost'",
        "UPDATE slices SET completed = 6, failed = 5",
        "UPDATE slices SET attempt = -1",
        'UPDATE slices SET "end" = start',
        "UPDATE slices SET requests = NULL",
        "UPDATE batches SET status = 'completed'",
        "UPDATE batches SET cancelled_at = 1",
        "UPDATE batches SET status = 'paused'",
        "UPDATE batches SET completed = 1",
        "UPDATE batches SET project_id = 'proj_9'",
        "UPDATE files SET bytes = -1",
        "UPDATE projects SET weight = 0",
        "DELETE FROM batches",
        "INSERT INTO projects VALUES ('proj_9', 'red', 1, 0)",
    ],
)
async def test_the_tables_refuse_nonsense(store: SqlStore, path: Path, statement: str) -> None:
    await start(store)

    with closing(sqlite3.connect(path)) as raw:
        raw.execute("PRAGMA foreign_keys = ON")
        with pytest.raises(sqlite3.IntegrityError):
            raw.execute(statement)


async def test_the_store_itself_holds_to_foreign_keys(store: SqlStore) -> None:
    with pytest.raises(Exception, match="FOREIGN KEY"):
        await store.add_file(new_file(Project(id="proj_9", name="red")))


# What survives


async def test_only_reports_may_be_lost_with_the_power(store: SqlStore) -> None:
    with statements() as seen:
        await start(store)
        await claim(store, ids_of(0))
    assert not any("synchronous = NORMAL" in statement for statement, _ in seen)

    with statements() as seen:
        await end_all(store)
        await move(store, BatchStatus.FINALIZING)
    modes = [statement for statement, _ in seen if "synchronous" in statement]
    assert modes == ["PRAGMA synchronous = NORMAL", "PRAGMA synchronous = FULL"]


async def test_a_store_opens_again_with_all_it_had(store: SqlStore, path: Path) -> None:
    await start(store)
    await end_all(store)
    batch = await store.get_batch(BatchId("batch-1"))
    await store.close()

    again = SqlStore(f"sqlite:///{path}")
    await again.open()

    assert await again.get_batch(BatchId("batch-1")) == batch
    await again.close()


# Plans


@contextmanager
def statements() -> Iterator[list[tuple[str, tuple[object, ...]]]]:
    """What is sent to the database meanwhile, with its values, or the first of many."""
    seen: list[tuple[str, tuple[object, ...]]] = []

    def watch(_: object, __: object, statement: str, values: Any, *___: object) -> None:
        seen.append((statement, values[0] if isinstance(values, list) else values))

    event.listen(Engine, "before_cursor_execute", watch)
    try:
        yield seen
    finally:
        event.remove(Engine, "before_cursor_execute", watch)


def plan_of(path: Path, seen: list[tuple[str, tuple[object, ...]]], pattern: str) -> str:
    """How the database carries out the statement that matches."""
    [(statement, values)] = [one for one in seen if re.search(pattern, one[0], re.DOTALL)]
    with closing(sqlite3.connect(path)) as raw:
        rows = raw.execute(f"EXPLAIN QUERY PLAN {statement}", values).fetchall()
    return "\n".join(row[-1] for row in rows)


async def test_a_claim_finds_its_slices_by_key(store: SqlStore, path: Path) -> None:
    await start(store, 500)
    with statements() as seen:
        await claim(store, ids_of(3, 5, 7))

    for pattern in ("^SELECT slices", "^UPDATE slices"):
        plan = plan_of(path, seen, pattern)
        assert "SEARCH slices USING INDEX sqlite_autoindex_slices_2 (id=?)" in plan
        assert "SCAN slices" not in plan
        assert "SCAN batches" not in plan


async def test_a_report_touches_its_slices_and_no_others(store: SqlStore, path: Path) -> None:
    await start(store, 500)
    with statements() as seen:
        await end_all(store, 3)

    for pattern in ("^SELECT slices(?!.*JOIN)", "^UPDATE slices(?!.*attempt [+])"):
        plan = plan_of(path, seen, pattern)
        assert "SEARCH slices USING INDEX sqlite_autoindex_slices_2 (id=?)" in plan
    left = plan_of(path, seen, "^SELECT batches.id, batches.status")
    assert left.count("USING INDEX ix_slices_status (batch_id=? AND status=?)") == 2


@pytest.mark.parametrize(
    ("call", "index"),
    [
        (
            lambda store, _: store.list_backlog(now=NOON),
            [
                "SEARCH batches USING INDEX ix_batches_status (status=?)",
                "SEARCH slices USING INDEX ix_slices_status (batch_id=? AND status=?)",
            ],
        ),
        (
            lambda store, _: store.list_pending(BatchId("batch-1"), limit=9),
            ["SEARCH slices USING INDEX ix_slices_status (batch_id=? AND status=?)"],
        ),
        (
            lambda store, _: store.tally_slices(BatchId("batch-1")),
            ["SEARCH slices USING INDEX ix_slices_status (batch_id=?)"],
        ),
        (
            lambda store, _: store.get_batch(BatchId("batch-1")),
            [
                "SEARCH batches USING INDEX sqlite_autoindex_batches_1 (id=?)",
                "SEARCH slices USING INDEX sqlite_autoindex_slices_1 (batch_id=?)",
            ],
        ),
        (
            lambda store, project: store.list_batches(
                project, Page(limit=9, after="batch-1"), where=BatchFilter()
            ),
            [
                "SEARCH batches USING COVERING INDEX ix_batches_project "
                "(project_id=? AND seq<?)",
                "SEARCH slices USING INDEX sqlite_autoindex_slices_1 (batch_id=?)",
            ],
        ),
        (
            lambda store, project: store.list_files(
                project, Page(limit=9, after="file-1"), purpose=None, newest_first=True
            ),
            ["SEARCH files USING INDEX ix_files_project (project_id=? AND seq<?)"],
        ),
        (
            lambda store, _: store.unused_blobs(["blobs/1", "blobs/2"]),
            [
                "SEARCH files USING COVERING INDEX ix_files_blob (blob_key=?)",
                "SEARCH batches USING INDEX ix_batches_input_blob (input_blob_key=?)",
            ],
        ),
        (
            lambda store, _: store.get_native_slices(NativeRunId("nat-1")),
            ["SEARCH slices USING INDEX ix_slices_native (native_run=?)"],
        ),
        (
            lambda store, _: store.find_key("d1"),
            ["SEARCH api_keys USING INDEX sqlite_autoindex_api_keys_2 (digest=?)"],
        ),
        (
            lambda store, _: store.list_expired_files(now=NOON, limit=9),
            ["SEARCH files USING INDEX ix_files_expiry (expires_at<?)"],
        ),
    ],
)
async def test_what_is_read_often_is_read_by_index(
    store: SqlStore, path: Path, call: Callable[..., object], index: list[str]
) -> None:
    batch = await start(store)
    with statements() as seen:
        await call(store, batch.project_id)

    plan = plan_of(path, seen, "^SELECT")
    for line in index:
        assert line in plan
    assert "SCAN files" not in plan
    assert "SCAN slices" not in plan


# The schema


def schema_of(path: Path) -> dict[str, str]:
    """Each table and index, as it was written; but not those that Alembic and SQLite add."""
    with closing(sqlite3.connect(path)) as raw:
        rows = raw.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
        written = {name: re.sub(r"\s+", " ", sql) for name, sql in rows}
    del written["alembic_version"]
    return written


async def test_migrations_build_the_tables_that_the_store_uses(
    store: SqlStore, path: Path, tmp_path: Path
) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/other.db")
    with engine.begin() as db:
        migrations.migrate(db)
        assert migrations.find_version(db) == migrations.HEAD
    engine.dispose()

    assert schema_of(path) == schema_of(tmp_path / "other.db")


def test_head_is_the_last_migration_and_each_follows_the_one_before() -> None:
    numbers = sorted(path.name[:4] for path in VERSIONS.glob("*.py"))

    assert numbers == [f"{number:04}" for number in range(1, len(numbers) + 1)]
    assert numbers[-1] == migrations.HEAD
    for number, before in zip(numbers, [None, *numbers], strict=False):
        [path] = VERSIONS.glob(f"{number}_*.py")
        script = path.read_text()
        assert f'revision = "{number}"' in script
        assert f"down_revision = {before!r}".replace("'", '"') in script


async def test_a_schema_of_a_newer_penstock_is_refused(store: SqlStore, path: Path) -> None:
    await store.close()
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
        raw.execute("UPDATE schema_floor SET version = '9998'")
        raw.commit()

    with pytest.raises(InvalidSettings, match=r"9999.* 9998"):
        await SqlStore(f"sqlite:///{path}").open()


async def test_a_newer_schema_that_says_so_is_worked_with(store: SqlStore, path: Path) -> None:
    batch = await start(store)
    await store.close()
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
        raw.commit()

    older = SqlStore(f"sqlite:///{path}")
    await older.open()

    assert await older.get_batch(BatchId("batch-1")) == batch
    await older.close()


async def test_migrations_set_the_floor_that_new_databases_have(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/other.db")
    with engine.begin() as db:
        migrations.migrate(db)
        assert db.exec_driver_sql("SELECT version FROM schema_floor").scalars().all() == [
            migrations.FLOOR
        ]
    engine.dispose()


async def test_an_upgrade_that_fails_leaves_nothing(path: Path) -> None:
    def fail(_: object, __: object, statement: str, *___: object) -> None:
        if "CREATE TABLE slices" in statement:
            raise RuntimeError("the power goes")

    event.listen(Engine, "before_cursor_execute", fail)
    try:
        with pytest.raises(RuntimeError):
            await SqlStore(f"sqlite:///{path}").open()
    finally:
        event.remove(Engine, "before_cursor_execute", fail)

    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("SELECT name FROM sqlite_master").fetchall() == []
    store = SqlStore(f"sqlite:///{path}")
    await store.open()
    await store.close()


async def test_a_schema_at_head_is_opened_without_alembic(store: SqlStore, path: Path) -> None:
    await store.close()
    program = (
        "import asyncio, sys\n"
        "from penstock.store.sql import SqlStore\n"
        f"store = SqlStore('sqlite:///{path}')\n"
        "async def main():\n"
        "    await store.open()\n"
        "    await store.close()\n"
        "asyncio.run(main())\n"
        "sys.exit('alembic' in sys.modules)\n"
    )
    import sys

    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
    assert await process.wait() == 0
