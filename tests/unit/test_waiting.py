"""Whose line is next in a lane, and when it wants more."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.executor.waiting import Flow, Waiting, background_places
from penstock.model import ProjectId


def flow(name: str, *, weight: int = 1, is_background: bool = False) -> Flow:
    return Flow(ProjectId(name), weight, is_background)


RED, BLUE, GREY = flow("red"), flow("blue"), flow("grey", is_background=True)


def waiting(*, low_water: int = 100, held_bytes: int = 1000) -> Waiting[str]:
    return Waiting[str](low_water=low_water, held_bytes=held_bytes)


def fill(lines: Waiting[str], whose: Flow, count: int) -> None:
    lines.put(whose, [f"{whose.project_id}-{n}" for n in range(count)])


def take(lines: Waiting[str], count: int, *, in_flight: int = 0) -> list[str]:
    taken = [lines.take(in_flight=in_flight, places=16) for _ in range(count)]
    return [line for line in taken if line is not None]


def test_the_lines_of_one_project_go_out_in_their_order() -> None:
    lines = waiting()
    fill(lines, RED, 3)
    lines.put_first(RED, ["again-1", "again-2"])

    assert take(lines, 9) == ["again-1", "again-2", "red-0", "red-1", "red-2"]
    assert len(lines) == 0


def test_a_project_that_comes_to_a_full_lane_is_next() -> None:
    lines = waiting()
    fill(lines, RED, 1000)
    take(lines, 500)
    fill(lines, BLUE, 3)

    assert sorted(take(lines, 6)) == [
        "blue-0", "blue-1", "blue-2", "red-500", "red-501", "red-502",
    ]  # fmt: skip


@given(weights=st.lists(st.integers(1, 9), min_size=2, max_size=5))
def test_projects_share_a_lane_by_their_weights(weights: list[int]) -> None:
    lines = waiting()
    for number, weight in enumerate(weights):
        fill(lines, flow(str(number), weight=weight), 1000)

    had = Counter(line.partition("-")[0] for line in take(lines, 100))

    shares = [had[str(number)] / weight for number, weight in enumerate(weights)]
    assert max(shares) - min(shares) <= 1


def test_what_could_not_be_sent_goes_first_and_costs_nothing() -> None:
    lines = waiting()
    fill(lines, RED, 5)
    fill(lines, BLUE, 5)
    for _ in range(10):
        line = lines.take(in_flight=0, places=16)
        assert line == "red-0"
        lines.give_back(RED, line)

    assert take(lines, 4) == ["red-0", "blue-0", "red-1", "blue-1"]


def test_background_lines_go_out_when_no_other_waits() -> None:
    lines = waiting()
    fill(lines, GREY, 5)
    fill(lines, RED, 2)

    assert take(lines, 4) == ["red-0", "red-1", "grey-0", "grey-1"]


@pytest.mark.parametrize(
    ("places", "taken"), [(0, 0), (1, 1), (2, 1), (16, 15), (64, 60), (256, 240)]
)
def test_background_lines_never_take_the_last_places(places: int, taken: int) -> None:
    lines = waiting()
    fill(lines, GREY, 1000)

    in_flight = 0
    while lines.take(in_flight=in_flight, places=places):
        in_flight += 1

    assert in_flight == taken == background_places(places)
    assert lines.to_send(in_flight=in_flight, places=places) == 0


def test_lines_of_a_kind_are_taken_out() -> None:
    lines = waiting()
    fill(lines, RED, 3)
    fill(lines, BLUE, 1)
    fill(lines, GREY, 1)

    assert lines.remove(lambda line: line.endswith("-0")) == ["red-0", "blue-0", "grey-0"]
    assert take(lines, 9) == ["red-1", "red-2"]


# Room


def test_it_is_filled_to_twice_its_mark_and_then_again_below_it() -> None:
    lines = waiting(low_water=100)
    lines.expect(RED, 50, 0)
    fill(lines, RED, 149)
    assert lines.has_room(RED, places=16)
    fill(lines, RED, 1)
    assert not lines.has_room(RED, places=16)
    take(lines, 100)
    assert not lines.has_room(RED, places=16)
    take(lines, 1)
    assert lines.has_room(RED, places=16)


def test_a_project_that_has_none_finds_room_in_a_full_lane() -> None:
    lines = waiting(low_water=100, held_bytes=1000)
    fill(lines, RED, 500)
    lines.weigh(RED, 1500)

    assert (lines.has_room(RED, places=16), lines.is_full(RED)) == (False, True)
    assert (lines.has_room(BLUE, places=16), lines.is_full(BLUE)) == (True, False)
    lines.expect(BLUE, 10, 500)
    assert not lines.has_room(BLUE, places=16)
    assert lines.is_full(flow("third"))


def test_without_a_part_of_the_upstream_it_takes_one_slice_at_most() -> None:
    lines = waiting()
    assert lines.has_room(RED, places=0)
    lines.expect(RED, 10, 0)

    assert not lines.has_room(RED, places=0)
    assert not lines.has_room(BLUE, places=0)


def test_background_lines_find_room_only_where_nothing_else_waits_and_few_of_them() -> None:
    lines = waiting()
    assert lines.has_room(GREY, places=16)
    assert not lines.has_room(GREY, places=0)
    lines.expect(RED, 1, 0)
    assert not lines.has_room(GREY, places=16)
    lines.expect(RED, -1, 0)
    fill(lines, GREY, 8)
    assert not lines.has_room(GREY, places=16)
    take(lines, 1)
    assert lines.is_short(16)
    assert lines.has_room(GREY, places=16)


def test_more_is_asked_for_now_and_then_and_only_where_there_may_be_room() -> None:
    lines = waiting(low_water=100)
    fill(lines, RED, 500)

    told: list[int] = []
    while len(lines):
        take(lines, 1)
        if lines.is_short(16):
            told.append(len(lines))

    assert told == [192, 128, 64, 0]


def test_more_is_asked_for_when_a_project_has_nothing_left_in_a_full_lane() -> None:
    lines = waiting(low_water=100)
    fill(lines, RED, 501)
    fill(lines, BLUE, 1)

    assert take(lines, 1) == ["red-0"]
    assert not lines.is_short(16)
    assert take(lines, 1) == ["blue-0"]
    assert lines.is_short(16)
    take(lines, 1)
    assert not lines.is_short(16)


def test_a_lane_that_is_fast_wants_more_lines_ahead() -> None:
    lines = waiting(low_water=100)

    def wanted_after(count: int, now: float) -> int:
        """How many lines it wants ahead, once so many have gone out."""
        fill(lines, RED, count)
        take(lines, count)
        lines.judge_pace(now)
        ahead = 0
        while lines.has_room(RED, places=16):
            lines.expect(RED, 1, 0)
            ahead += 1
        lines.expect(RED, -ahead, 0)
        lines.has_room(RED, places=16)  # so that it is filling again
        return ahead

    assert wanted_after(0, now=50.0) == 200
    assert wanted_after(2000, now=50.5) == 800
    assert wanted_after(9000, now=50.55) == 800  # too soon to judge
    assert wanted_after(1000, now=51.5) == 2000
    assert wanted_after(10, now=60.0) == 200


def test_background_lines_take_no_room_from_others() -> None:
    lines = waiting(low_water=1, held_bytes=1000)
    lines.expect(GREY, 500, 2000)
    lines.weigh(GREY, 2000)

    assert lines.is_full(GREY)
    assert lines.has_room(RED, places=16)
    assert not lines.is_full(RED)
