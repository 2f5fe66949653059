"""How workers share an upstream: fairly, and never more than there is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from penstock.shares import NOTHING, Claim, Decision, Part, decide_part, fair_parts

LEASE_S = 10.0
NOON = 1_750_000_000.0


def wanting(**demands: int) -> list[Claim]:
    return [Claim(worker_id=name, demand=demand) for name, demand in demands.items()]


class Table:
    """The leases of one upstream, as a store keeps them."""

    def __init__(self, whole: Part) -> None:
        self.whole = whole
        self.rows: dict[str, tuple[Claim, float]] = {}

    def renew(self, name: str, *, demand: int, in_flight: int = 0, now: float = NOON) -> Part:
        self.rows = {key: row for key, row in self.rows.items() if row[1] > now}
        held = self.rows[name][0].holds if name in self.rows else NOTHING
        mine = Claim(worker_id=name, demand=demand, holds=held)
        others = [row[0] for key, row in self.rows.items() if key != name]
        made = decide_part(self.whole, mine, others, in_flight=in_flight, now=now)
        self.rows[name] = (replace(mine, holds=made.holds), now + LEASE_S)
        return made.part

    def settle(self, demands: Mapping[str, int], *, now: float = NOON) -> dict[str, Part]:
        """Renew all, often enough that nothing changes any more."""
        for _ in range(3):
            parts = {
                name: self.renew(name, demand=demand, now=now)
                for name, demand in demands.items()
            }
        return parts


def concurrency(parts: Mapping[str, Part]) -> dict[str, int]:
    return {name: part.concurrency for name, part in parts.items()}


def test_one_alone_gets_all_that_it_can_use() -> None:
    table = Table(Part(concurrency=100, requests_per_minute=60, tokens_per_minute=600))

    part = table.renew("a", demand=500)

    assert part == table.whole


@pytest.mark.parametrize(
    ("demands", "parts"),
    [
        ({"a": 500, "b": 500}, {"a": 50, "b": 50}),
        ({"a": 20, "b": 500}, {"a": 20, "b": 80}),
        ({"a": 20, "b": 500, "c": 30}, {"a": 20, "b": 50, "c": 30}),
        ({"a": 500, "b": 500, "c": 500}, {"a": 34, "b": 33, "c": 33}),
        ({"a": 10, "b": 20}, {"a": 10, "b": 20}),
        ({"a": 0, "b": 500}, {"a": 3, "b": 97}),
        ({"a": 0, "b": 0}, {"a": 3, "b": 3}),
    ],
)
def test_each_gets_what_it_can_use_or_as_much_as_any_other(
    demands: dict[str, int], parts: dict[str, int]
) -> None:
    assert concurrency(Table(Part(concurrency=100)).settle(demands)) == parts


@given(
    whole=st.integers(1, 500),
    demands=st.lists(st.integers(0, 600), min_size=1, max_size=12),
    turn=st.integers(0, 50),
)
def test_all_that_is_wanted_is_shared_out_and_evenly(
    whole: int, demands: list[int], turn: int
) -> None:
    claims = [Claim(worker_id=f"w{n}", demand=demand) for n, demand in enumerate(demands)]

    parts = fair_parts(whole, claims, turn=turn)

    reserve = whole // (16 * len(claims))
    wants = {each.worker_id: max(each.demand, reserve) for each in claims}
    assert sum(parts.values()) == min(sum(wants.values()), whole)
    assert all(parts[name] <= wants[name] for name in parts)
    short = [parts[name] for name in parts if parts[name] < wants[name]]
    assert all(max(parts.values()) - part <= 1 for part in short)


def test_where_there_is_not_one_for_each_everybody_has_a_turn() -> None:
    claims = wanting(**{f"w{n}": 9 for n in range(5)})

    turns = [fair_parts(2, claims, turn=turn) for turn in range(60)]

    assert all(sorted(parts.values()) == [0, 0, 0, 1, 1] for parts in turns)
    had = {name: sum(parts[name] for parts in turns) for name in turns[0]}
    assert min(had.values()) >= 12


def test_a_newcomer_waits_for_what_others_hold() -> None:
    table = Table(Part(concurrency=10))
    assert table.renew("a", demand=50).concurrency == 10

    assert table.renew("b", demand=50).concurrency == 0
    assert table.renew("a", demand=50).concurrency == 5
    assert table.renew("b", demand=50).concurrency == 5


def test_what_is_in_flight_is_kept_from_others_until_it_ends() -> None:
    table = Table(Part(concurrency=10))
    table.renew("a", demand=50)
    table.renew("b", demand=50)

    assert table.renew("a", demand=50, in_flight=8).concurrency == 5
    assert table.renew("b", demand=50).concurrency == 2
    assert table.renew("a", demand=50, in_flight=5).concurrency == 5
    assert table.renew("b", demand=50).concurrency == 5


def test_who_had_no_work_begins_at_once_although_another_has_much() -> None:
    table = Table(Part(concurrency=64, requests_per_minute=600))
    table.settle({"idle": 0, "busy": 500})

    part = table.renew("idle", demand=50)

    assert part.concurrency == 2
    assert part.requests_per_minute == pytest.approx(600 / 32)
    assert table.settle({"idle": 50, "busy": 500})["idle"].concurrency == 32


def test_the_part_of_a_dead_worker_comes_back_with_the_end_of_its_lease() -> None:
    table = Table(Part(concurrency=10, tokens_per_minute=100))
    table.settle({"dead": 50, "b": 50})

    assert table.renew("b", demand=50, now=NOON + LEASE_S - 0.1).concurrency == 5
    assert table.renew("b", demand=50, now=NOON + LEASE_S) == table.whole


def test_who_comes_back_after_its_lease_holds_nothing() -> None:
    table = Table(Part(concurrency=10))
    table.renew("a", demand=50)
    table.renew("b", demand=50, now=NOON + LEASE_S)

    assert table.renew("a", demand=50, in_flight=10, now=NOON + LEASE_S).concurrency == 0


@pytest.mark.parametrize("field", ["requests_per_minute", "tokens_per_minute"])
def test_rates_go_with_the_concurrency_and_to_those_who_have_work(field: str) -> None:
    table = Table(Part(concurrency=100, **{field: 960.0}))

    parts = table.settle({"idle": 0, "small": 25, "large": 500})

    rates = {name: getattr(part, field) for name, part in parts.items()}
    assert rates["idle"] == pytest.approx(20)
    assert rates["small"] == pytest.approx(940 * 25 / 98)
    assert sum(rates.values()) == pytest.approx(960)


def test_without_a_rate_there_is_no_part() -> None:
    """A rate of 0 would be none."""
    table = Table(Part(concurrency=100, requests_per_minute=60))
    table.renew("a", demand=3)

    assert table.renew("b", demand=3) == NOTHING
    table.renew("a", demand=3)
    assert table.renew("b", demand=3) == Part(concurrency=3, requests_per_minute=30)


def test_a_lower_cap_holds_from_the_next_renewals() -> None:
    table = Table(Part(concurrency=100))
    table.settle({"a": 500, "b": 500})
    table.whole = Part(concurrency=10)

    assert table.renew("a", demand=500).concurrency == 0
    assert table.renew("b", demand=500).concurrency == 5
    assert table.renew("a", demand=500).concurrency == 5


# Whatever happens in whatever order


@dataclass
class Simulated:
    """A worker that does as its parts say."""

    name: str
    bound: int = 0
    in_flight: int = 0
    until: float = 0.0


class Sharing(RuleBasedStateMachine):
    """Workers that renew, work, die and come back, over a clock that goes and jumps."""

    names = st.sampled_from(["a", "b", "c", "d"])

    def __init__(self) -> None:
        super().__init__()
        self.table = Table(Part(concurrency=12, requests_per_minute=90, tokens_per_minute=1000))
        self.now = NOON
        self.workers = {name: Simulated(name) for name in "abcd"}

    @rule(name=names, demand=st.integers(0, 20))
    def renew(self, name: str, demand: int) -> None:
        worker = self.workers[name]
        in_flight = min(worker.in_flight, demand)
        worker.in_flight = in_flight
        part = self.table.renew(name, demand=demand, in_flight=in_flight, now=self.now)
        assert (part.requests_per_minute > 0) == (part.concurrency > 0)
        assert (part.tokens_per_minute > 0) == (part.concurrency > 0)
        worker.bound = part.concurrency
        worker.until = self.now + LEASE_S

    @rule(name=names)
    def send_all(self, name: str) -> None:
        worker = self.workers[name]
        if self.now < worker.until:
            worker.in_flight = max(worker.in_flight, worker.bound)

    @rule(name=names, count=st.integers(1, 12))
    def end_some(self, name: str, count: int) -> None:
        worker = self.workers[name]
        worker.in_flight = max(worker.in_flight - count, 0)

    @rule(name=names)
    def die(self, name: str) -> None:
        self.workers[name] = Simulated(name)

    @rule(seconds=st.floats(0, 12))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for worker in self.workers.values():
            if self.now >= worker.until:
                worker.in_flight = 0  # requests end before a lease does

    @invariant()
    def leases_never_add_up_to_more_than_the_whole(self) -> None:
        held = [row[0].holds for row in self.table.rows.values()]
        whole = self.table.whole
        assert sum(each.concurrency for each in held) <= whole.concurrency
        for field in ("requests_per_minute", "tokens_per_minute"):
            total = math.fsum(getattr(each, field) for each in held)
            assert total <= getattr(whole, field) * (1 + 1e-9)

    @invariant()
    def no_more_are_in_flight_than_the_upstream_may_have(self) -> None:
        in_flight = sum(worker.in_flight for worker in self.workers.values())
        assert in_flight <= self.table.whole.concurrency


TestSharing = Sharing.TestCase


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.integers(0, 30),
            st.integers(0, 30),
            st.floats(-120, 120),
        ),
        max_size=60,
    )
)
def test_a_clock_that_is_set_forward_or_back_makes_no_more_of_it(
    steps: Sequence[tuple[str, int, int, float]],
) -> None:
    table, now = Table(Part(concurrency=10, tokens_per_minute=100)), NOON
    for name, demand, in_flight, step in steps:
        now += step
        table.renew(name, demand=demand, in_flight=in_flight, now=now)

        held = [row[0].holds for row in table.rows.values()]
        assert sum(each.concurrency for each in held) <= 10
        assert math.fsum(each.tokens_per_minute for each in held) <= 100 * (1 + 1e-9)


@given(
    whole=st.integers(1, 50),
    demands=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    order=st.permutations(range(6)),
)
def test_after_two_renewals_each_has_what_is_fair(
    whole: int, demands: list[int], order: list[int]
) -> None:
    table = Table(Part(concurrency=whole))
    table.renew("w0", demand=500)
    names = [f"w{n}" for n in order if n < len(demands)]

    for name in (*names, *names, *names):
        table.renew(name, demand=demands[int(name[1:])])

    claims = [row[0] for row in table.rows.values()]
    fair = fair_parts(whole, claims, turn=int(NOON / 10))
    assert {name: row[0].holds.concurrency for name, row in table.rows.items()} == fair


def test_a_decision_says_what_is_used_and_what_is_kept() -> None:
    others = [Claim(worker_id="b", demand=50, holds=Part(concurrency=2))]
    mine = Claim(worker_id="a", demand=50, holds=Part(concurrency=8))

    decision = decide_part(Part(concurrency=10), mine, others, in_flight=7, now=NOON)

    assert decision == Decision(part=Part(concurrency=5), holds=Part(concurrency=7))
