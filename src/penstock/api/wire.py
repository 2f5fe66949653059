"""The shapes on the wire, for the reader of `/openapi.json`, and the way from record to wire.

A record never goes out as it is and a wire object never travels inward: the functions here
name each key once, in OpenAI's order, and give every key of the object on every answer, with
`null` where there is no value. Times are whole seconds, because typed clients decode integers.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field

from penstock.intake import MAX_FILE_LIFE_S, MIN_FILE_LIFE_S
from penstock.model import Batch, Fault, File, Usage
from penstock.service import ModelInfo

Wire = dict[str, object]
"""A JSON object on its way out."""


def answer(
    value: Mapping[str, object], *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """An HTTP answer that holds one JSON object."""
    body = msgspec.json.encode(value)
    return Response(body, status, dict(headers or {}), "application/json")


class ExpiresAfter(BaseModel):
    """When a file is to be deleted."""

    model_config = ConfigDict(strict=True, extra="forbid")

    anchor: Literal["created_at"]
    seconds: int = Field(ge=MIN_FILE_LIFE_S, le=MAX_FILE_LIFE_S)


class BatchRequest(BaseModel):
    """What a client sends to create a batch."""

    model_config = ConfigDict(strict=True, extra="forbid")

    input_file_id: str
    endpoint: str
    completion_window: str | None = None
    job_name: str | None = None
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None


class RequestCountsShape(BaseModel):
    total: int
    completed: int
    failed: int


class BatchErrorShape(BaseModel):
    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrorsShape(BaseModel):
    object: Literal["list"]
    data: list[BatchErrorShape]


class InputTokensShape(BaseModel):
    cached_tokens: int


class OutputTokensShape(BaseModel):
    reasoning_tokens: int


class UsageShape(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensShape
    output_tokens: int
    output_tokens_details: OutputTokensShape
    total_tokens: int


class BatchShape(BaseModel):
    """A batch."""

    model_config = ConfigDict(title="Batch", extra="forbid")

    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    errors: BatchErrorsShape | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCountsShape
    usage: UsageShape
    metadata: dict[str, str] | None
    job_name: str | None


class FileShape(BaseModel):
    """A file."""

    model_config = ConfigDict(title="File", extra="forbid")

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: str | None


class BatchListShape(BaseModel):
    object: Literal["list"]
    data: list[BatchShape]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileListShape(BaseModel):
    object: Literal["list"]
    data: list[FileShape]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFileShape(BaseModel):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


class ModelShape(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelListShape(BaseModel):
    object: Literal["list"]
    data: list[ModelShape]


class ErrorBodyShape(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorShape(BaseModel):
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
