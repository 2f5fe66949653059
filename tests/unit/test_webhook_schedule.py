"""When an event is sent again: the whole rule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.executor.webhooks import DeliveryPolicy

NOON = 1_795_000_000.0
HOUR_S = 3600.0
POLICY = DeliveryPolicy()


def wait_s(attempt: int, *, jitter: float = 0.0, age_s: float = 0.0) -> float | None:
    """How long after an attempt that failed the next one is made."""
    now = NOON + age_s
    at = POLICY.next_attempt_at(attempt=attempt, queued_at=NOON, now=now, jitter=jitter)
    return None if at is None else at - now


@pytest.mark.parametrize(
    ("attempt", "expected"),
    [(1, 5), (2, 10), (3, 20), (4, 40), (12, 10_240), (13, 20_480), (14, 21_600), (99, 21_600)],
)
def test_the_wait_doubles_up_to_six_hours(attempt: int, expected: float) -> None:
    assert wait_s(attempt) == expected


def test_jitter_adds_up_to_a_quarter() -> None:
    assert wait_s(1, jitter=1) == 6.25
    assert wait_s(4, jitter=0.5) == 45
    assert wait_s(14, jitter=1) == 6 * HOUR_S


def test_no_attempt_is_made_after_three_days() -> None:
    assert wait_s(1, age_s=72 * HOUR_S - 5) == 5
    assert wait_s(1, age_s=72 * HOUR_S - 4) is None
    assert wait_s(14, age_s=66 * HOUR_S + 1) is None
    assert wait_s(1, age_s=100 * HOUR_S) is None


@pytest.mark.parametrize("jitter", [0.0, 1.0])
def test_a_webhook_that_is_away_for_three_days_is_tried_some_twenty_times(
    jitter: float,
) -> None:
    now, attempt = NOON, 1
    while True:
        at = POLICY.next_attempt_at(attempt=attempt, queued_at=NOON, now=now, jitter=jitter)
        if at is None:
            break
        now, attempt = at, attempt + 1

    assert 20 <= attempt <= 26
    assert 66 * HOUR_S < now - NOON <= 72 * HOUR_S


@given(attempt=st.integers(1, 5000), jitter=st.floats(0, 1), age_s=st.floats(0, 100 * HOUR_S))
def test_a_wait_is_bounded_and_ends_in_time(attempt: int, jitter: float, age_s: float) -> None:
    wait = wait_s(attempt, jitter=jitter, age_s=age_s)

    if wait is not None:
        assert 4.99 <= wait <= 6 * HOUR_S + 0.01
        assert age_s + wait <= 72 * HOUR_S + 0.01
