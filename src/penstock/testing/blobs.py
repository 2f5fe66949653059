"""The contract kit of `Blobs`: one test for each promise of its docstrings."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Protocol

import pytest

from penstock.blobs.base import Blobs
from penstock.errors import NotFound

MB = 1 << 20
LARGE = bytes(range(256)) * (14 * MB // 1024)
"""Some pieces and a bit."""


class RawBlobs(Protocol):
    """The place where the blobs under test lie, looked at by another way than theirs."""

    def get(self, key: str) -> bytes | None:
        """All bytes under a key, or None."""
        ...

    def set(self, key: str, data: bytes) -> None:
        """Put bytes under a key."""
        ...

    def everything(self) -> list[str]:
        """The names of all that is there, be it a blob or not."""
        ...


async def chunks_of(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


class BlobContract:
    """Inherit, and give two fixtures: `blobs`, which is empty, and `raw` beside it."""

    # put

    @pytest.mark.parametrize(
        "chunks",
        [
            pytest.param([], id="nothing"),
            pytest.param([b""], id="an empty chunk"),
            pytest.param([b"abc"], id="one"),
            pytest.param([b"a", b"", b"bc", b"\r\n\0\xff"], id="small ones"),
            pytest.param([LARGE, b"x", LARGE], id="large ones"),
            pytest.param([b"0123456789"] * 5_000, id="many"),
        ],
    )
    async def test_a_blob_holds_what_its_chunks_brought(
        self, blobs: Blobs, raw: RawBlobs, chunks: list[bytes]
    ) -> None:
        size = await blobs.put("files/a", chunks_of(*chunks))

        assert raw.get("files/a") == b"".join(chunks)
        assert size == sum(map(len, chunks))
        assert await blobs.size("files/a") == size

    async def test_blobs_that_are_put_at_the_same_time_do_not_mix(
        self, blobs: Blobs, raw: RawBlobs
    ) -> None:
        texts = {f"files/{n}": b"%d" % n * (n * 10_000) for n in range(1, 10)}

        await asyncio.gather(
            *(blobs.put(key, chunks_of(text, text)) for key, text in texts.items())
        )

        assert {key: raw.get(key) for key in texts} == {
            key: text * 2 for key, text in texts.items()
        }

    async def test_a_blob_does_not_appear_before_it_is_whole(
        self, blobs: Blobs, raw: RawBlobs
    ) -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def chunks() -> AsyncIterator[bytes]:
            yield LARGE
            begun.set()
            await go_on.wait()
            yield LARGE

        putting = asyncio.create_task(blobs.put("files/a", chunks()))
        await begun.wait()

        assert raw.get("files/a") is None
        with pytest.raises(NotFound):
            await blobs.size("files/a")
        assert [key async for key in blobs.iter_keys("files")] == []
        go_on.set()
        assert await putting == 2 * len(LARGE)

    @pytest.mark.parametrize("before", [b"", b"abc", LARGE])
    async def test_a_source_that_fails_leaves_nothing_and_its_error_goes_on(
        self, blobs: Blobs, raw: RawBlobs, before: bytes
    ) -> None:
        class Refused(Exception):
            pass

        async def chunks() -> AsyncIterator[bytes]:
            yield before
            raise Refused

        with pytest.raises(Refused):
            await blobs.put("files/a", chunks())

        assert raw.everything() == []

    @pytest.mark.parametrize("before", [b"", b"abc", LARGE])
    async def test_a_put_that_is_cancelled_leaves_nothing(
        self, blobs: Blobs, raw: RawBlobs, before: bytes
    ) -> None:
        begun = asyncio.Event()

        async def chunks() -> AsyncIterator[bytes]:
            yield before
            begun.set()
            await asyncio.Event().wait()

        putting = asyncio.create_task(blobs.put("files/a", chunks()))
        await begun.wait()
        putting.cancel()

        with pytest.raises(asyncio.CancelledError):
            await putting
        await self.until_nothing_is_left(raw)

    @pytest.mark.parametrize(
        "pieces", [[], [b"abc", b"", b"def"], [LARGE, LARGE], [b"x"] * 3000]
    )
    async def test_pieces_may_be_made_in_a_thread(
        self, blobs: Blobs, raw: RawBlobs, pieces: list[bytes]
    ) -> None:
        some = [pieces[:2], [memoryview(each) for each in pieces[2:]]]

        size = await blobs.put_made("files/a", iter(some))

        assert raw.get("files/a") == b"".join(pieces)
        assert size == sum(map(len, pieces))

    async def test_pieces_that_cannot_be_made_leave_nothing(
        self, blobs: Blobs, raw: RawBlobs
    ) -> None:
        class Refused(Exception):
            pass

        def pieces() -> Iterator[list[bytes]]:
            yield [LARGE]
            raise Refused

        with pytest.raises(Refused):
            await blobs.put_made("files/a", pieces())

        assert raw.everything() == []

    async def test_a_blob_that_is_made_is_not_there_before_it_is_whole_nor_after_a_cancel(
        self, blobs: Blobs, raw: RawBlobs
    ) -> None:
        begun, go_on = threading.Event(), threading.Event()

        def pieces() -> Iterator[list[bytes]]:
            yield [LARGE]
            begun.set()
            go_on.wait(10)
            yield [LARGE]

        putting = asyncio.create_task(blobs.put_made("files/a", pieces()))
        await asyncio.to_thread(begun.wait, 10)
        assert raw.get("files/a") is None
        putting.cancel()
        asyncio.get_running_loop().call_later(0.05, go_on.set)

        with pytest.raises(asyncio.CancelledError):
            await putting
        await self.until_nothing_is_left(raw)

    async def until_nothing_is_left(self, raw: RawBlobs) -> None:
        """A cancelled write may still be cleaning up after itself for a moment."""
        async with asyncio.timeout(10):
            while raw.everything():  # noqa: ASYNC110  (no event to await)
                await asyncio.sleep(0.01)

    # Reading

    async def test_the_size_is_in_bytes(self, blobs: Blobs, raw: RawBlobs) -> None:
        raw.set("files/a", "é".encode())

        assert await blobs.size("files/a") == 2

    @pytest.mark.parametrize(
        ("start", "end"), [(0, 26), (0, 1), (25, 26), (3, 7), (0, 0), (7, 7), (26, 26)]
    )
    async def test_a_range_has_its_start_and_not_its_end(
        self, blobs: Blobs, raw: RawBlobs, start: int, end: int
    ) -> None:
        letters = b"abcdefghijklmnopqrstuvwxyz"
        raw.set("files/a", letters)

        assert await blobs.get_range("files/a", start, end) == letters[start:end]
        assert (
            b"".join([p async for p in blobs.stream("files/a", start, end)])
            == (letters[start:end])
        )

    @pytest.mark.parametrize("start", [0, 1, MB - 1, MB, MB + 1, len(LARGE) - 1, len(LARGE)])
    async def test_a_stream_ends_at_the_last_byte_and_comes_in_pieces(
        self, blobs: Blobs, raw: RawBlobs, start: int
    ) -> None:
        raw.set("files/a", LARGE)

        pieces = [piece async for piece in blobs.stream("files/a", start)]

        assert b"".join(pieces) == LARGE[start:]
        assert all(0 < len(piece) <= 2 * MB for piece in pieces)

    async def test_an_empty_blob_has_no_pieces(self, blobs: Blobs, raw: RawBlobs) -> None:
        raw.set("files/a", b"")

        assert [piece async for piece in blobs.stream("files/a")] == []

    async def test_a_stream_may_be_left_in_the_middle(
        self, blobs: Blobs, raw: RawBlobs
    ) -> None:
        raw.set("files/a", LARGE)

        async for piece in blobs.stream("files/a"):
            assert piece
            break

        await blobs.delete(["files/a"])
        assert raw.get("files/a") is None

    async def test_what_is_not_there_is_not_found(self, blobs: Blobs, raw: RawBlobs) -> None:
        raw.set("files/ab", b"abc")

        with pytest.raises(NotFound):
            await blobs.size("files/a")
        with pytest.raises(NotFound):
            await blobs.get_range("files/a", 0, 1)
        with pytest.raises(NotFound):
            await anext(aiter(blobs.stream("files/a")))
        with pytest.raises(NotFound):
            await anext(aiter(blobs.stream("files/a", 0, 1)))

    # delete

    async def test_a_deleted_blob_is_gone_and_the_others_stay(
        self, blobs: Blobs, raw: RawBlobs
    ) -> None:
        for key in ("files/a", "files/b", "files/c"):
            raw.set(key, b"abc")

        await blobs.delete(["files/a", "files/b"])

        assert raw.everything() == ["files/c"]
        with pytest.raises(NotFound):
            await blobs.size("files/a")

    async def test_what_is_not_there_is_passed_over_by_delete(
        self, blobs: Blobs, raw: RawBlobs
    ) -> None:
        raw.set("files/b", b"abc")

        await blobs.delete(["files/a", "files/b"])
        await blobs.delete(["files/a", "files/b"])
        await blobs.delete([])

        assert raw.everything() == []

    async def test_a_key_may_be_used_again_after_it_was_deleted(
        self, blobs: Blobs, raw: RawBlobs
    ) -> None:
        await blobs.put("files/a", chunks_of(b"one"))
        await blobs.delete(["files/a"])

        await blobs.put("files/a", chunks_of(b"two"))

        assert raw.get("files/a") == b"two"

    async def test_many_are_deleted_in_one_call(self, blobs: Blobs, raw: RawBlobs) -> None:
        keys = [f"files/{n}" for n in range(40)]
        for key in [*keys, "files/last"]:
            raw.set(key, b"abc")

        await blobs.delete(keys)

        assert raw.everything() == ["files/last"]

    # check

    async def test_a_check_that_succeeds_leaves_nothing(
        self, blobs: Blobs, raw: RawBlobs
    ) -> None:
        await blobs.check()

        assert raw.everything() == []

    # iter_keys

    async def test_the_keys_below_a_prefix_are_told_and_no_others(
        self, blobs: Blobs, raw: RawBlobs
    ) -> None:
        for key in ("files/a", "files/b", "files/deep/c", "filesystem/d", "other/files/e"):
            raw.set(key, b"abc")

        assert sorted([key async for key in blobs.iter_keys("files")]) == [
            "files/a",
            "files/b",
            "files/deep/c",
        ]
        assert [key async for key in blobs.iter_keys("nothing")] == []

    async def test_keys_are_told_by_age(self, blobs: Blobs, raw: RawBlobs) -> None:
        raw.set("files/a", b"abc")
        now = time.time()

        async def count(written_before: float) -> int:
            keys = blobs.iter_keys("files", written_before=written_before)
            return len([key async for key in keys])

        assert await count(now - 60) == 0
        assert await count(now + 60) == 1
