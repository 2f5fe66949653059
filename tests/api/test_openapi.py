"""The document at `/openapi.json` is what the server does, neither more nor less.

Each status that it names is provoked and held against it, so a new route needs its rows in
`PROVOKED`; and Schemathesis asks a running server all that the document allows.
"""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import jsonschema_rs
import pytest

from penstock.api.lines import LINE_SCHEMAS
from penstock.api.operations import Route
from penstock.api.routes import HEALTH, PREFIXES, ROUTES, describe
from penstock.blobs.segments import Kind
from penstock.executor.replies import error_line, reply_line
from penstock.jsonl import InputChecker, InputRules
from penstock.model import ENDPOINTS
from penstock.upstream.base import Failure, Reply
from tests.api.conftest import LINE, Server, Tenant
from tests.fuzz import plant, run_schemathesis, served
from tests.schemas import published

CHAT = "/v1/chat/completions"
ALL_ROUTES = [(PREFIXES[0] + route.path, route) for route in ROUTES]
ALL_ROUTES += [(route.path, route) for route in HEALTH]
EXAMPLES = Path(__file__).parents[2] / "examples"


@cache
def document() -> dict[str, Any]:
    return describe()


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document()["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def operation(operation_id: str) -> dict[str, Any]:
    return next(one for _, _, one in operations() if one["operationId"] == operation_id)


def resolved(value: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in value:
        found: Any = document()
        for name in value["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        value = found
    return value


def validate(schema: dict[str, Any], value: object) -> None:
    root = schema | {"components": document()["components"]}
    jsonschema_rs.Draft202012Validator(root).validate(value)


def assert_conforms(operation_id: str, answer: httpx2.Response) -> None:
    responses = operation(operation_id)["responses"]
    assert str(answer.status_code) in responses, answer.text
    response = resolved(responses[str(answer.status_code)])
    for name, header in response["headers"].items():
        schema = resolved(header)["schema"]
        text = answer.headers[name]
        validate(schema, int(text) if schema["type"] == "integer" else text)
    content = response.get("content", {})
    if not content:
        assert answer.content == b""
        return
    media_type = answer.headers["content-type"]
    assert media_type in content
    if media_type == "application/json":
        validate(content[media_type]["schema"], answer.json())


# Structure


@pytest.mark.parametrize(
    ("path", "route"), ALL_ROUTES, ids=lambda value: getattr(value, "operation_id", None)
)
def test_every_route_is_described_with_its_answers(path: str, route: Route) -> None:
    described = document()["paths"][path][route.method.lower()]

    always = {401, 503} if route.asks_for_key else set[int]()
    good = {answer.status for answer in route.list_answers()}
    assert {int(status) for status in described["responses"]} == {*good, *route.errors, *always}
    assert ("requestBody" in described) == (route.reads is not None)
    assert described["security"] == (
        [{"bearer": []}, {"api-key": []}] if route.asks_for_key else []
    )


def test_nothing_is_described_but_the_routes() -> None:
    described = {(path, method.upper()) for path, method, _ in operations()}

    assert described == {(path, route.method) for path, route in ALL_ROUTES}


def test_operations_are_named_for_people_and_for_generated_clients() -> None:
    ids = [one["operationId"] for _, _, one in operations()]

    assert {"createBatch", "listFiles", "getFileContent", "isReady"} <= set(ids)
    assert len(set(ids)) == len(ids)
    for _, _, one in operations():
        assert one["summary"][:1].isupper()
        assert not one["summary"].endswith(".")
        assert all(parameter["description"] for parameter in one.get("parameters", []))
        names = [parameter["name"] for parameter in one.get("parameters", [])]
        assert len(set(names)) == len(names)


def test_no_parameter_outside_a_body_may_be_null() -> None:
    for _, _, one in operations():
        assert '"null"' not in json.dumps(one.get("parameters", []))


def test_every_reference_leads_somewhere_and_every_schema_is_referred_to() -> None:
    text = json.dumps(document())
    schemas = document()["components"]["schemas"]

    referred = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    # An input line is a part of a file, of which no answer is made.
    assert referred | {"BatchInputLine"} == set(schemas)
    assert "Shape" not in text
    for schema in schemas.values():
        jsonschema_rs.Draft202012Validator(schema | {"components": {"schemas": schemas}})


def test_without_keys_none_is_asked_for() -> None:
    open_document = describe(needs_key=False)

    for path, method, one in operations():
        described = open_document["paths"][path][method]
        if one["security"]:
            assert described["security"] == [{}, *one["security"]]
        assert set(one["responses"]) - set(described["responses"]) <= {"401"}
        assert "401" not in described["responses"]


def test_the_served_document_is_this_one(server: Server) -> None:
    assert server.http.get("/openapi.json").json() == document()


@pytest.mark.parametrize("path", published(), ids=lambda path: path.name)
def test_the_published_files_are_fresh(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == published()[path], "run ./dev schemas"


# Answers

Provoke = Callable[[Tenant, httpx2.Client], httpx2.Response]


def upload(http: httpx2.Client, purpose: str, **headers: str) -> httpx2.Response:
    file = ("in.jsonl", LINE)
    return http.post("/files", data={"purpose": purpose}, files={"file": file}, headers=headers)


def upload_id(http: httpx2.Client, purpose: str = "batch") -> str:
    return upload(http, purpose).json()["id"]


def create(tenant: Tenant, http: httpx2.Client, key: str, **body: Any) -> httpx2.Response:
    body = {"input_file_id": tenant.add_input(), "endpoint": CHAT} | body
    return http.post("/batches", json=body, headers={"idempotency-key": key})


def first_and_second(first: httpx2.Response, second: httpx2.Response) -> httpx2.Response:
    assert first.is_success
    return second


def full_batch(tenant: Tenant, http: httpx2.Client) -> str:
    batch_id = tenant.add_batch(
        metadata={"a": "b"},
        job_name="n",
        output_expires_after={"anchor": "created_at", "seconds": 3600},
    )
    tenant.start(batch_id, 2)
    kind, line = reply_line("a", Reply(status_code=200, body=b'{"x": 1}'))
    tenant.write_reply(batch_id, 1, line, is_good=kind is Kind.OUTPUT)
    tenant.write_reply(batch_id, 2, error_line("b", "c", "d"), is_good=False)
    return batch_id


def ended_batch(tenant: Tenant, http: httpx2.Client) -> str:
    batch_id = full_batch(tenant, http)
    tenant.finish(batch_id, output=error_line("a", "b", "c"), error=None)
    return batch_id


def output(accept: str) -> Provoke:
    def ask(tenant: Tenant, http: httpx2.Client) -> httpx2.Response:
        path = f"/batches/{full_batch(tenant, http)}/output"
        answer = http.get(path, headers={"accept": accept})
        assert answer.headers["content-type"] == accept
        return answer

    return ask


def content(purpose: str = "batch", method: str = "GET", **headers: str) -> Provoke:
    def ask(_: Tenant, http: httpx2.Client) -> httpx2.Response:
        path = f"/files/{upload_id(http, purpose)}/content"
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return http.request(method, path, headers=named)

    return ask


UPLOAD = {"bytes": len(LINE), "filename": "a", "mime_type": "b", "purpose": "batch"}


def start(http: httpx2.Client, key: str = "u", **more: Any) -> httpx2.Response:
    return http.post("/uploads", json=UPLOAD | more, headers={"idempotency-key": key})


def part(
    http: httpx2.Client, upload_id: str, key: str = "p", data: bytes = LINE
) -> httpx2.Response:
    path = f"/uploads/{upload_id}/parts"
    return http.post(path, files={"data": data}, headers={"idempotency-key": key})


def parts_twice(_: Tenant, http: httpx2.Client) -> httpx2.Response:
    upload_id = start(http).json()["id"]
    return first_and_second(part(http, upload_id), part(http, upload_id, data=b"x"))


def complete(http: httpx2.Client, **more: Any) -> httpx2.Response:
    upload_id = start(http).json()["id"]
    part_ids = [part(http, upload_id).json()["id"]]
    return http.post(f"/uploads/{upload_id}/complete", json={"part_ids": part_ids} | more)


def cancel(http: httpx2.Client, upload_id: str) -> httpx2.Response:
    return http.post(f"/uploads/{upload_id}/cancel")


def get(path: str, method: str = "GET", **options: Any) -> Provoke:
    return lambda _, http: http.request(method, path, **options)


def health(path: str) -> Provoke:
    return lambda tenant, _: tenant.server.http.get(path)


def unready(tenant: Tenant, _: httpx2.Client) -> httpx2.Response:
    tenant.server.health.fail("storage", "The disk is full.")
    try:
        return tenant.server.http.get("/readyz")
    finally:
        tenant.server.health.recover("storage")


PROVOKED: list[tuple[str, int, Provoke]] = [
    ("createBatch", 200, lambda t, h: create(t, h, "k", metadata={"a": "b"})),
    ("createBatch", 400, get("/batches", "POST", json={"endpoint": "/v1/nothing"})),
    (
        "createBatch",
        404,
        get("/batches", "POST", json={"input_file_id": "file-x", "endpoint": CHAT}),
    ),
    (
        "createBatch",
        409,
        lambda t, h: first_and_second(create(t, h, "k"), create(t, h, "k", job_name="n")),
    ),
    ("listBatches", 200, lambda t, h: [full_batch(t, h), h.get("/batches")][1]),
    ("listBatches", 400, get("/batches?limit=0")),
    ("listBatches", 400, get("/batches?metadata=a")),
    ("getBatch", 200, lambda t, h: h.get(f"/batches/{ended_batch(t, h)}")),
    ("getBatch", 404, get("/batches/x")),
    ("cancelBatch", 200, lambda t, h: h.post(f"/batches/{t.add_batch()}/cancel")),
    ("cancelBatch", 404, get("/batches/x/cancel", "POST")),
    ("cancelBatch", 409, lambda t, h: h.post(f"/batches/{ended_batch(t, h)}/cancel")),
    ("getBatchOutput", 200, output("application/json")),
    ("getBatchOutput", 200, output("application/jsonl")),
    ("getBatchOutput", 200, output("application/x-ndjson")),
    ("getBatchOutput", 404, get("/batches/x/output")),
    ("getBatchCosts", 200, lambda t, h: h.get(f"/batches/{full_batch(t, h)}/costs")),
    ("getBatchCosts", 404, get("/batches/x/costs")),
    ("createFile", 200, lambda _, h: upload(h, "batch")),
    ("createFile", 400, lambda _, h: upload(h, "nothing")),
    (
        "createFile",
        409,
        lambda _, h: first_and_second(
            upload(h, "batch", **{"idempotency-key": "f"}),
            upload(h, "evals", **{"idempotency-key": "f"}),
        ),
    ),
    ("listFiles", 200, lambda _, h: [upload(h, "batch"), h.get("/files")][1]),
    ("listFiles", 400, get("/files?order=up")),
    ("getFile", 200, lambda _, h: h.get(f"/files/{upload_id(h, 'evals')}")),
    ("getFile", 404, get("/files/x")),
    ("deleteFile", 200, lambda _, h: h.delete(f"/files/{upload_id(h)}")),
    ("deleteFile", 404, get("/files/x", "DELETE")),
    ("getFileContent", 200, content()),
    ("getFileContent", 206, content(range="bytes=1-2")),
    ("getFileContent", 304, content(if_none_match="*")),
    ("getFileContent", 400, content("user_data")),
    ("getFileContent", 404, get("/files/x/content")),
    ("getFileContent", 416, content(range="bytes=9999-")),
    ("headFileContent", 200, content(method="HEAD")),
    ("headFileContent", 304, content(method="HEAD", if_none_match="*")),
    ("headFileContent", 400, content("assistants", method="HEAD")),
    ("headFileContent", 404, get("/files/x/content", "HEAD")),
    ("createUpload", 200, lambda _, h: start(h)),
    ("createUpload", 400, lambda _, h: start(h, bytes=0)),
    ("createUpload", 409, lambda _, h: first_and_second(start(h), start(h, filename="b"))),
    ("addUploadPart", 200, lambda _, h: part(h, start(h).json()["id"])),
    ("addUploadPart", 400, lambda _, h: part(h, start(h).json()["id"], data=b"")),
    ("addUploadPart", 404, lambda _, h: part(h, "x")),
    ("addUploadPart", 409, parts_twice),
    ("completeUpload", 200, lambda _, h: complete(h)),
    ("completeUpload", 400, lambda _, h: complete(h, md5="0" * 32)),
    ("completeUpload", 404, get("/uploads/x/complete", "POST", json={"part_ids": []})),
    ("cancelUpload", 200, lambda _, h: cancel(h, start(h).json()["id"])),
    ("cancelUpload", 400, lambda _, h: cancel(h, complete(h).json()["id"])),
    ("cancelUpload", 404, get("/uploads/x/cancel", "POST")),
    ("listModels", 200, get("/models")),
    ("isAlive", 200, health("/healthz")),
    ("isReady", 200, health("/readyz")),
    ("getMetrics", 200, health("/metrics")),
    ("isReady", 503, unready),
]


@pytest.mark.parametrize(
    ("operation_id", "status", "provoke"), PROVOKED, ids=lambda value: str(value)[:20]
)
def test_an_answer_is_as_it_is_described(
    tenant: Tenant, http: httpx2.Client, operation_id: str, status: int, provoke: Provoke
) -> None:
    answer = provoke(tenant, http)

    assert answer.status_code == status, answer.text
    assert_conforms(operation_id, answer)


def filled(path: str) -> str:
    return path.replace("{", "").replace("}", "")


@pytest.mark.parametrize(
    ("path", "route"), ALL_ROUTES, ids=lambda value: getattr(value, "operation_id", None)
)
def test_a_request_without_a_key_is_answered_as_it_is_described(
    server: Server, path: str, route: Route
) -> None:
    answer = server.http.request(route.method, filled(path))

    assert answer.status_code == (401 if route.asks_for_key else 200)
    assert_conforms(route.operation_id, answer)


def test_a_database_that_is_away_is_answered_as_it_is_described(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        tenant = server.add_project()
        server.call(server.store.close())
        for path, route in ALL_ROUTES:
            answer = server.http.request(
                route.method, filled(path), headers={"api-key": tenant.key}
            )
            assert answer.status_code == (503 if route.asks_for_key else 200), path
            assert_conforms(route.operation_id, answer)


def test_each_described_status_is_provoked() -> None:
    provoked = {(operation_id, str(status)) for operation_id, status, _ in PROVOKED}
    # Those of every route that asks for a key have tests of their own.
    provoked |= {(r.operation_id, s) for r in ROUTES for s in ("401", "503")}

    described = {
        (one["operationId"], s) for _, _, one in operations() for s in one["responses"]
    }
    assert described == provoked


# Lines

OUTPUT_LINE = jsonschema_rs.Draft202012Validator(LINE_SCHEMAS["BatchOutputLine"])
ERROR_LINE = jsonschema_rs.Draft202012Validator(LINE_SCHEMAS["BatchErrorLine"])
INPUT_LINE = jsonschema_rs.Draft202012Validator(LINE_SCHEMAS["BatchInputLine"])


@pytest.mark.parametrize(
    "reply",
    [
        Reply(status_code=200, body=b'{"choices": []}', request_id="req_1"),
        Reply(status_code=201, body=b"{\n}"),
        Reply(status_code=400, body=b'{"error": {"message": "No."}}'),
        Reply(status_code=404, body=b"<html>"),
        Reply(status_code=500, body=b""),
        Reply(status_code=302, body=b"[]"),
        Reply(failure=Failure.TIMEOUT, message="No whole answer came within 600 s."),
        Reply(failure=Failure.UNREACHABLE, message="Connection refused."),
        Reply(failure=Failure.INVALID, message="Not JSON.", status_code=200, body=b"x"),
    ],
    ids=lambda reply: f"{reply.status_code}-{reply.failure}",
)
def test_a_line_of_a_reply_is_as_its_schema_says(reply: Reply) -> None:
    kind, text = reply_line("a-é\n", reply)
    line = json.loads(text)

    assert OUTPUT_LINE.is_valid(line) == (kind is Kind.OUTPUT)
    assert ERROR_LINE.is_valid(line) == (kind is Kind.ERROR)


def test_a_line_without_a_reply_is_as_its_schema_says() -> None:
    line = json.loads(error_line("a", "batch_expired", "Too late."))

    ERROR_LINE.validate(line)
    assert not OUTPUT_LINE.is_valid(line)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.jsonl")), ids=lambda path: path.name)
def test_the_examples_are_as_their_schema_says(path: Path) -> None:
    for text in path.read_text(encoding="utf-8").splitlines():
        INPUT_LINE.validate(json.loads(text))


def line(url: str = CHAT, **changes: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": []} | changes.pop("body", {})
    return {"custom_id": "a", "method": "POST", "url": url, "body": body} | changes


def without(value: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: kept for name, kept in value.items() if name not in names}


@pytest.mark.parametrize(
    "value",
    [
        line(),
        line(more=1),
        line("/chat/completions"),
        line("/v1/nothing"),
        line("/v1/v1/chat/completions"),
        line(custom_id=""),
        line(custom_id="x" * 512),
        line(custom_id="x" * 513),
        line(custom_id=1),
        line(method="GET"),
        line(body={"stream": True}),
        line(body={"stream": False}),
        line(body={"stream": None}),
        line(body={"stream": 1}),
        line(body={"model": ""}),
        line(body={"model": None}),
        line(body={"messages": None}),
        line() | {"body": []},
        line() | {"body": {"model": "m"}},
        *(without(line(), name) for name in line()),
        *(
            line(path) | {"body": dict.fromkeys(required, "x")}
            for path, endpoint in ENDPOINTS.items()
            for required in (
                endpoint.required,
                *(
                    without(dict.fromkeys(endpoint.required), name)
                    for name in endpoint.required
                ),
            )
        ),
        [],
        "x",
        None,
    ],
    ids=lambda value: json.dumps(value)[:70],
)
def test_the_schema_of_an_input_line_refuses_what_the_server_refuses(value: Any) -> None:
    checker = InputChecker(
        InputRules(
            endpoint=None,
            max_requests=10,
            max_line_bytes=10_000,
            max_embedding_inputs=10,
            max_faults=10,
            one_model=False,
            slice_requests=10,
            slice_bytes=10_000,
        )
    )
    checker.feed(json.dumps(value).encode())
    checked = checker.finish()

    assert checked is not None
    assert INPUT_LINE.is_valid(value) == (not checked.faults)


# All of it


def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    with served(tmp_path) as url:
        run_schemathesis(url, plant(url), ["--max-examples", "12", "--seed", "1"])
