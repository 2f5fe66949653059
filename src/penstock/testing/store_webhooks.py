"""The contract kit of what a store keeps of webhooks.

Inherit from `WebhookContract` beside `StoreContract`, whose fixtures it uses.
"""

import json
from dataclasses import replace

import pytest

from penstock.errors import NotFound
from penstock.model import (
    BatchId,
    BatchStatus,
    Delivery,
    DeliveryId,
    DeliveryStatus,
    Job,
    JobKind,
    Project,
    Webhook,
    WebhookId,
)
from penstock.store.base import BatchChange, DeliveryReport, Page, Store
from penstock.testing.store import NOON, WAYS, RecordedJobs, add_batch, move, new_file

ENDS = (
    BatchStatus.COMPLETED,
    BatchStatus.FAILED,
    BatchStatus.EXPIRED,
    BatchStatus.CANCELLED,
)
ALL = Page(limit=100)


def new_webhook(project: Project, name: str = "we_1") -> Webhook:
    return Webhook(id=WebhookId(name), project_id=project.id, url=f"https://{name}.example/")


def deliver(delivery_id: str, due_at: float | None = None) -> Job:
    return Job(kind=JobKind.WEBHOOK, id=delivery_id, due_at=due_at)


async def end(store: Store, name: str = "batch-1", *, project: str = "red") -> Delivery:
    """End a batch whose project has a webhook; the newest delivery."""
    await add_batch(store, name, project=project)
    await move(store, *WAYS[BatchStatus.FAILED], name=name)
    return (await store.list_deliveries(ALL))[0]


def failed_attempt(
    delivery: Delivery, attempt: int, *, again_at: float | None = None
) -> DeliveryReport:
    return DeliveryReport(
        id=delivery.id,
        attempt=attempt,
        at=NOON + attempt,
        status=DeliveryStatus.FAILED if again_at is None else DeliveryStatus.PENDING,
        next_attempt_at=again_at,
        status_code=500,
        error="The webhook answered 500.",
    )


def delivered(delivery: Delivery, attempt: int) -> DeliveryReport:
    return DeliveryReport(
        id=delivery.id,
        attempt=attempt,
        at=NOON + attempt,
        status=DeliveryStatus.DELIVERED,
        status_code=204,
    )


class WebhookContract:
    """Inherit, beside `StoreContract`."""

    @pytest.mark.parametrize("status", ENDS)
    async def test_the_end_of_a_batch_queues_its_event(
        self, store: Store, red: Project, jobs: RecordedJobs, status: BatchStatus
    ) -> None:
        await store.set_webhooks([new_webhook(red)])
        await add_batch(store)
        await move(store, *WAYS[status][:-1])
        assert await store.list_deliveries(ALL) == []
        jobs.take()

        await store.move_batch(BatchId("batch-1"), status, now=NOON + 7)

        [delivery] = await store.list_deliveries(ALL)
        assert deliver(delivery.id) in jobs.take()
        event = json.loads(delivery.payload)
        assert delivery == Delivery(
            id=delivery.id,
            webhook_id=WebhookId("we_1"),
            project_id=red.id,
            url="https://we_1.example/",
            batch_id=BatchId("batch-1"),
            event=f"batch.{status}",
            payload=delivery.payload,
            created_at=NOON + 7,
            queued_at=NOON + 7,
            next_attempt_at=NOON + 7,
        )
        assert delivery.id.startswith("wh_")
        assert event["id"].startswith("evt_")
        assert (event["object"], event["type"]) == ("event", f"batch.{status}")
        assert event["created_at"] == NOON + 7
        assert event["data"]["id"] == "batch-1"
        assert await store.get_delivery(delivery.id) == delivery

    async def test_a_move_that_is_not_the_end_queues_nothing(
        self, store: Store, red: Project
    ) -> None:
        await store.set_webhooks([new_webhook(red)])
        await add_batch(store)
        await move(store, BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING)
        await move(store, BatchStatus.CANCELLING)

        assert await store.list_deliveries(ALL) == []

    async def test_an_end_that_fails_queues_nothing(
        self, store: Store, red: Project, jobs: RecordedJobs
    ) -> None:
        await store.set_webhooks([new_webhook(red)])
        file = new_file(red)
        await store.add_file(file)
        await add_batch(store)
        await move(store, *WAYS[BatchStatus.FINALIZING])
        jobs.take()

        with pytest.raises(Exception):  # noqa: B017  (a file of that ID is there)
            await store.move_batch(
                BatchId("batch-1"),
                BatchStatus.COMPLETED,
                now=NOON,
                change=BatchChange(output=file),
            )

        assert await store.list_deliveries(ALL) == []
        assert jobs.take() == []

    async def test_each_webhook_of_the_project_gets_the_same_event(
        self, store: Store, red: Project, blue: Project
    ) -> None:
        hooks = [new_webhook(red, "we_1"), new_webhook(red, "we_2"), new_webhook(blue, "we_3")]
        await store.set_webhooks(hooks)

        await end(store)

        deliveries = await store.list_deliveries(ALL)
        assert sorted(each.webhook_id for each in deliveries) == ["we_1", "we_2"]
        assert len({each.payload for each in deliveries}) == 1
        assert len({each.id for each in deliveries}) == 2

    async def test_only_webhooks_in_force_are_told(self, store: Store, red: Project) -> None:
        first, second = new_webhook(red, "we_1"), new_webhook(red, "we_2")
        await store.set_webhooks([first, second])
        await store.set_webhooks([second])
        assert await store.list_webhooks() == [second]

        assert (await end(store)).webhook_id == "we_2"
        assert len(await store.list_deliveries(ALL)) == 1

        await store.set_webhooks([second, first])
        assert await store.list_webhooks() == [first, second]

    async def test_what_was_delivered_is_over(
        self, store: Store, red: Project, jobs: RecordedJobs
    ) -> None:
        await store.set_webhooks([new_webhook(red)])
        delivery = await end(store)
        jobs.take()

        assert await store.report_delivery(delivered(delivery, 1))

        assert await store.get_delivery(delivery.id) == replace(
            delivery,
            status=DeliveryStatus.DELIVERED,
            attempts=1,
            next_attempt_at=None,
            ended_at=NOON + 1,
            last_attempt_at=NOON + 1,
            last_status_code=204,
        )
        assert jobs.take() == []
        assert await store.list_due_deliveries(until=None) == []

    async def test_what_failed_is_tried_again_at_its_time(
        self, store: Store, red: Project, jobs: RecordedJobs
    ) -> None:
        await store.set_webhooks([new_webhook(red)])
        delivery = await end(store)
        assert await store.list_due_deliveries(until=NOON) == [deliver(delivery.id, NOON)]
        jobs.take()

        assert await store.report_delivery(failed_attempt(delivery, 1, again_at=NOON + 5.5))

        kept = await store.get_delivery(delivery.id)
        assert (kept.status, kept.attempts) == (DeliveryStatus.PENDING, 1)
        assert (kept.last_status_code, kept.last_error) == (500, "The webhook answered 500.")
        assert jobs.take() == [deliver(delivery.id, NOON + 5.5)]
        assert await store.list_due_deliveries(until=NOON + 5) == []
        due = [deliver(delivery.id, NOON + 5.5)]
        assert await store.list_due_deliveries(until=NOON + 6) == due
        assert await store.list_due_deliveries(until=None) == due

    async def test_a_report_that_comes_late_changes_nothing(
        self, store: Store, red: Project
    ) -> None:
        await store.set_webhooks([new_webhook(red)])
        delivery = await end(store)
        assert not await store.report_delivery(delivered(delivery, 2))
        await store.report_delivery(failed_attempt(delivery, 1, again_at=NOON + 5))
        before = await store.get_delivery(delivery.id)

        assert not await store.report_delivery(delivered(delivery, 1))

        assert await store.get_delivery(delivery.id) == before
        assert await store.report_delivery(failed_attempt(delivery, 2))
        assert not await store.report_delivery(delivered(delivery, 3))

    async def test_a_replay_begins_anew(
        self, store: Store, red: Project, jobs: RecordedJobs
    ) -> None:
        await store.set_webhooks([new_webhook(red)])
        delivery = await end(store)
        await store.report_delivery(failed_attempt(delivery, 1))
        jobs.take()

        replayed = await store.replay_delivery(delivery.id, now=NOON + 100)

        assert (replayed.status, replayed.attempts) == (DeliveryStatus.PENDING, 0)
        assert (replayed.queued_at, replayed.next_attempt_at) == (NOON + 100, NOON + 100)
        assert (replayed.created_at, replayed.ended_at) == (NOON, None)
        assert jobs.take() == [deliver(delivery.id)]
        assert await store.report_delivery(delivered(delivery, 1))

    async def test_deliveries_are_listed_newest_first_by_status(
        self, store: Store, red: Project
    ) -> None:
        await store.set_webhooks([new_webhook(red)])
        first, second, third = [await end(store, f"batch-{n}") for n in (1, 2, 3)]
        await store.report_delivery(delivered(second, 1))

        listed = await store.list_deliveries(Page(limit=2))
        assert [each.id for each in listed] == [third.id, second.id]
        listed = await store.list_deliveries(Page(limit=2, after=second.id))
        assert [each.id for each in listed] == [first.id]
        assert await store.list_deliveries(Page(limit=2, after="wh_none")) == []
        listed = await store.list_deliveries(ALL, status=DeliveryStatus.DELIVERED)
        assert [each.id for each in listed] == [second.id]

    async def test_a_delivery_that_is_not_there_is_not_found(self, store: Store) -> None:
        with pytest.raises(NotFound, match="wh_none"):
            await store.get_delivery(DeliveryId("wh_none"))
        with pytest.raises(NotFound, match="wh_none"):
            await store.replay_delivery(DeliveryId("wh_none"), now=NOON)

    async def test_what_ended_long_ago_is_forgotten(self, store: Store, red: Project) -> None:
        await store.set_webhooks([new_webhook(red)])
        first, second = [await end(store, f"batch-{n}") for n in (1, 2)]
        await store.report_delivery(delivered(first, 1))

        await store.forget_ended(ended_before=NOON + 1, begun_before=NOON)
        assert len(await store.list_deliveries(ALL)) == 2

        await store.forget_ended(ended_before=NOON + 2, begun_before=NOON)
        assert await store.list_deliveries(ALL) == [second]
