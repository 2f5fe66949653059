"""Whether and when a line is tried again: the whole rule, as tables."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.executor.retry import RetryPolicy, may_pass
from penstock.upstream.base import Failure, Reply

DAY_S = 86_400.0
POLICY = RetryPolicy(max_attempts=5, first_wait_s=0.5, max_wait_s=30.0, max_retry_after_s=60.0)


def wait_s(
    reply: Reply,
    *,
    attempt: int = 1,
    jitter: float = 0.0,
    time_left_s: float = DAY_S,
    policy: RetryPolicy = POLICY,
) -> float | None:
    return policy.wait_s(reply, attempt=attempt, jitter=jitter, time_left_s=time_left_s)


def status(code: int, *, retry_after_s: float | None = None) -> Reply:
    return Reply(status_code=code, retry_after_s=retry_after_s)


@pytest.mark.parametrize("code", [200, 201, 202, 204])
def test_a_success_is_not_tried_again(code: int) -> None:
    assert wait_s(status(code)) is None


@pytest.mark.parametrize("code", [408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529])
def test_an_answer_that_may_pass_is_tried_again(code: int) -> None:
    assert may_pass(status(code))
    assert wait_s(status(code)) == 0.5


@pytest.mark.parametrize("code", [301, 302, 307, 400, 401, 403, 404, 405, 413, 415, 422, 501])
def test_an_answer_that_stays_is_not_tried_again(code: int) -> None:
    assert not may_pass(status(code))
    assert wait_s(status(code)) is None


@pytest.mark.parametrize("failure", Failure)
def test_what_is_no_answer_is_tried_again(failure: Failure) -> None:
    assert wait_s(Reply(failure=failure)) == 0.5
    assert wait_s(Reply(failure=failure, status_code=200)) == 0.5


@pytest.mark.parametrize(
    ("attempt", "expected"),
    [(1, 0.5), (2, 1), (3, 2), (4, 4), (5, 8), (6, 16), (7, 30), (8, 30), (99, 30)],
)
def test_the_wait_doubles_up_to_a_limit(attempt: int, expected: float) -> None:
    policy = RetryPolicy(max_attempts=100, first_wait_s=0.5, max_wait_s=30)

    assert wait_s(status(500), attempt=attempt, policy=policy) == expected


@pytest.mark.parametrize("attempt", [1024, 1025, 1_000_000])
def test_a_line_may_be_tried_as_often_as_the_settings_say(attempt: int) -> None:
    policy = RetryPolicy(max_attempts=10_000_000)

    assert wait_s(status(500), attempt=attempt, policy=policy) == 30


def test_the_last_attempt_is_the_last() -> None:
    assert wait_s(status(500), attempt=4) is not None
    assert wait_s(status(500), attempt=5) is None
    assert wait_s(status(500), attempt=1, policy=RetryPolicy(max_attempts=1)) is None


@pytest.mark.parametrize(
    ("asked_s", "expected"), [(0, 0.5), (0.2, 0.5), (7, 7), (60, 60), (61, 60), (DAY_S, 60)]
)
def test_an_upstream_is_given_the_time_it_asks_for_up_to_a_limit(
    asked_s: float, expected: float
) -> None:
    assert wait_s(status(429, retry_after_s=asked_s)) == expected
    assert wait_s(status(503, retry_after_s=asked_s)) == expected


def test_what_an_upstream_asks_for_shortens_no_wait() -> None:
    assert wait_s(status(429, retry_after_s=1), attempt=4) == 4


def test_jitter_adds_up_to_a_quarter() -> None:
    assert wait_s(status(500), jitter=1) == 0.5 * 1.25
    assert wait_s(status(429, retry_after_s=8), jitter=0.5) == 9
    assert wait_s(status(429, retry_after_s=DAY_S), jitter=1) == 75


def test_a_line_that_has_no_time_left_is_not_tried_again() -> None:
    assert wait_s(status(500), time_left_s=0.51) == 0.5
    assert wait_s(status(500), time_left_s=0.5) is None
    assert wait_s(status(500), time_left_s=-1) is None
    assert wait_s(status(429, retry_after_s=10), time_left_s=9) is None


@given(
    attempt=st.integers(1, 3000),
    jitter=st.floats(0, 1),
    asked=st.none() | st.floats(0, DAY_S),
    time_left_s=st.floats(-10, DAY_S),
)
def test_a_wait_is_positive_bounded_and_ends_before_the_window_does(
    attempt: int, jitter: float, asked: float | None, time_left_s: float
) -> None:
    policy = RetryPolicy(max_attempts=2000)

    wait = wait_s(
        status(429, retry_after_s=asked),
        attempt=attempt,
        jitter=jitter,
        time_left_s=time_left_s,
        policy=policy,
    )

    if wait is not None:
        assert attempt < 2000
        assert 0.5 <= wait <= 75
        assert wait < time_left_s
        assert asked is None or wait >= min(asked, 60)
