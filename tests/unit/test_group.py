"""Group commit: who takes part in which transaction, and what each one gets back."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from penstock.errors import StorageUnavailable
from penstock.executor.group import GroupCommit
from penstock.telemetry import Health


class Database:
    """Takes transactions, unless it is told to fail."""

    def __init__(self) -> None:
        self.transactions: list[list[str]] = []
        self.fail: Callable[[], Exception | None] = lambda: None
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def commit(self, items: list[str]) -> list[str]:
        if error := self.fail():
            raise error
        self.transactions.append(items)
        await self.may_end.wait()
        return [f"{item} is kept" for item in items]


@pytest.fixture
def health() -> Health:
    return Health()


@pytest.fixture
async def database() -> Database:
    return Database()


@pytest.fixture
async def group(database: Database, health: Health) -> GroupCommit[str, str]:
    return GroupCommit(database.commit, health=health, most=3)


@asynccontextmanager
async def running(group: GroupCommit[str, str]) -> AsyncIterator[None]:
    task = asyncio.create_task(group.run())
    try:
        async with asyncio.timeout(10):
            yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_each_item_gets_its_own_result(group: GroupCommit[str, str]) -> None:
    async with running(group):
        results = await asyncio.gather(*(group.submit(item) for item in "abcdefg"))

    assert results == [f"{item} is kept" for item in "abcdefg"]


async def test_items_that_come_during_a_transaction_share_the_next_one(
    group: GroupCommit[str, str], database: Database
) -> None:
    database.may_end.clear()
    async with running(group):
        first = asyncio.ensure_future(group.submit("a"))
        while not database.transactions:
            await asyncio.sleep(0)
        others = [asyncio.ensure_future(group.submit(item)) for item in "bcde"]
        await asyncio.sleep(0)
        database.may_end.set()
        await asyncio.gather(first, *others)

    assert database.transactions == [["a"], ["b", "c", "d"], ["e"]]


async def test_items_take_part_in_the_order_of_the_calls(
    group: GroupCommit[str, str], database: Database
) -> None:
    first, second = group.submit("a"), group.submit("b")
    async with running(group):
        await asyncio.gather(second, first)

    assert database.transactions == [["a", "b"]]


async def test_a_database_that_takes_nothing_is_waited_for(
    group: GroupCommit[str, str], database: Database, health: Health
) -> None:
    failures = iter([StorageUnavailable("The database is full.")])
    seen: list[dict[str, str]] = []

    def fail() -> Exception | None:
        seen.append(health.faults())
        return next(failures, None)

    database.fail = fail
    async with running(group):
        results = await asyncio.gather(group.submit("a"), group.submit("b"))

    assert results == ["a is kept", "b is kept"]
    assert database.transactions == [["a", "b"]]
    assert seen == [{}, {"database": "The database is full."}]
    assert health.faults() == {}


async def test_a_mistake_is_told_to_those_who_took_part_and_to_no_others(
    group: GroupCommit[str, str], database: Database
) -> None:
    failures = iter([ValueError("A mistake.")])
    database.fail = lambda: next(failures, None)
    async with running(group):
        with pytest.raises(ValueError, match="A mistake"):
            await group.submit("a")

        assert await group.submit("b") == "b is kept"


async def test_who_gives_up_waiting_does_not_disturb_the_others(
    group: GroupCommit[str, str],
) -> None:
    gone = asyncio.ensure_future(group.submit("a"))
    other = asyncio.ensure_future(group.submit("b"))
    await asyncio.sleep(0)
    gone.cancel()
    async with running(group):
        assert await other == "b is kept"
