"""PgQueuer's in-memory form as the engine."""

import asyncio

import pytest

from penstock.engine.memory import MemoryEngine
from penstock.testing.engine import EngineContract


@pytest.fixture
async def engine() -> MemoryEngine:
    return MemoryEngine()


class TestContract(EngineContract):
    pass


async def test_stop_without_run_ends_at_once(engine: MemoryEngine) -> None:
    async with asyncio.timeout(1):
        await engine.stop()
