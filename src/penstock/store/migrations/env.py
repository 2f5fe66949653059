"""Where Alembic starts; it gets its connection, with a transaction open, from `upgrade`."""

from alembic import context

from penstock.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
