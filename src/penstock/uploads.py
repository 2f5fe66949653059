"""Files that arrive in parts.

A part is a blob of its own and one row. Which parts count, and in which order, is said at the
end: the file is then written from them as if it came in one piece, with the same judgement,
and published in the transaction that ends the upload. What is refused on the way leaves the
upload as it was.
"""

import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from penstock.blobs.base import Blobs
from penstock.errors import Conflict, InvalidRequest, NotFound, StorageUnavailable
from penstock.intake import Intake, read_purpose, safe_filename
from penstock.model import (
    File,
    FileId,
    Part,
    PartId,
    ProjectId,
    Purpose,
    Upload,
    UploadId,
    UploadStatus,
)
from penstock.refusals import above_maximum, check_text, quoted
from penstock.service import Asked, ServiceLimits, may_be_id
from penstock.store.base import Store

MAX_UPLOAD_BYTES = 8 << 30
MAX_PART_BYTES = 64 << 20
MAX_MIME_TYPE_CHARS = 255
MAX_PARTS = 10_000
UPLOAD_LIFE_S = 3600
"""Within which time after its creation an upload is to be completed."""
_FORM_BYTES = 1 << 20
"""The most that a form can be larger than the part in it."""


class PartForm(Protocol):
    """A form that is still arriving, with one part of an upload."""

    @property
    def fields(self) -> Mapping[str, str]:
        """The small fields that have arrived."""
        ...

    @property
    def declared_bytes(self) -> int | None:
        """How long the whole form is said to be; None if it is not said."""
        ...

    def content(self) -> AsyncIterator[bytes]:
        """The bytes of the part as they arrive; ends when the whole form has arrived."""
        ...


class Uploads:
    """Answers what clients ask about uploads in parts."""

    def __init__(
        self,
        *,
        store: Store,
        blobs: Blobs,
        limits: ServiceLimits,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._limits = limits
        self._clock = clock

    async def create(
        self,
        project_id: ProjectId,
        *,
        declared_bytes: int,
        filename: str,
        mime_type: str,
        purpose: str,
        file_life_s: int | None = None,
        asked: Asked | None = None,
    ) -> Upload:
        """Create an upload, to which parts can be added for an hour.

        Args:
            declared_bytes: How large the file is to be.
            file_life_s: How long the file is to be kept, in seconds; None means as long as
                files of its purpose are.
            asked: What tells the request from the same one sent again.

        Returns:
            The upload, or the one that an earlier request like this one has made.

        Raises:
            InvalidRequest: A value is not allowed.
            Conflict: The request's key was used for something else.
        """
        what_for = read_purpose(purpose)
        is_input = what_for is Purpose.BATCH
        limit = self._limits.input_file_bytes if is_input else MAX_UPLOAD_BYTES
        if declared_bytes > limit:
            raise InvalidRequest(
                f"File is too large. A file of purpose '{purpose}' may have up to {limit} "
                f"bytes; this upload is to have {declared_bytes} bytes.",
                param="bytes",
                code="integer_above_max_value",
            )
        check_text(mime_type, param="mime_type", max_chars=MAX_MIME_TYPE_CHARS)
        now = int(self._clock())
        upload = Upload(
            id=UploadId(f"upload_{secrets.token_hex(16)}"),
            project_id=project_id,
            purpose=what_for,
            filename=safe_filename(filename),
            mime_type=mime_type,
            bytes=declared_bytes,
            file_life_s=file_life_s,
            created_at=now,
            expires_at=now + UPLOAD_LIFE_S,
        )
        once = asked and asked.once(
            "upload", upload.filename, mime_type, purpose, declared_bytes, file_life_s
        )
        return self._as_seen(await self._store.add_upload(upload, once=once))

    async def add_part(
        self,
        project_id: ProjectId,
        upload_id: str,
        form: PartForm,
        *,
        asked: Asked | None = None,
    ) -> Part:
        """Store the part of a form that is arriving, in bounded memory.

        Args:
            asked: Only its key counts: two parts that are equal may both be meant.

        Raises:
            NotFound: No such upload in this project.
            InvalidRequest: The part is too large, or the upload takes none; nothing is kept.
            Conflict: The request's key was used for something else; nothing is kept.
        """
        upload = await self._get(project_id, upload_id)
        _check_pending(upload)
        await self._check_room(upload)
        part_id = PartId(f"part_{secrets.token_hex(16)}")
        blob_key = f"parts/{upload.id}/{part_id}"
        digest = hashlib.sha256()
        size = await self._blobs.put(blob_key, _checked(form, digest.update))
        part = Part(
            id=part_id,
            upload_id=upload.id,
            bytes=size,
            blob_key=blob_key,
            created_at=int(self._clock()),
        )
        once = None
        if asked is not None and asked.key is not None:
            once = asked.once("part", upload.id, digest.hexdigest())
        try:
            kept = await self._store.add_part(
                project_id, part, now=int(self._clock()), once=once
            )
        except (Conflict, NotFound, StorageUnavailable):
            await self._discard([blob_key])
            _check_pending(await self._get(project_id, upload_id))
            raise
        if kept.id != part.id:
            await self._discard([blob_key])
        return kept

    async def _check_room(self, upload: Upload) -> None:
        """Keep an upload from filling the disk. A part that a client has sent again leaves
        one behind that nobody names, so there is room for twice the file and a part."""
        parts = await self._store.list_parts(upload.id)
        stored, most = sum(part.bytes for part in parts), 2 * upload.bytes + MAX_PART_BYTES
        if stored >= most or len(parts) >= MAX_PARTS:
            raise InvalidRequest(
                f"The upload takes no more parts: it is to have {upload.bytes} bytes, and "
                f"{len(parts)} parts with {stored} bytes have come. Allowed are up to "
                f"{MAX_PARTS} parts with {most} bytes.",
                param="data",
            )

    async def complete(
        self,
        project_id: ProjectId,
        upload_id: str,
        *,
        part_ids: Sequence[str],
        md5: str | None = None,
    ) -> Upload:
        """Make the file of an upload. The same call again gives the same answer.

        Args:
            part_ids: The parts that the file is made of, in order.
            md5: What the file must have, in hex; None asks for none.

        Raises:
            NotFound: No such upload in this project.
            InvalidRequest: The parts do not make the file that was announced, or the upload
                has ended otherwise; if it was pending, it still is.
        """
        upload = await self._get(project_id, upload_id)
        if upload.status is UploadStatus.COMPLETED:
            return _same_end(upload, part_ids)
        _check_pending(upload)
        parts = _chosen(await self._store.list_parts(upload.id), part_ids)
        size = sum(part.bytes for part in parts)
        if size != upload.bytes:
            raise InvalidRequest(
                f"The upload is to have {upload.bytes} bytes, but its {len(parts)} parts have "
                f"{size} bytes together.",
                param="part_ids",
            )
        try:
            file = await self._write(upload, parts, md5)
        except NotFound:  # another call has ended the upload and deleted its parts
            return _same_end(await self._get(project_id, upload_id), part_ids)
        try:
            ended = await self._store.end_upload(
                upload.id,
                UploadStatus.COMPLETED,
                now=int(self._clock()),
                part_ids=[part.id for part in parts],
                file=file,
            )
        except Conflict:
            await self._discard([file.blob_key])
            return _same_end(await self._get(project_id, upload_id), part_ids)
        except StorageUnavailable:
            await self._discard([file.blob_key])
            raise
        await self._discard_parts(upload)
        return ended

    async def _write(self, upload: Upload, parts: Sequence[Part], md5: str | None) -> File:
        """Write the file's bytes, judged as those of a file that comes in one piece."""
        file_id = FileId(f"file-{secrets.token_hex(16)}")
        blob_key = f"files/{file_id}"
        intake = Intake(
            _Joined(upload, parts, self._blobs, md5),
            input_file_bytes=self._limits.input_file_bytes,
            upload_file_bytes=MAX_UPLOAD_BYTES,
        )
        await self._blobs.put(blob_key, intake.chunks())
        now = int(self._clock())
        life_s = upload.file_life_s or self._limits.file_life_s(upload.purpose)
        return File(
            id=file_id,
            project_id=upload.project_id,
            purpose=upload.purpose,
            filename=upload.filename,
            bytes=intake.bytes,
            sha256=intake.sha256,
            blob_key=blob_key,
            created_at=now,
            expires_at=None if life_s is None else now + life_s,
        )

    async def cancel(self, project_id: ProjectId, upload_id: str) -> Upload:
        """Give an upload up. A second call changes nothing.

        Raises:
            NotFound: No such upload in this project.
            InvalidRequest: It was completed, or is expired.
        """
        upload = await self._get(project_id, upload_id)
        if upload.status is UploadStatus.CANCELLED:
            return upload
        _check_pending(upload)
        try:
            ended = await self._store.end_upload(
                upload.id, UploadStatus.CANCELLED, now=int(self._clock())
            )
        except Conflict:
            return await self.cancel(project_id, upload_id)  # as it stands now
        await self._discard_parts(upload)
        return ended

    async def _get(self, project_id: ProjectId, upload_id: str) -> Upload:
        missing = NotFound(f"No such Upload object: {quoted(upload_id)}", param="id")
        if not may_be_id(upload_id):
            raise missing
        try:
            upload = await self._store.get_upload(project_id, UploadId(upload_id))
        except NotFound:
            raise missing from None
        return self._as_seen(upload)

    def _as_seen(self, upload: Upload) -> Upload:
        """One whose time is over is expired, also before upkeep has come to it."""
        is_late = upload.expires_at <= self._clock()
        if upload.status is UploadStatus.PENDING and is_late:
            return replace(upload, status=UploadStatus.EXPIRED)
        return upload

    async def _discard_parts(self, upload: Upload) -> None:
        """Delete all that has come for an upload that has ended, named at the end or not."""
        with suppress(StorageUnavailable):
            await self._discard(
                [key async for key in self._blobs.iter_keys(f"parts/{upload.id}")]
            )

    async def _discard(self, blob_keys: Sequence[str]) -> None:
        # A transaction may have been kept although its answer was lost, and then the bytes
        # must stay. What is left behind here is found by upkeep.
        with suppress(StorageUnavailable):
            await self._blobs.delete(list(await self._store.unused_blobs(blob_keys)))


class _Joined:
    """The form that an upload would have been in one piece."""

    filename = ""
    declared_bytes = None

    def __init__(
        self, upload: Upload, parts: Sequence[Part], blobs: Blobs, md5: str | None
    ) -> None:
        self.fields: Mapping[str, str] = {"purpose": upload.purpose}
        self._parts = parts
        self._blobs = blobs
        self._md5 = md5

    async def content(self) -> AsyncIterator[bytes]:
        digest = None if self._md5 is None else hashlib.md5(usedforsecurity=False)
        for part in self._parts:
            async for piece in self._blobs.stream(part.blob_key):
                if digest is not None:
                    digest.update(piece)
                yield piece
        if digest is not None and self._md5 is not None:
            found = digest.hexdigest()
            if found != self._md5.lower():
                raise InvalidRequest(
                    f"The MD5 of the parts is {found}, but the request says "
                    f"'{quoted(self._md5)}'.",
                    param="md5",
                )


async def _checked(form: PartForm, update: Callable[[bytes], object]) -> AsyncIterator[bytes]:
    """The content of a form, unless it is longer than a part may be."""
    size = form.declared_bytes or 0
    if size > MAX_PART_BYTES + _FORM_BYTES:
        raise above_maximum("data", str(size), MAX_PART_BYTES)
    size = 0
    async for piece in form.content():
        size += len(piece)
        if size > MAX_PART_BYTES:
            raise InvalidRequest(
                f"The part is too large: it may have up to {MAX_PART_BYTES} bytes.",
                param="data",
            )
        update(piece)
        yield piece
    if not size:
        raise InvalidRequest("The part is empty: it must have at least one byte.", param="data")


def _chosen(parts: Sequence[Part], part_ids: Sequence[str]) -> list[Part]:
    """The named parts, in the order in which they are named."""
    by_id: dict[str, Part] = {part.id: part for part in parts}
    chosen: list[Part] = []
    for part_id in part_ids:
        part = by_id.pop(part_id, None)
        if part is None:
            is_repeated = any(part_id == other.id for other in chosen)
            reason = "is named twice" if is_repeated else "is no part of this upload"
            raise InvalidRequest(
                f"Invalid 'part_ids': '{quoted(part_id)}' {reason}.",
                param="part_ids",
                code="invalid_value",
            )
        chosen.append(part)
    return chosen


def _check_pending(upload: Upload) -> None:
    if upload.status is not UploadStatus.PENDING:
        raise _has_ended(upload)


def _has_ended(upload: Upload) -> InvalidRequest:
    return InvalidRequest(
        f"The upload '{upload.id}' is {upload.status}: it can be changed no more."
    )


def _same_end(upload: Upload, part_ids: Sequence[str]) -> Upload:
    """The upload, if it was completed of just these parts."""
    if upload.status is UploadStatus.COMPLETED and list(upload.part_ids) == list(part_ids):
        return upload
    raise _has_ended(upload)
