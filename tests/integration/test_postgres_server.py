"""The PostgreSQL that tests use is one: what they do to it happens."""

import asyncio
from pathlib import Path

import asyncpg
import pytest

from tests.postgres import Database, PostgresServer


async def test_each_test_has_a_database_of_its_own(
    postgres: Database, postgres_url: str
) -> None:
    postgres.execute("CREATE TABLE t (n int)", database=postgres_url.rsplit("/", 1)[1])
    other = postgres.make_database()
    try:
        connection = await asyncpg.connect(other)
        with pytest.raises(asyncpg.UndefinedTableError):
            await connection.execute("SELECT n FROM t")
        await connection.close()
    finally:
        postgres.drop_database(other)


async def test_a_server_stalls_stops_and_comes_back(own_postgres: PostgresServer) -> None:
    connection = await asyncpg.connect(own_postgres.url)

    own_postgres.pause()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(connection.fetchval("SELECT 1")), 0.3)
    own_postgres.resume()
    await asyncio.sleep(0.2)

    own_postgres.stop(immediate=True)
    connection.terminate()
    with pytest.raises(OSError):
        await asyncpg.connect(own_postgres.url)
    own_postgres.start()
    connection = await asyncpg.connect(own_postgres.url)
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()


def test_nothing_is_left_of_a_server(own_postgres: PostgresServer) -> None:
    pid = own_postgres.pid
    assert Path(f"/proc/{pid}").exists()

    own_postgres.close()

    assert not Path(f"/proc/{pid}").exists()
