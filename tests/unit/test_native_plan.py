"""Which lines go to a provider's batch API, in which jobs, and how patiently."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.executor.native import NativePolicy
from penstock.executor.native_lines import line_name, parse_line_name
from penstock.executor.native_plan import NativePlanner, parts_of, split, stop_at, way_of
from penstock.jsonl import SlicePlan
from penstock.model import Batch, BatchId, BatchStatus, FileId, ProjectId
from penstock.upstream.base import BatchLimits
from penstock.upstream.routes import NativeUse, Route, Routes

CHAT = "/v1/chat/completions"
LIMITS = BatchLimits(endpoints=frozenset({CHAT}), max_requests=100, max_bytes=100_000)
BATCH = Batch(
    id=BatchId("batch_1"),
    project_id=ProjectId("proj_1"),
    status=BatchStatus.VALIDATING,
    endpoint=CHAT,
    input_file_id=FileId("file-1"),
    input_blob_key="files/1",
    completion_window="24h",
    created_at=1000,
    expires_at=2000,
)


class Upstream:
    """As much of a batch API as a plan looks at."""

    def __init__(self, **limits: Any) -> None:
        self.limits = BatchLimits(
            endpoints=LIMITS.endpoints,
            **({"max_requests": 100, "max_bytes": 100_000} | limits),
        )


def piece(requests: int, size: int = 0, *, model: str = "m", start: int = 0) -> SlicePlan:
    return SlicePlan(
        start=start,
        end=start + 1,
        first_line=1,
        requests=requests,
        models=(model,),
        bytes=size,
    )


def route(name: str = "hosted", pattern: str = "*", **more: Any) -> Route:
    limits = more.pop("limits", {})
    native = NativeUse(upstream=Upstream(**limits), **more)
    return Route(name=name, upstreams=(), models=(pattern,), native=native)


def sizes(jobs: list[list[int]], pieces: list[SlicePlan]) -> list[int]:
    return [sum(pieces[index].requests for index in job) for job in jobs]


# Ways


def test_a_way_is_that_of_the_upstream_and_of_the_model_where_it_takes_one_only() -> None:
    assert way_of(route(), "a", CHAT) != way_of(route(), "b", CHAT)
    mixed = route(limits={"one_model": False})
    assert way_of(mixed, "a", CHAT) == way_of(mixed, "b", CHAT) != ""


def test_lines_without_a_batch_api_go_one_by_one() -> None:
    assert way_of(None, "a", CHAT) == ""
    assert way_of(Route(name="own", upstreams=(), models=("*",)), "a", CHAT) == ""
    assert way_of(route(), "a", "/v1/messages") == ""


# Splitting


@given(
    requests=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    size=st.integers(0, 900),
    least=st.integers(1, 60),
)
def test_jobs_hold_to_the_limits_in_input_order(
    requests: list[int], size: int, least: int
) -> None:
    pieces = [piece(count, count * size) for count in requests]
    limits = BatchLimits(
        endpoints=frozenset(), max_requests=100, max_bytes=50_000, min_requests=least
    )

    jobs = split(pieces, limits)

    given_out = [index for job in jobs for index in job]
    assert given_out == sorted(set(given_out))
    for job, count in zip(jobs, sizes(jobs, pieces), strict=True):
        assert least <= count <= 100
        assert sum(pieces[index].bytes + 64 * pieces[index].requests for index in job) <= 50_000


@given(requests=st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_without_a_minimum_no_line_is_left_out(requests: list[int]) -> None:
    pieces = [piece(count) for count in requests]

    jobs = split(pieces, LIMITS)

    assert sum(sizes(jobs, pieces)) == sum(requests)


def test_jobs_are_of_about_the_same_size() -> None:
    pieces = [piece(10) for _ in range(21)]

    assert sizes(split(pieces, LIMITS), pieces) == [70, 70, 70]


def test_a_slice_that_is_too_much_alone_is_in_no_job() -> None:
    assert split([piece(50), piece(101), piece(5, 200_000), piece(50)], LIMITS) == [[0, 3]]


# Planning


def test_each_way_has_runs_and_its_slices_name_them() -> None:
    routes = Routes([route("a", "a*"), Route(name="own", upstreams=(), models=("*",))])
    plans = [piece(3, model="a1"), piece(2, model="x"), piece(3, model="a2", start=1)]

    planned = NativePlanner(routes).plan(BATCH, plans, now=7)

    runs = {run.id: (run.upstream, run.model, run.requests) for run in planned.runs}
    assert sorted(runs.values()) == [("a", "a1", 3), ("a", "a2", 3)]
    assert all(run.due_at == 7 for run in planned.runs)
    held = [each.native_run for each in planned.slices]
    assert held[1] is None
    assert [runs[each][1] for each in (held[0], held[2]) if each] == ["a1", "a2"]


@pytest.mark.parametrize(
    ("more", "requests", "is_native"),
    [
        ({}, 1, True),
        ({"from_requests": 6}, 5, False),
        ({"from_requests": 6}, 6, True),
        ({"limits": {"min_requests": 6}}, 5, False),
        ({"limits": {"min_requests": 6}}, 6, True),
    ],
)
def test_too_few_lines_make_no_run(
    more: dict[str, Any], requests: int, is_native: bool
) -> None:
    planned = NativePlanner(Routes([route(**more)])).plan(BATCH, [piece(requests)], now=0)

    assert bool(planned.runs) == is_native
    assert (planned.slices[0].native_run is not None) == is_native


def test_an_upstream_that_was_chosen_takes_all_models() -> None:
    routes = Routes([Route(name="own", upstreams=(), models=("*",)), route("b", "none")])
    batch = replace(BATCH, upstream="b")

    planned = NativePlanner(routes).plan(batch, [piece(3, model="x")], now=0)

    assert [run.upstream for run in planned.runs] == ["b"]
    assert planned.slices[0].upstream == "b"


def test_lines_of_all_models_go_one_way_to_the_one_that_is_asked_for() -> None:
    planner = NativePlanner(Routes([route("b", "none")]))
    batch = replace(BATCH, upstream="b", parameters={"x-tfy-provider-model": "y"})
    pieces = [piece(3, model="x"), piece(3, model="z", start=1)]

    planned = planner.plan(batch, pieces, now=0)

    assert [(run.model, run.requests) for run in planned.runs] == [("y", 6)]
    ways = planner.ways(batch)
    assert ways is not None
    assert ways("x") == ways("z")


def test_without_a_batch_api_there_are_no_ways() -> None:
    routes = Routes([Route(name="own", upstreams=(), models=("*",))])

    assert NativePlanner(routes).ways(BATCH) is None


def test_a_run_is_halved_until_it_has_one_slice() -> None:
    planned = NativePlanner(Routes([route()])).plan(BATCH, [piece(3), piece(4)], now=0)
    [run] = planned.runs

    parts = parts_of(run, planned.slices, now=9)

    assert [part.requests for part, _ in parts] == [3, 4]
    assert len({run.id, *(part.id for part, _ in parts)}) == 3
    assert parts_of(run, planned.slices[:1], now=9) == []


def test_a_run_that_may_fall_back_stops_when_a_tenth_of_the_window_is_left() -> None:
    assert stop_at(BATCH, falls_back=False) == 2000
    assert stop_at(BATCH, falls_back=True) == 1900


# Names of lines


@given(line=st.integers(1, 10**14))
def test_a_line_is_found_by_its_name(line: int) -> None:
    assert parse_line_name(line_name(line)) == line


@pytest.mark.parametrize("name", ["", "l", "7", "l07", "l-1", "l1 ", "L1", "l\u0661", "l" * 99])
def test_a_name_that_was_not_given_is_no_line(name: str) -> None:
    assert parse_line_name(name) is None


# Patience


def test_looks_at_a_job_become_rarer_as_it_grows_old() -> None:
    policy = NativePolicy(first_poll_s=10, max_poll_s=300)

    waits = [policy.poll_wait_s(age_s=age, jitter=0) for age in (0, 100, 600, 3000, 80_000)]

    assert waits == [10, 10, 60, 300, 300]
    assert policy.poll_wait_s(age_s=80_000, jitter=1) == 375


def test_waits_after_failures_double_and_honour_what_was_asked_for() -> None:
    policy = NativePolicy(first_wait_s=5, max_wait_s=600)

    waits = [
        policy.wait_s(attempt=attempt, jitter=0, asked_s=None) for attempt in (1, 2, 3, 9, 999)
    ]

    assert waits == [5, 10, 20, 600, 600]
    assert policy.wait_s(attempt=1, jitter=0, asked_s=42) == 42
    assert policy.wait_s(attempt=1, jitter=0, asked_s=86400) == 600
