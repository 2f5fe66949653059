"""Slices in any course of events, against a model: who holds one, and what is known of it."""

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from penstock.model import BatchStatus, Counts, Slice, SliceId, SliceStatus, Usage, slice_id
from penstock.places import store_url
from penstock.store.base import BatchChange, SliceReport
from penstock.store.sql import SqlStore
from penstock.testing.store import NOON, RecordedJobs, new_batch, new_file

T = TypeVar("T")
LEASE_S = 30.0
LINES = 4
SLICES = 3
indexes = st.integers(0, SLICES - 1)
workers = st.sampled_from(["alice", "bob"])


@dataclass
class Known:
    """What should be known of a slice."""

    status: SliceStatus = SliceStatus.PENDING
    attempt: int = 0
    lease_until: float = 0.0
    completed: int = 0
    failed: int = 0
    usage: Usage = field(default_factory=Usage)


class Slices(RuleBasedStateMachine):
    """Two workers on the slices of one batch, late ones among them, and restarts."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.loop = asyncio.new_event_loop()
        self.now = float(NOON)
        self.jobs = RecordedJobs()
        self.known = [Known() for _ in range(SLICES)]
        self.is_cancelling = False
        self.url = self.make_database()
        self.store = SqlStore(self.url, jobs=self.jobs)

    def make_database(self) -> str:
        """The URL of an empty one."""
        return store_url(self.folder)

    def drop_database(self) -> None:
        """It goes with the folder."""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    @initialize()
    def begin(self) -> None:
        self.run(self.store.open())
        project = self.run(self.store.ensure_project("one"))
        file = self.run(self.store.add_file(new_file(project)))
        self.batch_id = self.run(self.store.add_batch(new_batch(file))).id
        pieces = [
            Slice(
                batch_id=self.batch_id,
                index=index,
                start=index * 100,
                end=index * 100 + 100,
                first_line=index * LINES + 1,
                requests=LINES,
                models=("m",),
            )
            for index in range(SLICES)
        ]
        change = BatchChange(counts=Counts(total=SLICES * LINES), slices=pieces)
        self.run(
            self.store.move_batch(
                self.batch_id, BatchStatus.IN_PROGRESS, now=NOON, change=change
            )
        )
        self.jobs.take()

    def name(self, index: int) -> SliceId:
        return slice_id(self.batch_id, index)

    @rule(seconds=st.floats(0, 2 * LEASE_S))
    def let_time_pass(self, seconds: float) -> None:
        self.now += seconds

    @rule(wanted=st.lists(indexes, unique=True, min_size=1), worker=workers)
    def claim(self, wanted: list[int], worker: str) -> None:
        claimed = self.run(
            self.store.claim_slices(
                [self.name(index) for index in wanted],
                worker_id=worker,
                lease_s=LEASE_S,
                now=self.now,
            )
        )
        due = [index for index in wanted if not self.is_cancelling and self._is_due(index)]
        assert [each.slice.index for each in claimed] == due
        for each in claimed:
            known = self.known[each.slice.index]
            known.status = SliceStatus.RUNNING
            known.attempt += 1
            known.lease_until = self.now + LEASE_S
            assert each.slice.attempt == known.attempt

    def _is_due(self, index: int) -> bool:
        known = self.known[index]
        if known.status is SliceStatus.RUNNING:
            return known.lease_until <= self.now
        return known.status is SliceStatus.PENDING

    @rule(
        index=indexes,
        late=st.integers(0, 2),
        completed=st.integers(0, LINES),
        failed=st.integers(0, LINES),
        ends=st.sampled_from([None, False, True]),
    )
    def report(
        self, index: int, *, late: int, completed: int, failed: int, ends: bool | None
    ) -> None:
        known = self.known[index]
        attempt = known.attempt - late
        if attempt < 1:
            return
        if ends or completed + failed > LINES:
            failed = LINES - completed
        usage = Usage(input_tokens=completed, total_tokens=completed)
        report = SliceReport(
            id=self.name(index),
            attempt=attempt,
            completed=completed,
            failed=failed,
            usage=usage,
            ends=ends,
        )
        lost = self.run(self.store.report_slices([report], lease_s=LEASE_S, now=self.now))
        is_mine = not late and known.status is SliceStatus.RUNNING
        assert lost == (set() if is_mine else {report.id})
        if is_mine:
            if completed + failed >= known.completed + known.failed:  # counts never fall
                known.completed, known.failed, known.usage = completed, failed, usage
            known.lease_until = self.now + LEASE_S
            if ends is not None:
                known.status = SliceStatus.ENDED if ends else SliceStatus.PENDING

    @rule()
    def release(self) -> None:
        late = [
            known
            for known in self.known
            if known.status is SliceStatus.RUNNING and known.lease_until <= self.now
        ]
        assert self.run(self.store.release_slices(now=self.now)) == len(late)
        for known in late:
            known.status = SliceStatus.PENDING

    @rule(index=indexes)
    def reopen(self, index: int) -> None:
        self.run(self.store.reopen_slices([self.name(index)]))
        if self.known[index].status is SliceStatus.ENDED:
            self.known[index].status = SliceStatus.PENDING

    @rule()
    def restart(self) -> None:
        self.run(self.store.close())
        self.store = SqlStore(self.url, jobs=self.jobs)
        self.run(self.store.open())
        self.run(self.store.recover_slices())
        for known in self.known:
            if known.status is SliceStatus.RUNNING:
                known.status = SliceStatus.PENDING

    @rule()
    def cancel(self) -> None:
        if not self.is_cancelling:
            self.run(
                self.store.move_batch(self.batch_id, BatchStatus.CANCELLING, now=int(self.now))
            )
            self.is_cancelling = True

    @invariant()
    def all_is_as_it_should_be(self) -> None:
        if not hasattr(self, "batch_id"):
            return
        pieces = self.run(self.store.get_slices(self.batch_id))
        found = [
            (piece.status, piece.attempt, piece.completed, piece.failed, piece.usage)
            for piece in sorted(pieces, key=lambda piece: piece.index)
        ]
        assert found == [
            (known.status, known.attempt, known.completed, known.failed, known.usage)
            for known in self.known
        ]
        tally = self.run(self.store.tally_slices(self.batch_id))
        statuses = [known.status for known in self.known]
        assert tally.pending == statuses.count(SliceStatus.PENDING)
        assert tally.running == statuses.count(SliceStatus.RUNNING)
        assert tally.ended == statuses.count(SliceStatus.ENDED)
        batch = self.run(self.store.get_batch(self.batch_id))
        assert batch.counts.completed == sum(known.completed for known in self.known)
        assert batch.counts.failed == sum(known.failed for known in self.known)
        pending = self.run(self.store.list_pending(self.batch_id, limit=10))
        assert [piece.index for piece in pending] == [
            index for index, status in enumerate(statuses) if status is SliceStatus.PENDING
        ]

    def teardown(self) -> None:
        self.run(self.store.close())
        self.loop.close()
        self.drop_database()
        shutil.rmtree(self.folder)


TestAnyCourseOfEvents = Slices.TestCase
TestAnyCourseOfEvents.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None
)
