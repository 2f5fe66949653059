"""Files: upload, look up, download, delete."""

from typing import Annotated, Literal
from urllib.parse import quote

from fastapi import Query, Request, Response
from fastapi.responses import StreamingResponse

from penstock.api.auth import AskedService, AskingProject
from penstock.api.errors import error_answer
from penstock.api.forms import read_form
from penstock.api.idempotency import AskedOnce
from penstock.api.ranges import Unsatisfiable, parse_range
from penstock.api.wire import answer, file_to_wire, list_to_wire
from penstock.model import File, Purpose

MAX_LIMIT = 10_000


async def create_file(
    request: Request, service: AskedService, project: AskingProject, asked: AskedOnce
) -> Response:
    """Upload a file.

    The parts of the form may come in any order; `expires_after[anchor]` and
    `expires_after[seconds]` are optional.
    """
    file = await service.create_file(project, read_form(request), asked=asked)
    return answer(file_to_wire(file))


async def list_files(
    *,
    service: AskedService,
    project: AskingProject,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = MAX_LIMIT,
    order: Literal["asc", "desc"] = "desc",
    purpose: Purpose | None = None,
) -> Response:
    """List files by creation."""
    listing = await service.list_files(
        project, after=after, limit=limit, purpose=purpose, newest_first=order == "desc"
    )
    data = [file_to_wire(file) for file in listing.items]
    return answer(list_to_wire(data, has_more=listing.has_more))


async def get_file(file_id: str, service: AskedService, project: AskingProject) -> Response:
    """Look up a file."""
    return answer(file_to_wire(await service.get_file(project, file_id)))


async def delete_file(file_id: str, service: AskedService, project: AskingProject) -> Response:
    """Delete a file. Batches that were created from it go on."""
    await service.delete_file(project, file_id)
    return answer({"id": file_id, "object": "file", "deleted": True})


async def get_content(
    file_id: str, request: Request, service: AskedService, project: AskingProject
) -> Response:
    """Download a file, or a range of its bytes."""
    file = await service.get_downloadable(project, file_id)
    try:
        part = _asked_range(request, file)
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


def _asked_range(request: Request, file: File) -> tuple[int, int] | None:
    condition = request.headers.get("if-range")
    if condition is not None and condition != _etag(file):
        return None
    return parse_range(request.headers.get("range"), file.bytes)


def _content_headers(file: File) -> dict[str, str]:
    return {
        "accept-ranges": "bytes",
        "content-disposition": _disposition(file.filename),
        "etag": _etag(file),
        "x-content-type-options": "nosniff",
    }


def _etag(file: File) -> str:
    return f'"{file.sha256}"'


def _disposition(filename: str) -> str:
    """An attachment's name, in plain ASCII and, if that loses something, as RFC 5987 has it."""
    plain = "".join(
        char if " " <= char <= "~" and char not in '"\\%' else "_" for char in filename
    )
    extended = "" if plain == filename else f"; filename*=UTF-8''{quote(filename, safe='')}"
    return f'attachment; filename="{plain}"{extended}'
