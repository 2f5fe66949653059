"""The life of a batch beside its lines: validate, settle, finalize.

`validate` reads the input file once and cuts it into slices. `settle` looks at a batch that
may be ready to end and does the next thing. `finalize` writes the replies in input order into
the output and the error file, counts them, and refuses a gap: a batch of which a line is
missing is not finished, its slice is run again for the lines that are missing.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import groupby
from weakref import WeakValueDictionary

import msgspec
import structlog

from penstock import clock
from penstock.blobs.base import Blobs, Piece
from penstock.blobs.segments import Kind, Segments, SliceReplies
from penstock.engine.base import Engine
from penstock.errors import Conflict, NotFound, PenstockError, StorageUnavailable
from penstock.executor.native_plan import NativePlanner
from penstock.executor.partial import iter_slices
from penstock.executor.replies import BATCH_CANCELLED, BATCH_EXPIRED, error_line
from penstock.jsonl import CheckedInput, InputChecker, InputRules
from penstock.model import (
    FINAL,
    Batch,
    BatchId,
    BatchStatus,
    Counts,
    Fault,
    File,
    FileId,
    Job,
    JobKind,
    Purpose,
    Slice,
    SliceId,
    SliceStatus,
    Usage,
    find_endpoint,
)
from penstock.request_lines import iter_requests
from penstock.store.base import BatchChange, SliceTally, Store
from penstock.telemetry import WorkStats

_log = structlog.get_logger()

_AGAIN_S = 1.0
_AT_ONCE = 2
"""How many input files are read, and how many batches written, at the same time."""


class Step(Enum):
    """What a batch that may be ready to end needs next."""

    WAIT = auto()  # for its slices, or it has ended
    STOP = auto()  # its running slices and native runs, then wait for them
    WRITE = auto()  # its files


def next_step(batch: Batch, tally: SliceTally, *, now: float) -> Step:
    """Decide what a batch needs next."""
    unfinished = tally.pending + tally.running
    held = tally.running + tally.native
    match batch.status:
        case BatchStatus.CANCELLING:
            return Step.STOP if held else Step.WRITE
        case BatchStatus.IN_PROGRESS | BatchStatus.FINALIZING:
            if not unfinished:
                return Step.WRITE
            if now < batch.expires_at:
                return Step.WAIT
            return Step.STOP if held else Step.WRITE
        case _:
            return Step.WAIT


def ending(batch: Batch, *, is_whole: bool) -> BatchStatus:
    """Which final status a batch gets whose files are written.

    Args:
        is_whole: Whether every line has a reply.
    """
    if batch.status is BatchStatus.CANCELLING:
        return BatchStatus.CANCELLED
    return BatchStatus.COMPLETED if is_whole else BatchStatus.EXPIRED


@dataclass(frozen=True, slots=True, kw_only=True)
class LifecycleOptions:
    """How input files are read and result files kept."""

    max_requests: int
    max_line_bytes: int
    max_embedding_inputs: int
    """The most inputs of all lines of a batch that asks for embeddings."""
    max_faults: int
    one_model: bool
    """Whether all lines of a batch must name the same model."""
    slice_requests: int
    slice_bytes: int
    file_retention_s: int
    """How long output and error files are kept, from their creation, unless a batch says
    otherwise."""
    served_models: tuple[str, ...]
    """The models that the upstreams serve, by name or pattern: told to who names another."""


class _Gap(PenstockError):
    """Replies are missing that were counted: the slices whose they are."""

    def __init__(self, slices: list[SliceId]) -> None:
        super().__init__(f"{len(slices)} slices lack replies.")
        self.slices = slices


@dataclass(slots=True)
class _Found:
    """What the segments of a slice hold."""

    piece: Slice
    completed: int
    failed: int
    usage: Usage

    @property
    def missing(self) -> int:
        return self.piece.requests - self.completed - self.failed

    def has(self, kind: Kind) -> bool:
        """Whether any of its lines goes into this result file."""
        return bool(self.completed if kind is Kind.OUTPUT else self.failed or self.missing)


class Lifecycle:
    """Takes batches from status to status.

    Args:
        accepts_model: Whether an upstream serves a model; the second is the name of one that
            the client chose, or None.
        feed: Called when a batch has new slices to hand out.
    """

    def __init__(
        self,
        *,
        store: Store,
        blobs: Blobs,
        segments: Segments,
        engine: Engine,
        accepts_model: Callable[[str, str | None], bool],
        options: LifecycleOptions,
        feed: Callable[[], None],
        stats: WorkStats,
        natives: NativePlanner,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._segments = segments
        self._engine = engine
        self._natives = natives
        self._accepts_model = accepts_model
        self._options = options
        self._feed = feed
        self._stats = stats
        self._reading = asyncio.Semaphore(_AT_ONCE)
        self._writing = asyncio.Semaphore(_AT_ONCE)
        self._settling: WeakValueDictionary[BatchId, asyncio.Lock] = WeakValueDictionary()

    # Validate

    async def validate(self, batch_id: str, stop: asyncio.Event) -> None:
        """Read a batch's input file. The engine's handler for `validate` jobs."""
        del stop  # a cancelled batch is noticed when its status is to be moved
        await self._until_stored(lambda: self._validate(BatchId(batch_id)))

    async def _validate(self, batch_id: BatchId) -> None:
        batch = await self._store.get_batch(batch_id)
        if batch.status is not BatchStatus.VALIDATING:
            return
        try:
            async with self._reading:
                checked = await self._check(batch) if batch.input_blob_key else None
        except NotFound as error:
            _log.error("An input file is gone.", batch_id=batch_id, error=str(error))
            checked = _refused(
                f"The bytes of file {batch.input_file_id} are gone from this server's storage. "
                "Upload it again, or have whoever runs the server put them back."
            )
        if checked is None:
            checked = _refused(
                f"Cannot find file {batch.input_file_id}, or organization {batch.project_id} "
                "does not have access to it."
            )
        now = int(clock.now())
        try:
            if checked.faults:
                change = BatchChange(faults=checked.faults)
                await self._store.move_batch(
                    batch_id, BatchStatus.FAILED, now=now, change=change
                )
                self._stats.count_batch(BatchStatus.FAILED)
                _log.info(
                    "An input file has faults.", batch_id=batch_id, faults=len(change.faults)
                )
                await self._tidy(batch)
                return
            planned = self._natives.plan(batch, checked.slices, now=now)
            named = checked.models[0] if len(checked.models) == 1 else None
            change = BatchChange(
                model=batch.asked_model or named,
                counts=Counts(total=checked.total),
                slices=planned.slices,
                native_runs=planned.runs,
            )
            await self._store.move_batch(
                batch_id, BatchStatus.IN_PROGRESS, now=now, change=change
            )
        except Conflict:
            return  # it was cancelled meanwhile
        self._stats.count_batch(BatchStatus.IN_PROGRESS)
        _log.info("A batch begins.", batch_id=batch_id, requests=checked.total)
        self._feed()
        await self._settle(batch_id)

    async def _check(self, batch: Batch) -> CheckedInput:
        options = self._options
        checker = InputChecker(
            InputRules(
                endpoint=find_endpoint(batch.endpoint),
                max_requests=options.max_requests,
                max_line_bytes=options.max_line_bytes,
                max_embedding_inputs=options.max_embedding_inputs,
                max_faults=options.max_faults,
                one_model=options.one_model,
                slice_requests=options.slice_requests,
                slice_bytes=options.slice_bytes,
                accepts_model=lambda model: self._accepts_model(model, batch.upstream),
                served_models=options.served_models,
                way_of=self._natives.ways(batch),
            )
        )
        while True:
            async for piece in self._blobs.stream(batch.input_blob_key):
                checker.feed(piece)
            if (checked := checker.finish()) is not None:
                return checked

    # Settle

    async def settle(self, batch_id: str, stop: asyncio.Event) -> None:
        """Do the next thing for a batch. The handler for `finalize` jobs."""
        del stop
        await self._until_stored(lambda: self._settle(BatchId(batch_id)))

    async def expire(self, batch_id: str, stop: asyncio.Event) -> None:
        """Have a batch looked at whose window has closed. The handler for `expire` jobs.

        By a `finalize` job, of which there is one at a time, whichever process does it.
        """
        del stop
        job = Job(kind=JobKind.FINALIZE, id=batch_id)
        await self._until_stored(lambda: self._engine.enqueue([job]))

    async def _settle(self, batch_id: BatchId) -> None:
        # Validation may find the batch ready to end as its own job does: one would miss the
        # replies that the other has copied and deleted.
        lock = self._settling.setdefault(batch_id, asyncio.Lock())
        async with lock:
            await self._settle_alone(batch_id)

    async def _settle_alone(self, batch_id: BatchId) -> None:
        batch = await self._store.get_batch(batch_id)
        if batch.status in FINAL:
            return
        tally = await self._store.tally_slices(batch_id)
        step = next_step(batch, tally, now=clock.now())
        if step is Step.STOP:
            self._feed()  # which must not hand out its slices any more
            await self._engine.cancel(
                [
                    Job(kind=JobKind.SLICE, id=piece.id)
                    async for piece in iter_slices(self._store, batch_id)
                    if piece.status is not SliceStatus.ENDED
                ]
            )
            if tally.native:
                await self._store.cancel_native_runs(batch_id, now=clock.now())
        elif step is Step.WRITE:
            try:
                if batch.status is BatchStatus.IN_PROGRESS:
                    batch = await self._store.move_batch(
                        batch_id, BatchStatus.FINALIZING, now=int(clock.now())
                    )
                async with self._writing:
                    is_done = await self._finalize(batch)
            except Conflict:
                # A cancel came in between; its own job looks again.
                return
            if not is_done:
                await self._settle_alone(batch_id)

    async def _until_stored(self, attempt: Callable[[], Awaitable[None]]) -> None:
        """Try again every second while disk or database take nothing."""
        while True:
            try:
                await attempt()
                return
            except NotFound:
                return  # deleted meanwhile
            except (StorageUnavailable, OSError) as error:
                _log.error("A batch cannot go on for now; trying again.", error=str(error))
                await asyncio.sleep(_AGAIN_S)

    # Finalize

    async def _finalize(self, batch: Batch) -> bool:
        """Write a batch's files and end it.

        Returns:
            False if replies were missing: their slices are open again, and nothing was kept.
        """
        found = [await self._find(piece) async for piece in iter_slices(self._store, batch.id)]
        completed = sum(each.completed for each in found)
        failed = sum(each.failed for each in found)
        missing = sum(each.missing for each in found)
        written: list[File] = []
        try:
            output = error = None
            if completed:
                output = await self._write(batch, found, Kind.OUTPUT)
                written.append(output)
            if failed or missing:
                error = await self._write(batch, found, Kind.ERROR)
                written.append(error)
                if not error.bytes:  # lines whose input is gone cannot be named
                    written.remove(error)
                    await self._drop([error])
                    error = None
            total = completed + failed + missing
            change = BatchChange(
                counts=Counts(total=total, completed=completed, failed=failed),
                usage=sum((each.usage for each in found), Usage()),
                output=output,
                error=error,
            )
            status = ending(batch, is_whole=not missing)
            ended = await self._store.move_batch(
                batch.id, status, now=int(clock.now()), change=change
            )
        except _Gap as gap:
            await self._drop(written)
            if (await self._store.get_batch(batch.id)).status in FINAL:
                return True  # another process has ended it, and deleted its replies
            _log.error(
                "Kept replies are damaged; their lines are sent again.", slices=gap.slices
            )
            await self._store.reopen_slices(gap.slices)
            self._feed()
            return False
        except Exception:
            await self._drop(written)
            raise
        self._stats.count_batch(status)
        _log.info(
            "A batch has ended.",
            batch_id=batch.id,
            status=status.value,
            completed=completed,
            failed=failed,
            never_run=missing,
        )
        await self._tidy(ended)
        return True

    async def _find(self, piece: Slice) -> _Found:
        """How many replies a slice has: as the store says if it has ended, else as is kept."""
        if piece.status is SliceStatus.ENDED:
            return _Found(piece, piece.completed, piece.failed, piece.usage)

        def look() -> _Found:
            with self._segments.read(piece.batch_id, piece.index) as replies:
                tally = replies.tally()
                return _Found(piece, tally.completed, tally.failed, tally.total_usage())

        return await asyncio.to_thread(look)

    async def _write(self, batch: Batch, found: list[_Found], kind: Kind) -> File:
        name = "output" if kind is Kind.OUTPUT else "error"
        file_id = FileId(f"file-{secrets.token_hex(16)}")
        key = f"files/{file_id}"

        walk = self._walk(batch, found, kind, asyncio.get_running_loop())
        size = await self._blobs.put_made(key, walk)
        now = int(clock.now())
        return File(
            id=file_id,
            project_id=batch.project_id,
            purpose=Purpose.BATCH_OUTPUT,
            filename=f"{batch.id}_{name}.jsonl",
            bytes=size,
            blob_key=key,
            created_at=now,
            expires_at=now + (batch.output_life_s or self._options.file_retention_s),
        )

    def _walk(
        self,
        batch: Batch,
        found: list[_Found],
        kind: Kind,
        loop: asyncio.AbstractEventLoop,
    ) -> Iterator[Sequence[Piece]]:
        """The lines of one result file, in input order. For a thread beside the loop.

        Raises:
            _Gap: At the end, if replies are missing.
        """
        gaps: list[SliceId] = []
        wanted = (each for each in found if each.has(kind))
        # Slices of one range of the input hold lines that lie between each other.
        for _, block in groupby(wanted, key=lambda each: each.piece.start):
            each_of_block = list(block)
            opened = [self._open(each) for each in each_of_block]
            with SliceReplies.of_all([each for each in opened if each is not None]) as replies:
                gaps += [
                    each.piece.id
                    for each, its in zip(each_of_block, opened, strict=True)
                    if its is None
                ]
                if gaps:
                    continue
                never_run: dict[int, bytes] = {}
                for each in each_of_block:
                    if kind is Kind.ERROR and each.missing:
                        asked = self._never_run(batch, each.piece, replies.lines)
                        never_run |= asyncio.run_coroutine_threadsafe(asked, loop).result()
                yield from replies.iter_results(kind, others=never_run)
        if gaps:
            raise _Gap(gaps)

    def _open(self, found: _Found) -> SliceReplies | None:
        """Open the replies of a slice; None if they are not those that were counted."""
        piece = found.piece
        attempt = piece.attempt if piece.status is SliceStatus.ENDED else None
        replies = self._segments.read(piece.batch_id, piece.index, attempt=attempt)
        tally = replies.tally()
        if (tally.completed, tally.failed) == (found.completed, found.failed):
            return replies
        replies.close()
        return None

    async def _never_run(
        self, batch: Batch, piece: Slice, have: Collection[int]
    ) -> dict[int, bytes]:
        """Error lines for the requests of a slice that have no reply, by line."""
        is_cancelled = batch.status is BatchStatus.CANCELLING
        code, message = BATCH_CANCELLED if is_cancelled else BATCH_EXPIRED
        try:
            data = await self._blobs.get_range(batch.input_blob_key, piece.start, piece.end)
            return {
                request.line: error_line(request.custom_id, code, message)
                for request in iter_requests(
                    data, first_line=piece.first_line, models=piece.models
                )
                if request.line not in have
            }
        except (NotFound, msgspec.DecodeError) as error:
            # Somebody took or changed the input file: its lines cannot be named any more.
            _log.error("An input file is gone.", batch_id=batch.id, error=str(error))
            return {}

    async def _drop(self, files: list[File]) -> None:
        """Delete result files, unless the batch names them after all: a transaction may have
        been kept although its answer was lost."""
        unused = await self._store.unused_blobs([file.blob_key for file in files])
        await self._blobs.delete(list(unused))

    async def _tidy(self, batch: Batch) -> None:
        """Delete what a final batch needs no more."""
        await self._engine.cancel([Job(kind=JobKind.EXPIRE, id=batch.id)])
        await asyncio.to_thread(self._segments.delete, batch.id)
        await self._store.forget_slices(batch.id)
        if batch.input_blob_key:
            unused = await self._store.unused_blobs([batch.input_blob_key])
            await self._blobs.delete(list(unused))


def _refused(message: str) -> CheckedInput:
    """What is said of an input file that cannot be read."""
    fault = Fault(code="invalid_request", message=message, param="file_id")
    return CheckedInput(total=0, faults=[fault], slices=[], models=[], endpoint=None)
