"""The shapes on the wire, for the reader of `/openapi.json`, and the way from record to wire.

A record never goes out as it is and a wire object never travels inward: the functions here
name each key once, in OpenAI's order, and give every key of the object on every answer, with
`null` where there is no value. Times are whole seconds, because typed clients decode integers.
"""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal

import msgspec
from fastapi import Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from penstock.api.lines import spellings
from penstock.intake import MAX_FILE_LIFE_S, MIN_FILE_LIFE_S
from penstock.model import (
    ENDPOINTS,
    UPLOAD_PURPOSES,
    Batch,
    BatchStatus,
    Fault,
    File,
    Part,
    Purpose,
    Upload,
    UploadStatus,
    Usage,
)
from penstock.prices import Cost, CostItem, total
from penstock.service import (
    MAX_JOB_NAME_CHARS,
    MAX_METADATA_KEY_CHARS,
    MAX_METADATA_PAIRS,
    MAX_METADATA_VALUE_CHARS,
    ModelInfo,
)
from penstock.uploads import MAX_MIME_TYPE_CHARS, MAX_UPLOAD_BYTES

Wire = dict[str, object]
"""A JSON object on its way out."""


def answer(
    value: Mapping[str, object], *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """An HTTP answer that holds one JSON object."""
    body = msgspec.json.encode(value)
    return Response(body, status, dict(headers or {}), "application/json")


# What a client sends. Bounds that the service checks, in OpenAI's words, are told by
# `_told`; those of `Field` are checked here.


def _told(**schema: Any) -> Any:
    """Keys of JSON Schema for the documentation alone."""
    return Field(json_schema_extra=schema)


def _as_whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_as_whole)]
"""A whole number in JSON, where 5.0 is one as well."""
STORABLE = "^[^\\x00]*$"
"""A pattern that keeps NUL out, which no database has to take."""
METADATA: dict[str, Any] = {
    "type": "object",
    "maxProperties": MAX_METADATA_PAIRS,
    "propertyNames": {"maxLength": MAX_METADATA_KEY_CHARS, "pattern": STORABLE},
    "additionalProperties": {
        "type": "string",
        "maxLength": MAX_METADATA_VALUE_CHARS,
        "pattern": STORABLE,
    },
}
"""Metadata as JSON Schema."""


class ExpiresAfter(BaseModel):
    """When a file is to be deleted."""

    model_config = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)

    anchor: Literal["created_at"]
    """From when the time is counted: the file's creation."""
    seconds: Whole = Field(ge=MIN_FILE_LIFE_S, le=MAX_FILE_LIFE_S)
    """How long it is kept."""


class BatchRequest(BaseModel):
    """A batch to be created."""

    model_config = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)

    input_file_id: str
    """The file that holds the requests, of purpose `batch`."""
    endpoint: Annotated[
        str, _told(enum=[url for one in ENDPOINTS.values() for url in spellings(one)])
    ]
    """Which endpoint all its requests call; the `/v1` may be left out."""
    completion_window: Annotated[
        str | None, _told(pattern="^[1-9][0-9]{0,9}[smhd]$", examples=["24h"])
    ] = None
    """In which time it is to be done: a whole number and `s`, `m`, `h` or `d`, up to the
    server's limit (`limits.max_completion_window`, 30d). Without it: the server's default
    (`limits.default_completion_window`, 24h)."""
    job_name: Annotated[str | None, _told(maxLength=MAX_JOB_NAME_CHARS, pattern=STORABLE)] = (
        None
    )
    """A name for people."""
    metadata: Annotated[dict[str, str], _told(**METADATA)] | None = None
    """Pairs to find it by."""
    output_expires_after: ExpiresAfter | None = None
    """When its result files are to be deleted; without it after 30 days."""


FILE_FORM: dict[str, Any] = {
    "type": "object",
    "required": ["file", "purpose"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "The content."},
        "purpose": {
            "type": "string",
            "enum": list(UPLOAD_PURPOSES),
            "description": "What it is for. Of purpose `batch` the first line must be a JSON "
            "object.",
        },
        "expires_after[anchor]": {
            "type": "string",
            "enum": ["created_at"],
            "description": "From when the time is counted: the file's creation. "
            "`expires_after.anchor` is taken as well.",
        },
        "expires_after[seconds]": {
            "type": "integer",
            "minimum": MIN_FILE_LIFE_S,
            "maximum": MAX_FILE_LIFE_S,
            "description": "How long it is kept; without it, a file of purpose `batch` is "
            "kept for 30 days and others until they are deleted. `expires_after.seconds` is "
            "taken as well.",
        },
    },
    "dependentRequired": {
        "expires_after[anchor]": ["expires_after[seconds]"],
        "expires_after[seconds]": ["expires_after[anchor]"],
    },
}
"""The form of an upload, which `forms` reads."""


class UploadRequest(BaseModel):
    """An upload to be created."""

    model_config = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)

    bytes: Whole = Field(ge=1, le=MAX_UPLOAD_BYTES)
    """How large the file will be."""
    filename: str
    mime_type: Annotated[str, _told(maxLength=MAX_MIME_TYPE_CHARS, pattern=STORABLE)]
    """The file's media type, such as `text/jsonl`."""
    purpose: Annotated[str, Field(json_schema_extra={"enum": list(UPLOAD_PURPOSES)})]
    """What the file is for."""
    expires_after: ExpiresAfter | None = None
    """When the file is to be deleted; without it as other files of its purpose."""


class CompleteUploadRequest(BaseModel):
    """What the file of an upload is made of."""

    model_config = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)

    part_ids: list[str]
    """The parts, in order."""
    md5: Annotated[str, _told(pattern="^[0-9a-fA-F]{32}$")] | None = None
    """The MD5 that the file must have."""


PART_FORM: dict[str, Any] = {
    "type": "object",
    "required": ["data"],
    "additionalProperties": False,
    "properties": {
        "data": {
            "type": "string",
            "format": "binary",
            "minLength": 1,
            "description": "The bytes of the part.",
        }
    },
}
"""The form of a part, which `forms` reads."""


# What a client is answered.


Count = Annotated[int, Field(ge=0)]


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class RequestCountsShape(_Shape):
    """How many requests a batch has and how they ended; 0 until its file was read."""

    total: Count
    completed: Count
    """Those that were answered with success."""
    failed: Count
    """Those that were not, without those that were never run."""


class BatchErrorShape(_Shape):
    """One thing that is wrong with an input file."""

    code: str
    """What kind of fault it is, such as `invalid_json_line`."""
    message: str
    param: str | None
    """The member of the line that is at fault."""
    line: Annotated[int, Field(ge=1)] | None
    """The line's number, from 1; null if it is about the whole file."""


class BatchErrorsShape(_Shape):
    """All that is wrong with an input file, in line order."""

    object: Literal["list"]
    data: list[BatchErrorShape]


class InputTokensShape(_Shape):
    """Tokens that were sent."""

    cached_tokens: Count


class OutputTokensShape(_Shape):
    """Tokens that were received."""

    reasoning_tokens: Count


class UsageShape(_Shape):
    """Tokens, summed over the requests that were answered so far."""

    input_tokens: Count
    input_tokens_details: InputTokensShape
    output_tokens: Count
    output_tokens_details: OutputTokensShape
    total_tokens: Count


class BatchShape(_Shape):
    """A batch. Times are Unix timestamps in seconds, null for what has not happened."""

    id: str
    object: Literal["batch"]
    endpoint: str
    """As it was written when the batch was created."""
    model: str | None
    """The model of all its requests; null until its file was read, and where they differ."""
    errors: BatchErrorsShape | None
    """What is wrong with its file, if it `failed`; else null."""
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    """The answers; null until it has ended, and if no request succeeded."""
    error_file_id: str | None
    """The failures; null until it has ended, and if there are none."""
    created_at: Count
    in_progress_at: Count | None
    expires_at: Count
    """When its completion window closes."""
    finalizing_at: Count | None
    completed_at: Count | None
    failed_at: Count | None
    expired_at: Count | None
    cancelling_at: Count | None
    cancelled_at: Count | None
    request_counts: RequestCountsShape
    usage: UsageShape
    metadata: dict[str, str] | None
    job_name: str | None


Dollars = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?$", examples=["1.23"])]
"""US dollars, exactly, in decimal digits."""


class CostShape(_Shape):
    """Lines of a batch that were run one way, and what that cost."""

    mode: Literal["native", "lines"]
    """Whether they were given to the provider's batch API, or sent one by one."""
    upstream: str | None
    """Null if it is not known, or several."""
    model: str | None
    """The model that is paid; null if it is not known, or several."""
    jobs: Count
    """How many batches of the provider they were."""
    status: Literal["running", "ended"]
    """Whether the provider's batches have ended and were counted; of `lines`, whether the batch
    has ended."""
    requests: Count
    """How many lines the provider's batches were given; of `lines`, as many as `answered`."""
    answered: Count | None
    """How many have an answer so far; null if it is not known."""
    usage: UsageShape | None
    """What these answers took; null if it is not known."""
    cost: Dollars | None
    """What they cost in US dollars; null if it is not known, and never 0 for that."""
    line_cost: Dollars | None
    """What they would have cost, or did, one by one."""
    at_least: bool
    """Whether it may have been more, because the provider asks more for long lines."""
    source: str | None
    """Where the price comes from: `settings`, or a table of list prices with its version."""


class BatchCostsShape(_Shape):
    """What a batch cost so far, as far as that is known: list prices, or those of the settings.
    It is no bill."""

    object: Literal["batch.costs"]
    batch_id: str
    currency: Literal["usd"]
    cost: Dollars | None
    """All of it so far; null while no line has an answer, if any of it is not known, or a batch
    of a provider has not ended."""
    line_cost: Dollars | None
    """What it would have cost, line by line."""
    at_least: bool
    data: list[CostShape]
    """Empty while no line has an answer and no provider has a batch."""


class FileShape(_Shape):
    """A file. Times are Unix timestamps in seconds."""

    id: str
    object: Literal["file"]
    bytes: Count
    created_at: Count
    expires_at: Count | None
    """When it is deleted; null if it is kept."""
    filename: str
    purpose: Purpose
    status: Literal["processed"]
    """Always so; clients wait for it."""
    status_details: None


class UploadShape(_Shape):
    """An upload in parts. Times are Unix timestamps in seconds."""

    id: str
    object: Literal["upload"]
    bytes: Count
    """How large the file is to be."""
    created_at: Count
    expires_at: Count
    """Until when it can be completed."""
    filename: str
    purpose: Purpose
    status: UploadStatus
    file: FileShape | None
    """The file, once the upload is completed, as long as it is not deleted."""


class UploadPartShape(_Shape):
    """A part of an upload."""

    id: str
    object: Literal["upload.part"]
    created_at: Count
    upload_id: str


class BatchListShape(_Shape):
    """A page of batches, newest first."""

    object: Literal["list"]
    data: list[BatchShape]
    first_id: str | None
    last_id: str | None
    """What to send as `after` for the next page."""
    has_more: bool


class FileListShape(_Shape):
    """A page of files."""

    object: Literal["list"]
    data: list[FileShape]
    first_id: str | None
    last_id: str | None
    """What to send as `after` for the next page."""
    has_more: bool


class DeletedFileShape(_Shape):
    """A file that is gone."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class ModelShape(_Shape):
    """A model that the lines of a batch may name."""

    id: str
    object: Literal["model"]
    created: Literal[0]
    """Not known."""
    owned_by: str
    """The name of the upstream that takes its lines."""


class ModelListShape(_Shape):
    """The models that the upstreams serve now, or that the settings name."""

    object: Literal["list"]
    data: list[ModelShape]


class AliveShape(_Shape):
    """The process runs."""

    status: Literal["ok"]


class ReadyShape(_Shape):
    """The process can work."""

    status: Literal["ok"]
    faults: Annotated[dict[str, str], Field(max_length=0)]
    """Empty."""


class UnreadyShape(_Shape):
    """Something keeps the process from its work."""

    status: Literal["unavailable"]
    faults: Annotated[dict[str, str], Field(min_length=1)]
    """What is wrong, in a sentence each, by the name of the part."""


class ErrorBodyShape(_Shape):
    """What was wrong with a request."""

    message: str
    """For people: the value at fault and what is allowed."""
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    """The parameter at fault, if it is a single one."""
    code: str | None
    """For programs, such as `invalid_value`; null for many errors."""


class ErrorShape(_Shape):
    """What every error looks like."""

    error: ErrorBodyShape


def batch_to_wire(batch: Batch) -> Wire:
    """The `Batch` object of the API."""
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": _faults_to_wire(batch.faults),
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": batch.created_at,
        "in_progress_at": batch.in_progress_at,
        "expires_at": batch.expires_at,
        "finalizing_at": batch.finalizing_at,
        "completed_at": batch.completed_at,
        "failed_at": batch.failed_at,
        "expired_at": batch.expired_at,
        "cancelling_at": batch.cancelling_at,
        "cancelled_at": batch.cancelled_at,
        "request_counts": {
            "total": batch.counts.total,
            "completed": batch.counts.completed,
            "failed": batch.counts.failed,
        },
        "usage": _usage_to_wire(batch.usage),
        "metadata": batch.metadata,
        "job_name": batch.job_name,
    }


def costs_to_wire(batch_id: str, items: Sequence[CostItem]) -> Wire:
    """What a batch cost."""
    return {
        "object": "batch.costs",
        "batch_id": batch_id,
        "currency": "usd",
        **_cost_to_wire(total(items)),
        "data": [
            {
                "mode": "native" if item.is_native else "lines",
                "upstream": item.upstream,
                "model": item.model,
                "jobs": item.jobs,
                "status": "ended" if item.is_over else "running",
                "requests": item.requests,
                "answered": item.answered,
                "usage": None if item.usage is None else _usage_to_wire(item.usage),
                **_cost_to_wire(item.cost),
                "source": item.cost.source,
            }
            for item in items
        ],
    }


def _cost_to_wire(cost: Cost) -> Wire:
    return {
        "cost": _dollars(cost.usd),
        "line_cost": _dollars(cost.by_line_usd),
        "at_least": cost.is_least,
    }


def _dollars(amount: Decimal | None) -> str | None:
    """All digits that count, and no exponent."""
    return None if amount is None else format(amount.normalize(), "f")


def file_to_wire(file: File) -> Wire:
    """The `File` object of the API."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        # Deprecated, but clients wait until a file is "processed".
        "status": "processed",
        "status_details": None,
    }


def upload_to_wire(upload: Upload) -> Wire:
    """The `Upload` object of the API."""
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.bytes,
        "created_at": upload.created_at,
        "expires_at": upload.expires_at,
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.status,
        "file": None if upload.file is None else file_to_wire(upload.file),
    }


def part_to_wire(part: Part) -> Wire:
    """The `UploadPart` object of the API."""
    return {
        "id": part.id,
        "object": "upload.part",
        "created_at": part.created_at,
        "upload_id": part.upload_id,
    }


def model_to_wire(model: ModelInfo) -> Wire:
    """The `Model` object of the API. When a model was made is not known: 0."""
    return {"id": model.id, "object": "model", "created": 0, "owned_by": model.owned_by}


def list_to_wire(data: Sequence[Wire], *, has_more: bool) -> Wire:
    """A page of a list; the IDs are those of its first and last object."""
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }


def _faults_to_wire(faults: Sequence[Fault]) -> Wire | None:
    if not faults:
        return None
    return {
        "object": "list",
        "data": [
            {
                "code": fault.code,
                "message": fault.message,
                "param": fault.param,
                "line": fault.line,
            }
            for fault in faults
        ],
    }


def _usage_to_wire(usage: Usage) -> Wire:
    return {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }
