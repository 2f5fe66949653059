"""Files: upload, look up, download, delete."""

from typing import Annotated, Literal
from urllib.parse import quote

from fastapi import Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from penstock.api.auth import AskedService, AskingProject
from penstock.api.errors import error_answer
from penstock.api.forms import read_form
from penstock.api.idempotency import AskedOnce
from penstock.api.operations import Answer
from penstock.api.ranges import Unsatisfiable, has_match, parse_range
from penstock.api.wire import answer, file_to_wire, list_to_wire
from penstock.model import File, Purpose

MAX_LIMIT = 10_000

_CONTENT_HEADERS = (
    "etag",
    "accept-ranges",
    "content-length",
    "content-disposition",
    "x-content-type-options",
)
_UNCHANGED = Answer(
    status=304,
    description="The content is one that `If-None-Match` names.",
    content={},
    headers=("etag",),
)
_CONTENT = {"application/octet-stream": {"type": "string", "format": "binary"}}
CONTENT_ANSWERS = (
    Answer(description="The whole content.", content=_CONTENT, headers=_CONTENT_HEADERS),
    Answer(
        status=206,
        description="The bytes that `Range` names.",
        content=_CONTENT,
        headers=(*_CONTENT_HEADERS, "content-range"),
    ),
    _UNCHANGED,
)
HEAD_ANSWERS = (
    Answer(
        description="What a download of the whole content would begin with.",
        content={},
        headers=_CONTENT_HEADERS,
    ),
    _UNCHANGED,
)

AskedId = Annotated[str, Path(description="The file's ID.")]
IfNoneMatch = Annotated[
    list[str] | None,
    Header(description="Entity tags that the client has, or `*`: of these, no content."),
]


async def create_file(
    request: Request, service: AskedService, project: AskingProject, asked: AskedOnce
) -> Response:
    """Upload a file.

    The parts of the form may come in any order. Of purpose `batch` a file may have 200 MiB
    (`limits.input_file_bytes`), of others 512 MiB.
    """
    file = await service.create_file(project, read_form(request), asked=asked)
    return answer(file_to_wire(file))


async def list_files(
    *,
    service: AskedService,
    project: AskingProject,
    after: Annotated[
        str | None, Query(description="The last file of the page before, by its ID.")
    ] = None,
    limit: Annotated[
        int, Query(ge=1, le=MAX_LIMIT, description="How many to list at most.")
    ] = MAX_LIMIT,
    order: Annotated[
        Literal["asc", "desc"], Query(description="By creation: oldest or newest first.")
    ] = "desc",
    purpose: Annotated[Purpose | None, Query(description="Only files of this purpose.")] = None,
) -> Response:
    """List files.

    The next page is asked for with the last ID as `after`; an `after` that is not there gives
    an empty page.
    """
    listing = await service.list_files(
        project, after=after, limit=limit, purpose=purpose, newest_first=order == "desc"
    )
    data = [file_to_wire(file) for file in listing.items]
    return answer(list_to_wire(data, has_more=listing.has_more))


async def get_file(file_id: AskedId, service: AskedService, project: AskingProject) -> Response:
    """Look up a file."""
    return answer(file_to_wire(await service.get_file(project, file_id)))


async def delete_file(
    file_id: AskedId, service: AskedService, project: AskingProject
) -> Response:
    """Delete a file.

    Batches that were created from it go on.
    """
    await service.delete_file(project, file_id)
    return answer({"id": file_id, "object": "file", "deleted": True})


async def get_file_content(
    *,
    file_id: AskedId,
    service: AskedService,
    project: AskingProject,
    if_none_match: IfNoneMatch = None,
    range_: Annotated[
        str | None,
        Header(
            alias="range",
            description="A single range of bytes, such as `bytes=0-1023`; others are ignored.",
        ),
    ] = None,
    if_range: Annotated[
        str | None,
        Header(description="Send a part only if this is still the entity tag, else all."),
    ] = None,
) -> Response:
    """Download a file.

    Whole, or a range of its bytes. Files of purpose `assistants` and `user_data` are never
    given back.
    """
    file = await service.get_downloadable(project, file_id)
    if has_match(if_none_match, _etag(file)):
        return _unchanged(file)
    try:
        may_be_part = if_range is None or if_range == _etag(file)
        part = parse_range(range_, file.bytes) if may_be_part else None
    except Unsatisfiable:
        return error_answer(
            416,
            f"The range is not in the file, which has {file.bytes} bytes.",
            headers={"content-range": f"bytes */{file.bytes}"},
        )
    start, end = part or (0, file.bytes)
    headers = _content_headers(file) | {"content-length": str(end - start)}
    if part is not None:
        headers["content-range"] = f"bytes {start}-{end - 1}/{file.bytes}"
    return StreamingResponse(
        await service.open_content(file, start=start, end=end),
        status_code=200 if part is None else 206,
        headers=headers,
        media_type="application/octet-stream",
    )


async def head_file_content(
    file_id: AskedId,
    service: AskedService,
    project: AskingProject,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """Look up what a download would be.

    The headers of the whole content, without it.
    """
    file = await service.get_downloadable(project, file_id)
    if has_match(if_none_match, _etag(file)):
        return _unchanged(file)
    headers = _content_headers(file) | {"content-length": str(file.bytes)}
    return Response(headers=headers, media_type="application/octet-stream")


def _unchanged(file: File) -> Response:
    return Response(status_code=304, headers={"etag": _etag(file)})


def _content_headers(file: File) -> dict[str, str]:
    return {
        "accept-ranges": "bytes",
        "content-disposition": _disposition(file.filename),
        "etag": _etag(file),
        "x-content-type-options": "nosniff",
    }


def _etag(file: File) -> str:
    # Under the ID of a file that the service made there never are other bytes.
    return f'"{file.sha256 or file.id}"'


def _disposition(filename: str) -> str:
    """An attachment's name, in plain ASCII and, if that loses something, as RFC 5987 has it."""
    plain = "".join(
        char if " " <= char <= "~" and char not in '"\\%' else "_" for char in filename
    )
    extended = "" if plain == filename else f"; filename*=UTF-8''{quote(filename, safe='')}"
    return f'attachment; filename="{plain}"{extended}'
