"""Who may ask."""

from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest
from openai import AzureOpenAI, DefaultHttpxClient

from penstock.model import ProjectId
from tests.api.conftest import LINE, TLS, Server, Tenant


def get(server: Server, **headers: str) -> httpx2.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.http.get("/v1/files", headers=names)


def test_a_request_without_a_key_is_refused(server: Server) -> None:
    answer = get(server)

    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (401, "invalid_request_error")
    assert (error["param"], error["code"]) == (None, None)
    assert error["message"].startswith("You didn't provide an API key.")
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("authorization", ["", "Bearer", "Basic dXNlcjpwYXNz", "sk-test"])
def test_what_is_not_a_bearer_key_is_no_key(server: Server, authorization: str) -> None:
    answer = get(server, authorization=authorization)

    assert (answer.status_code, answer.json()["error"]["code"]) == (401, None)


def test_a_wrong_key_is_refused_and_shown_in_part_only(server: Server) -> None:
    key = "sk-wrong-0123456789abcdefghijklmnopqrstuvwxyz"

    answer = get(server, authorization=f"Bearer {key}")

    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (401, "invalid_api_key")
    assert error["message"].startswith("Incorrect API key provided: sk-wrong-")
    assert key[15:-4] not in answer.text


@pytest.mark.parametrize("key", [b"\xff\xfe", b"x" * 20_000, b"\xc3\xbc"])
def test_a_strange_key_is_a_wrong_key(server: Server, key: bytes) -> None:
    answer = server.http.get("/v1/files", headers={b"authorization": b"Bearer " + key})

    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


def test_a_key_is_taken_from_either_header(server: Server, tenant: Tenant) -> None:
    assert get(server, authorization=f"Bearer {tenant.key}").status_code == 200
    assert get(server, authorization=f"bearer {tenant.key}").status_code == 200
    assert get(server, api_key=tenant.key).status_code == 200


def test_a_revoked_key_is_a_wrong_key(server: Server, tenant: Tenant) -> None:
    keys = server.call(server.store.list_keys())
    [key] = [key for key in keys if key.project_id == tenant.project_id]

    server.call(server.store.revoke_key(key.id, now=2))

    assert get(server, api_key=tenant.key).json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/files"),
        ("GET", "/v1/files"),
        ("GET", "/v1/files/x"),
        ("DELETE", "/v1/files/x"),
        ("GET", "/v1/files/x/content"),
        ("POST", "/v1/batches"),
        ("GET", "/v1/batches?limit=bad"),
        ("GET", "/v1/batches/x"),
        ("POST", "/v1/batches/x/cancel"),
        ("GET", "/v1/batches/x/output"),
        ("GET", "/v1/models"),
    ],
)
def test_every_route_asks_for_a_key_before_anything_else(
    server: Server, method: str, path: str
) -> None:
    answer = server.http.request(method, path)

    assert answer.status_code == 401


def test_the_official_client_raises_its_own_error(server: Server) -> None:
    client = Tenant(server=server, project_id=ProjectId(""), key="sk-no").openai()

    with pytest.raises(openai.AuthenticationError) as caught:
        client.files.list()
    assert caught.value.code == "invalid_api_key"
    assert caught.value.request_id is not None
    client.close()


def test_azures_client_works(server: Server, tenant: Tenant) -> None:
    client = AzureOpenAI(
        azure_endpoint=server.url,
        api_key=tenant.key,
        api_version="2025-04-01-preview",
        http_client=DefaultHttpxClient(verify=TLS),
    )

    file = client.files.create(file=LINE, purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id,
        endpoint="/chat/completions",
        completion_window="24h",
    )

    assert client.batches.retrieve(batch.id).endpoint == "/chat/completions"
    assert client.files.content(file.id).content == LINE
    client.close()


@pytest.fixture
def open_server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path, open_project="default") as server:
        yield server


def test_a_server_without_keys_gives_all_to_one_project(open_server: Server) -> None:
    files = {"file": ("in.jsonl", LINE)}
    answer = open_server.http.post("/v1/files", data={"purpose": "batch"}, files=files)

    listed = get(open_server, authorization="Bearer whatever").json()["data"]

    assert [file["id"] for file in listed] == [answer.json()["id"]]
