"""The contracts of the places where lines are sent: one by one, or as a batch of the provider.

What an upstream does to a line, good or bad, is a `Reply`: `LineUpstream.send` raises for
nothing that comes from outside. Whether to try again is decided elsewhere (`executor.retry`).
"""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from enum import StrEnum
from typing import Protocol

import msgspec


class Failure(StrEnum):
    """Why an attempt brought no answer that can be used."""

    UNREACHABLE = "unreachable"  # no connection; the upstream never saw the request
    TIMEOUT = "timeout"  # connected, but the answer was not whole in time
    DISCONNECTED = "disconnected"  # the connection ended before the answer was whole
    INVALID = "invalid"  # a 2xx answer that is not one JSON object, or any that is too long


class Reply(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one attempt at a request brought.

    Either an answer (`failure` is None) or a failure, of which `message` tells. A msgspec
    struct, because one is made for every line and it costs a fifteenth of a dataclass.
    """

    status_code: int | None = None
    """The HTTP status; None if no answer came."""
    body: bytes = b""
    """The answer's body as it came. With a 2xx status and no failure: valid UTF-8, one JSON
    object. With another status: anything."""
    request_id: str | None = None
    """The upstream's own `x-request-id`."""
    retry_after_s: float | None = None
    """How long the upstream asked to wait, in seconds."""
    failure: Failure | None = None
    message: str = ""
    """What went wrong, for a person; empty if nothing did. Never holds a key."""
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    total_tokens: int = 0

    @property
    def is_success(self) -> bool:
        """Whether the line succeeded: a 2xx answer that can be used."""
        return self.failure is None and self.status_code is not None and self.status_code < 300


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What an inference engine tells of itself, summed over its replicas and models."""

    running: int
    """Requests that it works on."""
    waiting: int
    """Requests in its queue."""
    cache_usage: float = 0.0
    """How much of the key-value cache is in use, from 0 to 1; of several the highest."""


class LineUpstream(Protocol):
    """Answers one request at a time; many calls run at once."""

    name: str
    """As the settings call it."""
    max_concurrency: int
    """How many requests it takes at the same time."""

    async def send(self, endpoint: str, body: bytes) -> Reply:
        """Send one request and wait for its answer.

        The body goes out byte for byte. A cancelled call returns at once; the upstream may
        still work on its request until it notices that nobody waits.

        Args:
            endpoint: The endpoint's path with `/v1`, such as `/v1/chat/completions`.
            body: The JSON object of the request, as it stands in the input file.
        """
        ...

    async def list_models(self) -> list[str]:
        """The IDs of the models that it serves now.

        Raises:
            UpstreamDown: It did not answer, or not with a list of models.
        """
        ...

    async def read_load(self) -> EngineLoad | None:
        """What its engine tells of itself now; None if it tells nothing."""
        ...

    async def close(self) -> None:
        """Close all connections. A second call does nothing."""
        ...


# A provider's own batch API


Details = Mapping[str, str]
"""What an adapter wants to be reminded of, such as the name of an uploaded file: a few short
texts, which the caller keeps and gives back as they were."""

Note = Callable[[Details], Awaitable[None]]
"""Keeps details. When it returns they survive the end of the process; a later call replaces
what an earlier one kept."""


class BatchLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a provider takes as one batch."""

    endpoints: frozenset[str]
    """Which endpoints, with `/v1`; lines of others are sent one by one."""
    max_requests: int
    max_bytes: int
    """Of all that the provider counts, in its own form."""
    min_requests: int = 1
    """With fewer, lines are sent one by one."""
    one_model: bool = True
    """Whether all lines must name the same model."""


class NativeJob(msgspec.Struct, frozen=True, kw_only=True):
    """A batch that a provider is to run, as the adapter sees it."""

    key: str
    """Ours, the same for each attempt to submit this job and never used for another: 8 to 36
    of `a-z`, `0-9` and `-`. It must be kept at the provider where `find` finds it: in
    metadata, as a job's or file's name, as a token of idempotency."""
    display_name: str
    """For people who look at the provider's own pages; any text, never empty."""
    endpoint: str
    """With `/v1`, one of `BatchLimits.endpoints`."""
    model: str
    """The model that its lines are run with; of several, the first."""
    requests: int
    """How many lines it has: for `submit`, how many records; else, at least that."""
    bytes: int = 0
    """Of all records with a line end each, so that a body's length can be told before it is
    sent. 0 but for `submit`."""
    expires_at: float
    """When nobody waits for it any more, in Unix seconds."""
    metadata: Mapping[str, str] = {}
    """The client's own, for providers that keep such; what does not fit is left out."""
    parameters: Details = {}
    """What the client's headers say of this provider, such as a bucket; empty with most. The
    model that they name is in place already, here and in the lines."""


class NativeLine(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A line on its way into a job."""

    custom_id: str
    """Made by us, unique in the job: at most 16 of `a-z`, `0-9` and `-`. The client's own may
    be longer and stranger than a provider allows, and never leaves the house."""
    body: bytes
    """The JSON object of the request, in OpenAI's form, as it stands in the input file."""


class NativeState(StrEnum):
    """Where a job stands at its provider, in our words."""

    PENDING = "pending"  # taken, not begun
    RUNNING = "running"  # at work, or being validated, written or cancelled
    ENDED = "ended"  # every line has what it will ever get. Final
    FAILED = "failed"  # given up as a whole. Final
    CANCELLED = "cancelled"  # stopped at somebody's wish; lines may have results. Final
    EXPIRED = "expired"  # not done in the provider's time; lines may have results. Final


FINAL_NATIVE = frozenset(
    {NativeState.ENDED, NativeState.FAILED, NativeState.CANCELLED, NativeState.EXPIRED}
)


class NativeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a provider says of a job."""

    state: NativeState
    completed: int = 0
    """Lines that have succeeded so far, where the provider tells."""
    failed: int = 0
    details: Details = {}
    """What `results` needs to find them, such as the names of files."""
    message: str = ""
    """Why it failed, for a person; empty if it did not. Never holds a key."""
    may_pass: bool = False
    """Of a failed job: whether nothing was run or paid and the same lines may be taken at
    another time, such as when the provider's queue was full."""

    @property
    def is_final(self) -> bool:
        return self.state in FINAL_NATIVE


class Lack(StrEnum):
    """Why a line of a job has no reply."""

    EXPIRED = "expired"  # the provider's time was over first
    CANCELLED = "cancelled"  # the job was cancelled first
    LOST = "lost"  # the provider says so, or what it says cannot be read


class NativeResult(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What became of one line of a job."""

    custom_id: str
    """As it was given. One that nobody gave is left aside by the caller, and so is all but the
    first result of a line."""
    reply: Reply | None = None
    """In OpenAI's form, as `LineUpstream.send` would have brought it: an answer with any
    status, or a failure. None if there is none: then `lack` says why."""
    lack: Lack | None = None


class BatchUpstream(Protocol):
    """Takes many lines as one job and answers hours later: a provider's own batch API.

    An adapter keeps nothing. All that must be remembered of a job is its native ID and its
    `Details`, and the caller keeps both. So each call may be made by another process.

    What a job costs is paid once it is submitted, so the promise that matters is this one:
    after `submit` was called, however it ended, `find` tells whether the provider has the job.
    """

    name: str
    """As the settings call it."""
    limits: BatchLimits
    find_after_s: float
    """How long after a `submit` that brought no answer `find` may be believed, in seconds: for
    providers whose lists lag, or whose answer may have been late."""

    def encode(self, job: NativeJob, line: NativeLine) -> bytes | Reply:
        """A line as the provider's input holds it, without a line end; pure.

        Returns:
            The record, or the reply that the line gets instead because it cannot be
            translated: a 400 whose error names the field.
        """
        ...

    async def submit(self, job: NativeJob, records: AsyncIterator[bytes], note: Note) -> str:
        """Hand a job over. Never called for a key that the provider may have already.

        Reads `records` once, piece by piece; nothing is held whole. The provider cannot take
        the job before they are read to their end; what they raise may come out as any error.

        Args:
            records: What `encode` made of the lines, in their order.
            note: To be called with what `find` or `clean_up` will need before the call by
                which the provider takes the job. What it raises is let through.

        Returns:
            The native ID.

        Raises:
            JobNotTaken: Surely not taken; it may be given again, under the same key.
            JobRefused: Surely not taken, and as it is it never will be.
            UpstreamDown: Nobody knows whether it was taken. Neither does the caller if the
                call is cancelled.
        """
        ...

    async def find(self, job: NativeJob, details: Details, *, since: float) -> str | None:
        """The native ID of the job that was submitted under `job.key`, or None: there is none.

        Args:
            details: What `submit` noted last; empty if it did not come to that.
            since: When the first attempt to submit began, in Unix seconds, so that older jobs
                need not be looked through.

        Raises:
            UpstreamDown: It cannot be told now. To return None then would cost money.
        """
        ...

    async def check(self, job: NativeJob, native_id: str) -> NativeStatus:
        """How a job stands.

        Raises:
            JobRefused: The provider knows no such job (any more).
            UpstreamDown: It cannot be told now.
        """
        ...

    def results(
        self, job: NativeJob, native_id: str, status: NativeStatus
    ) -> AsyncGenerator[NativeResult]:
        """Stream what became of the lines of a job that is final, in any order.

        Lines of which nothing is told are left out. What is cut off raises; the caller begins
        anew, and what came twice counts once.

        Args:
            status: The final one, as `check` gave it.

        Raises:
            JobRefused: They are not to be had (any more).
            UpstreamDown: They cannot be had now, or not all of them.
        """
        ...

    async def cancel(self, job: NativeJob, native_id: str) -> None:
        """Ask the provider to stop; `check` tells when it has. Does nothing if it is final.

        Raises:
            JobRefused: The provider knows no such job, or never stops one.
            UpstreamDown: It did not answer.
        """
        ...

    async def clean_up(self, job: NativeJob, details: Details) -> None:
        """Delete what a job has left at the provider, such as files, once all is collected.

        Args:
            details: What `submit` noted and, over it, what the last status said.

        Raises:
            UpstreamDown: It did not answer. The caller does not insist.
        """
        ...

    async def close(self) -> None:
        """Close all connections. A second call does nothing."""
        ...
