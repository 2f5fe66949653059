"""Webhooks and what is delivered to them, in SQL."""

import secrets
from collections.abc import Sequence

from sqlalchemy import Connection, bindparam, delete, insert, select, update

from penstock.errors import NotFound
from penstock.events import batch_event
from penstock.model import (
    Batch,
    Delivery,
    DeliveryId,
    DeliveryStatus,
    Job,
    JobKind,
    Webhook,
)
from penstock.store.base import DeliveryReport, Page
from penstock.store.dialects import lock_name, upsert
from penstock.store.rows import DELIVERY_FIELDS, to_delivery
from penstock.store.tables import (
    batches,
    creations,
    deleted_files,
    deliveries,
    uploads,
    webhooks,
)
from penstock.store.transactions import SqlTransactions, after


class WebhookStore(SqlTransactions):
    """The part of the store that keeps webhooks and deliveries."""

    async def set_webhooks(self, in_force: Sequence[Webhook]) -> None:
        def work(db: Connection) -> None:
            lock_name(db, "webhooks")  # or two hosts would put in force what each has
            db.execute(update(webhooks).values(is_in_force=False))
            for each in in_force:
                statement = upsert(db, webhooks).values(
                    id=each.id, project_id=each.project_id, url=each.url, is_in_force=True
                )
                db.execute(
                    statement.on_conflict_do_update(
                        index_elements=["id"], set_={"is_in_force": True}
                    )
                )

        await self._write(work)

    async def list_webhooks(self) -> list[Webhook]:
        return [Webhook(**row) for row in await self._read(_WEBHOOKS)]

    async def get_delivery(self, delivery_id: DeliveryId) -> Delivery:
        rows = await self._read(_GET_DELIVERY, {"id": delivery_id})
        if not rows:
            raise _no_delivery(delivery_id)
        return to_delivery(rows[0])

    async def list_deliveries(
        self, page: Page, *, status: DeliveryStatus | None = None
    ) -> list[Delivery]:
        statement = _DELIVERIES.where(*after(deliveries, None, page.after, descending=True))
        if status is not None:
            statement = statement.where(deliveries.c.status == status)
        statement = statement.order_by(deliveries.c.seq.desc()).limit(page.limit)
        return [to_delivery(row) for row in await self._read(statement)]

    async def list_due_deliveries(self, *, until: float | None) -> list[Job]:
        statement = _PENDING
        if until is not None:
            statement = statement.where(deliveries.c.next_attempt_at <= until)
        return [
            Job(kind=JobKind.WEBHOOK, id=row["id"], due_at=row["next_attempt_at"])
            for row in await self._read(statement)
        ]

    async def report_delivery(self, report: DeliveryReport) -> bool:
        jobs: list[Job] = []
        is_over = report.status is not DeliveryStatus.PENDING
        values = {
            "status": report.status,
            "attempts": report.attempt,
            "next_attempt_at": report.next_attempt_at,
            "ended_at": report.at if is_over else None,
            "last_attempt_at": report.at,
            "last_status_code": report.status_code,
            "last_error": report.error,
        }
        statement = (
            update(deliveries)
            .where(
                deliveries.c.id == report.id,
                deliveries.c.status == DeliveryStatus.PENDING,
                deliveries.c.attempts == report.attempt - 1,
            )
            .values(values)
        )

        def work(db: Connection) -> bool:
            is_kept = db.execute(statement).rowcount == 1
            if is_kept and not is_over:
                due_at = report.next_attempt_at
                jobs.append(Job(kind=JobKind.WEBHOOK, id=report.id, due_at=due_at))
            return is_kept

        return await self._write(work, jobs=jobs)

    async def replay_delivery(self, delivery_id: DeliveryId, *, now: int) -> Delivery:
        statement = (
            update(deliveries)
            .where(deliveries.c.id == delivery_id)
            .values(
                status=DeliveryStatus.PENDING,
                attempts=0,
                queued_at=now,
                next_attempt_at=now,
                ended_at=None,
            )
        )

        def work(db: Connection) -> Delivery:
            if not db.execute(statement).rowcount:
                raise _no_delivery(delivery_id)
            return to_delivery(db.execute(_GET_DELIVERY, {"id": delivery_id}).mappings().one())

        jobs = [Job(kind=JobKind.WEBHOOK, id=delivery_id)]
        return await self._write(work, jobs=jobs)

    async def forget_ended(self, *, ended_before: int, begun_before: float) -> None:
        def work(db: Connection) -> None:
            db.execute(delete(deliveries).where(deliveries.c.ended_at < ended_before))
            db.execute(delete(uploads).where(uploads.c.ended_at < ended_before))
            db.execute(delete(deleted_files).where(deleted_files.c.deleted_at < ended_before))
            db.execute(delete(creations).where(creations.c.began_at < begun_before))

        await self._write(work, durable=False)


def add_deliveries(db: Connection, batch: Batch, *, now: int) -> list[Job]:
    """Queue the event of a batch that has just ended, in the transaction that ends it."""
    hooks = db.execute(_WEBHOOKS_OF, {"project_id": batch.project_id}).scalars().all()
    if not hooks:
        return []
    event, payload = batch_event(batch, event_id=f"evt_{secrets.token_hex(16)}")
    rows = [
        {
            "id": f"wh_{secrets.token_hex(16)}",
            "webhook_id": hook,
            "batch_id": batch.id,
            "event": event,
            "payload": payload,
            "status": DeliveryStatus.PENDING,
            "attempts": 0,
            "created_at": now,
            "queued_at": now,
            "next_attempt_at": now,
        }
        for hook in hooks
    ]
    db.execute(insert(deliveries), rows)
    return [Job(kind=JobKind.WEBHOOK, id=str(row["id"])) for row in rows]


_WEBHOOKS = (
    select(webhooks.c.id, webhooks.c.project_id, webhooks.c.url)
    .where(webhooks.c.is_in_force)
    .order_by(webhooks.c.seq)
)

_WEBHOOKS_OF = (
    select(webhooks.c.id)
    .where(webhooks.c.project_id == bindparam("project_id"), webhooks.c.is_in_force)
    .order_by(webhooks.c.seq)
)

_DELIVERIES = (
    select(
        *(deliveries.c[name] for name in DELIVERY_FIELDS if name in deliveries.c),
        webhooks.c.url,
        batches.c.project_id,
    )
    .join(webhooks, webhooks.c.id == deliveries.c.webhook_id)
    .join(batches, batches.c.id == deliveries.c.batch_id)
)

_GET_DELIVERY = _DELIVERIES.where(deliveries.c.id == bindparam("id"))

_PENDING = (
    select(deliveries.c.id, deliveries.c.next_attempt_at)
    .where(deliveries.c.status == DeliveryStatus.PENDING)
    .order_by(deliveries.c.next_attempt_at)
)


def _no_delivery(delivery_id: DeliveryId) -> NotFound:
    return NotFound(f"No delivery has the ID '{delivery_id}'.")
