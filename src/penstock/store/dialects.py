"""What SQLite and PostgreSQL do differently in a statement, and nothing else does.

On SQLite one transaction writes at a time, so there is nothing to lock: `lock_rows` and
`lock_name` are for PostgreSQL, where many write at once.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Connection,
    Dialect,
    Executable,
    Table,
    Text,
    TypeDecorator,
    bindparam,
    func,
    select,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql

POSTGRESQL = "postgresql"


def upsert(db: Connection, table: Table) -> "sqlite.Insert | postgresql.Insert":
    """An insert that takes `on_conflict_do_update`."""
    if db.dialect.name == POSTGRESQL:
        # Costs a tenth of a second and some memory, which one process alone need not spend.
        from sqlalchemy.dialects import postgresql  # noqa: PLC0415

        return postgresql.insert(table)
    return sqlite.insert(table)


# Locks


def lock_rows(
    db: Connection, statement: Executable, values: Mapping[str, object] | None = None
) -> None:
    """Run a `SELECT ... FOR UPDATE` only for its locks."""
    if db.dialect.name == POSTGRESQL:
        db.execute(statement, values)


def lock_name(db: Connection, *parts: str) -> None:
    """Hold what these parts name until the transaction ends, where there is no row to lock."""
    if db.dialect.name == POSTGRESQL:
        db.execute(select(func.pg_advisory_xact_lock(number_of(*parts))))


def number_of(*parts: str) -> int:
    """The number under which PostgreSQL knows a lock that has no row."""
    name = "\0".join(("penstock", *parts)).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), signed=True)


# Lists of values


class _Texts(TypeDecorator[Sequence[str]]):
    """Texts as one value."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(ARRAY(Text()))

    def process_bind_param(self, value: Sequence[str] | None, dialect: Dialect) -> list[str]:
        return [str(text) for text in value or ()]


class _IsOneOf(FunctionElement[Any]):
    # Without the type Boolean, of which SQLAlchemy makes `... = 1` on SQLite: no index is
    # searched for that.
    inherit_cache = True


@compiles(_IsOneOf, "sqlite")
def _is_one_of_sqlite(element: _IsOneOf, compiler: SQLCompiler, **options: Any) -> str:
    # A value for each text: SQLite would not search its index for a list of unknown length.
    column, texts = element.clauses
    one_by_one = column.in_(bindparam(texts.key, expanding=True))
    return compiler.process(one_by_one, **options)


@compiles(_IsOneOf, POSTGRESQL)
def _is_one_of_postgresql(element: _IsOneOf, compiler: SQLCompiler, **options: Any) -> str:
    # An array: it is one statement, prepared once, for any number of them.
    column, texts = (compiler.process(each, **options) for each in element.clauses)
    return f"{column} = ANY ({texts})"


def is_one_of(column: ColumnElement[str], name: str) -> ColumnElement[bool]:
    """The condition that a column is one of the texts that are given as `name`."""
    return _IsOneOf(column, bindparam(name, type_=_Texts()))


# JSON


class json_entries(FunctionElement[Any]):  # noqa: N801 - it is used like `func.json_each`
    """The keys of a JSON object and their values, which are texts, as a table."""

    inherit_cache = True


@compiles(json_entries, "sqlite")
def _entries_sqlite(element: json_entries, compiler: SQLCompiler, **options: Any) -> str:
    return f"json_each({compiler.process(element.clauses, **options)})"


@compiles(json_entries, POSTGRESQL)
def _entries_postgresql(element: json_entries, compiler: SQLCompiler, **options: Any) -> str:
    return f"json_each_text({compiler.process(element.clauses, **options)})"
