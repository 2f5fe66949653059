"""Segments as objects, each named in a row of the store.

Every flush puts one object for each slice that has something, all at the same time, and then
names all of them in one transaction, which refuses those of slices that were claimed anew. An
object that no row names does not count. The next attempt does not copy what earlier ones
kept: it reads which lines they have. When the last reply of a slice is flushed, one sealed
object in line order takes the place of all, and they are deleted.

Keys are `segments/<batch>/<index>.<attempt>.<random>`, so no two writers share one. What a
lost answer or a killed process leaves without a row is deleted with its batch, by listing.
"""

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import structlog

from penstock.blobs.base import Blobs, Piece
from penstock.blobs.segments import (
    WHOLE_BYTES,
    SegmentReader,
    SegmentWriter,
    SliceReplies,
    Source,
)
from penstock.errors import NotFound, StorageUnavailable
from penstock.model import BatchId, SegmentObject, SliceId, slice_id

T = TypeVar("T")

_log = structlog.get_logger()

_PREFIX = "segments"
_PUTS_AT_ONCE = 32
_GETS_AT_ONCE = 32
_WHOLES_AT_ONCE = 4
"""How many slices are put together at the same time."""
_SLICE_BYTES = 16 << 20
"""The replies of a slice up to this size are fetched whole, of a larger one piece by piece."""
_BLOCK_BYTES = 64 << 10
_PUT_BYTES = 1 << 20
_SLICES_AHEAD = 4
"""How many slices of a batch are fetched before they are asked for, by who reads in order."""
_AHEAD_BYTES = 32 << 20
"""How much of them is held, over all batches."""
_READERS_KNOWN = 64
_LOOKS = 5
"""How often a slice is looked at anew because its objects were replaced meanwhile."""
_REPLACED = "Replies were replaced while they were read; ask again."


class ObjectNames(Protocol):
    """What is asked of the store, whose contract tells more."""

    async def add_segment_objects(self, objects: Sequence[SegmentObject]) -> set[SliceId]: ...

    async def replace_segment_objects(self, whole: SegmentObject) -> bool: ...

    async def list_segment_objects(
        self, batch_id: BatchId, *, first: int = 0, last: int | None = None
    ) -> list[SegmentObject]: ...

    async def forget_segment_objects(self, batch_id: BatchId) -> None: ...

    async def list_segment_batches(self) -> list[BatchId]: ...


@dataclass(frozen=True, slots=True)
class _Stored:
    """An object that is durable and not named yet."""

    row: SegmentObject
    replaces: tuple[str, ...] | None = None
    """The keys of the objects in whose place it comes; None if it comes beside them."""
    may_be_named: bool = False
    """Whether there may be a row after all: who has the slice now may have read it."""


class ObjectWriter(SegmentWriter):
    """Collects the replies of one attempt, whose flushes become objects."""

    def __init__(self, batch_id: BatchId, index: int, attempt: int, requests: int) -> None:
        super().__init__(requests)
        self.batch_id = batch_id
        self.index = index
        self.attempt = attempt
        self.requests = requests
        self.has_earlier = False
        """Whether objects are named that hold replies of this slice."""
        self.stored: _Stored | None = None
        """What was prepared, if it is durable already and only has to be named."""
        self._number = 0

    @property
    def is_whole(self) -> bool:
        """Whether each line has its reply when what was encoded is durable."""
        return self.encoded.completed + self.encoded.failed == self.requests

    def inherit(self, replies: SliceReplies) -> None:
        """Take over what earlier attempts have kept, which stays where it is."""
        self.lines |= replies.lines
        self.durable = replies.tally()
        self.has_earlier = True

    def prepare(self) -> None:
        super().prepare()
        self.stored = None

    def keep(self, size: int) -> None:
        super().keep(size)
        self.stored = None
        self.has_earlier = True
        self._requests = 0  # only an object that has all replies may be sealed

    def renumber(self) -> None:
        """Give what is stored a number of its own: the row of an object whose naming seems to
        have failed may be there all the same."""
        if self.stored is not None:
            row = replace(self.stored.row, number=self._next_number())
            self.stored = replace(self.stored, row=row, may_be_named=True)

    def _next_number(self) -> int:
        number, self._number = self._number, self._number + 1
        return number

    def name_object(self, size: int) -> SegmentObject:
        """The row of a new object, with a number and a key that no other has."""
        start = f"{self.index:08d}.{self.attempt:06d}.{secrets.token_hex(8)}"
        return SegmentObject(
            batch_id=self.batch_id,
            index=self.index,
            attempt=self.attempt,
            number=self._next_number(),
            key=f"{_PREFIX}/{self.batch_id}/{start}",
            bytes=size,
        )


class ObjectSegments:
    """Segments in an object store. Blocking, but for `open` at a first attempt: call it from a
    thread beside the event loop.

    Args:
        loop: Where `blobs` and `store` live.
    """

    flush_interval_s = 1.0
    flush_bytes = 8 << 20
    """A flush costs a request for each slice that has something."""

    def __init__(
        self, *, blobs: Blobs, store: ObjectNames, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._blobs = blobs
        self._store = store
        self._loop = loop
        self._puts = asyncio.Semaphore(_PUTS_AT_ONCE)
        self._gets = asyncio.Semaphore(_GETS_AT_ONCE)
        self._wholes = asyncio.Semaphore(_WHOLES_AT_ONCE)
        self._ahead = _Ahead()
        self._cleaning: set[asyncio.Task[None]] = set()

    def open(
        self, batch_id: BatchId, index: int, attempt: int, *, requests: int
    ) -> ObjectWriter:
        writer = ObjectWriter(batch_id, index, attempt, requests)
        if attempt > 1:  # else nothing can be there yet
            with self._open(batch_id, index, attempt) as replies:
                if replies.lines:
                    writer.inherit(replies)
        return writer

    def flush(self, writers: Sequence[SegmentWriter]) -> None:
        todo: list[tuple[ObjectWriter, bytes]] = []
        for writer in writers:
            assert isinstance(writer, ObjectWriter)  # noqa: S101
            if data := writer.encode():
                todo.append((writer, data))
        if todo:
            self._wait(self._flush(todo))

    def read(
        self, batch_id: BatchId, index: int, *, attempt: int | None = None
    ) -> SliceReplies:
        return self._open(batch_id, index, attempt, looks_ahead=True)

    def delete(self, batch_id: BatchId) -> None:
        self._wait(self._delete(batch_id))

    def batches(self) -> list[BatchId]:
        return self._wait(self._batches())

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # Writing

    async def _flush(self, todo: Sequence[tuple[ObjectWriter, bytes]]) -> None:
        """Name what could be stored, also if some could not."""
        failures = await asyncio.gather(
            *(self._store_one(*each) for each in todo), return_exceptions=True
        )
        beside: list[tuple[ObjectWriter, bytes, _Stored]] = []
        whole: list[tuple[ObjectWriter, bytes, _Stored]] = []
        for writer, data in todo:
            if (stored := writer.stored) is not None:
                (beside if stored.replaces is None else whole).append((writer, data, stored))
        lost = await self._name(beside) if beside else set[ObjectWriter]()
        replaced = await asyncio.gather(
            *(self._store.replace_segment_objects(each.row) for _, _, each in whole),
            return_exceptions=True,
        )
        unused: list[str] = [
            each.row.key
            for writer, _, each in beside
            if writer in lost and not each.may_be_named  # it goes with its batch
        ]
        for (writer, data, stored), outcome in zip(whole, replaced, strict=True):
            if outcome is True:
                unused += stored.replaces or ()
                writer.keep(len(data))
            elif outcome is False:
                if not stored.may_be_named:
                    unused.append(stored.row.key)
                writer.give_up()
            else:
                writer.stored = replace(stored, may_be_named=True)
        self._discard(unused)
        for failure in (*failures, *replaced):
            if isinstance(failure, BaseException):
                raise failure

    async def _name(
        self, stored: Sequence[tuple[ObjectWriter, bytes, _Stored]]
    ) -> set[ObjectWriter]:
        """Name objects in one transaction; the writers whose slices were lost."""
        rows = [each.row for _, _, each in stored]
        try:
            lost_slices = await self._store.add_segment_objects(rows)
        except StorageUnavailable:
            for writer, _, _ in stored:
                writer.renumber()
            raise
        lost: set[ObjectWriter] = set()
        for writer, data, _ in stored:
            if slice_id(writer.batch_id, writer.index) in lost_slices:
                lost.add(writer)
                writer.give_up()
            else:
                writer.keep(len(data))
        return lost

    async def _store_one(self, writer: ObjectWriter, data: bytes) -> None:
        if writer.stored is not None:
            return  # by an earlier try
        if writer.is_whole and writer.has_earlier:
            async with self._wholes:
                writer.stored = await self._store_whole(writer, data)
        if writer.stored is None:
            row = writer.name_object(len(data))
            async with self._puts:
                await self._blobs.put(row.key, _once(data))
            writer.stored = _Stored(row)

    async def _store_whole(self, writer: ObjectWriter, data: bytes) -> _Stored | None:
        """Put all replies of a slice into one object; None if some of them are missing, so
        that what there is has to stay as it is."""
        found = await self._look(writer.batch_id, writer.index, writer.attempt)
        sources = [*found.sources, _Memory(data)]
        replies = await asyncio.to_thread(_read, sources, found.whole_bytes)
        with replies:
            if len(await asyncio.to_thread(lambda: replies.lines)) != writer.requests:
                _log.error(
                    "Kept replies are missing.",
                    slice_id=slice_id(writer.batch_id, writer.index),
                    missing=writer.requests - len(replies.lines),
                )
                return None
            row = writer.name_object(0)
            size = await self._blobs.put_made(row.key, _sealed(replies, writer.requests))
        return _Stored(replace(row, bytes=size), tuple({each.key for each in found.rows}))

    def _discard(self, keys: Sequence[str]) -> None:
        """Delete objects that nobody needs, some time soon."""
        if keys:
            cleaning = asyncio.create_task(self._delete_quietly(keys))
            self._cleaning.add(cleaning)
            cleaning.add_done_callback(self._cleaning.discard)

    async def _delete_quietly(self, keys: Sequence[str]) -> None:
        try:
            await self._blobs.delete(keys)
        except StorageUnavailable as error:
            # They go with their batch.
            _log.warning("Objects could not be deleted for now.", error=str(error))

    # Reading

    def _open(
        self,
        batch_id: BatchId,
        index: int,
        attempt: int | None,
        *,
        looks_ahead: bool = False,
    ) -> SliceReplies:
        """The replies that attempts up to `attempt` have kept."""
        look = self._look(batch_id, index, attempt, looks_ahead=looks_ahead)
        found = self._wait(look)
        return _read(found.sources, found.whole_bytes)

    async def _look(
        self,
        batch_id: BatchId,
        index: int,
        attempt: int | None,
        *,
        looks_ahead: bool = False,
    ) -> "_Found":
        """Where the replies of a slice lie now. One that is lost for good is left out."""
        last = index
        if looks_ahead and self._ahead.is_in_order(batch_id, index):
            last += _SLICES_AHEAD
        before: list[SegmentObject] | None = None
        for _ in range(_LOOKS):
            rows, sources = await self._look_once(batch_id, index, attempt, last)
            if None not in sources or rows == before:
                break  # what is missing, and was not replaced, is lost
            before = rows
        else:
            raise StorageUnavailable(_REPLACED)
        there = [source for source in sources if source is not None]
        if len(there) < len(sources):
            _log.error("Objects with replies are missing.", batch_id=batch_id, index=index)
        return _Found(rows, there, _whole_bytes(rows))

    async def _look_once(
        self, batch_id: BatchId, index: int, attempt: int | None, last: int
    ) -> "tuple[list[SegmentObject], list[_Memory | _Remote | None]]":
        named = await self._store.list_segment_objects(batch_id, first=index, last=last)
        rows = [
            row
            for row in named
            if row.index == index and (attempt is None or row.attempt <= attempt)
        ]
        self._fetch_ahead(row for row in named if row.index > index)
        return rows, await asyncio.gather(*self._sources(rows))

    def _sources(
        self, rows: Sequence[SegmentObject]
    ) -> Iterator[Coroutine[Any, Any, "_Memory | _Remote | None"]]:
        fetch = self._fetch if _whole_bytes(rows) else self._refer
        return (fetch(row) for row in rows)

    async def _fetch(self, row: SegmentObject) -> "_Memory | None":
        getting = self._ahead.take(row.key) or asyncio.ensure_future(self._get(row))
        data = await getting
        return None if data is None else _Memory(data)

    async def _refer(self, row: SegmentObject) -> "_Remote | None":
        try:
            await self._blobs.size(row.key)
        except NotFound:
            return None
        return _Remote(self, row)

    async def _get(self, row: SegmentObject) -> bytes | None:
        try:
            return await self.get_range(row.key, 0, row.bytes)
        except NotFound:
            return None

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        async with self._gets:
            return await self._blobs.get_range(key, start, end)

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """From a thread: some bytes of an object.

        Raises:
            StorageUnavailable: It was deleted meanwhile, or the storage does not answer.
        """
        try:
            return self._wait(self.get_range(key, start, end))
        except NotFound as error:
            raise StorageUnavailable(_REPLACED) from error

    def _fetch_ahead(self, rows: Iterator[SegmentObject]) -> None:
        for row in rows:
            if not self._ahead.has_room(row):
                return
            self._ahead.add(row, asyncio.ensure_future(self._get(row)))

    # Deleting

    async def _delete(self, batch_id: BatchId) -> None:
        self._ahead.forget(batch_id)
        keys = {row.key for row in await self._store.list_segment_objects(batch_id)}
        async for key in self._blobs.iter_keys(f"{_PREFIX}/{batch_id}"):
            keys.add(key)
        if keys:
            await self._blobs.delete(sorted(keys))
        # Last, so that it is done again if this is cut off.
        await self._store.forget_segment_objects(batch_id)

    async def _batches(self) -> list[BatchId]:
        batches = set(await self._store.list_segment_batches())
        async for key in self._blobs.iter_keys(_PREFIX):
            batches.add(BatchId(key.split("/")[1]))
        return sorted(batches)


@dataclass(frozen=True, slots=True)
class _Found:
    """The replies of a slice."""

    rows: Sequence[SegmentObject]
    sources: "Sequence[_Memory | _Remote]"
    """Of the rows, but for those whose objects are lost."""
    whole_bytes: int


def _whole_bytes(rows: Sequence[SegmentObject]) -> int:
    """Up to which size objects of a slice are held in memory: 0 if together they have too
    much for that."""
    return WHOLE_BYTES if sum(row.bytes for row in rows) <= _SLICE_BYTES else 0


def _read(sources: Sequence[Source], whole_bytes: int) -> SliceReplies:
    return SliceReplies([SegmentReader(source, whole_bytes=whole_bytes) for source in sources])


def _sealed(replies: SliceReplies, requests: int) -> Iterator[Sequence[Piece]]:
    """The replies of a whole slice as one sealed segment, in line order."""
    writer = SegmentWriter(requests)

    def flush() -> bytes:
        writer.prepare()
        data = writer.encode()
        writer.keep(len(data))
        return data

    for record, payload in replies.iter_records():
        writer.append(record.line, record.kind, payload, record.tokens)
        if writer.waiting_bytes >= _PUT_BYTES:
            yield [flush()]
    yield [flush()]


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


class _Memory:
    """An object that was fetched, as the source of a segment."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size(self) -> int:
        return len(self._data)

    def read(self, offset: int, length: int) -> bytes:
        if not offset and length >= len(self._data):
            return self._data
        return self._data[offset : offset + length]

    def close(self) -> None:
        pass


class _Remote:
    """An object that is fetched range by range, as the source of a segment."""

    def __init__(self, segments: ObjectSegments, row: SegmentObject) -> None:
        self._segments = segments
        self._key = row.key
        self.size = row.bytes
        self._start = 0
        self._block = b""

    def read(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self.size)
        if end - offset >= _BLOCK_BYTES:
            return self._segments.read_range(self._key, offset, end)
        if not self._start <= offset <= end <= self._start + len(self._block):
            # Headers and small payloads lie close together.
            stop = min(offset + _BLOCK_BYTES, self.size)
            self._block = self._segments.read_range(self._key, offset, stop)
            self._start = offset
        return self._block[offset - self._start : end - self._start]

    def close(self) -> None:
        self._block = b""


class _Ahead:
    """What was fetched before it was asked for, and who reads in order."""

    def __init__(self) -> None:
        self._fetches: OrderedDict[str, tuple[SegmentObject, asyncio.Future[bytes | None]]] = (
            OrderedDict()
        )
        self._bytes = 0
        self._last_read: OrderedDict[BatchId, int] = OrderedDict()

    def is_in_order(self, batch_id: BatchId, index: int) -> bool:
        """Whether a slice of a batch is read soon after one that lies closely before it."""
        last = self._last_read.pop(batch_id, None)
        self._last_read[batch_id] = index
        if len(self._last_read) > _READERS_KNOWN:
            self._last_read.popitem(last=False)
        return last is not None and last < index <= last + _SLICES_AHEAD

    def has_room(self, row: SegmentObject) -> bool:
        """Whether an object may be fetched; the oldest make room for it."""
        if row.key in self._fetches or row.bytes > _AHEAD_BYTES // (2 * _SLICES_AHEAD):
            return False
        while self._bytes + row.bytes > _AHEAD_BYTES:
            self._drop(next(iter(self._fetches)))
        return True

    def add(self, row: SegmentObject, fetching: "asyncio.Future[bytes | None]") -> None:
        fetching.add_done_callback(_hear)
        self._fetches[row.key] = (row, fetching)
        self._bytes += row.bytes

    def take(self, key: str) -> "asyncio.Future[bytes | None] | None":
        """The fetch of an object, if it was begun and has not failed."""
        if key not in self._fetches:
            return None
        row, fetching = self._fetches.pop(key)
        self._bytes -= row.bytes
        if fetching.done() and (fetching.cancelled() or fetching.exception()):
            return None
        return fetching

    def forget(self, batch_id: BatchId) -> None:
        self._last_read.pop(batch_id, None)
        for key, (row, _) in list(self._fetches.items()):
            if row.batch_id == batch_id:
                self._drop(key)

    def _drop(self, key: str) -> None:
        row, fetching = self._fetches.pop(key)
        self._bytes -= row.bytes
        fetching.cancel()


def _hear(fetching: "asyncio.Future[bytes | None]") -> None:
    """Take note of an error that nobody may ask for."""
    if not fetching.cancelled():
        fetching.exception()
