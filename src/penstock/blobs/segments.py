"""Segments: what one attempt at a slice has written, appended as the replies come.

A segment is a run of blocks; each begins with a header of 20 bytes:

    crc u32 · magic u16 · type u8 · spare u8 · count u32 · length u64

`length` bytes follow it, and the checksum (CRC-32C, for which processors have an instruction)
covers all that follows it, up to their end. Numbers are little-endian. There are two types.

- A *group* holds `count` replies that were made durable together, up to about 1 MiB of them:
  first, for each, `line u32 · kind and length u32 · five token counts u32`, then their
  payloads in the same order. A payload is the reply as it will stand in the output or error
  file; the kind is the highest bit of the number beside it.
- A *seal* is the last block of a segment in which each line of its slice has a reply. It tells
  where the payloads of each kind lie, in line order, so that result files can be put together
  without looking at single replies. A segment without one is as good, only slower to read.

Reading ends at the first block that is not whole, so a write that was torn anywhere, or a tail
of zeros after a loss of power, costs only what had not been reported as durable.

Every attempt writes a segment of its own. So a late writer, whose slice was claimed anew,
writes where nobody looks any more.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple, Protocol

from crc32c import crc32c

from penstock.blobs.base import Piece
from penstock.model import BatchId, Usage

_HEADER = struct.Struct("<IHBxIQ")
_CHECKED = struct.Struct("<HBxIQ")
"""What of the header follows the checksum."""
_CRC_BYTES = 4
_MAGIC = 0x5054
_GROUP, _SEAL = 0, 1
_ENTRY = struct.Struct("<7I")
_ENTRY_NUMBERS = 7
_ERROR_BIT = 1 << 31
_SEAL_HEAD = struct.Struct("<II5QII")
"""Completed and failed lines, tokens, and how many extents of each kind follow."""
_EXTENT = struct.Struct("<QQ")
_SEAL_TAIL = struct.Struct("<Q")
"""Where the seal begins; the last bytes of a sealed segment."""
_MAX_TOKENS = 0xFFFFFFFF
_GROUP_BYTES = 1 << 20
_READ_BYTES = 1 << 20
WHOLE_BYTES = 4 << 20
"""A segment up to this size is held in memory while it is read back."""


class Kind(IntEnum):
    """Into which file a reply goes."""

    OUTPUT = 0
    ERROR = 1


@dataclass(slots=True)
class Tally:
    """What is in a segment, by count."""

    completed: int = 0
    failed: int = 0
    usage: list[int] = field(default_factory=lambda: [0, 0, 0, 0, 0])

    def add(self, replies: Sequence["_Reply"], numbers: Sequence[int]) -> None:
        """Count the replies of a group.

        Args:
            numbers: Its entries, one after another.
        """
        failed = sum([kind for _, kind, _, _ in replies])
        self.completed += len(replies) - failed
        self.failed += failed
        step = _ENTRY_NUMBERS
        self.usage = [
            before + sum(numbers[place::step])
            for place, before in enumerate(self.usage, step - len(self.usage))
        ]

    def copy(self) -> "Tally":
        return Tally(self.completed, self.failed, self.usage.copy())

    def total_usage(self) -> Usage:
        return Usage(
            input_tokens=self.usage[0],
            cached_tokens=self.usage[1],
            output_tokens=self.usage[2],
            reasoning_tokens=self.usage[3],
            total_tokens=self.usage[4],
        )


class Record(NamedTuple):
    """Where a reply lies. A tuple, because one is made for every line."""

    line: int
    kind: Kind
    offset: int
    """Of the payload in its segment."""
    length: int
    tokens: Sequence[int]


_Reply = tuple[int, Kind, bytes, Sequence[int]]
"""A reply that is to be written: line, kind, payload, tokens. A plain tuple, as one is made for
every line; sorts by line."""
_Place = tuple[int, Kind, int, int]
"""Where its payload lies: line, kind, offset in the segment, length. Sorts by line."""


# Writing


class SegmentWriter:
    """Collects the replies of one attempt and says how they are written.

    `append` and `prepare` are for the event loop; a flush may run in a thread beside further
    appends: it writes what `encode` gives at the end of the segment, and calls `keep` when
    that is durable. After a failure it may be repeated: nothing is lost, nothing is doubled.

    Args:
        requests: How many lines the slice has; when each has its reply, the segment is sealed.
    """

    def __init__(self, requests: int = 0) -> None:
        self._requests = requests
        self._waiting: list[_Reply] = []
        self._prepared: list[_Reply] = []
        self._places: list[_Place] = []
        self._fresh: list[_Place] = []
        """Those of what `encode` gave last."""
        self.encoded = Tally()
        """Of all that is durable and of what `encode` gave last."""
        self.size = 0
        """How many bytes are durable."""
        self.waiting_bytes = 0
        """How many bytes are appended and not yet prepared."""
        self.durable = Tally()
        """Of all that is durable; never changed in place."""
        self.lines: set[int] = set()
        """The lines that have a reply here."""
        self.is_lost = False
        """Whether the slice was claimed anew, so that what is appended goes nowhere."""

    @property
    def is_dirty(self) -> bool:
        """Whether something is appended that is not durable."""
        return bool(self._waiting or self._prepared)

    def append(self, line: int, kind: Kind, payload: bytes, tokens: Sequence[int]) -> None:
        """Add the reply of a line, once.

        Args:
            tokens: input, cached, output, reasoning and total tokens; cut at 2^32 - 1.
        """
        self._waiting.append((line, kind, payload, tokens))
        self.waiting_bytes += len(payload)
        self.lines.add(line)

    def prepare(self) -> None:
        """Set what was appended so far apart for the next flush. Never during one."""
        self._prepared += self._waiting
        self._waiting = []
        self.waiting_bytes = 0

    def encode(self) -> bytes:
        """What was prepared, as it is to be written from offset `size` on; empty if nothing
        was. With the last reply of the slice comes the seal."""
        if not self._prepared:
            return b""
        parts: list[bytes] = []
        offset = self.size
        self._fresh = []
        self.encoded = self.durable.copy()
        for group in _groups(sorted(self._prepared)):
            head, payloads = _pack_group(group, offset, self._fresh, self.encoded)
            parts += (head, payloads)
            offset += len(head) + len(payloads)
        if len(self._places) + len(self._fresh) == self._requests:
            parts.append(_pack_seal([*self._places, *self._fresh], self.encoded, offset))
        return b"".join(parts)

    def keep(self, size: int) -> None:
        """Say that the `size` bytes that `encode` gave last are durable."""
        self._places += self._fresh
        self._fresh = []
        self._prepared.clear()
        self.size += size
        self.durable = self.encoded

    def give_up(self) -> None:
        """Say that the slice was claimed anew: what was appended goes nowhere."""
        self.is_lost = True
        self._waiting, self._prepared = [], []

    def close(self) -> None:
        """Let go of what it holds open. What was not flushed is dropped."""


def _groups(replies: list[_Reply]) -> Iterator[list[_Reply]]:
    """Cut replies into groups; one that is larger than a group is one of its own."""
    group: list[_Reply] = []
    size = 0
    for reply in replies:
        length = len(reply[2])
        if group and size + length > _GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(reply)
        size += length
    yield group


def _pack_group(
    group: list[_Reply], offset: int, places: list[_Place], tally: Tally
) -> tuple[bytes, bytes]:
    """A group's header with its entries, and its payloads.

    Args:
        offset: Where it begins.
        places: Gets where each payload lies.
        tally: Gets what is in it.
    """
    numbers: list[int] = []
    payloads: list[bytes] = []
    place = offset + _HEADER.size + len(group) * _ENTRY.size
    for line, kind, payload, tokens in group:
        length = len(payload)
        numbers += (line, length | _ERROR_BIT if kind else length, *tokens)
        payloads.append(payload)
        places.append((line, kind, place, length))
        place += length
    tally.add(group, numbers)
    if max(numbers) > _MAX_TOKENS:
        numbers = [min(number, _MAX_TOKENS) for number in numbers]
    entries = struct.pack(f"<{len(numbers)}I", *numbers)
    joined = b"".join(payloads)
    length = len(entries) + len(joined)
    checked = _CHECKED.pack(_MAGIC, _GROUP, len(group), length) + entries
    crc = crc32c(joined, crc32c(checked))
    return crc.to_bytes(_CRC_BYTES, "little") + checked, joined


def _pack_seal(places: list[_Place], tally: Tally, offset: int) -> bytes:
    """The seal of a segment.

    Args:
        places: Of every line of the slice.
        tally: Of all of them.
        offset: Where the seal begins.
    """
    extents: tuple[list[list[int]], list[list[int]]] = ([], [])
    ends = [-1, -1]
    for _, kind, start, length in sorted(places):
        if ends[kind] == start:
            extents[kind][-1][1] += length
        else:
            extents[kind].append([start, length])
        ends[kind] = start + length
    counts = (len(extents[Kind.OUTPUT]), len(extents[Kind.ERROR]))
    body = b"".join(
        (
            _SEAL_HEAD.pack(tally.completed, tally.failed, *tally.usage, *counts),
            *(_EXTENT.pack(*extent) for kind in Kind for extent in extents[kind]),
            _SEAL_TAIL.pack(offset),
        )
    )
    checked = _CHECKED.pack(_MAGIC, _SEAL, sum(counts), len(body)) + body
    return crc32c(checked).to_bytes(_CRC_BYTES, "little") + checked


# Reading


class Source(Protocol):
    """Where the bytes of a segment are read from. Blocking."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes:
        """The bytes at an offset; fewer where it ends."""
        ...

    def close(self) -> None: ...


class _Seal(NamedTuple):
    tally: Tally
    extents: tuple[list[tuple[int, int]], list[tuple[int, int]]]
    """Offset and length of the payloads, by kind."""
    offset: int
    """Where it begins."""


class SegmentReader:
    """Reads one segment back. Everything up to the first broken block counts.

    Args:
        whole_bytes: Up to which size it is held in memory meanwhile.
    """

    def __init__(self, source: Source, *, whole_bytes: int = WHOLE_BYTES) -> None:
        self._source = source
        self._whole = b""
        self._records: list[Record] | None = None
        try:
            self._size = source.size
            if self._size <= whole_bytes:
                self._whole = source.read(0, self._size)
                self._size = len(self._whole)
            self.seal = self._read_seal()
        except BaseException:
            source.close()
            raise

    @property
    def records(self) -> list[Record]:
        """The replies, as they came."""
        if self._records is None:
            self._records = list(self._scan())
        return self._records

    def read(self, offset: int, length: int) -> bytes:
        """Some bytes of it, such as a payload: a line of a result file, with its line end."""
        if self._whole:
            return self._whole[offset : offset + length]
        return self._source.read(offset, length)

    def iter_extents(self, kind: Kind) -> Iterator[list[Piece]]:
        """The payloads of a kind in line order, of a sealed segment; neighbours in one."""
        assert self.seal is not None  # noqa: S101
        extents = self.seal.extents[kind]
        if self._whole:
            view = memoryview(self._whole)
            yield [view[start : start + length] for start, length in extents]
            return
        for start, length in extents:
            for place in range(start, start + length, _READ_BYTES):
                yield [self._source.read(place, min(_READ_BYTES, start + length - place))]

    def close(self) -> None:
        self._source.close()

    def _read_seal(self) -> _Seal | None:
        """Its seal, if it has one and every block before it is whole."""
        if self._size < _HEADER.size + _SEAL_TAIL.size:
            return None
        tail = self.read(self._size - _SEAL_TAIL.size, _SEAL_TAIL.size)
        if len(tail) < _SEAL_TAIL.size:
            return None
        (offset,) = _SEAL_TAIL.unpack(tail)
        if not 0 <= offset <= self._size - _HEADER.size:
            return None
        block = self.read(offset, self._size - offset) if self._is_seal(offset) else b""
        if not block or _checksum(block) != _HEADER.unpack_from(block)[0]:
            return None
        place = 0
        while place < offset:
            size = self._check(place, offset)
            if not size:
                return None
            place += size
        figures = _SEAL_HEAD.unpack_from(block, _HEADER.size)
        completed, failed, *tokens, outputs, errors = figures
        start = _HEADER.size + _SEAL_HEAD.size
        extents = list(_EXTENT.iter_unpack(block[start : -_SEAL_TAIL.size]))
        if len(extents) != outputs + errors:
            return None
        tally = Tally(completed, failed, tokens)
        return _Seal(tally, (extents[:outputs], extents[outputs:]), offset)

    def _is_seal(self, offset: int) -> bool:
        _, magic, type_, _, length = _HEADER.unpack(self.read(offset, _HEADER.size))
        end = offset + _HEADER.size + length
        return magic == _MAGIC and type_ == _SEAL and end == self._size

    def _check(self, offset: int, end: int) -> int:
        """The size of the group that begins at an offset; 0 if it is broken or none.

        Args:
            end: Beyond which it must not reach.
        """
        if offset + _HEADER.size > end:
            return 0
        header = self.read(offset, _HEADER.size)
        if len(header) < _HEADER.size:
            return 0  # cut off while it is read
        crc, magic, type_, count, length = _HEADER.unpack(header)
        size = _HEADER.size + length
        is_group = magic == _MAGIC and type_ == _GROUP and length >= count * _ENTRY.size
        if not is_group or offset + size > end or self._checksum(offset, size) != crc:
            return 0
        return size

    def _checksum(self, offset: int, size: int) -> int:
        start, end = offset + _CRC_BYTES, offset + size
        if self._whole:
            return crc32c(memoryview(self._whole)[start:end])
        crc = 0
        while start < end:
            piece = self._source.read(start, min(_READ_BYTES, end - start))
            if not piece:
                return -1
            crc = crc32c(piece, crc)
            start += len(piece)
        return crc

    def _scan(self) -> Iterator[Record]:
        place = 0
        while size := self._check(place, self._size):
            yield from self._read_group(place, size)
            place += size

    def _read_group(self, place: int, size: int) -> Iterator[Record]:
        count = _HEADER.unpack(self.read(place, _HEADER.size))[3]
        entries = self.read(place + _HEADER.size, count * _ENTRY.size)
        start, end = place + _HEADER.size + len(entries), place + size
        for line, mark, *tokens in _ENTRY.iter_unpack(entries):
            kind = Kind.ERROR if mark & _ERROR_BIT else Kind.OUTPUT
            length = mark & ~_ERROR_BIT
            if start + length > end:
                return
            yield Record(line, kind, start, length, tokens)
            start += length


def _checksum(block: bytes) -> int:
    return crc32c(memoryview(block)[_CRC_BYTES:])


class SliceReplies:
    """The replies of one slice, from all its segments; of equal lines the newest attempt's.

    A context manager, because it holds files open.

    Args:
        readers: Of its segments, the oldest attempt first.
    """

    def __init__(self, readers: Sequence[SegmentReader]) -> None:
        self._readers = readers
        self._found: dict[int, tuple[SegmentReader, Record]] | None = None
        self._sealed = readers[-1] if readers and readers[-1].seal else None
        """The newest one if it is sealed: then it has every line, and no other counts."""

    @classmethod
    def of_all(cls, parts: "Sequence[SliceReplies]") -> "SliceReplies":
        """The replies of slices that share one range of the input, as if they were one slice;
        closes them all when it is closed."""
        if len(parts) == 1:
            return parts[0]
        whole = cls([reader for part in parts for reader in part._readers])
        whole._sealed = None  # each has some of the lines
        return whole

    @property
    def _places(self) -> dict[int, tuple[SegmentReader, Record]]:
        if self._found is None:
            self._found = {
                record.line: (reader, record)
                for reader in self._readers
                for record in reader.records
            }
        return self._found

    @property
    def lines(self) -> set[int]:
        """The lines that have a reply."""
        return set(self._places)

    def tally(self) -> Tally:
        if self._sealed and self._sealed.seal:
            return self._sealed.seal.tally.copy()
        records = [record for _, record in self._places.values()]
        completed = sum(record.kind is Kind.OUTPUT for record in records)
        usage = [sum(counts) for counts in zip(*(each.tokens for each in records), strict=True)]
        return Tally(completed, len(records) - completed, usage or [0, 0, 0, 0, 0])

    def iter_records(self) -> Iterator[tuple[Record, bytes]]:
        """Each record with its payload, in line order."""
        for line in sorted(self._places):
            reader, record = self._places[line]
            yield record, reader.read(record.offset, record.length)

    def iter_results(
        self, kind: Kind, *, others: Mapping[int, bytes] | None = None
    ) -> Iterator[Sequence[Piece]]:
        """The payloads of a kind in line order, as pieces to be written one after another.

        The pieces are good until the next are asked for.

        Args:
            others: More payloads, by line; of lines that have no reply here.
        """
        if self._sealed and not others:
            yield from self._sealed.iter_extents(kind)
        else:
            for piece in self.iter_pieces(kind, others=others):
                yield [piece]

    def iter_pieces(
        self, *kinds: Kind, others: Mapping[int, bytes] | None = None
    ) -> Iterator[bytes]:
        """The payloads of these kinds in line order, joined to pieces of about 1 MiB.

        Args:
            others: More payloads, by line; of lines that have no reply here.
        """
        others = others or {}
        pieces: list[bytes] = []
        size = 0
        for line in sorted([*self._places, *others]):
            if line in others:
                pieces.append(others[line])
            else:
                reader, record = self._places[line]
                if record.kind not in kinds:
                    continue
                pieces.append(reader.read(record.offset, record.length))
            size += len(pieces[-1])
            if size >= _READ_BYTES:
                yield b"".join(pieces)
                pieces, size = [], 0
        if pieces:
            yield b"".join(pieces)

    def __enter__(self) -> "SliceReplies":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        for reader in self._readers:
            reader.close()


# The contract


class Segments(Protocol):
    """Keeps segments. Blocking: call it from a thread."""

    flush_interval_s: float
    """How long replies may wait at least until they are flushed; a setting may say more."""
    flush_bytes: int
    """How many bytes of them may, of all slices together."""

    def open(
        self, batch_id: BatchId, index: int, attempt: int, *, requests: int
    ) -> SegmentWriter:
        """Start the segment of an attempt with what earlier attempts have kept, durably.

        What earlier attempts wrote does not count any more; who still writes to one writes
        into the void.

        Args:
            requests: How many lines the slice has.

        Raises:
            OSError, StorageUnavailable: The storage is full or fails; call it again for the
                same attempt.
        """
        ...

    def flush(self, writers: Sequence[SegmentWriter]) -> None:
        """Make durable what was prepared. Of a slice that was claimed anew, the writer is told
        so (`SegmentWriter.is_lost`), and nothing of it is kept.

        Raises:
            OSError, StorageUnavailable: The storage is full or fails; what is not durable
                stays remembered. Call it again.
        """
        ...

    def read(
        self, batch_id: BatchId, index: int, *, attempt: int | None = None
    ) -> SliceReplies:
        """The replies that a slice has so far; none if nothing was written.

        Args:
            attempt: Look only at what this attempt wrote, as is right for a slice that has
                ended; None takes all attempts together, the newest before the others.
        """
        ...

    def delete(self, batch_id: BatchId) -> None:
        """Delete all segments of a batch."""
        ...

    def batches(self) -> list[BatchId]:
        """The batches that have segments."""
        ...
