"""The lines of a native run: out to the provider, and its results back into segments."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import structlog

from penstock import clock
from penstock.blobs.base import Blobs
from penstock.blobs.segments import Kind, Segments, SegmentWriter
from penstock.errors import StorageUnavailable
from penstock.executor.keeper import Keeper
from penstock.executor.renaming import rename
from penstock.executor.replies import error_line, reply_line
from penstock.executor.retry import may_pass
from penstock.model import (
    Batch,
    NativeRun,
    Slice,
    SliceStatus,
    Spent,
    Usage,
)
from penstock.request_lines import RequestLine, iter_requests
from penstock.store.base import ClaimedSlice, SliceReport, Store
from penstock.telemetry import Health, WorkStats
from penstock.upstream.base import (
    BatchUpstream,
    Lack,
    NativeJob,
    NativeLine,
    NativeResult,
    Reply,
)

_log = structlog.get_logger()

_FLUSH_BYTES = 1 << 20
_NO_TOKENS = (0, 0, 0, 0, 0)
LACKS = {
    Lack.EXPIRED: (
        "batch_expired",
        "The provider's batch expired before this request was executed.",
    ),
    Lack.CANCELLED: (
        "batch_cancelled",
        "The provider's batch was cancelled before this request was executed.",
    ),
    Lack.LOST: (
        "upstream_result_missing",
        "The provider's batch ended without a result for this request.",
    ),
}
"""Code and message for lines that have no reply."""


def line_name(line: int) -> str:
    """What the provider knows a line by."""
    return f"l{line}"


def parse_line_name(name: str) -> int | None:
    """The line that `line_name` was given; None if it has not made `name`."""
    digits = name[1:]
    if not name.startswith("l") or len(digits) > 15 or not digits.isdecimal():
        return None
    line = int(digits)
    return line if line_name(line) == name else None


def count_up(
    run: NativeRun, slices: Sequence[Slice], batch: Batch, *, longest_input: int | None
) -> Spent | None:
    """What a job took, by the replies that its slices have when it has ended.

    Args:
        slices: All that its run holds: nobody else has written replies into them.

    Returns:
        None if some are gone: a process of a version before has forgotten them.
    """
    if sum(piece.requests for piece in slices) != run.requests:
        return None
    named = {model for piece in slices for model in piece.models}
    return Spent(
        answered=sum(piece.completed for piece in slices),
        usage=sum((piece.usage for piece in slices), Usage()),
        model=batch.asked_model or (named.pop() if len(named) == 1 else None),
        longest_input=longest_input,
    )


class SliceBusy(Exception):
    """Another worker holds a slice of the run."""


async def read_slice(blobs: Blobs, batch: Batch, piece: Slice) -> list[RequestLine]:
    """The lines of a slice, with the model that the batch's client asks for."""
    data = await blobs.get_range(batch.input_blob_key, piece.start, piece.end)
    lines = iter_requests(data, first_line=piece.first_line, models=piece.models)
    return list(rename(lines, batch.asked_model))


class Records:
    """The records of a run's lines, as its upstream wants them; one slice is held at a time."""

    def __init__(
        self,
        *,
        blobs: Blobs,
        batch: Batch,
        slices: Sequence[Slice],
        upstream: BatchUpstream,
        job: NativeJob,
    ) -> None:
        self._blobs = blobs
        self._batch = batch
        self._slices = slices
        self._upstream = upstream
        self._job = job
        self.count = 0
        """How many there are, once they were measured."""
        self.bytes = 0
        """Of all of them, with a line end each."""
        self.is_whole = False
        """Whether the last one was given out: before that, the provider cannot have taken the
        job."""

    async def measure(self) -> None:
        """Find out how many there are: a provider wants to know before it is sent them."""
        self.count = self.bytes = 0
        async for record in self._iterate():
            self.count += 1
            self.bytes += len(record) + 1

    async def read(self) -> AsyncGenerator[bytes]:
        """All of them, in order, but those of lines that cannot be translated."""
        given_out = 0
        async for record in self._iterate():
            given_out += 1
            # Before it is handed over: who knows their number need not ask for more.
            self.is_whole = given_out >= self.count
            yield record

    async def _iterate(self) -> AsyncGenerator[bytes]:
        for piece in self._slices:
            for line in await read_slice(self._blobs, self._batch, piece):
                record = encode(self._upstream, self._job, line)
                if not isinstance(record, Reply):
                    yield record


def encode(upstream: BatchUpstream, job: NativeJob, line: RequestLine) -> bytes | Reply:
    """A line as its provider wants it, or the reply that it gets because that cannot be."""
    named = NativeLine(custom_id=line_name(line.line), body=line.body)
    return upstream.encode(job, named)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What to make of lines without a good reply."""

    leaves_lacking: bool
    """Whether they stay without one, for somebody else to give it."""
    sends_again: bool
    """Whether that goes for lines, too, whose reply tells of a failure that may pass."""
    default: tuple[str, str]
    """Code and message for lines of which nothing is told."""


@dataclass(slots=True, eq=False)
class _Taken:
    """A slice while its results are written."""

    slice: Slice
    writer: SegmentWriter
    custom_ids: dict[int, str]
    durable: asyncio.Event = field(default_factory=asyncio.Event)
    is_lost: bool = False

    def abort(self) -> None:
        self.is_lost = True

    def report(self, *, ends: bool | None) -> SliceReport:
        tally = self.writer.durable
        return SliceReport(
            id=self.slice.id,
            attempt=self.slice.attempt,
            completed=tally.completed,
            failed=tally.failed,
            usage=tally.total_usage(),
            ends=ends,
        )


class Collector:
    """Writes the results of native runs into segments, one run at a time for each call.

    Of a run, the custom IDs of its lines are held in memory, and about 1 MiB of results.
    """

    def __init__(
        self,
        *,
        store: Store,
        blobs: Blobs,
        segments: Segments,
        health: Health,
        stats: WorkStats,
        worker_id: str,
        lease_s: float,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._segments = segments
        self._health = health
        self._stats = stats
        self._worker_id = worker_id
        self._lease_s = lease_s

    async def collect(
        self,
        run: NativeRun,
        batch: Batch,
        *,
        results: AsyncGenerator[NativeResult],
        verdict: Verdict,
        upstream: BatchUpstream,
        job: NativeJob,
    ) -> int | None:
        """Give each line of a run its one result, as far as there is one.

        Safe to repeat: lines that have a reply keep it. What came is kept also if it fails.

        Returns:
            The most input tokens of one line, also of those that had their reply; None if
            nothing was left to do, for then the results were not looked at.

        Raises:
            SliceBusy: Another worker holds a slice of it.
            Exception: Whatever `results` raises.
        """
        pieces = await self._store.get_native_slices(run.id)
        pieces = [piece for piece in pieces if piece.status is not SliceStatus.ENDED]
        if not pieces:
            return None
        keeper = Keeper(
            segments=self._segments,
            gate=asyncio.Event(),
            health=self._health,
            stats=self._stats,
            flush_interval_s=0.0,
            flush_bytes=_FLUSH_BYTES,
        )
        async with self._taken(run, pieces) as taken:
            writing = _Writing(taken, keeper, self._stats, verdict)
            try:
                async with contextlib.aclosing(results):
                    async for result in results:
                        writing.take(result)
                        if writing.waiting_bytes >= _FLUSH_BYTES:
                            await writing.flush()
                for each in taken:
                    await self._fill_up(each, batch, writing, upstream, job)
            finally:
                await writing.flush()
        return writing.longest_input

    async def _fill_up(
        self,
        taken: _Taken,
        batch: Batch,
        writing: "_Writing",
        upstream: BatchUpstream,
        job: NativeJob,
    ) -> None:
        """Say of each line of a slice that has no reply why that is."""
        if len(taken.writer.lines) == taken.slice.requests:
            return
        for line in await read_slice(self._blobs, batch, taken.slice):
            if line.line in taken.writer.lines:
                continue
            refused = encode(upstream, job, line)
            if isinstance(refused, Reply):
                writing.keep(taken, line.line, *reply_line(line.custom_id, refused))
            else:
                writing.explain(taken, line.line)
        if writing.waiting_bytes >= _FLUSH_BYTES:
            await writing.flush()

    @contextlib.asynccontextmanager
    async def _taken(
        self, run: NativeRun, pieces: Sequence[Slice]
    ) -> AsyncGenerator[list[_Taken]]:
        """Hold the slices of a run, and report at the end what they have.

        Raises:
            SliceBusy: Another worker holds one, from the start or at the end.
        """
        batch = await self._store.get_batch(run.batch_id)
        claims = await self._store.claim_slices(
            [piece.id for piece in pieces],
            worker_id=self._worker_id,
            lease_s=self._lease_s,
            now=clock.now(),
            native_run=run.id,
        )
        taken: list[_Taken] = []
        # From now on, for there may be so many that to open them takes longer than a lease.
        extending = asyncio.create_task(self._extend(claims, taken))
        try:
            if len(claims) < len(pieces):
                raise SliceBusy
            for claim in claims:
                taken.append(await self._open(claim, batch))  # noqa: PERF401  (each is let go)
            yield taken
        finally:
            extending.cancel()
            await self._let_go(claims, taken)
        if any(each.is_lost for each in taken):
            raise SliceBusy

    async def _open(self, claim: ClaimedSlice, batch: Batch) -> _Taken:
        piece = claim.slice
        lines = await read_slice(self._blobs, batch, piece)
        place = (piece.batch_id, piece.index, piece.attempt)
        writer = await asyncio.to_thread(self._segments.open, *place, requests=piece.requests)
        return _Taken(piece, writer, {line.line: line.custom_id for line in lines})

    async def _let_go(self, claims: Sequence[ClaimedSlice], taken: Sequence[_Taken]) -> None:
        reports = [each.report(ends=_is_whole(each)) for each in taken if not each.is_lost]
        reports += [_unchanged(claim, ends=False) for claim in claims[len(taken) :]]
        try:
            if reports:
                await self._report(reports, taken)
        finally:
            for each in taken:
                each.writer.close()

    async def _extend(self, claims: Sequence[ClaimedSlice], taken: Sequence[_Taken]) -> None:
        """Extend the leases, and tell how far it has come.

        Args:
            taken: Those of the first claims, as far as they are opened by now.
        """
        while True:
            await asyncio.sleep(self._lease_s / 3)
            reports = [each.report(ends=None) for each in taken if not each.is_lost]
            reports += [_unchanged(claim, ends=None) for claim in claims[len(taken) :]]
            try:
                await self._report(reports, taken)
            except StorageUnavailable as error:
                _log.warning("Leases cannot be extended for now.", error=str(error))

    async def _report(self, reports: Sequence[SliceReport], taken: Sequence[_Taken]) -> None:
        """Report, and note which slices were lost. One that is not opened yet is found to be
        so by its next report."""
        lost = await self._store.report_slices(reports, lease_s=self._lease_s, now=clock.now())
        for name in lost:
            _log.warning("A slice was claimed by another worker meanwhile.", slice_id=name)
        for each in taken:
            each.is_lost = each.is_lost or each.slice.id in lost


class _Writing:
    """The results of one run on their way into the segments of its slices."""

    def __init__(
        self, taken: Sequence[_Taken], keeper: Keeper, stats: WorkStats, verdict: Verdict
    ) -> None:
        self._of_line = {line: each for each in taken for line in each.custom_ids}
        self._lacks: dict[int, Lack] = {}
        self._keeper = keeper
        self._stats = stats
        self._verdict = verdict
        self.waiting_bytes = 0
        self.longest_input = 0

    def take(self, result: NativeResult) -> None:
        """Keep the first result of a line; others, and those of no line, are left aside."""
        if result.reply is not None:
            self.longest_input = max(self.longest_input, result.reply.input_tokens)
        line = parse_line_name(result.custom_id)
        taken = self._of_line.get(line) if line is not None else None
        if taken is None or line is None or line in taken.writer.lines:
            return
        reply = result.reply
        if reply is None:
            self._lacks.setdefault(line, result.lack or Lack.LOST)
        elif reply.is_success or not (self._verdict.sends_again and may_pass(reply)):
            tokens = (
                reply.input_tokens,
                reply.cached_tokens,
                reply.output_tokens,
                reply.reasoning_tokens,
                reply.total_tokens,
            )
            kind, payload = reply_line(taken.custom_ids[line], reply)
            self.keep(taken, line, kind, payload, tokens)

    def explain(self, taken: _Taken, line: int) -> None:
        """Keep why a line has no reply, unless it stays without one."""
        if self._verdict.leaves_lacking:
            return
        lack = self._lacks.get(line)
        code, message = self._verdict.default if lack is None else LACKS[lack]
        self.keep(taken, line, Kind.ERROR, error_line(taken.custom_ids[line], code, message))

    def keep(
        self,
        taken: _Taken,
        line: int,
        kind: Kind,
        payload: bytes,
        tokens: tuple[int, ...] = _NO_TOKENS,
    ) -> None:
        taken.writer.append(line, kind, payload, tokens)
        if kind is Kind.OUTPUT:
            self._stats.completed_lines += 1
        else:
            self._stats.failed_lines += 1
        self._keeper.note(taken, len(payload))
        self.waiting_bytes += len(payload)

    async def flush(self) -> None:
        self.waiting_bytes = 0
        await self._keeper.flush()


def _is_whole(taken: _Taken) -> bool:
    return not taken.writer.is_dirty and len(taken.writer.lines) == taken.slice.requests


def _unchanged(claim: ClaimedSlice, *, ends: bool | None) -> SliceReport:
    """What is to be told of a slice that is not opened."""
    piece = claim.slice
    return SliceReport(
        id=piece.id,
        attempt=piece.attempt,
        completed=piece.completed,
        failed=piece.failed,
        usage=piece.usage,
        ends=ends,
    )
