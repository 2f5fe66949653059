"""When an upstream is left alone, and for how long."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.executor.circuit import (
    Circuit,
    CircuitPolicy,
    Verdict,
    asks_to_wait,
    is_outage,
)
from penstock.upstream.base import Failure, Reply

POLICY = CircuitPolicy(failures=3, first_pause_s=1, max_pause_s=8, max_retry_after_s=60)


def fail(circuit: Circuit, now: float = 0, *, was_probe: bool = False) -> bool:
    return circuit.note_failure(now, was_probe=was_probe, jitter=0)


def opened(at: float = 0) -> Circuit:
    circuit = Circuit(POLICY)
    assert [fail(circuit, at) for _ in range(3)] == [False, False, True]
    return circuit


def test_a_few_failures_in_a_row_open_it() -> None:
    circuit = opened()

    assert circuit.is_open
    assert circuit.admit(0.9) is Verdict.PARK
    assert circuit.wake_at() == 1


def test_an_answer_in_between_begins_the_count_anew() -> None:
    circuit = Circuit(POLICY)
    for _ in range(9):
        fail(circuit)
        fail(circuit)
        assert not circuit.note_answer()

    assert circuit.admit(0) is Verdict.SEND


def test_one_probe_goes_out_at_a_time() -> None:
    circuit = opened()

    assert circuit.admit(1) is Verdict.PROBE
    assert circuit.admit(1) is Verdict.PARK
    assert circuit.wake_at() is None
    circuit.forget_probe()
    assert circuit.admit(1) is Verdict.PROBE


def test_a_probe_that_is_answered_closes_it() -> None:
    circuit = opened()
    circuit.admit(1)

    assert circuit.note_answer()
    assert circuit.admit(1) is Verdict.SEND
    assert [fail(circuit, 1) for _ in range(3)] == [False, False, True]
    assert circuit.wake_at() == 2


def test_the_pause_doubles_up_to_a_bound_while_probes_fail() -> None:
    circuit, now, pauses = opened(), 0.0, []
    for _ in range(5):
        at = circuit.wake_at()
        assert at is not None
        pauses.append(at - now)
        now = at
        assert circuit.admit(now) is Verdict.PROBE
        assert not fail(circuit, now, was_probe=True)

    assert pauses == [1, 2, 4, 8, 8]


def test_jitter_adds_up_to_a_quarter() -> None:
    circuit = Circuit(POLICY)
    for _ in range(3):
        circuit.note_failure(0, was_probe=False, jitter=1)

    assert circuit.wake_at() == 1.25


def test_what_was_in_flight_when_it_opened_changes_nothing() -> None:
    circuit = opened()

    assert not fail(circuit, 0.5)
    assert circuit.wake_at() == 1


def test_a_line_in_flight_that_is_answered_closes_it() -> None:
    assert opened().note_answer()


def test_an_upstream_is_left_alone_for_as_long_as_it_asks() -> None:
    circuit = Circuit(POLICY)
    circuit.hold(0, 5)
    circuit.hold(0, 3)

    assert circuit.admit(4.9) is Verdict.PARK
    assert circuit.wake_at() == 5
    assert circuit.admit(5) is Verdict.SEND
    circuit.hold(10, 3600)
    assert circuit.wake_at() == 70


def test_it_probes_only_once_both_pauses_are_over() -> None:
    circuit = opened()
    circuit.hold(0, 5)

    assert circuit.admit(2) is Verdict.PARK
    assert circuit.wake_at() == 5
    assert circuit.admit(5) is Verdict.PROBE


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (Reply(failure=Failure.UNREACHABLE), True),
        (Reply(failure=Failure.DISCONNECTED), True),
        (Reply(failure=Failure.TIMEOUT), True),
        (Reply(failure=Failure.INVALID, status_code=200), False),
        *((Reply(status_code=s), True) for s in (502, 503, 504, 520, 522, 524, 529)),
        *((Reply(status_code=s), False) for s in (200, 400, 401, 404, 408, 409, 429, 500)),
    ],
    ids=lambda value: (
        f"{value.failure}-{value.status_code}" if isinstance(value, Reply) else None
    ),
)
def test_what_is_an_outage(reply: Reply, expected: bool) -> None:
    assert is_outage(reply) is expected


def test_what_asks_to_wait() -> None:
    assert asks_to_wait(Reply(status_code=429, retry_after_s=1))
    assert asks_to_wait(Reply(status_code=503, retry_after_s=0.5))
    assert not asks_to_wait(Reply(status_code=429))
    assert not asks_to_wait(Reply(status_code=429, retry_after_s=0))
    assert not asks_to_wait(Reply(status_code=500, retry_after_s=1))


events = st.lists(
    st.tuples(st.sampled_from(["send", "answer", "fail", "hold"]), st.floats(0, 30)),
    max_size=60,
)


@given(events)
def test_it_never_stays_shut_for_ever_and_never_lets_two_probes_out(
    happenings: list[tuple[str, float]],
) -> None:
    circuit, now = Circuit(POLICY), 0.0
    in_flight: list[bool] = []
    for what, wait_s in happenings:
        now += wait_s
        if what == "send":
            verdict = circuit.admit(now)
            if verdict is not Verdict.PARK:
                in_flight.append(verdict is Verdict.PROBE)
            assert sum(in_flight) <= 1 or not circuit.is_open
        elif what == "hold":
            circuit.hold(now, wait_s)
        elif in_flight:
            was_probe = in_flight.pop(0)
            if what == "answer":
                circuit.note_answer()
                in_flight = [False] * len(in_flight)
            else:
                circuit.note_failure(now, was_probe=was_probe, jitter=0.5)
    for was_probe in in_flight:
        circuit.note_failure(now, was_probe=was_probe, jitter=0.5)

    at = circuit.wake_at()
    assert at is not None
    assert circuit.admit(max(now, at)) is not Verdict.PARK
