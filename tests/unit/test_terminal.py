"""What the commands show a person."""

import io
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from rich.console import Console

from penstock.client import BatchObject, Client, CostObject, ServerFailed, UpstreamState
from penstock.terminal import (
    Pace,
    batch_view,
    batches_table,
    clean,
    dollars,
    failure_reasons,
    span,
    summary,
    tokens,
    watch,
)

from .stub_server import KEY, NOON, Stub, a_batch, run_stub


@pytest.fixture
def stub() -> Iterator[Stub]:
    with run_stub() as stub:
        stub.batches = [a_batch()]
        yield stub


@pytest.fixture
def client(stub: Stub) -> Iterator[Client]:
    with Client(stub.url, KEY) as client:
        yield client


def batch(**fields: Any) -> BatchObject:
    return msgspec.convert(a_batch(**fields), BatchObject)


def counts(total: int, completed: int, failed: int) -> dict[str, int]:
    return {"total": total, "completed": completed, "failed": failed}


RUN = [
    {"status": "validating"},
    {"status": "in_progress", "request_counts": counts(1000, 0, 0)},
    {"status": "in_progress", "request_counts": counts(1000, 600, 5)},
    {"status": "finalizing", "request_counts": counts(1000, 990, 10)},
    {"status": "completed", "completed_at": NOON + 130},
]


def shown(view: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0s"),
        (0.9, "0s"),
        (59, "59s"),
        (60, "1m"),
        (200, "3m 20s"),
        (3600, "1h"),
        (7500, "2h 5m"),
        (86400, "1d"),
        (90061, "1d 1h"),
    ],
)
def test_a_span_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_a_pace_is_that_of_the_last_half_minute() -> None:
    pace = Pace()
    for second in range(0, 101, 10):
        pace.add(second, 0 if second <= 70 else (second - 70) * 6)

    assert pace.per_second == 6
    assert pace.seconds_left(60) == 10


def test_a_pace_is_not_known_from_one_look() -> None:
    pace = Pace()
    pace.add(1, 5)

    assert pace.per_second is None
    assert pace.seconds_left(60) is None


def test_a_batch_that_stands_still_has_no_end_in_sight() -> None:
    pace = Pace()
    pace.add(1, 5)
    pace.add(2, 5)

    assert pace.per_second == 0
    assert pace.seconds_left(60) is None


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert clean("a\x1b[31mb\u202ec") == "a�[31mb�c"


def test_without_a_terminal_a_line_is_printed_at_each_change(
    stub: Stub, client: Client
) -> None:
    stub.stages = [dict(stage) for stage in RUN]
    console = Console(file=io.StringIO(), width=20)

    ended = watch(client, stub.batches[0]["id"], console)

    assert ended.status == "completed"
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [
        "validating:",
        "in_progress:",
        "finalizing:",
        "completed:",
    ]
    assert lines[2].endswith(" finalizing: 1,000 of 1,000 lines ended, 10 failed")


def test_on_a_terminal_a_bar_shows_speed_failures_and_time_left(
    stub: Stub, client: Client
) -> None:
    stub.stages = [dict(stage) for stage in RUN]
    console = Console(
        file=io.StringIO(), width=120, force_terminal=True, force_interactive=True
    )

    watch(client, stub.batches[0]["id"], console)

    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for figure in ("605/1,000", "5 failed", "lines/s", " left"):
        assert figure in text


def test_a_server_that_goes_away_is_waited_for(stub: Stub, client: Client) -> None:
    stub.stages = [{"status": "in_progress", "then_fails": 2}, {"status": "completed"}]
    console = Console(file=io.StringIO(), width=200)

    assert watch(client, stub.batches[0]["id"], console).status == "completed"
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count("Trying again.") == 1


def test_a_server_that_never_answered_is_not_waited_for(stub: Stub, client: Client) -> None:
    stub.failures = 1

    with pytest.raises(ServerFailed):
        watch(client, stub.batches[0]["id"], Console(file=io.StringIO()))


def test_a_batch_is_shown_with_all_that_matters() -> None:
    usage = {
        "input_tokens": 1200,
        "input_tokens_details": {"cached_tokens": 100},
        "output_tokens": 300,
        "output_tokens_details": {"reasoning_tokens": 20},
        "total_tokens": 1500,
    }

    text = shown(
        batch_view(
            batch(
                status="in_progress",
                request_counts=counts(1000, 600, 5),
                model="qwen",
                job_name="night[red]",
                metadata={"team": "a"},
                usage=usage,
            ),
            now=NOON + 130,
        )
    )

    for part in (
        "in_progress (60 %)",
        "600 completed, 5 failed, 1,000 in all",
        "2m 10s ago",
        "in 23h 57m; window 24h",
        "1,200 in (100 cached), 300 out (20 reasoning), 1,500 in all",
        "night[red]",
        "team=a",
        "qwen",
        "file-in",
    ):
        assert part in text


def test_a_failed_batch_is_shown_with_its_first_faults() -> None:
    faults = [
        {"code": "invalid_url", "message": f"Fault {n}.", "param": "url", "line": n}
        for n in range(1, 13)
    ]

    text = shown(
        batch_view(batch(status="failed", errors={"object": "list", "data": faults}), now=NOON)
    )

    assert "line 1: invalid_url (url): Fault 1." in text
    assert "line 10: " in text
    assert "line 11: " not in text
    assert "and 2 more" in text


def test_batches_are_shown_one_a_row() -> None:
    text = shown(
        batches_table(
            [batch(status="in_progress", request_counts=counts(10, 6, 1), job_name="a")],
            now=NOON + 60,
        )
    )

    head, row = text.splitlines()
    assert head.split()[:3] == ["ID", "STATUS", "JOB"]
    assert row.split()[:4] == [batch().id, "in_progress", "a", "6/1/10"]
    assert row.rstrip().endswith("1m")


def test_a_summary_says_how_the_lines_ended() -> None:
    ended = batch(status="expired", expired_at=NOON + 90, request_counts=counts(10, 6, 4))

    assert summary(ended) == (
        f"Batch {ended.id} expired in 1m 30s: 6 of 10 lines succeeded, 4 failed."
    )


def test_lines_that_a_provider_has_are_shown_as_such() -> None:
    state = UpstreamState("openai", limit=128, most=256)
    state.batches = {"submitted": 5000, "waiting": 20}

    text = shown(batch_view(batch(status="in_progress"), now=NOON, upstreams=[state]))

    assert "its batch API: 5,000 lines at work there, 20 lines to be submitted" in text
    assert "allowed now" not in text


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        ("0", "0.00"),
        ("0.00123456", "0.0012"),
        ("0.0099", "0.0099"),
        ("0.01", "0.010"),
        ("0.1", "0.10"),
        ("1234.567", "1,234.57"),
        ("0.00000005", "0.000000050"),
    ],
)
def test_an_amount_has_cents_and_two_digits_that_count(amount: str, text: str) -> None:
    assert dollars(Decimal(amount)) == text


@pytest.mark.parametrize(
    ("count", "text"), [(9_999, "9,999"), (12_345, "12.3 k"), (2_100_000, "2.1 M")]
)
def test_tokens_are_told_in_short(count: int, text: str) -> None:
    assert tokens(count) == f"{text} tokens"


def cost(**fields: Any) -> CostObject:
    usage = {"total_tokens": 500}
    one = {"mode": "native", "upstream": "far", "requests": 3, "usage": usage}
    return msgspec.convert(one | fields, CostObject, strict=False)


@pytest.mark.parametrize(
    ("told", "text"),
    [
        (
            cost(cost="1", line_cost="2", source="settings"),
            "At far 3 lines, 500 tokens, US$ 1.00 (line by line: 2.00; by settings)",
        ),
        (cost(cost="1", at_least=True), "At far 3 lines, 500 tokens, at least US$ 1.00"),
        (
            cost(cost="0.006", line_cost="0.012"),
            "At far 3 lines, 500 tokens, US$ 0.0060 (line by line: 0.0120)",
        ),
        (
            cost(cost="0.013", line_cost="0.026"),
            "At far 3 lines, 500 tokens, US$ 0.013 (line by line: 0.026)",
        ),
        (cost(cost="0", line_cost="0.026"), "US$ 0.000 (line by line: 0.026)"),
        (cost(), "At far 3 lines, 500 tokens, price unknown: lines of several models"),
        (
            cost(model="m"),
            "At far 3 lines of m, 500 tokens, price unknown: no price of this model",
        ),
        (
            cost(model="m", usage={"total_tokens": 0}),
            "3 lines of m, 0 tokens, price unknown: answers told of no tokens",
        ),
        (
            cost(line_cost="2", model="m"),
            "At far 3 lines of m, 500 tokens, price unknown: no discount of batches known "
            "(line by line: 2.00)",
        ),
        (cost(status="running", usage=None), "At far 3 lines, not ended yet"),
        (cost(usage=None), "At far 3 lines; what they took is not known"),
    ],
)
def test_what_a_job_cost_is_told_as_far_as_it_is_known(told: CostObject, text: str) -> None:
    assert text in " ".join(shown(batch_view(batch(), now=NOON, costs=[told])).split())


def test_lines_that_no_provider_batched_are_priced_beside_those_or_where_that_is_known() -> (
    None
):
    unknown = cost(mode="lines", upstream="own")
    known = cost(mode="lines", upstream="own", cost="1", line_cost="1")

    def told(*costs: CostObject) -> bool:
        return "Line by line" in shown(batch_view(batch(), now=NOON, costs=costs))

    assert not told(unknown)
    assert told(known)
    assert told(cost(), unknown)


def line_by_line(**fields: Any) -> str:
    """What is shown of lines sent one by one, beside a job."""
    lines = cost(mode="lines", model="m", **fields)
    return " ".join(shown(batch_view(batch(), now=NOON, costs=[cost(), lines])).split())


def test_lines_one_by_one_of_a_batch_that_runs_are_told_so_far() -> None:
    fields = {"status": "running", "cost": "1", "line_cost": "1"}

    assert "Line by line 3 lines of m so far, 500 tokens, US$ 1.00" in line_by_line(**fields)


def test_where_several_upstreams_took_lines_it_is_not_said_that_the_model_has_no_price() -> (
    None
):
    lines = "Line by line 3 lines of m, 500 tokens, price unknown"
    assert f"{lines} Input file" in line_by_line(upstream=None)
    assert f"{lines}: no price of this model Input" in line_by_line(upstream="own")


# Why lines failed


def no_answer(code: str, message: str) -> bytes:
    return msgspec.json.encode({"response": None, "error": {"code": code, "message": message}})


def answer(status: int, body: object) -> bytes:
    response = {"status_code": status, "request_id": "r", "body": body}
    return msgspec.json.encode({"response": response, "error": None})


def test_each_reason_is_told_once_in_the_words_of_the_error_file() -> None:
    lines = [no_answer("upstream_batch_failed", "It said no.")] * 3
    lines += [answer(400, {"error": {"message": "Too long."}})] * 2
    lines += [answer(429, {"detail": "Slow."}), b"cut off", b"[]"]

    assert failure_reasons(lines) == [
        "3 × upstream_batch_failed: It said no.",
        "2 × HTTP 400: Too long.",
        "1 × HTTP 429: None",
    ]


def test_of_many_reasons_the_most_frequent_are_told() -> None:
    lines = [no_answer("c", str(n)) for n in range(5) for _ in range(10 - n)]

    assert failure_reasons(lines) == [
        "10 × c: 0",
        "9 × c: 1",
        "8 × c: 2",
        "and 2 other reasons",
    ]


def test_a_reason_is_cut_and_steers_no_terminal() -> None:
    [reason] = failure_reasons([no_answer("c", "\x1b[2J" + "long " * 1000)])

    assert "\x1b" not in reason
    assert len(reason) < 700


def test_no_reason_is_told_where_each_line_has_its_own() -> None:
    assert failure_reasons(no_answer("c", str(n)) for n in range(10_001)) == []
