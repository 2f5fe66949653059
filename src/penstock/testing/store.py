"""The contract kit of `Store`: one test for each promise of its docstrings.

Inherit from `StoreContract` and give a fixture `store`, an open and empty store that puts its
jobs into the fixture `jobs`. Time is an argument, so nothing here waits.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from penstock.errors import Conflict, NotFound
from penstock.model import (
    TRANSITIONS,
    ApiKey,
    Batch,
    BatchId,
    BatchStatus,
    Counts,
    Fault,
    File,
    FileId,
    Job,
    JobKind,
    KeyId,
    Project,
    ProjectId,
    Purpose,
    Slice,
    SliceId,
    Usage,
    slice_id,
)
from penstock.store.base import (
    BatchChange,
    BatchFilter,
    ClaimedSlice,
    Page,
    SliceReport,
    Store,
)

NOON = 1_700_000_000
WINDOW_S = 86_400
CLOSE = NOON + WINDOW_S
"""When the window of the batches here closes."""
ALICE, BOB = "worker-alice", "worker-bob"

WAYS: dict[BatchStatus, tuple[BatchStatus, ...]] = {
    BatchStatus.VALIDATING: (),
    BatchStatus.FAILED: (BatchStatus.FAILED,),
    BatchStatus.IN_PROGRESS: (BatchStatus.IN_PROGRESS,),
    BatchStatus.FINALIZING: (BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING),
    BatchStatus.COMPLETED: (
        BatchStatus.IN_PROGRESS,
        BatchStatus.FINALIZING,
        BatchStatus.COMPLETED,
    ),
    BatchStatus.EXPIRED: (
        BatchStatus.IN_PROGRESS,
        BatchStatus.FINALIZING,
        BatchStatus.EXPIRED,
    ),
    BatchStatus.CANCELLING: (BatchStatus.IN_PROGRESS, BatchStatus.CANCELLING),
    BatchStatus.CANCELLED: (
        BatchStatus.IN_PROGRESS,
        BatchStatus.CANCELLING,
        BatchStatus.CANCELLED,
    ),
}
"""How a new batch comes to each status."""


@dataclass
class RecordedJobs:
    """A `JobSink` that only remembers."""

    jobs: list[Job] = field(default_factory=list[Job])

    async def enqueue(self, jobs: Sequence[Job], *, connection: object | None = None) -> None:
        self.jobs.extend(jobs)

    def take(self) -> list[Job]:
        """The jobs since the last call."""
        taken, self.jobs = self.jobs, []
        return taken


def new_file(project: Project, name: str = "file-1") -> File:
    return File(
        id=FileId(name),
        project_id=project.id,
        purpose=Purpose.BATCH,
        filename="questions.jsonl",
        bytes=1200,
        sha256="a" * 64,
        blob_key=f"blobs/{name}",
        created_at=NOON,
    )


def new_batch(file: File, name: str = "batch-1") -> Batch:
    return Batch(
        id=BatchId(name),
        project_id=file.project_id,
        status=BatchStatus.VALIDATING,
        endpoint="/v1/chat/completions",
        input_file_id=file.id,
        input_blob_key=file.blob_key,
        completion_window="24h",
        expires_at=CLOSE,
        created_at=NOON,
        parameters={"x-tfy-provider-model": "asked"},
    )


def new_slices(count: int, name: str = "batch-1") -> list[Slice]:
    """Slices of ten requests and a thousand bytes each."""
    return [
        Slice(
            batch_id=BatchId(name),
            index=index,
            start=index * 1000,
            end=(index + 1) * 1000,
            first_line=index * 10 + 1,
            requests=10,
            models=("small", "large"),
        )
        for index in range(count)
    ]


def ids_of(*indexes: int, batch: str = "batch-1") -> list[SliceId]:
    return [slice_id(BatchId(batch), index) for index in indexes]


def ended(claim: ClaimedSlice, *, failed: int = 0) -> SliceReport:
    """The report that each of the ten lines of a slice has its reply, at a token a line."""
    return SliceReport(
        id=claim.slice.id,
        attempt=claim.slice.attempt,
        completed=10 - failed,
        failed=failed,
        usage=Usage(output_tokens=10),
        ends=True,
    )


def so_far(claim: ClaimedSlice, completed: int, *, ends: bool | None = None) -> SliceReport:
    """The report that some lines have a reply."""
    return SliceReport(
        id=claim.slice.id,
        attempt=claim.slice.attempt,
        completed=completed,
        failed=0,
        usage=Usage(output_tokens=completed),
        ends=ends,
    )


def finalize(batch: str = "batch-1") -> Job:
    return Job(kind=JobKind.FINALIZE, id=batch)


async def add_batch(store: Store, name: str = "batch-1", *, project: str = "red") -> Batch:
    """Add a batch in `validating`, with a file of its own."""
    owner = await store.ensure_project(project)
    file = new_file(owner, f"file-of-{name}")
    await store.add_file(file)
    batch = new_batch(file, name)
    await store.add_batch(batch)
    return batch


async def start(
    store: Store, slices: int = 3, name: str = "batch-1", *, project: str = "red"
) -> Batch:
    """Add a batch and bring it to `in_progress`."""
    await add_batch(store, name, project=project)
    return await store.move_batch(
        BatchId(name),
        BatchStatus.IN_PROGRESS,
        now=NOON,
        change=BatchChange(slices=new_slices(slices, name)),
    )


async def move(
    store: Store, *ways: BatchStatus, name: str = "batch-1", now: int = NOON
) -> None:
    for to in ways:
        await store.move_batch(BatchId(name), to, now=now)


async def claim(
    store: Store, ids: Sequence[SliceId], worker_id: str = ALICE, *, now: float = NOON
) -> list[ClaimedSlice]:
    """Claim for a minute."""
    return await store.claim_slices(ids, worker_id=worker_id, lease_s=60, now=now)


async def report(store: Store, *reports: SliceReport, now: float = NOON) -> set[SliceId]:
    return await store.report_slices(reports, lease_s=60, now=now)


async def end_all(store: Store, slices: int = 3) -> None:
    await report(store, *map(ended, await claim(store, ids_of(*range(slices)))))


async def names_of_files(
    store: Store, project_id: ProjectId, *, limit: int = 100, after: str | None = None
) -> list[str]:
    page = Page(limit=limit, after=after)
    files = await store.list_files(project_id, page, purpose=None, newest_first=True)
    return [file.id for file in files]


async def names_of_batches(
    store: Store,
    project_id: ProjectId,
    where: BatchFilter | None = None,
    *,
    limit: int = 100,
    after: str | None = None,
) -> list[str]:
    page = Page(limit=limit, after=after)
    batches = await store.list_batches(project_id, page, where=where or BatchFilter())
    return [batch.id for batch in batches]


class StoreContract:
    """Inherit, and give a `store` fixture that is open, empty and puts its jobs into `jobs`."""

    @pytest.fixture
    def jobs(self) -> RecordedJobs:
        return RecordedJobs()

    @pytest.fixture
    async def red(self, store: Store) -> Project:
        return await store.ensure_project("red")

    @pytest.fixture
    async def blue(self, store: Store) -> Project:
        return await store.ensure_project("blue")

    # Opening and closing

    async def test_an_open_store_answers_a_ping(self, store: Store) -> None:
        await store.ping()

    async def test_closing_twice_does_nothing_more(self, store: Store) -> None:
        await store.close()
        await store.close()

    # Projects and keys

    async def test_a_project_is_made_once_and_found_again(self, store: Store) -> None:
        made = await store.ensure_project("red")

        assert await store.ensure_project("red") == made
        assert made.name == "red"
        assert made.weight == 1
        assert not made.is_background

    async def test_projects_of_two_names_are_two(self, store: Store) -> None:
        red = await store.ensure_project("red")

        assert (await store.ensure_project("blue")).id != red.id

    async def test_a_weight_is_kept_until_another_is_given(self, store: Store) -> None:
        await store.ensure_project("red", weight=3)

        assert (await store.ensure_project("red")).weight == 3
        assert (await store.ensure_project("red", weight=2)).weight == 2

    async def test_a_tier_is_kept_until_another_is_given(self, store: Store) -> None:
        assert not (await store.ensure_project("red")).is_background
        assert (await store.ensure_project("red", is_background=True)).is_background

        assert (await store.ensure_project("red", weight=2)).is_background
        assert not (await store.ensure_project("red", is_background=False)).is_background

    async def test_callers_that_make_one_project_at_once_get_the_same(
        self, store: Store
    ) -> None:
        made = await asyncio.gather(*(store.ensure_project("red") for _ in range(10)))

        assert len(set(made)) == 1

    async def test_a_key_is_found_by_its_digest(self, store: Store, red: Project) -> None:
        key = self.key(red)
        await store.add_key(key, digest="d1")

        assert await store.find_key("d1") == key
        assert await store.find_key("d2") is None

    async def test_a_revoked_key_is_not_found(self, store: Store, red: Project) -> None:
        await store.add_key(self.key(red), digest="d1")

        revoked = await store.revoke_key(KeyId("key-1"), now=NOON + 5)

        assert revoked == replace(self.key(red), revoked_at=NOON + 5)
        assert await store.find_key("d1") is None

    async def test_revoking_a_key_twice_keeps_the_first_time(
        self, store: Store, red: Project
    ) -> None:
        await store.add_key(self.key(red), digest="d1")
        await store.revoke_key(KeyId("key-1"), now=NOON + 5)

        assert (await store.revoke_key(KeyId("key-1"), now=NOON + 9)).revoked_at == NOON + 5

    async def test_a_key_that_is_not_there_cannot_be_revoked(self, store: Store) -> None:
        with pytest.raises(NotFound):
            await store.revoke_key(KeyId("key-1"), now=NOON)

    async def test_adding_a_digest_again_changes_nothing(
        self, store: Store, red: Project
    ) -> None:
        await store.add_key(self.key(red), digest="d1")

        await store.add_key(self.key(red, "key-2"), digest="d1")

        assert await store.list_keys() == [self.key(red)]

    async def test_adding_a_revoked_digest_makes_it_valid_again(
        self, store: Store, red: Project
    ) -> None:
        await store.add_key(self.key(red), digest="d1")
        await store.revoke_key(KeyId("key-1"), now=NOON)

        await store.add_key(self.key(red, "key-2"), digest="d1")

        assert await store.find_key("d1") == self.key(red)

    async def test_keys_are_listed_oldest_first_with_the_revoked(
        self, store: Store, red: Project, blue: Project
    ) -> None:
        await store.add_key(self.key(red, "key-2"), digest="d2")
        await store.add_key(self.key(blue, "key-1"), digest="d1")
        revoked = await store.revoke_key(KeyId("key-2"), now=NOON)

        assert await store.list_keys() == [revoked, self.key(blue, "key-1")]

    @staticmethod
    def key(project: Project, name: str = "key-1") -> ApiKey:
        return ApiKey(
            id=KeyId(name),
            project_id=project.id,
            project=project.name,
            hint="sk-...abcd",
            created_at=NOON,
        )

    # Batches

    async def test_a_batch_comes_back_as_it_was_added(self, store: Store, red: Project) -> None:
        await store.add_file(new_file(red))
        batch = replace(
            new_batch(new_file(red)),
            job_name="nightly",
            metadata={"team": "Zoë", 'a "quoted" key': "\\ \n €"},
            output_life_s=3600,
            model="small",
        )

        await store.add_batch(batch)

        assert await store.get_batch(batch.id) == batch

    async def test_a_new_batch_is_to_be_validated_and_to_expire(
        self, store: Store, jobs: RecordedJobs
    ) -> None:
        await add_batch(store)

        assert jobs.take() == [
            Job(kind=JobKind.VALIDATE, id="batch-1"),
            Job(kind=JobKind.EXPIRE, id="batch-1", due_at=CLOSE),
        ]

    async def test_a_batch_of_a_deleted_file_is_not_added(
        self, store: Store, red: Project, jobs: RecordedJobs
    ) -> None:
        file = new_file(red)
        await store.add_file(file)
        await store.delete_file(red.id, file.id, now=NOON)

        with pytest.raises(NotFound):
            await store.add_batch(new_batch(file))

        assert jobs.take() == []
        with pytest.raises(NotFound):
            await store.get_batch(BatchId("batch-1"))

    async def test_a_batch_of_another_projects_file_is_not_added(
        self, store: Store, red: Project, blue: Project
    ) -> None:
        await store.add_file(new_file(red))

        with pytest.raises(NotFound):
            await store.add_batch(replace(new_batch(new_file(red)), project_id=blue.id))

    async def test_another_projects_batch_is_not_found(
        self, store: Store, blue: Project
    ) -> None:
        batch = await add_batch(store, project="red")

        assert await store.get_batch(batch.id, project_id=batch.project_id) == batch
        with pytest.raises(NotFound, match=r"^No batch found with id 'batch-1'\.$"):
            await store.get_batch(batch.id, project_id=blue.id)
        assert await names_of_batches(store, blue.id) == []

    async def test_batches_are_listed_newest_first_page_by_page(
        self, store: Store, red: Project
    ) -> None:
        for name in ("batch-b", "batch-c", "batch-a"):
            await add_batch(store, name)

        first = await names_of_batches(store, red.id, limit=2)
        await add_batch(store, "batch-d")
        second = await names_of_batches(store, red.id, limit=2, after=first[-1])
        third = await names_of_batches(store, red.id, limit=2, after=second[-1])

        assert (first, second, third) == (["batch-a", "batch-c"], ["batch-b"], [])

    async def test_no_batch_comes_after_one_that_is_not_there(
        self, store: Store, red: Project
    ) -> None:
        await add_batch(store, "batch-1")
        await add_batch(store, "batch-2", project="blue")

        assert await names_of_batches(store, red.id, after="batch-9") == []
        assert await names_of_batches(store, red.id, after="batch-2") == []

    async def test_batches_are_listed_by_status_and_job_name(
        self, store: Store, red: Project
    ) -> None:
        await start(store, name="batch-1")
        await add_batch(store, "batch-2")
        file = await store.get_file(red.id, FileId("file-of-batch-1"))
        await store.add_batch(replace(new_batch(file, "batch-3"), job_name="nightly"))

        async def listed(where: BatchFilter) -> list[str]:
            return await names_of_batches(store, red.id, where)

        assert await listed(BatchFilter(status=BatchStatus.IN_PROGRESS)) == ["batch-1"]
        assert await listed(BatchFilter(job_name="nightly")) == ["batch-3"]
        both = BatchFilter(job_name="nightly", status=BatchStatus.IN_PROGRESS)
        assert await listed(both) == []

    async def test_batches_are_listed_by_all_of_their_metadata(
        self, store: Store, red: Project
    ) -> None:
        file = new_file(red)
        await store.add_file(file)
        for name, metadata in (
            ("batch-1", {"team": "Zoë", "run": "1"}),
            ("batch-2", {"team": "Zoë", "run": "2"}),
            ("batch-3", {'a "quoted" $.key': "\\"}),
            ("batch-4", None),
        ):
            await store.add_batch(replace(new_batch(file, name), metadata=metadata))

        async def listed(metadata: dict[str, str]) -> list[str]:
            return await names_of_batches(store, red.id, BatchFilter(metadata=metadata))

        assert await listed({"team": "Zoë"}) == ["batch-2", "batch-1"]
        assert await listed({"team": "Zoë", "run": "1"}) == ["batch-1"]
        assert await listed({"team": "zoë"}) == []
        assert await listed({"Zoë": "team"}) == []
        assert await listed({'a "quoted" $.key': "\\"}) == ["batch-3"]

    async def test_batches_are_listed_by_the_time_of_their_creation(
        self, store: Store, red: Project
    ) -> None:
        file = new_file(red)
        await store.add_file(file)
        for name, created_at in (("batch-1", NOON), ("batch-2", NOON + 1)):
            await store.add_batch(replace(new_batch(file, name), created_at=created_at))

        async def listed(after: int | None, before: int | None) -> list[str]:
            where = BatchFilter(created_after=after, created_before=before)
            return await names_of_batches(store, red.id, where)

        assert await listed(NOON, None) == ["batch-2", "batch-1"]
        assert await listed(NOON + 1, None) == ["batch-2"]
        assert await listed(None, NOON + 1) == ["batch-1"]
        assert await listed(NOON, NOON) == []

    async def test_unfinished_batches_of_all_projects_are_listed_oldest_first(
        self, store: Store
    ) -> None:
        for status, way in WAYS.items():
            await add_batch(store, f"batch-{status}", project=f"project-{status}")
            await move(store, *way, name=f"batch-{status}")

        assert [batch.status for batch in await store.list_unfinished()] == [
            BatchStatus.VALIDATING,
            BatchStatus.IN_PROGRESS,
            BatchStatus.FINALIZING,
            BatchStatus.CANCELLING,
        ]

    @pytest.mark.parametrize("status", BatchStatus)
    async def test_a_batch_moves_only_as_the_table_says(
        self, store: Store, status: BatchStatus, jobs: RecordedJobs
    ) -> None:
        for to in BatchStatus:
            name = f"batch-{to}"
            await add_batch(store, name)
            await move(store, *WAYS[status], name=name)
            before = await store.get_batch(BatchId(name))
            jobs.take()

            if to in TRANSITIONS[status]:
                await move(store, to, name=name)
                assert (await store.get_batch(BatchId(name))).status is to
            else:
                with pytest.raises(Conflict):
                    await move(store, to, name=name)
                assert await store.get_batch(BatchId(name)) == before
                assert jobs.take() == []

    @pytest.mark.parametrize(
        "status", [status for status in BatchStatus if status is not BatchStatus.VALIDATING]
    )
    async def test_a_move_stamps_its_time(self, store: Store, status: BatchStatus) -> None:
        await add_batch(store)
        await move(store, *WAYS[status][:-1])

        moved = await store.move_batch(BatchId("batch-1"), status, now=NOON + 7)

        assert getattr(moved, f"{status}_at") == NOON + 7
        assert moved == await store.get_batch(BatchId("batch-1"))

    async def test_a_batch_that_is_not_there_cannot_be_moved(self, store: Store) -> None:
        with pytest.raises(NotFound):
            await move(store, BatchStatus.FAILED)

    async def test_a_batch_starts_with_its_slices(self, store: Store) -> None:
        await add_batch(store)
        slices = new_slices(3)

        moved = await store.move_batch(
            BatchId("batch-1"),
            BatchStatus.IN_PROGRESS,
            now=NOON,
            change=BatchChange(model="small", slices=slices),
        )

        assert moved.model == "small"
        assert moved.counts == Counts(total=30)
        assert await store.get_slices(BatchId("batch-1")) == slices

    async def test_a_failed_batch_keeps_its_faults_in_order(self, store: Store) -> None:
        await add_batch(store)
        faults = (
            Fault(code="invalid_json_line", message="Line 2 is no JSON.", line=2),
            Fault(code="missing_required_parameter", message="No `model`.", param="model"),
        )

        failed = await store.move_batch(
            BatchId("batch-1"),
            BatchStatus.FAILED,
            now=NOON,
            change=BatchChange(faults=faults),
        )

        assert failed.faults == faults

    async def test_a_batch_ends_with_its_files(self, store: Store, red: Project) -> None:
        await start(store)
        await move(store, BatchStatus.FINALIZING)
        output = replace(new_file(red, "file-out"), purpose=Purpose.BATCH_OUTPUT)
        error = replace(new_file(red, "file-err"), purpose=Purpose.BATCH_OUTPUT)

        done = await store.move_batch(
            BatchId("batch-1"),
            BatchStatus.COMPLETED,
            now=NOON,
            change=BatchChange(
                output=output,
                error=error,
                counts=Counts(total=30, completed=29, failed=1),
                usage=Usage(total_tokens=5),
            ),
        )

        assert (done.output_file_id, done.error_file_id) == (output.id, error.id)
        assert await store.get_file(red.id, output.id) == output
        assert await store.get_file(red.id, error.id) == error
        assert done.counts == Counts(total=30, completed=29, failed=1)
        assert done.usage == Usage(total_tokens=5)

    @pytest.mark.parametrize("status", [s for s in BatchStatus if WAYS[s]])
    async def test_what_stops_a_batch_lets_its_finalizer_look(
        self, store: Store, status: BatchStatus, jobs: RecordedJobs
    ) -> None:
        await add_batch(store)
        await move(store, *WAYS[status][:-1])
        jobs.take()

        await move(store, status)

        stops = status in (BatchStatus.FINALIZING, BatchStatus.CANCELLING)
        assert jobs.take() == ([finalize()] if stops else [])

    async def test_of_moves_that_race_one_wins(self, store: Store) -> None:
        await start(store)
        ways = [BatchStatus.FINALIZING, BatchStatus.FINALIZING, BatchStatus.FINALIZING]

        moves = await asyncio.gather(*(move(store, to) for to in ways), return_exceptions=True)

        assert [type(outcome) for outcome in moves if outcome] == [Conflict, Conflict]

    async def test_a_move_that_fails_leaves_nothing(
        self, store: Store, red: Project, jobs: RecordedJobs
    ) -> None:
        before = await add_batch(store)
        jobs.take()
        change = BatchChange(
            model="small",
            output=new_file(red, "file-out"),
            slices=[*new_slices(3), new_slices(1)[0]],
        )

        with pytest.raises(Exception):  # noqa: B017 - the database's own, of any kind
            await store.move_batch(before.id, BatchStatus.IN_PROGRESS, now=NOON, change=change)

        assert await store.get_batch(before.id) == before
        assert await store.get_slices(before.id) == []
        assert "file-out" not in await names_of_files(store, red.id)
        assert jobs.take() == []
        await move(store, BatchStatus.IN_PROGRESS)

    # Counts

    async def test_counts_and_usage_are_the_sums_over_the_slices(self, store: Store) -> None:
        await start(store)
        first, second, _ = await claim(store, ids_of(0, 1, 2))

        await report(store, ended(first, failed=2), so_far(second, 4))

        batch = await store.get_batch(BatchId("batch-1"))
        assert batch.counts == Counts(total=30, completed=12, failed=2)
        assert batch.usage == Usage(output_tokens=14)
        assert await store.list_unfinished() == [batch]
        where = BatchFilter()
        assert await store.list_batches(batch.project_id, Page(limit=1), where=where) == [batch]

    async def test_counts_stay_when_the_slices_are_forgotten(self, store: Store) -> None:
        await start(store)
        await end_all(store)
        await move(store, BatchStatus.FINALIZING, BatchStatus.COMPLETED)
        before = await store.get_batch(BatchId("batch-1"))

        await store.forget_slices(BatchId("batch-1"))

        assert before.counts == Counts(total=30, completed=30)
        assert before.usage == Usage(output_tokens=30)
        assert await store.get_batch(BatchId("batch-1")) == before

    async def test_counts_do_not_go_back_when_a_batch_stops(self, store: Store) -> None:
        await start(store)
        [only] = await claim(store, ids_of(0))
        await report(store, so_far(only, 4))

        for status in (BatchStatus.FINALIZING, BatchStatus.CANCELLING, BatchStatus.CANCELLED):
            await move(store, status)
            batch = await store.get_batch(BatchId("batch-1"))
            assert batch.counts == Counts(total=30, completed=4)
            assert batch.usage == Usage(output_tokens=4)

    async def test_counts_that_come_with_the_last_move_replace_the_sums(
        self, store: Store
    ) -> None:
        await start(store)
        await end_all(store)
        counts = Counts(total=30, completed=28, failed=2)

        await store.move_batch(
            BatchId("batch-1"),
            BatchStatus.FINALIZING,
            now=NOON,
            change=BatchChange(counts=Counts(total=30)),
        )
        done = await store.move_batch(
            BatchId("batch-1"),
            BatchStatus.COMPLETED,
            now=NOON,
            change=BatchChange(counts=counts),
        )

        assert done.counts == counts
        assert done.usage == Usage(output_tokens=30)

    async def test_counts_that_come_with_a_move_are_kept_where_slices_know_of_fewer(
        self, store: Store
    ) -> None:
        await start(store)
        counts = Counts(total=30, completed=20, failed=10)

        for status in (BatchStatus.FINALIZING, BatchStatus.CANCELLING, BatchStatus.CANCELLED):
            change = BatchChange(counts=counts, usage=Usage(total_tokens=5))
            await store.move_batch(
                BatchId("batch-1"),
                status,
                now=NOON,
                change=change if status is BatchStatus.FINALIZING else None,
            )
            batch = await store.get_batch(BatchId("batch-1"))
            assert (batch.counts, batch.usage) == (counts, Usage(total_tokens=5))

    async def test_usage_that_comes_with_the_last_move_is_kept_as_it_is(
        self, store: Store
    ) -> None:
        await start(store)
        await move(store, BatchStatus.CANCELLING)

        done = await store.move_batch(
            BatchId("batch-1"),
            BatchStatus.CANCELLED,
            now=NOON,
            change=BatchChange(usage=Usage(total_tokens=5)),
        )

        assert done.usage == Usage(total_tokens=5)

    async def test_counts_do_not_go_back_when_a_later_attempt_has_lost_replies(
        self, store: Store
    ) -> None:
        await start(store)
        [first] = await claim(store, ids_of(0))
        await report(store, so_far(first, 6, ends=False))
        [second] = await claim(store, ids_of(0))

        await report(store, so_far(second, 5))
        assert (await store.get_batch(BatchId("batch-1"))).counts.completed == 6
        await report(store, so_far(second, 7))
        assert (await store.get_batch(BatchId("batch-1"))).counts.completed == 7

    async def test_a_reopened_slice_keeps_what_was_counted_until_it_ends_anew(
        self, store: Store
    ) -> None:
        await start(store, 1)
        await end_all(store, 1)
        await store.reopen_slices(ids_of(0))

        [again] = await claim(store, ids_of(0))
        await report(store, so_far(again, 3))
        assert (await store.get_batch(BatchId("batch-1"))).counts == Counts(
            total=10, completed=10
        )
        await report(store, ended(again, failed=4))
        assert (await store.get_batch(BatchId("batch-1"))).counts == Counts(
            total=10, completed=6, failed=4
        )
