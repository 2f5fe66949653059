"""Uploads: large files, sent in parts."""

from typing import Annotated

from fastapi import Depends, Path, Request, Response

from penstock.api.auth import AskingProject
from penstock.api.bodies import read_json
from penstock.api.forms import read_form
from penstock.api.idempotency import AskedOnce
from penstock.api.wire import (
    CompleteUploadRequest,
    UploadRequest,
    answer,
    part_to_wire,
    upload_to_wire,
)
from penstock.uploads import Uploads

AskedId = Annotated[str, Path(description="The upload's ID.")]


def get_uploads(request: Request) -> Uploads:
    """The uploads that this API was made for."""
    uploads: Uploads = request.app.state.uploads
    return uploads


AskedUploads = Annotated[Uploads, Depends(get_uploads)]


async def create_upload(
    request: Request, uploads: AskedUploads, project: AskingProject, asked: AskedOnce
) -> Response:
    """Create an upload.

    Parts can be added to it for an hour. A file of purpose `batch` may have 200 MiB
    (`limits.input_file_bytes`), others 8 GiB.
    """
    body = await read_json(request, UploadRequest)
    upload = await uploads.create(
        project,
        declared_bytes=body.bytes,
        filename=body.filename,
        mime_type=body.mime_type,
        purpose=body.purpose,
        file_life_s=body.expires_after and body.expires_after.seconds,
        asked=asked,
    )
    return answer(upload_to_wire(upload))


async def add_upload_part(
    *,
    upload_id: AskedId,
    request: Request,
    uploads: AskedUploads,
    project: AskingProject,
    asked: AskedOnce,
) -> Response:
    """Add a part.

    A part may have 64 MiB. Parts may be sent at the same time and in any order: which of them
    count, and in which order, is said at the end.
    """
    form = read_form(request, content="data")
    return answer(part_to_wire(await uploads.add_part(project, upload_id, form, asked=asked)))


async def complete_upload(
    upload_id: AskedId, request: Request, uploads: AskedUploads, project: AskingProject
) -> Response:
    """Make the file of an upload.

    The parts together must have as many bytes as were announced. The same request again gets
    the same answer.
    """
    body = await read_json(request, CompleteUploadRequest)
    upload = await uploads.complete(project, upload_id, part_ids=body.part_ids, md5=body.md5)
    return answer(upload_to_wire(upload))


async def cancel_upload(
    upload_id: AskedId, uploads: AskedUploads, project: AskingProject
) -> Response:
    """Give an upload up.

    Its parts are deleted. A second call changes nothing.
    """
    return answer(upload_to_wire(await uploads.cancel(project, upload_id)))
