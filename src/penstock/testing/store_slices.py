"""The contract kit of slices and of the workers that claim them.

Inherit from `SliceContract` beside `StoreContract`, whose fixtures it uses.
"""

import asyncio
from dataclasses import replace

import pytest

from penstock.model import BatchId, BatchStatus, Job, JobKind, SliceStatus, Usage
from penstock.store.base import ClaimedSlice, SliceTally, Store
from penstock.testing.store import (
    ALICE,
    BOB,
    CLOSE,
    NOON,
    WAYS,
    RecordedJobs,
    add_batch,
    claim,
    end_all,
    ended,
    finalize,
    ids_of,
    move,
    new_slices,
    report,
    so_far,
    start,
)


class SliceContract:
    """Inherit, beside `StoreContract`."""

    # What there is to do

    async def test_pending_slices_come_in_input_order(self, store: Store) -> None:
        await start(store, 12)
        await claim(store, ids_of(0, 2))

        pending = await store.list_pending(BatchId("batch-1"), limit=3)

        assert [one.index for one in pending] == [1, 3, 4]

    async def test_slices_come_page_by_page(self, store: Store) -> None:
        await start(store, 12)
        await start(store, 12, "batch-2")

        first = await store.get_slices(BatchId("batch-1"), limit=7)
        second = await store.get_slices(BatchId("batch-1"), after=6, limit=7)

        assert [one.index for one in first + second] == list(range(12))
        assert {one.batch_id for one in first + second} == {"batch-1"}

    async def test_slices_are_tallied_by_status(self, store: Store) -> None:
        await start(store, 6)
        claims = await claim(store, ids_of(0, 1, 2))
        await report(store, ended(claims[0]))

        assert await store.tally_slices(BatchId("batch-1")) == SliceTally(
            pending=3, running=2, ended=1
        )
        assert await store.tally_slices(BatchId("batch-9")) == SliceTally()

    async def test_lines_without_a_result_are_counted_over_all_batches(
        self, store: Store
    ) -> None:
        assert await store.count_pending_lines(now=NOON) == 0
        whole = (await start(store, 3, "batch-1")).counts.total
        other = (await start(store, 3, "batch-2", project="blue")).counts.total
        claims = await claim(store, ids_of(0, 1))
        lines = claims[0].slice.requests

        await report(store, ended(claims[0]))

        assert await store.count_pending_lines(now=NOON) == whole + other - lines
        assert await store.count_pending_lines(now=CLOSE) == 0

    async def test_the_backlog_names_batches_with_pending_slices(self, store: Store) -> None:
        await store.ensure_project("blue", weight=4)
        await start(store, name="batch-1")
        await start(store, name="batch-2", project="blue")
        await start(store, 1, "batch-3")
        await claim(store, ids_of(0, batch="batch-3"))
        await add_batch(store, "batch-4")

        backlog = await store.list_backlog(now=NOON)

        assert {entry.batch_id: entry.weight for entry in backlog} == {
            "batch-1": 1,
            "batch-2": 4,
        }
        [blue] = [entry for entry in backlog if entry.batch_id == "batch-2"]
        batch = await store.get_batch(BatchId("batch-2"))
        assert blue.project_id == batch.project_id
        assert (blue.expires_at, blue.created_at) == (CLOSE, NOON)

    async def test_the_backlog_leaves_out_batches_whose_window_has_closed(
        self, store: Store
    ) -> None:
        await start(store)

        assert len(await store.list_backlog(now=CLOSE - 1)) == 1
        assert await store.list_backlog(now=CLOSE) == []

    async def test_the_backlog_leaves_out_batches_that_are_being_cancelled(
        self, store: Store
    ) -> None:
        await start(store)
        await move(store, BatchStatus.CANCELLING)

        assert await store.list_backlog(now=NOON) == []

    async def test_a_reopened_slice_brings_a_finalizing_batch_back(self, store: Store) -> None:
        await start(store)
        await end_all(store)
        await move(store, BatchStatus.FINALIZING)
        assert await store.list_backlog(now=NOON) == []

        await store.reopen_slices(ids_of(1))

        [entry] = await store.list_backlog(now=CLOSE - 1)
        assert entry.batch_id == "batch-1"
        [again] = await claim(store, ids_of(0, 1, 2))
        assert (again.slice.index, again.slice.attempt) == (1, 2)

    # Claiming

    async def test_a_claim_brings_all_that_a_worker_needs(self, store: Store) -> None:
        await store.ensure_project("red", weight=3, is_background=True)
        batch = await start(store)

        [only] = await claim(store, ids_of(1))

        assert only == ClaimedSlice(
            slice=replace(new_slices(2)[1], status=SliceStatus.RUNNING, attempt=1),
            endpoint=batch.endpoint,
            input_blob_key=batch.input_blob_key,
            expires_at=CLOSE,
            project_id=batch.project_id,
            weight=3,
            is_background=True,
            asked_model="asked",
        )
        assert (await store.get_slices(BatchId("batch-1")))[1] == only.slice

    async def test_claims_come_in_the_order_asked_for_each_once(self, store: Store) -> None:
        await start(store, 12, "batch-1")
        await start(store, 12, "batch-2")
        ids = [*ids_of(10, 2), *ids_of(3, batch="batch-2"), *ids_of(0)]

        claims = await claim(store, [*ids, *ids, *ids_of(99), *ids_of(0, batch="batch-9")])

        assert [one.slice.id for one in claims] == ids
        assert {one.slice.attempt for one in claims} == {1}

    async def test_a_claim_of_nothing_brings_nothing(self, store: Store) -> None:
        assert await claim(store, []) == []
        assert await report(store) == set()
        await store.reopen_slices([])

    async def test_very_many_slices_are_claimed_and_ended_at_once(self, store: Store) -> None:
        await start(store, 2500)

        claims = await claim(store, ids_of(*range(2500)))
        lost = await report(store, *map(ended, claims))

        assert (len(claims), lost) == (2500, set())
        assert await store.tally_slices(BatchId("batch-1")) == SliceTally(ended=2500)

    async def test_a_held_slice_is_not_claimed_again(self, store: Store) -> None:
        await start(store)
        await claim(store, ids_of(0), ALICE, now=NOON)

        assert await claim(store, ids_of(0), BOB, now=NOON + 59.9) == []
        assert await claim(store, ids_of(0), ALICE, now=NOON + 59.9) == []

    async def test_a_slice_is_due_again_when_its_lease_ends(self, store: Store) -> None:
        await start(store)
        await claim(store, ids_of(0), ALICE, now=NOON)

        [again] = await claim(store, ids_of(0), BOB, now=NOON + 60)

        assert again.slice.attempt == 2
        assert await claim(store, ids_of(0), ALICE, now=NOON + 119) == []

    async def test_an_ended_slice_is_not_claimed_again(self, store: Store) -> None:
        await start(store)
        await end_all(store)

        assert await claim(store, ids_of(0, 1, 2), now=CLOSE) == []

    @pytest.mark.parametrize(
        "status", [s for s in BatchStatus if s not in (BatchStatus.VALIDATING, "failed")]
    )
    async def test_slices_are_claimed_only_while_their_batch_runs(
        self, store: Store, status: BatchStatus
    ) -> None:
        await start(store)
        await claim(store, ids_of(0))
        await move(store, *WAYS[status][1:])

        claims = await claim(store, ids_of(0, 1), now=NOON + 60)

        runs = status in (BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING)
        assert len(claims) == (2 if runs else 0)

    async def test_of_workers_that_claim_at_once_each_slice_has_one(self, store: Store) -> None:
        await start(store, 40)
        ids = ids_of(*range(40))

        claims = await asyncio.gather(
            *(claim(store, ids[number * 5 :], f"worker-{number}") for number in range(8))
        )

        claimed = [one.slice.id for some in claims for one in some]
        assert sorted(claimed) == sorted(ids)
        assert all(one.attempt == 1 for one in await store.get_slices(BatchId("batch-1")))

    # Reporting

    async def test_a_report_keeps_how_far_a_slice_has_come(self, store: Store) -> None:
        await start(store)
        [only] = await claim(store, ids_of(0))

        assert await report(store, so_far(only, 4)) == set()

        kept = (await store.get_slices(BatchId("batch-1")))[0]
        assert kept == replace(only.slice, completed=4, usage=Usage(output_tokens=4))

    async def test_a_report_extends_the_lease(self, store: Store) -> None:
        await start(store)
        [only] = await claim(store, ids_of(0), ALICE, now=NOON)
        await report(store, so_far(only, 4), now=NOON + 50)

        assert await claim(store, ids_of(0), BOB, now=NOON + 109) == []
        assert len(await claim(store, ids_of(0), BOB, now=NOON + 110)) == 1

    async def test_a_worker_whose_lease_has_ended_unnoticed_may_go_on(
        self, store: Store
    ) -> None:
        await start(store)
        [only] = await claim(store, ids_of(0), ALICE, now=NOON)

        assert await report(store, so_far(only, 4), now=NOON + 70) == set()
        assert await claim(store, ids_of(0), BOB, now=NOON + 70) == []

    async def test_a_slice_ends_with_its_counts(self, store: Store) -> None:
        await start(store)
        [only] = await claim(store, ids_of(0))

        await report(store, ended(only, failed=3))

        kept = (await store.get_slices(BatchId("batch-1")))[0]
        assert (kept.status, kept.completed, kept.failed) == (SliceStatus.ENDED, 7, 3)

    async def test_a_slice_that_is_given_back_is_due_at_once(self, store: Store) -> None:
        await start(store)
        [only] = await claim(store, ids_of(0), ALICE)

        await report(store, so_far(only, 4, ends=False))

        [again] = await claim(store, ids_of(0), BOB)
        assert (again.slice.attempt, again.slice.completed) == (2, 4)

    async def test_a_late_report_changes_nothing_and_says_so(self, store: Store) -> None:
        await start(store)
        [late, other] = await claim(store, ids_of(0, 1), ALICE, now=NOON)
        [fresh] = await claim(store, ids_of(0), BOB, now=NOON + 60)
        await report(store, so_far(fresh, 2), now=NOON + 60)
        before = await store.get_slices(BatchId("batch-1"))

        for stale in (so_far(late, 9), so_far(late, 9, ends=False), ended(late)):
            assert await report(store, stale, now=NOON + 61) == {late.slice.id}

        assert await store.get_slices(BatchId("batch-1")) == before
        assert await claim(store, ids_of(0), ALICE, now=NOON + 119) == []
        assert await report(store, ended(late), ended(other), now=NOON + 61) == {late.slice.id}
        assert await report(store, ended(fresh), now=NOON + 61) == set()

    async def test_a_report_on_a_slice_that_is_not_running_is_lost(self, store: Store) -> None:
        await start(store)
        [over, back] = await claim(store, ids_of(0, 1))
        await report(store, ended(over), so_far(back, 1, ends=False))
        before = await store.get_slices(BatchId("batch-1"))
        unknown = replace(ended(over), id=ids_of(99)[0])

        lost = await report(store, so_far(over, 1), ended(back), unknown)

        assert lost == {over.slice.id, back.slice.id, unknown.id}
        assert await store.get_slices(BatchId("batch-1")) == before

    async def test_slices_in_flight_may_end_while_their_batch_is_cancelled(
        self, store: Store
    ) -> None:
        await start(store)
        [only] = await claim(store, ids_of(0))
        await move(store, BatchStatus.CANCELLING)

        assert await report(store, ended(only)) == set()
        assert (await store.get_batch(BatchId("batch-1"))).counts.completed == 10

    # When a batch is looked at

    async def test_the_last_slice_to_end_lets_the_finalizer_look(
        self, store: Store, jobs: RecordedJobs
    ) -> None:
        await start(store)
        first, second, third = await claim(store, ids_of(0, 1, 2))
        jobs.take()

        await report(store, ended(first), so_far(second, 1), so_far(third, 1))
        await report(store, ended(second))
        assert jobs.take() == []
        await report(store, ended(third))
        assert jobs.take() == [finalize()]

    async def test_slices_that_end_together_let_the_finalizer_look_once(
        self, store: Store, jobs: RecordedJobs
    ) -> None:
        await start(store)
        claims = await claim(store, ids_of(0, 1, 2))
        jobs.take()

        await report(store, *map(ended, claims))

        assert jobs.take() == [finalize()]

    async def test_a_late_end_lets_nobody_look(self, store: Store, jobs: RecordedJobs) -> None:
        await start(store, 1)
        [late] = await claim(store, ids_of(0), ALICE, now=NOON)
        await claim(store, ids_of(0), BOB, now=NOON + 60)
        jobs.take()

        await report(store, ended(late), now=NOON + 60)

        assert jobs.take() == []

    @pytest.mark.parametrize("ends", [True, False])
    async def test_a_cancelled_batch_is_looked_at_when_nothing_runs_any_more(
        self, store: Store, jobs: RecordedJobs, ends: bool
    ) -> None:
        await start(store)
        first, second = await claim(store, ids_of(0, 1))
        await move(store, BatchStatus.CANCELLING)
        jobs.take()

        await report(store, so_far(first, 4, ends=False))
        assert jobs.take() == []
        await report(store, so_far(second, 10, ends=ends))
        assert jobs.take() == [finalize()]

    @pytest.mark.parametrize("ends", [True, False])
    async def test_a_batch_past_its_window_is_looked_at_when_nothing_runs_any_more(
        self, store: Store, jobs: RecordedJobs, ends: bool
    ) -> None:
        await start(store)
        first, second = await claim(store, ids_of(0, 1), now=CLOSE - 1)
        jobs.take()

        await report(store, so_far(first, 10, ends=ends), now=CLOSE)
        assert jobs.take() == []
        await report(store, so_far(second, 10, ends=ends), now=CLOSE)
        assert jobs.take() == [finalize()]

    async def test_a_slice_given_back_in_time_lets_nobody_look(
        self, store: Store, jobs: RecordedJobs
    ) -> None:
        await start(store, 1)
        [only] = await claim(store, ids_of(0))
        jobs.take()

        await report(store, so_far(only, 4, ends=False), now=CLOSE - 1)

        assert jobs.take() == []

    async def test_a_reopened_slice_that_ends_lets_the_finalizer_look_again(
        self, store: Store, jobs: RecordedJobs
    ) -> None:
        await start(store)
        await end_all(store)
        await move(store, BatchStatus.FINALIZING)
        await store.reopen_slices(ids_of(1))
        jobs.take()

        await end_all(store)

        assert jobs.take() == [finalize()]

    # Reopening, recovering, forgetting

    async def test_only_ended_slices_are_reopened(self, store: Store) -> None:
        await start(store)
        over, running = await claim(store, ids_of(0, 1))
        await report(store, ended(over))

        await store.reopen_slices(ids_of(0, 1, 2, 99))

        assert await store.tally_slices(BatchId("batch-1")) == SliceTally(pending=2, running=1)
        assert await report(store, ended(running)) == set()

    async def test_slices_of_a_dead_process_are_recovered(self, store: Store) -> None:
        await start(store, 3, "batch-1")
        await start(store, 3, "batch-2")
        over, running = await claim(store, ids_of(0, 1))
        await claim(store, ids_of(2, batch="batch-2"))
        await report(store, ended(over))

        assert await store.recover_slices() == 2
        assert await store.recover_slices() == 0

        assert await store.tally_slices(BatchId("batch-1")) == SliceTally(pending=2, ended=1)
        assert await report(store, ended(running)) == {running.slice.id}
        [again] = await claim(store, ids_of(1))
        assert again.slice.attempt == 2

    async def test_slices_of_a_final_batch_are_forgotten(self, store: Store) -> None:
        await start(store, 3, "batch-1")
        await start(store, 3, "batch-2")
        await end_all(store)
        await move(store, BatchStatus.FINALIZING, BatchStatus.COMPLETED)

        await store.forget_slices(BatchId("batch-1"))

        assert await store.get_slices(BatchId("batch-1")) == []
        assert len(await store.get_slices(BatchId("batch-2"))) == 3

    async def test_slices_of_an_unfinished_batch_are_not_forgotten(self, store: Store) -> None:
        await start(store)

        await store.forget_slices(BatchId("batch-1"))

        assert len(await store.get_slices(BatchId("batch-1"))) == 3

    # Workers that are taken to be dead

    async def test_slices_whose_lease_has_ended_are_released(self, store: Store) -> None:
        await start(store, 4)
        over, _, _ = await claim(store, ids_of(0, 1, 2), ALICE, now=NOON)
        await report(store, ended(over))
        [held] = await claim(store, ids_of(3), BOB, now=NOON + 30)

        assert await store.release_slices(now=NOON + 59.9) == 0
        assert await store.release_slices(now=NOON + 60) == 2
        assert await store.release_slices(now=NOON + 60) == 0

        assert await store.tally_slices(BatchId("batch-1")) == SliceTally(
            pending=2, running=1, ended=1
        )
        assert await report(store, ended(held), now=NOON + 60) == set()

    async def test_a_released_slice_keeps_what_was_counted_and_is_fenced(
        self, store: Store
    ) -> None:
        await start(store)
        [late] = await claim(store, ids_of(0), ALICE, now=NOON)
        await report(store, so_far(late, 4), now=NOON)

        await store.release_slices(now=NOON + 60)

        assert await report(store, ended(late), now=NOON + 61) == {late.slice.id}
        [again] = await claim(store, ids_of(0), BOB, now=NOON + 61)
        assert (again.slice.attempt, again.slice.completed) == (2, 4)

    async def test_a_release_lets_the_finalizer_of_a_cancelled_batch_look(
        self, store: Store, jobs: RecordedJobs
    ) -> None:
        await start(store)
        await claim(store, ids_of(0), now=NOON)
        await claim(store, ids_of(1), now=NOON + 5)
        await move(store, BatchStatus.CANCELLING)
        jobs.take()

        assert await store.release_slices(now=NOON + 60) == 1
        assert jobs.take() == []
        assert await store.release_slices(now=NOON + 65) == 1
        assert jobs.take() == [finalize()]

    async def test_a_release_lets_the_finalizer_of_a_batch_past_its_window_look(
        self, store: Store, jobs: RecordedJobs
    ) -> None:
        await start(store, 2, "batch-1")
        await start(store, 2, "batch-2")
        await claim(store, ids_of(0, batch="batch-1"), now=CLOSE - 60)
        await claim(store, ids_of(0, batch="batch-2"), now=CLOSE - 62)
        jobs.take()

        assert await store.release_slices(now=CLOSE - 1) == 1
        assert jobs.take() == []  # it has slices pending, and time for them
        assert await store.release_slices(now=CLOSE) == 1
        assert jobs.take() == [finalize("batch-1")]

    async def test_a_worker_lives_while_it_is_seen(self, store: Store) -> None:
        await store.keep_worker(BOB, version="1.0", now=NOON)
        await store.keep_worker(ALICE, version="1.0", now=NOON + 5.5)

        assert await store.list_workers(seen_after=NOON - 1) == [ALICE, BOB]
        assert await store.list_workers(seen_after=NOON) == [ALICE]
        await store.keep_worker(BOB, version="1.1", now=NOON + 6.5)
        assert await store.list_workers(seen_after=NOON + 5.5) == [BOB]

    async def test_a_worker_that_has_ended_is_forgotten(self, store: Store) -> None:
        await store.keep_worker(ALICE, version="1.0", now=NOON)
        await store.keep_worker(BOB, version="1.0", now=NOON)

        await store.forget_worker(ALICE)
        await store.forget_worker(ALICE)

        assert await store.list_workers(seen_after=0) == [BOB]

    # What workers share

    @pytest.mark.parametrize("parts", [1, 2, 3])
    async def test_shares_of_a_batch_are_all_of_it_and_no_slice_is_in_two(
        self, store: Store, parts: int
    ) -> None:
        await start(store, 12)
        await claim(store, ids_of(4))

        shares = [
            await store.list_pending(BatchId("batch-1"), limit=99, share=(part, parts))
            for part in range(parts)
        ]

        for part, share in enumerate(shares):
            indexes = [one.index for one in share]
            assert indexes == [n for n in range(12) if n % parts == part and n != 4]

    async def test_a_share_is_limited_after_it_was_chosen(self, store: Store) -> None:
        await start(store, 12)

        share = await store.list_pending(BatchId("batch-1"), limit=2, share=(2, 3))

        assert [one.index for one in share] == [2, 5]

    async def test_the_backlog_says_which_batches_are_of_the_background(
        self, store: Store
    ) -> None:
        await store.ensure_project("red", is_background=True)
        await start(store, name="batch-1")
        await start(store, name="batch-2", project="blue")

        backlog = await store.list_backlog(now=NOON)

        assert {entry.batch_id: entry.is_background for entry in backlog} == {
            "batch-1": True,
            "batch-2": False,
        }

    async def test_the_clock_goes_forward(self, store: Store) -> None:
        first = await store.read_clock()
        second = await store.read_clock()

        assert NOON < first <= second < first + 60

    # Upkeep

    async def test_work_that_an_engine_may_have_lost_is_found(self, store: Store) -> None:
        await add_batch(store, "batch-new")
        await start(store, 3, "batch-under-way")
        await start(store, 3, "batch-run")
        await claim(store, ids_of(0, 1, 2, batch="batch-run"))
        await start(store, 1, "batch-done")
        [only] = await claim(store, ids_of(0, batch="batch-done"))
        await report(store, ended(only))
        await start(store, 3, "batch-cancelled")
        await move(store, BatchStatus.CANCELLING, name="batch-cancelled")
        await start(store, 1, "batch-over")
        await move(store, BatchStatus.FINALIZING, BatchStatus.COMPLETED, name="batch-over")
        new = Job(kind=JobKind.VALIDATE, id="batch-new")

        assert await store.list_lost_jobs(now=CLOSE - 1) == [
            new,
            finalize("batch-done"),
            finalize("batch-cancelled"),
        ]
        assert await store.list_lost_jobs(now=CLOSE) == [
            new,
            finalize("batch-under-way"),
            finalize("batch-run"),
            finalize("batch-done"),
            finalize("batch-cancelled"),
        ]

    async def test_slices_that_nobody_came_to_forget_are_forgotten(self, store: Store) -> None:
        await start(store, 3, "batch-1")
        await start(store, 3, "batch-2")
        await move(store, BatchStatus.FINALIZING, BatchStatus.COMPLETED)

        await store.forget_final_slices()

        assert await store.get_slices(BatchId("batch-1")) == []
        assert len(await store.get_slices(BatchId("batch-2"))) == 3
