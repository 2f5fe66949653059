"""What jobs at providers' own batch APIs took."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    for name in (
        "answered",
        "input_tokens",
        "cached_tokens",
        "output_tokens",
        "reasoning_tokens",
        "total_tokens",
    ):
        op.add_column("native_jobs", sa.Column(name, sa.BigInteger))
    op.add_column("native_jobs", sa.Column("paid_model", sa.Text))
    op.add_column("native_jobs", sa.Column("longest_input", sa.BigInteger))
