"""Batches: create, look up, cancel, read the results."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from penstock.api.auth import AskedService, AskingProject
from penstock.api.bodies import parse_json, read_json
from penstock.api.idempotency import AskedOnce
from penstock.api.lines import RESULT_LINE
from penstock.api.operations import Answer, Schema
from penstock.api.wire import (
    METADATA,
    STORABLE,
    BatchRequest,
    answer,
    batch_to_wire,
    costs_to_wire,
    list_to_wire,
)
from penstock.errors import InvalidRequest
from penstock.model import BEDROCK_MODEL, PROVIDER_MODEL, BatchStatus
from penstock.refusals import wrong_type
from penstock.service import MAX_JOB_NAME_CHARS, PROVIDER_NAME, ProviderHeaders
from penstock.store.base import BatchFilter

METADATA_HEADER = "x-tfy-metadata"
PROVIDER_HEADERS = (
    PROVIDER_MODEL,
    BEDROCK_MODEL,
    "x-tfy-vertex-storage-bucket-name",
    "x-tfy-vertex-region",
    "x-tfy-aws-s3-bucket",
    "x-tfy-azure-api-version",
)
"""What TrueFoundry's clients say of a provider, beside its name."""
MAX_HEADER_VALUE_CHARS = 128
MAX_TIME = 253_402_300_799
"""The last second of the year 9999, Unix time."""
_JSONL_TYPES = ("application/jsonl", "application/x-ndjson")

METADATA_PARAMETER: Schema = {
    "name": METADATA_HEADER,
    "in": "header",
    "description": "More pairs of metadata, as TrueFoundry's clients send them; those of the "
    "body win, and together there are as many as the body alone may have.",
    "content": {
        "application/json": {
            "schema": METADATA
            | {
                "additionalProperties": {
                    "type": "string",
                    "maxLength": MAX_HEADER_VALUE_CHARS,
                    "pattern": STORABLE,
                }
            }
        }
    },
}
METADATA_FILTER: Schema = {
    "name": "metadata",
    "in": "query",
    "style": "deepObject",
    "explode": True,
    "description": "Only batches that have each of these pairs: `metadata[key]=value`.",
    "schema": METADATA,
}
AskedId = Annotated[str, Path(description="The batch's ID.")]
OUTPUT_ANSWER = Answer(
    description="The result lines of the batch, so far or final.",
    content={
        "application/json": {"type": "array", "items": RESULT_LINE},
        **{
            media_type: {
                "type": "string",
                "description": "One `BatchOutputLine` or `BatchErrorLine` a line.",
            }
            for media_type in _JSONL_TYPES
        },
    },
)


async def create_batch(
    *,
    request: Request,
    service: AskedService,
    project: AskingProject,
    asked: AskedOnce,
    x_tfy_metadata: Annotated[str | None, Header(include_in_schema=False)] = None,
    x_tfy_provider_name: Annotated[
        str | None,
        Header(
            description="The upstream that is to take all lines, where the project may choose "
            "one; else it is not read."
        ),
    ] = None,
    x_tfy_provider_model: Annotated[
        str | None,
        Header(
            description="The model with which that upstream is to run all lines, in place of "
            "those that they name."
        ),
    ] = None,
) -> Response:
    """Create a batch.

    It is answered at once, with status `validating`; what is wrong with its file is found
    later, and then stands in `errors`.
    """
    del x_tfy_provider_model  # read with the other headers for providers
    body = await read_json(request, BatchRequest)
    batch = await service.create_batch(
        project,
        input_file_id=body.input_file_id,
        endpoint=body.endpoint,
        completion_window=body.completion_window,
        job_name=body.job_name,
        metadata=body.metadata,
        default_metadata=_read_metadata_header(x_tfy_metadata),
        output_life_s=body.output_expires_after and body.output_expires_after.seconds,
        provider=_read_provider(request, x_tfy_provider_name),
        asked=asked,
    )
    return answer(batch_to_wire(batch))


async def list_batches(
    *,
    request: Request,
    service: AskedService,
    project: AskingProject,
    after: Annotated[
        str | None, Query(description="The last batch of the page before, by its ID.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="How many to list at most.")] = 20,
    status: Annotated[
        BatchStatus | None, Query(description="Only batches that stand so.")
    ] = None,
    job_name: Annotated[
        str | None,
        Query(
            description="Only batches of this very name.",
            json_schema_extra={"maxLength": MAX_JOB_NAME_CHARS, "pattern": STORABLE},
        ),
    ] = None,
    created_after: Annotated[
        int | None,
        Query(ge=0, le=MAX_TIME, description="Only batches created later, in Unix seconds."),
    ] = None,
    created_before: Annotated[
        int | None,
        Query(ge=0, le=MAX_TIME, description="Only batches created before, in Unix seconds."),
    ] = None,
) -> Response:
    """List batches, newest first.

    The next page is asked for with the last ID as `after`; an `after` that is not there gives
    an empty page.
    """
    where = BatchFilter(
        status=status,
        job_name=job_name,
        metadata=_asked_metadata(request),
        created_after=created_after,
        created_before=created_before,
    )
    listing = await service.list_batches(project, after=after, limit=limit, where=where)
    data = [batch_to_wire(batch) for batch in listing.items]
    return answer(list_to_wire(data, has_more=listing.has_more))


async def get_batch(
    batch_id: AskedId, service: AskedService, project: AskingProject
) -> Response:
    """Look up a batch."""
    return answer(batch_to_wire(await service.get_batch(project, batch_id)))


async def cancel_batch(
    batch_id: AskedId, service: AskedService, project: AskingProject
) -> Response:
    """Cancel a batch.

    Nothing new is sent, and what has ended is kept. A second call changes nothing; a batch
    that has ended otherwise cannot be cancelled.
    """
    # Clients send an empty body under any content type, so it is not looked at.
    return answer(batch_to_wire(await service.cancel_batch(project, batch_id)))


async def get_batch_costs(
    batch_id: AskedId, service: AskedService, project: AskingProject
) -> Response:
    """Look up what a batch cost.

    So far or in all, told apart by how its lines were run. A price that is not known is null.
    """
    return answer(costs_to_wire(batch_id, await service.get_costs(project, batch_id)))


async def get_batch_output(
    batch_id: AskedId, request: Request, service: AskedService, project: AskingProject
) -> Response:
    """Read the results of a batch.

    So far or final, good and bad: a JSON array, or JSON Lines if `Accept` names
    `application/jsonl` or `application/x-ndjson`.
    """
    lines = await service.open_output(project, batch_id)
    accepted = request.headers.get("accept", "").lower()
    for media_type in _JSONL_TYPES:
        if media_type in accepted:
            return StreamingResponse(lines, media_type=media_type)
    return StreamingResponse(_as_array(lines), media_type="application/json")


async def _as_array(lines: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """JSON Lines in pieces of any size as one JSON array."""
    yield b"["
    line_end = b""
    async for piece in lines:
        text = line_end + piece
        # A line's end is held back until it is known that another line follows. In JSONL a
        # newline is never anything else.
        line_end = b"\n" if text.endswith(b"\n") else b""
        yield text.removesuffix(b"\n").replace(b"\n", b",\n")
    yield b"]"


def _read_provider(request: Request, name: str | None) -> ProviderHeaders:
    headers = request.headers
    names = (PROVIDER_NAME, *PROVIDER_HEADERS)
    return ProviderHeaders(
        name=name,
        parameters={each: headers[each] for each in PROVIDER_HEADERS if each in headers},
        repeated=tuple(each for each in names if len(headers.getlist(each)) > 1),
    )


def _asked_metadata(request: Request) -> dict[str, str]:
    if "metadata" in request.query_params:
        raise wrong_type("metadata", expected="metadata[key]=value", given="a string")
    return {
        name[len("metadata[") : -1]: value
        for name, value in request.query_params.items()
        if name.startswith("metadata[") and name.endswith("]")
    }


def _read_metadata_header(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    # A header arrives as Latin-1, whatever its bytes were meant to be.
    value = parse_json(text.encode("latin-1"), what="the header", param=METADATA_HEADER)
    pairs = _string_pairs(value)
    if pairs is None:
        raise InvalidRequest(
            f"Invalid header '{METADATA_HEADER}': expected a JSON object whose values are "
            f"strings of up to {MAX_HEADER_VALUE_CHARS} characters.",
            param=METADATA_HEADER,
            code="invalid_value",
        )
    return pairs


def _string_pairs(value: object) -> dict[str, str] | None:
    if not isinstance(value, dict):
        return None
    pairs: dict[str, str] = {}
    for key, text in value.items():  # pyright: ignore[reportUnknownVariableType]
        if not isinstance(text, str) or len(text) > MAX_HEADER_VALUE_CHARS:
            return None
        pairs[str(key)] = text  # pyright: ignore[reportUnknownArgumentType]
    return pairs
