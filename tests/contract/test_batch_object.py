"""The batch object, its counts and its states: sections 1.1, 1.3 and 1.4 of the contract."""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx2
import pytest

from tests.contract.conftest import (
    DAY_S,
    FINAL,
    Body,
    Server,
    chat,
    jsonl,
    new_gate,
    refuse,
    request,
    say,
)

STATUSES = (
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
)
ALL = frozenset(STATUSES)
BEGUN = ALL - {"validating", "failed"}
METADATA = {"team": "search", "é": ""}


# What is looked at


@pytest.fixture(scope="module")
def batches(server: Server) -> dict[str, Body]:
    """One batch as it stood in each status.

    Those that have results have two good lines and a bad one; the cancelled one was in progress
    before.
    """
    lines = [request("a"), request("b"), request("c", refuse())]
    gate = new_gate()
    held = request("held", say(until=gate))
    expiring = server.start(*lines, request("d", say(until=new_gate())), completion_window="3s")

    seen: dict[str, Body] = {"validating": server.start(*lines, metadata=METADATA)}
    seen["completed"] = server.wait(seen["validating"]["id"])
    seen["failed"] = server.run(request("a"), b"{", b"{}")
    batch = server.start(*lines, held)
    seen["in_progress"] = server.wait(batch["id"], lambda batch: _ended(batch) == 3)
    seen["cancelling"] = server.cancel(batch["id"]).json()
    server.upstream.open(gate)
    seen["cancelled"] = server.wait(batch["id"])
    _, seen["finalizing"] = catch_finalizing(server)
    seen["expired"] = server.wait(expiring["id"])
    assert {status: batch["status"] for status, batch in seen.items()} == {
        status: status for status in STATUSES
    }
    return seen


def _ended(batch: Body) -> int:
    return batch["request_counts"]["completed"] + batch["request_counts"]["failed"]


def catch_finalizing(
    server: Server, then: Callable[[str], httpx2.Response] | None = None
) -> tuple[httpx2.Response | None, Body]:
    """Run batches of more and more bytes until one is seen while its files are written.

    Args:
        then: Called at that moment with its ID; it must be in time to answer 200.
    """
    for count in (8, 16, 32, 64):
        gate = new_gate()
        large = say({"text": "x" * (2 << 20)})
        lines = [request(f"r{n}", large) for n in range(count)]
        batch = server.start(*lines, request("last", say(until=gate)), request("c", refuse()))
        server.wait(batch["id"], lambda batch, count=count: _ended(batch) == count + 1)
        server.upstream.open(gate)
        batch = server.wait(
            batch["id"], lambda batch: batch["status"] in {"finalizing", *FINAL}, every_s=0
        )
        if batch["status"] == "finalizing":
            answered = then(batch["id"]) if then else None
            if answered is None or answered.status_code == 200:
                return answered, batch
    raise AssertionError("No batch was seen while its files were written.")


# 1.1: every field


class Field(NamedTuple):
    """What a field holds."""

    kind: type
    set_in: frozenset[str]
    """In which statuses it has a value."""
    may_be_in: frozenset[str] = frozenset()
    """In which it may have one, too."""


FIELDS = {
    "id": Field(str, ALL),
    "object": Field(str, ALL),
    "endpoint": Field(str, ALL),
    "model": Field(str, BEGUN),
    "errors": Field(dict, frozenset({"failed"})),
    "input_file_id": Field(str, ALL),
    "completion_window": Field(str, ALL),
    "status": Field(str, ALL),
    "output_file_id": Field(str, frozenset({"completed", "expired", "cancelled"})),
    "error_file_id": Field(str, frozenset({"completed", "expired", "cancelled"})),
    "created_at": Field(int, ALL),
    "in_progress_at": Field(int, BEGUN),
    "expires_at": Field(int, ALL),
    "finalizing_at": Field(int, frozenset({"finalizing", "completed"}), frozenset({"expired"})),
    "completed_at": Field(int, frozenset({"completed"})),
    "failed_at": Field(int, frozenset({"failed"})),
    "expired_at": Field(int, frozenset({"expired"})),
    "cancelling_at": Field(int, frozenset({"cancelling", "cancelled"})),
    "cancelled_at": Field(int, frozenset({"cancelled"})),
    "request_counts": Field(dict, ALL),
    "usage": Field(dict, ALL),
    "metadata": Field(dict, frozenset({"validating", "completed"})),
}


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("name", FIELDS)
def test_a_field_is_always_there_and_null_where_it_has_no_value(
    name: str, status: str, batches: dict[str, Body]
) -> None:
    field, batch = FIELDS[name], batches[status]

    assert name in batch
    if status not in field.may_be_in:
        assert (batch[name] is not None) == (status in field.set_in)
    assert batch[name] is None or type(batch[name]) is field.kind


@pytest.mark.parametrize("status", STATUSES)
def test_the_counts_and_the_usage_have_all_their_keys(
    status: str, batches: dict[str, Body]
) -> None:
    batch = batches[status]

    assert batch["request_counts"].keys() == {"total", "completed", "failed"}
    assert batch["usage"].keys() == {
        "input_tokens",
        "input_tokens_details",
        "output_tokens",
        "output_tokens_details",
        "total_tokens",
    }
    assert batch["usage"]["input_tokens_details"].keys() == {"cached_tokens"}
    assert batch["usage"]["output_tokens_details"].keys() == {"reasoning_tokens"}


@pytest.mark.parametrize("status", STATUSES)
def test_a_batch_repeats_what_was_asked_for(status: str, batches: dict[str, Body]) -> None:
    batch = batches[status]

    assert batch["object"] == "batch"
    assert re.fullmatch("batch_[0-9a-f]{32}", batch["id"])
    assert batch["endpoint"] == "/v1/chat/completions"
    assert batch["input_file_id"].startswith("file-")
    window_s = 3 if status == "expired" else DAY_S
    assert batch["completion_window"] == ("3s" if status == "expired" else "24h")
    assert batch["expires_at"] == batch["created_at"] + window_s


@pytest.mark.parametrize("status", STATUSES)
def test_the_times_follow_each_other(status: str, batches: dict[str, Body]) -> None:
    batch = batches[status]
    steps = ("created_at", "in_progress_at", "finalizing_at", "cancelling_at")

    last = batch.get(f"{status}_at")
    times = [*(batch[step] for step in steps), last]
    known = [time for time in times if time is not None]
    assert known == sorted(known)


def test_the_errors_are_a_list_of_entries(batches: dict[str, Body]) -> None:
    errors = batches["failed"]["errors"]

    assert errors.keys() == {"object", "data"}
    assert errors["object"] == "list"
    for entry in errors["data"]:
        assert entry.keys() == {"code", "message", "param", "line"}
        assert type(entry["line"]) is int
        assert isinstance(entry["code"], str)
        assert isinstance(entry["message"], str)


@pytest.mark.parametrize(
    ("sent", "echoed"),
    [
        pytest.param({}, None, id="not-sent"),
        pytest.param({"metadata": None}, None, id="null"),
        pytest.param({"metadata": {}}, {}, id="empty"),
        pytest.param({"metadata": METADATA}, METADATA, id="pairs"),
        pytest.param(
            {"metadata": {f"{n:064}": "é" * 512 for n in range(16)}},
            {f"{n:064}": "é" * 512 for n in range(16)},
            id="most",
        ),
    ],
)
def test_metadata_come_back_as_they_were_sent(
    sent: Body, echoed: object, server: Server
) -> None:
    batch = server.start(request(), **sent)

    assert batch["metadata"] == echoed
    assert server.wait(batch["id"])["metadata"] == echoed


def test_the_model_is_the_one_of_all_lines(server: Server) -> None:
    one = server.run(*(request(each, body=chat(model="n-7")) for each in "ab"))
    two = server.run(request("a"), request("b", body=chat(model="n-7")))

    assert one["model"] == "n-7"
    assert two["model"] is None


def test_every_answer_is_json_and_names_its_request(server: Server) -> None:
    file_id = server.upload(jsonl(request()))["id"]
    created = server.try_create(file_id)
    batch_id = created.json()["id"]
    server.wait(batch_id)
    answers = [created, server.http.get(f"/batches/{batch_id}"), server.cancel(batch_id)]

    assert [each.status_code for each in answers] == [200, 200, 409]
    assert {each.headers["content-type"] for each in answers} == {"application/json"}
    assert all(each.headers["x-request-id"].startswith("req_") for each in answers)


# 1.3: the counts


@pytest.fixture(scope="module")
def history(server: Server) -> list[Body]:
    """A batch of four groups of lines, polled from its creation to its end."""
    gates = [new_gate() for _ in range(4)]
    lines = [
        line
        for gate in gates
        for line in (
            request(f"{gate}-1", say(until=gate)),
            request(f"{gate}-2", say(until=gate)),
            request(f"{gate}-3", refuse(until=gate)),
        )
    ]
    seen = [server.start(*lines)]

    def look(batch: Body) -> Body:
        seen.append(batch)
        return batch

    server.wait(seen[0]["id"], lambda batch: look(batch)["status"] == "in_progress")
    for number, gate in enumerate(gates, 1):
        server.upstream.open(gate)
        server.wait(seen[0]["id"], lambda batch, due=3 * number: _ended(look(batch)) == due)
    server.wait(seen[0]["id"], lambda batch: look(batch)["status"] in FINAL)
    return seen


def test_the_total_is_0_until_the_file_was_read_and_then_stays(history: list[Body]) -> None:
    assert history[0]["status"] == "validating"
    for batch in history:
        total = batch["request_counts"]["total"]
        assert total == (0 if batch["status"] == "validating" else 12)


@pytest.mark.parametrize("name", ["completed", "failed"])
def test_counts_never_shrink(name: str, history: list[Body]) -> None:
    counts = [batch["request_counts"][name] for batch in history]

    assert counts == sorted(counts)
    assert counts[0] == 0
    # They grow while the batch runs, and not at its end only.
    running = {b["request_counts"][name] for b in history if b["status"] == "in_progress"}
    assert len(running) >= 3


def test_no_more_lines_have_ended_than_there_are(history: list[Body]) -> None:
    assert all(
        _ended(batch) <= batch["request_counts"]["total"]
        for batch in history
        if batch["status"] != "validating"
    )


def test_a_batch_goes_through_its_statuses_in_order(history: list[Body]) -> None:
    order = ["validating", "in_progress", "finalizing", "completed"]

    seen = [order.index(batch["status"]) for batch in history]
    assert seen == sorted(seen)


def test_no_file_is_named_before_the_end(history: list[Body]) -> None:
    for batch in history:
        is_final = batch["status"] == "completed"
        assert (batch["output_file_id"] is not None) == is_final
        assert (batch["error_file_id"] is not None) == is_final


@pytest.mark.parametrize(
    ("status", "counts"),
    [
        pytest.param("validating", (0, 0, 0), id="validating: nothing is known"),
        pytest.param("failed", (0, 0, 0), id="failed: nothing was run"),
        pytest.param("in_progress", (4, 2, 1), id="in_progress: so far"),
        pytest.param("completed", (3, 2, 1), id="completed: every line"),
        pytest.param("expired", (4, 2, 1), id="expired: without lines that never ran"),
        pytest.param("cancelled", (4, 3, 1), id="cancelled: with lines in flight"),
    ],
)
def test_the_counts_of_a_status(
    status: str, counts: tuple[int, int, int], batches: dict[str, Body]
) -> None:
    found = batches[status]["request_counts"]

    assert (found["total"], found["completed"], found["failed"]) == counts


# 1.4: the states


class Step(NamedTuple):
    """A row of the table: the times that a move sets, beside those that are set before."""

    before: str | None
    after: str
    sets: set[str]


STEPS = {
    "created": Step(None, "validating", {"created_at", "expires_at"}),
    "validating-failed": Step("validating", "failed", {"failed_at"}),
    "validating-in_progress": Step("validating", "in_progress", {"in_progress_at"}),
    "in_progress-finalizing": Step("in_progress", "finalizing", {"finalizing_at"}),
    "finalizing-completed": Step("finalizing", "completed", {"completed_at"}),
    "in_progress-expired": Step("in_progress", "expired", {"finalizing_at", "expired_at"}),
    "in_progress-cancelling": Step("in_progress", "cancelling", {"cancelling_at"}),
    "cancelling-cancelled": Step("cancelling", "cancelled", {"cancelled_at"}),
}


def _times(batch: Body) -> set[str]:
    return {name for name in batch if name.endswith("_at") and batch[name] is not None}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_move_sets_its_times_and_no_others(step: Step, batches: dict[str, Body]) -> None:
    before = _times(batches[step.before]) if step.before else set[str]()

    assert _times(batches[step.after]) - before == step.sets
    assert before <= _times(batches[step.after])


def test_a_batch_all_of_whose_lines_fail_is_completed(server: Server) -> None:
    batch = server.run(request("a", refuse()), request("b", refuse(404)))

    assert batch["status"] == "completed"
    assert batch["output_file_id"] is None


def test_a_cancelled_batch_ends_as_cancelled_also_while_it_is_validated(
    server: Server,
) -> None:
    # Two files are read at the same time; the third batch waits for its turn.
    line = json.dumps(request("CUSTOM", body=chat(user="x" * 2000)))
    data = "\n".join(line.replace("CUSTOM", f"r{n}") for n in range(10_000)).encode()
    file_id = server.upload(data)["id"]
    ids = [server.create(file_id)["id"] for _ in range(3)]

    answered, *_ = [server.cancel(batch_id).json() for batch_id in reversed(ids)]

    assert answered["status"] == "cancelling"
    assert answered["in_progress_at"] is None
    assert _times(answered) == {"created_at", "expires_at", "cancelling_at"}
    batch = server.wait(ids[2])
    assert batch["status"] == "cancelled"
    assert _times(batch) == {"created_at", "expires_at", "cancelling_at", "cancelled_at"}
    assert batch["output_file_id"] is batch["error_file_id"] is None
    assert batch["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    assert [server.wait(batch_id)["status"] for batch_id in ids[:2]] == ["cancelled"] * 2


def test_a_batch_is_cancelled_also_while_its_files_are_written(server: Server) -> None:
    answered, before = catch_finalizing(server, then=server.cancel)

    assert answered is not None
    assert answered.json()["status"] == "cancelling"
    assert _times(answered.json()) - _times(before) == {"cancelling_at"}
    batch = server.wait(before["id"])
    assert batch["status"] == "cancelled"
    # All its lines have been run, so its files are whole.
    counts = batch["request_counts"]
    assert counts["completed"] + counts["failed"] == counts["total"]
    output, error = server.lines(batch["output_file_id"]), server.lines(batch["error_file_id"])
    assert (len(output), len(error)) == (counts["completed"], counts["failed"])
    assert error.keys() == {"c"}


def test_a_second_cancel_changes_nothing(server: Server) -> None:
    gate = new_gate()
    batch = server.start(request("a", say(until=gate)))
    server.wait(batch["id"], lambda batch: batch["status"] == "in_progress")
    first = server.cancel(batch["id"])
    second = server.cancel(batch["id"])
    server.upstream.open(gate)
    ended = server.wait(batch["id"])

    third = server.cancel(batch["id"])

    assert [first.status_code, second.status_code, third.status_code] == [200] * 3
    assert first.json() == second.json()
    assert third.json() == ended
    assert (first.json()["status"], ended["status"]) == ("cancelling", "cancelled")


@pytest.mark.parametrize("status", ["completed", "failed", "expired"])
def test_a_batch_that_has_ended_cannot_be_cancelled(
    status: str, server: Server, batches: dict[str, Body]
) -> None:
    answered = server.cancel(batches[status]["id"])

    error: dict[str, Any] = answered.json()["error"]
    assert answered.status_code == 409
    # Without it all official clients would try again, twice.
    assert answered.headers["x-should-retry"] == "false"
    assert error == {
        "message": f"Cannot cancel a batch with status '{status}'.",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }
    assert server.get(batches[status]["id"]) == batches[status]


@pytest.mark.parametrize("call", ["get", "cancel"])
def test_an_unknown_batch_is_404(call: str, server: Server) -> None:
    path = "/batches/batch_unknown"
    answered = server.http.get(path) if call == "get" else server.http.post(f"{path}/cancel")

    assert answered.status_code == 404
    assert answered.json()["error"] == {
        "message": "No batch found with id 'batch_unknown'.",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }
