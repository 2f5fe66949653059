"""The schema on PostgreSQL: the same by both ways, and migrated beside others at work."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext.asyncio import create_async_engine

from penstock.errors import InvalidSettings, StorageUnavailable
from penstock.store import migrations
from penstock.store import postgres as postgres_module
from penstock.store.sql import SqlStore
from penstock.testing.store import claim, ids_of, start
from tests.postgres import Database


async def run(url: str, work: Callable[[Connection], Any]) -> Any:
    engine = create_async_engine(url.replace("postgresql:", "postgresql+asyncpg:"))
    try:
        async with engine.connect() as db:
            return await db.run_sync(work)
    finally:
        await engine.dispose()


async def migrate_to(url: str, version: str) -> None:
    await run(url, lambda db: migrations.migrate(db, to=version))


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[SqlStore]:
    store = SqlStore(url)
    try:
        await store.open()
        yield store
    finally:
        await store.close()


async def migrate(url: str) -> None:
    store = SqlStore(url)
    try:
        await store.migrate()
    finally:
        await store.close()


@pytest.fixture
async def rival(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(postgres_url)
    yield connection
    connection.terminate()


_COLUMNS = """
SELECT table_name, column_name, data_type, is_nullable, column_default
FROM information_schema.columns WHERE table_schema = 'public'
"""
_CONSTRAINTS = """
SELECT conrelid::regclass::text, conname, convalidated, pg_get_constraintdef(oid)
FROM pg_constraint WHERE connamespace = 'public'::regnamespace
"""
_INDEXES = """
SELECT indexdef, indisvalid FROM pg_indexes
JOIN pg_index ON indexrelid = to_regclass(quote_ident(indexname)) WHERE schemaname = 'public'
"""


async def schema_of(url: str) -> list[set[tuple[Any, ...]]]:
    connection = await asyncpg.connect(url)
    try:
        return [
            {tuple(row) for row in await connection.fetch(query)}
            for query in (_COLUMNS, _CONSTRAINTS, _INDEXES)
        ]
    finally:
        await connection.close()


async def test_migrations_build_the_tables_that_the_store_uses(
    migrated_url: str, postgres_url: str
) -> None:
    await migrate_to(postgres_url, migrations.HEAD)

    made, migrated = await schema_of(migrated_url), await schema_of(postgres_url)
    assert all(len(part) > 20 for part in made)
    for of_tables, of_migrations in zip(made, migrated, strict=True):
        assert of_tables == of_migrations
    for url in (migrated_url, postgres_url):
        assert await run(url, migrations.find_version) == migrations.HEAD
        connection = await asyncpg.connect(url)
        floors = await connection.fetch("SELECT version FROM schema_floor")
        assert [row["version"] for row in floors] == [migrations.FLOOR]
        await connection.close()


@pytest.mark.parametrize("version", [None, "0001", "0002"])
async def test_of_hosts_that_migrate_at_once_one_does(
    postgres_url: str, migrated_url: str, version: str | None
) -> None:
    if version is not None:
        await migrate_to(postgres_url, version)

    await asyncio.gather(*(migrate(postgres_url) for _ in range(4)))

    assert await schema_of(postgres_url) == await schema_of(migrated_url)
    async with opened(postgres_url) as store:
        await start(store)
        assert len(await claim(store, ids_of(0))) == 1


async def test_what_was_kept_before_is_there_after(
    postgres_url: str, rival: asyncpg.Connection
) -> None:
    await migrate_to(postgres_url, "0002")
    await rival.execute("INSERT INTO projects VALUES ('proj_1', 'red', 5)")

    await migrate(postgres_url)

    async with opened(postgres_url) as store:
        project = await store.ensure_project("red")
    assert (project.id, project.weight, project.is_background) == ("proj_1", 5, False)


async def test_a_migration_waits_for_readers_and_lets_nobody_wait_for_it_long(
    postgres_url: str,
    migrated_url: str,
    rival: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One who reads long is in its way; others who read and write go on."""
    await migrate_to(postgres_url, "0002")
    monkeypatch.setitem(postgres_module._MIGRATION_SETTINGS, "lock_timeout", "100ms")
    await rival.execute("BEGIN; SELECT FROM projects; SELECT FROM slices")
    other = await asyncpg.connect(postgres_url)

    migrating = asyncio.create_task(migrate(postgres_url))
    for number in range(20):
        async with asyncio.timeout(2):
            await other.execute(f"INSERT INTO projects VALUES ('p{number}', 'n{number}', 1)")
        await asyncio.sleep(0.05)
    assert not migrating.done()
    await rival.execute("COMMIT")

    await migrating
    assert await schema_of(postgres_url) == await schema_of(migrated_url)
    await other.close()


async def test_a_migration_gives_up_on_a_table_that_stays_locked_and_says_so(
    postgres_url: str, rival: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrate_to(postgres_url, "0002")
    monkeypatch.setitem(postgres_module._MIGRATION_SETTINGS, "lock_timeout", "50ms")
    monkeypatch.setattr(postgres_module, "_MIGRATION_ATTEMPTS", 2)
    await rival.execute("BEGIN; LOCK TABLE projects")

    with pytest.raises(StorageUnavailable, match="locked"):
        await migrate(postgres_url)

    await rival.execute("ROLLBACK")
    await migrate(postgres_url)


async def test_a_host_waits_for_one_that_migrates_but_not_for_ever(
    postgres_url: str, rival: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_module, "_MIGRATION_WAIT_S", 0.3)
    await rival.execute(f"SELECT pg_advisory_lock({postgres_module._TURN})")

    with pytest.raises(StorageUnavailable, match="Another host"):
        await migrate(postgres_url)

    await rival.execute(f"SELECT pg_advisory_unlock({postgres_module._TURN})")
    await migrate(postgres_url)


async def test_a_migration_that_was_cut_off_is_finished_by_the_next(
    postgres_url: str, migrated_url: str, rival: asyncpg.Connection
) -> None:
    await migrate_to(postgres_url, "0002")

    def fail(_: object, __: object, statement: str, *___: object) -> None:
        if "CREATE TABLE workers" in statement:
            raise RuntimeError("the power goes")

    event.listen(Engine, "before_cursor_execute", fail)
    try:
        with pytest.raises(RuntimeError):
            await migrate(postgres_url)
    finally:
        event.remove(Engine, "before_cursor_execute", fail)
    assert await run(postgres_url, migrations.find_version) == "0002"
    # What PostgreSQL leaves where an index could not be finished.
    await rival.execute(
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ix_slices_lease'::regclass"
    )

    await migrate(postgres_url)

    assert await schema_of(postgres_url) == await schema_of(migrated_url)


async def test_a_database_that_nobody_has_migrated_is_refused(postgres_url: str) -> None:
    with pytest.raises(InvalidSettings, match="empty: run `penstock migrate`"):
        async with opened(postgres_url):
            pass
    assert await schema_of(postgres_url) == [set(), set(), set()]

    await migrate_to(postgres_url, "0002")
    with pytest.raises(InvalidSettings, match=r"0002.* run `penstock migrate`"):
        async with opened(postgres_url):
            pass


async def test_a_newer_schema_is_worked_with_if_it_says_so(
    migrated_url: str, postgres: Database
) -> None:
    name = migrated_url.rsplit("/", 1)[1]
    postgres.execute("UPDATE alembic_version SET version_num = '9999'", database=name)

    async with opened(migrated_url) as store:
        await start(store)
    await migrate(migrated_url)  # a rollback of the deploy: nothing to do

    postgres.execute("UPDATE schema_floor SET version = '9998'", database=name)
    for trial in (migrate(migrated_url), _open(migrated_url)):
        with pytest.raises(InvalidSettings, match=r"9999.* 9998"):
            await trial


async def _open(url: str) -> None:
    async with opened(url):
        pass


async def test_prepared_statements_outlive_a_migration(
    migrated_url: str, postgres: Database
) -> None:
    """Another host migrates while this one is at work: a rolling deploy."""
    name = migrated_url.rsplit("/", 1)[1]
    calls: list[Callable[[SqlStore], Awaitable[Any]]] = [
        lambda store: store.ensure_project("red"),
        lambda store: store.list_unfinished(),
    ]
    async with opened(migrated_url) as store:
        for call in calls:
            await call(store)
        for table in ("projects", "batches"):
            postgres.execute(
                f"ALTER TABLE {table} ADD COLUMN later text",
                f"ALTER TABLE {table} ALTER COLUMN id TYPE varchar(200)",
                database=name,
            )
        for call in calls:
            await call(store)
