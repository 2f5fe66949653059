"""Requests that are sent again: by a key of the client, and as OpenAI's clients say so."""

import threading
from typing import Any

import httpx2
import pytest

from tests.api.conftest import LINE, Server, Tenant

CHAT = "/v1/chat/completions"
RETRY = {"x-stainless-retry-count": "1"}
FIRST = {"x-stainless-retry-count": "0"}


def upload(
    http: httpx2.Client,
    headers: dict[str, str],
    content: bytes = LINE,
    name: str = "in.jsonl",
    **fields: str,
) -> httpx2.Response:
    return http.post(
        "/files",
        data={"purpose": "batch"} | fields,
        files={"file": (name, content)},
        headers=headers,
    )


def id_of(answer: httpx2.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def count(http: httpx2.Client, path: str) -> int:
    return len(http.get(path).json()["data"])


def test_a_file_that_is_sent_again_is_made_once(
    http: httpx2.Client, server: Server, tenant: Tenant
) -> None:
    first = id_of(upload(http, FIRST))
    before = server.stored_keys()

    assert id_of(upload(http, RETRY)) == first
    assert id_of(upload(http, {"x-stainless-retry-count": "2"})) == first
    assert count(http, "/files") == 1
    assert server.stored_keys() == before


@pytest.mark.parametrize(
    "change",
    [
        {"content": LINE * 2},
        {"name": "other.jsonl"},
        {"purpose": "user_data"},
        {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"},
    ],
    ids=["content", "name", "purpose", "expiry"],
)
def test_another_file_is_another_file_though_it_is_sent_again(
    http: httpx2.Client, change: dict[str, Any]
) -> None:
    first = id_of(upload(http, FIRST))

    assert id_of(upload(http, RETRY, **change)) != first


def test_a_batch_that_is_sent_again_is_made_once(http: httpx2.Client, tenant: Tenant) -> None:
    body = {
        "input_file_id": tenant.add_input(),
        "endpoint": CHAT,
        "metadata": {"b": "1", "a": ""},
    }
    first = id_of(http.post("/batches", json=body, headers=FIRST))
    turned = dict(reversed(body.items())) | {"metadata": {"a": "", "b": "1"}}

    assert id_of(http.post("/batches", json=body, headers=RETRY)) == first
    assert id_of(http.post("/batches", json=turned, headers=RETRY)) == first
    assert count(http, "/batches") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"job_name": "other"},
        {"metadata": {}},
        {"completion_window": "1h"},
        {"endpoint": "/v1/completions"},
        {"output_expires_after": {"anchor": "created_at", "seconds": 3600}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_batch_is_another_batch_though_it_is_sent_again(
    http: httpx2.Client, tenant: Tenant, change: dict[str, Any]
) -> None:
    body: dict[str, Any] = {"input_file_id": tenant.add_input(), "endpoint": CHAT}
    first = id_of(http.post("/batches", json=body, headers=FIRST))

    assert id_of(http.post("/batches", json=body | change, headers=RETRY)) != first


def test_equal_requests_that_are_not_sent_again_are_two(
    http: httpx2.Client, tenant: Tenant
) -> None:
    body = {"input_file_id": tenant.add_input(), "endpoint": CHAT}

    ids = {id_of(http.post("/batches", json=body)) for _ in range(3)}

    assert len(ids) == 3


@pytest.mark.parametrize("text", ["0", "000", "", "-1", "one", "1.5", "²"])
def test_a_retry_count_that_counts_nothing_is_none(http: httpx2.Client, text: str) -> None:
    first = id_of(upload(http, FIRST))

    assert id_of(upload(http, {"x-stainless-retry-count": text.encode()})) != first


def test_a_replayed_batch_is_shown_as_it_stands(http: httpx2.Client, tenant: Tenant) -> None:
    body = {"input_file_id": tenant.add_input(), "endpoint": CHAT}
    first = http.post("/batches", json=body, headers={"idempotency-key": "k"}).json()
    cancelled = http.post(f"/batches/{first['id']}/cancel").json()
    http.delete(f"/files/{body['input_file_id']}")

    again = http.post("/batches", json=body, headers={"idempotency-key": "k"}).json()

    assert again["id"] == first["id"]
    assert again["status"] == cancelled["status"] == "cancelling"


def test_a_key_makes_one_object_and_refuses_another(
    http: httpx2.Client, server: Server, tenant: Tenant
) -> None:
    key = {"idempotency-key": "upload 1"}
    first = id_of(upload(http, key))
    before = server.stored_keys()
    body = {"input_file_id": first, "endpoint": CHAT}

    assert id_of(upload(http, key)) == first
    for answer in (upload(http, key, LINE * 2), http.post("/batches", json=body, headers=key)):
        assert answer.status_code == 409
        assert answer.headers["x-should-retry"] == "false"
        error = answer.json()["error"]
        assert "upload 1" in error["message"]
        assert error["type"] == "invalid_request_error"
    assert server.stored_keys() == before
    assert count(http, "/files") == 1
    assert count(http, "/batches") == 0


def test_a_request_that_was_refused_may_be_mended_under_its_key(
    http: httpx2.Client, tenant: Tenant
) -> None:
    key = {"idempotency-key": "k"}
    body = {"input_file_id": tenant.add_input(), "endpoint": "/v1/chat"}
    assert http.post("/batches", json=body, headers=key).status_code == 400

    id_of(http.post("/batches", json=body | {"endpoint": CHAT}, headers=key))


def test_the_keys_of_two_projects_have_nothing_to_do_with_each_other(
    http: httpx2.Client, server: Server
) -> None:
    other = server.add_project()
    key = {"idempotency-key": "k"}

    assert id_of(upload(http, key)) != id_of(upload(other.http(), key, LINE * 2))
    other.close()


@pytest.mark.parametrize("key", [b"", b"x" * 256, "ü".encode(), b"a\tb"])
def test_a_key_that_cannot_be_one_is_refused(http: httpx2.Client, key: bytes) -> None:
    answer = upload(http, {b"idempotency-key": key})

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "idempotency-key"


@pytest.mark.parametrize("headers", [{"idempotency-key": "k"}, RETRY], ids=["key", "retry"])
def test_requests_that_race_make_one_object(
    server: Server, tenant: Tenant, headers: dict[str, str]
) -> None:
    ids: list[str] = []

    def send() -> None:
        ids.append(id_of(upload(tenant.http(), headers, LINE * 3000)))

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(ids) == 6
    assert len(set(ids)) == 1
    assert count(tenant.http(), "/files") == 1
