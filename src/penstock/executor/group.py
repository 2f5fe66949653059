"""Group commit: many callers wait for one transaction."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import structlog

from penstock.errors import StorageUnavailable
from penstock.telemetry import Health

_log = structlog.get_logger()

T = TypeVar("T")
R = TypeVar("R")

_AGAIN_S = 1.0


class GroupCommit(Generic[T, R]):
    """Collects items while a transaction runs and gives all of them to the next one.

    A database that takes no writes for now is waited for: the items stay, the fault is
    noted as `database`, and it is tried again every second.

    Args:
        commit: The transaction. Returns one result for each item, in order.
        most: How many items one transaction takes at most.
    """

    def __init__(
        self,
        commit: Callable[[list[T]], Awaitable[list[R]]],
        *,
        health: Health,
        most: int = 128,
    ) -> None:
        self._commit = commit
        self._health = health
        self._most = most
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._wake = asyncio.Event()

    def submit(self, item: T) -> asyncio.Future[R]:
        """Take part in the next transaction, after all that was submitted before.

        Returns:
            Its result, once that transaction has ended.
        """
        done: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, done))
        self._wake.set()
        return done

    async def run(self) -> None:
        """Commit until cancelled."""
        while True:
            await self._wake.wait()
            group, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
            if not self._waiting:
                self._wake.clear()
            try:
                results = await self._commit([item for item, _ in group])
            except StorageUnavailable as error:
                if self._health.fail("database", str(error)):
                    _log.error("The database takes no writes; trying again.", error=str(error))
                self._waiting = group + self._waiting
                self._wake.set()
                await asyncio.sleep(_AGAIN_S)
                continue
            except Exception as error:
                for _, done in group:
                    if not done.done():
                        done.set_exception(error)
                continue
            if self._health.recover("database"):
                _log.info("The database takes writes again.")
            for (_, done), result in zip(group, results, strict=True):
                if not done.done():
                    done.set_result(result)
