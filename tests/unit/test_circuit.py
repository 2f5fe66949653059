"""When an upstream is left alone, and for how long."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.executor.circuit import (
    Circuit,
    CircuitPolicy,
    is_outage,
)
from penstock.upstream.base import Failure, Reply

POLICY = CircuitPolicy(failures=3, quiet_s=0, first_pause_s=1, max_pause_s=8)


def fail(circuit: Circuit, now: float = 0, *, was_probe: bool = False) -> bool:
    return circuit.note_failure(now, was_probe=was_probe, jitter=0)


def admit(circuit: Circuit, now: float) -> str:
    """What happens to a line that is to be sent: `send`, `probe` or `park`."""
    if circuit.is_blocking(now):
        return "park"
    if not circuit.is_open:
        return "send"
    circuit.begin_probe()
    return "probe"


def opened(at: float = 0) -> Circuit:
    circuit = Circuit(POLICY)
    assert [fail(circuit, at) for _ in range(3)] == [False, False, True]
    return circuit


def test_a_few_failures_in_a_row_open_it() -> None:
    circuit = opened()

    assert circuit.is_open
    assert admit(circuit, 0.9) == "park"
    assert circuit.wake_at() == 1


def test_an_answer_in_between_begins_the_count_anew() -> None:
    circuit = Circuit(POLICY)
    for _ in range(9):
        fail(circuit)
        fail(circuit)
        assert not circuit.note_answer()

    assert admit(circuit, 0) == "send"


def test_one_probe_goes_out_at_a_time() -> None:
    circuit = opened()

    assert admit(circuit, 1) == "probe"
    assert admit(circuit, 1) == "park"
    assert circuit.wake_at() is None
    circuit.forget_probe()
    assert admit(circuit, 1) == "probe"


def test_a_probe_that_is_answered_closes_it() -> None:
    circuit = opened()
    admit(circuit, 1)

    assert circuit.note_answer()
    assert admit(circuit, 1) == "send"
    assert [fail(circuit, 1) for _ in range(3)] == [False, False, True]
    assert circuit.wake_at() == 2


def test_the_pause_doubles_up_to_a_bound_while_probes_fail() -> None:
    circuit, now, pauses = opened(), 0.0, []
    for _ in range(5):
        at = circuit.wake_at()
        assert at is not None
        pauses.append(at - now)
        now = at
        assert admit(circuit, now) == "probe"
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


def test_failures_in_quick_succession_open_it_only_when_they_are_many() -> None:
    circuit = Circuit(CircuitPolicy(failures=3, quiet_s=1, burst=5))

    assert [fail(circuit, 10.5) for _ in range(5)] == [False] * 4 + [True]


def test_a_few_failures_open_it_when_nothing_else_has_come_for_a_while() -> None:
    circuit = Circuit(CircuitPolicy(failures=3, quiet_s=1, burst=32))

    assert [fail(circuit, at) for at in (10, 10.9, 10.99, 11)] == [False, False, False, True]
    circuit.note_answer()
    assert [fail(circuit, at) for at in (20, 20.5, 20.9)] == [False, False, False]


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


events = st.lists(
    st.tuples(st.sampled_from(["send", "answer", "fail"]), st.floats(0, 30)),
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
            verdict = admit(circuit, now)
            if verdict != "park":
                in_flight.append(verdict == "probe")
            assert sum(in_flight) <= 1 or not circuit.is_open
        elif in_flight:
            was_probe = in_flight.pop(0)
            if what == "answer":
                circuit.note_answer()
                in_flight = [False] * len(in_flight)
            else:
                circuit.note_failure(now, was_probe=was_probe, jitter=0.5)
    for was_probe in in_flight:
        circuit.note_failure(now, was_probe=was_probe, jitter=0.5)

    assert admit(circuit, max(now, circuit.wake_at() or 0)) != "park"
