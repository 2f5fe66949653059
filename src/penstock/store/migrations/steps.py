"""Steps of migrations that are taken differently on the two databases."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

_IS_INVALID = sa.text(
    "SELECT NOT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:name)"
)


def create_index(name: str, table: str, columns: Sequence[str]) -> None:
    """Index a table that may be large; on PostgreSQL without keeping writers from it.

    To be called before the steps of a migration that stand in its transaction. Called a second
    time it does nothing, but makes anew an index that was not finished.
    """
    context = op.get_context()
    if context.dialect.name != "postgresql":
        op.create_index(name, table, columns)
        return
    with context.autocommit_block():
        if op.get_bind().execute(_IS_INVALID, {"name": name}).scalar_one_or_none():
            op.drop_index(name, postgresql_concurrently=True)
        op.create_index(name, table, columns, if_not_exists=True, postgresql_concurrently=True)
