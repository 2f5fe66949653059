"""Uploads in parts, in SQL."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, bindparam, delete, insert, select, update

from penstock.errors import Conflict, NotFound
from penstock.model import File, Once, Part, PartId, ProjectId, Upload, UploadId, UploadStatus
from penstock.store.creations import create_once
from penstock.store.rows import (
    FILE_FIELDS,
    PART_FIELDS,
    UPLOAD_FIELDS,
    file_values,
    part_values,
    to_part,
    to_upload,
    upload_values,
)
from penstock.store.tables import files, upload_parts, uploads
from penstock.store.transactions import SqlTransactions


class UploadStore(SqlTransactions):
    """The part of the store that keeps uploads."""

    async def add_upload(self, upload: Upload, *, once: Once | None = None) -> Upload:
        def work(db: Connection) -> Upload:
            def add() -> tuple[str, Upload]:
                db.execute(insert(uploads), upload_values(upload))
                return upload.id, upload

            def load(id_: str) -> Upload | None:
                row = db.execute(_GET_UPLOAD, {"id": id_}).mappings().one_or_none()
                return None if row is None else to_upload(row)

            return create_once(db, upload.project_id, once, load=load, add=add)

        return await self._write(work)

    async def get_upload(self, project_id: ProjectId, upload_id: UploadId) -> Upload:
        rows = await self._read(_GET_UPLOAD, {"id": upload_id})
        if not rows or rows[0]["project_id"] != project_id:
            raise _no_upload(upload_id)
        return to_upload(rows[0])

    async def add_part(
        self, project_id: ProjectId, part: Part, *, now: int, once: Once | None = None
    ) -> Part:
        def work(db: Connection) -> Part:
            row = _lock(db, part.upload_id)
            if row is None or row["project_id"] != project_id:
                raise _no_upload(part.upload_id)
            _check_pending(row, now)

            def add() -> tuple[str, Part]:
                db.execute(insert(upload_parts), part_values(part))
                return part.id, part

            def load(id_: str) -> Part | None:
                found = db.execute(_GET_PART, {"id": id_}).mappings().one_or_none()
                return None if found is None else to_part(found)

            return create_once(db, project_id, once, load=load, add=add)

        return await self._write(work)

    async def list_parts(self, upload_id: UploadId) -> list[Part]:
        return [to_part(row) for row in await self._read(_PARTS, {"upload_id": upload_id})]

    async def end_upload(
        self,
        upload_id: UploadId,
        to: UploadStatus,
        *,
        now: int,
        part_ids: Sequence[PartId] = (),
        file: File | None = None,
    ) -> Upload:
        def work(db: Connection) -> Upload:
            row = _lock(db, upload_id)
            if row is None:
                raise _no_upload(upload_id)
            # One that is over may still be given up, but not be completed.
            _check_pending(row, now if to is UploadStatus.COMPLETED else 0)
            values: dict[str, Any] = {"status": to, "ended_at": now, "part_ids": list(part_ids)}
            if file is not None:
                db.execute(insert(files), file_values(file))
                values["file_id"] = file.id
            db.execute(update(uploads).where(uploads.c.id == upload_id).values(values))
            db.execute(delete(upload_parts).where(upload_parts.c.upload_id == upload_id))
            return to_upload(db.execute(_GET_UPLOAD, {"id": upload_id}).mappings().one())

        return await self._write(work)

    async def list_late_uploads(self, *, now: int, limit: int) -> list[Upload]:
        rows = await self._read(_LATE_UPLOADS, {"now": now, "limit": limit})
        return [to_upload(row) for row in rows]


_UPLOADS = select(
    *(uploads.c[name] for name in UPLOAD_FIELDS),
    uploads.c.file_id,
    *(files.c[name].label(f"file_{name}") for name in FILE_FIELDS if name != "id"),
    files.c.id.label("found_file_id"),
).outerjoin(files, files.c.id == uploads.c.file_id)

_GET_UPLOAD = _UPLOADS.where(uploads.c.id == bindparam("id"))

_LATE_UPLOADS = (
    _UPLOADS.where(
        uploads.c.status == UploadStatus.PENDING, uploads.c.expires_at <= bindparam("now")
    )
    .order_by(uploads.c.expires_at)
    .limit(bindparam("limit"))
)

_LOCK_UPLOAD = (
    select(uploads.c.project_id, uploads.c.status, uploads.c.expires_at)
    .where(uploads.c.id == bindparam("id"))
    .with_for_update()
)

_PART_COLUMNS = select(*(upload_parts.c[name] for name in PART_FIELDS))

_GET_PART = _PART_COLUMNS.where(upload_parts.c.id == bindparam("id"))

_PARTS = _PART_COLUMNS.where(upload_parts.c.upload_id == bindparam("upload_id")).order_by(
    upload_parts.c.seq
)


def _lock(db: Connection, upload_id: UploadId) -> RowMapping | None:
    return db.execute(_LOCK_UPLOAD, {"id": upload_id}).mappings().one_or_none()


def _check_pending(row: RowMapping, now: int) -> None:
    if row["status"] != UploadStatus.PENDING:
        raise Conflict(f"The upload is {row['status']}.")
    if row["expires_at"] <= now:
        raise Conflict("The upload is expired.")


def _no_upload(upload_id: UploadId) -> NotFound:
    return NotFound(f"No such Upload object: {upload_id}", param="id")
