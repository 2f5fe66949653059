"""Segments as objects of a server that speaks S3: the contract, what it costs in requests,
and a server that misbehaves."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.blobs.segments import Kind
from penstock.blobs.storage import Patience, open_blobs
from penstock.errors import StorageUnavailable
from penstock.store.sql import SqlStore
from penstock.testing.segments import (
    BATCH,
    LINES,
    SegmentsContract,
    append,
    payload,
    replies_of,
    results_of,
)
from tests.object_stores import Proxy, S3Bucket, S3Server, moto
from tests.segment_grounds import ObjectGround, running

HASTE = Patience(connect_timeout_s=1, request_timeout_s=0.4, retries=1, retry_s=1)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with moto() as server:
        yield server


@pytest.fixture
def proxy(server: S3Server) -> Iterator[Proxy]:
    with Proxy(server.url) as proxy:
        yield proxy


@pytest.fixture
def patience() -> Patience:
    return HASTE


@pytest.fixture
def ground(
    tmp_path: Path, server: S3Server, proxy: Proxy, patience: Patience
) -> Iterator[ObjectGround]:
    raw = S3Bucket(server)
    blobs = open_blobs(raw.url, server.options(proxy.url), patience=patience)
    store = SqlStore(f"sqlite:///{tmp_path}/penstock.db")
    with running(ObjectGround, blobs, store, raw) as ground:
        yield ground


class TestContract(SegmentsContract):
    @pytest.fixture
    def patience(self) -> Patience:
        return Patience()


def methods(proxy: Proxy) -> Counter[str]:
    """How many requests came since the last call, by method."""
    counted = Counter(method for method, _ in proxy.requests)
    proxy.requests.clear()
    return counted


def test_a_flush_takes_one_request_for_each_slice(ground: ObjectGround, proxy: Proxy) -> None:
    writers = [
        ground.segments.open(BATCH, index, ground.claim(index), requests=LINES)
        for index in range(5)
    ]
    for writer in writers:
        append(writer, 1, 2, 3)
    ground.segments.flush(writers)

    assert methods(proxy) == {"PUT": 5}


def test_the_requests_of_a_slice_are_as_documented(ground: ObjectGround, proxy: Proxy) -> None:
    """Three flushes: two puts, two gets and a put of the whole, one delete for both; then one
    get for each result file."""
    writer = ground.segments.open(BATCH, 0, ground.claim(), requests=LINES)
    for lines in ([1, 2], [3, 4], [5, 6, 7, 8, 9, 10]):
        append(writer, *lines)
        ground.segments.flush([writer])
    ground.settle()
    assert methods(proxy) == {"PUT": 3, "GET": 2, "POST": 1}

    output = results_of(ground.segments.read(BATCH, 0, attempt=1), Kind.OUTPUT)
    assert output == b"".join(map(payload, range(1, 11)))
    assert methods(proxy) == {"GET": 1}

    ground.segments.delete(BATCH)
    assert methods(proxy) == {"GET": 1, "POST": 1}  # a listing and a delete
    assert ground.stored() == []


@pytest.mark.parametrize("action", ["stall", "cut", "lose answer", 500, 503, 507])
@pytest.mark.parametrize("lines", [[3], [3, 4, 5, 6, 7, 8, 9, 10]], ids=["some", "whole"])
def test_a_flush_outlasts_a_store_that_misbehaves(
    ground: ObjectGround, proxy: Proxy, action: int | str, lines: list[int]
) -> None:
    writer = ground.segments.open(BATCH, 0, ground.claim(), requests=LINES)
    append(writer, 1, 2)
    ground.segments.flush([writer])
    append(writer, *lines)
    proxy.rule = lambda method, path: action if method == "PUT" else None

    with pytest.raises(StorageUnavailable):
        ground.segments.flush([writer])
    assert writer.durable.completed == 2
    proxy.rule = lambda method, path: None
    ground.segments.flush([writer])
    ground.settle()

    assert list(replies_of(ground.segments.read(BATCH, 0))) == [1, 2, *lines]
    assert writer.durable.completed == 2 + len(lines)
    assert sorted(ground.named()) == ground.stored()


@pytest.mark.parametrize("action", ["stall", "cut", "cut answer", 503])
def test_what_cannot_be_read_is_never_taken_for_missing(
    ground: ObjectGround, proxy: Proxy, action: int | str
) -> None:
    """Or the lines would be sent again, and paid for twice."""
    writer = ground.segments.open(BATCH, 0, ground.claim(), requests=LINES)
    append(writer, 1, 2)
    ground.segments.flush([writer])
    attempt = ground.claim()
    proxy.rule = lambda method, path: action if method == "GET" else None

    with pytest.raises(StorageUnavailable):
        ground.segments.open(BATCH, 0, attempt, requests=LINES)
    with pytest.raises(StorageUnavailable):
        ground.segments.read(BATCH, 0)
    proxy.rule = lambda method, path: None

    assert ground.segments.open(BATCH, 0, attempt, requests=LINES).lines == {1, 2}
