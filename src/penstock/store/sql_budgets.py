"""What workers share of upstreams, in SQL."""

from collections.abc import Sequence
from dataclasses import asdict

from sqlalchemy import Connection, RowMapping, bindparam, delete, insert, select, update

from penstock.shares import NOTHING, Claim, Part, decide_part
from penstock.store.base import Budget, BudgetRequest
from penstock.store.dialects import upsert
from penstock.store.tables import budget_leases, budgets
from penstock.store.transactions import SqlTransactions


class BudgetStore(SqlTransactions):
    """The part of the store that leases budgets."""

    async def lease_budgets(
        self, worker_id: str, requests: Sequence[BudgetRequest], *, lease_s: float, now: float
    ) -> list[Budget]:
        def work(db: Connection) -> list[Budget]:
            # Two workers that lock the same rows do so in the same order.
            ordered = sorted(requests, key=lambda each: each.upstream)
            made = {
                each.upstream: _lease(db, worker_id, each, lease_s=lease_s, now=now)
                for each in ordered
            }
            return [made[each.upstream] for each in requests]

        # Durable: a database that forgot a lease would give its part away a second time.
        return await self._write(work) if requests else []


def _lease(
    db: Connection, worker_id: str, request: BudgetRequest, *, lease_s: float, now: float
) -> Budget:
    """Renew one part, with the upstream's row locked.

    All workers queue for that row, so as little is asked of the database as can be.
    """
    told = _lock_and_tell(db, request)
    rows = db.execute(_LEASES, {"upstream": request.upstream}).mappings().all()
    if any(row["expires_at"] <= now for row in rows):
        # Not only passed over: if a clock were set back, they would be in force again.
        db.execute(_FORGET_ENDED, {"upstream": request.upstream, "now": now})
    claims = {row["worker_id"]: _claim_of(row) for row in rows if row["expires_at"] > now}
    held = claims.pop(worker_id, None)
    decision = decide_part(
        Part(
            concurrency=request.max_concurrency,
            requests_per_minute=request.requests_per_minute,
            tokens_per_minute=request.tokens_per_minute,
        ),
        Claim(
            worker_id=worker_id,
            demand=request.demand,
            holds=held.holds if held else NOTHING,
        ),
        list(claims.values()),
        in_flight=request.in_flight,
        now=now,
    )
    values = {
        "demand": request.demand,
        **asdict(decision.holds),
        "expires_at": now + lease_s,
    }
    key = {"upstream": request.upstream, "worker_id": worker_id}
    if held is None:
        db.execute(insert(budget_leases).values(key | values))
    else:
        db.execute(_RENEW.values(values), {f"of_{name}": key[name] for name in key})
    return Budget(
        upstream=request.upstream,
        concurrency=decision.part.concurrency,
        requests_per_minute=decision.part.requests_per_minute,
        tokens_per_minute=decision.part.tokens_per_minute,
        refused_at=told["refused_at"],
        held_until=told["held_until"],
    )


def _lock_and_tell(db: Connection, request: BudgetRequest) -> dict[str, float | None]:
    """Lock an upstream's row, add what is new, and read what all are to hear."""
    key = {"upstream": request.upstream}
    row = db.execute(_LOCK_BUDGET, key).mappings().first()
    if row is None:
        db.execute(upsert(db, budgets).values(key).on_conflict_do_nothing())
        row = db.execute(_LOCK_BUDGET, key).mappings().one()
    told = {
        "refused_at": _latest(row["refused_at"], request.refused_at),
        "held_until": _latest(row["held_until"], request.held_until),
    }
    if told != dict(row):
        db.execute(_TELL, {"of_upstream": request.upstream, **told})
    return told


def _latest(one: float | None, other: float | None) -> float | None:
    return max((at for at in (one, other) if at is not None), default=None)


def _claim_of(row: RowMapping) -> Claim:
    return Claim(
        worker_id=row["worker_id"],
        demand=row["demand"],
        holds=Part(
            concurrency=row["concurrency"],
            requests_per_minute=row["requests_per_minute"],
            tokens_per_minute=row["tokens_per_minute"],
        ),
    )


_LOCK_BUDGET = (
    select(budgets.c.refused_at, budgets.c.held_until)
    .where(budgets.c.upstream == bindparam("upstream"))
    .with_for_update()
)

_TELL = (
    update(budgets)
    .where(budgets.c.upstream == bindparam("of_upstream"))
    .values(refused_at=bindparam("refused_at"), held_until=bindparam("held_until"))
)

_FORGET_ENDED = delete(budget_leases).where(
    budget_leases.c.upstream == bindparam("upstream"),
    budget_leases.c.expires_at <= bindparam("now"),
)

_LEASES = select(budget_leases).where(budget_leases.c.upstream == bindparam("upstream"))

_RENEW = update(budget_leases).where(
    budget_leases.c.upstream == bindparam("of_upstream"),
    budget_leases.c.worker_id == bindparam("of_worker_id"),
)
