"""The contract of durable state: projects, keys, files, batches and slices.

One method is one transaction: it happens whole or not at all, and concurrent callers see it
at one moment. The store decides nothing; the rules come from `model`. Times are Unix seconds
and come in as arguments.

Every write about a slice names the attempt it belongs to and changes nothing if the slice has
been claimed since: a late writer is ignored, never merged.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from penstock.model import (
    ApiKey,
    Batch,
    BatchId,
    BatchStatus,
    Counts,
    Delivery,
    DeliveryId,
    DeliveryStatus,
    Fault,
    File,
    FileId,
    Job,
    KeyId,
    NativeRun,
    NativeRunId,
    NativeRunStatus,
    Once,
    Part,
    PartId,
    Project,
    ProjectId,
    Purpose,
    SegmentObject,
    Slice,
    SliceId,
    Spent,
    Upload,
    UploadId,
    UploadStatus,
    Usage,
    Webhook,
)


class JobSink(Protocol):
    """Where the store puts the jobs that a transaction brings forth."""

    async def enqueue(self, jobs: Sequence[Job], *, connection: object | None = None) -> None:
        """Take over `jobs`. A job that is waiting already is not taken twice.

        Args:
            connection: The database connection whose open transaction the jobs belong to;
                None where the store calls only after its commit.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Where in a list to start and how much to give: keyset, newest first."""

    limit: int
    after: str | None = None
    """The ID of the last object that the caller has; None starts at the beginning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFilter:
    """Which batches a list shows; None or empty means all."""

    status: BatchStatus | None = None
    job_name: str | None = None
    metadata: dict[str, str] = field(default_factory=dict[str, str])
    """Each of these keys must have this value."""
    created_after: int | None = None
    """Unix seconds; batches of this second are shown."""
    created_before: int | None = None
    """Unix seconds; batches of this second are not shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchChange:
    """What changes along with a batch's status. None leaves a field as it is."""

    model: str | None = None
    counts: Counts | None = None
    usage: Usage | None = None
    faults: Sequence[Fault] = ()
    slices: Sequence[Slice] = ()
    """Added, all pending. Only on the way to `in_progress`."""
    native_runs: Sequence[NativeRun] = ()
    """Added, each with its `native_poll` job. Those that `slices` name."""
    output: File | None = None
    """Added and named in `output_file_id`."""
    error: File | None = None
    """Added and named in `error_file_id`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """A batch that has slices waiting, as far as the feeder must know it."""

    batch_id: BatchId
    project_id: ProjectId
    weight: int
    expires_at: int
    created_at: int
    is_background: bool = False
    """Whether its project takes only what others leave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedSlice:
    """A slice that one worker alone holds, and what it needs to run it."""

    slice: Slice
    """With `attempt` as raised by this claim."""
    endpoint: str
    input_blob_key: str
    expires_at: int
    """When the batch's completion window closes."""
    project_id: ProjectId
    weight: int
    is_background: bool
    asked_model: str | None = None
    """As `Batch.asked_model`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceReport:
    """How far one attempt at a slice has come. Counts are of the whole slice and durable."""

    id: SliceId
    attempt: int
    completed: int
    failed: int
    usage: Usage
    ends: bool | None = None
    """True: each line has its reply, the slice has ended. False: the worker gives it back
    unfinished. None: the worker goes on, and its lease is extended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetRequest:
    """What a worker asks of an upstream that it shares with others."""

    upstream: str
    max_concurrency: int
    """How many requests all workers together may have in flight."""
    requests_per_minute: int
    """0: no limit."""
    tokens_per_minute: int
    """0: no limit."""
    demand: int
    """How many requests it could have in flight now, had it the upstream to itself."""
    in_flight: int
    """How many it has. It must not have more before it knows its part."""
    refused_at: float | None = None
    """When the upstream last refused it for too much work; None if that is told already."""
    held_until: float | None = None
    """Until when the upstream asked to be left alone; None if it did not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A worker's part of an upstream, until its lease ends."""

    upstream: str
    concurrency: int
    """Up to how many requests in flight it may send another. What it has beyond that may end,
    and is kept from the others until a renewal says that it has."""
    requests_per_minute: float
    """0 with no limit; else above 0 as long as `concurrency` is."""
    tokens_per_minute: float
    """As `requests_per_minute`."""
    refused_at: float | None
    """When the upstream last refused any worker."""
    held_until: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryReport:
    """What one attempt at a delivery brought."""

    id: DeliveryId
    attempt: int
    """Which one it was, from 1; fences the report."""
    at: int
    status: DeliveryStatus
    next_attempt_at: float | None = None
    """None unless `status` is `pending`."""
    status_code: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceTally:
    """How the slices of a batch stand."""

    pending: int = 0
    running: int = 0
    ended: int = 0
    native: int = 0
    """How many of those that have not ended native runs hold."""


class Store(Protocol):
    """Keeps projects, keys, files, batches and slices."""

    async def open(self) -> None:
        """Make ready. Where one machine has the database to itself, bring its schema to this
        version first; safe from two processes at once.

        Raises:
            InvalidSettings: This version of Penstock cannot work with the schema.
        """
        ...

    async def close(self) -> None:
        """Let go of the database. A second call does nothing."""
        ...

    async def read_clock(self) -> float:
        """The time by which leases are measured, the same for all that use this database."""
        ...

    async def ping(self) -> None:
        """Make sure that the database takes writes.

        Raises:
            StorageUnavailable: It does not.
        """
        ...

    # Projects and keys

    async def ensure_project(
        self, name: str, *, weight: int | None = None, is_background: bool | None = None
    ) -> Project:
        """Get the project called `name`, made if it is not there.

        Args:
            weight: Its share of the workers; None keeps the weight it has, or 1.
            is_background: Whether it takes only what others leave; None keeps it as it is, or
                does not.
        """
        ...

    async def add_key(self, key: ApiKey, *, digest: str) -> None:
        """Keep a key under the hex digest of its SHA-256. Does nothing if the digest is there
        and not revoked; a revoked one is made valid again."""
        ...

    async def find_key(self, digest: str) -> ApiKey | None:
        """The key with this digest, unless it is unknown or revoked."""
        ...

    async def list_keys(self) -> list[ApiKey]:
        """All keys, revoked ones too, oldest first."""
        ...

    async def revoke_key(self, key_id: KeyId, *, now: int) -> ApiKey:
        """Make a key invalid from now on. A second call changes nothing.

        Raises:
            NotFound: There is no such key.
        """
        ...

    # Files

    async def add_file(self, file: File, *, once: Once | None = None) -> File:
        """Publish a file whose bytes are durable already.

        Args:
            once: What the request is known by, so that it is carried out once.

        Returns:
            `file`, or the file that an earlier request like this one has made: then nothing
            was added.

        Raises:
            Conflict: `once` has the key of a request that asked for something else.
        """
        ...

    async def get_file(self, project_id: ProjectId, file_id: FileId) -> File:
        """
        Raises:
            NotFound: No such file in this project: `No such File object: <id>`.
        """
        ...

    async def list_files(
        self, project_id: ProjectId, page: Page, *, purpose: Purpose | None, newest_first: bool
    ) -> list[File]:
        """List a project's files by creation.

        Returns:
            Up to `page.limit` files after `page.after`, also where that file was deleted while
            the list was read. If that ID never was, or has long been deleted: an empty list,
            which is what ends the paging of old clients.
        """
        ...

    async def delete_file(
        self, project_id: ProjectId, file_id: FileId, *, now: int
    ) -> File | None:
        """Take a file out of every list.

        Returns:
            The file if its bytes are not needed any more and are to be deleted by the caller;
            None if a batch that is not final still reads them.

        Raises:
            NotFound: No such file in this project.
        """
        ...

    async def unused_blobs(self, keys: Collection[str]) -> set[str]:
        """Which of these blob keys no file and no unfinished batch names."""
        ...

    async def list_expired_files(self, *, now: int, limit: int) -> list[File]:
        """Files of all projects whose `expires_at` is not after `now`."""
        ...

    # Uploads

    async def add_upload(self, upload: Upload, *, once: Once | None = None) -> Upload:
        """Add an upload without parts. `once`, what is returned and raised: as `add_file`."""
        ...

    async def get_upload(self, project_id: ProjectId, upload_id: UploadId) -> Upload:
        """
        Raises:
            NotFound: No such upload in this project: `No such Upload object: <id>`.
        """
        ...

    async def add_part(
        self, project_id: ProjectId, part: Part, *, now: int, once: Once | None = None
    ) -> Part:
        """Add a part whose bytes are durable already. `once` and what is returned: as
        `add_file`.

        Raises:
            NotFound: No such upload in this project.
            Conflict: The upload is not pending or its time is over, or as `add_file` has it.
        """
        ...

    async def list_parts(self, upload_id: UploadId) -> list[Part]:
        """The parts of an upload as they came; none once it has ended."""
        ...

    async def end_upload(
        self,
        upload_id: UploadId,
        to: UploadStatus,
        *,
        now: int,
        part_ids: Sequence[PartId] = (),
        file: File | None = None,
    ) -> Upload:
        """End a pending upload, publish the file it became, forget its parts.

        The caller deletes the bytes of the parts afterwards.

        Returns:
            The upload as it now stands.

        Raises:
            NotFound: There is no such upload.
            Conflict: It is not pending; or it is to be completed and its time is over.
        """
        ...

    async def list_late_uploads(self, *, now: int, limit: int) -> list[Upload]:
        """Pending uploads of all projects whose `expires_at` is not after `now`."""
        ...

    # Batches

    async def add_batch(
        self, batch: Batch, *, once: Once | None = None, needs_file: bool = True
    ) -> Batch:
        """Add a batch in `validating` and enqueue its `validate` and `expire` jobs with it.

        `once`, what is returned and raised: as `add_file`.

        Args:
            needs_file: Whether its input file must be there.

        Raises:
            NotFound: It must, but it has been deleted meanwhile; nothing was added.
        """
        ...

    async def get_batch(
        self, batch_id: BatchId, *, project_id: ProjectId | None = None
    ) -> Batch:
        """Get a batch with its counts and usage so far, which never go back.

        Args:
            project_id: Whose it must be; None asks for no owner.

        Raises:
            NotFound: `No batch found with id '<id>'.`
        """
        ...

    async def list_batches(
        self, project_id: ProjectId, page: Page, *, where: BatchFilter
    ) -> list[Batch]:
        """List a project's batches, newest first. As `list_files` where `after` is unknown."""
        ...

    async def list_unfinished(self) -> list[Batch]:
        """The batches of all projects that are not final, oldest first."""
        ...

    async def move_batch(
        self, batch_id: BatchId, to: BatchStatus, *, now: int, change: BatchChange | None = None
    ) -> Batch:
        """Move a batch to another status, stamp the time, keep what came along.

        All or nothing. Moving to `finalizing` or `cancelling` enqueues its `finalize` job;
        moving to a final status adds a delivery for each webhook of its project that is in
        force, and enqueues its `webhook` job.

        Returns:
            The batch as it now stands.

        Raises:
            Conflict: `TRANSITIONS` has no such move from its present status.
            NotFound: There is no such batch.
        """
        ...

    # Webhooks

    async def set_webhooks(self, in_force: Sequence[Webhook]) -> None:
        """Make these and no others the webhooks in force."""
        ...

    async def list_webhooks(self) -> list[Webhook]:
        """The webhooks in force, in the order of their first appearance."""
        ...

    async def get_delivery(self, delivery_id: DeliveryId) -> Delivery:
        """
        Raises:
            NotFound: There is no such delivery.
        """
        ...

    async def list_deliveries(
        self, page: Page, *, status: DeliveryStatus | None = None
    ) -> list[Delivery]:
        """Deliveries of all projects, newest first; where `after` is unknown, none."""
        ...

    async def list_due_deliveries(self, *, until: float | None) -> list[Job]:
        """The `webhook` jobs of deliveries that are pending.

        Args:
            until: Only those whose next attempt is not later; None lists all.
        """
        ...

    async def report_delivery(self, report: DeliveryReport) -> bool:
        """Keep what an attempt brought and, if it is to be tried again, enqueue its job.

        Returns:
            False if the delivery is not pending, or not at this attempt: nothing was changed.
        """
        ...

    async def replay_delivery(self, delivery_id: DeliveryId, *, now: int) -> Delivery:
        """Make a delivery pending and due at once, whatever became of it, as if it were new.

        Raises:
            NotFound: There is no such delivery.
        """
        ...

    async def forget_ended(self, *, ended_before: int, begun_before: float) -> None:
        """Delete deliveries and uploads that ended before a time, the places of files that
        were deleted before it, and what was kept of creations whose requests arrived before
        another."""
        ...

    # Slices

    async def list_backlog(self, *, now: int) -> list[Backlog]:
        """The batches that have pending slices to be handed out, of all projects.

        A batch is listed if it is `in_progress` and its window is open, or `finalizing` and
        a slice of it was reopened.
        """
        ...

    async def list_pending(
        self, batch_id: BatchId, *, limit: int, share: tuple[int, int] = (0, 1)
    ) -> list[Slice]:
        """The first pending slices of a batch that no native run holds, in input order.

        Args:
            share: `(part, parts)`: only those whose index, divided by `parts`, leaves `part`,
                so that workers which share a batch seldom reach for the same slice.
        """
        ...

    async def get_slices(
        self, batch_id: BatchId, *, after: int = -1, limit: int = 1000
    ) -> list[Slice]:
        """Slices of a batch with an index above `after`, in input order."""
        ...

    async def tally_slices(self, batch_id: BatchId) -> SliceTally:
        """How many slices of a batch stand where."""
        ...

    async def count_pending_lines(self, *, now: int) -> int:
        """How many lines lack their result, of all batches whose lines are run; those of
        native runs, for which no worker can do anything, are not among them."""
        ...

    async def claim_slices(
        self,
        ids: Sequence[SliceId],
        *,
        worker_id: str,
        lease_s: float,
        now: float,
        native_run: NativeRunId | None = None,
    ) -> list[ClaimedSlice]:
        """Claim slices for one worker alone; each claim raises the slice's attempt.

        A slice is due if its batch is `in_progress` or `finalizing` and it is either

        - pending, or
        - running under a lease that has ended: its worker is taken to be dead.

        Args:
            native_run: Claim those that this run holds, also of a batch that is `cancelling`;
                None claims those that no run holds.

        Returns:
            The claimed ones, in the order of `ids`. Those that are not due are left out.
        """
        ...

    async def report_slices(
        self, reports: Sequence[SliceReport], *, lease_s: float, now: float
    ) -> set[SliceId]:
        """Keep how far slices have come, end them, give them back or extend their lease.

        When the last slice of an `in_progress` batch ends, or the last running one of a batch
        that is `cancelling` or past its window stops, the batch's `finalize` job is enqueued.

        Returns:
            The slices whose attempt is not the reported one or that are not running: they
            were lost to another claim, and nothing was changed about them.
        """
        ...

    async def reopen_slices(self, ids: Sequence[SliceId]) -> None:
        """Make ended slices pending again, because replies of theirs are missing."""
        ...

    async def recover_slices(self) -> int:
        """Make all running slices pending: their workers ended with the process.

        Slices of final batches, which the process did not come to forget, are forgotten.
        Only for a store that one process has to itself.

        Returns:
            How many there were.
        """
        ...

    async def release_slices(self, *, now: float) -> int:
        """Make running slices pending whose lease has ended: their workers are taken to be
        dead. Where it was the last running one of a batch that is `cancelling` or past its
        window, the batch's `finalize` job is enqueued.

        Returns:
            How many there were.
        """
        ...

    async def forget_slices(self, batch_id: BatchId) -> None:
        """Delete the slices of a final batch, whose files hold all there is to know, but for
        those that a native run holds: they go when it ends."""
        ...

    # Native runs

    async def get_native_run(self, run_id: NativeRunId) -> NativeRun:
        """
        Raises:
            NotFound: There is no such run.
        """
        ...

    async def list_native_runs(self, batch_id: BatchId) -> list[NativeRun]:
        """The runs of a batch, also those that have ended, in the order of their making."""
        ...

    async def list_native_jobs(self, *, until: float | None) -> list[Job]:
        """The `native_poll` jobs of runs that have not ended.

        Args:
            until: Only those that are due then; None lists all.
        """
        ...

    async def count_native_lines(self) -> dict[tuple[str, NativeRunStatus], int]:
        """How many lines the runs have that have not ended, by upstream and status."""
        ...

    async def sum_native_spent(self) -> dict[str, list[Spent]]:
        """What all runs that have ended took together, by upstream, one for each model and
        one for those of several models. `longest_input` is the longest that is known."""
        ...

    async def get_native_slices(self, run_id: NativeRunId) -> list[Slice]:
        """The slices that a run holds, in input order."""
        ...

    async def keep_native_run(self, run: NativeRun, *, now: float) -> NativeRun | None:
        """Keep how far a run has come, and enqueue its job for when it is due next.

        A run that has ended lets go of its slices, which go with that if their batch is final,
        and the batch's `finalize` job is enqueued.
        The wish to cancel is never taken back: where the store knows of one that `run` does
        not, it stays, and a run that waits or was submitted is due now.

        Args:
            run: With the version that was read.

        Returns:
            The run as it now stands; None if it has been written since: nothing was changed.
        """
        ...

    async def split_native_run(
        self,
        run: NativeRun,
        parts: Sequence[tuple[NativeRun, Sequence[SliceId]]],
        *,
        now: float,
    ) -> bool:
        """Let new runs take over the slices of a run that was not submitted, which ends.

        Returns:
            False if it has been written since: nothing was changed.
        """
        ...

    async def cancel_native_runs(self, batch_id: BatchId, *, now: float) -> None:
        """Want the runs of a batch to stop; those that wait or were submitted are due now.

        What they do meanwhile is not fenced off: a native ID that is on its way can be kept.
        """
        ...

    async def recover_native_runs(self, *, due_at: float) -> list[Job]:
        """Make runs that are being submitted due at a time, if they would be due later: who
        submitted them ended with the process.

        Only for a store that one process has to itself.

        Returns:
            The jobs of all runs that have not ended.
        """
        ...

    # Upkeep

    async def list_lost_jobs(self, *, now: float) -> list[Job]:
        """What batches wait for that the engine should know of: `validate` of those that were
        not read yet, `finalize` of those that are cancelled, past their window, or without a
        slice that is to be run. The oldest first.
        """
        ...

    async def forget_final_slices(self) -> None:
        """Delete the slices of all final batches: of those that nobody came to forget."""
        ...

    # Segments that are objects

    async def add_segment_objects(self, objects: Sequence[SegmentObject]) -> set[SliceId]:
        """Name objects whose bytes are durable already.

        Returns:
            The slices that are not running, or not at the objects' attempt: they were lost to
            another claim, and nothing of them was named.
        """
        ...

    async def replace_segment_objects(self, whole: SegmentObject) -> bool:
        """Name one object in place of all that this attempt at a slice, and those before it,
        have named.

        Returns:
            False if the slice was lost to another claim: nothing was changed.
        """
        ...

    async def list_segment_objects(
        self, batch_id: BatchId, *, first: int = 0, last: int | None = None
    ) -> list[SegmentObject]:
        """The objects of a batch, of the slices from `first` to `last` (None: to the end), by
        slice, attempt and number."""
        ...

    async def forget_segment_objects(self, batch_id: BatchId) -> None:
        """Name no objects of a batch any more."""
        ...

    async def list_segment_batches(self) -> list[BatchId]:
        """The batches of which objects are named."""
        ...

    # Workers and what they share

    async def keep_worker(self, worker_id: str, *, version: str, now: float) -> None:
        """Say that a worker lives."""
        ...

    async def list_workers(self, *, seen_after: float) -> list[str]:
        """The IDs of the workers that were seen after a time, in their order."""
        ...

    async def forget_worker(self, worker_id: str) -> None:
        """Forget a worker that has ended, and the budgets that it held."""
        ...

    async def lease_budgets(
        self, worker_id: str, requests: Sequence[BudgetRequest], *, lease_s: float, now: float
    ) -> list[Budget]:
        """Renew a worker's part of each upstream, by what it and the others can use.

        At no time do the parts of an upstream whose leases have not ended add up to more than
        it may have: who asks for more than is free waits until others have renewed theirs.
        What a worker has in flight is kept for it, as far as it holds it already. How much is
        fair is decided by `shares`.

        Returns:
            In the order of `requests`. A part may be 0.
        """
        ...
