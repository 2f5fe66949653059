"""Blobs in an object store: S3, Google Cloud Storage or Azure, through obstore.

A blob of some size goes up in parts, of which a few are in memory, and appears when the last
one has been told. A write that fails or is cancelled takes its parts back. What a killed
process leaves behind in parts is never listed as an object; a lifecycle rule of the bucket
must delete it.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Generator,
    Iterator,
    Sequence,
)
from contextlib import aclosing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

from penstock.blobs.base import Piece, check_by_trial
from penstock.blobs.storage_errors import explain, names_no_bucket, names_no_upload
from penstock.errors import NotFound, StorageUnavailable

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import AzureStore, GCSStore, S3Store

PIECE_BYTES = 1 << 20
"""About how much is handed on at once."""
PART_BYTES = 8 << 20
"""A blob up to this size goes up in one request. S3 takes 10,000 parts: 78 GiB."""
_PARTS_IN_FLIGHT = 3
_SPAN_BYTES = 4 << 20
"""How much of a stream one request brings."""
_SPANS_AHEAD = 2
_DELETES_AT_ONCE = 16
_PARTING_S = 5.0
"""How long a write that is given up may take to clean up after itself."""


class ObjectBlobs:
    """Keeps blobs as objects of one bucket, or of a prefix in it.

    Args:
        store: The bucket. Its time-outs and retries bound how long a call may take.
        url: What the settings call it; named in errors.
        takes_many_deletes: Whether one request can delete many objects.
    """

    def __init__(
        self,
        store: "S3Store | GCSStore | AzureStore",
        *,
        url: str,
        takes_many_deletes: bool = False,
    ) -> None:
        self._store = store
        self._url = url
        self._takes_many_deletes = takes_many_deletes

    async def put(self, key: str, chunks: AsyncIterator[bytes]) -> int:
        async with aclosing(_joined(chunks)) as pieces:
            start: list[bytes] = []
            size = 0
            async for piece in pieces:
                start.append(piece)
                size += len(piece)
                if size > PART_BYTES:
                    return await self._put_parts(key, start, pieces)
        data = b"".join(start)
        # Not in parts: that would take three requests.
        writing = asyncio.ensure_future(
            obstore.put_async(self._store, key, data, use_multipart=False)
        )
        await self._see_through(key, writing)
        return size

    async def put_made(self, key: str, pieces: Iterator[Sequence[Piece]]) -> int:
        return await self.put(key, _made(pieces))

    async def _put_parts(
        self, key: str, start: list[bytes], pieces: AsyncIterator[bytes]
    ) -> int:
        size = sum(map(len, start))
        handing = _Handing(start)
        start.clear()
        writing = asyncio.ensure_future(
            obstore.put_async(
                self._store,
                key,
                handing.pieces(),
                chunk_size=PART_BYTES,
                max_concurrency=_PARTS_IN_FLIGHT,
                use_multipart=True,
            )
        )
        try:
            async for piece in pieces:
                if not await handing.give(piece, writing):
                    break  # the write has failed, as will be told
                size += len(piece)
            else:
                await handing.give(None, writing)
        except BaseException:
            handing.give_up()
            await self._take_back(key, writing)
            raise
        await self._see_through(key, writing, parts_bytes=size)
        return size

    async def _see_through(
        self, key: str, writing: "asyncio.Future[Any]", *, parts_bytes: int = 0
    ) -> None:
        """Await a write; nothing of it is left if it fails or the caller is cancelled.

        Args:
            parts_bytes: How much was written, if in parts.
        """
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await self._take_back(key, writing)
            raise
        except (BaseError, OSError) as error:
            # An upload that was ended is not known any more to who asks for its end again.
            if parts_bytes and names_no_upload(error) and await self._has(key, parts_bytes):
                return
            await self._take_back(key, writing)
            raise self._trouble(error, is_write=True) from error

    async def _has(self, key: str, size: int) -> bool:
        try:
            return await self.size(key) == size
        except (NotFound, StorageUnavailable):
            return False

    async def _take_back(self, key: str, writing: "asyncio.Future[Any]") -> None:
        # A request that is dropped may still be carried out; one that has ended can be undone.
        await asyncio.wait({writing}, timeout=_PARTING_S)
        if not writing.cancel() and isinstance(writing.exception(), _NOTHING_WRITTEN):
            return
        with suppress(BaseError, OSError):  # TimeoutError is one of these
            async with asyncio.timeout(_PARTING_S):
                await obstore.delete_async(self._store, key)

    async def size(self, key: str) -> int:
        with self._reading(key):
            return (await obstore.head_async(self._store, key))["size"]

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        if end <= start:
            return b""
        with self._reading(key):
            data = await obstore.get_range_async(self._store, key, start=start, end=end)
        return data.to_bytes()

    async def stream(
        self, key: str, start: int = 0, end: int | None = None
    ) -> AsyncIterator[bytes]:
        stop = await self.size(key) if end is None else end
        spans = _spans(start, stop)
        ahead: deque[asyncio.Task[bytes]] = deque()

        def look_ahead(count: int) -> None:
            for first, last in itertools.islice(spans, count):
                fetching = asyncio.create_task(self.get_range(key, first, last))
                fetching.add_done_callback(_hear)
                ahead.append(fetching)

        try:
            look_ahead(_SPANS_AHEAD)
            while ahead:
                data = await ahead[0]
                ahead.popleft()
                look_ahead(1)
                for offset in range(0, len(data), PIECE_BYTES):
                    yield data[offset : offset + PIECE_BYTES]
        finally:
            for fetching in ahead:
                fetching.cancel()

    async def delete(self, keys: Sequence[str]) -> None:
        if self._takes_many_deletes:
            if keys:
                with self._deleting():
                    await obstore.delete_async(self._store, list(keys))
            return
        for first in range(0, len(keys), _DELETES_AT_ONCE):
            some = keys[first : first + _DELETES_AT_ONCE]
            with self._deleting():
                await asyncio.gather(*map(self._delete_one, some))

    async def _delete_one(self, key: str) -> None:
        try:
            await obstore.delete_async(self._store, key)
        except FileNotFoundError as error:
            if names_no_bucket(error):
                raise

    async def iter_keys(
        self, prefix: str, *, written_before: float | None = None
    ) -> AsyncIterator[str]:
        before = float("inf") if written_before is None else written_before
        pages: AsyncIterable[Sequence[ObjectMeta]] = obstore.list(self._store, prefix)  # pyright: ignore[reportUnknownMemberType]
        walk = aiter(pages)
        while True:
            with self._reading(prefix):
                page = await anext(walk, None)
            if page is None:
                return
            for entry in page:
                if entry["last_modified"].timestamp() < before:
                    yield entry["path"]

    async def check(self) -> None:
        await check_by_trial(self)

    @contextmanager
    def _reading(self, key: str) -> Generator[None]:
        try:
            yield
        except (BaseError, OSError) as error:
            if isinstance(error, FileNotFoundError) and not names_no_bucket(error):
                raise NotFound(f"There is no blob '{key}'.") from error
            raise self._trouble(error, is_write=False) from error

    @contextmanager
    def _deleting(self) -> Generator[None]:
        try:
            yield
        except (BaseError, OSError) as error:
            raise self._trouble(error, is_write=True) from error

    def _trouble(self, error: BaseException, *, is_write: bool) -> StorageUnavailable:
        return StorageUnavailable(explain(error, url=self._url, is_write=is_write))


class _GivenUp(Exception):
    """Tells obstore to take back the parts that it has sent."""


_NOTHING_WRITTEN = (
    _GivenUp,
    FileNotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
)
"""Errors after which a store holds nothing of what it was sent."""


class _Handing:
    """Hands pieces to a write of obstore's, which takes back what it wrote only if its source
    fails, not if it is cancelled itself."""

    def __init__(self, start: Sequence[bytes]) -> None:
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=1)
        self._start = deque(start)
        self._is_given_up = False

    async def pieces(self) -> AsyncIterator[bytes]:
        while self._start:
            yield self._start.popleft()
        while (piece := await self._queue.get()) is not None:
            yield piece
        if self._is_given_up:
            raise _GivenUp

    async def give(self, piece: bytes | None, writing: "asyncio.Future[Any]") -> bool:
        """Hand over the next piece, or None after the last.

        Returns:
            False if the write has ended before.
        """
        giving = asyncio.ensure_future(self._queue.put(piece))
        try:
            await asyncio.wait({giving, writing}, return_when=asyncio.FIRST_COMPLETED)
            return not writing.done()
        finally:
            giving.cancel()

    def give_up(self) -> None:
        self._is_given_up = True
        self._start.clear()
        if self._queue.full():
            self._queue.get_nowait()
        self._queue.put_nowait(None)


async def _joined(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """The chunks, joined to pieces of at least `PIECE_BYTES`, but for the last."""
    waiting: list[bytes] = []
    size = 0
    async for chunk in chunks:
        waiting.append(chunk)
        size += len(chunk)
        if size >= PIECE_BYTES:
            yield b"".join(waiting)
            waiting.clear()
            size = 0
    if size:
        yield b"".join(waiting)


async def _made(pieces: Iterator[Sequence[Piece]]) -> AsyncIterator[bytes]:
    """Pieces that are made in a thread, which has stopped when this ends."""
    while True:
        making = asyncio.ensure_future(asyncio.to_thread(_make, pieces))
        try:
            made = await asyncio.shield(making)
        except asyncio.CancelledError:
            await asyncio.wait({making})
            making.exception()
            raise
        if not made:
            return
        yield made


def _make(pieces: Iterator[Sequence[Piece]]) -> bytes:
    """The next `PIECE_BYTES` or somewhat more; fewer at the end."""
    made: list[bytes] = []
    size = 0
    while size < PIECE_BYTES and (some := next(pieces, None)) is not None:
        made.append(b"".join(some))  # they are good until the next are asked for
        size += len(made[-1])
    return b"".join(made)


def _spans(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """In which ranges a stream is fetched; the first is small, so that it comes soon."""
    length = PIECE_BYTES
    while start < stop:
        end = min(start + length, stop)
        yield start, end
        start, length = end, _SPAN_BYTES


def _hear(task: "asyncio.Task[bytes]") -> None:
    """Take note of an error that nobody will ask for."""
    if not task.cancelled():
        task.exception()
