"""Bring a database's schema to the one that this version of Penstock works with.

Migrations only go forward, and each runs inside the caller's transaction: a database is at
one version or the next, never between. Alembic is imported only when there is something to
migrate, for it costs more memory and time than the rest of a start.
"""

from pathlib import Path

from sqlalchemy import Connection, inspect, text

from penstock.errors import InvalidSettings

HEAD = "0001"
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
    if version == HEAD:
        return
    if version is not None and version > HEAD:
        raise InvalidSettings(
            f"The database is at schema version {version}, but this version of Penstock knows "
            f"none after {HEAD}: use the newer Penstock that has written it."
        )

    from alembic import command  # noqa: PLC0415 - see above
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = db
    command.upgrade(config, "head")
