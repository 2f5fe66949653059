"""What many workers share: objects that hold replies, workers, budgets; a background tier."""

import sqlalchemy as sa
from alembic import op

from penstock.store.migrations.steps import create_index

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    create_index("ix_slices_lease", "slices", ["lease_expires_at"])
    _create_floor()
    op.add_column(
        "projects",
        sa.Column("is_background", sa.Boolean, nullable=False, server_default=sa.false()),
    )
    op.create_table(
        "segment_objects",
        sa.Column("batch_id", sa.Text, sa.ForeignKey("batches.id"), primary_key=True),
        sa.Column("index", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("attempt", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.CheckConstraint("bytes >= 0", name="bytes"),
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("started_at", sa.Double, nullable=False),
        sa.Column("seen_at", sa.Double, nullable=False),
    )
    op.create_index("ix_workers_seen", "workers", ["seen_at"])
    op.create_table(
        "budgets",
        sa.Column("upstream", sa.Text, primary_key=True),
        sa.Column("refused_at", sa.Double),
        sa.Column("held_until", sa.Double),
    )
    op.create_table(
        "budget_leases",
        sa.Column("upstream", sa.Text, sa.ForeignKey("budgets.upstream"), primary_key=True),
        sa.Column("worker_id", sa.Text, primary_key=True),
        sa.Column("demand", sa.BigInteger, nullable=False),
        sa.Column("concurrency", sa.BigInteger, nullable=False),
        sa.Column("requests_per_minute", sa.Double, nullable=False),
        sa.Column("tokens_per_minute", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double, nullable=False),
        sa.CheckConstraint("demand >= 0 AND concurrency >= 0", name="counts"),
    )


def _create_floor() -> None:
    floor = op.create_table("schema_floor", sa.Column("version", sa.Text, primary_key=True))
    op.bulk_insert(floor, [{"version": "0003"}])
