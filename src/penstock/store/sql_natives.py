"""Native runs, in SQL."""

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import Connection, Double, bindparam, case, func, insert, select, update

from penstock.errors import NotFound
from penstock.model import (
    BatchId,
    Job,
    JobKind,
    NativeRun,
    NativeRunId,
    NativeRunStatus,
    Slice,
    SliceId,
    SliceStatus,
    Spent,
)
from penstock.store.rows import (
    NATIVE_FIELDS,
    SLICE_FIELDS,
    SPENT,
    TOKENS,
    native_values,
    to_native_run,
    to_slice,
    to_usage,
)
from penstock.store.sql_upkeep import FORGET_FINAL
from penstock.store.tables import native_jobs, slices
from penstock.store.transactions import SqlTransactions, portions

_INTERRUPTIBLE = (NativeRunStatus.WAITING, NativeRunStatus.SUBMITTED)
"""Runs of which nobody is at work between two looks."""


class NativeStore(SqlTransactions):
    """The part of the store that keeps native runs."""

    async def get_native_run(self, run_id: NativeRunId) -> NativeRun:
        rows = await self._read(_GET_RUN, {"of_run": run_id})
        if not rows:
            raise NotFound(f"No native run has the ID '{run_id}'.")
        return to_native_run(rows[0])

    async def list_native_runs(self, batch_id: BatchId) -> list[NativeRun]:
        rows = await self._read(_RUNS_OF_BATCH, {"batch_id": batch_id})
        return [to_native_run(row) for row in rows]

    async def list_native_jobs(self, *, until: float | None) -> list[Job]:
        statement = _UNFINISHED
        if until is not None:
            statement = statement.where(native_jobs.c.due_at <= until)
        rows = await self._read(statement)
        return [native_job(to_native_run(row)) for row in rows]

    async def count_native_lines(self) -> dict[tuple[str, NativeRunStatus], int]:
        rows = await self._read(_COUNT_LINES)
        return {
            (row["upstream"], NativeRunStatus(row["status"])): int(row["lines"]) for row in rows
        }

    async def sum_native_spent(self) -> dict[str, list[Spent]]:
        found: dict[str, list[Spent]] = {}
        for row in await self._read(_SUM_SPENT):
            spent = Spent(
                answered=int(row["answered"]),
                usage=to_usage({name: int(row[name]) for name in TOKENS}),
                model=row["paid_model"],
                longest_input=row["longest_input"],
            )
            found.setdefault(row["upstream"], []).append(spent)
        return found

    async def get_native_slices(self, run_id: NativeRunId) -> list[Slice]:
        return [to_slice(row) for row in await self._read(_SLICES_OF_RUN, {"of_run": run_id})]

    async def keep_native_run(self, run: NativeRun, *, now: float) -> NativeRun | None:
        jobs: list[Job] = []

        def work(db: Connection) -> NativeRun | None:
            kept = _keep(db, run, now)
            if kept is None:
                return None
            if kept.status is NativeRunStatus.ENDED:
                db.execute(_LET_GO, {"of_run": run.id})
                db.execute(FORGET_FINAL, {"batch_id": run.batch_id})
                jobs.append(Job(kind=JobKind.FINALIZE, id=run.batch_id))
            else:
                jobs.append(native_job(kept))
            return kept

        return await self._write(work, jobs=jobs)

    async def split_native_run(
        self,
        run: NativeRun,
        parts: Sequence[tuple[NativeRun, Sequence[SliceId]]],
        *,
        now: float,
    ) -> bool:
        jobs: list[Job] = []

        def work(db: Connection) -> bool:
            kept = _keep(db, replace(run, status=NativeRunStatus.ENDED, due_at=None), now)
            if kept is None:
                return False
            for part, ids in parts:
                new = replace(part, cancel_wanted_at=kept.cancel_wanted_at)
                db.execute(insert(native_jobs), native_values(new))
                for some in portions(ids):
                    db.execute(_HAND_OVER, {"to_run": new.id, "ids": some})
                jobs.append(native_job(new))
            return True

        return await self._write(work, jobs=jobs)

    async def cancel_native_runs(self, batch_id: BatchId, *, now: float) -> None:
        jobs: list[Job] = []

        def work(db: Connection) -> None:
            key = {"of_batch": batch_id, "now": now}
            if db.execute(_WANT_CANCEL, key).rowcount:
                rows = db.execute(_UNFINISHED_OF_BATCH, {"batch_id": batch_id}).mappings()
                jobs.extend(native_job(to_native_run(row)) for row in rows)

        await self._write(work, jobs=jobs)

    async def recover_native_runs(self, *, due_at: float) -> list[Job]:
        def work(db: Connection) -> list[Job]:
            db.execute(_RECOVER_RUNS, {"at": due_at})
            rows = db.execute(_UNFINISHED).mappings().all()
            return [native_job(to_native_run(row)) for row in rows]

        return await self._write(work)


def native_job(run: NativeRun) -> Job:
    """The job by which a run is taken further."""
    return Job(kind=JobKind.NATIVE, id=run.id, due_at=run.due_at)


def _keep(db: Connection, run: NativeRun, now: float) -> NativeRun | None:
    """Write a run, unless it was written since it was read."""
    row = db.execute(_LOCK_RUN, {"of_run": run.id}).mappings().one_or_none()
    if row is None or row["version"] != run.version:
        return None
    if row["status"] == NativeRunStatus.ENDED:
        return None
    wanted = row["cancel_wanted_at"]
    kept = replace(run, version=run.version + 1)
    if wanted is not None and run.cancel_wanted_at is None:
        kept = replace(kept, cancel_wanted_at=wanted)
        if kept.status in _INTERRUPTIBLE:
            kept = replace(kept, due_at=now)
    db.execute(
        update(native_jobs).where(native_jobs.c.id == run.id).values(native_values(kept))
    )
    return kept


_RUNS = select(*(native_jobs.c[name] for name in (*NATIVE_FIELDS, *SPENT)))

_GET_RUN = _RUNS.where(native_jobs.c.id == bindparam("of_run"))

_RUNS_OF_BATCH = _RUNS.where(native_jobs.c.batch_id == bindparam("batch_id")).order_by(
    native_jobs.c.seq
)

_COUNT_LINES = (
    select(
        native_jobs.c.upstream,
        native_jobs.c.status,
        func.sum(native_jobs.c.requests).label("lines"),
    )
    .where(native_jobs.c.status != NativeRunStatus.ENDED)
    .group_by(native_jobs.c.upstream, native_jobs.c.status)
)

_SUM_SPENT = (
    select(
        native_jobs.c.upstream,
        native_jobs.c.paid_model,
        func.max(native_jobs.c.longest_input).label("longest_input"),
        *(func.sum(native_jobs.c[name]).label(name) for name in ("answered", *TOKENS)),
    )
    .where(native_jobs.c.answered.is_not(None))
    .group_by(native_jobs.c.upstream, native_jobs.c.paid_model)
    .order_by(native_jobs.c.upstream, native_jobs.c.paid_model)
)

_UNFINISHED = _RUNS.where(native_jobs.c.status != NativeRunStatus.ENDED).order_by(
    native_jobs.c.due_at
)

_UNFINISHED_OF_BATCH = _UNFINISHED.where(native_jobs.c.batch_id == bindparam("batch_id"))

_SLICES_OF_RUN = (
    select(*(slices.c[name] for name in (*SLICE_FIELDS, *TOKENS)))
    .where(slices.c.native_run == bindparam("of_run"))
    .order_by(slices.c.index)
)

_LOCK_RUN = _RUNS.where(native_jobs.c.id == bindparam("of_run")).with_for_update()

_LET_GO = (
    update(slices).where(slices.c.native_run == bindparam("of_run")).values(native_run=None)
)

_HAND_OVER = (
    update(slices)
    .where(
        slices.c.id.in_(bindparam("ids", expanding=True)),
        slices.c.status != SliceStatus.ENDED,
    )
    .values(native_run=bindparam("to_run"))
)

_WANT_CANCEL = (
    update(native_jobs)
    .where(
        native_jobs.c.batch_id == bindparam("of_batch"),
        native_jobs.c.status != NativeRunStatus.ENDED,
        native_jobs.c.cancel_wanted_at.is_(None),
    )
    .values(
        cancel_wanted_at=bindparam("now", type_=Double),
        due_at=case(
            (native_jobs.c.status.in_(_INTERRUPTIBLE), bindparam("now", type_=Double)),
            else_=native_jobs.c.due_at,
        ),
    )
)

_RECOVER_RUNS = (
    update(native_jobs)
    .where(
        native_jobs.c.status == NativeRunStatus.SUBMITTING,
        native_jobs.c.due_at > bindparam("at", type_=Double),
    )
    .values(due_at=bindparam("at", type_=Double))
)
