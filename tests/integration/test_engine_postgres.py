"""PgQueuer on a real PostgreSQL as the engine."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

from penstock.engine.postgres import PostgresEngine
from penstock.engine.postgres_queue import install
from penstock.model import JobKind
from penstock.testing.engine import EngineContract, SharedEngineContract, Transaction


async def install_queue(url: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await install(connection)
    finally:
        await connection.close()


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


class TestContract(EngineContract):
    """Slices in memory, all else through the database."""


class TestContractAllShared(EngineContract):
    """All through the database."""

    @pytest.fixture
    async def engine(self, url: str) -> AsyncIterator[PostgresEngine]:
        async with open_engine(url, local=frozenset()) as engine:
            yield engine


class TestSharedContract(SharedEngineContract):
    @pytest.fixture
    def transaction(self, url: str) -> Transaction:
        @asynccontextmanager
        async def begin() -> AsyncGenerator[asyncpg.Connection]:
            connection = await asyncpg.connect(url)
            try:
                async with connection.transaction():
                    yield connection
            finally:
                await connection.close()

        return begin
