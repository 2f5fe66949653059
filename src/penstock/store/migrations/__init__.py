"""Bring a database's schema to the one that this version of Penstock works with.

Migrations only go forward, and each runs inside the caller's transaction: a database is at
one version or the next, never between. Alembic is imported only when there is something to
migrate, for it costs more memory and time than the rest of a start: an empty database gets its
tables as they stand now, which a test holds to what the migrations build.
"""

from pathlib import Path

from sqlalchemy import Connection, inspect, text

from penstock.errors import InvalidSettings
from penstock.store.tables import metadata

_VERSION_TABLE = """
CREATE TABLE alembic_version (
    version_num VARCHAR(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
)
"""
HEAD = "0004"
"""The newest version, the number of the last file in `versions`."""


def find_version(db: Connection) -> str | None:
    """The schema's version; None if the database is empty."""
    if not inspect(db).has_table("alembic_version"):
        return None
    return db.execute(text("SELECT version_num FROM alembic_version")).scalar_one()


def upgrade(db: Connection) -> None:
    """Bring the schema to `HEAD`, within the transaction that is open on `db`.

    The caller holds the database's write lock, so that of two processes one migrates and
    the other finds it done.

    Raises:
        InvalidSettings: The schema is newer than this version of Penstock.
    """
    version = find_version(db)
    if version is None:
        metadata.create_all(db)
        db.execute(text(_VERSION_TABLE))
        db.execute(text("INSERT INTO alembic_version VALUES (:head)"), {"head": HEAD})
    elif version > HEAD:
        raise InvalidSettings(
            f"The database is at schema version {version}, but this version of Penstock knows "
            f"none after {HEAD}: use the newer Penstock that has written it."
        )
    elif version < HEAD:
        migrate(db)


def migrate(db: Connection) -> None:
    """Run the migrations from the schema's version, or from nothing, to `HEAD`."""
    from alembic import command  # noqa: PLC0415 - see above
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = db
    command.upgrade(config, "head")
