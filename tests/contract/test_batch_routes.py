"""The batch routes: section 2 of the contract, row by row."""

import re
from typing import Any, NamedTuple

import httpx2
import pytest

from tests.contract.conftest import KEY, Body, Server, jsonl, new_gate, request, say

CHAT = "/v1/chat/completions"


class Refusal(NamedTuple):
    """A request that is refused, and how."""

    method: str
    path: str
    options: Body
    status: int
    type: str
    code: str | None
    param: str | None
    words: str
    """How the message begins, as a pattern."""


def create(**changed: Any) -> Body:
    """The options of a request for a batch; `...` takes a member away."""
    body = {"input_file_id": "file-x", "endpoint": CHAT, "completion_window": "24h"} | changed
    return {"json": {name: value for name, value in body.items() if value is not ...}}


def post(
    options: Body, status: int, code: str | None, param: str | None, words: str
) -> Refusal:
    return Refusal("POST", "/batches", options, status, BAD, code, param, words)


BAD = "invalid_request_error"
REFUSALS = {
    "unsupported endpoint": post(
        create(endpoint="/v1/x"),
        400,
        "invalid_value",
        "endpoint",
        "Invalid value: '/v1/x'. Supported values are: ",
    ),
    "bad completion_window": post(
        create(completion_window="soon"),
        400,
        "invalid_value",
        "completion_window",
        "Invalid value: 'soon'. Supported values of completion_window",
    ),
    "empty completion_window": post(
        create(completion_window=""), 400, "invalid_value", "completion_window", "Invalid value"
    ),
    "missing input_file_id": post(
        create(input_file_id=...),
        400,
        "missing_required_parameter",
        "input_file_id",
        "Missing required parameter: 'input_file_id'.",
    ),
    "missing endpoint": post(
        create(endpoint=...),
        400,
        "missing_required_parameter",
        "endpoint",
        "Missing required parameter: 'endpoint'.",
    ),
    "metadata value not a string": post(
        create(metadata={"tags": ["a"]}),
        400,
        "invalid_type",
        "metadata.tags",
        "Invalid type for 'metadata.tags': expected a string, but got an array instead.",
    ),
    "metadata above 16 pairs": post(
        create(metadata={str(n): "" for n in range(17)}),
        400,
        "object_above_max_properties",
        "metadata",
        "Invalid 'metadata': too many properties.",
    ),
    "metadata key above 64": post(
        create(metadata={"k" * 65: ""}), 400, "string_above_max_length", "metadata", "Invalid"
    ),
    "metadata value above 512": post(
        create(metadata={"k": "v" * 513}),
        400,
        "string_above_max_length",
        "metadata.k",
        "Invalid 'metadata.k'",
    ),
    "output_expires_after too short": post(
        create(output_expires_after={"anchor": "created_at", "seconds": 3599}),
        400,
        "integer_below_min_value",
        "output_expires_after.seconds",
        "Invalid 'output_expires_after.seconds'",
    ),
    "output_expires_after too long": post(
        create(output_expires_after={"anchor": "created_at", "seconds": 2_592_001}),
        400,
        "integer_above_max_value",
        "output_expires_after.seconds",
        "Invalid 'output_expires_after.seconds'",
    ),
    "unknown input file": post(
        create(), 404, None, "input_file_id", "No such File object: file-x"
    ),
    "malformed JSON body": post(
        {"content": b'{"input_file_id":'}, 400, None, None, "We could not parse the JSON"
    ),
    "body is no object": post(
        {"content": b"[]"}, 400, "invalid_type", None, "Invalid type for the request body"
    ),
    "unknown batch": Refusal(
        "GET", "/batches/batch_x", {}, 404, BAD, None, None, "No batch found with id 'batch_x'"
    ),
    "cancel of an unknown batch": Refusal(
        "POST", "/batches/batch_x/cancel", {}, 404, BAD, None, None, "No batch found with id"
    ),
    "no key": Refusal(
        "GET",
        "/batches",
        {"headers": {"authorization": ""}},
        401,
        BAD,
        None,
        None,
        "You didn't provide an API key",
    ),
    "wrong key": Refusal(
        "GET",
        "/batches",
        {"headers": {"authorization": "Bearer sk-wrong-0123456789abcdef0123456789"}},
        401,
        BAD,
        "invalid_api_key",
        None,
        "Incorrect API key provided: sk-wrong-012345…6789",
    ),
    "unknown route": Refusal(
        "POST", "/foo", {}, 404, BAD, None, None, r"Invalid URL \(POST /v1/foo\)"
    ),
    "wrong method": Refusal(
        "PATCH", "/batches", {}, 405, BAD, None, None, r"Invalid method for URL \(PATCH"
    ),
    "limit above 100": Refusal(
        "GET", "/batches?limit=101", {}, 400, BAD, "integer_above_max_value", "limit", "Invalid"
    ),
    "limit below 1": Refusal(
        "GET", "/batches?limit=0", {}, 400, BAD, "integer_below_min_value", "limit", "Invalid"
    ),
    "limit is no number": Refusal(
        "GET", "/batches?limit=x", {}, 400, BAD, "invalid_type", "limit", "Invalid type"
    ),
}


@pytest.mark.parametrize("row", REFUSALS.values(), ids=REFUSALS)
def test_what_is_wrong_is_refused_so(row: Refusal, server: Server) -> None:
    answered = server.http.request(row.method, row.path, **row.options)

    assert answered.status_code == row.status, answered.text
    assert set(answered.json()) == {"error"}
    error = answered.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"], error["param"]) == (row.type, row.code, row.param)
    assert re.match(row.words, error["message"]), error["message"]
    assert KEY not in answered.text


@pytest.mark.parametrize("row", REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_is_json_and_names_its_request(row: Refusal, server: Server) -> None:
    answered = server.http.request(row.method, row.path, **row.options)

    assert answered.headers["content-type"] == "application/json"
    assert answered.headers["x-request-id"].startswith("req_")
    assert int(answered.headers["openai-processing-ms"]) >= 0
    assert "retry-after" not in answered.headers


def test_a_file_of_another_purpose_is_refused(server: Server) -> None:
    files = {"file": ("a.jsonl", jsonl(request()))}
    other = server.http.post("/files", data={"purpose": "user_data"}, files=files).json()

    error = server.try_create(other["id"]).json()["error"]

    assert (error["type"], error["param"]) == (BAD, "input_file_id")
    assert "purpose" in error["message"]


@pytest.mark.parametrize("metadata", [None, {}, {"a": "b"}], ids=str)
def test_metadata_may_be_null(metadata: dict[str, str] | None, server: Server) -> None:
    assert server.start(request(), metadata=metadata)["metadata"] == metadata


def test_a_new_batch_is_validating_and_answered_with_200(server: Server) -> None:
    answered = server.try_create(server.upload(jsonl(request()))["id"])

    assert answered.status_code == 200
    assert answered.json()["status"] == "validating"
    assert "output_expires_after" not in answered.json()


@pytest.mark.parametrize(
    ("content_type", "content"),
    [
        ("application/json", b""),
        (None, b""),
        ("text/plain", b""),
        ("application/json", b"{"),
    ],
    ids=["python", "node", "other", "not looked at"],
)
def test_a_cancel_brings_no_body(
    content_type: str | None, content: bytes, server: Server
) -> None:
    gate = new_gate()
    batch = server.start(request(content=say(until=gate)))
    server.wait(batch["id"], lambda each: each["status"] == "in_progress")
    headers = {"content-length": str(len(content))}
    headers |= {"content-type": content_type} if content_type else {}

    answered = server.http.post(
        f"/batches/{batch['id']}/cancel", content=content, headers=headers
    )
    server.upstream.open(gate)

    assert answered.status_code == 200
    cancelled = answered.json()
    assert cancelled["status"] == "cancelling"
    assert cancelled["cancelling_at"] is not None
    assert (cancelled["output_file_id"], cancelled["error_file_id"]) == (None, None)
    server.wait(batch["id"])


@pytest.mark.parametrize("faulty", [False, True], ids=["completed", "failed"])
def test_a_cancel_of_what_has_ended_is_a_409_that_no_client_repeats(
    faulty: bool, server: Server
) -> None:
    batch = server.run(request(method="GET") if faulty else request())
    assert batch["status"] == ("failed" if faulty else "completed")

    answered = server.cancel(batch["id"])

    assert answered.status_code == 409
    assert answered.headers["x-should-retry"] == "false"
    error = answered.json()["error"]
    assert (error["type"], error["code"], error["param"]) == (BAD, None, None)
    assert error["message"].startswith(
        f"Cannot cancel a batch with status '{batch['status']}'."
    )


# Lists


@pytest.fixture(scope="module")
def ids(server: Server) -> list[str]:
    """21 batches of one name, the newest first."""
    file_id = server.upload(jsonl(request()))["id"]
    made = [server.create(file_id, job_name="listed")["id"] for _ in range(21)]
    return made[::-1]


def page(server: Server, **query: object) -> Body:
    answered: httpx2.Response = server.http.get("/batches", params={**query})
    assert answered.status_code == 200, answered.text
    return answered.json()


def test_a_list_has_its_keys_and_20_batches_newest_first(
    ids: list[str], server: Server
) -> None:
    listed = page(server, job_name="listed")

    assert set(listed) == {"object", "data", "first_id", "last_id", "has_more"}
    assert listed["object"] == "list"
    assert [batch["id"] for batch in listed["data"]] == ids[:20]
    assert (listed["first_id"], listed["last_id"]) == (ids[0], ids[19])
    assert listed["has_more"] is True


@pytest.mark.parametrize("limit", [1, 7, 100])
def test_pages_follow_each_other_and_end(limit: int, ids: list[str], server: Server) -> None:
    found: list[str] = []
    after: dict[str, object] = {}
    while True:
        listed = page(server, job_name="listed", limit=limit, **after)
        found += [batch["id"] for batch in listed["data"]]
        if not listed["has_more"]:
            break
        after = {"after": listed["last_id"]}

    assert found == ids
    # Clients before 1.62 go on until a page is empty.
    last = page(server, job_name="listed", after=ids[-1])
    assert last == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }


def test_a_new_batch_moves_no_page(ids: list[str], server: Server) -> None:
    first = page(server, job_name="listed", limit=5)
    server.start(request(), job_name="other")

    second = page(server, job_name="listed", limit=5, after=first["last_id"])

    assert [batch["id"] for batch in second["data"]] == ids[5:10]
