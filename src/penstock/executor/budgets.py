"""Keeps a worker to its part of each upstream that it shares with others.

Every two seconds, or more rarely among many, it renews its parts, and sooner when a part has
become too small or the upstream has refused something of which the others are to hear. Its
lease is measured by its own monotonic clock from before it asked, so that it stops before
others take over what it had: also if it was stopped itself, or the database is away.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import structlog

from penstock.errors import StorageUnavailable
from penstock.executor.admission import Admission
from penstock.executor.lanes import Lane
from penstock.executor.members import Pace, alone
from penstock.shares import Part
from penstock.store.base import Budget, BudgetRequest, Store
from penstock.telemetry import Health

_log = structlog.get_logger()

LEASE_S = 10.0
RENEW_S = 2.0
_RENEWALS_PER_S = 25.0
"""How often all workers together renew, at most: each holds the upstreams' rows meanwhile."""
_MARGIN = 0.2
"""This part of a lease before its end, nothing more is sent."""
_LOOK_S = 0.05
_FAULT = "budgets"


def is_due(
    *,
    since_s: float,
    demand: int,
    asked: int,
    part: int,
    has_news: bool,
    every_s: float = RENEW_S,
) -> bool:
    """Whether a part is to be renewed.

    Args:
        since_s: How long ago it was.
        every_s: How often it is when nothing happens.
        demand: How many requests could be in flight now.
        asked: How many could when it was renewed.
        part: How many may.
        has_news: Whether others are to hear something.
    """
    has_grown = demand > part and demand >= 2 * asked
    return since_s >= every_s or has_news or has_grown


@dataclass(slots=True, eq=False)
class _Shared:
    """One upstream, and what was asked and told of it."""

    lane: Lane
    door: Admission
    asked_at: float = float("-inf")
    """When it was last asked for a part. Times here are monotonic, but for what is said."""
    unsure_since: float | None = None
    """Since when it is not known what part it has; None if it is."""
    demand: int = 0
    part: int = 0
    saying: tuple[float, float] = (float("-inf"), float("-inf"))
    """When its limit was cut and until when it is held, as it stands in what is asked."""
    told: tuple[float, float] = (float("-inf"), float("-inf"))
    """The same, as the others know it."""
    heard: float | None = None
    """The last refusal that it was told of, in Unix seconds."""

    def is_due(self, now: float, every_s: float) -> bool:
        return is_due(
            since_s=now - self.asked_at,
            every_s=every_s,
            demand=self.door.demand(self.lane.waiting),
            asked=self.demand,
            part=self.part,
            has_news=self.door.limit.cut_at > self.told[0]
            or self.door.held_until > max(self.told[1], now),
        )

    def ask(self, now: float, wall: float) -> BudgetRequest:
        door, policy = self.door, self.door.policy
        in_flight = door.freeze()
        self.asked_at = now
        if self.unsure_since is None:
            self.unsure_since = now
        self.demand = door.demand(self.lane.waiting)
        self.saying = cut_at, hold = door.limit.cut_at, door.held_until
        return BudgetRequest(
            upstream=door.upstream.name,
            max_concurrency=policy.concurrency.most,
            requests_per_minute=policy.requests_per_minute,
            tokens_per_minute=policy.tokens_per_minute,
            demand=self.demand,
            in_flight=in_flight,
            refused_at=wall + cut_at - now if cut_at > self.told[0] else None,
            held_until=wall + hold - now if hold > max(self.told[1], now) else None,
        )

    def take(self, budget: Budget, *, wall_ahead: float, lease_s: float) -> None:
        """Keep to what was answered.

        Args:
            wall_ahead: By how much Unix seconds are ahead of monotonic ones.
        """
        now = time.monotonic()
        part = Part(
            concurrency=budget.concurrency,
            requests_per_minute=budget.requests_per_minute,
            tokens_per_minute=budget.tokens_per_minute,
        )
        since = self.asked_at if self.unsure_since is None else self.unsure_since
        until = self.asked_at + lease_s * (1 - _MARGIN)
        self.door.take_part(part, now, asked_at=since, until=until)
        self.part, self.unsure_since = part.concurrency, None
        is_new = budget.refused_at is not None and budget.refused_at != self.heard
        self.heard = budget.refused_at
        hold = None if budget.held_until is None else budget.held_until - wall_ahead
        self.door.hear(
            now,
            refused_at=(budget.refused_at or 0.0) - wall_ahead if is_new else None,
            held_until=hold,
        )
        self.told = (self.saying[0], max(self.saying[1], hold or self.saying[1]))
        self.lane.start()


class Budgets:
    """Renews a worker's parts.

    Args:
        lanes: The worker's lanes. Their doors must have been made `is_shared`.
        clock: The time by which leases are measured: Unix seconds, the same for all workers.
        lease_s: How long a part is leased; longer by as much as many workers renew more rarely.
        pace: How often each of several workers renews.
    """

    def __init__(
        self,
        *,
        store: Store,
        lanes: Callable[[], Iterable[Lane]],
        worker_id: str,
        health: Health,
        clock: Callable[[], float] = time.time,
        lease_s: float = LEASE_S,
        pace: Pace = alone,
    ) -> None:
        self._store = store
        self._lanes = lanes
        self._worker_id = worker_id
        self._health = health
        self._clock = clock
        self._lease_s = lease_s
        self._pace = pace
        self._shared: dict[str, _Shared] = {}

    async def run(self) -> None:
        """Renew until cancelled. It must go on while the last lines of a worker end."""
        while True:
            now = time.monotonic()
            every_s = self._pace(RENEW_S, _RENEWALS_PER_S)
            due = [each for each in self._find() if each.is_due(now, every_s)]
            if due:
                await self._renew(due, self._lease_s * every_s / RENEW_S)
            await asyncio.sleep(_LOOK_S)

    def _find(self) -> Sequence[_Shared]:
        for lane in self._lanes():
            for door in lane.admissions:
                self._shared.setdefault(door.upstream.name, _Shared(lane, door))
        return list(self._shared.values())

    async def _renew(self, due: Sequence[_Shared], lease_s: float) -> None:
        now, wall = time.monotonic(), self._clock()
        requests = [each.ask(now, wall) for each in due]
        try:
            # No time limit: a renewal that comes late must not come after the next one.
            budgets = await self._store.lease_budgets(
                self._worker_id, requests, lease_s=lease_s, now=wall
            )
        except StorageUnavailable as error:
            if self._health.fail(_FAULT, str(error)):
                _log.warning(
                    "The parts of shared upstreams cannot be renewed; trying again.",
                    error=str(error),
                )
            await asyncio.sleep(RENEW_S / 4)
            return
        if self._health.recover(_FAULT):
            _log.info("The parts of shared upstreams are renewed again.")
        for each, budget in zip(due, budgets, strict=True):
            each.take(budget, wall_ahead=wall - now, lease_s=lease_s)
