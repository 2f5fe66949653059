"""The tables, as SQLite and PostgreSQL both take them.

A table refuses nonsense itself: a lease without a worker, more replies than requests, a final
batch without its time. Times are numbers, Unix seconds. `migrations` builds the same tables
step by step, and a test holds the two together.

`seq` is the order of creation, by which lists are paged: an insert moves no page, and two
objects of one second have an order.
"""

from enum import StrEnum

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    false,
)

from penstock.model import (
    BatchStatus,
    DeliveryStatus,
    NativeRunStatus,
    SliceStatus,
    UploadStatus,
)

NAMING = {
    "pk": "pk_%(table_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
}
"""Each constraint has a name, so that a migration can name it."""

metadata = MetaData(naming_convention=NAMING)

# SQLite gives a key of its own only to a column that is called INTEGER.
Seq = BigInteger().with_variant(Integer(), "sqlite")


def _one_of(name: str, statuses: type[StrEnum]) -> CheckConstraint:
    values = ", ".join(f"'{status}'" for status in statuses)
    return CheckConstraint(f"{name} IN ({values})", name=name)


def _tokens(*, may_lack: bool = False) -> list[Column[int]]:
    """The figures of a `Usage`, under its names."""
    names = (
        "input_tokens",
        "cached_tokens",
        "output_tokens",
        "reasoning_tokens",
        "total_tokens",
    )
    default = None if may_lack else 0
    return [Column(name, BigInteger, nullable=may_lack, default=default) for name in names]


projects = Table(
    "projects",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("weight", BigInteger, nullable=False),
    # Whether its lines run only where others leave room.
    Column("is_background", Boolean, nullable=False, default=False, server_default=false()),
    CheckConstraint("weight >= 1", name="weight"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("seq", Seq, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("digest", Text, nullable=False, unique=True),
    Column("hint", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("revoked_at", BigInteger),
)

files = Table(
    "files",
    metadata,
    Column("seq", Seq, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("purpose", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("blob_key", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    CheckConstraint("bytes >= 0", name="bytes"),
    Index("ix_files_project", "project_id", "seq"),
    Index("ix_files_blob", "blob_key"),
    Index("ix_files_expiry", "expires_at"),
)

deleted_files = Table(
    "deleted_files",
    metadata,
    # Where they stood, so that a list goes on behind a file that its reader deletes.
    Column("id", Text, primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("deleted_at", BigInteger, nullable=False),
    Index("ix_deleted_files_age", "deleted_at"),
)

batches = Table(
    "batches",
    metadata,
    Column("seq", Seq, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("status", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    # No foreign keys to files: a batch outlives the deletion of each of its three.
    Column("input_file_id", Text, nullable=False),
    Column("input_blob_key", Text, nullable=False),
    Column("output_file_id", Text),
    Column("error_file_id", Text),
    Column("completion_window", Text, nullable=False),
    Column("job_name", Text),
    Column("metadata", JSON(none_as_null=True)),
    Column("model", Text),
    Column("faults", JSON, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("in_progress_at", BigInteger),
    Column("finalizing_at", BigInteger),
    Column("completed_at", BigInteger),
    Column("failed_at", BigInteger),
    Column("expired_at", BigInteger),
    Column("cancelling_at", BigInteger),
    Column("cancelled_at", BigInteger),
    # Frozen when the batch ends; until then its slices know better.
    Column("total", BigInteger, nullable=False),
    Column("completed", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    *_tokens(),
    Column("output_life_s", BigInteger),
    Column("upstream", Text),
    Column("parameters", JSON(none_as_null=True)),
    _one_of("status", BatchStatus),
    CheckConstraint("completed >= 0 AND failed >= 0", name="counts"),
    CheckConstraint("completed + failed <= total", name="total"),
    CheckConstraint("(status = 'completed') = (completed_at IS NOT NULL)", name="completed"),
    CheckConstraint("(status = 'failed') = (failed_at IS NOT NULL)", name="failed"),
    CheckConstraint("(status = 'expired') = (expired_at IS NOT NULL)", name="expired"),
    CheckConstraint("(status = 'cancelled') = (cancelled_at IS NOT NULL)", name="cancelled"),
    Index("ix_batches_project", "project_id", "seq"),
    Index("ix_batches_status", "status", "seq"),
    Index("ix_batches_input_blob", "input_blob_key"),
)

slices = Table(
    "slices",
    metadata,
    Column("batch_id", Text, ForeignKey("batches.id"), primary_key=True),
    Column("index", BigInteger, primary_key=True, autoincrement=False),
    # Both in one, for SQLite searches no index for a list of pairs.
    Column("id", Text, nullable=False, unique=True),
    Column("start", BigInteger, nullable=False),
    Column("end", BigInteger, nullable=False),
    Column("first_line", BigInteger, nullable=False),
    Column("requests", BigInteger, nullable=False),
    Column("models", JSON, nullable=False),
    Column("status", Text, nullable=False),
    Column("attempt", BigInteger, nullable=False),
    Column("worker_id", Text),
    Column("lease_expires_at", Double),
    Column("completed", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    *_tokens(),
    Column("upstream", Text),
    # No foreign key, for SQLite can add none to a table that is there.
    Column("native_run", Text),
    _one_of("status", SliceStatus),
    CheckConstraint('0 <= "start" AND "start" < "end"', name="range"),
    CheckConstraint('"index" >= 0 AND first_line >= 1 AND requests >= 1', name="place"),
    CheckConstraint("attempt >= 0 AND completed >= 0 AND failed >= 0", name="counts"),
    CheckConstraint("completed + failed <= requests", name="requests"),
    CheckConstraint("(status = 'running') = (worker_id IS NOT NULL)", name="worker"),
    CheckConstraint("(status = 'running') = (lease_expires_at IS NOT NULL)", name="lease"),
    Index("ix_slices_status", "batch_id", "status", "index"),
    Index("ix_slices_lease", "lease_expires_at"),
    Index("ix_slices_native", "native_run", "index"),
)

native_jobs = Table(
    "native_jobs",
    metadata,
    Column("seq", Seq, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("batch_id", Text, ForeignKey("batches.id"), nullable=False),
    Column("upstream", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("requests", Integer, nullable=False),
    Column("status", Text, nullable=False),
    Column("submission", Integer, nullable=False),
    Column("native_id", Text),
    Column("begun_at", Double),
    Column("submitted_at", Double),
    Column("due_at", Double),
    Column("attempts", Integer, nullable=False),
    Column("cancel_wanted_at", Double),
    Column("details", JSON, nullable=False),
    Column("outcome", Text),
    Column("message", Text, nullable=False),
    Column("completed", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("version", Integer, nullable=False),
    # What it took: all of them null, or none but the last two.
    Column("answered", BigInteger),
    *_tokens(may_lack=True),
    Column("paid_model", Text),
    Column("longest_input", BigInteger),
    _one_of("status", NativeRunStatus),
    CheckConstraint("requests >= 1 AND submission >= 1 AND attempts >= 0", name="counts"),
    CheckConstraint("(status = 'ended') = (due_at IS NULL)", name="due"),
    CheckConstraint("status <> 'submitted' OR native_id IS NOT NULL", name="native"),
    CheckConstraint("status <> 'submitting' OR begun_at IS NOT NULL", name="begun"),
    Index("ix_native_jobs_batch", "batch_id", "seq"),
    Index("ix_native_jobs_status", "status", "due_at"),
)

uploads = Table(
    "uploads",
    metadata,
    Column("seq", Seq, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("status", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("mime_type", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("file_life_s", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("ended_at", BigInteger),
    Column("part_ids", JSON, nullable=False),
    # No foreign key: the file may be deleted.
    Column("file_id", Text),
    _one_of("status", UploadStatus),
    CheckConstraint("bytes >= 0", name="bytes"),
    CheckConstraint("(status = 'pending') = (ended_at IS NULL)", name="ended"),
    CheckConstraint("(status = 'completed') = (file_id IS NOT NULL)", name="file"),
    Index("ix_uploads_status", "status", "expires_at"),
)

upload_parts = Table(
    "upload_parts",
    metadata,
    Column("seq", Seq, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("upload_id", Text, ForeignKey("uploads.id"), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("blob_key", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    CheckConstraint("bytes >= 0", name="bytes"),
    Index("ix_upload_parts_upload", "upload_id", "seq"),
    Index("ix_upload_parts_blob", "blob_key"),
)

creations = Table(
    "creations",
    metadata,
    Column("seq", Seq, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("fingerprint", Text, nullable=False),
    Column("key", Text),
    Column("is_retry", Boolean, nullable=False),
    Column("object_id", Text, nullable=False),
    Column("began_at", Double, nullable=False),
    Index("ix_creations_fingerprint", "project_id", "fingerprint", "seq"),
    Index("ix_creations_key", "project_id", "key", "seq"),
    Index("ix_creations_age", "began_at"),
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("seq", Seq, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("url", Text, nullable=False),
    Column("is_in_force", Boolean, nullable=False),
    Index("ix_webhooks_project", "project_id"),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("seq", Seq, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("webhook_id", Text, ForeignKey("webhooks.id"), nullable=False),
    Column("batch_id", Text, ForeignKey("batches.id"), nullable=False),
    Column("event", Text, nullable=False),
    Column("payload", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("attempts", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("queued_at", BigInteger, nullable=False),
    Column("next_attempt_at", Double),
    Column("ended_at", BigInteger),
    Column("last_attempt_at", BigInteger),
    Column("last_status_code", Integer),
    Column("last_error", Text),
    _one_of("status", DeliveryStatus),
    CheckConstraint("attempts >= 0", name="attempts"),
    CheckConstraint("(status = 'pending') = (next_attempt_at IS NOT NULL)", name="next"),
    CheckConstraint("(status = 'pending') = (ended_at IS NULL)", name="ended"),
    Index("ix_deliveries_status", "status", "next_attempt_at"),
    Index("ix_deliveries_ended", "ended_at"),
)

segment_objects = Table(
    "segment_objects",
    metadata,
    Column("batch_id", Text, ForeignKey("batches.id"), primary_key=True),
    Column("index", BigInteger, primary_key=True, autoincrement=False),
    Column("attempt", BigInteger, primary_key=True, autoincrement=False),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("key", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    CheckConstraint("bytes >= 0", name="bytes"),
)

workers = Table(
    "workers",
    metadata,
    Column("id", Text, primary_key=True),
    Column("version", Text, nullable=False),
    Column("started_at", Double, nullable=False),
    Column("seen_at", Double, nullable=False),
    Index("ix_workers_seen", "seen_at"),
)

budgets = Table(
    "budgets",
    metadata,
    # One row for each upstream; who changes a lease locks it.
    Column("upstream", Text, primary_key=True),
    Column("refused_at", Double),
    Column("held_until", Double),
)

budget_leases = Table(
    "budget_leases",
    metadata,
    Column("upstream", Text, ForeignKey("budgets.upstream"), primary_key=True),
    Column("worker_id", Text, primary_key=True),
    Column("demand", BigInteger, nullable=False),
    Column("concurrency", BigInteger, nullable=False),
    Column("requests_per_minute", Double, nullable=False),
    Column("tokens_per_minute", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    CheckConstraint("demand >= 0 AND concurrency >= 0", name="counts"),
)

schema_floor = Table(
    "schema_floor",
    metadata,
    # One row: the oldest version of the schema whose code can work with this one.
    Column("version", Text, primary_key=True),
)
