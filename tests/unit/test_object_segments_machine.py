"""Segments as objects, in any course of events."""

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.blobs.object_segments import ObjectWriter
from penstock.blobs.segments import Kind
from penstock.errors import StorageUnavailable
from penstock.testing.segments import BATCH, LINES, NO_TOKENS, payload, replies_of
from tests.segment_grounds import running
from tests.unit.test_blobs import RawFolder
from tests.unit.test_object_segments import LossyBlobs, LossyGround, LossyStore


class ObjectMachine(RuleBasedStateMachine):
    """One slice; a writer that may die at any moment; writers that do not know they have been
    replaced; a storage that is full now and then, a database whose answers get lost. What a
    flush has reported stays, in its own words, and nothing comes to it but what a flush tried
    to keep whose answer was lost."""

    lines = st.integers(1, LINES)

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.stack = ExitStack()
        blobs = LossyBlobs(self.folder / "blobs")
        store = LossyStore(f"sqlite:///{self.folder}/penstock.db")
        raw = RawFolder(self.folder / "blobs")
        self.ground = self.stack.enter_context(running(LossyGround, blobs, store, raw))
        self.count = 0
        self.late: list[ObjectWriter] = []
        self.durable: dict[int, bytes] = {}
        self.doubtful: dict[int, bytes] = {}
        """What a flush tried to keep that failed in the end."""
        self.prepared: dict[int, bytes] = {}
        self.waiting: dict[int, bytes] = {}
        self._open_next()

    def _open_next(self) -> None:
        attempt = self.ground.claim()
        self.writer = self.ground.segments.open(BATCH, 0, attempt, requests=LINES)
        found = replies_of(self.ground.segments.read(BATCH, 0, attempt=attempt))
        self._compare(found)
        assert self.writer.lines == set(found)
        self.durable, self.doubtful = found, {}
        self.prepared, self.waiting = {}, {}

    def _compare(self, found: dict[int, bytes]) -> None:
        assert list(found) == sorted(found)
        assert {line: found.get(line) for line in self.durable} == self.durable
        for line in found.keys() - self.durable.keys():
            assert found[line] == self.doubtful.get(line)

    def _text(self, line: int) -> bytes:
        self.count += 1
        return payload(line, f"reply {self.count}")

    @rule(lines=st.sets(lines, min_size=1), kind=st.sampled_from(Kind))
    def append(self, lines: set[int], kind: Kind) -> None:
        for line in lines - self.writer.lines:
            self.waiting[line] = self._text(line)
            self.writer.append(line, kind, self.waiting[line], NO_TOKENS)

    @rule()
    def prepare(self) -> None:
        self.writer.prepare()
        self.prepared |= self.waiting
        self.waiting = {}

    @rule()
    def flush(self) -> None:
        self.ground.segments.flush([self.writer])
        assert not self.writer.is_lost
        self.durable |= self.prepared
        self.prepared, self.doubtful = {}, {}

    @precondition(lambda self: self.prepared)
    @rule()
    def flush_when_the_storage_is_full(self) -> None:
        self.ground.blobs.failing = "segments"
        try:
            if self.writer.stored is None:
                with pytest.raises(StorageUnavailable):
                    self.ground.segments.flush([self.writer])
        finally:
            self.ground.blobs.failing = ""

    @precondition(lambda self: self.prepared)
    @rule()
    def flush_when_the_answer_gets_lost(self) -> None:
        self.ground.store.loses_answers = True
        with pytest.raises(StorageUnavailable):
            self.ground.segments.flush([self.writer])
        self.ground.store.loses_answers = False
        self.doubtful |= self.prepared

    @rule()
    def crash(self) -> None:
        self._open_next()

    @rule()
    def lose_the_slice(self) -> None:
        self.late.append(self.writer)
        self._open_next()

    @precondition(lambda self: self.late)
    @rule(data=st.data(), lines=st.sets(lines, min_size=1))
    def write_late(self, data: st.DataObject, lines: set[int]) -> None:
        writer = data.draw(st.sampled_from(self.late))
        for line in lines - writer.lines:
            writer.append(line, Kind.OUTPUT, self._text(line), NO_TOKENS)
        writer.prepare()
        had_some = writer.is_dirty
        self.ground.segments.flush([writer])
        assert writer.is_lost or not had_some

    @invariant()
    def what_is_durable_is_read_back(self) -> None:
        replies = self.ground.segments.read(BATCH, 0, attempt=self.writer.attempt)
        tally = replies.tally()
        found = replies_of(replies)
        self._compare(found)
        assert tally.completed + tally.failed == len(found)
        durable = self.writer.durable
        assert durable.completed + durable.failed == len(self.durable)

    def teardown(self) -> None:
        self.ground.settle()
        assert set(self.ground.named()) <= set(self.ground.stored())
        self.ground.segments.delete(BATCH)
        assert self.ground.stored() == []
        self.stack.close()
        shutil.rmtree(self.folder)


TestAnyCourseOfEvents = ObjectMachine.TestCase
TestAnyCourseOfEvents.settings = settings(
    max_examples=20, stateful_step_count=25, deadline=None
)
