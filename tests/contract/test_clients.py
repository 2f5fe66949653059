"""What clients do and what is allowed: sections 4 and 6 of the contract, row by row.

That the clients themselves work is shown in `tests/clients`; webhooks, section 5, in
`tests/integration/test_webhooks.py` and `tests/acceptance/test_webhooks.py`.
"""

import httpx2
import pytest

from penstock.model import ENDPOINTS
from penstock.settings import Settings
from tests.contract.conftest import KEY, STRICT, TLS, Body, Server, jsonl, request

LIMITS = {
    "requests_per_batch": 50_000,
    "input_file_bytes": 200 << 20,
    "embedding_inputs": 50_000,
    "default_completion_window": "24h",
}
OPENAIS = {
    "/v1/responses",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/completions",
    "/v1/moderations",
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/videos",
}
PATHS = ("/v1", "/api/llm", "/openai/v1", "/openai", "/openai/deployments/some-model")


# 4


@pytest.mark.parametrize(("name", "value"), LIMITS.items(), ids=LIMITS)
def test_a_limit_is_openais_unless_it_is_set(name: str, value: object) -> None:
    assert getattr(Settings().limits, name) == value


@pytest.mark.parametrize("path", sorted(OPENAIS))
def test_each_endpoint_of_openais_may_be_called(path: str, server: Server) -> None:
    file_id = server.upload(jsonl(request()))["id"]

    assert path in ENDPOINTS
    assert server.create(file_id, endpoint=path)["endpoint"] == path


def test_a_limit_is_told_with_the_actual_value(strict: Server) -> None:
    over = STRICT["requests_per_batch"] + 1
    batch = strict.run(*(request(str(n)) for n in range(over)))

    message = batch["errors"]["data"][0]["message"]
    assert str(over) in message
    assert str(STRICT["requests_per_batch"]) in message


def test_an_upload_beyond_the_limit_is_told_what_is_allowed(server: Server) -> None:
    body: Body = {"filename": "a", "mime_type": "b", "purpose": "batch", "bytes": 1 << 30}

    message = server.http.post("/uploads", json=body).json()["error"]["message"]

    assert message.startswith("File is too large.")
    assert str(200 << 20) in message
    assert str(1 << 30) in message


# 6.1 to 6.4


@pytest.mark.parametrize(
    "headers",
    [
        {"OpenAI-Organization": "org", "OpenAI-Project": "proj"},
        {"x-stainless-lang": "js", "x-stainless-retry-count": "0"},
        {"User-Agent": "OpenAI/Python 3.54.0", "Accept-Encoding": "gzip, deflate"},
        {"X-UNKNOWN": "\xff"},
    ],
    ids=["organization", "stainless", "usual", "unknown"],
)
def test_headers_of_clients_are_let_pass(headers: dict[str, str], server: Server) -> None:
    raw = {name: value.encode("latin-1") for name, value in headers.items()}

    assert server.http.get("/batches", headers=raw).status_code == 200


def test_a_key_may_be_used_once_for_one_request(server: Server) -> None:
    file_id = server.upload(jsonl(request()))["id"]
    key = {"Idempotency-Key": f"contract-{file_id}"}
    body: Body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions"}
    first = server.http.post("/batches", json=body, headers=key).json()

    assert server.http.post("/batches", json=body, headers=key).json()["id"] == first["id"]
    other = server.http.post("/batches", json=body | {"job_name": "x"}, headers=key)
    assert (other.status_code, other.headers["x-should-retry"]) == (409, "false")


def test_a_request_that_is_sent_again_creates_nothing_twice(server: Server) -> None:
    file_id = server.upload(jsonl(request()))["id"]
    body: Body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions"}
    first = server.http.post("/batches", json=body).json()

    again = server.http.post("/batches", json=body, headers={"x-stainless-retry-count": "1"})

    assert again.json()["id"] == first["id"]


def test_a_download_has_its_length_and_may_be_asked_for_in_parts(server: Server) -> None:
    data = jsonl(request())
    path = f"/files/{server.upload(data)['id']}/content"

    whole = server.http.get(path, headers={"accept-encoding": "gzip, deflate"})
    part = server.http.get(path, headers={"range": "bytes=2-5"})

    assert (whole.content, whole.headers["content-length"]) == (data, str(len(data)))
    assert (part.status_code, part.content) == (206, data[2:6])
    assert part.headers["content-range"] == f"bytes 2-5/{len(data)}"
    assert server.http.get(path, headers={"range": "bytes=999999-"}).status_code == 416


# 6.8


@pytest.fixture(params=PATHS)
def client(request: pytest.FixtureRequest, server: Server) -> httpx2.Client:
    base_url = str(server.http.base_url).removesuffix("/").removesuffix("/v1") + request.param
    return httpx2.Client(
        base_url=base_url,
        headers={"api-key": KEY},
        params={"api-version": "2025-04-01-preview"},
        verify=TLS,
        trust_env=False,
    )


def test_azures_clients_find_all_below_their_paths(
    client: httpx2.Client, server: Server
) -> None:
    with client:
        file = client.post(
            "/files", data={"purpose": "batch"}, files={"file": ("a", jsonl(request()))}
        ).json()
        body = {"input_file_id": file["id"], "endpoint": "/chat/completions"}
        batch = client.post("/batches", json=body | {"completion_window": "24h"}).json()

        assert batch["endpoint"] == "/chat/completions"
        assert client.get(f"/batches/{batch['id']}").json()["id"] == batch["id"]
        assert client.get("/batches").json()["data"][0]["id"] == batch["id"]
        assert client.get(f"/files/{file['id']}").json() == file
        assert client.get("/models").status_code == 200
        assert server.wait(batch["id"])["status"] == "completed"
