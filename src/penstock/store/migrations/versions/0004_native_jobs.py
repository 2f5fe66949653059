"""Jobs at providers' own batch APIs, and upstreams that clients choose by name."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("batches", sa.Column("upstream", sa.Text))
    op.add_column("batches", sa.Column("parameters", sa.JSON(none_as_null=True)))
    op.add_column("slices", sa.Column("upstream", sa.Text))
    op.add_column("slices", sa.Column("native_run", sa.Text))
    op.create_index("ix_slices_native", "slices", ["native_run", "index"])
    op.create_table(
        "native_jobs",
        sa.Column(
            "seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True
        ),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("batch_id", sa.Text, sa.ForeignKey("batches.id"), nullable=False),
        sa.Column("upstream", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("requests", sa.Integer, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("submission", sa.Integer, nullable=False),
        sa.Column("native_id", sa.Text),
        sa.Column("begun_at", sa.Double),
        sa.Column("submitted_at", sa.Double),
        sa.Column("due_at", sa.Double),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("cancel_wanted_at", sa.Double),
        sa.Column("details", sa.JSON, nullable=False),
        sa.Column("outcome", sa.Text),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("completed", sa.BigInteger, nullable=False),
        sa.Column("failed", sa.BigInteger, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.CheckConstraint(
            "status IN ('waiting', 'submitting', 'submitted', 'collecting', 'ended')",
            name="status",
        ),
        sa.CheckConstraint(
            "requests >= 1 AND submission >= 1 AND attempts >= 0", name="counts"
        ),
        sa.CheckConstraint("(status = 'ended') = (due_at IS NULL)", name="due"),
        sa.CheckConstraint("status <> 'submitted' OR native_id IS NOT NULL", name="native"),
        sa.CheckConstraint("status <> 'submitting' OR begun_at IS NOT NULL", name="begun"),
    )
    op.create_index("ix_native_jobs_batch", "native_jobs", ["batch_id", "seq"])
    op.create_index("ix_native_jobs_status", "native_jobs", ["status", "due_at"])
