"""PgQueuer on a real PostgreSQL as the engine."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager

import asyncpg
import pytest
import structlog

from penstock.engine.postgres import PostgresEngine
from penstock.engine.postgres_queue import CANCELLED, SCHEMA, install
from penstock.errors import InvalidSettings, StorageUnavailable
from penstock.model import Job, JobKind
from penstock.testing.engine import (
    LAST,
    MANY,
    EngineContract,
    Hands,
    Regret,
    SharedEngineContract,
    Transaction,
    named,
    running,
)
from tests.engine_processes import TIMEOUT_S, EngineProcess, engine_process, until
from tests.postgres import PostgresServer

SLICES = [Job(kind=JobKind.SLICE, id=f"batch-1:{n}") for n in range(3)]
SLOW = Job(kind=JobKind.VALIDATE, id="slow")
WARM = [Job(kind=JobKind.VALIDATE, id=f"warm-{n}") for n in range(50)]
AWAY = "The database does not answer; jobs wait until it does."
BACK = "The database answers again."


async def install_queue(url: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await install(connection)
    finally:
        await connection.close()


async def execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


async def count_rows(url: str, table: str = "pgqueuer") -> int:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(f"SELECT count(*) FROM {SCHEMA}.{table}")
    finally:
        await connection.close()


async def until_empty(url: str) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while await count_rows(url):
            await asyncio.sleep(0.05)


async def warm_up(engine: PostgresEngine, processes: Sequence[EngineProcess]) -> None:
    """Wait until each of them does jobs."""
    async with asyncio.timeout(TIMEOUT_S):
        while not all(each.said for each in processes):
            await engine.enqueue(WARM)
            await asyncio.sleep(0.05)


async def enqueue_at_last(engine: PostgresEngine, jobs: Sequence[Job]) -> None:
    """Enqueue, as soon as the server can be reached."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            try:
                return await engine.enqueue(jobs)
            except StorageUnavailable:
                await asyncio.sleep(0.05)


def overlaps(processes: Sequence[EngineProcess]) -> list[str]:
    """Jobs that were begun while they were being done, whoever did them."""
    found: list[str] = []
    doing: set[str] = set()
    said = [each for process in processes for each in process.said]
    for word, job, _ in sorted(said, key=lambda each: each[2]):
        if word == "begun":
            if job in doing:
                found.append(job)
            doing.add(job)
        elif word == "ended":
            doing.discard(job)
    return found


@asynccontextmanager
async def open_engine(
    url: str,
    *,
    local: frozenset[JobKind] = frozenset({JobKind.SLICE}),
    heartbeat_timeout_s: float = 20,
) -> AsyncGenerator[PostgresEngine]:
    engine = PostgresEngine(url, local=local, heartbeat_timeout_s=heartbeat_timeout_s)
    try:
        yield engine
    finally:
        await engine.close()


@pytest.fixture
async def url(postgres_url: str) -> str:
    await install_queue(postgres_url)
    return postgres_url


@pytest.fixture
async def engine(url: str) -> AsyncIterator[PostgresEngine]:
    async with open_engine(url) as engine:
        yield engine


@pytest.fixture
async def other(url: str) -> AsyncIterator[PostgresEngine]:
    async with open_engine(url) as other:
        yield other


@pytest.fixture
def transaction(url: str) -> Transaction:
    @asynccontextmanager
    async def begin() -> AsyncGenerator[asyncpg.Connection]:
        connection = await asyncpg.connect(url)
        try:
            async with connection.transaction():
                yield connection
        finally:
            await connection.close()

    return begin


class TestContract(EngineContract):
    """Slices in memory, all else through the database."""


class TestContractAllShared(EngineContract):
    """All through the database."""

    @pytest.fixture
    async def engine(self, url: str) -> AsyncIterator[PostgresEngine]:
        async with open_engine(url, local=frozenset()) as engine:
            yield engine


class TestSharedContract(SharedEngineContract):
    pass


# Local kinds


async def test_slices_are_handed_out_in_the_process_that_enqueued_them(
    engine: PostgresEngine, other: PostgresEngine
) -> None:
    hands, others = Hands(engine), Hands(other)
    async with running(engine), running(other):
        await engine.enqueue(SLICES)
        await hands.until_done(*SLICES)
        await other.enqueue([LAST])
        await until(lambda: named(LAST) in hands.ended + others.ended)

    assert not {named(job) for job in SLICES} & set(others.begun)


async def test_a_cancel_reaches_slices_in_every_process(
    engine: PostgresEngine, other: PostgresEngine
) -> None:
    [doing, waiting, alone] = SLICES
    hands, others = Hands(engine), Hands(other)

    async def wait(job: str, stop: asyncio.Event) -> None:
        await stop.wait()

    hands.act = others.act = wait
    late = Job(kind=waiting.kind, id=waiting.id, due_at=time.time() + 0.5)
    async with running(engine), running(other):
        await engine.enqueue([doing, late])
        await other.enqueue([doing, alone])
        await until(lambda: len(hands.begun) == 1 and len(others.begun) == 2)
        await other.cancel([doing, waiting])
        await hands.until_done(doing)
        await others.until_done(doing)
        await asyncio.sleep(0.7)
        assert hands.begun == [named(doing)]
        assert named(alone) not in others.ended
        await engine.cancel([alone])
        await others.until_done(alone)


# Life and death


async def test_a_job_whose_process_was_killed_is_done_by_another(
    url: str, engine: PostgresEngine
) -> None:
    await engine.enqueue([SLOW])
    async with (
        engine_process(url, heartbeat_timeout_s=2) as first,
        engine_process(url, heartbeat_timeout_s=2) as second,
    ):
        await until(lambda: bool(first.said or second.said))
        dead, heir = (first, second) if first.said else (second, first)
        dead.kill()
        killed_at = time.monotonic()
        await until(lambda: bool(heir.said))
        assert time.monotonic() - killed_at < 4
        await engine.cancel([SLOW])
        await until(lambda: heir.jobs("ended") == [SLOW.id])

    assert dead.jobs("ended") == []


async def test_a_process_that_hangs_loses_its_job_and_takes_nothing_when_it_wakes_up(
    url: str, engine: PostgresEngine
) -> None:
    await engine.enqueue([SLOW])
    async with (
        engine_process(url, heartbeat_timeout_s=2) as first,
        engine_process(url, heartbeat_timeout_s=2) as second,
    ):
        await until(lambda: bool(first.said or second.said))
        stalled, heir = (first, second) if first.said else (second, first)
        stalled.pause()
        await until(lambda: heir.jobs("begun") == [SLOW.id])
        stalled.resume()
        # It is told to stop, and then the job is still in the hands of the other.
        await until(lambda: stalled.jobs("ended") == [SLOW.id])
        await asyncio.sleep(1)
        assert heir.jobs("ended") == []
        assert await count_rows(url) == 1
        await engine.cancel([SLOW])
        await until(lambda: heir.jobs("ended") == [SLOW.id])


async def test_a_job_that_was_cancelled_dies_with_its_process(
    url: str, engine: PostgresEngine
) -> None:
    await engine.enqueue([SLOW])
    async with engine_process(url, heartbeat_timeout_s=1) as first:
        await until(lambda: first.jobs("begun") == [SLOW.id])
        first.pause()
        await engine.cancel([SLOW])
        first.kill()
    async with open_engine(url, heartbeat_timeout_s=1) as heir:
        hands = Hands(heir)
        async with running(heir):
            await until_empty(url)
            assert hands.begun == []
            await engine.enqueue([SLOW])
            await hands.until_done(SLOW)


async def test_a_handler_that_takes_long_keeps_its_job(url: str) -> None:
    async with (
        open_engine(url, heartbeat_timeout_s=1) as engine,
        open_engine(url, heartbeat_timeout_s=1) as other,
    ):
        hands, others = Hands(engine), Hands(other)

        async def take_long(job: str, stop: asyncio.Event) -> None:
            await asyncio.sleep(3)
            assert not stop.is_set()

        hands.act = others.act = take_long
        async with running(engine), running(other):
            await engine.enqueue([SLOW])
            await until(lambda: len(hands.ended + others.ended) == 1)

    assert len(hands.begun + others.begun) == 1


async def test_a_cancel_that_nobody_heard_reaches_the_handler_with_a_heartbeat(
    url: str,
) -> None:
    async with open_engine(url, heartbeat_timeout_s=1) as engine:
        hands = Hands(engine)

        async def wait(job: str, stop: asyncio.Event) -> None:
            await stop.wait()

        hands.act = wait
        async with running(engine):
            await engine.enqueue([SLOW])
            await until(lambda: hands.begun == [named(SLOW)])
            await execute(
                url, f"""UPDATE {SCHEMA}.pgqueuer SET headers = '{{"{CANCELLED}": true}}'"""
            )
            await hands.until_done(SLOW)


async def test_a_transaction_that_holds_a_job_holds_up_nothing_else(
    url: str, transaction: Transaction
) -> None:
    async with (
        open_engine(url, heartbeat_timeout_s=1) as engine,
        open_engine(url, heartbeat_timeout_s=1) as other,
    ):
        hands, others = Hands(engine), Hands(other)
        go_on = asyncio.Event()

        async def wait(job: str, stop: asyncio.Event) -> None:
            if job == named(SLOW):
                await go_on.wait()
                assert not stop.is_set()

        hands.act = wait
        async with running(engine):
            await engine.enqueue([SLOW])
            await hands.until(lambda: hands.begun == [named(SLOW)])
            async with transaction() as connection:
                await engine.enqueue([SLOW], connection=connection)
                await asyncio.sleep(1.5)
                await engine.enqueue(MANY)
                await hands.until_done(*MANY)
                handing = asyncio.create_task(other.run())
                await asyncio.sleep(0.5)
                go_on.set()
                await hands.until_done(SLOW)
                await asyncio.sleep(0.3)
                assert (hands.begun + others.begun).count(named(SLOW)) == 1
            await until(lambda: (hands.ended + others.ended).count(named(SLOW)) == 2)
            await other.stop()
            await handing


async def test_what_is_cut_off_when_the_engine_is_cancelled_is_done_again_at_once(
    engine: PostgresEngine, other: PostgresEngine
) -> None:
    hands, others = Hands(engine), Hands(other)

    async def hang(job: str, stop: asyncio.Event) -> None:
        await asyncio.Event().wait()

    hands.act = hang
    await engine.enqueue([SLOW])
    handing = asyncio.create_task(engine.run())
    await hands.until(lambda: hands.begun == [named(SLOW)])
    handing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await handing
    async with running(other):
        await others.until_done(SLOW)


async def test_due_times_are_those_of_the_database(
    engine: PostgresEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 60)
    hands = Hands(engine)
    async with running(engine):
        await engine.enqueue([Job(kind=SLOW.kind, id=SLOW.id, due_at=now() + 30)])
        await engine.enqueue([LAST])
        await hands.until_done(LAST)
        assert hands.begun == [named(LAST)]
        await engine.enqueue([Job(kind=SLOW.kind, id=SLOW.id, due_at=now() + 0.2)])
        await hands.until_done(SLOW)


# The server


async def test_work_goes_on_when_the_server_was_cut_off_and_is_back(
    own_postgres: PostgresServer,
) -> None:
    # The server of tests may forget what it has said to be kept; this one must not.
    own_postgres.execute("ALTER DATABASE postgres SET synchronous_commit = on")
    url = own_postgres.url
    await install_queue(url)
    async with open_engine(url) as engine:
        hands = Hands(engine)
        go_on = asyncio.Event()

        async def wait(job: str, stop: asyncio.Event) -> None:
            if job == named(SLOW):
                await go_on.wait()

        hands.act = wait
        soon = Job(kind=MANY[0].kind, id="soon", due_at=time.time() + 2)
        with structlog.testing.capture_logs() as logs:
            async with running(engine):
                await engine.enqueue([SLOW, soon])
                await hands.until(lambda: hands.begun == [named(SLOW)])
                await asyncio.to_thread(own_postgres.stop, immediate=True)
                await engine.enqueue(SLICES)
                await hands.until_done(*SLICES)
                with pytest.raises(StorageUnavailable, match="job queue"):
                    await engine.enqueue(MANY)
                with pytest.raises(StorageUnavailable, match="job queue"):
                    await engine.cancel([SLOW])
                go_on.set()
                await hands.until_done(SLOW)
                await asyncio.sleep(1)
                await asyncio.to_thread(own_postgres.start)
                await engine.enqueue(MANY)
                await hands.until_done(*MANY, soon)
                await engine.enqueue([LAST])
                await hands.until_done(LAST)

        assert hands.begun.count(named(SLOW)) == 1
        assert [log["event"] for log in logs] == [AWAY, BACK]
        assert await count_rows(url) == 0


async def test_the_engine_starts_before_the_server_does(own_postgres: PostgresServer) -> None:
    await install_queue(own_postgres.url)
    await asyncio.to_thread(own_postgres.stop)
    async with open_engine(own_postgres.url) as engine:
        hands = Hands(engine)
        async with running(engine):
            await asyncio.sleep(0.3)
            await asyncio.to_thread(own_postgres.start)
            await engine.enqueue(MANY)
            await hands.until_done(*MANY)


async def test_the_engine_stops_while_the_server_is_away(own_postgres: PostgresServer) -> None:
    await install_queue(own_postgres.url)
    async with open_engine(own_postgres.url) as engine:
        hands = Hands(engine)
        go_on = asyncio.Event()

        async def wait(job: str, stop: asyncio.Event) -> None:
            await go_on.wait()

        hands.act = wait
        async with running(engine):
            await engine.enqueue([SLOW])
            await hands.until(lambda: hands.begun == [named(SLOW)])
            await asyncio.to_thread(own_postgres.stop, immediate=True)
            stopping = asyncio.create_task(engine.stop())
            await asyncio.wait([stopping], timeout=0.2)
            assert not stopping.done()
            go_on.set()
            async with asyncio.timeout(5):
                await stopping

    assert hands.ended == [named(SLOW)]


async def test_many_jobs_survive_kills_and_restarts_and_none_is_done_twice_at_once(
    own_postgres: PostgresServer,
) -> None:
    own_postgres.execute("ALTER DATABASE postgres SET synchronous_commit = on")
    url = own_postgres.url
    await install_queue(url)
    jobs = [Job(kind=JobKind.VALIDATE, id=f"brief-{n}") for n in range(2000)]
    async with (
        open_engine(url) as engine,
        engine_process(url, heartbeat_timeout_s=3) as first,
        engine_process(url, heartbeat_timeout_s=3) as second,
        engine_process(url, heartbeat_timeout_s=3) as third,
    ):
        processes = (first, second, third)
        await warm_up(engine, processes)
        for start in range(0, len(jobs), 100):
            await enqueue_at_last(engine, jobs[start : start + 100])
            if start == 500:
                third.kill()
            if start == 1000:
                await asyncio.to_thread(own_postgres.stop, immediate=True)
                await asyncio.to_thread(own_postgres.start)
        wanted = {job.id for job in jobs}
        await until(lambda: wanted <= {job for each in processes for job in each.jobs("ended")})
        await until_empty(url)
        assert await first.stop() == 0
        assert await second.stop() == 0

    assert overlaps((first, second)) == []
    for each in (first, second):
        events = [json.loads(line)["event"] for line in each.errors.splitlines()]
        assert events == [AWAY, BACK]


async def test_twenty_thousand_jobs_are_done_by_two_processes_none_twice_at_once(
    url: str, engine: PostgresEngine
) -> None:
    jobs = [Job(kind=JobKind.VALIDATE, id=f"batch-{n}") for n in range(20_000)]
    async with engine_process(url) as first, engine_process(url) as second:
        await warm_up(engine, (first, second))
        await engine.enqueue(jobs)
        await until(lambda: len(first.said) + len(second.said) > 10_000)
        await engine.enqueue(jobs)  # some wait, some are being done, some were done
        wanted = {job.id for job in jobs}
        await until(lambda: wanted <= {*first.jobs("ended"), *second.jobs("ended")})
        await until_empty(url)
        assert await first.stop() == 0
        assert await second.stop() == 0

    assert overlaps((first, second)) == []
    begun = Counter([*first.jobs("begun"), *second.jobs("begun")])
    for job in WARM:
        del begun[job.id]
    assert set(begun) == wanted
    assert set(begun.values()) == {1, 2}
    assert min(len(first.said), len(second.said)) > 1000
    assert first.errors + second.errors == b""
    assert await count_rows(url, "pgqueuer_log") == 0


# The schema


async def test_the_schema_is_made_once_by_two_at_once_and_keeps_its_jobs(
    postgres_url: str,
) -> None:
    await asyncio.gather(*(install_queue(postgres_url) for _ in range(4)))
    async with open_engine(postgres_url) as engine:
        await engine.enqueue(MANY)
        await install_queue(postgres_url)
        hands = Hands(engine)
        async with running(engine):
            await hands.until_done(*MANY)


async def test_a_schema_that_is_there_is_looked_at_beside_a_transaction_that_enqueues(
    url: str, engine: PostgresEngine, transaction: Transaction
) -> None:
    async with transaction() as connection:
        await engine.enqueue(MANY, connection=connection)
        async with asyncio.timeout(5):
            await install_queue(url)


async def test_the_schema_is_part_of_the_callers_transaction(postgres_url: str) -> None:
    connection = await asyncpg.connect(postgres_url)
    with pytest.raises(Regret):
        async with connection.transaction():
            await install(connection)
            raise Regret
    found = await connection.fetchval(
        "SELECT count(*) FROM pg_namespace WHERE nspname = $1", SCHEMA
    )
    await connection.close()

    assert found == 0


async def test_nothing_is_made_outside_its_schema(url: str) -> None:
    connection = await asyncpg.connect(url)
    schemas = await connection.fetch(
        "SELECT DISTINCT relnamespace::regnamespace::text FROM pg_class WHERE oid >= 16384"
        " AND relnamespace::regnamespace::text NOT LIKE 'pg_toast%'"
    )
    await connection.close()

    assert [name for (name,) in schemas] == [SCHEMA]


async def test_the_engine_says_how_to_make_a_schema_that_is_not_there(
    postgres_url: str,
) -> None:
    async with open_engine(postgres_url) as engine:
        with pytest.raises(InvalidSettings, match="penstock migrate"):
            await engine.run()


async def test_jobs_are_refused_on_a_connection_without_a_transaction(
    url: str, engine: PostgresEngine
) -> None:
    connection = await asyncpg.connect(url)
    with pytest.raises(ValueError, match="No transaction is open"):
        await engine.enqueue(MANY, connection=connection)
    await connection.close()

    assert await count_rows(url) == 0
