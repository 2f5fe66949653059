"""Bring a database's schema to the one that this version of Penstock works with.

Migrations only go forward. On SQLite all of them run inside the caller's transaction: a
database is at one version or the next, never between. On PostgreSQL each has a transaction of
its own, and runs while processes of the version before are at work. Therefore a migration

- begins with what cannot stand in a transaction, by `steps.create_index`, which may be done
  twice: the rest of the migration may have failed;
- holds a lock on a table that exists for moments only: a new column has a constant default or
  may be null, a constraint is added NOT VALID and validated afterwards;
- leaves alone what the version before reads and writes. Where that cannot be, it raises the
  floor: the oldest version of the schema whose code can work with the new one.

Alembic is imported only when there is something to migrate, for it costs more memory and time
than the rest of a start: an empty database gets its tables as they stand now, which a test
holds to what the migrations build.
"""

from pathlib import Path

from sqlalchemy import Connection, insert, inspect, select, text

from penstock.errors import InvalidSettings
from penstock.store.tables import metadata, schema_floor

_VERSION_TABLE = """
CREATE TABLE alembic_version (
    version_num VARCHAR(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
)
"""
HEAD = "0005"
"""The newest version, the number of the last file in `versions`."""
FLOOR = "0003"
"""The oldest version whose code can work with `HEAD`."""


def find_version(db: Connection) -> str | None:
    """The schema's version; None if the database is empty."""
    if not inspect(db).has_table("alembic_version"):
        return None
    return db.execute(text("SELECT version_num FROM alembic_version")).scalar_one()


def check(db: Connection) -> None:
    """Make sure that this version of Penstock can work with the schema as it is.

    Raises:
        InvalidSettings: It is older, and to be migrated first; or it is too new.
    """
    version = find_version(db)
    if version is None:
        raise InvalidSettings("The database is empty: run `penstock migrate` once.")
    if version < HEAD:
        raise InvalidSettings(
            f"The database is at schema version {version}, but this version of Penstock works "
            f"with {HEAD}: run `penstock migrate`, then start again."
        )
    _check_floor(db, version)


def upgrade(db: Connection) -> None:
    """Bring the schema to `HEAD`, within the transaction that is open on `db`.

    The caller holds the database's write lock, so that of two processes one migrates and
    the other finds it done.

    Raises:
        InvalidSettings: The schema is too new for this version of Penstock.
    """
    version = find_version(db)
    if version is None:
        _create(db)
    elif version < HEAD:
        migrate(db)
    else:
        _check_floor(db, version)


def upgrade_beside(db: Connection) -> None:
    """As `upgrade`, in several transactions, on a database that others work with meanwhile.

    It may be called again after it failed. The caller sees to it that nobody else does.
    """
    with db.begin():
        version = find_version(db)
        if version is None:
            _create(db)
        elif version >= HEAD:
            _check_floor(db, version)
    if version is not None and version < HEAD:
        migrate(db)


def migrate(db: Connection, *, to: str = HEAD) -> None:
    """Run the migrations from the schema's version, or from nothing, up to `to`."""
    from alembic import command  # noqa: PLC0415 - see above
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = db
    command.upgrade(config, to)


def _create(db: Connection) -> None:
    metadata.create_all(db)
    db.execute(insert(schema_floor).values(version=FLOOR))
    db.execute(text(_VERSION_TABLE))
    db.execute(text("INSERT INTO alembic_version VALUES (:head)"), {"head": HEAD})


def _check_floor(db: Connection, version: str) -> None:
    floor = db.execute(select(schema_floor.c.version)).scalar_one()
    if floor > HEAD:
        raise InvalidSettings(
            f"The database is at schema version {version}, with which versions of Penstock can "
            f"work that know {floor}, but this one knows none after {HEAD}: use the newer "
            "Penstock that has written it."
        )
