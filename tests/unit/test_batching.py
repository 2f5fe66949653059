"""The simulated time of an inference engine."""

import random

import pytest

from penstock.batching import BatchingEngine, EngineOptions

PLAIN = EngineOptions(slots=4, step_ms=10, step_ms_per_request=0, prefill_tokens_per_s=0)


def engine(options: EngineOptions = PLAIN) -> BatchingEngine[str]:
    return BatchingEngine(options, now=100.0)


def add(each: BatchingEngine[str], name: str, tokens: int, now: float = 100.0) -> None:
    each.add(name, prompt_tokens=1000, output_tokens=tokens, now=now)


def run(each: BatchingEngine[str]) -> list[tuple[str, float]]:
    """Each request that ends, and when."""
    ends: list[tuple[str, float]] = []
    while (at := each.next_end_at()) is not None:
        ends += [(name, at - 100) for name in each.advance(at)]
    return ends


def test_each_step_gives_every_request_a_token() -> None:
    one = engine()
    add(one, "long", 100)
    add(one, "short", 50)

    assert run(one) == [("short", pytest.approx(0.5)), ("long", pytest.approx(1.0))]


def test_those_without_a_slot_wait_their_turn() -> None:
    one = engine()
    for n in range(6):
        add(one, str(n), 100)

    assert (one.running, one.waiting) == (4, 2)
    ends = dict(run(one))
    assert ends["0"] == pytest.approx(1.0)
    assert ends["5"] == pytest.approx(2.0)


def test_a_step_takes_longer_with_more_in_it() -> None:
    options = EngineOptions(slots=9, step_ms=10, step_ms_per_request=5, prefill_tokens_per_s=0)
    one = engine(options)
    add(one, "a", 100)
    add(one, "b", 100, now=100.75)  # half of a's tokens are there, in steps of 15 ms

    ends = dict(run(one))
    assert ends["a"] == pytest.approx(0.75 + 50 * 0.020)
    assert ends["b"] == pytest.approx(ends["a"] + 50 * 0.015)


def test_reading_a_prompt_holds_up_all() -> None:
    options = EngineOptions(
        slots=9, step_ms=10, step_ms_per_request=0, prefill_tokens_per_s=10_000
    )
    one = engine(options)
    add(one, "a", 100)
    add(one, "b", 100)

    assert run(one)[0] == ("a", pytest.approx(1.2))


def test_a_client_that_has_gone_frees_its_slot() -> None:
    one = engine()
    for n in range(6):
        add(one, str(n), 100)
    one.remove(lambda name: name in "045", now=100.5)

    assert (one.running, one.waiting) == (3, 0)
    assert [name for name, _ in run(one)] == ["1", "2", "3"]


def test_every_request_ends_once_and_never_more_than_the_slots_run() -> None:
    chance = random.Random(3)
    options = EngineOptions(slots=7)
    one, now, ended = engine(options), 100.0, list[str]()
    for n in range(500):
        now += chance.expovariate(10)
        ended += one.add(str(n), prompt_tokens=100, output_tokens=chance.randrange(50), now=now)
        assert one.running <= 7
        assert not one.waiting or one.running == 7
    ended += [name for name, _ in run(one)]

    assert sorted(ended) == sorted(map(str, range(500)))


@pytest.mark.parametrize(
    "options",
    [
        {"slots": 0},
        {"slots": 1, "step_ms": -1},
        {"slots": 1, "step_ms": 0, "step_ms_per_request": 0},
    ],
)
def test_an_engine_that_cannot_be_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        EngineOptions(**options)
