"""Which upstream takes a line, if any does now."""

from collections import Counter

import pytest

from penstock.executor.admission import (
    Admission,
    AdmissionPolicy,
    Hindrance,
    Verdict,
    choose,
)
from penstock.executor.circuit import CircuitPolicy
from penstock.executor.limits import ConcurrencyPolicy, Limiter
from penstock.shares import Part
from penstock.upstream.base import EngineLoad, Failure, Reply

BODY = b'{"max_tokens":100}'
GOOD = Reply(status_code=200, input_tokens=10, output_tokens=5, total_tokens=15)
DOWN = Reply(failure=Failure.UNREACHABLE)


class Nowhere:
    """An upstream that is never asked."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.max_concurrency = 1000

    async def send(self, endpoint: str, body: bytes) -> Reply:
        raise NotImplementedError

    async def list_models(self) -> list[str]:
        raise NotImplementedError

    async def read_load(self) -> EngineLoad | None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


def admission(name: str = "a", *, most: int = 10, weight: int = 1, **rest: int) -> Admission:
    return Admission(
        Nowhere(name),
        AdmissionPolicy(
            concurrency=ConcurrencyPolicy(most=most, initial=most),
            circuits=CircuitPolicy(failures=2, quiet_s=0),
            weight=weight,
            **rest,
        ),
    )


def exchange(
    each: Admission, reply: Reply, now: float = 0.0, *, sent_at: float | None = None
) -> None:
    ticket = each.take("m", BODY, now if sent_at is None else sent_at)
    each.note(ticket, "m", BODY, reply, now, jitter=0)


def test_it_takes_as_many_as_its_limit() -> None:
    one = admission(most=2)
    tickets = [one.take("m", BODY, 0) for _ in range(2)]

    assert one.look("m", 0) is Verdict.WAIT
    assert one.hindrance(0) is Limiter.SETTING
    one.note(tickets[0], "m", BODY, GOOD, 1, jitter=0)
    assert one.look("m", 1) is Verdict.SEND
    one.forget(tickets[1], "m")
    assert one.in_flight == 0


def test_it_takes_no_more_than_its_limit_below_what_the_settings_allow() -> None:
    one = admission(most=4)
    one.limit.current = 2
    for _ in range(2):
        assert one.look("m", 0) is Verdict.SEND
        one.take("m", BODY, 0)

    assert one.look("m", 0) is Verdict.WAIT


def test_the_whole_upstream_is_left_alone_for_as_long_as_it_asks() -> None:
    one = admission()
    exchange(one, Reply(status_code=429, retry_after_s=5))

    assert one.look("m", 4.9) is Verdict.WAIT
    assert one.look("other", 4.9) is Verdict.WAIT
    assert one.ready_at() == 5
    assert one.hindrance(1) is Hindrance.RETRY_AFTER
    assert one.look("m", 5) is Verdict.SEND


def test_no_upstream_may_ask_for_more_than_a_minute() -> None:
    one = admission()
    exchange(one, Reply(status_code=503, retry_after_s=3600))

    assert one.ready_at() == 60


@pytest.mark.parametrize(
    ("reply", "is_free"),
    [
        (Reply(status_code=429, retry_after_s=1), True),
        (Reply(status_code=503, retry_after_s=1), True),
        (Reply(status_code=429), False),
        (Reply(status_code=429, retry_after_s=0), False),
        (Reply(status_code=500, retry_after_s=1), False),
        (DOWN, False),
    ],
)
def test_which_attempts_do_not_count(reply: Reply, is_free: bool) -> None:
    one = admission()
    ticket = one.take("m", BODY, 0)

    assert one.note(ticket, "m", BODY, reply, 0, jitter=0).is_free is is_free


def test_a_probe_that_fails_does_not_count() -> None:
    one = admission()
    exchange(one, DOWN)
    exchange(one, DOWN)
    assert one.look("m", 0.5) is Verdict.PARK
    assert one.look("other", 0.5) is Verdict.SEND
    assert one.hindrance(0.5) is Hindrance.CIRCUIT

    assert one.look("m", 1) is Verdict.PROBE
    ticket = one.take("m", BODY, 1)
    assert ticket.is_probe
    assert one.look("m", 1) is Verdict.PARK
    assert one.note(ticket, "m", BODY, DOWN, 1, jitter=0).is_free
    assert one.probe_at("m") == 3


@pytest.mark.parametrize(
    "reply",
    [
        Reply(status_code=429),
        Reply(status_code=503),
        Reply(status_code=529),
        Reply(failure=Failure.TIMEOUT),
    ],
)
def test_a_refusal_halves_its_limit(reply: Reply) -> None:
    one = admission(most=10)
    for _ in range(8):
        exchange(one, reply, 1)

    assert one.limit.current == 5


def test_requests_a_minute_are_kept() -> None:
    one = admission(requests_per_minute=60)

    one.take("m", BODY, 0)
    assert one.look("m", 0.5) is Verdict.WAIT
    assert one.hindrance(0.5) is Hindrance.RATE
    assert one.ready_at() == 1
    assert one.look("m", 1) is Verdict.SEND


def test_tokens_a_minute_are_estimated_before_and_corrected_after() -> None:
    one = admission(tokens_per_minute=6000)  # 100 a second

    ticket = one.take("m", BODY, 0)
    assert ticket.tokens == len(BODY) // 4 + 100
    one.note(ticket, "m", BODY, GOOD, 0, jitter=0)
    assert one.look("m", 0) is Verdict.SEND  # it took 15 only
    one.take("m", BODY, 0)
    one.take("m", BODY, 0)
    one.take("m", BODY, 0)
    one.take("m", BODY, 0)
    one.take("m", BODY, 0)
    one.take("m", BODY, 0)
    assert one.look("m", 0) is Verdict.WAIT


def test_a_line_that_was_refused_has_cost_no_tokens() -> None:
    one = admission(tokens_per_minute=6000)
    exchange(one, Reply(status_code=500))

    assert one.look("m", 0) is Verdict.SEND


# Several upstreams


def test_lines_are_shared_by_weight() -> None:
    light, heavy = admission("light", most=100), admission("heavy", most=100, weight=3)
    taken: Counter[str] = Counter()
    for _ in range(40):
        _, chosen = choose([light, heavy], "m", 0)
        assert chosen is not None
        chosen.take("m", BODY, 0)
        taken[chosen.upstream.name] += 1

    assert taken == {"light": 10, "heavy": 30}


def test_one_that_is_full_is_passed_by() -> None:
    small, large = admission("small", most=1), admission("large")
    small.take("m", BODY, 0)
    for _ in range(3):
        large.take("m", BODY, 0)

    assert choose([small, large], "m", 0) == (Verdict.SEND, large)


def test_a_line_that_failed_at_one_goes_to_another() -> None:
    one, other = admission("one"), admission("other")
    other.take("m", BODY, 0)

    assert choose([one, other], "m", 0) == (Verdict.SEND, one)
    assert choose([one, other], "m", 0, avoid=one) == (Verdict.SEND, other)
    assert choose([one], "m", 0, avoid=one) == (Verdict.SEND, one)


def test_one_that_is_down_is_passed_by_but_for_probes() -> None:
    down, up = admission("down"), admission("up")
    exchange(down, DOWN)
    exchange(down, DOWN)
    up.take("m", BODY, 0)

    assert choose([down, up], "m", 0.5) == (Verdict.SEND, up)
    assert choose([down, up], "m", 1) == (Verdict.PROBE, down)


def test_a_line_waits_if_none_takes_it_and_is_parked_if_all_are_down() -> None:
    down, full = admission("down"), admission("full", most=1)
    exchange(down, DOWN)
    exchange(down, DOWN)
    full.take("m", BODY, 0)

    assert choose([down, full], "m", 0.5) == (Verdict.WAIT, None)
    assert choose([down], "m", 0.5) == (Verdict.PARK, None)


# A part of an upstream that is shared


def shared(*, most: int = 10, **rest: int) -> Admission:
    policy = AdmissionPolicy(
        concurrency=ConcurrencyPolicy(most=most, initial=most), is_shared=True, **rest
    )
    return Admission(Nowhere("a"), policy)


def give(one: Admission, concurrency: int, now: float = 0.0, **rates: float) -> None:
    part = Part(concurrency=concurrency, **rates)
    one.take_part(part, now, asked_at=now, until=now + 8)


def test_what_is_shared_sends_nothing_without_a_part() -> None:
    one = shared()

    assert one.look("m", 0) is Verdict.WAIT
    assert one.hindrance(0) is Hindrance.LEASE
    give(one, 2)
    assert one.look("m", 0) is Verdict.SEND


def test_it_sends_no_more_than_its_part_and_nothing_after_its_lease() -> None:
    one = shared()
    give(one, 2)
    one.take("m", BODY, 0)
    assert one.look("m", 7.9) is Verdict.SEND
    assert one.look("m", 8) is Verdict.WAIT
    one.take("m", BODY, 0)

    assert one.look("m", 1) is Verdict.WAIT
    assert one.hindrance(1) is Limiter.SHARE


def test_while_it_asks_for_a_part_it_sends_no_more_than_it_has() -> None:
    one = shared()
    give(one, 5)
    ticket = one.take("m", BODY, 0)

    assert one.freeze() == 1
    assert one.look("m", 1) is Verdict.WAIT
    one.forget(ticket, "m")
    assert one.look("m", 1) is Verdict.SEND
    assert one.freeze() == 0
    assert one.look("m", 1) is Verdict.WAIT
    give(one, 5, 1)
    assert one.look("m", 1) is Verdict.SEND


def test_its_rates_are_those_of_its_part() -> None:
    one = shared(requests_per_minute=600)
    give(one, 5, requests_per_minute=60)
    assert one.look("m", 0) is Verdict.SEND
    one.take("m", BODY, 0)
    assert one.look("m", 0.9) is Verdict.WAIT
    give(one, 5, 0.9, requests_per_minute=600)

    assert one.ready_at() == pytest.approx(0.91)


def test_it_wants_what_waits_and_what_it_has_up_to_what_its_limit_would_allow() -> None:
    one = shared(most=10)
    give(one, 2)
    one.take("m", BODY, 0)

    assert one.demand(3) == 4
    assert one.demand(300) == 10


def test_it_is_held_by_what_others_were_told_but_for_a_minute_at_most() -> None:
    one = shared()
    give(one, 5)
    one.hear(0, refused_at=None, held_until=5)
    assert one.look("m", 4.9) is Verdict.WAIT
    assert one.held_until == 5
    one.hear(0, refused_at=None, held_until=3600)
    assert one.held_until == 60

    one.hear(0, refused_at=0, held_until=None)
    assert one.limit.current == 2
