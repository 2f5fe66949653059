"""Blobs in an object store: the contract on a server that speaks S3, the other client's view,
and a server that misbehaves."""

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from penstock.blobs.folder import FolderBlobs
from penstock.blobs.objects import PART_BYTES, ObjectBlobs
from penstock.blobs.storage import Patience, open_blobs
from penstock.errors import NotFound, StorageUnavailable
from penstock.testing.blobs import LARGE, MB, BlobContract, chunks_of
from tests.object_stores import PREFIX, Proxy, S3Bucket, S3Server, moto

HASTE = Patience(connect_timeout_s=1, request_timeout_s=0.4, retries=1, retry_s=1)
BOUND_S = 20.0
"""Far above what HASTE allows for all requests of a call, far below for ever."""
TWO_PARTS = [LARGE] * 4


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with moto() as server:
        yield server


@pytest.fixture
def raw(server: S3Server) -> S3Bucket:
    return S3Bucket(server)


@pytest.fixture
def blobs(raw: S3Bucket) -> ObjectBlobs:
    blobs = open_blobs(raw.url, raw.server.options())
    assert isinstance(blobs, ObjectBlobs)
    return blobs


@pytest.fixture
def proxy(server: S3Server) -> Iterator[Proxy]:
    with Proxy(server.url) as proxy:
        yield proxy


@pytest.fixture
def hurt(raw: S3Bucket, proxy: Proxy) -> ObjectBlobs | FolderBlobs:
    """The same bucket, through a proxy that may misbehave."""
    return open_blobs(raw.url, raw.server.options(proxy.url), patience=HASTE)


class TestContract(BlobContract):
    pass


# Sizes


@pytest.mark.parametrize("size", [PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES])
async def test_a_blob_of_any_number_of_parts_is_whole(
    blobs: ObjectBlobs, raw: S3Bucket, size: int
) -> None:
    data = (bytes(range(251)) * (size // 251 + 1))[:size]

    assert await blobs.put("files/a", chunks_of(data)) == size
    assert await blobs.put("files/b", chunks_of(data[:7], data[7:])) == size

    assert raw.get("files/a") == raw.get("files/b") == data
    assert b"".join([piece async for piece in blobs.stream("files/a")]) == data


async def test_a_small_blob_takes_one_request(
    hurt: ObjectBlobs, proxy: Proxy, raw: S3Bucket
) -> None:
    await hurt.put("files/a", chunks_of(b"a", b"b"))

    assert proxy.requests == [("PUT", f"/{raw.name}/{PREFIX}/files/a")]


async def test_a_source_is_not_read_far_ahead_of_what_is_stored(
    hurt: ObjectBlobs, proxy: Proxy
) -> None:
    """So what is in memory is bounded, however large the blob."""
    taken = 0
    proxy.rule = lambda method, path: "stall" if "partNumber" in path else None

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += MB
            yield bytes(MB)

    with pytest.raises(StorageUnavailable):
        await hurt.put("files/a", chunks())

    assert taken <= 64 * MB


async def test_pieces_are_not_made_far_ahead_of_what_is_stored(
    hurt: ObjectBlobs, proxy: Proxy
) -> None:
    made = 0
    proxy.rule = lambda method, path: "stall" if "partNumber" in path else None

    def pieces() -> Iterator[list[bytes]]:
        nonlocal made
        while True:
            made += MB
            yield [bytes(MB)]

    with pytest.raises(StorageUnavailable):
        await hurt.put_made("files/a", pieces())

    assert made <= 64 * MB


async def test_a_stream_takes_few_requests(
    hurt: ObjectBlobs, proxy: Proxy, raw: S3Bucket
) -> None:
    raw.set("files/a", bytes(9 * MB))

    pieces = [piece async for piece in hurt.stream("files/a")]

    assert sum(map(len, pieces)) == 9 * MB
    assert [method for method, _ in proxy.requests] == ["HEAD", "GET", "GET", "GET"]


async def test_many_deletes_are_one_request(
    hurt: ObjectBlobs, proxy: Proxy, raw: S3Bucket
) -> None:
    for n in range(5):
        raw.set(f"files/{n}", b"abc")

    await hurt.delete([f"files/{n}" for n in range(5)])

    assert [method for method, _ in proxy.requests] == ["POST"]
    assert raw.everything() == []


@pytest.mark.slow_storage
async def test_more_keys_than_a_listing_has_on_a_page_are_told(
    blobs: ObjectBlobs, raw: S3Bucket
) -> None:
    for n in range(1003):
        raw.set(f"files/{n}", b"")

    assert len({key async for key in blobs.iter_keys("files")}) == 1003


# A store that misbehaves

TROUBLES = [
    pytest.param("stall", "in time", id="it stalls"),
    pytest.param("cut", "broke off", id="it cuts the connection"),
    pytest.param(500, "InternalError", id="it fails"),
    pytest.param(503, "too much to do (SlowDown)", id="it has too much to do"),
    pytest.param(507, "full or over its quota", id="it is full"),
    pytest.param(403, "refuses the credentials", id="it forbids"),
]


@pytest.mark.parametrize(("action", "told"), TROUBLES)
@pytest.mark.parametrize("data", [[b"abc"], TWO_PARTS], ids=["small", "in parts"])
@pytest.mark.parametrize("way", ["put", "put_made"])
async def test_a_write_that_fails_is_told_in_time_and_leaves_nothing(  # noqa: PLR0917
    hurt: ObjectBlobs,
    proxy: Proxy,
    raw: S3Bucket,
    action: int | str,
    told: str,
    data: list[bytes],
    way: str,
) -> None:
    proxy.rule = lambda method, path: action if method == "PUT" else None
    begun = time.monotonic()

    with pytest.raises(StorageUnavailable, match=re.escape(told)) as error:
        if way == "put":
            await hurt.put("files/a", chunks_of(*data))
        else:
            await hurt.put_made("files/a", iter([data]))

    assert time.monotonic() - begun < BOUND_S
    assert raw.url in str(error.value)
    assert raw.server.secret_access_key not in str(error.value)
    assert raw.server.access_key_id not in str(error.value)
    assert raw.everything() == []


@pytest.mark.parametrize(
    "where", ["uploads", "partNumber=2", "uploadId"], ids=["first", "a part", "last"]
)
@pytest.mark.parametrize("action", ["stall", 500, "cut"])
async def test_a_write_in_parts_may_fail_at_each_of_its_steps(
    hurt: ObjectBlobs, proxy: Proxy, raw: S3Bucket, where: str, action: str | int
) -> None:
    method = "PUT" if "part" in where else "POST"
    proxy.rule = lambda m, path: action if m == method and where in path else None

    with pytest.raises(StorageUnavailable):
        await hurt.put("files/a", chunks_of(*TWO_PARTS))

    assert raw.everything() == []


@pytest.mark.parametrize("data", [[b"abc"], TWO_PARTS], ids=["small", "in parts"])
async def test_a_write_whose_answer_is_lost_is_not_left_behind(
    hurt: ObjectBlobs, proxy: Proxy, raw: S3Bucket, data: list[bytes]
) -> None:
    """It was done, but who asked for it cannot know."""
    ends = "uploadId" if len(data) > 1 else "files"

    def rule(method: str, path: str) -> str | None:
        return "lose answer" if method in ("PUT", "POST") and ends in path else None

    proxy.rule = rule
    with pytest.raises(StorageUnavailable):
        await hurt.put("files/a", chunks_of(*data))

    assert raw.everything() == []


async def test_an_upload_whose_end_is_told_twice_has_ended(
    hurt: ObjectBlobs, proxy: Proxy, raw: S3Bucket
) -> None:
    """The answer to the first was lost, and to the second there is no such upload."""
    answers = iter(["lose answer", 404])

    def rule(method: str, path: str) -> str | int | None:
        return next(answers, None) if method == "POST" and "uploadId" in path else None

    proxy.rule = rule
    size = await hurt.put("files/a", chunks_of(*TWO_PARTS))

    assert raw.get("files/a") == b"".join(TWO_PARTS)
    assert size == len(b"".join(TWO_PARTS))


async def test_an_upload_that_somebody_gave_up_has_not_ended(
    hurt: ObjectBlobs, proxy: Proxy, raw: S3Bucket
) -> None:
    """As the lifecycle rule of a bucket does, if it comes too soon."""
    proxy.rule = lambda method, path: 404 if method == "POST" and "uploadId" in path else None

    with pytest.raises(StorageUnavailable, match="NoSuchUpload"):
        await hurt.put("files/a", chunks_of(*TWO_PARTS))

    assert raw.everything() == []


@pytest.mark.parametrize("way", ["put", "put_made"])
@pytest.mark.parametrize("parts", [1, 3])
async def test_parts_are_taken_back_when_the_caller_is_cancelled(
    blobs: ObjectBlobs, raw: S3Bucket, way: str, parts: int
) -> None:
    begun = threading.Event()
    go_on = asyncio.Event()

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(parts * 8 + 1):
            yield bytes(MB)
        begun.set()
        await go_on.wait()

    def pieces() -> Iterator[list[bytes]]:
        for _ in range(parts * 8 + 1):
            yield [bytes(MB)]
        begun.set()
        time.sleep(0.1)
        yield [bytes(MB)]

    write = blobs.put("files/a", chunks()) if way == "put" else None
    putting = asyncio.create_task(write or blobs.put_made("files/a", pieces()))
    assert await asyncio.to_thread(begun.wait, 10)
    putting.cancel()

    with pytest.raises(asyncio.CancelledError):
        await putting
    assert raw.everything() == []


async def test_parts_are_taken_back_when_the_source_fails(
    blobs: ObjectBlobs, raw: S3Bucket
) -> None:
    class Refused(Exception):
        pass

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield bytes(MB)
        raise Refused

    with pytest.raises(Refused):
        await blobs.put("files/a", chunks())

    assert raw.everything() == []


async def test_a_write_is_tried_again(hurt: ObjectBlobs, proxy: Proxy, raw: S3Bucket) -> None:
    failures = iter([500, None, "cut"])
    proxy.rule = lambda method, path: next(failures, None) if method == "PUT" else None

    for key in ("files/a", "files/b"):
        assert await hurt.put(key, chunks_of(b"abc")) == 3

    assert raw.everything() == ["files/a", "files/b"]


@pytest.mark.parametrize(("action", "told"), TROUBLES)
async def test_a_read_that_fails_is_told_in_time(
    hurt: ObjectBlobs, proxy: Proxy, raw: S3Bucket, action: int | str, told: str
) -> None:
    raw.set("files/a", b"abc")
    proxy.rule = lambda method, path: action
    begun = time.monotonic()

    with pytest.raises(StorageUnavailable, match=re.escape(told)):
        await hurt.get_range("files/a", 0, 3)
    with pytest.raises(StorageUnavailable):
        await hurt.size("files/a")
    with pytest.raises(StorageUnavailable):
        [piece async for piece in hurt.stream("files/a", 0, 3)]
    with pytest.raises(StorageUnavailable, match=re.escape(told)):
        [key async for key in hurt.iter_keys("files")]
    with pytest.raises(StorageUnavailable, match=re.escape(told)):
        await hurt.delete(["files/a"])

    assert time.monotonic() - begun < 2 * BOUND_S
    assert raw.everything() == ["files/a"]


async def test_an_answer_that_is_cut_off_is_never_taken_for_whole(
    hurt: ObjectBlobs, proxy: Proxy, raw: S3Bucket
) -> None:
    raw.set("files/a", LARGE)
    proxy.rule = lambda method, path: "cut answer" if method == "GET" else None

    with pytest.raises(StorageUnavailable):
        await hurt.get_range("files/a", 0, MB)


async def test_a_stream_whose_later_piece_fails_tells_so_and_leaves_no_task(
    hurt: ObjectBlobs, proxy: Proxy, raw: S3Bucket
) -> None:
    raw.set("files/a", bytes(10 * MB))
    gets = iter([None] * 2 + [403] * 50)
    proxy.rule = lambda method, path: next(gets) if method == "GET" else None

    got = 0
    with pytest.raises(StorageUnavailable, match="did not answer"):
        async for piece in hurt.stream("files/a"):
            got += len(piece)

    assert got == 5 * MB
    async with asyncio.timeout(5):
        while asyncio.all_tasks() != {asyncio.current_task()}:
            await asyncio.sleep(0)


async def test_a_store_that_is_not_there_is_told(raw: S3Bucket) -> None:
    options = raw.server.options("http://127.0.0.1:1")
    blobs = open_blobs(raw.url, options, patience=HASTE)

    for doing in (blobs.put("files/a", chunks_of(b"abc")), blobs.size("a"), blobs.check()):
        with pytest.raises(StorageUnavailable, match="cannot be reached"):
            await doing


async def test_a_bucket_that_is_not_there_is_told(raw: S3Bucket) -> None:
    blobs = open_blobs("s3://no-such-bucket-here", raw.server.options(), patience=HASTE)

    for doing in (
        blobs.put("files/a", chunks_of(b"abc")),
        blobs.put("files/a", chunks_of(*TWO_PARTS)),
        blobs.get_range("files/a", 0, 1),
        blobs.check(),
    ):
        with pytest.raises(StorageUnavailable, match="no such bucket"):
            await doing
    with pytest.raises(StorageUnavailable, match="no such bucket"):
        [key async for key in blobs.iter_keys("files")]


@pytest.mark.parametrize("step", ["PUT", "GET", "POST"])
async def test_a_check_finds_what_is_not_allowed(
    hurt: ObjectBlobs, proxy: Proxy, step: str
) -> None:
    proxy.rule = lambda method, path: 403 if method == step else None

    with pytest.raises(StorageUnavailable, match="refuses the credentials"):
        await hurt.check()


async def test_what_is_missing_is_not_taken_for_a_trouble(hurt: ObjectBlobs) -> None:
    with pytest.raises(NotFound):
        await hurt.get_range("files/a", 0, 1)
