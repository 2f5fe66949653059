"""The store while its PostgreSQL is down, stalled, full or read only: a sentence, in time."""

import asyncio
import time
from collections.abc import AsyncIterator

import asyncpg
import pytest

from penstock.errors import InvalidRequest, InvalidSettings, StorageUnavailable
from penstock.model import BatchStatus, JobKind
from penstock.store import postgres as postgres_module
from penstock.store.postgres import PostgresDatabase
from penstock.store.sql import SqlStore
from penstock.testing.store import (
    NOON,
    RecordedJobs,
    add_batch,
    finalize,
    move,
    new_batch,
    new_file,
    start,
)
from tests.postgres import Database, PostgresServer


@pytest.fixture
def jobs() -> RecordedJobs:
    return RecordedJobs()


@pytest.fixture
async def own_store(own_postgres: PostgresServer) -> AsyncIterator[SqlStore]:
    """On a server that the test may stop."""
    store = SqlStore(own_postgres.url)
    await store.migrate()
    await store.open()
    yield store
    await store.close()


@pytest.fixture
async def store(migrated_url: str, jobs: RecordedJobs) -> AsyncIterator[SqlStore]:
    store = SqlStore(migrated_url, jobs=jobs)
    await store.open()
    yield store
    await store.close()


@pytest.fixture
async def rival(migrated_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(migrated_url)
    yield connection
    connection.terminate()


async def open_all_connections(store: SqlStore) -> None:
    """Have all connections open, as a process at work has."""
    await asyncio.gather(*(store.list_keys() for _ in range(20)))


# A server that is gone


async def test_a_server_that_is_stopped_is_storage_unavailable_until_it_is_back(
    own_store: SqlStore, own_postgres: PostgresServer
) -> None:
    await open_all_connections(own_store)
    await asyncio.to_thread(own_postgres.stop)

    with pytest.raises(StorageUnavailable, match=r"cannot be reached .*; start it,"):
        await own_store.list_keys()
    with pytest.raises(StorageUnavailable, match="cannot be reached"):
        await own_store.ensure_project("red")

    await asyncio.to_thread(own_postgres.start)
    assert (await own_store.ensure_project("red")).name == "red"
    await open_all_connections(own_store)


@pytest.mark.parametrize("immediate", [True, False])
async def test_a_server_that_restarts_between_two_calls_is_not_noticed(
    own_store: SqlStore, own_postgres: PostgresServer, immediate: bool
) -> None:
    await open_all_connections(own_store)

    await asyncio.to_thread(own_postgres.stop, immediate=immediate)
    await asyncio.to_thread(own_postgres.start)

    await asyncio.gather(*(own_store.ensure_project(f"p{n}") for n in range(10)))


async def test_calls_that_a_server_dies_under_are_storage_unavailable(
    own_store: SqlStore, own_postgres: PostgresServer
) -> None:
    await own_store.ensure_project("red")
    rival = await asyncpg.connect(own_postgres.url)
    await rival.execute("BEGIN; LOCK TABLE projects")
    waiting = [
        asyncio.create_task(own_store.ensure_project("red")),
        asyncio.create_task(own_store.list_backlog(now=NOON)),
    ]
    await asyncio.sleep(0.3)

    await asyncio.to_thread(own_postgres.stop, immediate=True)

    for task in waiting:
        with pytest.raises(StorageUnavailable, match=r"crashed|cut the connection|shutting"):
            await task
    rival.terminate()
    await asyncio.to_thread(own_postgres.start)
    await own_store.ping()


async def test_a_server_that_is_not_there_is_storage_unavailable() -> None:
    store = SqlStore("postgresql://postgres@127.0.0.1:1/nothing")

    with pytest.raises(StorageUnavailable, match="cannot be reached"):
        await store.open()


# A server that does not answer


async def test_no_call_waits_for_ever_for_a_server_that_stands_still(
    own_store: SqlStore, own_postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_module, "_TRANSACTION_S", 0.5)
    monkeypatch.setattr(postgres_module, "_CONNECT_S", 0.5)
    await open_all_connections(own_store)
    own_postgres.pause()
    began = time.monotonic()

    with pytest.raises(StorageUnavailable, match="did not answer in time"):
        await own_store.list_keys()
    with pytest.raises(StorageUnavailable, match="does not answer"):  # on a new connection
        await own_store.ensure_project("red")
    calls = (own_store.list_keys() for _ in range(20))
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(result) for result in results} == {StorageUnavailable}
    assert time.monotonic() - began < 10

    own_postgres.resume()
    await own_store.ensure_project("red")


async def test_a_store_closes_though_its_server_stands_still(
    own_store: SqlStore, own_postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_module, "_CLOSE_S", 0.5)
    await open_all_connections(own_store)
    own_postgres.pause()

    async with asyncio.timeout(5):
        await own_store.close()

    with pytest.raises(StorageUnavailable, match="closed"):
        await own_store.list_keys()
    own_postgres.resume()


async def test_a_caller_that_goes_away_while_the_server_stands_still_is_let_go(
    own_store: SqlStore, own_postgres: PostgresServer
) -> None:
    await open_all_connections(own_store)
    own_postgres.pause()
    reading = asyncio.create_task(own_store.list_keys())
    await asyncio.sleep(0.1)

    reading.cancel()

    async with asyncio.timeout(5):
        with pytest.raises(asyncio.CancelledError):
            await reading
    own_postgres.resume()
    await own_store.list_keys()


# A server that refuses


async def test_a_database_that_is_read_only_is_storage_unavailable_but_read(
    store: SqlStore, migrated_url: str, postgres: Database
) -> None:
    name = migrated_url.rsplit("/", 1)[1]
    postgres.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    read_only = SqlStore(migrated_url)
    await read_only.open()

    with pytest.raises(StorageUnavailable, match="cannot be written to"):
        await read_only.ping()
    with pytest.raises(StorageUnavailable, match="cannot be written to"):
        await read_only.ensure_project("red")

    assert await read_only.list_keys() == []
    await read_only.close()


@pytest.mark.parametrize(
    ("state", "sentence"),
    [("53100", "is full"), ("58030", "its disk fails"), ("53200", "lacks resources")],
)
async def test_what_a_server_cannot_do_is_storage_unavailable_and_leaves_nothing(
    store: SqlStore, rival: asyncpg.Connection, state: str, sentence: str
) -> None:
    project = await store.ensure_project("red")
    await rival.execute(
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{state}'; END $$"
    )
    await rival.execute(
        "CREATE TRIGGER fail BEFORE INSERT ON batches FOR EACH ROW EXECUTE FUNCTION fail()"
    )
    file = await store.add_file(new_file(project))

    with pytest.raises(StorageUnavailable, match=sentence):
        await store.add_batch(new_batch(file))

    assert await store.list_unfinished() == []


async def test_a_row_that_is_not_let_go_is_storage_unavailable(
    migrated_url: str, rival: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(postgres_module._SERVER_SETTINGS, "lock_timeout", "200ms")
    store = SqlStore(migrated_url)
    await start(store)
    await rival.execute("BEGIN; SELECT * FROM batches FOR UPDATE")

    with pytest.raises(StorageUnavailable, match="locked"):
        await move(store, BatchStatus.CANCELLING)
    await store.ping()

    await rival.execute("ROLLBACK")
    await move(store, BatchStatus.CANCELLING)
    await store.close()


async def test_a_statement_that_takes_too_long_is_storage_unavailable(
    migrated_url: str, rival: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(postgres_module._SERVER_SETTINGS, "statement_timeout", "200ms")
    store = SqlStore(migrated_url)
    await rival.execute("BEGIN; LOCK TABLE api_keys")

    with pytest.raises(StorageUnavailable, match="did not finish"):
        await store.list_keys()
    await store.close()


async def test_more_callers_than_connections_wait_and_then_hear_that_all_are_in_use(
    migrated_url: str, rival: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_module, "_POOL_S", 0.3)
    store = SqlStore(migrated_url)
    await rival.execute("BEGIN; LOCK TABLE api_keys")
    reading = [asyncio.create_task(store.list_keys()) for _ in range(5)]
    await asyncio.sleep(0.2)

    with pytest.raises(StorageUnavailable, match="too busy"):
        await store.list_keys()

    await rival.execute("ROLLBACK")
    assert await asyncio.gather(*reading) == [[]] * 5
    await store.close()


async def test_a_database_that_does_not_exist_is_storage_unavailable(
    postgres: Database,
) -> None:
    with pytest.raises(StorageUnavailable, match=r"does not exist .*; create it,"):
        await SqlStore(postgres.url_of("nowhere")).open()


async def test_a_user_that_is_not_known_is_storage_unavailable(postgres: Database) -> None:
    url = postgres.url.replace("//postgres", "//stranger")

    with pytest.raises(StorageUnavailable, match=r"refuses .*; correct them in database_url"):
        await SqlStore(url).open()


async def test_a_url_with_a_wrong_option_is_refused(postgres: Database) -> None:
    with pytest.raises(InvalidSettings, match="sslmode"):
        await SqlStore(f"{postgres.url}?sslmode=perhaps").open()


async def test_ssl_is_asked_for_as_the_url_says(postgres: Database) -> None:
    with pytest.raises(StorageUnavailable, match="SSL"):
        await SqlStore(f"{postgres.url}?sslmode=require").open()


async def test_a_text_that_postgresql_cannot_keep_is_refused(store: SqlStore) -> None:
    with pytest.raises(InvalidRequest, match=r"U\+0000"):
        await store.ensure_project("a\0b")

    assert await store.list_keys() == []


# Transactions that others get in the way of


@pytest.mark.parametrize("state", ["40001", "40P01"])
async def test_a_transaction_that_is_given_up_is_run_again_and_its_jobs_are_not_doubled(
    store: SqlStore, jobs: RecordedJobs, rival: asyncpg.Connection, state: str
) -> None:
    await rival.execute("CREATE SEQUENCE attempts")
    await rival.execute(
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF nextval('attempts') < 3 THEN RAISE EXCEPTION 'no' USING ERRCODE = '{state}'; "
        "END IF; RETURN NULL; END $$"
    )
    # At the commit, when the jobs have been enqueued already.
    await rival.execute(
        "CREATE CONSTRAINT TRIGGER fail AFTER INSERT ON batches DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION fail()"
    )

    await add_batch(store)

    assert await rival.fetchval("SELECT last_value FROM attempts") == 3
    # Each attempt enqueues its two, within the transaction that undoes it.
    assert [job.kind for job in jobs.take()] == [JobKind.VALIDATE, JobKind.EXPIRE] * 3
    assert len(await store.list_unfinished()) == 1


async def test_a_transaction_that_is_always_given_up_is_storage_unavailable(
    migrated_url: str, rival: asyncpg.Connection
) -> None:
    await rival.execute(
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '40001'; END $$"
    )
    await rival.execute(
        "CREATE TRIGGER fail BEFORE INSERT ON projects FOR EACH ROW EXECUTE FUNCTION fail()"
    )
    store = SqlStore(migrated_url)

    with pytest.raises(StorageUnavailable, match="too busy"):
        await store.ensure_project("red")
    await store.close()


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


async def test_a_process_that_stops_within_a_transaction_loses_what_it_holds(
    migrated_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        postgres_module._SERVER_SETTINGS, "idle_in_transaction_session_timeout", "200ms"
    )
    stopped = PostgresDatabase(migrated_url)
    store = SqlStore(migrated_url)
    await start(store)

    locks = stopped.write(
        lambda db: db.exec_driver_sql("SELECT * FROM batches FOR UPDATE"),
        durable=False,
        finish=lambda _: asyncio.sleep(1.0),
    )
    holding = asyncio.create_task(locks)
    await asyncio.sleep(0.1)

    await move(store, BatchStatus.CANCELLING)

    with pytest.raises(StorageUnavailable, match=r"stood still|cut the connection"):
        await holding
    await store.close()
    await stopped.close()
