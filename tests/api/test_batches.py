"""Batches through the official client, and their shapes through raw requests."""

import json
import threading
import time
from decimal import Decimal
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import OpenAI

from penstock.api import wire
from penstock.model import ENDPOINTS, BatchId, BatchStatus, Counts, Fault, Usage
from penstock.prices import Cost, CostItem
from penstock.store.base import BatchChange
from tests.api.conftest import Server, Tenant

CHAT = "/v1/chat/completions"


def error_of(answer: httpx2.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def test_a_new_batch_is_validating_and_knows_its_end(client: OpenAI, tenant: Tenant) -> None:
    file_id = tenant.add_input()

    batch = client.batches.create(
        input_file_id=file_id, endpoint=CHAT, completion_window="24h", metadata={"a": "b"}
    )

    assert (batch.status, batch.input_file_id, batch.endpoint) == ("validating", file_id, CHAT)
    assert abs(batch.created_at - time.time()) < 5
    assert batch.expires_at == batch.created_at + 86400
    assert batch.metadata == {"a": "b"}
    assert client.batches.retrieve(batch.id) == batch


def test_a_new_batch_has_every_key_and_no_other(http: httpx2.Client, tenant: Tenant) -> None:
    file_id = tenant.add_input()

    answer = http.post("/batches", json={"input_file_id": file_id, "endpoint": CHAT})

    batch = answer.json()
    wire.BatchShape.model_validate_json(answer.content, strict=True)
    created_at = batch["created_at"]
    assert batch == {
        "id": batch["id"],
        "object": "batch",
        "endpoint": CHAT,
        "model": None,
        "errors": None,
        "input_file_id": file_id,
        "completion_window": "24h",
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": created_at,
        "in_progress_at": None,
        "expires_at": created_at + 86400,
        "finalizing_at": None,
        "completed_at": None,
        "failed_at": None,
        "expired_at": None,
        "cancelling_at": None,
        "cancelled_at": None,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "usage": {
            "input_tokens": 0,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 0,
        },
        "metadata": None,
        "job_name": None,
    }


def test_a_failed_batch_tells_each_fault(client: OpenAI, tenant: Tenant) -> None:
    batch_id = tenant.add_batch()
    faults = [
        Fault(code="invalid_json_line", message="This line is not …", line=3),
        Fault(code="empty_file", message="The file is empty.", param="file_id"),
    ]

    tenant.move(batch_id, BatchStatus.FAILED, BatchChange(faults=faults))

    batch = client.batches.retrieve(batch_id)
    assert batch.failed_at is not None
    assert batch.errors is not None
    assert batch.errors.object == "list"
    assert [error.model_dump() for error in batch.errors.data or []] == [
        {
            "code": "invalid_json_line",
            "message": "This line is not …",
            "param": None,
            "line": 3,
        },
        {
            "code": "empty_file",
            "message": "The file is empty.",
            "param": "file_id",
            "line": None,
        },
    ]


def test_counts_and_usage_are_shown(client: OpenAI, tenant: Tenant) -> None:
    batch_id = tenant.add_batch()
    tenant.start(batch_id, lines=3)
    tenant.finish(batch_id, output=b"{}\n", error=None)

    batch = client.batches.retrieve(batch_id)

    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.total == 3
    assert batch.output_file_id is not None
    assert batch.error_file_id is None
    assert client.files.retrieve(batch.output_file_id).purpose == "batch_output"
    assert wire.batch_to_wire(_with_usage(tenant, batch_id))["usage"] == {
        "input_tokens": 1,
        "input_tokens_details": {"cached_tokens": 2},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 4},
        "total_tokens": 5,
    }


def test_what_a_batch_cost_of_which_nothing_was_answered_is_not_known(
    http: httpx2.Client, tenant: Tenant
) -> None:
    batch_id = tenant.add_batch()
    unknown = {
        "object": "batch.costs",
        "batch_id": batch_id,
        "currency": "usd",
        "cost": None,
        "line_cost": None,
        "at_least": False,
        "data": [],
    }

    assert http.get(f"/batches/{batch_id}/costs").json() == unknown
    tenant.start(batch_id, lines=3)
    assert http.get(f"/batches/{batch_id}/costs").json() == unknown


def test_what_lines_of_a_batch_that_runs_cost_is_told_as_such() -> None:
    item = CostItem(
        upstream="own",
        model="m",
        is_native=False,
        is_over=False,
        requests=2,
        answered=2,
        usage=Usage(input_tokens=1, output_tokens=1, total_tokens=2),
        cost=Cost(usd=Decimal("0.10"), by_line_usd=Decimal("0.10"), source="settings"),
    )

    told = wire.costs_to_wire("batch_1", [item])

    assert (told["cost"], told["line_cost"]) == ("0.1", "0.1")
    [lines] = told["data"]
    assert (lines["mode"], lines["status"], lines["requests"]) == ("lines", "running", 2)


def _with_usage(tenant: Tenant, batch_id: str) -> Any:
    from dataclasses import replace

    batch = tenant.server.call(tenant.server.store.get_batch(BatchId(batch_id)))
    usage = Usage(
        input_tokens=1, cached_tokens=2, output_tokens=3, reasoning_tokens=4, total_tokens=5
    )
    return replace(batch, usage=usage, counts=Counts(total=1))


@pytest.mark.parametrize("path", [*ENDPOINTS, "/chat/completions", "/embeddings"])
def test_an_endpoint_is_echoed_as_it_was_sent(
    http: httpx2.Client, tenant: Tenant, path: str
) -> None:
    body = {"input_file_id": tenant.add_input(), "endpoint": path}

    assert http.post("/batches", json=body).json()["endpoint"] == path


def test_an_unknown_endpoint_is_refused_with_those_that_there_are(
    client: OpenAI, tenant: Tenant
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.batches.create(
            input_file_id=tenant.add_input(),
            endpoint="/v1/x",
            completion_window="24h",
        )

    assert (caught.value.param, caught.value.code) == ("endpoint", "invalid_value")
    words = "Invalid value: '/v1/x'. Supported values are: '/v1/chat/completions', "
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("window", "seconds"),
    [
        (None, 86400),
        ("90s", 90),
        ("1h", 3600),
        ("24h", 86400),
        ("7d", 604800),
        ("30d", 2592000),
    ],
)
def test_a_completion_window_decides_when_a_batch_expires(
    http: httpx2.Client, tenant: Tenant, window: str | None, seconds: int
) -> None:
    body = {
        "input_file_id": tenant.add_input(),
        "endpoint": CHAT,
        "completion_window": window,
    }

    batch = http.post("/batches", json=body).json()

    assert batch["completion_window"] == (window or "24h")
    assert batch["expires_at"] == batch["created_at"] + seconds


@pytest.mark.parametrize(
    "window", ["", "24", "0h", "1.5h", "-1h", "31d", "9999999999d", "x" * 500, "24h\x00", "٢h"]
)
def test_a_wrong_completion_window_is_refused(
    http: httpx2.Client, tenant: Tenant, window: str
) -> None:
    body = {
        "input_file_id": tenant.add_input(),
        "endpoint": CHAT,
        "completion_window": window,
    }

    error = error_of(http.post("/batches", json=body))

    assert (error["param"], error["code"]) == ("completion_window", "invalid_value")
    assert f"'{window[:100]}" in error["message"]
    assert "completion_window" in error["message"]
    assert "'30d'" in error["message"]


def test_an_unknown_input_file_is_told_at_once(client: OpenAI, server: Server) -> None:
    other = server.add_project()
    for file_id in ("file-unknown", other.add_input()):
        with pytest.raises(openai.NotFoundError) as caught:
            client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
        assert caught.value.body == {
            "message": f"No such File object: {file_id}",
            "type": "invalid_request_error",
            "param": "input_file_id",
            "code": None,
        }
    other.close()


@pytest.mark.parametrize("file_id", ["", "\x00", "\u0444", "x" * 100_000, "a b\n"])
def test_a_strange_input_file_id_is_unknown(http: httpx2.Client, file_id: str) -> None:
    answer = http.post("/batches", json={"input_file_id": file_id, "endpoint": CHAT})

    assert error_of(answer, 404)["param"] == "input_file_id"
    assert len(answer.text) < 1000


def test_an_input_file_needs_its_purpose(client: OpenAI) -> None:
    file = client.files.create(file=b"{}", purpose="user_data")

    with pytest.raises(openai.BadRequestError, match=r"'user_data'.*'batch'") as caught:
        client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    assert (caught.value.param, caught.value.code) == ("input_file_id", "invalid_value")


WRONG_BODIES: list[tuple[dict[str, Any], str, str, str]] = [
    (
        {"input_file_id": ...},
        "input_file_id",
        "missing_required_parameter",
        "Missing required parameter: 'input_file_id'.",
    ),
    (
        {"endpoint": ...},
        "endpoint",
        "missing_required_parameter",
        "Missing required parameter: 'endpoint'.",
    ),
    (
        {"input_file_id": None},
        "input_file_id",
        "invalid_type",
        "Invalid type for 'input_file_id': expected a string, but got null instead.",
    ),
    (
        {"input_file_id": {}},
        "input_file_id",
        "invalid_type",
        "Invalid type for 'input_file_id': expected a string, but got an object instead.",
    ),
    (
        {"completion_window": 24},
        "completion_window",
        "invalid_type",
        "Invalid type for 'completion_window': expected a string, but got an integer instead.",
    ),
    (
        {"job_name": True},
        "job_name",
        "invalid_type",
        "Invalid type for 'job_name': expected a string, but got a boolean instead.",
    ),
    (
        {"job_name": "x" * 257},
        "job_name",
        "string_above_max_length",
        "Invalid 'job_name': string too long. Expected a string with maximum length 256, "
        "but got a string with length 257 instead.",
    ),
    (
        {"job_name": "a\x00b"},
        "job_name",
        "invalid_value",
        "Invalid 'job_name': a string may not hold the NUL character.",
    ),
    (
        {"metadata": []},
        "metadata",
        "invalid_type",
        "Invalid type for 'metadata': expected an object, but got an array instead.",
    ),
    (
        {"metadata": {"tags": ["x"]}},
        "metadata.tags",
        "invalid_type",
        "Invalid type for 'metadata.tags': expected a string, but got an array instead.",
    ),
    (
        {"metadata": {"n": 1.5}},
        "metadata.n",
        "invalid_type",
        "Invalid type for 'metadata.n': expected a string, but got a number instead.",
    ),
    (
        {"metadata": {str(i): "" for i in range(17)}},
        "metadata",
        "object_above_max_properties",
        "Invalid 'metadata': too many properties. Expected an object with at most 16 "
        "properties, but got an object with 17 properties instead.",
    ),
    (
        {"metadata": {"k" * 65: ""}},
        "metadata",
        "string_above_max_length",
        "Invalid 'metadata': key too long. Expected a key with maximum length 64, but got a "
        "key with length 65 instead.",
    ),
    (
        {"metadata": {"k": "v" * 513}},
        "metadata.k",
        "string_above_max_length",
        "Invalid 'metadata.k': string too long. Expected a string with maximum length 512, "
        "but got a string with length 513 instead.",
    ),
    (
        {"metadata": {"k": "\x00"}},
        "metadata.k",
        "invalid_value",
        "Invalid 'metadata.k': a string may not hold the NUL character.",
    ),
    (
        {"metadata": {"\x00": "v"}},
        "metadata",
        "invalid_value",
        "Invalid 'metadata': a key may not hold the NUL character.",
    ),
    (
        {"colour": "red"},
        "colour",
        "unknown_parameter",
        "Unknown parameter: 'colour'.",
    ),
    (
        {"output_expires_after": 3600},
        "output_expires_after",
        "invalid_type",
        "Invalid type for 'output_expires_after': expected an object, but got an integer "
        "instead.",
    ),
    (
        {"output_expires_after": {"anchor": "completed_at", "seconds": 3600}},
        "output_expires_after.anchor",
        "invalid_value",
        "Invalid value: 'completed_at'. Supported values are: 'created_at'.",
    ),
    (
        {"output_expires_after": {"anchor": "created_at"}},
        "output_expires_after.seconds",
        "missing_required_parameter",
        "Missing required parameter: 'output_expires_after.seconds'.",
    ),
    (
        {"output_expires_after": {"anchor": "created_at", "seconds": 3599}},
        "output_expires_after.seconds",
        "integer_below_min_value",
        "Invalid 'output_expires_after.seconds': integer below minimum value. Expected a "
        "value >= 3600, but got 3599 instead.",
    ),
    (
        {"output_expires_after": {"anchor": "created_at", "seconds": 2592001}},
        "output_expires_after.seconds",
        "integer_above_max_value",
        "Invalid 'output_expires_after.seconds': integer above maximum value. Expected a "
        "value <= 2592000, but got 2592001 instead.",
    ),
]


def test_a_whole_number_may_be_written_with_a_point(tenant: Tenant) -> None:
    # To JSON Schema 3600.0 is an integer, and some languages write all numbers so.
    assert tenant.add_batch(output_expires_after={"anchor": "created_at", "seconds": 3600.0})


@pytest.mark.parametrize(("change", "param", "code", "message"), WRONG_BODIES)
def test_a_wrong_body_is_refused_in_the_words_of_the_api(
    http: httpx2.Client, change: dict[str, Any], param: str, code: str, message: str
) -> None:
    body = {"input_file_id": "file-1", "endpoint": CHAT} | change
    body = {name: value for name, value in body.items() if value is not ...}

    assert error_of(http.post("/batches", json=body)) == {
        "message": message,
        "type": "invalid_request_error",
        "param": param,
        "code": code,
    }


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"\xff\xfe",
        b'{"endpoint": NaN}',
        b'{"endpoint": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"a":' * 50_000,
        b"[" * 500_000,
        b"9" * 100_000,
        b"1e999",
        b"null",
        b"[]",
        b'"text"',
        b'{"input_file_id":"' + b"x" * (1 << 20) + b'"}',
    ],
)
def test_a_body_that_is_no_json_object_is_refused(http: httpx2.Client, body: bytes) -> None:
    error = error_of(http.post("/batches", content=body))

    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 300


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: (
        st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3)
    ),
    max_leaves=6,
)
json_bodies = st.fixed_dictionaries(
    {},
    optional={
        "input_file_id": json_values,
        "endpoint": json_values | st.just(CHAT),
        "completion_window": json_values | st.just("1h"),
        "job_name": json_values,
        "metadata": json_values,
        "other": json_values,
    },
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(json_bodies)
def test_no_body_is_a_fault_of_the_server(http: httpx2.Client, body: Any) -> None:
    answer = http.post("/batches", content=json.dumps(body).encode())

    assert answer.status_code in (400, 404), answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_json_body_is_read_under_any_content_type(
    http: httpx2.Client, tenant: Tenant
) -> None:
    body = json.dumps({"input_file_id": tenant.add_input(), "endpoint": CHAT}).encode()

    for content_type in ("text/plain", "application/x-www-form-urlencoded", "; ;"):
        answer = http.post("/batches", content=body, headers={"content-type": content_type})
        assert answer.status_code == 200


@pytest.mark.parametrize("metadata", [None, {}, {"k" * 64: "v" * 512}, {"": "ü\u2028"}])
def test_metadata_is_echoed_as_it_was_sent(
    client: OpenAI, tenant: Tenant, metadata: dict[str, str] | None
) -> None:
    batch = client.batches.create(
        input_file_id=tenant.add_input(),
        endpoint=CHAT,
        completion_window="24h",
        metadata=metadata,
    )

    assert batch.metadata == metadata
    assert client.batches.retrieve(batch.id).metadata == metadata


def test_a_job_name_is_kept(http: httpx2.Client, tenant: Tenant) -> None:
    batch_id = tenant.add_batch(job_name="nightly")

    assert http.get(f"/batches/{batch_id}").json()["job_name"] == "nightly"


# The header of the origin document


def post_with_header(http: httpx2.Client, tenant: Tenant, header: bytes, **body: Any) -> Any:
    body = {"input_file_id": tenant.add_input(), "endpoint": CHAT} | body
    return http.post("/batches", json=body, headers={b"x-tfy-metadata": header})


def test_the_metadata_header_fills_in_what_the_body_does_not_say(
    http: httpx2.Client, tenant: Tenant
) -> None:
    header = '{"team":"ü","run":"header"}'.encode()

    answer = post_with_header(http, tenant, header, metadata={"run": "body"})

    assert answer.json()["metadata"] == {"team": "ü", "run": "body"}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"text",
        b"[]",
        b'"x"',
        b'{"a":1}',
        b'{"a":null}',
        b'{"a":"' + b"x" * 129 + b'"}',
        b'{"a":"\xff"}',
        b'{"a":"\\ud800"}',
        b'{"a":' * 5000,
    ],
)
def test_a_wrong_metadata_header_is_refused(
    http: httpx2.Client, tenant: Tenant, header: bytes
) -> None:
    assert error_of(post_with_header(http, tenant, header))["param"] == "x-tfy-metadata"


def test_header_and_body_together_hold_to_the_bound(
    http: httpx2.Client, tenant: Tenant
) -> None:
    header = json.dumps({f"h{i}": "" for i in range(9)}).encode()

    answer = post_with_header(http, tenant, header, metadata={str(i): "" for i in range(8)})

    assert error_of(answer)["code"] == "object_above_max_properties"


# Lists


def test_batches_are_listed_by_the_time_of_their_creation(
    http: httpx2.Client, tenant: Tenant
) -> None:
    batch_id = tenant.add_batch()
    at = http.get(f"/batches/{batch_id}").json()["created_at"]

    def listed(**where: int) -> list[str]:
        return [batch["id"] for batch in http.get("/batches", params=where).json()["data"]]

    assert listed(created_after=at, created_before=at + 1) == [batch_id]
    assert listed(created_after=at + 1) == []
    assert listed(created_before=at) == []


@pytest.mark.parametrize("name", ["created_after", "created_before"])
@pytest.mark.parametrize("value", ["-1", "soon", "253402300800", "9" * 40])
def test_a_time_that_is_none_is_refused(http: httpx2.Client, name: str, value: str) -> None:
    assert error_of(http.get("/batches", params={name: value}))["param"] == name


def test_batches_are_listed_newest_first(client: OpenAI, tenant: Tenant) -> None:
    ids = [tenant.add_batch() for _ in range(5)]

    assert [batch.id for batch in client.batches.list(limit=2)] == ids[::-1]


def test_old_clients_end_at_an_empty_page(http: httpx2.Client, tenant: Tenant) -> None:
    batch_id = tenant.add_batch()

    page = http.get("/batches", params={"after": batch_id}).json()

    assert page == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }


def test_a_list_shows_what_is_asked_for(http: httpx2.Client, tenant: Tenant) -> None:
    plain = tenant.add_batch()
    named = tenant.add_batch(job_name="nightly", metadata={"team": "a", "x.y[0]": "ü"})
    tenant.move(plain, BatchStatus.FAILED)

    def ids(**params: str) -> list[str]:
        page = http.get("/batches", params=params).raise_for_status().json()
        return [batch["id"] for batch in page["data"]]

    assert ids(status="failed") == [plain]
    assert ids(job_name="nightly") == [named]
    assert ids(**{"metadata[team]": "a"}) == [named]
    assert ids(**{"metadata[x.y[0]]": "ü", "metadata[team]": "a"}) == [named]
    assert ids(**{"metadata[team]": "b"}) == []
    assert ids(**{"api-version": "2025-01-01", "whatever": "1"}) == [named, plain]


@pytest.mark.parametrize(
    ("query", "param", "code"),
    [
        ("limit=0", "limit", "integer_below_min_value"),
        ("limit=101", "limit", "integer_above_max_value"),
        ("limit=x", "limit", "invalid_type"),
        ("status=running", "status", "invalid_value"),
        ("status=%00", "status", "invalid_value"),
        ("job_name=%00", "job_name", "invalid_value"),
        ("metadata[a]=%00", "metadata.a", "invalid_value"),
        ("metadata[%00]=a", "metadata", "invalid_value"),
        ("metadata=a", "metadata", "invalid_type"),
    ],
)
def test_a_wrong_query_is_refused(
    http: httpx2.Client, query: str, param: str, code: str
) -> None:
    error = error_of(http.get(f"/batches?{query}"))

    assert (error["param"], error["code"]) == (param, code)


def test_another_project_sees_no_batch_of_this_one(server: Server, tenant: Tenant) -> None:
    batch_id = tenant.add_batch()
    other = server.add_project()
    http = other.http()

    assert http.get("/batches").json()["data"] == []
    for answer in (
        http.get(f"/batches/{batch_id}"),
        http.get(f"/batches/{batch_id}/output"),
        http.post(f"/batches/{batch_id}/cancel"),
    ):
        assert error_of(answer, 404)["message"] == f"No batch found with id '{batch_id}'."
    assert tenant.http().get(f"/batches/{batch_id}").json()["status"] == "validating"
    other.close()


# Cancelling


@pytest.mark.parametrize("is_started", [True, False])
def test_a_batch_can_be_cancelled(client: OpenAI, tenant: Tenant, is_started: bool) -> None:
    batch_id = tenant.add_batch()
    if is_started:
        tenant.start(batch_id, lines=1)

    batch = client.batches.cancel(batch_id)

    assert (batch.status, batch.cancelling_at is not None) == ("cancelling", True)


def test_a_second_cancel_changes_nothing(client: OpenAI, tenant: Tenant) -> None:
    batch_id = tenant.add_batch()
    first = client.batches.cancel(batch_id)

    assert client.batches.cancel(batch_id) == first
    tenant.move(batch_id, BatchStatus.CANCELLED)
    assert client.batches.cancel(batch_id).status == "cancelled"


def test_a_batch_that_has_ended_cannot_be_cancelled(
    http: httpx2.Client, tenant: Tenant
) -> None:
    batch_id = tenant.add_batch()
    tenant.move(batch_id, BatchStatus.FAILED)

    answer = http.post(f"/batches/{batch_id}/cancel")

    assert error_of(answer, 409) == {
        "message": "Cannot cancel a batch with status 'failed'.",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }
    assert answer.headers["x-should-retry"] == "false"


def test_the_official_client_does_not_try_a_refused_cancel_again(tenant: Tenant) -> None:
    batch_id = tenant.add_batch()
    tenant.move(batch_id, BatchStatus.FAILED)
    client = tenant.openai().with_options(max_retries=2)

    began_at = time.perf_counter()
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch_id)

    assert time.perf_counter() - began_at < 0.4


@pytest.mark.parametrize("body", [b"", b"{", b"\xff" * 100_000])
def test_the_body_of_a_cancel_is_not_looked_at(
    http: httpx2.Client, tenant: Tenant, body: bytes
) -> None:
    answer = http.post(
        f"/batches/{tenant.add_batch()}/cancel",
        content=body,
        headers={"content-type": "application/json"},
    )

    assert answer.json()["status"] == "cancelling"


def post_cancel(http: httpx2.Client, batch_id: str, statuses: list[int]) -> None:
    statuses.append(http.post(f"/batches/{batch_id}/cancel").status_code)


def test_a_cancel_that_comes_while_the_batch_ends_sees_one_or_the_other(
    tenant: Tenant,
) -> None:
    http = tenant.http()
    for _ in range(10):
        batch_id = tenant.add_batch()
        statuses: list[int] = []
        cancel = threading.Thread(target=post_cancel, args=(http, batch_id, statuses))
        cancel.start()
        try:
            tenant.move(batch_id, BatchStatus.FAILED)
            has_failed = True
        except Exception as error:
            assert "cancelling" in str(error)
            has_failed = False
        cancel.join()

        assert statuses == [409 if has_failed else 200]


@pytest.mark.parametrize("batch_id", ["batch_unknown", "%00", "%ED%A0%80", "x" * 3000, "%F0"])
@pytest.mark.parametrize(
    ("method", "rest"), [("GET", ""), ("POST", "/cancel"), ("GET", "/output")]
)
def test_an_unknown_batch_is_not_found(
    http: httpx2.Client, batch_id: str, method: str, rest: str
) -> None:
    answer = http.request(method, f"/batches/{batch_id}{rest}")

    error = error_of(answer, 404)
    assert error["message"].startswith("No batch found with id '")
    assert (error["param"], error["code"]) == (None, None)
