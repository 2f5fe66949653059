"""Segments by their contract, as files and as objects, and what is objects' own."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import pytest

from penstock.blobs.base import Piece
from penstock.blobs.folder import FolderBlobs
from penstock.blobs.segments import Kind
from penstock.errors import StorageUnavailable
from penstock.model import BatchId, SegmentObject, SliceId
from penstock.store.sql import SqlStore
from penstock.testing.segments import (
    BATCH,
    LINES,
    NO_TOKENS,
    SegmentsContract,
    append,
    payload,
    replies_of,
    results_of,
)
from tests.segment_grounds import LocalGround, ObjectGround, running
from tests.unit.test_blobs import RawFolder

MB = 1 << 20


class TestFiles(SegmentsContract):
    @pytest.fixture
    def ground(self, tmp_path: Path) -> LocalGround:
        return LocalGround(tmp_path / "segments")


class TestObjects(SegmentsContract):
    pass


class LossyBlobs(FolderBlobs):
    """A folder that can be made to fail, and to be looked at before it gives something."""

    failing = ""
    """What the keys contain that cannot be put; empty: none."""

    async def before_get(self, key: str) -> None:
        """Called before something is read."""

    async def put(self, key: str, chunks: AsyncIterator[bytes]) -> int:
        self._fail(key)
        return await super().put(key, chunks)

    async def put_made(self, key: str, pieces: Iterator[Sequence[Piece]]) -> int:
        self._fail(key)
        return await super().put_made(key, pieces)

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        await self.before_get(key)
        return await super().get_range(key, start, end)

    def _fail(self, key: str) -> None:
        if self.failing and self.failing in key:
            raise StorageUnavailable("The storage is full.")


class LossyStore(SqlStore):
    """A store whose answers may get lost on their way back."""

    loses_answers = False

    async def add_segment_objects(self, objects: Sequence[SegmentObject]) -> set[SliceId]:
        told = await super().add_segment_objects(objects)
        if self.loses_answers:
            raise StorageUnavailable("The database went away.")
        return told

    async def replace_segment_objects(self, whole: SegmentObject) -> bool:
        told = await super().replace_segment_objects(whole)
        if self.loses_answers:
            raise StorageUnavailable("The database went away.")
        return told


class LossyGround(ObjectGround):
    """Objects in a folder, whose parts can be made to fail."""

    blobs: LossyBlobs
    store: LossyStore


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[LossyGround]:
    blobs = LossyBlobs(tmp_path / "blobs")
    store = LossyStore(f"sqlite:///{tmp_path}/penstock.db")
    with running(LossyGround, blobs, store, RawFolder(tmp_path / "blobs")) as ground:
        yield ground


def until(condition: Callable[[], bool]) -> None:
    """Wait for what is done in the background."""
    give_up_at = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def note_gets(ground: LossyGround) -> list[str]:
    """The keys that are read from now on."""
    asked: list[str] = []

    async def note(key: str) -> None:
        asked.append(key)

    ground.blobs.before_get = note
    return asked


def test_keys_tell_the_slice_and_the_attempt_and_are_never_the_same(
    ground: LossyGround,
) -> None:
    for index in (0, 3):
        writer = ground.segments.open(BATCH, index, ground.claim(index), requests=LINES)
        for line in (1, 2):
            append(writer, line)
            ground.segments.flush([writer])

    starts = [name.rpartition(".")[0] for name in ground.stored()]
    assert (
        starts
        == ["segments/batch-1/00000000.000001"] * 2 + ["segments/batch-1/00000003.000001"] * 2
    )
    assert len(set(ground.stored())) == 4
    assert sorted(ground.named()) == ground.stored()


def test_a_slice_that_one_flush_makes_whole_is_one_object_from_the_start(
    ground: LossyGround,
) -> None:
    writer = ground.segments.open(BATCH, 0, ground.claim(), requests=LINES)
    append(writer, *range(10, 0, -1))
    ground.segments.flush([writer])

    assert len(ground.stored()) == 1
    assert ground.named() == ground.stored()


def test_of_a_whole_slice_one_sealed_object_in_line_order_is_left(
    ground: LossyGround,
) -> None:
    for lines in ([3, 9], [2, 7, 1]):
        writer = ground.segments.open(BATCH, 0, ground.claim(), requests=LINES)
        append(writer, *lines)
        ground.segments.flush([writer])
    append(writer, 10, 8, 6, 5, 4)
    ground.segments.flush([writer])

    [name] = ground.named()
    ground.settle()
    assert ground.stored() == [name]
    whole = ground.get(name)
    places = [whole.index(payload(line)) for line in range(1, 11)]
    assert places == sorted(places)
    with ground.segments.read(BATCH, 0) as replies:
        [views] = replies.iter_results(Kind.OUTPUT)
        assert len(views) == 1  # found by the seal, in one run


def test_who_lost_the_slice_is_told_and_leaves_no_object(ground: LossyGround) -> None:
    lost = ground.segments.open(BATCH, 0, ground.claim(), requests=LINES)
    append(lost, 1)
    ground.claim()

    ground.segments.flush([lost])

    assert lost.is_lost
    assert not lost.is_dirty
    assert lost.durable.completed == 0
    assert ground.named() == []
    ground.settle()
    assert ground.stored() == []


def test_who_lost_the_slice_is_told_at_its_last_flush_too(ground: LossyGround) -> None:
    lost = ground.segments.open(BATCH, 0, ground.claim(), requests=LINES)
    append(lost, *range(1, 10))
    ground.segments.flush([lost])
    named = ground.named()
    ground.claim()
    append(lost, 10)

    ground.segments.flush([lost])

    assert lost.is_lost
    assert ground.named() == named
    ground.settle()
    assert ground.stored() == named


@pytest.mark.parametrize("before", [[], [1, 2]])
@pytest.mark.parametrize("lines", [[3], [3, 4, 5, 6, 7, 8, 9, 10]])
def test_a_flush_that_failed_may_be_repeated_and_loses_and_doubles_nothing(
    ground: LossyGround, before: list[int], lines: list[int]
) -> None:
    writer = ground.segments.open(BATCH, 0, ground.claim(), requests=LINES)
    append(writer, *before)
    ground.segments.flush([writer])
    append(writer, *lines)

    ground.blobs.failing = "segments"
    for _ in range(2):
        with pytest.raises(StorageUnavailable, match="full"):
            ground.segments.flush([writer])
        assert writer.durable.completed == len(before)
        assert list(replies_of(ground.segments.read(BATCH, 0))) == before
    ground.blobs.failing = ""
    ground.segments.flush([writer])

    assert list(replies_of(ground.segments.read(BATCH, 0))) == before + lines
    assert writer.durable.completed == len(before) + len(lines)
    assert not writer.is_dirty


def test_what_could_be_stored_is_kept_although_something_else_could_not(
    ground: LossyGround,
) -> None:
    writers = [
        ground.segments.open(BATCH, index, ground.claim(index), requests=LINES)
        for index in range(3)
    ]
    for writer in writers:
        append(writer, 1)
    ground.blobs.failing = "00000001."

    with pytest.raises(StorageUnavailable):
        ground.segments.flush(writers)

    assert [writer.durable.completed for writer in writers] == [1, 0, 1]
    stored = ground.stored()
    ground.blobs.failing = ""
    ground.segments.flush(writers)
    assert [writer.durable.completed for writer in writers] == [1, 1, 1]
    assert len(set(ground.stored()) - set(stored)) == 1


@pytest.mark.parametrize("lines", [[3], [3, 4, 5, 6, 7, 8, 9, 10]], ids=["some", "whole"])
@pytest.mark.parametrize("comes_more", [False, True])
def test_a_name_whose_answer_was_lost_does_no_harm(
    ground: LossyGround, lines: list[int], comes_more: bool
) -> None:
    """The row is there, but the writer cannot know."""
    writer = ground.segments.open(BATCH, 0, ground.claim(), requests=LINES)
    append(writer, 1, 2)
    ground.segments.flush([writer])
    ground.store.loses_answers = True
    append(writer, *lines)
    for _ in range(2):
        with pytest.raises(StorageUnavailable, match="went away"):
            ground.segments.flush([writer])
        if comes_more:
            writer.prepare()

    ground.store.loses_answers = False
    ground.segments.flush([writer])

    assert not writer.is_dirty
    assert writer.durable.completed == 2 + len(lines)
    found = replies_of(ground.segments.read(BATCH, 0, attempt=1))
    assert found == {line: payload(line) for line in [1, 2, *lines]}
    ground.segments.delete(BATCH)
    ground.settle()
    assert ground.stored() == []


@pytest.mark.parametrize("lines", [[3], [3, 4, 5, 6, 7, 8, 9, 10]], ids=["some", "whole"])
def test_who_loses_the_slice_then_deletes_nothing_that_another_has_taken_over(
    ground: LossyGround, lines: list[int]
) -> None:
    lost = ground.segments.open(BATCH, 0, ground.claim(), requests=LINES)
    append(lost, 1, 2)
    ground.segments.flush([lost])
    ground.store.loses_answers = True
    append(lost, *lines)
    with pytest.raises(StorageUnavailable, match="went away"):
        ground.segments.flush([lost])
    ground.store.loses_answers = False
    taker = ground.segments.open(BATCH, 0, ground.claim(), requests=LINES)

    ground.segments.flush([lost])
    ground.settle()

    assert lost.is_lost
    assert taker.lines == {1, 2, *lines}
    found = replies_of(ground.segments.read(BATCH, 0))
    assert found == {line: payload(line) for line in [1, 2, *lines]}


def test_a_slice_whose_earlier_replies_are_gone_is_not_taken_for_whole(
    ground: LossyGround,
) -> None:
    writer = ground.segments.open(BATCH, 0, ground.claim(), requests=LINES)
    append(writer, 1, 2)
    ground.segments.flush([writer])
    [gone] = ground.stored()
    append(writer, 3, 4)
    ground.segments.flush([writer])
    data = ground.get(gone)
    ground.remove(gone)
    append(writer, *range(5, 11))

    ground.segments.flush([writer])

    found = replies_of(ground.segments.read(BATCH, 0, attempt=1))
    assert found == {line: payload(line) for line in range(3, 11)}
    ground.set(gone, data)  # it still counts, should it come back
    assert len(replies_of(ground.segments.read(BATCH, 0, attempt=1))) == LINES
    ground.remove(gone)
    again = ground.segments.open(BATCH, 0, ground.claim(), requests=LINES)
    append(again, 1, 2)
    ground.segments.flush([again])
    assert len(replies_of(ground.segments.read(BATCH, 0, attempt=2))) == LINES
    assert len(ground.named()) == 1


def test_who_reads_while_a_slice_becomes_whole_reads_it_whole(ground: LossyGround) -> None:
    """The objects that were named when it looked are gone when it asks for them."""
    writer = ground.segments.open(BATCH, 0, ground.claim(), requests=LINES)
    append(writer, *range(1, 10))
    ground.segments.flush([writer])
    [old] = ground.stored()
    append(writer, 10)
    looked, go_on, is_flushing = threading.Event(), threading.Event(), False

    async def wait(key: str) -> None:
        looked.set()
        if not is_flushing:
            while not go_on.is_set():
                await asyncio.sleep(0.01)

    ground.blobs.before_get = wait
    found: list[dict[int, bytes]] = []
    reading = threading.Thread(
        target=lambda: found.append(replies_of(ground.segments.read(BATCH, 0)))
    )
    reading.start()
    assert looked.wait(10)
    is_flushing = True
    ground.segments.flush([writer])
    until(lambda: old not in ground.stored())  # the reader is still at work
    go_on.set()
    reading.join(10)

    assert found == [{line: payload(line) for line in range(1, 11)}]


def test_slices_that_are_read_in_order_are_fetched_ahead_and_once(
    ground: LossyGround,
) -> None:
    for index in range(10):
        writer = ground.segments.open(BATCH, index, ground.claim(index), requests=LINES)
        append(writer, *range(1, 11), text=f"of {index}")
        ground.segments.flush([writer])
    asked = note_gets(ground)

    first = results_of(ground.segments.read(BATCH, 0, attempt=1), Kind.OUTPUT)
    assert len(asked) == 1
    second = results_of(ground.segments.read(BATCH, 1, attempt=1), Kind.OUTPUT)
    until(lambda: len(asked) == 6)
    rest = [
        results_of(ground.segments.read(BATCH, index, attempt=1), Kind.OUTPUT)
        for index in range(2, 10)
    ]

    assert sorted(asked) == ground.stored()
    for index, output in enumerate([first, second, *rest]):
        assert output == b"".join(payload(n, f"of {index}") for n in range(1, 11))


def test_what_was_fetched_ahead_does_not_hide_what_came_after(ground: LossyGround) -> None:
    writers = [
        ground.segments.open(BATCH, index, ground.claim(index), requests=LINES)
        for index in range(3)
    ]
    for writer in writers:
        append(writer, 1)
    ground.segments.flush(writers)
    for index in (0, 1):
        ground.segments.read(BATCH, index).close()
    append(writers[2], 2)
    ground.segments.flush([writers[2]])

    assert list(replies_of(ground.segments.read(BATCH, 2))) == [1, 2]


def test_a_fetch_ahead_that_failed_is_made_again(ground: LossyGround) -> None:
    writers = [
        ground.segments.open(BATCH, index, ground.claim(index), requests=LINES)
        for index in range(3)
    ]
    for writer in writers:
        append(writer, 1)
    ground.segments.flush(writers)
    failed: list[str] = []

    async def fail(key: str) -> None:
        if "00000002." in key and not failed:
            failed.append(key)
            raise StorageUnavailable("The storage did not answer.")

    ground.blobs.before_get = fail
    for index in (0, 1):
        ground.segments.read(BATCH, index).close()
    until(lambda: len(failed) == 1)

    assert list(replies_of(ground.segments.read(BATCH, 2))) == [1]


def test_a_slice_larger_than_memory_should_be_is_read_and_put_together_in_pieces(
    ground: LossyGround,
) -> None:
    asked = note_gets(ground)
    writer = ground.segments.open(BATCH, 0, ground.claim(), requests=20)
    text = "x" * (2 * MB)
    for first in range(20, 0, -4):
        for line in range(first, first - 4, -1):
            writer.append(line, Kind.OUTPUT, payload(line, text), NO_TOKENS)
        writer.prepare()
        ground.segments.flush([writer])

    [name] = ground.named()
    assert len(ground.get(name)) > 40 * MB
    output = results_of(ground.segments.read(BATCH, 0, attempt=1), Kind.OUTPUT)
    assert output == b"".join(payload(line, text) for line in range(1, 21))
    assert len(asked) > 20


def test_what_no_row_names_is_found_and_deleted_with_its_batch(ground: LossyGround) -> None:
    ground.set("segments/batch-9/00000000.000001.ab", b"left")
    ground.set("segments/batch-1/00000000.000001.cd", b"left")
    ground.set("files/file-1", b"no segment")

    assert ground.segments.batches() == [BATCH, "batch-9"]
    assert replies_of(ground.segments.read(BATCH, 0)) == {}
    ground.segments.delete(BatchId("batch-9"))
    ground.segments.delete(BATCH)

    assert ground.stored() == ["files/file-1"]


def test_a_row_whose_object_is_gone_is_forgotten_with_its_batch(ground: LossyGround) -> None:
    writer = ground.segments.open(BATCH, 0, ground.claim(), requests=LINES)
    append(writer, 1)
    ground.segments.flush([writer])
    [name] = ground.stored()
    ground.remove(name)

    assert ground.segments.batches() == [BATCH]
    ground.segments.delete(BATCH)

    assert ground.segments.batches() == []
    assert ground.named() == []
