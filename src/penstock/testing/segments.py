"""The contract kit of `Segments`: one test for each promise of its docstrings.

The calls block, so the tests do; where segments need an event loop, it runs beside them.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Protocol

import pytest

from penstock.blobs.segments import Kind, Segments, SegmentWriter, SliceReplies
from penstock.model import BatchId, Usage

BATCH = BatchId("batch-1")
LINES = 10
"""How many lines a slice has here."""
NO_TOKENS = (0, 0, 0, 0, 0)


class Ground(Protocol):
    """Where the segments under test lie, looked at and hurt by another way than theirs, and
    who may write to them. It has two batches, `batch-1` and `batch-2`, of ten slices each."""

    segments: Segments

    def claim(self, index: int = 0, *, batch_id: BatchId = BATCH) -> int:
        """Claim a slice, whoever holds it. The attempt."""
        ...

    def stored(self) -> list[str]:
        """The names of all that holds replies."""
        ...

    def get(self, name: str) -> bytes: ...

    def set(self, name: str, data: bytes) -> None: ...

    def remove(self, name: str) -> None: ...


def payload(line: int, text: str = "") -> bytes:
    return f'{{"line":{line},"text":"{text}"}}\n'.encode()


def append(
    writer: SegmentWriter, *lines: int, kind: Kind = Kind.OUTPUT, text: str = ""
) -> None:
    """Append a reply to each of these lines and set it apart for the next flush."""
    for line in lines:
        writer.append(line, kind, payload(line, text), NO_TOKENS)
    writer.prepare()


def replies_of(replies: SliceReplies) -> dict[int, bytes]:
    """All replies, in the order in which they are told."""
    with replies:
        return {record.line: text for record, text in replies.iter_records()}


def results_of(replies: SliceReplies, kind: Kind) -> bytes:
    """A result file, as the finalizer writes it."""
    with replies:
        return b"".join(bytes(each) for some in replies.iter_results(kind) for each in some)


class SegmentsContract:
    """Inherit, and give a fixture `ground` that is new for each test."""

    @pytest.fixture
    def segments(self, ground: Ground) -> Segments:
        return ground.segments

    @contextmanager
    def held(self, ground: Ground, index: int = 0) -> Generator[SegmentWriter]:
        """A slice that is claimed anew, with its segment."""
        attempt = ground.claim(index)
        writer = ground.segments.open(BATCH, index, attempt, requests=LINES)
        yield writer
        writer.close()

    def keep(
        self,
        ground: Ground,
        writer: SegmentWriter,
        *lines: int,
        kind: Kind = Kind.OUTPUT,
        text: str = "",
    ) -> None:
        append(writer, *lines, kind=kind, text=text)
        ground.segments.flush([writer])

    # Write and read back

    def test_what_was_flushed_is_read_back_in_line_order(
        self, ground: Ground, segments: Segments
    ) -> None:
        with self.held(ground) as writer:
            self.keep(ground, writer, 7, 3)
            self.keep(ground, writer, 5, 1)

        found = replies_of(segments.read(BATCH, 0))
        assert list(found.items()) == [(line, payload(line)) for line in (1, 3, 5, 7)]

    def test_what_was_not_flushed_is_not_there(
        self, ground: Ground, segments: Segments
    ) -> None:
        with self.held(ground) as writer:
            self.keep(ground, writer, 1)
            append(writer, 2)
            writer.append(3, Kind.OUTPUT, payload(3), NO_TOKENS)

            assert set(replies_of(segments.read(BATCH, 0))) == {1}
            segments.flush([writer])

            assert set(replies_of(segments.read(BATCH, 0))) == {1, 2}
            assert writer.is_dirty

    def test_what_is_durable_is_not_written_again(
        self, ground: Ground, segments: Segments
    ) -> None:
        with self.held(ground) as writer:
            self.keep(ground, writer, 1)
            stored = {name: ground.get(name) for name in ground.stored()}

            writer.prepare()
            segments.flush([writer])
            segments.flush([])

            assert not writer.is_dirty
            assert {name: ground.get(name) for name in ground.stored()} == stored

    def test_a_slice_without_replies_has_none(self, segments: Segments) -> None:
        assert replies_of(segments.read(BATCH, 0)) == {}
        assert replies_of(segments.read(BATCH, 0, attempt=1)) == {}
        assert segments.read(BATCH, 0).tally().completed == 0

    def test_many_slices_are_flushed_together_and_do_not_mix(
        self, ground: Ground, segments: Segments
    ) -> None:
        writers: list[SegmentWriter] = []
        for index in range(10):
            writer = segments.open(BATCH, index, ground.claim(index), requests=LINES)
            append(writer, index + 1, text=f"of {index}")
            writers.append(writer)

        segments.flush(writers)

        for index, writer in enumerate(writers):
            writer.close()
            found = replies_of(segments.read(BATCH, index))
            assert found == {index + 1: payload(index + 1, f"of {index}")}

    def test_the_tally_counts_lines_by_kind_and_sums_their_tokens(
        self, ground: Ground, segments: Segments
    ) -> None:
        with self.held(ground) as writer:
            writer.append(1, Kind.OUTPUT, payload(1), (1, 2, 3, 4, 5))
            writer.append(2, Kind.ERROR, payload(2), NO_TOKENS)
            writer.prepare()
            segments.flush([writer])
            writer.append(3, Kind.OUTPUT, payload(3), (10, 20, 30, 40, 50))
            writer.prepare()
            segments.flush([writer])

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

    def test_pieces_are_the_replies_of_the_asked_kinds_in_line_order(
        self, ground: Ground, segments: Segments
    ) -> None:
        with self.held(ground) as writer:
            self.keep(ground, writer, 4, 1)
            self.keep(ground, writer, 5, 3, kind=Kind.ERROR)

        with segments.read(BATCH, 0) as replies:
            errors = b"".join(replies.iter_pieces(Kind.ERROR, others={2: b"two\n"}))
            both = b"".join(replies.iter_pieces(Kind.OUTPUT, Kind.ERROR))
        assert errors == b"two\n" + payload(3) + payload(5)
        assert both == payload(1) + payload(3) + payload(4) + payload(5)

    # Whole slices

    @pytest.mark.parametrize(
        "flushes",
        [
            pytest.param([range(1, 11)], id="one flush"),
            pytest.param([[7, 3, 1], [2, 8], [10, 9, 6, 5, 4]], id="some"),
            pytest.param([[line] for line in range(10, 0, -1)], id="one a line"),
        ],
    )
    @pytest.mark.parametrize("text", ["", "x" * 600_000], ids=["short", "long"])
    def test_a_whole_slice_reads_the_same_however_it_was_flushed(
        self, ground: Ground, segments: Segments, flushes: Sequence[Sequence[int]], text: str
    ) -> None:
        attempt = ground.claim()
        writer = segments.open(BATCH, 0, attempt, requests=LINES)
        for lines in flushes:
            for line in lines:
                kind = Kind.ERROR if line in (2, 8) else Kind.OUTPUT
                writer.append(line, kind, payload(line, text), (1, 0, 0, 0, 1))
            writer.prepare()
            segments.flush([writer])
        writer.close()

        good = [line for line in range(1, 11) if line not in (2, 8)]
        for asked in (attempt, None):
            output = results_of(segments.read(BATCH, 0, attempt=asked), Kind.OUTPUT)
            errors = results_of(segments.read(BATCH, 0, attempt=asked), Kind.ERROR)
            assert output == b"".join(payload(line, text) for line in good)
            assert errors == payload(2, text) + payload(8, text)
            with segments.read(BATCH, 0, attempt=asked) as replies:
                tally = replies.tally()
            assert tally == writer.durable
            assert (tally.completed, tally.failed) == (8, 2)
            assert tally.total_usage().total_tokens == 10

    # Attempts

    def test_the_next_attempt_starts_with_what_earlier_ones_kept(
        self, ground: Ground, segments: Segments
    ) -> None:
        with self.held(ground) as first:
            self.keep(ground, first, 1)
            self.keep(ground, first, 2, kind=Kind.ERROR)
            append(first, 9)
        with self.held(ground) as second:
            assert second.lines == {1, 2}
            assert (second.durable.completed, second.durable.failed) == (1, 1)
            assert not second.is_dirty
            self.keep(ground, second, 3)

        third = ground.claim()
        found = replies_of(segments.read(BATCH, 0, attempt=third - 1))
        assert found == {line: payload(line) for line in (1, 2, 3)}
        writer = segments.open(BATCH, 0, third, requests=LINES)
        assert writer.lines == {1, 2, 3}
        assert (writer.durable.completed, writer.durable.failed) == (2, 1)
        writer.close()

    def test_a_slice_may_become_whole_by_several_attempts(
        self, ground: Ground, segments: Segments
    ) -> None:
        for lines in ([2, 9], [1, 10, 4], [3], [5, 6, 7, 8]):
            with self.held(ground) as writer:
                self.keep(ground, writer, *lines, text=f"beside {lines[0]}")

        assert (writer.durable.completed, writer.durable.failed) == (10, 0)
        output = results_of(segments.read(BATCH, 0, attempt=4), Kind.OUTPUT)
        beside = {2: 2, 9: 2, 1: 1, 10: 1, 4: 1, 3: 3, 5: 5, 6: 5, 7: 5, 8: 5}
        expected = [payload(n, f"beside {beside[n]}") for n in range(1, 11)]
        assert output == b"".join(expected)

    def test_an_attempt_that_finds_all_replies_has_nothing_to_write(
        self, ground: Ground, segments: Segments
    ) -> None:
        with self.held(ground) as first:
            self.keep(ground, first, *range(1, 11))
        before = results_of(segments.read(BATCH, 0), Kind.OUTPUT)

        with self.held(ground) as second:
            assert len(second.lines) == LINES
            segments.flush([second])

        assert results_of(segments.read(BATCH, 0, attempt=2), Kind.OUTPUT) == before

    def test_who_lost_the_slice_writes_into_the_void(
        self, ground: Ground, segments: Segments
    ) -> None:
        with self.held(ground) as late, self.held(ground) as newest:
            self.keep(ground, late, 1, 2, text="late")
            self.keep(ground, newest, 2, text="new")
            self.keep(ground, late, 3, text="late")

            assert replies_of(segments.read(BATCH, 0, attempt=2)) == {2: payload(2, "new")}
            assert replies_of(segments.read(BATCH, 0))[2] == payload(2, "new")

    def test_who_lost_the_slice_takes_no_others_replies_with_its_last_flush(
        self, ground: Ground, segments: Segments
    ) -> None:
        with self.held(ground) as late:
            self.keep(ground, late, *range(1, 6))
            with self.held(ground) as newest:
                self.keep(ground, newest, 6, text="new")
                self.keep(ground, late, *range(6, 11), text="late")
                self.keep(ground, newest, *range(7, 11), text="new")

        found = replies_of(segments.read(BATCH, 0, attempt=2))
        assert found == {n: payload(n, "new" if n > 5 else "") for n in range(1, 11)}

    def test_one_that_lost_its_slice_does_not_hold_up_others(
        self, ground: Ground, segments: Segments
    ) -> None:
        with self.held(ground, 0) as lost, self.held(ground, 1) as good:
            ground.claim(0)
            append(lost, 1)
            append(good, 1)

            segments.flush([lost, good])

            assert not good.is_dirty
            assert not good.is_lost
            assert not lost.is_dirty

        assert set(replies_of(segments.read(BATCH, 1))) == {1}

    def test_a_reader_is_not_disturbed_by_what_comes_after(
        self, ground: Ground, segments: Segments
    ) -> None:
        with self.held(ground) as writer:
            self.keep(ground, writer, 1, 2)
            with segments.read(BATCH, 0) as replies:
                self.keep(ground, writer, *range(3, 11))
                found = b"".join(replies.iter_pieces(Kind.OUTPUT))

        assert found == payload(1) + payload(2)

    # Damage

    def test_what_is_damaged_costs_only_itself_and_is_written_again(
        self, ground: Ground, segments: Segments
    ) -> None:
        with self.held(ground) as first:
            self.keep(ground, first, 1)
            before = ground.stored()
            sizes = {name: len(ground.get(name)) for name in before}
            self.keep(ground, first, 2)
        [name] = [n for n in ground.stored() if len(ground.get(n)) != sizes.get(n)]
        whole = ground.get(name)

        for place in range(sizes.get(name, 0), len(whole), 7):
            damaged = bytearray(whole)
            damaged[place] ^= 0x10
            ground.set(name, bytes(damaged))
            assert replies_of(segments.read(BATCH, 0)) == {1: payload(1)}
        with self.held(ground) as second:
            assert second.lines == {1}
            self.keep(ground, second, *range(2, 11), text="again")

        found = replies_of(segments.read(BATCH, 0, attempt=2))
        assert found == {n: payload(n, "again" if n > 1 else "") for n in range(1, 11)}

    def test_what_is_lost_is_missed_in_the_tally_and_written_again(
        self, ground: Ground, segments: Segments
    ) -> None:
        with self.held(ground) as first:
            self.keep(ground, first, 1, 2, 3)
        for name in ground.stored():
            ground.remove(name)

        with segments.read(BATCH, 0, attempt=1) as replies:
            assert replies.tally().completed == 0
        with self.held(ground) as second:
            assert second.lines == set()
            assert second.durable.completed == 0
            self.keep(ground, second, *range(1, 11), text="again")

        found = replies_of(segments.read(BATCH, 0, attempt=2))
        assert found == {n: payload(n, "again") for n in range(1, 11)}

    # delete

    def test_deleting_a_batch_takes_its_segments_and_no_others(
        self, ground: Ground, segments: Segments
    ) -> None:
        other = BatchId("batch-2")
        for batch_id in (BATCH, other):
            for index in (0, 1):
                attempt = ground.claim(index, batch_id=batch_id)
                writer = segments.open(batch_id, index, attempt, requests=LINES)
                self.keep(ground, writer, 1)
                self.keep(ground, writer, *range(2, 10 + index))
                writer.close()
        assert sorted(segments.batches()) == [BATCH, other]

        segments.delete(BATCH)
        segments.delete(BATCH)

        assert segments.batches() == [other]
        assert replies_of(segments.read(BATCH, 0)) == {}
        assert set(replies_of(segments.read(other, 0))) == set(range(1, 10))

    def test_when_all_is_deleted_nothing_is_left(
        self, ground: Ground, segments: Segments
    ) -> None:
        with self.held(ground) as first:
            self.keep(ground, first, 1)
        with self.held(ground) as second:
            self.keep(ground, second, 2)

        segments.delete(BATCH)

        assert ground.stored() == []
        assert segments.batches() == []
