"""The contract kit of what a store keeps of native runs.

Inherit from `NativeRunContract` beside `StoreContract`, whose fixtures it uses.
"""

from dataclasses import replace

import pytest

from penstock.errors import NotFound
from penstock.model import (
    BatchId,
    BatchStatus,
    Job,
    JobKind,
    NativeRun,
    NativeRunId,
    NativeRunStatus,
    SliceId,
    Spent,
    Usage,
)
from penstock.store.base import BatchChange, ClaimedSlice, SliceTally, Store
from penstock.testing.store import (
    ALICE,
    CLOSE,
    NOON,
    RecordedJobs,
    add_batch,
    claim,
    ended,
    ids_of,
    move,
    new_slices,
    report,
    so_far,
)

BATCH = BatchId("batch-1")
RUN, OTHER = NativeRunId("nat-1"), NativeRunId("nat-2")


def new_run(run_id: NativeRunId = RUN, *, due_at: float = NOON) -> NativeRun:
    return NativeRun(
        id=run_id,
        batch_id=BATCH,
        upstream="hosted",
        model="small",
        requests=20,
        due_at=due_at,
    )


async def start_native(store: Store) -> NativeRun:
    """A batch of four slices, of which a run holds the first and the last."""
    await add_batch(store)
    pieces = [
        replace(piece, native_run=RUN if piece.index in (0, 3) else None)
        for piece in new_slices(4)
    ]
    run = new_run()
    change = BatchChange(slices=pieces, native_runs=[run])
    await store.move_batch(BATCH, BatchStatus.IN_PROGRESS, now=NOON, change=change)
    return run


async def keep(store: Store, run: NativeRun, *, now: float = NOON) -> NativeRun:
    kept = await store.keep_native_run(run, now=now)
    assert kept is not None
    return kept


async def claim_native(
    store: Store, *indexes: int, run: NativeRunId = RUN, now: float = NOON
) -> list[ClaimedSlice]:
    return await store.claim_slices(
        ids_of(*indexes), worker_id=ALICE, lease_s=60, now=now, native_run=run
    )


def indexes_of(claims: list[ClaimedSlice]) -> list[int]:
    return [each.slice.index for each in claims]


def poll(run_id: NativeRunId = RUN, due_at: float | None = NOON) -> Job:
    return Job(kind=JobKind.NATIVE, id=run_id, due_at=due_at)


def submitting(run: NativeRun, due_at: float) -> NativeRun:
    return replace(run, status=NativeRunStatus.SUBMITTING, begun_at=float(NOON), due_at=due_at)


def submitted(run: NativeRun, due_at: float) -> NativeRun:
    return replace(run, status=NativeRunStatus.SUBMITTED, native_id="batch_9", due_at=due_at)


def over(run: NativeRun) -> NativeRun:
    return replace(run, status=NativeRunStatus.ENDED, due_at=None)


def a_spent(model: str | None, *, longest_input: int | None = None) -> Spent:
    usage = Usage(
        input_tokens=1000,
        cached_tokens=100,
        output_tokens=30,
        reasoning_tokens=5,
        total_tokens=1030,
    )
    return Spent(answered=18, usage=usage, model=model, longest_input=longest_input)


class NativeRunContract:
    """The promises about native runs."""

    async def test_a_run_comes_back_as_it_was_added_and_its_job_is_enqueued(
        self, store: Store, jobs: RecordedJobs
    ) -> None:
        run = await start_native(store)

        assert await store.get_native_run(RUN) == run
        assert await store.list_native_runs(BATCH) == [run]
        assert poll() in jobs.take()
        assert [piece.index for piece in await store.get_native_slices(RUN)] == [0, 3]

    async def test_a_run_that_is_not_there_is_not_found(self, store: Store) -> None:
        with pytest.raises(NotFound):
            await store.get_native_run(RUN)
        assert await store.keep_native_run(new_run(), now=NOON) is None

    async def test_slices_of_a_run_are_neither_handed_out_nor_claimed_by_others(
        self, store: Store
    ) -> None:
        await start_native(store)

        pending = await store.list_pending(BATCH, limit=9)
        claimed = await claim(store, ids_of(0, 1, 2, 3))

        assert [piece.index for piece in pending] == [1, 2]
        assert indexes_of(claimed) == [1, 2]
        assert await store.list_backlog(now=NOON) == []

    async def test_lines_of_a_run_do_not_wait_for_workers_until_it_lets_go(
        self, store: Store
    ) -> None:
        run = await start_native(store)
        lines = [piece.requests for piece in await store.get_slices(BATCH)]

        assert await store.count_pending_lines(now=NOON) == lines[1] + lines[2]
        await keep(store, replace(run, status=NativeRunStatus.ENDED, due_at=None))
        assert await store.count_pending_lines(now=NOON) == sum(lines)

    async def test_only_its_own_run_claims_a_slice(self, store: Store) -> None:
        await start_native(store)

        assert indexes_of(await claim_native(store, 0, 1, 2, 3, run=OTHER)) == []
        assert indexes_of(await claim_native(store, 0, 1, 2, 3)) == [0, 3]
        assert indexes_of(await claim_native(store, 0, 3)) == []
        assert indexes_of(await claim_native(store, 0, 3, now=NOON + 60)) == [0, 3]

    async def test_slices_of_a_run_are_counted_until_they_have_ended(
        self, store: Store
    ) -> None:
        await start_native(store)
        [first, _] = await claim_native(store, 0, 3)
        await report(store, ended(first))

        tally = await store.tally_slices(BATCH)

        assert tally == SliceTally(pending=2, running=1, ended=1, native=1)

    async def test_a_run_claims_slices_of_a_batch_that_is_being_cancelled(
        self, store: Store
    ) -> None:
        await start_native(store)
        await move(store, BatchStatus.CANCELLING)

        assert indexes_of(await claim(store, ids_of(1))) == []
        assert indexes_of(await claim_native(store, 0)) == [0]

    async def test_a_slice_that_is_given_back_stays_with_its_run(self, store: Store) -> None:
        await start_native(store)
        [claimed] = await claim_native(store, 0)
        await report(store, so_far(claimed, 4, ends=False))

        assert indexes_of(await claim(store, ids_of(0))) == []
        assert indexes_of(await claim_native(store, 0)) == [0]

    async def test_slices_of_a_dead_process_stay_with_their_run(self, store: Store) -> None:
        await start_native(store)
        await claim_native(store, 0)
        await store.recover_slices()

        assert indexes_of(await claim(store, ids_of(0))) == []
        assert indexes_of(await claim_native(store, 0)) == [0]

    async def test_what_is_kept_of_a_run_is_all_of_it_and_its_job_is_enqueued(
        self, store: Store, jobs: RecordedJobs
    ) -> None:
        run = await start_native(store)
        jobs.take()
        changed = replace(
            submitted(run, NOON + 30.5),
            submission=2,
            begun_at=NOON + 0.5,
            submitted_at=NOON + 1.5,
            attempts=3,
            details={"input": "file-1"},
            message="No room.",
            completed=4,
            failed=1,
        )

        kept = await keep(store, changed)

        assert kept == replace(changed, version=1)
        assert await store.get_native_run(RUN) == kept
        assert jobs.take() == [poll(due_at=NOON + 30.5)]

    async def test_who_has_read_an_older_version_changes_nothing(
        self, store: Store, jobs: RecordedJobs
    ) -> None:
        run = await start_native(store)
        kept = await keep(store, submitting(run, NOON + 9))
        jobs.take()

        assert await store.keep_native_run(submitted(run, NOON), now=NOON) is None
        assert not await store.split_native_run(run, [], now=NOON)

        assert await store.get_native_run(RUN) == kept
        assert jobs.take() == []

    async def test_a_run_that_has_ended_lets_go_and_its_batch_is_looked_at(
        self, store: Store, jobs: RecordedJobs
    ) -> None:
        run = await start_native(store)
        jobs.take()

        kept = await keep(store, over(run))

        assert jobs.take() == [Job(kind=JobKind.FINALIZE, id=BATCH)]
        assert await store.get_native_slices(RUN) == []
        assert indexes_of(await claim(store, ids_of(0, 3))) == [0, 3]
        assert await store.keep_native_run(replace(kept, message="x"), now=NOON) is None

    async def test_what_a_run_took_is_kept_once_with_its_end(self, store: Store) -> None:
        run = await keep(store, submitted(await start_native(store), NOON + 60))
        assert await store.sum_native_spent() == {}
        spent = a_spent("small", longest_input=700)
        ending = replace(over(run), spent=spent)

        kept = await keep(store, ending)

        assert kept.spent == spent
        assert await store.get_native_run(RUN) == kept
        for late in (ending, replace(kept, spent=a_spent("large"))):
            assert await store.keep_native_run(late, now=NOON) is None
        assert await store.sum_native_spent() == {"hosted": [spent]}

    async def test_slices_of_a_run_outlive_their_batch_until_it_has_ended(
        self, store: Store
    ) -> None:
        run = await start_native(store)
        claims = await claim_native(store, 0, 3)
        claims += await claim(store, ids_of(1, 2))
        await report(store, *(ended(each) for each in claims))
        await move(store, BatchStatus.FINALIZING)
        await move(store, BatchStatus.COMPLETED)

        await store.forget_slices(BATCH)
        await store.forget_final_slices()

        held = await store.get_native_slices(RUN)
        assert [piece.index for piece in held] == [0, 3]
        assert all(piece.completed for piece in held)
        assert [piece.index for piece in await store.get_slices(BATCH)] == [0, 3]
        await keep(store, over(run))
        assert await store.get_slices(BATCH) == []

    async def test_a_run_that_was_not_counted_took_nothing_that_is_known(
        self, store: Store
    ) -> None:
        run = await keep(store, submitted(await start_native(store), NOON + 60))

        await keep(store, over(run))

        assert (await store.get_native_run(RUN)).spent is None
        assert await store.sum_native_spent() == {}

    async def test_what_runs_took_is_summed_by_upstream_and_model(self, store: Store) -> None:
        await add_batch(store)
        several = (("nat-1", "small"), ("nat-2", "small"), ("nat-3", None))
        runs = [new_run(NativeRunId(name)) for name, _ in several]
        change = BatchChange(slices=new_slices(1), native_runs=runs)
        await store.move_batch(BATCH, BatchStatus.IN_PROGRESS, now=NOON, change=change)
        for run, (_, model) in zip(runs, several, strict=True):
            await keep(store, replace(over(run), spent=a_spent(model)))

        found = await store.sum_native_spent()

        both = Usage(
            input_tokens=2000,
            cached_tokens=200,
            output_tokens=60,
            reasoning_tokens=10,
            total_tokens=2060,
        )
        assert list(found) == ["hosted"]
        by_model = {each.model: each for each in found["hosted"]}
        assert by_model == {
            "small": Spent(answered=36, usage=both, model="small", longest_input=None),
            None: a_spent(None),
        }

    async def test_a_wish_to_cancel_makes_a_run_due_that_waits_or_was_submitted(
        self, store: Store, jobs: RecordedJobs
    ) -> None:
        run = await start_native(store)
        await keep(store, submitted(run, NOON + 500))
        jobs.take()

        await store.cancel_native_runs(BATCH, now=NOON + 7)

        found = await store.get_native_run(RUN)
        assert (found.cancel_wanted_at, found.due_at) == (NOON + 7, NOON + 7)
        assert jobs.take() == [poll(due_at=NOON + 7)]

    async def test_the_time_of_the_first_wish_to_cancel_stays(
        self, store: Store, jobs: RecordedJobs
    ) -> None:
        await start_native(store)
        await store.cancel_native_runs(BATCH, now=NOON + 7)
        jobs.take()

        await store.cancel_native_runs(BATCH, now=NOON + 9)

        assert (await store.get_native_run(RUN)).cancel_wanted_at == NOON + 7
        assert jobs.take() == []

    async def test_a_wish_to_cancel_does_not_touch_a_submission(self, store: Store) -> None:
        run = await keep(store, submitting(await start_native(store), NOON + 500))

        await store.cancel_native_runs(BATCH, now=NOON + 7)

        assert (await store.get_native_run(RUN)).due_at == NOON + 500
        kept = await keep(store, submitted(run, NOON + 600), now=NOON + 20)
        assert kept.native_id == "batch_9"
        assert kept.cancel_wanted_at == NOON + 7
        assert kept.due_at == NOON + 20

    async def test_a_run_that_has_ended_is_not_cancelled(
        self, store: Store, jobs: RecordedJobs
    ) -> None:
        await keep(store, over(await start_native(store)))
        jobs.take()

        await store.cancel_native_runs(BATCH, now=NOON)

        assert (await store.get_native_run(RUN)).cancel_wanted_at is None
        assert jobs.take() == []

    async def test_lines_of_runs_are_counted_until_they_end(self, store: Store) -> None:
        assert await store.count_native_lines() == {}
        run = await start_native(store)
        waiting = {(run.upstream, NativeRunStatus.WAITING): run.requests}
        assert await store.count_native_lines() == waiting

        run = await keep(store, submitting(run, NOON + 60))
        run = await keep(store, submitted(run, NOON + 60))
        there = {(run.upstream, NativeRunStatus.SUBMITTED): run.requests}
        assert await store.count_native_lines() == there

        await keep(store, over(run))
        assert await store.count_native_lines() == {}

    async def test_jobs_of_runs_are_listed_until_they_end(self, store: Store) -> None:
        run = await keep(store, replace(await start_native(store), due_at=NOON + 10))

        assert await store.list_native_jobs(until=NOON + 9) == []
        assert await store.list_native_jobs(until=NOON + 10) == [poll(due_at=NOON + 10)]
        assert await store.list_native_jobs(until=None) == [poll(due_at=NOON + 10)]
        await keep(store, over(run))
        assert await store.list_native_jobs(until=None) == []

    async def test_a_submission_of_a_dead_process_is_due_sooner(self, store: Store) -> None:
        await keep(store, submitting(await start_native(store), NOON + 1800))

        assert await store.recover_native_runs(due_at=NOON + 60) == [poll(due_at=NOON + 60)]
        assert await store.recover_native_runs(due_at=NOON + 90) == [poll(due_at=NOON + 60)]

    async def test_other_runs_of_a_dead_process_are_due_as_before(self, store: Store) -> None:
        await keep(store, submitted(await start_native(store), NOON + 1800))

        assert await store.recover_native_runs(due_at=NOON + 60) == [poll(due_at=NOON + 1800)]

    async def test_a_run_is_split_into_others_that_take_its_slices(
        self, store: Store, jobs: RecordedJobs
    ) -> None:
        run = await start_native(store)
        await store.cancel_native_runs(BATCH, now=NOON + 1)
        jobs.take()
        parts: list[tuple[NativeRun, list[SliceId]]] = [
            (replace(new_run(NativeRunId("nat-3")), requests=10), ids_of(0)),
            (replace(new_run(NativeRunId("nat-4")), requests=10), ids_of(3)),
        ]

        assert await store.split_native_run(run, parts, now=NOON)

        assert jobs.take() == [poll(part.id) for part, _ in parts]
        assert await store.get_native_slices(RUN) == []
        for part, ids in parts:
            assert [each.id for each in await store.get_native_slices(part.id)] == ids
            assert (await store.get_native_run(part.id)).cancel_wanted_at == NOON + 1
        assert (await store.get_native_run(RUN)).status is NativeRunStatus.ENDED
        assert await claim(store, ids_of(0, 3), now=CLOSE - 1) == []
