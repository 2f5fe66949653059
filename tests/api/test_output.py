"""The results of a batch, so far or final."""

import json

import httpx2
import pytest

from penstock.model import BatchStatus
from tests.api.conftest import Tenant

GOOD = b'{"id":"batch_req_1","custom_id":"a","response":{"body":{"t":"x\\ny"}},"error":null}\n'
BAD = b'{"id":"batch_req_2","custom_id":"b","response":null,"error":{"code":"c"}}\n'
JSONL = {"accept": "application/jsonl"}


def end(tenant: Tenant, output: bytes | None, error: bytes | None) -> str:
    batch_id = tenant.add_batch()
    tenant.start(batch_id, lines=1)
    tenant.finish(batch_id, output=output, error=error)
    return batch_id


def test_the_results_of_an_ended_batch_are_one_array(
    http: httpx2.Client, tenant: Tenant
) -> None:
    batch_id = end(tenant, GOOD * 3, BAD * 2)

    answer = http.get(f"/batches/{batch_id}/output")

    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == [json.loads(line) for line in [GOOD] * 3 + [BAD] * 2]


@pytest.mark.parametrize("accept", ["application/jsonl", "application/x-ndjson"])
def test_the_results_are_lines_for_those_who_accept_them(
    http: httpx2.Client, tenant: Tenant, accept: str
) -> None:
    batch_id = end(tenant, GOOD * 3, BAD * 2)

    answer = http.get(f"/batches/{batch_id}/output", headers={"accept": f"{accept}, */*;q=0.1"})

    assert answer.headers["content-type"] == accept
    assert answer.content == GOOD * 3 + BAD * 2


@pytest.mark.parametrize(
    ("output", "error"), [(GOOD, None), (None, BAD), (b"", b""), (None, None)]
)
def test_a_file_that_there_is_not_adds_nothing(
    http: httpx2.Client, tenant: Tenant, output: bytes | None, error: bytes | None
) -> None:
    batch_id = end(tenant, output, error)
    whole = (output or b"") + (error or b"")

    assert http.get(f"/batches/{batch_id}/output", headers=JSONL).content == whole
    lines = whole.splitlines()
    assert http.get(f"/batches/{batch_id}/output").json() == [json.loads(x) for x in lines]


def test_a_failed_batch_has_no_results(http: httpx2.Client, tenant: Tenant) -> None:
    batch_id = tenant.add_batch()
    tenant.move(batch_id, BatchStatus.FAILED)

    assert http.get(f"/batches/{batch_id}/output").json() == []


def test_a_batch_that_has_not_begun_has_no_results_yet(
    http: httpx2.Client, tenant: Tenant
) -> None:
    batch_id = tenant.add_batch()

    assert http.get(f"/batches/{batch_id}/output").json() == []
    assert http.get(f"/batches/{batch_id}/output", headers=JSONL).content == b""


@pytest.mark.parametrize("is_cancelled", [True, False])
def test_results_can_be_read_before_the_end(
    http: httpx2.Client, tenant: Tenant, is_cancelled: bool
) -> None:
    batch_id = tenant.add_batch()
    tenant.start(batch_id, lines=2)
    tenant.write_reply(batch_id, 1, GOOD, is_good=True)
    if is_cancelled:
        http.post(f"/batches/{batch_id}/cancel").raise_for_status()

    assert http.get(f"/batches/{batch_id}/output", headers=JSONL).content == GOOD
    assert http.get(f"/batches/{batch_id}/output").json() == [json.loads(GOOD)]


def test_large_results_arrive_whole(http: httpx2.Client, tenant: Tenant) -> None:
    lines = 40_000
    batch_id = end(tenant, GOOD * lines, BAD)

    answer = http.get(f"/batches/{batch_id}/output")

    assert len(answer.json()) == lines + 1
    assert answer.json()[-1] == json.loads(BAD)


def test_results_that_were_deleted_are_not_found(http: httpx2.Client, tenant: Tenant) -> None:
    batch_id = end(tenant, GOOD, BAD)
    file_id = http.get(f"/batches/{batch_id}").json()["error_file_id"]
    http.delete(f"/files/{file_id}").raise_for_status()

    answer = http.get(f"/batches/{batch_id}/output")

    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == f"No such File object: {file_id}"
