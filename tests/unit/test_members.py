"""How the workers of a cluster share what each of them could do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.executor.members import alone, pace_of, share_of


def test_each_worker_has_a_part_of_its_own() -> None:
    everyone = ["b", "c", "a"]

    assert [share_of(name, everyone) for name in "abc"] == [(0, 3), (1, 3), (2, 3)]


def test_a_worker_that_the_others_do_not_know_yet_counts_itself() -> None:
    assert share_of("b", ["a"]) == (1, 2)


@pytest.mark.parametrize(
    ("workers", "wait_s"), [(1, 2.0), (4, 2.0), (8, 4.0), (100, 50.0)], ids=str
)
def test_many_workers_look_as_rarely_as_leaves_their_number_out(
    workers: int, wait_s: float
) -> None:
    assert pace_of(workers, 2.0, 2.0) == wait_s


@given(
    workers=st.integers(1, 10_000),
    least_s=st.floats(0.1, 100),
    most_per_s=st.floats(0.01, 100),
)
def test_all_together_keep_to_the_most_and_none_hurries(
    workers: int, least_s: float, most_per_s: float
) -> None:
    wait_s = pace_of(workers, least_s, most_per_s)

    assert wait_s >= least_s
    assert workers / wait_s <= most_per_s * (1 + 1e-9)


def test_who_is_alone_waits_for_nobody() -> None:
    assert alone(2.0, 0.001) == 2.0
