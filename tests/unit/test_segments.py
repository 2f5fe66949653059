"""Segments: what was durable is read back, whatever happened to the disk or the process."""

import errno
import shutil
import struct
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from penstock.blobs.local_segments import FileSource, LocalSegments, LocalWriter
from penstock.blobs.segments import Kind, SegmentReader, Tally
from penstock.model import BatchId, Usage
from tests.disks import SmallDisk, small_disk

BATCH = BatchId("batch-1")
LINES = 12
"""How many lines a slice has here."""
NO_TOKENS = (0, 0, 0, 0, 0)
MB = 1 << 20


@pytest.fixture
def segments(tmp_path: Path) -> LocalSegments:
    return LocalSegments(tmp_path / "segments")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path, bytes=256 << 10) as disk:
        yield disk


def keep(writer: LocalWriter, *lines: int, kind: Kind = Kind.OUTPUT, text: str = "") -> None:
    """Append a reply to each of these lines and make it durable."""
    for line in lines:
        writer.append(line, kind, payload(line, text), NO_TOKENS)
    writer.prepare()
    writer.flush()


def payload(line: int, text: str = "") -> bytes:
    return f'{{"line":{line},"text":"{text}"}}\n'.encode()


def read(segments: LocalSegments, *, attempt: int | None = None) -> dict[int, bytes]:
    """All replies that slice 0 has, in the order in which they are told."""
    with segments.read(BATCH, 0, attempt=attempt) as replies:
        return {record.line: text for record, text in replies.iter_records()}


def file_of(folder: Path) -> Path:
    """The one segment that is there."""
    [path] = [path for path in folder.rglob("*") if path.is_file()]
    return path


# Write and read back


def test_what_was_flushed_is_read_back_in_line_order(segments: LocalSegments) -> None:
    writer = segments.open(BATCH, 0, 1, requests=LINES)

    keep(writer, 3, 1, 2)

    assert list(read(segments).items()) == [(line, payload(line)) for line in (1, 2, 3)]
    writer.close()


def test_what_was_not_flushed_is_not_there(segments: LocalSegments) -> None:
    writer = segments.open(BATCH, 0, 1, requests=LINES)
    keep(writer, 1)

    writer.append(2, Kind.OUTPUT, payload(2), NO_TOKENS)
    writer.prepare()
    writer.append(3, Kind.OUTPUT, payload(3), NO_TOKENS)
    assert set(read(segments)) == {1}
    writer.flush()

    assert set(read(segments)) == {1, 2}
    assert writer.is_dirty
    writer.close()


def test_what_is_durable_is_not_written_again(segments: LocalSegments, tmp_path: Path) -> None:
    writer = segments.open(BATCH, 0, 1, requests=LINES)
    keep(writer, 1)
    size = file_of(tmp_path).stat().st_size

    writer.prepare()
    writer.flush()

    assert not writer.is_dirty
    assert file_of(tmp_path).stat().st_size == size
    writer.close()


def test_a_slice_without_segments_has_no_replies(segments: LocalSegments) -> None:
    assert read(segments) == {}
    assert read(segments, attempt=1) == {}


def test_slices_of_a_batch_do_not_mix(segments: LocalSegments) -> None:
    writers = [segments.open(BATCH, index, 1, requests=LINES) for index in (0, 1, 10)]
    for line, writer in enumerate(writers, 1):
        keep(writer, line)
        writer.close()

    lines = [segments.read(BATCH, index).lines for index in (0, 1, 10)]

    assert lines == [{1}, {2}, {3}]


def test_pieces_are_the_replies_of_the_asked_kinds_in_line_order(
    segments: LocalSegments,
) -> None:
    writer = segments.open(BATCH, 0, 1, requests=LINES)
    keep(writer, 4, 1)
    keep(writer, 5, 3, kind=Kind.ERROR)
    writer.close()

    with segments.read(BATCH, 0) as replies:
        output = b"".join(replies.iter_pieces(Kind.OUTPUT))
        errors = b"".join(replies.iter_pieces(Kind.ERROR, others={2: b"two\n", 9: b"nine\n"}))
        both = b"".join(replies.iter_pieces(Kind.OUTPUT, Kind.ERROR))

    assert output == payload(1) + payload(4)
    assert errors == b"two\n" + payload(3) + payload(5) + b"nine\n"
    assert both == payload(1) + payload(3) + payload(4) + payload(5)


def test_the_tally_counts_lines_by_kind_and_sums_their_tokens(segments: LocalSegments) -> None:
    writer = segments.open(BATCH, 0, 1, requests=LINES)
    writer.append(1, Kind.OUTPUT, payload(1), (1, 2, 3, 4, 5))
    writer.append(2, Kind.ERROR, payload(2), NO_TOKENS)
    writer.append(3, Kind.OUTPUT, payload(3), (10, 20, 30, 40, 50))
    assert (writer.durable.completed, writer.durable.failed) == (0, 0)
    writer.prepare()
    writer.append(4, Kind.OUTPUT, payload(4), (7, 7, 7, 7, 7))
    writer.flush()
    writer.close()

    with segments.read(BATCH, 0) as replies:
        told = replies.tally()

    assert told == writer.durable
    assert (told.completed, told.failed) == (2, 1)
    assert told.total_usage() == Usage(
        input_tokens=11,
        cached_tokens=22,
        output_tokens=33,
        reasoning_tokens=44,
        total_tokens=55,
    )


def test_a_tally_that_was_read_does_not_change_when_more_is_kept(
    segments: LocalSegments,
) -> None:
    writer = segments.open(BATCH, 0, 1, requests=LINES)
    keep(writer, 1)
    before = writer.durable

    keep(writer, 2)

    assert (before.completed, writer.durable.completed) == (1, 2)
    writer.close()


def test_a_count_of_tokens_that_no_field_holds_is_cut(segments: LocalSegments) -> None:
    writer = segments.open(BATCH, 0, 1, requests=LINES)
    writer.append(1, Kind.OUTPUT, payload(1), (2**40, 0, 0, 0, 2**40))
    writer.prepare()
    writer.flush()
    writer.close()

    with segments.read(BATCH, 0) as replies:
        assert replies.tally().total_usage().total_tokens == 2**32 - 1


def test_deleting_a_batch_takes_its_segments_and_no_others(segments: LocalSegments) -> None:
    for batch_id in (BATCH, BatchId("batch-2")):
        writer = segments.open(batch_id, 0, 1, requests=LINES)
        keep(writer, 1)
        writer.close()

    segments.delete(BATCH)
    segments.delete(BATCH)

    assert segments.batches() == ["batch-2"]
    assert read(segments) == {}


# Seals


def results(segments: LocalSegments, kind: Kind) -> bytes:
    """A result file of slice 0 as the finalizer writes it."""
    with segments.read(BATCH, 0) as replies:
        return b"".join(bytes(each) for some in replies.iter_results(kind) for each in some)


def is_sealed(folder: Path) -> bool:
    reader = SegmentReader(FileSource(file_of(folder)))
    reader.close()
    return reader.seal is not None


def keep_whole_slice(segments: LocalSegments, text: str = "") -> Tally:
    """Replies of all lines, out of order, in three flushes, errors among them."""
    writer = segments.open(BATCH, 0, 1, requests=LINES)
    keep(writer, 7, 3, 1, text=text)
    keep(writer, 2, 8, kind=Kind.ERROR, text=text)
    keep(writer, 12, 11, 10, 9, 6, 5, 4, text=text)
    writer.close()
    return writer.durable


@pytest.mark.parametrize("text", ["", "x" * MB])
def test_a_slice_with_all_its_replies_is_sealed_and_reads_the_same(
    segments: LocalSegments, tmp_path: Path, text: str
) -> None:
    told = keep_whole_slice(segments, text)

    assert is_sealed(tmp_path)
    good = [line for line in range(1, LINES + 1) if line not in (2, 8)]
    assert results(segments, Kind.OUTPUT) == b"".join(payload(line, text) for line in good)
    assert results(segments, Kind.ERROR) == payload(2, text) + payload(8, text)
    assert list(read(segments)) == list(range(1, LINES + 1))
    with segments.read(BATCH, 0, attempt=1) as replies:
        assert replies.tally() == told
        assert (told.completed, told.failed) == (10, 2)


def test_a_slice_that_lacks_a_reply_is_not_sealed(
    segments: LocalSegments, tmp_path: Path
) -> None:
    writer = segments.open(BATCH, 0, 1, requests=LINES)
    keep(writer, *range(1, LINES))
    assert not is_sealed(tmp_path)

    keep(writer, LINES)
    assert is_sealed(tmp_path)
    writer.close()


def test_a_seal_that_is_torn_or_damaged_only_costs_time(
    segments: LocalSegments, tmp_path: Path
) -> None:
    keep_whole_slice(segments)
    file = file_of(tmp_path)
    whole, output = file.read_bytes(), results(segments, Kind.OUTPUT)
    [offset] = struct.unpack("<Q", whole[-8:])

    for size in range(offset, len(whole)):
        file.write_bytes(whole[:size])
        assert not is_sealed(tmp_path)
        assert results(segments, Kind.OUTPUT) == output, size
    for place in range(offset, len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        file.write_bytes(damaged)
        assert not is_sealed(tmp_path)
        assert results(segments, Kind.OUTPUT) == output, place


def test_a_seal_does_not_hide_damage_before_it(segments: LocalSegments, tmp_path: Path) -> None:
    keep_whole_slice(segments)
    file = file_of(tmp_path)
    whole = file.read_bytes()
    [offset] = struct.unpack("<Q", whole[-8:])

    for place in range(offset):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        file.write_bytes(damaged)
        with segments.read(BATCH, 0) as replies:
            tally = replies.tally()
        assert tally.completed + tally.failed < LINES, place


def test_an_attempt_that_takes_over_all_replies_is_sealed(
    segments: LocalSegments, tmp_path: Path
) -> None:
    keep_whole_slice(segments)
    before = results(segments, Kind.OUTPUT), results(segments, Kind.ERROR)

    segments.open(BATCH, 0, 2, requests=LINES).close()

    assert file_of(tmp_path).name.endswith(".000002")
    assert is_sealed(tmp_path)
    assert (results(segments, Kind.OUTPUT), results(segments, Kind.ERROR)) == before


# Damage


def test_a_write_torn_at_any_byte_costs_only_itself(
    segments: LocalSegments, tmp_path: Path
) -> None:
    writer = segments.open(BATCH, 0, 1, requests=LINES)
    ends = []
    path = tmp_path / "segments"
    for line in (1, 2, 3):
        keep(writer, line)
        ends.append(file_of(path).stat().st_size)
    writer.close()
    file = file_of(path)
    whole = file.read_bytes()

    for size in range(len(whole) + 1):
        file.write_bytes(whole[:size])
        expected = [line for line, end in zip((1, 2, 3), ends, strict=True) if end <= size]
        assert list(read(segments)) == expected, size


def test_a_tail_of_zeros_is_no_reply(segments: LocalSegments, tmp_path: Path) -> None:
    writer = segments.open(BATCH, 0, 1, requests=LINES)
    keep(writer, 1, 2)
    writer.close()
    file = file_of(tmp_path / "segments")
    whole = file.read_bytes()

    for zeros in (1, 31, 32, 33, 36, 4096):
        file.write_bytes(whole + bytes(zeros))
        assert set(read(segments)) == {1, 2}


def test_a_write_of_which_only_the_length_reached_the_disk_is_no_reply(
    segments: LocalSegments, tmp_path: Path
) -> None:
    writer = segments.open(BATCH, 0, 1, requests=LINES)
    keep(writer, 1)
    file = file_of(tmp_path / "segments")
    before = file.stat().st_size
    keep(writer, 2)
    writer.close()
    whole = file.read_bytes()

    for lost_from in range(before, len(whole)):
        file.write_bytes(whole[:lost_from] + bytes(len(whole) - lost_from))
        assert set(read(segments)) == {1}


def test_a_flipped_bit_anywhere_is_found(segments: LocalSegments, tmp_path: Path) -> None:
    writer = segments.open(BATCH, 0, 1, requests=LINES)
    keep(writer, 1)
    file = file_of(tmp_path / "segments")
    first = file.stat().st_size
    keep(writer, 2, 3)
    writer.close()
    whole = file.read_bytes()

    for place in range(first, len(whole)):
        for bit in (0x01, 0x10, 0x80):
            damaged = bytearray(whole)
            damaged[place] ^= bit
            file.write_bytes(damaged)
            replies = read(segments)
            assert replies[1] == payload(1)
            assert replies.get(2, payload(2)) == payload(2)
            assert 3 not in replies


def test_damage_to_a_large_segment_is_found_too(
    segments: LocalSegments, tmp_path: Path
) -> None:
    writer = segments.open(BATCH, 0, 1, requests=LINES)
    text = "x" * (3 * MB)
    keep(writer, 1, 2, 3, text=text)
    writer.close()
    file = file_of(tmp_path / "segments")
    assert list(read(segments)) == [1, 2, 3]

    with file.open("r+b") as damaged:
        damaged.seek(7 * MB)
        damaged.write(b"y")
    assert list(read(segments)) == [1, 2]

    with file.open("r+b") as damaged:
        damaged.truncate(5 * MB)
    assert read(segments) == {1: payload(1, text)}


def test_what_follows_a_torn_tail_is_taken_over_by_the_next_attempt(
    segments: LocalSegments, tmp_path: Path
) -> None:
    writer = segments.open(BATCH, 0, 1, requests=LINES)
    keep(writer, 1)
    keep(writer, 2)
    writer.close()
    file = file_of(tmp_path / "segments")
    file.write_bytes(file.read_bytes()[:-1])
    assert list(read(segments)) == [1]

    second = segments.open(BATCH, 0, 2, requests=LINES)
    keep(second, 2, 3)
    second.close()

    assert list(read(segments)) == [1, 2, 3]


# Attempts


def test_the_next_attempt_starts_with_what_the_last_one_kept(
    segments: LocalSegments, tmp_path: Path
) -> None:
    first = segments.open(BATCH, 0, 1, requests=LINES)
    keep(first, 1, 3)
    keep(first, 2, kind=Kind.ERROR)
    first.append(4, Kind.OUTPUT, payload(4), NO_TOKENS)
    first.close()

    second = segments.open(BATCH, 0, 2, requests=LINES)

    assert second.lines == {1, 2, 3}
    assert (second.durable.completed, second.durable.failed) == (2, 1)
    assert not second.is_dirty
    assert read(segments, attempt=2) == {line: payload(line) for line in (1, 2, 3)}
    assert file_of(tmp_path).name.endswith(".000002")
    second.close()


def test_a_writer_of_an_older_attempt_writes_into_the_void(segments: LocalSegments) -> None:
    late = segments.open(BATCH, 0, 1, requests=LINES)
    keep(late, 1)
    newest = segments.open(BATCH, 0, 2, requests=LINES)

    keep(late, 2, text="late")
    keep(newest, 2, text="new")

    assert read(segments) == {1: payload(1), 2: payload(2, "new")}
    late.close()
    newest.close()


def test_an_older_attempt_that_writes_for_the_first_time_does_not_reach_the_newest(
    segments: LocalSegments,
) -> None:
    late = segments.open(BATCH, 0, 1, requests=LINES)
    newest = segments.open(BATCH, 0, 2, requests=LINES)
    keep(newest, 2, text="new")

    keep(late, 1, 2, text="late")

    assert read(segments, attempt=2) == {2: payload(2, "new")}
    assert read(segments)[2] == payload(2, "new")
    late.close()
    newest.close()


def test_an_older_attempt_that_opens_late_takes_nothing_from_the_newest(
    segments: LocalSegments,
) -> None:
    newest = segments.open(BATCH, 0, 3, requests=LINES)
    keep(newest, 1)

    late = segments.open(BATCH, 0, 2, requests=LINES)
    keep(late, 2, text="late")
    keep(newest, 2)

    assert read(segments, attempt=3) == {1: payload(1), 2: payload(2)}
    late.close()
    newest.close()


def test_a_process_that_died_while_it_took_over_has_lost_nothing(
    segments: LocalSegments, tmp_path: Path
) -> None:
    first = segments.open(BATCH, 0, 1, requests=LINES)
    keep(first, 1, 2, 3)
    first.close()
    old = file_of(tmp_path)
    kept = old.read_bytes()
    segments.open(BATCH, 0, 2, requests=LINES).close()
    new = file_of(tmp_path)

    old.write_bytes(kept)
    new.write_bytes(new.read_bytes()[:50])
    third = segments.open(BATCH, 0, 3, requests=LINES)

    assert third.lines == {1, 2, 3}
    assert read(segments, attempt=3) == {line: payload(line) for line in (1, 2, 3)}
    third.close()


def test_a_reader_is_not_disturbed_by_the_next_attempt(segments: LocalSegments) -> None:
    first = segments.open(BATCH, 0, 1, requests=LINES)
    keep(first, 1, 2)
    first.close()

    with segments.read(BATCH, 0) as replies:
        segments.open(BATCH, 0, 2, requests=LINES).close()
        pieces = b"".join(replies.iter_pieces(Kind.OUTPUT))

    assert pieces == payload(1) + payload(2)


# Full disks


def test_a_flush_that_failed_may_be_repeated_and_loses_and_doubles_nothing(
    disk: SmallDisk,
) -> None:
    segments = LocalSegments(disk.path / "segments")
    writer = segments.open(BATCH, 0, 1, requests=LINES)
    keep(writer, 1)
    disk.fill(leave=16_384)
    for line in (2, 3, 4):
        writer.append(line, Kind.OUTPUT, payload(line, "x" * 10_000), NO_TOKENS)
    writer.prepare()

    for _ in range(3):
        with pytest.raises(OSError, match="No space"):
            writer.flush()
        assert read(segments) == {1: payload(1)}
        assert writer.durable.completed == 1
    writer.append(5, Kind.OUTPUT, payload(5), NO_TOKENS)
    disk.make_room()
    writer.flush()
    assert list(read(segments)) == [1, 2, 3, 4]
    writer.prepare()
    writer.flush()

    texts = dict.fromkeys((2, 3, 4), "x" * 10000)
    assert read(segments) == {line: payload(line, texts.get(line, "")) for line in range(1, 6)}
    assert writer.durable.completed == 5
    assert not writer.is_dirty
    writer.close()


def test_a_takeover_that_failed_may_be_repeated_and_loses_nothing(disk: SmallDisk) -> None:
    segments = LocalSegments(disk.path / "segments")
    first = segments.open(BATCH, 0, 1, requests=LINES)
    keep(first, 1, 2, text="x" * 20_000)
    first.close()
    disk.fill(leave=16_384)

    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            segments.open(BATCH, 0, 2, requests=LINES)
        assert set(read(segments)) == {1, 2}
    disk.make_room()
    second = segments.open(BATCH, 0, 2, requests=LINES)

    assert second.lines == {1, 2}
    assert set(read(segments, attempt=2)) == {1, 2}
    second.close()


# Memory


def test_segments_larger_than_memory_should_be_are_read_and_taken_over_in_pieces(
    segments: LocalSegments,
) -> None:
    reply_bytes, replies = 2 * MB, 20
    writer = segments.open(BATCH, 0, 1, requests=replies)
    for line in range(1, replies + 1):
        keep(writer, line, text="x" * reply_bytes)
    writer.close()

    tracemalloc.start()
    try:
        second = segments.open(BATCH, 0, 2, requests=replies)
        taken_over = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        with segments.read(BATCH, 0) as read_back:
            size = sum(len(piece) for piece in read_back.iter_pieces(Kind.OUTPUT))
        read_whole = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    second.close()

    assert size > replies * reply_bytes
    assert taken_over < 10 * reply_bytes
    assert read_whole < 4 * reply_bytes


# Any course of events


class Segments(RuleBasedStateMachine):
    """One slice, a writer that may die at any moment, and writers that do not know they have
    been replaced. What was durable when its writer was the newest stays, in its own words."""

    lines = st.integers(1, LINES)

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.segments = LocalSegments(self.folder)
        self.attempt = 0
        self.count = 0
        self.late: list[LocalWriter] = []
        self.late_replies: set[bytes] = set()
        self.durable: dict[int, bytes] = {}
        self.prepared: dict[int, bytes] = {}
        self.waiting: dict[int, bytes] = {}

    @initialize()
    def start(self) -> None:
        self._open_next()

    def _open_next(self) -> None:
        self.attempt += 1
        self.writer = self.segments.open(BATCH, 0, self.attempt, requests=LINES)
        self.prepared, self.waiting = {}, {}
        found = read(self.segments, attempt=self.attempt)
        assert {line: found.get(line) for line in self.durable} == self.durable
        added = {line: text for line, text in found.items() if line not in self.durable}
        assert set(added.values()) <= self.late_replies
        self.durable = found
        assert self.writer.lines == set(found)

    def _text(self, line: int) -> bytes:
        self.count += 1
        return payload(line, f"reply {self.count} of attempt {self.attempt}")

    @rule(line=lines, kind=st.sampled_from(Kind))
    def append(self, line: int, kind: Kind) -> None:
        if line not in self.writer.lines:
            self.waiting[line] = self._text(line)
            self.writer.append(line, kind, self.waiting[line], NO_TOKENS)

    @rule()
    def prepare(self) -> None:
        self.writer.prepare()
        self.prepared |= self.waiting
        self.waiting = {}

    @rule()
    def flush(self) -> None:
        self.writer.flush()
        self.durable |= self.prepared
        self.prepared = {}

    @rule(torn=st.binary(max_size=60))
    def crash(self, torn: bytes) -> None:
        self.writer.close()
        path = self.folder / BATCH / f"{0:08d}.{self.attempt:06d}"
        if path.exists():
            with path.open("ab") as file:
                file.write(torn)
        self._open_next()

    @rule()
    def lose_the_slice(self) -> None:
        self.late.append(self.writer)
        self.late_replies |= {*self.prepared.values(), *self.waiting.values()}
        self._open_next()

    @precondition(lambda self: self.late)
    @rule(data=st.data(), line=lines)
    def write_late(self, data: st.DataObject, line: int) -> None:
        writer = data.draw(st.sampled_from(self.late))
        text = self._text(line)
        if line not in writer.lines:
            writer.append(line, Kind.OUTPUT, text, NO_TOKENS)
            self.late_replies.add(text)
        writer.prepare()
        writer.flush()

    @invariant()
    def what_is_durable_is_read_back(self) -> None:
        if not self.attempt:
            return
        mine = read(self.segments, attempt=self.attempt)
        assert mine == self.durable
        assert list(mine) == sorted(mine)
        everything = read(self.segments)
        assert {line: everything[line] for line in mine} == mine
        assert self.writer.durable.completed + self.writer.durable.failed == len(mine)

    def teardown(self) -> None:
        for writer in [*self.late, self.writer]:
            writer.close()
        shutil.rmtree(self.folder)


TestAnyCourseOfEvents = Segments.TestCase
TestAnyCourseOfEvents.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None
)


def test_names_that_could_not_be_synced_are_synced_by_the_next_flush(
    segments: LocalSegments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    failing = [True, True]

    def sync(folder: Path) -> None:
        if failing:
            failing.pop()
            raise OSError(errno.EIO, "Input/output error")
        synced.append(folder)

    monkeypatch.setattr("penstock.blobs.local_segments._sync_folder", sync)
    writer = segments.open(BATCH, 0, 1, requests=LINES)
    writer.append(1, Kind.OUTPUT, payload(1), NO_TOKENS)
    writer.prepare()
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output"):
            writer.flush()
        assert writer.durable.completed == 0
    writer.flush()
    writer.append(2, Kind.OUTPUT, payload(2), NO_TOKENS)
    writer.prepare()
    writer.flush()
    writer.close()

    assert writer.durable.completed == 2
    assert [folder.name for folder in synced] == [BATCH, synced[0].parent.name]
