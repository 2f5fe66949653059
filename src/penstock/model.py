"""The nouns, their states and the table of transitions.

Everything here is a value: no input, no output, no clock. Names are the API's where the API
has one; times (`_at`) are Unix timestamps in seconds.

    create ─► validating ─► in_progress ─► finalizing ─► completed
                  │  │          │   │          │   └───► expired
                  │  └► failed  │   │          │
                  └─────────────┴───┴─ cancel ─┴─► cancelling ─► cancelled
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

ProjectId = NewType("ProjectId", str)
KeyId = NewType("KeyId", str)
FileId = NewType("FileId", str)
BatchId = NewType("BatchId", str)
NativeRunId = NewType("NativeRunId", str)
SliceId = NewType("SliceId", str)
"""`<batch id>:<index>`, the name under which a slice travels through the engine."""
UploadId = NewType("UploadId", str)
PartId = NewType("PartId", str)
WebhookId = NewType("WebhookId", str)
DeliveryId = NewType("DeliveryId", str)


class BatchStatus(StrEnum):
    """Where a batch stands. The values are the wire's.

    None of these needs a process to survive: after a crash the engine is refilled from the
    store and each batch goes on from the status it has.
    """

    VALIDATING = (
        "validating"  # created; its file is being read. A crash starts the reading anew
    )
    FAILED = "failed"  # the file had faults; nothing was sent. Final
    IN_PROGRESS = "in_progress"  # its slices are handed to workers
    FINALIZING = "finalizing"  # nothing is sent any more; a crash starts the writing anew
    COMPLETED = "completed"  # every line has its reply, good or bad. Final
    EXPIRED = "expired"  # the completion window closed first. Final
    CANCELLING = "cancelling"  # nothing new is sent; lines in flight may still end
    CANCELLED = "cancelled"  # final


TRANSITIONS: dict[BatchStatus, frozenset[BatchStatus]] = {
    BatchStatus.VALIDATING: frozenset(
        {BatchStatus.IN_PROGRESS, BatchStatus.FAILED, BatchStatus.CANCELLING}
    ),
    BatchStatus.IN_PROGRESS: frozenset({BatchStatus.FINALIZING, BatchStatus.CANCELLING}),
    BatchStatus.FINALIZING: frozenset(
        {BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLING}
    ),
    BatchStatus.CANCELLING: frozenset({BatchStatus.CANCELLED}),
    BatchStatus.FAILED: frozenset(),
    BatchStatus.COMPLETED: frozenset(),
    BatchStatus.EXPIRED: frozenset(),
    BatchStatus.CANCELLED: frozenset(),
}
"""To which statuses a batch may move. A status without a way out is final."""

FINAL = frozenset(status for status, ways_out in TRANSITIONS.items() if not ways_out)


class SliceStatus(StrEnum):
    """Where a slice stands."""

    PENDING = "pending"  # no worker holds it; segments of earlier attempts may exist
    RUNNING = "running"  # a worker holds it, until its lease ends; then it is due again
    ENDED = "ended"  # each of its lines has a reply in the segment of its last attempt


class Purpose(StrEnum):
    """What a file is for. `batch_output` is made by the service only."""

    ASSISTANTS = "assistants"
    BATCH = "batch"
    FINE_TUNE = "fine-tune"
    VISION = "vision"
    USER_DATA = "user_data"
    EVALS = "evals"
    BATCH_OUTPUT = "batch_output"


UPLOAD_PURPOSES = tuple(purpose for purpose in Purpose if purpose is not Purpose.BATCH_OUTPUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """An endpoint that the lines of a batch may call."""

    path: str
    """As clients write it, with `/v1`."""
    required: tuple[str, ...]
    """Body parameters without which no upstream can answer; checked before anything is sent."""


ENDPOINTS: dict[str, Endpoint] = {
    endpoint.path: endpoint
    for endpoint in (
        Endpoint(path="/v1/chat/completions", required=("model", "messages")),
        Endpoint(path="/v1/completions", required=("model", "prompt")),
        Endpoint(path="/v1/responses", required=("model",)),
        Endpoint(path="/v1/embeddings", required=("model", "input")),
        Endpoint(path="/v1/moderations", required=("model", "input")),
        Endpoint(path="/v1/images/generations", required=("model", "prompt")),
        Endpoint(path="/v1/images/edits", required=("model", "prompt")),
        Endpoint(path="/v1/videos", required=("model", "prompt")),
        Endpoint(path="/v1/rerank", required=("model", "query", "documents")),
        Endpoint(path="/v1/score", required=("model",)),
        Endpoint(path="/v1/messages", required=("model", "messages")),
    )
}
"""By path. To add an endpoint, add a row."""


def find_endpoint(url: str) -> Endpoint | None:
    """Find the endpoint that `url` names, with or without its `/v1`; None if there is none."""
    return ENDPOINTS.get(url) or ENDPOINTS.get(f"/v1{url}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """Who owns files, batches and keys."""

    id: ProjectId
    name: str
    weight: int = 1
    """Its share of the workers beside other projects that have work, from 1."""
    is_background: bool = False
    """Whether its lines run only where other projects leave room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key as it is kept: never the key itself."""

    id: KeyId
    project_id: ProjectId
    project: str
    """The project's name."""
    hint: str
    """The first and last characters, enough for a person to tell keys apart."""
    created_at: int
    revoked_at: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A `File` object of the API and where its bytes lie."""

    id: FileId
    project_id: ProjectId
    purpose: Purpose
    filename: str
    bytes: int
    blob_key: str
    created_at: int
    expires_at: int | None = None
    sha256: str = ""
    """Of what was uploaded, in hex; empty if the service made the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Once:
    """What tells a request that creates something from the same request sent again.

    A creation is kept under the fingerprint of what was asked. It answers a later request

    - of the same key, for `KEY_LIFE_S`; another fingerprint under that key is refused;
    - without a key but of the same fingerprint, for `RETRY_LIFE_S`, if that request says that
      it is sent again, or if the creation was asked for by one that says so and that came
      while this one was still at work: a client gave up on this one and has its answer.
    """

    fingerprint: str
    """SHA-256 in hex of all that the client asked for."""
    key: str | None = None
    """The client's `Idempotency-Key`."""
    is_retry: bool = False
    """Whether the client says that it asks again (`x-stainless-retry-count` from 1)."""
    began_at: float
    """When the request arrived."""


KEY_LIFE_S = 86400
"""How long an `Idempotency-Key` is remembered."""
RETRY_LIFE_S = 900
"""How long a creation answers requests that are sent again: longer than the 600 s for which
OpenAI's clients wait before they do."""


class UploadStatus(StrEnum):
    """Where an upload in parts stands. The values are the wire's."""

    PENDING = "pending"  # takes parts, until its hour is over
    COMPLETED = "completed"  # its file is there. Final
    CANCELLED = "cancelled"  # final
    EXPIRED = "expired"  # it was not completed in time. Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A file that arrives in parts."""

    id: UploadId
    project_id: ProjectId
    status: UploadStatus = UploadStatus.PENDING
    purpose: Purpose
    filename: str
    mime_type: str
    bytes: int
    """How large the file is to be, as its uploader said beforehand."""
    file_life_s: int | None = None
    """How long the file is to be kept; None means as long as files of its purpose are."""
    created_at: int
    expires_at: int
    """Until when it can be completed."""
    part_ids: tuple[PartId, ...] = ()
    """The parts that the file was made of, in order; empty before."""
    file: File | None = None
    """The file it became; None before, and once that file was deleted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of an upload and where its bytes lie, until the upload has ended."""

    id: PartId
    upload_id: UploadId
    bytes: int
    blob_key: str
    created_at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens, summed over replies. Missing figures count as 0."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    total_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            reasoning_tokens=self.reasoning_tokens + other.reasoning_tokens,
            total_tokens=self.total_tokens + other.total_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How many lines a batch has and how they ended; `completed + failed <= total`."""

    total: int = 0
    completed: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that is wrong with an input file; an entry of `errors.data`."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None
    """The line's number in the file, from 1; None if it is about the whole file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch as the store keeps it."""

    id: BatchId
    project_id: ProjectId
    status: BatchStatus
    endpoint: str
    """As the client wrote it."""
    input_file_id: FileId
    input_blob_key: str
    """The bytes of the input file, so that a batch outlives the deletion of its `File`; empty
    if there was no such file, which its reader finds out."""
    completion_window: str
    expires_at: int
    created_at: int
    job_name: str | None = None
    metadata: dict[str, str] | None = None
    output_life_s: int | None = None
    """How long its result files are kept, from their creation; None means as long as usual."""
    upstream: str | None = None
    """The upstream that its client chose by name; None: each line goes by its model."""
    parameters: dict[str, str] | None = None
    """What its client's headers say of the provider."""
    model: str | None = None
    """The model of all its lines; None while it is not known and where they differ."""
    faults: tuple[Fault, ...] = ()
    output_file_id: FileId | None = None
    error_file_id: FileId | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    counts: Counts = field(default_factory=Counts)
    usage: Usage = field(default_factory=Usage)

    @property
    def asked_model(self) -> str | None:
        """The model that takes the place of what its lines name; None: each has its own."""
        return asked_model(self.parameters)


PROVIDER_MODEL, BEDROCK_MODEL = "x-tfy-provider-model", "x-tfy-aws-bedrock-model"
"""The headers with which a client names the model of all lines of a batch."""


def asked_model(parameters: Mapping[str, str] | None) -> str | None:
    """The model that a client's headers name; of two, Amazon's."""
    said = parameters or {}
    return said.get(BEDROCK_MODEL) or said.get(PROVIDER_MODEL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Requests of one batch that lie near each other and go the same way: the unit that is
    claimed and counted."""

    batch_id: BatchId
    index: int
    """Its place in the batch, from 0."""
    start: int
    """Offset of its first byte in the input file."""
    end: int
    """Offset after its last byte."""
    first_line: int
    """Number of the first request's line of its range in the input file, from 1."""
    requests: int
    """How many requests it holds; blank lines between them are not counted."""
    models: tuple[str, ...]
    """The models that its requests name, each once. Requests of other models in its range
    belong to other slices of the same range."""
    upstream: str | None = None
    """The upstream that its client chose by name; None: each line goes by its model."""
    native_run: NativeRunId | None = None
    """The native run that holds it: no worker takes it until that lets go."""
    status: SliceStatus = SliceStatus.PENDING
    attempt: int = 0
    """How often it was claimed; fences every write about it."""
    completed: int = 0
    failed: int = 0
    usage: Usage = field(default_factory=Usage)

    @property
    def id(self) -> SliceId:
        return slice_id(self.batch_id, self.index)


def slice_id(batch_id: BatchId, index: int) -> SliceId:
    """The name under which a slice travels through the engine."""
    return SliceId(f"{batch_id}:{index}")


class NativeRunStatus(StrEnum):
    """Where a native run stands with us."""

    WAITING = "waiting"  # its job is to be submitted when it is due
    SUBMITTING = "submitting"  # the provider may have the job: to be found out when it is due
    SUBMITTED = "submitted"  # the provider has the job: to be looked at when it is due
    COLLECTING = "collecting"  # the job is over: its results are to be written to segments
    ENDED = "ended"  # it has let go of its slices. Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What a job of a provider took, counted once, when its results were collected."""

    answered: int
    """How many of its lines have an answer of the provider."""
    usage: Usage
    """What these answers took."""
    model: str | None
    """The model that the provider ran them on; None if there were several."""
    longest_input: int | None
    """The most input tokens of one line, by which some models are paid; None if nobody saw
    all results, as when a process ended in the midst of collecting them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeRun:
    """Slices of one batch that a provider's own batch API runs as one job."""

    id: NativeRunId
    batch_id: BatchId
    upstream: str
    """As the settings call it."""
    model: str
    """The model of its lines; of several, the first."""
    requests: int
    status: NativeRunStatus = NativeRunStatus.WAITING
    submission: int = 1
    """Which job of the provider this is: one that failed before anything ran is followed by
    another."""
    native_id: str | None = None
    """The provider's name for the job; pinned once it is known."""
    begun_at: float | None = None
    """When the first attempt to submit this job began; None before."""
    submitted_at: float | None = None
    due_at: float | None
    """When something is to be done next; nobody touches it before. None once it has ended."""
    attempts: int = 0
    """How often in a row the provider did not answer or did not take the job."""
    cancel_wanted_at: float | None = None
    """Since when it is to stop; None if it is not."""
    details: dict[str, str] = field(default_factory=dict[str, str])
    """What the upstream's adapter wants to be reminded of."""
    outcome: str | None = None
    """How the job ended, in the contract's words; None while it has not."""
    message: str = ""
    """Why it failed; empty if it did not."""
    completed: int = 0
    """As the provider counts while the job runs."""
    failed: int = 0
    spent: Spent | None = None
    """None while it has not ended, and where its results were not to be had."""
    version: int = 0
    """How often it was written; fences every write."""

    @property
    def key(self) -> str:
        """What the provider knows the job by."""
        return f"{self.id}-{self.submission}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentObject:
    """An object that holds replies of one attempt at a slice, where segments are objects."""

    batch_id: BatchId
    index: int
    """The slice's place in the batch."""
    attempt: int
    number: int
    """Its place among those of the attempt, from 0."""
    key: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """A place that is told when batches of a project end."""

    id: WebhookId
    project_id: ProjectId
    url: str


class DeliveryStatus(StrEnum):
    """Where the delivery of an event to a webhook stands."""

    PENDING = "pending"  # waits for its next attempt
    DELIVERED = "delivered"  # the webhook answered 2xx. Final
    FAILED = "failed"  # given up. Final, unless somebody replays it


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """An event on its way to one webhook."""

    id: DeliveryId
    """The `webhook-id` of every attempt."""
    webhook_id: WebhookId
    project_id: ProjectId
    url: str
    batch_id: BatchId
    event: str
    """Such as `batch.completed`."""
    payload: str
    """The body of every attempt, JSON."""
    status: DeliveryStatus = DeliveryStatus.PENDING
    attempts: int = 0
    """How often it was tried since it was queued."""
    created_at: int
    queued_at: int
    """When its time to be tried began: its creation, or the last replay."""
    next_attempt_at: float | None
    """None unless it is pending."""
    ended_at: int | None = None
    last_attempt_at: int | None = None
    last_status_code: int | None = None
    """The HTTP status of the last attempt; None if there was no answer or no attempt yet."""
    last_error: str | None = None
    """Why the last attempt failed, in a sentence; None if it did not."""


class JobKind(StrEnum):
    """What the engine hands out. A job carries an ID and nothing else."""

    VALIDATE = "validate"  # a batch's input file is to be read
    SLICE = "slice"  # a slice is to be run
    FINALIZE = "finalize"  # a batch may be ready to end: see what is missing, write its files
    EXPIRE = "expire"  # a batch's completion window closes
    WEBHOOK = "webhook"  # an event is to be delivered
    NATIVE = "native_poll"  # a native run is to be taken a step further
    SWEEP = "sweep"  # what nothing names is to be deleted


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Work for the engine."""

    kind: JobKind
    id: str
    due_at: float | None = None
    """When it may be handed out; None means at once."""


_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_window(text: str) -> int | None:
    """Read a completion window such as `90s`, `24h` or `7d`.

    Returns:
        Its length in seconds, or None if `text` is not a whole number from 1 followed by
        `s`, `m`, `h` or `d`.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,9})([smhd])", text)
    return int(match[1]) * _UNITS_S[match[2]] if match else None
