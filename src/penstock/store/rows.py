"""Rows into records and records into rows.

Where a column and a field have one name they hold one value; the functions here are about the
rest.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from sqlalchemy import RowMapping

from penstock.model import (
    FINAL,
    Batch,
    BatchId,
    BatchStatus,
    Counts,
    Delivery,
    DeliveryStatus,
    Fault,
    File,
    NativeRun,
    NativeRunStatus,
    Part,
    PartId,
    ProjectId,
    Purpose,
    Slice,
    SliceStatus,
    Spent,
    Upload,
    UploadStatus,
    Usage,
    asked_model,
    slice_id,
)
from penstock.store.base import BatchChange, ClaimedSlice

TOKENS = tuple(field.name for field in fields(Usage))
FIGURES = ("completed", "failed", *TOKENS)
"""What is counted as replies come; slices have it, and batches once they are final."""
FILE_FIELDS = tuple(field.name for field in fields(File))
BATCH_FIELDS = tuple(
    field.name for field in fields(Batch) if field.name not in ("counts", "usage")
)
SLICE_FIELDS = tuple(field.name for field in fields(Slice) if field.name != "usage")
UPLOAD_FIELDS = tuple(field.name for field in fields(Upload) if field.name != "file")
PART_FIELDS = tuple(field.name for field in fields(Part))
DELIVERY_FIELDS = tuple(field.name for field in fields(Delivery))
NATIVE_FIELDS = tuple(field.name for field in fields(NativeRun) if field.name != "spent")
SPENT = ("answered", "paid_model", "longest_input", *TOKENS)
"""The columns of a `Spent`."""


def to_file(row: RowMapping) -> File:
    values = dict(row)
    values["purpose"] = Purpose(row["purpose"])
    return File(**values)


def file_values(file: File) -> dict[str, Any]:
    return {name: getattr(file, name) for name in FILE_FIELDS}


def _count_values(counts: Counts) -> dict[str, int]:
    return {"total": counts.total, "completed": counts.completed, "failed": counts.failed}


def usage_values(usage: Usage) -> dict[str, int]:
    return {name: getattr(usage, name) for name in TOKENS}


def to_usage(row: Mapping[Any, Any], prefix: str = "") -> Usage:
    return Usage(**{name: row[prefix + name] for name in TOKENS})


def to_batch(row: RowMapping) -> Batch:
    """A batch and how far it is: what its slices say, until it is final.

    Args:
        row: The batch and, as `slices_...`, the sums over its slices.
    """
    status = BatchStatus(row["status"])
    done = row["completed"] + row["failed"]
    # A slice that was reopened may know of fewer replies than a move has made known.
    is_frozen = status in FINAL or done > row["slices_completed"] + row["slices_failed"]
    prefix = "" if is_frozen else "slices_"
    values = {name: row[name] for name in BATCH_FIELDS}
    values["status"] = status
    values["faults"] = tuple(Fault(**fault) for fault in row["faults"])
    values["usage"] = to_usage(row, prefix)
    values["counts"] = Counts(
        total=max(row["total"], row["slices_total"]),
        completed=row[f"{prefix}completed"],
        failed=row[f"{prefix}failed"],
    )
    return Batch(**values)


def batch_values(batch: Batch) -> dict[str, Any]:
    values = {name: getattr(batch, name) for name in BATCH_FIELDS}
    return values | figures_of(batch) | {"faults": batch.faults}


def figures_of(batch: Batch) -> dict[str, Any]:
    return _count_values(batch.counts) | usage_values(batch.usage)


def change_values(change: BatchChange) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if change.model is not None:
        values["model"] = change.model
    if change.counts is not None:
        values |= _count_values(change.counts)
    if change.usage is not None:
        values |= usage_values(change.usage)
    if change.faults:
        values["faults"] = list(change.faults)
    if change.output is not None:
        values["output_file_id"] = change.output.id
    if change.error is not None:
        values["error_file_id"] = change.error.id
    return values


def to_slice(row: RowMapping) -> Slice:
    values = {name: row[name] for name in SLICE_FIELDS}
    values["models"] = tuple(row["models"])
    values["status"] = SliceStatus(row["status"])
    values["usage"] = to_usage(row)
    return Slice(**values)


def slice_values(batch_id: BatchId, new: Slice) -> dict[str, Any]:
    """A new slice: whatever it says itself, no worker has touched it."""
    values = {name: getattr(new, name) for name in SLICE_FIELDS}
    values |= usage_values(Usage()) | {"completed": 0, "failed": 0, "attempt": 0}
    key = {"id": slice_id(batch_id, new.index), "batch_id": batch_id}
    return values | key | {"status": SliceStatus.PENDING}


def to_claimed_slice(row: RowMapping) -> ClaimedSlice:
    due = to_slice(row)
    return ClaimedSlice(
        slice=replace(due, status=SliceStatus.RUNNING, attempt=due.attempt + 1),
        endpoint=row["endpoint"],
        input_blob_key=row["input_blob_key"],
        expires_at=row["expires_at"],
        project_id=ProjectId(row["project_id"]),
        weight=row["weight"],
        is_background=row["is_background"],
        asked_model=asked_model(row["parameters"]),
    )


def to_upload(row: RowMapping) -> Upload:
    """An upload and, as `file_...`, the file that it became, if that is still there."""
    values = {name: row[name] for name in UPLOAD_FIELDS}
    values["status"] = UploadStatus(row["status"])
    values["purpose"] = Purpose(row["purpose"])
    values["part_ids"] = tuple(PartId(id_) for id_ in row["part_ids"])
    if row["found_file_id"] is not None:
        found = {name: row[f"file_{name}"] for name in FILE_FIELDS}
        found["purpose"] = Purpose(row["file_purpose"])
        values["file"] = File(**found)
    return Upload(**values)


def upload_values(upload: Upload) -> dict[str, Any]:
    values = {name: getattr(upload, name) for name in UPLOAD_FIELDS}
    return values | {"part_ids": list(upload.part_ids)}


def to_part(row: RowMapping) -> Part:
    return Part(**row)


def part_values(part: Part) -> dict[str, Any]:
    return {name: getattr(part, name) for name in PART_FIELDS}


def to_delivery(row: RowMapping) -> Delivery:
    values = dict(row)
    values["status"] = DeliveryStatus(row["status"])
    return Delivery(**values)


def to_native_run(row: RowMapping) -> NativeRun:
    values = {name: row[name] for name in NATIVE_FIELDS}
    values["status"] = NativeRunStatus(row["status"])
    if row["answered"] is not None:
        values["spent"] = Spent(
            answered=row["answered"],
            usage=to_usage(row),
            model=row["paid_model"],
            longest_input=row["longest_input"],
        )
    return NativeRun(**values)


def native_values(run: NativeRun) -> dict[str, Any]:
    values = {name: getattr(run, name) for name in NATIVE_FIELDS}
    spent = run.spent
    if spent is None:
        return values | dict.fromkeys(SPENT)
    return (
        values
        | usage_values(spent.usage)
        | {
            "answered": spent.answered,
            "paid_model": spent.model,
            "longest_input": spent.longest_input,
        }
    )
