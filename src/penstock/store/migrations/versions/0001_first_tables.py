"""The first tables: projects, keys, files, batches and slices."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_SEQ = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "projects",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False, unique=True),
        sa.Column("weight", sa.BigInteger, nullable=False),
        sa.CheckConstraint("weight >= 1", name="weight"),
    )
    op.create_table(
        "api_keys",
        sa.Column("seq", _SEQ, primary_key=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("project_id", sa.Text, sa.ForeignKey("projects.id"), nullable=False),
        sa.Column("digest", sa.Text, nullable=False, unique=True),
        sa.Column("hint", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("revoked_at", sa.BigInteger),
    )
    _create_files()
    _create_batches()
    _create_slices()


def _create_files() -> None:
    op.create_table(
        "files",
        sa.Column("seq", _SEQ, primary_key=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("project_id", sa.Text, sa.ForeignKey("projects.id"), nullable=False),
        sa.Column("purpose", sa.Text, nullable=False),
        sa.Column("filename", sa.Text, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("blob_key", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger),
        sa.CheckConstraint("bytes >= 0", name="bytes"),
    )
    op.create_index("ix_files_project", "files", ["project_id", "seq"])
    op.create_index("ix_files_blob", "files", ["blob_key"])
    op.create_index("ix_files_expiry", "files", ["expires_at"])


def _create_batches() -> None:
    op.create_table(
        "batches",
        sa.Column("seq", _SEQ, primary_key=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("project_id", sa.Text, sa.ForeignKey("projects.id"), nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("input_file_id", sa.Text, nullable=False),
        sa.Column("input_blob_key", sa.Text, nullable=False),
        sa.Column("output_file_id", sa.Text),
        sa.Column("error_file_id", sa.Text),
        sa.Column("completion_window", sa.Text, nullable=False),
        sa.Column("job_name", sa.Text),
        sa.Column("metadata", sa.JSON),
        sa.Column("model", sa.Text),
        sa.Column("faults", sa.JSON, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.Column("in_progress_at", sa.BigInteger),
        sa.Column("finalizing_at", sa.BigInteger),
        sa.Column("completed_at", sa.BigInteger),
        sa.Column("failed_at", sa.BigInteger),
        sa.Column("expired_at", sa.BigInteger),
        sa.Column("cancelling_at", sa.BigInteger),
        sa.Column("cancelled_at", sa.BigInteger),
        sa.Column("total", sa.BigInteger, nullable=False),
        sa.Column("completed", sa.BigInteger, nullable=False),
        sa.Column("failed", sa.BigInteger, nullable=False),
        sa.Column("input_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("output_tokens", sa.BigInteger, nullable=False),
        sa.Column("reasoning_tokens", sa.BigInteger, nullable=False),
        sa.Column("total_tokens", sa.BigInteger, nullable=False),
        sa.CheckConstraint(
            "status IN ('validating', 'failed', 'in_progress', 'finalizing', 'completed', "
            "'expired', 'cancelling', 'cancelled')",
            name="status",
        ),
        sa.CheckConstraint("completed >= 0 AND failed >= 0", name="counts"),
        sa.CheckConstraint("completed + failed <= total", name="total"),
        sa.CheckConstraint(
            "(status = 'completed') = (completed_at IS NOT NULL)", name="completed"
        ),
        sa.CheckConstraint("(status = 'failed') = (failed_at IS NOT NULL)", name="failed"),
        sa.CheckConstraint("(status = 'expired') = (expired_at IS NOT NULL)", name="expired"),
        sa.CheckConstraint(
            "(status = 'cancelled') = (cancelled_at IS NOT NULL)", name="cancelled"
        ),
    )
    op.create_index("ix_batches_project", "batches", ["project_id", "seq"])
    op.create_index("ix_batches_status", "batches", ["status", "seq"])
    op.create_index("ix_batches_input_blob", "batches", ["input_blob_key"])


def _create_slices() -> None:
    op.create_table(
        "slices",
        sa.Column("batch_id", sa.Text, sa.ForeignKey("batches.id"), primary_key=True),
        sa.Column("index", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("start", sa.BigInteger, nullable=False),
        sa.Column("end", sa.BigInteger, nullable=False),
        sa.Column("first_line", sa.BigInteger, nullable=False),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("models", sa.JSON, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("attempt", sa.BigInteger, nullable=False),
        sa.Column("worker_id", sa.Text),
        sa.Column("lease_expires_at", sa.Double),
        sa.Column("completed", sa.BigInteger, nullable=False),
        sa.Column("failed", sa.BigInteger, nullable=False),
        sa.Column("input_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("output_tokens", sa.BigInteger, nullable=False),
        sa.Column("reasoning_tokens", sa.BigInteger, nullable=False),
        sa.Column("total_tokens", sa.BigInteger, nullable=False),
        sa.CheckConstraint("status IN ('pending', 'running', 'ended')", name="status"),
        sa.CheckConstraint('0 <= "start" AND "start" < "end"', name="range"),
        sa.CheckConstraint('"index" >= 0 AND first_line >= 1 AND requests >= 1', name="place"),
        sa.CheckConstraint("attempt >= 0 AND completed >= 0 AND failed >= 0", name="counts"),
        sa.CheckConstraint("completed + failed <= requests", name="requests"),
        sa.CheckConstraint("(status = 'running') = (worker_id IS NOT NULL)", name="worker"),
        sa.CheckConstraint(
            "(status = 'running') = (lease_expires_at IS NOT NULL)", name="lease"
        ),
    )
    op.create_index("ix_slices_status", "slices", ["batch_id", "status", "index"])
