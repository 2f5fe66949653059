"""Uploads in parts, creations that happen once, webhooks; how long a batch's files live."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_SEQ = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.add_column("batches", sa.Column("output_life_s", sa.BigInteger))
    op.create_table(
        "deleted_files",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("project_id", sa.Text, sa.ForeignKey("projects.id"), nullable=False),
        sa.Column("deleted_at", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_deleted_files_age", "deleted_files", ["deleted_at"])
    _create_uploads()
    _create_creations()
    _create_webhooks()
    _create_deliveries()


def _create_uploads() -> None:
    op.create_table(
        "uploads",
        sa.Column("seq", _SEQ, primary_key=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("project_id", sa.Text, sa.ForeignKey("projects.id"), nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("purpose", sa.Text, nullable=False),
        sa.Column("filename", sa.Text, nullable=False),
        sa.Column("mime_type", sa.Text, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("file_life_s", sa.BigInteger),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.Column("ended_at", sa.BigInteger),
        sa.Column("part_ids", sa.JSON, nullable=False),
        sa.Column("file_id", sa.Text),
        sa.CheckConstraint(
            "status IN ('pending', 'completed', 'cancelled', 'expired')", name="status"
        ),
        sa.CheckConstraint("bytes >= 0", name="bytes"),
        sa.CheckConstraint("(status = 'pending') = (ended_at IS NULL)", name="ended"),
        sa.CheckConstraint("(status = 'completed') = (file_id IS NOT NULL)", name="file"),
    )
    op.create_index("ix_uploads_status", "uploads", ["status", "expires_at"])
    op.create_table(
        "upload_parts",
        sa.Column("seq", _SEQ, primary_key=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("upload_id", sa.Text, sa.ForeignKey("uploads.id"), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("blob_key", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.CheckConstraint("bytes >= 0", name="bytes"),
    )
    op.create_index("ix_upload_parts_upload", "upload_parts", ["upload_id", "seq"])
    op.create_index("ix_upload_parts_blob", "upload_parts", ["blob_key"])


def _create_creations() -> None:
    op.create_table(
        "creations",
        sa.Column("seq", _SEQ, primary_key=True),
        sa.Column("project_id", sa.Text, sa.ForeignKey("projects.id"), nullable=False),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("key", sa.Text),
        sa.Column("is_retry", sa.Boolean, nullable=False),
        sa.Column("object_id", sa.Text, nullable=False),
        sa.Column("began_at", sa.Double, nullable=False),
    )
    columns = ["project_id", "fingerprint", "seq"]
    op.create_index("ix_creations_fingerprint", "creations", columns)
    op.create_index("ix_creations_key", "creations", ["project_id", "key", "seq"])
    op.create_index("ix_creations_age", "creations", ["began_at"])


def _create_webhooks() -> None:
    op.create_table(
        "webhooks",
        sa.Column("seq", _SEQ, primary_key=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("project_id", sa.Text, sa.ForeignKey("projects.id"), nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("is_in_force", sa.Boolean, nullable=False),
    )
    op.create_index("ix_webhooks_project", "webhooks", ["project_id"])


def _create_deliveries() -> None:
    op.create_table(
        "deliveries",
        sa.Column("seq", _SEQ, primary_key=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("webhook_id", sa.Text, sa.ForeignKey("webhooks.id"), nullable=False),
        sa.Column("batch_id", sa.Text, sa.ForeignKey("batches.id"), nullable=False),
        sa.Column("event", sa.Text, nullable=False),
        sa.Column("payload", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("attempts", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("queued_at", sa.BigInteger, nullable=False),
        sa.Column("next_attempt_at", sa.Double),
        sa.Column("ended_at", sa.BigInteger),
        sa.Column("last_attempt_at", sa.BigInteger),
        sa.Column("last_status_code", sa.Integer),
        sa.Column("last_error", sa.Text),
        sa.CheckConstraint("status IN ('pending', 'delivered', 'failed')", name="status"),
        sa.CheckConstraint("attempts >= 0", name="attempts"),
        sa.CheckConstraint("(status = 'pending') = (next_attempt_at IS NOT NULL)", name="next"),
        sa.CheckConstraint("(status = 'pending') = (ended_at IS NULL)", name="ended"),
    )
    op.create_index("ix_deliveries_status", "deliveries", ["status", "next_attempt_at"])
    op.create_index("ix_deliveries_ended", "deliveries", ["ended_at"])
