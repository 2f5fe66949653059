"""Creations that happen once, however often a client asks for them; the rules are `Once`'s."""

from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Boolean, Connection, RowMapping, and_, bindparam, insert, or_, select

from penstock.errors import Conflict
from penstock.model import KEY_LIFE_S, RETRY_LIFE_S, Once, ProjectId
from penstock.store.dialects import lock_name
from penstock.store.tables import creations

T = TypeVar("T")


def create_once(
    db: Connection,
    project_id: ProjectId,
    once: Once | None,
    *,
    load: Callable[[str], T | None],
    add: Callable[[], tuple[str, T]],
) -> T:
    """Find what an earlier request like this one made, or make it; in the open transaction.

    Args:
        once: None makes it in any case.
        load: Gets an object by its ID; None if it is gone, which makes a new one.
        add: Makes the object and tells its ID.

    Raises:
        Conflict: The request's key was used for something else.
    """
    if once is None:
        return add()[1]
    # Of two requests at once, the second is to find what the first has made.
    lock_name(db, "creation", project_id, once.key or "", "" if once.key else once.fingerprint)
    row = _find(db, project_id, once)
    if row is not None:
        if row["fingerprint"] != once.fingerprint:
            raise Conflict(
                f"The Idempotency-Key '{once.key}' was used for a request with other "
                "parameters: send the same request again, or take another key."
            )
        found = load(row["object_id"])
        if found is not None:
            return found
    object_id, made = add()
    values = {
        "project_id": project_id,
        "fingerprint": once.fingerprint,
        "key": once.key,
        "is_retry": once.is_retry,
        "object_id": object_id,
        "began_at": once.began_at,
    }
    db.execute(insert(creations), values)
    return made


def _find(db: Connection, project_id: ProjectId, once: Once) -> RowMapping | None:
    if once.key is not None:
        values = {
            "project_id": project_id,
            "key": once.key,
            "since": once.began_at - KEY_LIFE_S,
        }
        return db.execute(_BY_KEY, values).mappings().first()
    values = {
        "project_id": project_id,
        "fingerprint": once.fingerprint,
        "since": once.began_at - RETRY_LIFE_S,
        "began_at": once.began_at,
        "is_retry": once.is_retry,
    }
    return db.execute(_BY_FINGERPRINT, values).mappings().first()


_NEWEST = (
    select(creations.c.fingerprint, creations.c.object_id)
    .where(
        creations.c.project_id == bindparam("project_id"),
        creations.c.began_at > bindparam("since"),
    )
    .order_by(creations.c.seq.desc())
    .limit(1)
)

_BY_KEY = _NEWEST.where(creations.c.key == bindparam("key"))

_BY_FINGERPRINT = _NEWEST.where(
    creations.c.fingerprint == bindparam("fingerprint"),
    creations.c.key.is_(None),
    or_(
        bindparam("is_retry", type_=Boolean),
        and_(creations.c.is_retry, creations.c.began_at >= bindparam("began_at")),
    ),
)
