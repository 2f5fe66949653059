"""Segments: what one attempt at a slice has written, appended as the replies come.

A segment is a file `<batch>/<index>.<attempt>` of records. A record is a header of fixed size
and a payload, the reply as it will stand in the output or error file:

    crc u32 · magic u16 · kind u8 · spare u8 · line u32 · length u32 · five token counts u32

The checksum covers all that follows it, header and payload. Reading ends at the first record
that is not whole, so a write that was torn anywhere, or a tail of zeros after a loss of power,
costs only itself.

Every attempt writes a file of its own and starts it with what earlier attempts kept. So a
late writer, whose slice was claimed anew, writes where nobody looks any more.
"""

import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from penstock.model import BatchId, Usage

_HEADER = struct.Struct("<IHBxII5I")
_CHECKED = struct.Struct("<HBxII5I")
"""What of the header follows the checksum."""
_CRC_BYTES = 4
_MAGIC = 0x5053
_MAX_TOKENS = 0xFFFFFFFF
_READ_BYTES = 1 << 20
_WHOLE_BYTES = 4 << 20
"""A segment up to this size is held in memory while it is read back."""


class Kind(IntEnum):
    """Into which file a reply goes."""

    OUTPUT = 0
    ERROR = 1


_KINDS = tuple(Kind)


@dataclass(slots=True)
class Tally:
    """What is in a segment, by count."""

    completed: int = 0
    failed: int = 0
    usage: list[int] = field(default_factory=lambda: [0, 0, 0, 0, 0])

    def add(self, kind: Kind, tokens: Sequence[int]) -> None:
        if kind is Kind.OUTPUT:
            self.completed += 1
        else:
            self.failed += 1
        usage = self.usage
        usage[0] += tokens[0]
        usage[1] += tokens[1]
        usage[2] += tokens[2]
        usage[3] += tokens[3]
        usage[4] += tokens[4]

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
    """Where a reply lies. A tuple, because one is made for every line that is read back."""

    line: int
    kind: Kind
    offset: int
    """Of the payload in its segment."""
    length: int
    tokens: Sequence[int]


def pack(line: int, kind: Kind, payload: bytes, tokens: Sequence[int]) -> bytes:
    """The header of a record; the payload follows it.

    Args:
        line: The request's line in the input file, from 1.
        tokens: input, cached, output, reasoning and total tokens; cut at 2^32 - 1.
    """
    if max(tokens) > _MAX_TOKENS:
        tokens = tuple(min(value, _MAX_TOKENS) for value in tokens)
    checked = _CHECKED.pack(_MAGIC, kind, line, len(payload), *tokens)
    return zlib.crc32(payload, zlib.crc32(checked)).to_bytes(_CRC_BYTES, "little") + checked


class SegmentWriter:
    """Appends records to one segment.

    `append` and `prepare` are for the event loop; `flush` blocks and may run in a thread
    beside further appends. After a failure `flush` may be called again: nothing is lost and
    nothing is written twice.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = -1
        self._is_named = False
        """Whether its name would survive a loss of power."""
        self._is_folder_named = True
        self._offset = 0
        self._waiting: list[bytes] = []
        self._prepared: list[bytes] = []
        self._prepared_tally = Tally()
        self.waiting_bytes = 0
        """How many bytes are appended and not yet prepared."""
        self.tally = Tally()
        """Of all that was appended."""
        self.durable = Tally()
        """Of all that is on the disk; never changed in place."""
        self.lines: set[int] = set()
        """The lines that have a reply here."""

    @property
    def is_dirty(self) -> bool:
        """Whether something is appended that is not durable."""
        return bool(self._waiting or self._prepared)

    def append(self, line: int, kind: Kind, payload: bytes, tokens: Sequence[int]) -> None:
        """Add the reply of a line, once."""
        self._waiting.append(pack(line, kind, payload, tokens))
        self._waiting.append(payload)
        self.waiting_bytes += _HEADER.size + len(payload)
        self.tally.add(kind, tokens)
        self.lines.add(line)

    def prepare(self) -> None:
        """Set what was appended so far apart for the next `flush`. Never during one."""
        self._prepared += self._waiting
        self._waiting.clear()
        self.waiting_bytes = 0
        self._prepared_tally = self.tally.copy()

    def flush(self) -> None:
        """Make durable what was prepared.

        Raises:
            OSError: The disk is full or fails; all that is not durable stays remembered.
        """
        if not self._prepared:
            return
        data = b"".join(self._prepared)
        if self._file < 0:
            try:
                self._path.parent.mkdir()
                self._is_folder_named = False
            except FileExistsError:
                pass
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not self._is_named:
            _sync_folder(self._path.parent)
            self._is_named = True
        if not self._is_folder_named:
            _sync_folder(self._path.parent.parent)
            self._is_folder_named = True
        try:
            _write_all(self._file, data, self._offset)
            os.fdatasync(self._file)
        except OSError:
            # A torn tail would hide what is written after it.
            os.ftruncate(self._file, self._offset)
            raise
        self._offset += len(data)
        self._prepared.clear()
        self.durable = self._prepared_tally

    def close(self) -> None:
        """Let go of the file. What was not flushed is dropped."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class SegmentReader:
    """Reads one segment back. Everything up to the first broken record counts."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._whole = b""
        try:
            self._size = os.fstat(self._file).st_size
            if self._size <= _WHOLE_BYTES:
                self._whole = _read_all(self._file, 0, self._size)
                self._size = len(self._whole)
            self.records = list(self._scan())
        except BaseException:
            self.close()
            raise

    def read(self, record: Record) -> bytes:
        """The payload of a record: one line of the output or error file, with its line end."""
        if self._whole:
            return self._whole[record.offset : record.offset + record.length]
        return _read_all(self._file, record.offset, record.length)

    def close(self) -> None:
        os.close(self._file)

    def _scan(self) -> Iterator[Record]:
        return self._scan_memory() if self._whole else self._scan_file()

    def _scan_memory(self) -> Iterator[Record]:
        whole, size = memoryview(self._whole), self._size
        unpack, crc32, kinds = _HEADER.unpack_from, zlib.crc32, _KINDS
        offset = 0
        while offset + _HEADER.size <= size:
            crc, magic, kind, line, length, *tokens = unpack(whole, offset)
            start = offset + _HEADER.size
            end = start + length
            if magic != _MAGIC or kind > Kind.ERROR or end > size:
                return
            if crc32(whole[offset + _CRC_BYTES : end]) != crc:
                return
            yield Record(line, kinds[kind], start, length, tokens)
            offset = end

    def _scan_file(self) -> Iterator[Record]:
        offset = 0
        while offset + _HEADER.size <= self._size:
            header = _read_all(self._file, offset, _HEADER.size)
            if len(header) < _HEADER.size:
                return  # cut off while it is read
            crc, magic, kind, line, length, *tokens = _HEADER.unpack(header)
            start = offset + _HEADER.size
            if magic != _MAGIC or kind > Kind.ERROR or start + length > self._size:
                return
            if self._checksum(start, length, zlib.crc32(header[_CRC_BYTES:])) != crc:
                return
            yield Record(line, _KINDS[kind], start, length, tokens)
            offset = start + length

    def _checksum(self, offset: int, length: int, crc: int) -> int:
        end = offset + length
        while offset < end:
            piece = _read_all(self._file, offset, min(_READ_BYTES, end - offset))
            if not piece:
                return -1
            crc = zlib.crc32(piece, crc)
            offset += len(piece)
        return crc


class SliceReplies:
    """The replies of one slice, from all its segments; of equal lines the newest attempt's.

    A context manager, because it holds files open.
    """

    def __init__(self, readers: list[SegmentReader]) -> None:
        self._readers = readers
        places: dict[int, tuple[SegmentReader, Record]] = {}
        for reader in readers:
            for record in reader.records:
                places[record.line] = (reader, record)
        self._places = places

    @classmethod
    def of_all(cls, parts: "Sequence[SliceReplies]") -> "SliceReplies":
        """The replies of slices that share one range of the input, as if they were one slice;
        closes them all when it is closed."""
        whole = cls([])
        for part in parts:
            whole._readers += part._readers
            whole._places |= part._places
        return whole

    @property
    def lines(self) -> set[int]:
        """The lines that have a reply."""
        return set(self._places)

    def tally(self) -> Tally:
        records = [record for _, record in self._places.values()]
        completed = sum(record.kind is Kind.OUTPUT for record in records)
        usage = [sum(counts) for counts in zip(*(each.tokens for each in records), strict=True)]
        return Tally(completed, len(records) - completed, usage or [0, 0, 0, 0, 0])

    def iter_records(self) -> Iterator[tuple[Record, bytes]]:
        """Each record with its payload, in line order."""
        for line in sorted(self._places):
            reader, record = self._places[line]
            yield record, reader.read(record)

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
                pieces.append(reader.read(record))
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


class LocalSegments:
    """Segments in a folder of the local disk. Blocking: call it from a thread."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        _sync_folder(root)  # a process may have ended before it could
        self._root = root

    def open(self, batch_id: BatchId, index: int, attempt: int) -> SegmentWriter:
        """Start the segment of an attempt with what earlier attempts have kept, durably.

        Earlier segments are then deleted; who still writes to one writes into the void.

        Raises:
            OSError: The disk is full or fails; call it again for the same attempt.
        """
        path = self._path(batch_id, index, attempt)
        if attempt == 1:
            return SegmentWriter(path)  # nothing can be there yet
        path.unlink(missing_ok=True)
        # By name: an attempt that opens late must not take what a newer one has.
        earlier = [each for each in self._attempts(batch_id, index) if each.name < path.name]
        writer = SegmentWriter(path)
        if earlier:
            try:
                with _read(earlier) as replies:
                    for record, payload in replies.iter_records():
                        writer.append(record.line, record.kind, payload, record.tokens)
                        if writer.waiting_bytes > _WHOLE_BYTES:
                            _flush(writer)
                _flush(writer)
            except BaseException:
                writer.close()
                raise
            for path in earlier:
                path.unlink(missing_ok=True)
        return writer

    def read(
        self, batch_id: BatchId, index: int, *, attempt: int | None = None
    ) -> SliceReplies:
        """The replies that a slice has so far; none if nothing was written.

        Args:
            attempt: Look only at what this attempt wrote, as is right for a slice that has
                ended; None takes all attempts together, the newest before the others.
        """
        paths = self._attempts(batch_id, index)
        if attempt is not None:
            paths = [self._path(batch_id, index, attempt)]
        return _read(paths)

    def delete(self, batch_id: BatchId) -> None:
        """Delete all segments of a batch."""
        shutil.rmtree(self._root / batch_id, ignore_errors=True)

    def batches(self) -> list[BatchId]:
        """The batches that have segments."""
        return [BatchId(path.name) for path in self._root.iterdir() if path.is_dir()]

    def _path(self, batch_id: BatchId, index: int, attempt: int) -> Path:
        return self._root / batch_id / f"{index:08d}.{attempt:06d}"

    def _attempts(self, batch_id: BatchId, index: int) -> list[Path]:
        """The segments of a slice, oldest attempt first."""
        folder, start = self._root / batch_id, f"{index:08d}."
        try:  # `glob` would take a folder that cannot be read for an empty one
            names = [path.name for path in folder.iterdir()]
        except FileNotFoundError:
            return []
        return [folder / name for name in sorted(names) if name.startswith(start)]


def _read(paths: list[Path]) -> SliceReplies:
    readers: list[SegmentReader] = []
    for path in paths:
        try:
            readers.append(SegmentReader(path))
        except FileNotFoundError:
            continue  # a newer attempt has taken it over meanwhile and holds the same
    return SliceReplies(readers)


def _flush(writer: SegmentWriter) -> None:
    writer.prepare()
    writer.flush()


def _sync_folder(path: Path) -> None:
    """Make the names in a folder survive a loss of power, as `fdatasync` makes the bytes."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_all(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view = view[written:]
        offset += written


def _read_all(file: int, offset: int, length: int) -> bytes:
    pieces: list[bytes] = []
    while length > 0:
        piece = os.pread(file, length, offset)
        if not piece:
            break
        pieces.append(piece)
        offset += len(piece)
        length -= len(piece)
    return b"".join(pieces) if len(pieces) != 1 else pieces[0]
