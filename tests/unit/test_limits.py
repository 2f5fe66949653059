"""How many requests go to an upstream at a time, and how many a minute."""

import heapq
import random

import pytest

from penstock.executor.limits import (
    ConcurrencyLimit,
    ConcurrencyPolicy,
    Limiter,
    TokenBucket,
    TokenEstimate,
)
from penstock.upstream.base import EngineLoad


class Engine:
    """Requests in a simulated upstream that works on `slots` of them at a time.

    Args:
        others: How many of the slots somebody else keeps busy.
        service_s: How long a request takes once it has a slot.
        spread: By how much that varies, as a part of it.
        turns_away: With more than this many at once it refuses; None never does.
    """

    def __init__(
        self,
        limit: ConcurrencyLimit,
        *,
        slots: int,
        service_s: float = 1.0,
        spread: float = 0.2,
        turns_away: int | None = None,
        tells_load: bool = False,
    ) -> None:
        self.limit = limit
        self.slots = slots
        self.others = 0
        self._service_s = service_s
        self._spread = spread
        self._turns_away = turns_away
        self._tells_load = tells_load
        self._random = random.Random(7)
        self._events: list[tuple[float, float]] = []
        self._free_at: list[float] = []
        self.now = 100.0
        self.done = 0
        self.refused = 0
        self.highest = 0

    def run(self, seconds: float) -> float:
        """Send as many as the limit allows for a while; how many were done a second."""
        end, done, looked_at = self.now + seconds, self.done, self.now
        while self.now < end:
            while len(self._events) < self.limit.current:
                self._send()
            if self._tells_load and self.now - looked_at >= 0.5:
                looked_at = self.now
                waiting = max(len(self._events) + self.others - self.slots, 0)
                load = EngineLoad(running=self.slots, waiting=waiting)
                self.limit.note_load(load, self.now, in_flight=len(self._events))
            self.now, sent_at = heapq.heappop(self._events)
            in_flight = len(self._events) + 1
            if sent_at < 0:
                self.refused += 1
                self.limit.note_refusal(self.now, sent_at=-sent_at)
            else:
                self.done += 1
                self.limit.note_success(self.now, sent_at=sent_at, work=0, in_flight=in_flight)
        return (self.done - done) / seconds

    def _send(self) -> None:
        if self._turns_away is not None and len(self._events) >= self._turns_away:
            heapq.heappush(self._events, (self.now + 0.05, -self.now))
            return
        free = self.slots - self.others
        self._free_at = sorted(at for at in self._free_at if at > self.now)
        begins = self.now if len(self._free_at) < free else self._free_at[-free]
        takes = self._service_s * self._random.uniform(1 - self._spread, 1 + self._spread)
        ends = begins + takes
        self._free_at.append(ends)
        self.highest = max(self.highest, len(self._events) + 1)
        heapq.heappush(self._events, (ends, self.now))


def limit_of(most: int, *, initial: int = 8, queue_reserve: int = 4) -> ConcurrencyLimit:
    return ConcurrencyLimit(
        ConcurrencyPolicy(most=most, initial=initial, queue_reserve=queue_reserve)
    )


def test_it_begins_small_and_reaches_what_the_settings_allow() -> None:
    limit = limit_of(256)
    engine = Engine(limit, slots=1000)

    assert limit.current == 8
    engine.run(10)

    assert engine.highest == 256
    assert limit.current >= 0.8 * 256


@pytest.mark.parametrize("most", [1, 2, 5])
def test_it_never_begins_above_what_the_settings_allow(most: int) -> None:
    limit = limit_of(most)
    engine = Engine(limit, slots=100)
    engine.run(5)

    assert limit.current == most


@pytest.mark.parametrize("slots", [4, 20, 64, 200])
def test_it_finds_what_the_upstream_can_work_on_by_the_work_done_alone(slots: int) -> None:
    limit = limit_of(1000)
    engine = Engine(limit, slots=slots)
    engine.run(60)

    rate = engine.run(60)

    assert rate >= 0.9 * slots
    assert limit.current <= 2.2 * slots + 8


def test_it_grows_when_the_upstream_does() -> None:
    limit = limit_of(1000)
    engine = Engine(limit, slots=20)
    engine.run(60)
    engine.slots = 100

    engine.run(240)

    assert engine.run(30) >= 75


def test_it_keeps_a_few_in_the_queue_of_an_engine_that_tells() -> None:
    limit = limit_of(1000)
    engine = Engine(limit, slots=64, tells_load=True)
    engine.run(20)

    rate = engine.run(60)

    assert rate >= 0.95 * 64
    assert 60 <= limit.current <= 64 + 4
    assert limit.limiter is Limiter.ENGINE_QUEUE


def test_it_makes_room_when_others_use_the_engine_and_takes_it_back() -> None:
    limit = limit_of(1000)
    engine = Engine(limit, slots=64, tells_load=True)
    engine.run(20)
    engine.others = 40

    engine.run(5)
    assert limit.current <= 24 + 4
    engine.others = 0
    engine.run(15)
    assert limit.current >= 60


def test_refusals_halve_it_once_for_all_that_were_in_flight() -> None:
    limit = limit_of(256, initial=64)

    for _ in range(40):
        limit.note_refusal(10.0, sent_at=9.0)
    assert limit.current == 32
    assert limit.limiter is Limiter.REFUSALS
    for _ in range(8):
        limit.note_refusal(11.0, sent_at=10.5)
    assert limit.current == 16


def test_it_never_falls_below_one() -> None:
    limit = limit_of(4)
    for at in range(10):
        limit.note_refusal(at + 1, sent_at=at + 0.5)

    assert limit.current == 1


def test_a_refusal_now_and_then_changes_nothing() -> None:
    limit = limit_of(256, initial=256)
    for at in range(3000):
        limit.note_success(at + 1, sent_at=at, work=0, in_flight=1)
        if at % 100 == 0:
            limit.note_refusal(at + 1, sent_at=at)

    assert limit.current == 256


def test_refusals_that_have_nothing_to_do_with_their_number_are_borne() -> None:
    limit = limit_of(64, initial=64)
    chance, limits = random.Random(5), list[int]()
    for at in range(20_000):
        if chance.random() < 0.1:
            limit.note_refusal(at + 1, sent_at=at + 0.5)
        else:
            limit.note_success(at + 1, sent_at=at + 0.5, work=0, in_flight=limit.current)
        limits.append(limit.current)

    assert sum(limits) / len(limits) >= 40


def test_it_settles_below_where_the_upstream_refuses() -> None:
    limit = limit_of(1000)
    engine = Engine(limit, slots=1000, turns_away=100)
    engine.run(60)
    refused = engine.refused

    rate = engine.run(120)

    assert rate >= 60
    assert engine.refused - refused < 0.05 * engine.done


# Rates


def spend(bucket: TokenBucket, seconds: float, *, cost: float = 1) -> list[float]:
    """The times at which something of a cost could be taken, as soon as it could."""
    now, end, times = 1000.0, 1000.0 + seconds, list[float]()
    while (now := bucket.ready_at(now)) < end:
        bucket.take(now, cost)
        times.append(now)
    return times


def test_a_rate_is_kept_in_every_second() -> None:
    times = spend(TokenBucket(600), 60)

    assert 600 <= len(times) <= 610
    assert all(
        sum(at <= other < at + 1 for other in times) <= 21 for at in times[:: len(times) // 20]
    )


def test_less_than_one_a_second_goes_out_one_by_one() -> None:
    times = spend(TokenBucket(30), 60)

    assert times == pytest.approx([1000 + 2 * n for n in range(30)])


def test_what_costs_more_than_there_is_goes_and_is_owed() -> None:
    bucket = TokenBucket(60_000)  # 1,000 a second
    times = spend(bucket, 60, cost=5_000)

    assert len(times) in (12, 13)


def test_what_is_given_back_may_be_taken_again() -> None:
    bucket = TokenBucket(60)
    bucket.take(5, 10)
    assert bucket.ready_at(5) == 15
    bucket.take(5, -10)

    assert bucket.ready_at(5) == 5


@pytest.mark.parametrize(
    ("body", "cost"),
    [
        (b'{"a":"' + b"x" * 392 + b'"}', 100 + 256),
        (b'{"max_tokens":50}' + b" " * 383, 100 + 50),
        (b'{"max_completion_tokens":50,"max_tokens":9,"n":3}' + b" " * 351, 100 + 150),
        (b'{"max_output_tokens":50}' + b" " * 376, 100 + 50),
        (b'{"max_tokens":"many"}' + b" " * 379, 100 + 256),
        (b'{"max_tokens":null}' + b" " * 381, 100 + 256),
    ],
)
def test_the_first_requests_are_thought_to_take_all_that_they_may(
    body: bytes, cost: int
) -> None:
    assert TokenEstimate().cost(body) == cost


def test_later_requests_are_thought_to_take_what_earlier_ones_did() -> None:
    estimate = TokenEstimate()
    for _ in range(100):
        estimate.learn(400, input_tokens=200, output_tokens=20)

    assert estimate.cost(b'{"max_tokens":4000}' + b" " * 381) == 220
    assert estimate.cost(b'{"max_tokens":5}' + b" " * 384) == 205


# A bound that comes and goes


def test_a_bound_holds_from_now_on_and_what_was_found_outlasts_it() -> None:
    limit = limit_of(256, initial=64)
    limit.set_bound(10, 1.0)
    assert (limit.current, limit.limiter) == (10, Limiter.SHARE)
    limit.set_bound(0, 2.0)
    assert limit.current == 0

    limit.set_bound(256, 3.0)

    assert (limit.current, limit.limiter) == (64, Limiter.START)


def test_no_bound_is_above_what_the_settings_allow() -> None:
    limit = limit_of(16, initial=64)
    limit.set_bound(500, 1.0)

    assert (limit.current, limit.limiter) == (16, Limiter.SETTING)


def test_it_keeps_to_its_bound_and_grows_with_it() -> None:
    limit = limit_of(256)
    limit.set_bound(20, 100.0)
    engine = Engine(limit, slots=1000)

    engine.run(20)
    assert engine.highest == 20
    assert limit.current >= 16
    limit.set_bound(200, engine.now)
    engine.run(20)

    assert engine.highest == 200


def test_it_wishes_for_more_only_while_its_bound_is_what_holds_it() -> None:
    limit = limit_of(256, initial=64)
    assert limit.wish == 64
    limit.set_bound(64, 1.0)
    assert limit.wish == 256
    limit.set_bound(10, 2.0)
    assert limit.wish == 64


def test_replies_to_what_was_sent_under_another_bound_judge_nothing() -> None:
    limit = limit_of(256, initial=64)
    limit.set_bound(0, 10.0)
    for _ in range(100):
        limit.note_refusal(12.0, sent_at=9.0)
        limit.note_success(12.0, sent_at=9.0, work=1, in_flight=1)
    limit.note_load(EngineLoad(running=1, waiting=90), 12.0, in_flight=0)
    limit.set_bound(256, 13.0)

    assert limit.current == 64


def test_what_cuts_another_worker_s_limit_cuts_this_one_once() -> None:
    limit = limit_of(256, initial=64)

    limit.hear_refusal(101.0, refused_at=100.0)
    limit.hear_refusal(101.5, refused_at=100.5)
    assert (limit.current, limit.limiter) == (32, Limiter.REFUSALS)
    limit.hear_refusal(106.0, refused_at=105.0)

    assert limit.current == 16


def test_what_has_cut_its_own_limit_cuts_it_no_second_time() -> None:
    limit = limit_of(256, initial=64)
    for _ in range(8):
        limit.note_refusal(100.0, sent_at=99.0)
    assert (limit.current, limit.cut_at) == (32, 100.0)

    limit.hear_refusal(101.0, refused_at=99.5)
    limit.hear_refusal(101.0, refused_at=101.0)

    assert limit.current == 32


def test_refusals_of_long_ago_say_nothing_of_now() -> None:
    limit = limit_of(256, initial=64)

    limit.hear_refusal(100.0, refused_at=89.0)

    assert limit.current == 64


def test_a_new_rate_brings_no_burst() -> None:
    bucket = TokenBucket(60)
    bucket.take(1000.0, 1)
    bucket.set_rate(1000.0, 6000, since=1000.0)
    now, times = 1000.0, list[float]()
    while (now := bucket.ready_at(now)) < 1001.0:
        bucket.take(now, 1)
        times.append(now)

    assert len(times) in (99, 100)
    assert times[0] == pytest.approx(1000.01)


def test_a_lower_rate_holds_from_when_the_rest_was_given_to_others() -> None:
    bucket = TokenBucket(600)
    for _ in range(10):
        bucket.take(1000.0, 1)
    bucket.set_rate(1002.0, 60, since=1001.0)

    assert bucket.ready_at(1002.0) == pytest.approx(1002.0)
    bucket.take(1002.0, 1)
    assert bucket.ready_at(1002.0) == pytest.approx(1003.0)
