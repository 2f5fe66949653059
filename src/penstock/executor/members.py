"""The workers of a cluster, as one of them knows them."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

import structlog

from penstock import clock
from penstock.errors import StorageUnavailable
from penstock.store.base import Store

_log = structlog.get_logger()

Pace = Callable[[float, float], float]
"""Says how long to wait between two rounds of what each worker does, in seconds: at least the
first number, and so long that all workers together do it no more often than the second number
a second."""

_EVERY_S = 2.0
_DEAD_S = 10.0
"""After how long without a sign of life a worker is taken to be gone."""


def share_of(worker_id: str, others: list[str]) -> tuple[int, int]:
    """Which part of each batch a worker begins with, and of how many parts.

    Args:
        others: The workers that live; it may be among them.
    """
    everyone = sorted({worker_id, *others})
    return everyone.index(worker_id), len(everyone)


def alone(least_s: float, most_per_s: float) -> float:
    """The pace of a worker that shares its store with no other."""
    del most_per_s
    return least_s


def pace_of(workers: int, least_s: float, most_per_s: float) -> float:
    """The pace of one of so many workers, as `Pace` says."""
    return max(least_s, workers / most_per_s)


class Members:
    """Says that this worker lives, and knows who else does."""

    def __init__(self, *, store: Store, worker_id: str, version: str) -> None:
        self._store = store
        self._worker_id = worker_id
        self._version = version
        self._share = (0, 1)

    def share(self) -> tuple[int, int]:
        """Which part of each batch this worker begins with, and of how many parts."""
        return self._share

    def pace(self, least_s: float, most_per_s: float) -> float:
        """How long this worker waits between two rounds, as `Pace` says."""
        return pace_of(self._share[1], least_s, most_per_s)

    async def join(self) -> None:
        """Say that it lives, and look who else does.

        Raises:
            StorageUnavailable: The database does not answer.
        """
        now = clock.now()
        await self._store.keep_worker(self._worker_id, version=self._version, now=now)
        others = await self._store.list_workers(seen_after=now - _DEAD_S)
        share = share_of(self._worker_id, others)
        if share[1] != self._share[1]:
            _log.info("The workers of the cluster have changed.", workers=share[1])
        self._share = share

    async def run(self) -> None:
        """Go on saying so until cancelled."""
        while True:
            await asyncio.sleep(_EVERY_S)
            with suppress(StorageUnavailable):  # which others notice and tell
                await self.join()

    async def leave(self) -> None:
        """Say that it is gone."""
        with suppress(StorageUnavailable):
            await self._store.forget_worker(self._worker_id)
