"""Where routes are found, what is on every answer, and what errors look like."""

import socket
from pathlib import Path

import httpx2
import pytest
from openai import OpenAI

from penstock.api.routes import PREFIXES
from tests.api.conftest import LINE, Server, Tenant

PATHS = [prefix.replace("{deployment}", "gpt-4o") for prefix in PREFIXES]


@pytest.mark.parametrize("prefix", PATHS)
def test_the_routes_are_the_same_under_every_prefix(tenant: Tenant, prefix: str) -> None:
    client = tenant.openai(prefix)

    file = client.files.create(file=b"{}\n", purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
    )

    assert client.batches.cancel(batch.id).status == "cancelling"
    assert [listed.id for listed in client.batches.list()] == [batch.id]
    assert client.models.list().data[0].id == "tiny"


def test_models_are_those_that_upstreams_serve(http: httpx2.Client) -> None:
    assert http.get("/models").json() == {
        "object": "list",
        "data": [{"id": "tiny", "object": "model", "created": 0, "owned_by": "local"}],
    }


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/foo"),
        ("GET", "/"),
        ("GET", "/v1/files/"),
        ("GET", "/v1/batches/"),
        ("GET", "/v1"),
        ("GET", "/files"),
        ("GET", "/v1/files/a/b/c"),
        ("POST", "/v1/uploads/x"),
        ("POST", "/v1/batches/x/retry"),
        ("GET", "/v1/f%7f%00%ff"),
        ("GET", "/" + "x" * 5000),
    ],
)
def test_an_unknown_route_is_an_error_object(
    server: Server, tenant: Tenant, method: str, path: str
) -> None:
    answer = server.http.request(method, path, headers={"api-key": tenant.key})

    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (404, "invalid_request_error")
    assert error["message"].startswith(f"Invalid URL ({method} /")
    assert len(error["message"]) < 200


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/files", "GET, POST"),
        ("DELETE", "/v1/batches", "GET, POST"),
        ("PATCH", "/v1/files/x", "GET, DELETE"),
        ("POST", "/openai/deployments/d/files/x/content", "GET, HEAD"),
        ("GET", "/api/llm/batches/x/cancel", "POST"),
        ("PUT", "/healthz", "GET"),
        ("POST", "/openapi.json", "GET, HEAD"),
        ("PROPFIND", "/v1/files/%00", "GET, DELETE"),
    ],
)
def test_a_wrong_method_is_an_error_object_that_names_the_right_ones(
    server: Server, method: str, path: str, allowed: str
) -> None:
    answer = server.http.request(method, path)

    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (405, "invalid_request_error")
    assert answer.headers.get_list("allow") == [allowed]
    assert error["message"].endswith(f"Allowed: {allowed}.")


def test_a_query_parameter_that_is_not_known_is_ignored(http: httpx2.Client) -> None:
    assert http.get("/batches?api-version=2024-10-21&order=desc").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models", 200),
        ("GET", "/healthz", 200),
        ("GET", "/v1/files/x/content", 404),
        ("GET", "/v1/batches?limit=x", 400),
        ("GET", "/nowhere", 404),
        ("PUT", "/v1/files", 405),
    ],
)
def test_every_answer_names_its_request_and_its_time(
    server: Server, tenant: Tenant, method: str, path: str, status: int
) -> None:
    answers = [
        server.http.request(method, path, headers={"api-key": tenant.key}) for _ in range(2)
    ]

    assert [answer.status_code for answer in answers] == [status, status]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 2
    assert all(id_.startswith("req_") for id_ in ids)
    assert answers[0].headers["openai-processing-ms"].isdecimal()


def test_the_official_client_knows_the_request_id(client: OpenAI) -> None:
    answer = client.models.with_raw_response.list()

    assert str(answer.request_id).startswith("req_")


# Hostile requests


HOSTILE = ["%00", "%ff%fe", "%ED%A0%80", "'\"--", "%2e%2e", "😀", "x" * 4000, "%25", "a%0d%0ab"]


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/files/{}"),
        ("DELETE", "/files/{}"),
        ("GET", "/files/{}/content"),
        ("GET", "/files?after={}"),
        ("GET", "/files?purpose={}"),
        ("GET", "/files?limit={}"),
        ("GET", "/files?{}={}"),
        ("GET", "/batches/{}"),
        ("POST", "/batches/{}/cancel"),
        ("GET", "/batches/{}/output"),
        ("GET", "/batches?after={}"),
        ("GET", "/batches?status={}"),
        ("GET", "/batches?job_name={}"),
        ("GET", "/batches?metadata[{}]={}"),
        ("GET", "/batches?metadata[{}"),
    ],
)
def test_nothing_in_a_url_is_a_fault_of_the_server(
    http: httpx2.Client, method: str, path: str, value: str
) -> None:
    answer = http.request(method, path.replace("{}", value))

    assert answer.status_code in (200, 400, 404), answer.text
    assert answer.status_code == 200 or set(answer.json()["error"]) == {
        "message",
        "type",
        "param",
        "code",
    }


@pytest.mark.parametrize(
    "header",
    [
        b"x-tfy-metadata: \xff\xfe{",
        b"authorization: \xff\xfe",
        b"api-key: \xed\xa0\x80",
        b"range: bytes=\xff",
        b"accept: \xff\xff",
        b"content-type: multipart/form-data; boundary=\xff\xfe",
        b'content-type: multipart/form-data; boundary="',
        b"content-length: 2\r\ncontent-type: \xff",
    ],
)
@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nothing_in_a_header_is_a_fault_of_the_server(
    server: Server, tenant: Tenant, header: bytes, path: str, method: str
) -> None:
    key = b"" if header.startswith((b"authorization", b"api-key")) else tenant.key.encode()
    request = (
        b"%s %s HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer %s\r\n%s\r\n"
        % (method.encode(), path.encode(), key, header)
    )
    request += b"\r\n{}" if b"content-length" in header else b"\r\n"

    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(request)
        status = connection.makefile("rb").readline().split()[1]

    assert status in (b"200", b"400", b"401")


# Health and documentation


def test_health_needs_no_key(server: Server) -> None:
    assert server.http.get("/healthz").status_code == 200
    assert server.http.get("/readyz").json() == {"status": "ok", "faults": {}}


def test_a_server_that_cannot_work_says_why(server: Server) -> None:
    server.health.fail("storage", "The disk is full.")
    try:
        ready = server.http.get("/readyz")
        alive = server.http.get("/healthz")
    finally:
        server.health.recover("storage")

    assert ready.status_code == 503
    assert ready.json()["faults"] == {"storage": "The disk is full."}
    assert alive.status_code == 200


def test_the_documentation_can_be_read(server: Server) -> None:
    assert server.http.get("/docs").status_code == 200
    assert server.http.get("/openapi.json").json()["info"]["title"] == "Penstock"


def test_the_documentation_speaks_of_no_other_shape_of_error(server: Server) -> None:
    text = server.http.get("/openapi.json").text

    assert "HTTPValidationError" not in text
    assert '"422"' not in text


# Faults of our own


def test_a_fault_of_our_own_is_told_by_its_request_and_no_more(
    server: Server,
    http: httpx2.Client,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a secret detail")

    monkeypatch.setattr(type(server.store), "list_batches", fail)

    answer = http.get("/batches")

    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (500, "server_error", None)
    assert "detail" not in answer.text
    request_id = answer.headers["x-request-id"]
    assert request_id in error["message"]
    logged = capsys.readouterr().out
    assert request_id in logged
    assert "a secret detail" in logged


def test_bytes_that_are_lost_are_a_fault_of_the_server(
    server: Server, tenant: Tenant, http: httpx2.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    file_id = tenant.add_input()
    (server.blob_folder / "files" / file_id).unlink()

    answer = http.get(f"/files/{file_id}/content")

    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (503, "server_error", None)
    assert f"The bytes of {file_id} are gone" in error["message"]
    assert file_id in capsys.readouterr().out


def test_a_database_that_takes_no_writes_is_told_to_be_tried_later(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        tenant = server.add_project()
        server.call(server.store.close())

        answer = tenant.http().post(
            "/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", LINE)}
        )
        tenant.close()

        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"
        assert answer.json()["error"]["type"] == "server_error"
        assert server.stored_keys() == set()
