"""Where Alembic starts; it gets its connection from `migrate`.

Where a transaction is open on it, all migrations run inside that one; else each has its own.
"""

from alembic import context

from penstock.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transaction_per_migration=True,
)
with context.begin_transaction():
    context.run_migrations()
