"""The contract kit of the budgets that workers lease.

Inherit from `BudgetContract` beside `StoreContract`, whose fixtures it uses.
"""

import asyncio
from collections import Counter
from itertools import chain

import pytest

from penstock.store.base import Budget, BudgetRequest, Store
from penstock.testing.store import ALICE, BOB, NOON

LEASE_S = 10.0
CAROL = "carol"


def ask(
    demand: int = 100,
    *,
    upstream: str = "gpu",
    most: int = 64,
    in_flight: int = 0,
    requests_per_minute: int = 0,
    tokens_per_minute: int = 0,
    refused_at: float | None = None,
    held_until: float | None = None,
) -> BudgetRequest:
    return BudgetRequest(
        upstream=upstream,
        max_concurrency=most,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        demand=demand,
        in_flight=in_flight,
        refused_at=refused_at,
        held_until=held_until,
    )


async def renew(
    store: Store, worker_id: str, request: BudgetRequest, *, now: float = NOON
) -> Budget:
    [budget] = await store.lease_budgets(worker_id, [request], lease_s=LEASE_S, now=now)
    return budget


class BudgetContract:
    """Inherit, beside `StoreContract`."""

    async def test_one_worker_alone_gets_the_whole_upstream(self, store: Store) -> None:
        budget = await renew(store, ALICE, ask(requests_per_minute=600, tokens_per_minute=9000))

        assert budget == Budget(
            upstream="gpu",
            concurrency=64,
            requests_per_minute=600,
            tokens_per_minute=9000,
            refused_at=None,
            held_until=None,
        )

    async def test_a_second_worker_waits_until_the_first_has_renewed(
        self, store: Store
    ) -> None:
        await renew(store, ALICE, ask())

        assert (await renew(store, BOB, ask())).concurrency == 0
        assert (await renew(store, ALICE, ask())).concurrency == 32
        assert (await renew(store, BOB, ask())).concurrency == 32

    async def test_what_is_in_flight_is_kept_until_it_has_ended(self, store: Store) -> None:
        await renew(store, ALICE, ask())
        await renew(store, BOB, ask())

        assert (await renew(store, ALICE, ask(in_flight=60))).concurrency == 32
        assert (await renew(store, BOB, ask())).concurrency == 4
        assert (await renew(store, ALICE, ask(in_flight=32))).concurrency == 32
        assert (await renew(store, BOB, ask())).concurrency == 32

    async def test_what_a_worker_cannot_use_is_another_s(self, store: Store) -> None:
        await renew(store, ALICE, ask(demand=10))

        assert (await renew(store, BOB, ask())).concurrency == 54

    async def test_rates_are_shared_like_the_concurrency(self, store: Store) -> None:
        small, large = ask(demand=16, requests_per_minute=600), ask(requests_per_minute=600)
        await renew(store, ALICE, small)
        await renew(store, BOB, large)
        alice = await renew(store, ALICE, small)
        bob = await renew(store, BOB, large)

        assert alice.requests_per_minute == pytest.approx(150)
        assert bob.requests_per_minute == pytest.approx(450)
        assert alice.tokens_per_minute == 0

    async def test_a_dead_worker_s_part_is_free_when_its_lease_has_ended(
        self, store: Store
    ) -> None:
        await renew(store, ALICE, ask())

        early = await renew(store, BOB, ask(), now=NOON + LEASE_S - 0.1)
        late = await renew(store, BOB, ask(), now=NOON + LEASE_S)

        assert (early.concurrency, late.concurrency) == (0, 64)

    async def test_a_lease_that_has_ended_stays_ended_though_the_clock_is_set_back(
        self, store: Store
    ) -> None:
        await renew(store, ALICE, ask())
        await renew(store, BOB, ask(), now=NOON + LEASE_S)

        alice = await renew(store, ALICE, ask(in_flight=64), now=NOON + 1)

        assert alice.concurrency == 0

    async def test_a_renewal_extends_the_lease(self, store: Store) -> None:
        await renew(store, ALICE, ask())
        await renew(store, ALICE, ask(), now=NOON + 9)

        assert (await renew(store, BOB, ask(), now=NOON + 18)).concurrency == 0

    async def test_upstreams_are_shared_each_by_itself_and_answered_in_order(
        self, store: Store
    ) -> None:
        await renew(store, ALICE, ask(upstream="gpu"))

        budgets = await store.lease_budgets(
            BOB,
            [ask(upstream="zoo", most=3), ask(upstream="gpu"), ask(upstream="api", most=5)],
            lease_s=LEASE_S,
            now=NOON,
        )

        assert [(each.upstream, each.concurrency) for each in budgets] == [
            ("zoo", 3),
            ("gpu", 0),
            ("api", 5),
        ]

    async def test_who_asks_for_nothing_gets_nothing(self, store: Store) -> None:
        assert await store.lease_budgets(ALICE, [], lease_s=LEASE_S, now=NOON) == []

    async def test_all_hear_of_the_latest_refusal_and_the_longest_hold(
        self, store: Store
    ) -> None:
        await renew(store, ALICE, ask(refused_at=NOON - 5, held_until=NOON + 30))
        await renew(store, BOB, ask(refused_at=NOON - 2, held_until=NOON + 20))
        await renew(store, ALICE, ask(refused_at=NOON - 9))

        budget = await renew(store, CAROL, ask())

        assert (budget.refused_at, budget.held_until) == (NOON - 2, NOON + 30)

    async def test_workers_that_ask_at_once_never_get_more_than_there_is(
        self, store: Store
    ) -> None:
        names = ["api", "gpu", "zoo"]

        async def ask_all(number: int, now: float) -> list[Budget]:
            asked = [ask(upstream=name, most=20) for name in names[:: (-1) ** number]]
            return await store.lease_budgets(
                f"worker-{number}", asked, lease_s=LEASE_S, now=now
            )

        parts: Counter[str] = Counter()
        for now in (NOON, NOON + 1, NOON + 2, NOON + 3):
            answers = await asyncio.gather(*(ask_all(number, now) for number in range(8)))
            parts = Counter[str]()
            for each in chain.from_iterable(answers):
                parts[each.upstream] += each.concurrency
            assert max(parts.values()) <= 20

        assert parts == dict.fromkeys(names, 20)
