"""The store in SQL: one method, one transaction, written once in SQLAlchemy Core.

What a database does in its own way stands in `dialects`, `sqlite` and `postgres`. A read is one
statement and therefore sees one moment; a write locks the rows that it decides about before it
decides.
"""

import secrets
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from sqlalchemy import (
    BigInteger,
    Connection,
    RowMapping,
    and_,
    bindparam,
    cast,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    union,
    update,
)
from sqlalchemy.sql import ColumnElement

from penstock.errors import Conflict, NotFound
from penstock.model import (
    FINAL,
    TRANSITIONS,
    ApiKey,
    Batch,
    BatchId,
    BatchStatus,
    File,
    FileId,
    Job,
    JobKind,
    KeyId,
    NativeRunId,
    Once,
    Project,
    ProjectId,
    Purpose,
    Slice,
    SliceId,
    SliceStatus,
)
from penstock.store.base import (
    Backlog,
    BatchChange,
    BatchFilter,
    ClaimedSlice,
    Page,
    SliceReport,
    SliceTally,
)
from penstock.store.creations import create_once
from penstock.store.dialects import is_one_of, json_entries, lock_name, lock_rows, upsert
from penstock.store.rows import (
    FIGURES,
    FILE_FIELDS,
    SLICE_FIELDS,
    TOKENS,
    batch_values,
    change_values,
    figures_of,
    file_values,
    native_values,
    slice_values,
    to_batch,
    to_claimed_slice,
    to_file,
    to_slice,
    usage_values,
)
from penstock.store.sql_budgets import BudgetStore
from penstock.store.sql_natives import NativeStore, native_job
from penstock.store.sql_segments import SegmentStore
from penstock.store.sql_upkeep import FORGET_ALL_FINAL, FORGET_FINAL, UpkeepStore, has_slices
from penstock.store.sql_uploads import UploadStore
from penstock.store.sql_webhooks import WebhookStore, add_deliveries
from penstock.store.sql_workers import WorkerStore
from penstock.store.tables import (
    api_keys,
    batches,
    deleted_files,
    files,
    native_jobs,
    projects,
    slices,
    upload_parts,
)
from penstock.store.transactions import after, portions

T = TypeVar("T")

_UNFINISHED = [status for status in BatchStatus if status not in FINAL]
_CLAIMABLE = [BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING]


class SqlStore(
    UploadStore,
    WebhookStore,
    SegmentStore,
    UpkeepStore,
    WorkerStore,
    BudgetStore,
    NativeStore,
):
    """A `Store` in an SQL database.

    Args:
        url: Where it is: `postgresql://user:password@host:port/database`, with what libpq
            takes behind a `?`, or `sqlite:////folder/penstock.db`.
        jobs: Who takes over the jobs that transactions bring forth; None drops them, as is
            right where only keys are managed.

    Raises:
        InvalidSettings: `url` names neither.
    """

    # Projects and keys

    async def ensure_project(
        self, name: str, *, weight: int | None = None, is_background: bool | None = None
    ) -> Project:
        new = {
            "id": f"proj_{secrets.token_hex(12)}",
            "name": name,
            "weight": weight or 1,
            "is_background": bool(is_background),
        }
        kept = {
            "weight": projects.c.weight if weight is None else weight,
            "is_background": (
                projects.c.is_background if is_background is None else is_background
            ),
        }

        def work(db: Connection) -> Project:
            statement = upsert(db, projects).values(new)
            statement = statement.on_conflict_do_update(index_elements=["name"], set_=kept)
            row = db.execute(statement.returning(*projects.c)).mappings().one()
            return Project(**row)

        return await self._write(work)

    async def add_key(self, key: ApiKey, *, digest: str) -> None:
        values = {
            "id": key.id,
            "project_id": key.project_id,
            "digest": digest,
            "hint": key.hint,
            "created_at": key.created_at,
            "revoked_at": key.revoked_at,
        }

        def work(db: Connection) -> None:
            statement = upsert(db, api_keys).values(values)
            db.execute(
                statement.on_conflict_do_update(
                    index_elements=["digest"], set_={"revoked_at": None}
                )
            )

        await self._write(work)

    async def find_key(self, digest: str) -> ApiKey | None:
        rows = await self._read(_FIND_KEY, {"digest": digest})
        return ApiKey(**rows[0]) if rows else None

    async def list_keys(self) -> list[ApiKey]:
        rows = await self._read(_KEYS.order_by(api_keys.c.seq))
        return [ApiKey(**row) for row in rows]

    async def revoke_key(self, key_id: KeyId, *, now: int) -> ApiKey:
        def work(db: Connection) -> ApiKey:
            db.execute(
                update(api_keys)
                .where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
                .values(revoked_at=now)
            )
            row = db.execute(_KEYS.where(api_keys.c.id == key_id)).mappings().one_or_none()
            if row is None:
                raise NotFound(f"No key has the ID '{key_id}'.")
            return ApiKey(**row)

        return await self._write(work)

    # Files

    async def add_file(self, file: File, *, once: Once | None = None) -> File:
        def work(db: Connection) -> File:
            def add() -> tuple[str, File]:
                db.execute(insert(files), file_values(file))
                return file.id, file

            def load(id_: str) -> File | None:
                key = {"project_id": file.project_id, "id": id_}
                row = db.execute(_GET_FILE, key).mappings().one_or_none()
                return None if row is None else to_file(row)

            return create_once(db, file.project_id, once, load=load, add=add)

        return await self._write(work)

    async def get_file(self, project_id: ProjectId, file_id: FileId) -> File:
        rows = await self._read(_GET_FILE, {"project_id": project_id, "id": file_id})
        if not rows:
            raise _no_file(file_id)
        return to_file(rows[0])

    async def list_files(
        self, project_id: ProjectId, page: Page, *, purpose: Purpose | None, newest_first: bool
    ) -> list[File]:
        statement = _FILES.where(
            files.c.project_id == project_id,
            *after(
                files,
                project_id,
                page.after,
                descending=newest_first,
                deleted=deleted_files,
            ),
        )
        if purpose is not None:
            statement = statement.where(files.c.purpose == purpose)
        order = files.c.seq.desc() if newest_first else files.c.seq
        rows = await self._read(statement.order_by(order).limit(page.limit))
        return [to_file(row) for row in rows]

    async def delete_file(
        self, project_id: ProjectId, file_id: FileId, *, now: int
    ) -> File | None:
        def work(db: Connection) -> File | None:
            key = {"project_id": project_id, "id": file_id}
            row = db.execute(_DELETE_FILE, key).mappings().one_or_none()
            if row is None:
                raise _no_file(file_id)
            file = to_file(row)
            # Of two files with the same bytes, one is the last to be deleted.
            lock_name(db, "blob", file.blob_key)
            db.execute(_KEEP_PLACE, {"of_file": file_id, "now": now})
            db.execute(delete(files).where(files.c.id == file_id))
            is_used = db.execute(_USED_BLOBS, {"keys": [file.blob_key]}).first()
            return None if is_used else file

        return await self._write(work)

    async def unused_blobs(self, keys: Collection[str]) -> set[str]:
        unused = set(keys)
        for some in portions(list(keys)):
            rows = await self._read(_USED_BLOBS, {"keys": some})
            unused.difference_update(row["blob_key"] for row in rows)
        return unused

    async def list_expired_files(self, *, now: int, limit: int) -> list[File]:
        rows = await self._read(_EXPIRED_FILES, {"now": now, "limit": limit})
        return [to_file(row) for row in rows]

    # Batches

    async def add_batch(
        self, batch: Batch, *, once: Once | None = None, needs_file: bool = True
    ) -> Batch:
        jobs: list[Job] = []

        def work(db: Connection) -> Batch:
            def add() -> tuple[str, Batch]:
                key = {"project_id": batch.project_id, "id": batch.input_file_id}
                if needs_file and db.execute(_KEEP_FILE, key).first() is None:
                    raise _no_file(batch.input_file_id)
                db.execute(insert(batches), batch_values(batch))
                jobs.append(Job(kind=JobKind.VALIDATE, id=batch.id))
                jobs.append(Job(kind=JobKind.EXPIRE, id=batch.id, due_at=batch.expires_at))
                return batch.id, batch

            def load(id_: str) -> Batch:
                return _load_batch(db, BatchId(id_))

            return create_once(db, batch.project_id, once, load=load, add=add)

        return await self._write(work, jobs=jobs)

    async def get_batch(
        self, batch_id: BatchId, *, project_id: ProjectId | None = None
    ) -> Batch:
        rows = await self._read(_GET_BATCH, {"id": batch_id})
        if not rows or project_id not in (None, rows[0]["project_id"]):
            raise _no_batch(batch_id)
        return to_batch(rows[0])

    async def list_batches(
        self, project_id: ProjectId, page: Page, *, where: BatchFilter
    ) -> list[Batch]:
        shown = select(batches.c.seq).where(
            batches.c.project_id == project_id,
            *after(batches, project_id, page.after, descending=True),
            *_matches(where),
        )
        shown = shown.order_by(batches.c.seq.desc()).limit(page.limit)
        newest_first = batches.c.seq.desc()
        rows = await self._read(_BATCHES.where(batches.c.seq.in_(shown)).order_by(newest_first))
        return [to_batch(row) for row in rows]

    async def list_unfinished(self) -> list[Batch]:
        return [to_batch(row) for row in await self._read(_LIST_UNFINISHED)]

    async def move_batch(
        self, batch_id: BatchId, to: BatchStatus, *, now: int, change: BatchChange | None = None
    ) -> Batch:
        change = change or BatchChange()
        jobs: list[Job] = []
        if to in (BatchStatus.FINALIZING, BatchStatus.CANCELLING):
            jobs.append(Job(kind=JobKind.FINALIZE, id=batch_id))

        def work(db: Connection) -> Batch:
            status = db.execute(_LOCK_BATCH, {"id": batch_id}).scalar_one_or_none()
            if status is None:
                raise _no_batch(batch_id)
            if to not in TRANSITIONS[BatchStatus(status)]:
                raise Conflict(f"Batch '{batch_id}' is {status}: it cannot become {to}.")
            values = change_values(change) | {"status": to, f"{to}_at": now}
            if to in FINAL:
                values = figures_of(_load_batch(db, batch_id)) | values
            for file in (change.output, change.error):
                if file is not None:
                    db.execute(insert(files), file_values(file))
            if change.slices:
                db.execute(insert(slices), [slice_values(batch_id, s) for s in change.slices])
            if change.native_runs:
                db.execute(
                    insert(native_jobs), [native_values(run) for run in change.native_runs]
                )
                jobs.extend(map(native_job, change.native_runs))
            db.execute(update(batches).where(batches.c.id == batch_id).values(values))
            batch = _load_batch(db, batch_id)
            if to in FINAL:
                jobs.extend(add_deliveries(db, batch, now=now))
            return batch

        return await self._write(work, jobs=jobs)

    # Slices

    async def list_backlog(self, *, now: int) -> list[Backlog]:
        rows = await self._read(_LIST_BACKLOG, {"now": now})
        return [Backlog(**row) for row in rows]

    async def list_pending(
        self, batch_id: BatchId, *, limit: int, share: tuple[int, int] = (0, 1)
    ) -> list[Slice]:
        part, parts = share
        values = {"batch_id": batch_id, "part": part, "parts": parts, "limit": limit}
        return [to_slice(row) for row in await self._read(_LIST_PENDING, values)]

    async def get_slices(
        self, batch_id: BatchId, *, after: int = -1, limit: int = 1000
    ) -> list[Slice]:
        key = {"batch_id": batch_id, "after": after, "limit": limit}
        return [to_slice(row) for row in await self._read(_GET_SLICES, key)]

    async def tally_slices(self, batch_id: BatchId) -> SliceTally:
        rows = await self._read(_TALLY_SLICES, {"batch_id": batch_id})
        counts = {row["status"]: row["slices"] for row in rows}
        native = sum(row["native"] for row in rows if row["status"] != SliceStatus.ENDED)
        return SliceTally(**counts, native=native)

    async def count_pending_lines(self, *, now: int) -> int:
        return (await self._read(_COUNT_PENDING, {"now": now}))[0]["lines"]

    async def claim_slices(
        self,
        ids: Sequence[SliceId],
        *,
        worker_id: str,
        lease_s: float,
        now: float,
        native_run: NativeRunId | None = None,
    ) -> list[ClaimedSlice]:
        def work(db: Connection) -> list[ClaimedSlice]:
            claimed: dict[SliceId, ClaimedSlice] = {}
            for some in portions(ids):
                lock_rows(db, _KEEP_BATCHES_OF, {"ids": some})
                key: dict[str, Any] = {"ids": some, "now": now}
                if native_run is None:
                    due = db.execute(_DUE_SLICES, key).mappings().all()
                else:
                    key["of_run"] = native_run
                    due = db.execute(_DUE_NATIVE_SLICES, key).mappings().all()
                claims = [to_claimed_slice(row) for row in due]
                claimed.update((claim.slice.id, claim) for claim in claims)
            held = {"worker": worker_id, "until": now + lease_s}
            for some in portions(list(claimed)):
                db.execute(_CLAIM_SLICES, {**held, "ids": some})
            return [claimed.pop(id) for id in ids if id in claimed]

        return await self._write(work)

    async def report_slices(
        self, reports: Sequence[SliceReport], *, lease_s: float, now: float
    ) -> set[SliceId]:
        jobs: list[Job] = []

        def work(db: Connection) -> set[SliceId]:
            held: dict[SliceId, RowMapping] = {}
            # Two that lock the same ones do it in one order.
            for some in portions(sorted(report.id for report in reports)):
                rows = db.execute(_HELD_SLICES, {"ids": some}).mappings()
                held.update((row["id"], row) for row in rows)
            lost: set[SliceId] = set()
            changes: list[dict[str, Any]] = []
            stopped: set[BatchId] = set()
            for report in reports:
                row = held.get(report.id)
                if row is None or row["attempt"] != report.attempt:
                    lost.add(report.id)
                    continue
                changes.append(_reported(row, report, now + lease_s))
                if report.ends is not None:
                    del held[report.id]
                    stopped.add(row["batch_id"])
            if changes:
                db.execute(_REPORT_SLICE, changes)
            jobs.extend(_finalizers(db, stopped, now))
            return lost

        return await self._write(work, jobs=jobs, durable=False)

    async def reopen_slices(self, ids: Sequence[SliceId]) -> None:
        def work(db: Connection) -> None:
            for some in portions(ids):
                db.execute(_REOPEN_SLICES, {"ids": some})

        await self._write(work, durable=False)

    async def release_slices(self, *, now: float) -> int:
        jobs: list[Job] = []

        def work(db: Connection) -> int:
            late = db.execute(_LATE_SLICES, {"now": now}).mappings().all()
            for some in portions([row["id"] for row in late]):
                db.execute(_RELEASE_SLICES, {"ids": some})
            jobs.extend(_finalizers(db, {row["batch_id"] for row in late}, now))
            return len(late)

        return await self._write(work, jobs=jobs, durable=False)

    async def recover_slices(self) -> int:
        def work(db: Connection) -> int:
            db.execute(FORGET_ALL_FINAL)
            return db.execute(_RECOVER_SLICES).rowcount

        return await self._write(work, durable=False)

    async def forget_slices(self, batch_id: BatchId) -> None:
        key = {"batch_id": batch_id}
        await self._write(lambda db: db.execute(FORGET_FINAL, key), durable=False)


# Statements, in the order of the methods

_KEYS = select(
    api_keys.c.id,
    api_keys.c.project_id,
    projects.c.name.label("project"),
    api_keys.c.hint,
    api_keys.c.created_at,
    api_keys.c.revoked_at,
).join(projects)

_FIND_KEY = _KEYS.where(
    api_keys.c.digest == bindparam("digest"), api_keys.c.revoked_at.is_(None)
)

_FILES = select(*(files.c[name] for name in FILE_FIELDS))

_GET_FILE = _FILES.where(
    files.c.id == bindparam("id"), files.c.project_id == bindparam("project_id")
)

_KEEP_FILE = _GET_FILE.with_for_update(read=True, key_share=True)
"""Nobody deletes it before this transaction ends."""

_DELETE_FILE = _GET_FILE.with_for_update()

_KEEP_PLACE = insert(deleted_files).from_select(
    ["id", "seq", "project_id", "deleted_at"],
    select(
        files.c.id, files.c.seq, files.c.project_id, bindparam("now", type_=BigInteger)
    ).where(files.c.id == bindparam("of_file")),
)

_USED_BLOBS = union(
    select(files.c.blob_key).where(is_one_of(files.c.blob_key, "keys")),
    select(upload_parts.c.blob_key).where(is_one_of(upload_parts.c.blob_key, "keys")),
    select(batches.c.input_blob_key).where(
        is_one_of(batches.c.input_blob_key, "keys"),
        batches.c.status.in_(_UNFINISHED),
    ),
)

_EXPIRED_FILES = (
    _FILES.where(files.c.expires_at <= bindparam("now"))
    .order_by(files.c.expires_at)
    .limit(bindparam("limit"))
)


def _sum(column: ColumnElement[int]) -> ColumnElement[int]:
    # PostgreSQL makes a decimal number of a sum.
    return cast(func.coalesce(func.sum(column), 0), BigInteger)


_BATCHES = (
    select(
        batches,
        _sum(slices.c.requests).label("slices_total"),
        *(_sum(slices.c[name]).label(f"slices_{name}") for name in FIGURES),
    )
    .outerjoin(
        slices, and_(slices.c.batch_id == batches.c.id, batches.c.status.in_(_UNFINISHED))
    )
    .group_by(batches.c.seq)
)
"""Batches and the sums over their slices, in one statement: between two, a batch might end and
its slices be forgotten."""


_GET_BATCH = _BATCHES.where(batches.c.id == bindparam("id"))

_LIST_UNFINISHED = _BATCHES.where(batches.c.status.in_(_UNFINISHED)).order_by(batches.c.seq)

_LOCK_BATCH = select(batches.c.status).where(batches.c.id == bindparam("id")).with_for_update()


_LIST_BACKLOG = (
    select(
        batches.c.id.label("batch_id"),
        batches.c.project_id,
        projects.c.weight,
        projects.c.is_background,
        batches.c.expires_at,
        batches.c.created_at,
    )
    .join(projects)
    .where(
        batches.c.status.in_(_CLAIMABLE),
        batches.c.expires_at > bindparam("now"),
        has_slices(SliceStatus.PENDING, slices.c.native_run.is_(None)),
    )
    .order_by(batches.c.expires_at, batches.c.seq)
)

_COUNT_PENDING = (
    select(
        func.coalesce(
            func.sum(slices.c.requests - slices.c.completed - slices.c.failed), 0
        ).label("lines")
    )
    .join(batches)
    .where(
        batches.c.status.in_(_CLAIMABLE),
        batches.c.expires_at > bindparam("now"),
        slices.c.status != SliceStatus.ENDED,
        slices.c.native_run.is_(None),
    )
)

_SLICE_COLUMNS = [slices.c[name] for name in (*SLICE_FIELDS, *TOKENS)]

_LIST_PENDING = (
    select(*_SLICE_COLUMNS)
    .where(
        slices.c.batch_id == bindparam("batch_id"),
        slices.c.status == SliceStatus.PENDING,
        slices.c.index % bindparam("parts") == bindparam("part"),
        slices.c.native_run.is_(None),
    )
    .order_by(slices.c.index)
    .limit(bindparam("limit"))
)

_GET_SLICES = (
    select(*_SLICE_COLUMNS)
    .where(slices.c.batch_id == bindparam("batch_id"), slices.c.index > bindparam("after"))
    .order_by(slices.c.index)
    .limit(bindparam("limit"))
)

_TALLY_SLICES = (
    select(
        slices.c.status,
        func.count().label("slices"),
        func.count(slices.c.native_run).label("native"),
    )
    .where(slices.c.batch_id == bindparam("batch_id"))
    .group_by(slices.c.status)
)

_IS_ONE_OF_THEM = is_one_of(slices.c.id, "ids")

_KEEP_BATCHES_OF = (
    select(batches.c.id)
    .where(
        batches.c.id.in_(select(slices.c.batch_id).where(_IS_ONE_OF_THEM)),
        batches.c.status.in_(_CLAIMABLE),
    )
    .order_by(batches.c.seq)
    .with_for_update(read=True, key_share=True)
)
"""Nobody moves them before this transaction ends: no slice of one that is being cancelled is
claimed behind its finalizer's back."""

_CLAIMABLE_SLICES = (
    select(
        *_SLICE_COLUMNS,
        batches.c.endpoint,
        batches.c.input_blob_key,
        batches.c.expires_at,
        batches.c.project_id,
        batches.c.parameters,
        projects.c.weight,
        projects.c.is_background,
    )
    .join(batches, batches.c.id == slices.c.batch_id)
    .join(projects, projects.c.id == batches.c.project_id)
    .where(
        _IS_ONE_OF_THEM,
        or_(
            slices.c.status == SliceStatus.PENDING,
            and_(
                slices.c.status == SliceStatus.RUNNING,
                slices.c.lease_expires_at <= bindparam("now"),
            ),
        ),
    )
    .with_for_update(of=slices, skip_locked=True)
)

_DUE_SLICES = _CLAIMABLE_SLICES.where(
    slices.c.native_run.is_(None), batches.c.status.in_(_CLAIMABLE)
)

_DUE_NATIVE_SLICES = _CLAIMABLE_SLICES.where(
    slices.c.native_run == bindparam("of_run"),
    batches.c.status.in_([*_CLAIMABLE, BatchStatus.CANCELLING]),
)

_CLAIM_SLICES = (
    update(slices)
    .where(_IS_ONE_OF_THEM)
    .values(
        status=SliceStatus.RUNNING,
        attempt=slices.c.attempt + 1,
        worker_id=bindparam("worker"),
        lease_expires_at=bindparam("until"),
    )
)

_HELD_SLICES = (
    select(
        *(slices.c[name] for name in ("id", "batch_id", "attempt", "worker_id", *FIGURES)),
    )
    .where(_IS_ONE_OF_THEM, slices.c.status == SliceStatus.RUNNING)
    .order_by(slices.c.id)
    .with_for_update()
)

_REPORT_SLICE = update(slices).where(
    slices.c.id == bindparam("of_slice"), slices.c.attempt == bindparam("by_attempt")
)

_LOCK_STOPPED = (
    select(batches.c.id)
    .where(is_one_of(batches.c.id, "ids"))
    .order_by(batches.c.seq)
    .with_for_update(key_share=True)
)

_LEFT_OVER = select(
    batches.c.id,
    batches.c.status,
    batches.c.expires_at,
    has_slices(SliceStatus.PENDING).label("has_pending"),
    has_slices(SliceStatus.RUNNING).label("has_running"),
).where(is_one_of(batches.c.id, "ids"))

_REOPEN_SLICES = (
    update(slices)
    .where(_IS_ONE_OF_THEM, slices.c.status == SliceStatus.ENDED)
    .values(status=SliceStatus.PENDING)
)

_GIVEN_BACK = {"status": SliceStatus.PENDING, "worker_id": None, "lease_expires_at": None}

_RECOVER_SLICES = (
    update(slices).where(slices.c.status == SliceStatus.RUNNING).values(_GIVEN_BACK)
)

_LATE_SLICES = (
    select(slices.c.id, slices.c.batch_id)
    .where(slices.c.lease_expires_at <= bindparam("now"))
    .with_for_update(skip_locked=True)
)

_RELEASE_SLICES = update(slices).where(_IS_ONE_OF_THEM).values(_GIVEN_BACK)


# Rules


def _finalizers(db: Connection, stopped: Collection[BatchId], now: float) -> list[Job]:
    """The jobs that follow from slices of these batches having stopped."""
    if not stopped:
        return []
    # One after the other: of two that stop the last two slices at once, each would still see
    # the other's running.
    lock_rows(db, _LOCK_STOPPED, {"ids": list(stopped)})
    left = db.execute(_LEFT_OVER, {"ids": list(stopped)}).mappings()
    return [Job(kind=JobKind.FINALIZE, id=row["id"]) for row in left if _may_end(row, now)]


def _may_end(batch: RowMapping, now: float) -> bool:
    """Whether a batch of which a slice has just stopped is to be looked at by its finalizer."""
    if batch["has_running"]:
        return False
    match BatchStatus(batch["status"]):
        case BatchStatus.CANCELLING:
            return True
        case BatchStatus.IN_PROGRESS | BatchStatus.FINALIZING:
            return not batch["has_pending"] or batch["expires_at"] <= now
        case _:
            return False


def _reported(row: RowMapping, report: SliceReport, lease_expires_at: float) -> dict[str, Any]:
    """What a report makes of a slice."""
    match report.ends:
        case None:
            lease = {
                "status": SliceStatus.RUNNING,
                "worker_id": row["worker_id"],
                "lease_expires_at": lease_expires_at,
            }
        case ends:
            status = SliceStatus.ENDED if ends else SliceStatus.PENDING
            lease = {"status": status, "worker_id": None, "lease_expires_at": None}
    figures = {name: row[name] for name in FIGURES}
    # An attempt that knows of fewer replies than were counted has lost some: it will catch up.
    if report.completed + report.failed >= row["completed"] + row["failed"]:
        figures = {"completed": report.completed, "failed": report.failed}
        figures |= usage_values(report.usage)
    key = {"of_slice": report.id, "by_attempt": report.attempt}
    return key | lease | figures


# Conditions


def _has_metadata(key: str, value: str) -> ColumnElement[bool]:
    # A JSON path cannot name every key: SQLite knows no way to write a quote in one.
    entry = json_entries(batches.c.metadata).table_valued("key", "value")
    return exists().select_from(entry).where(entry.c.key == key, entry.c.value == value)


def _matches(where: BatchFilter) -> list[ColumnElement[bool]]:
    conditions = [_has_metadata(key, value) for key, value in where.metadata.items()]
    if where.status is not None:
        conditions.append(batches.c.status == where.status)
    if where.job_name is not None:
        conditions.append(batches.c.job_name == where.job_name)
    if where.created_after is not None:
        conditions.append(batches.c.created_at >= where.created_after)
    if where.created_before is not None:
        conditions.append(batches.c.created_at < where.created_before)
    return conditions


def _no_file(file_id: FileId) -> NotFound:
    return NotFound(f"No such File object: {file_id}", param="id")


def _no_batch(batch_id: BatchId) -> NotFound:
    return NotFound(f"No batch found with id '{batch_id}'.")


def _load_batch(db: Connection, batch_id: BatchId) -> Batch:
    return to_batch(db.execute(_GET_BATCH, {"id": batch_id}).mappings().one())
