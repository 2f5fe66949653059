"""Events and their way to webhooks, with every part at work."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from penstock.blobs.folder import FolderBlobs
from penstock.blobs.local_segments import LocalSegments
from penstock.engine.memory import MemoryEngine
from penstock.errors import StorageUnavailable
from penstock.executor.upkeep import recover
from penstock.executor.webhooks import Deliverer, DeliveryPolicy
from penstock.model import Batch, Delivery, DeliveryStatus, Job, JobKind
from penstock.places import store_url
from penstock.signing import new_secret, read_secret
from penstock.store.base import DeliveryReport, Page
from penstock.store.sql import SqlStore
from penstock.upstream.webhook import WebhookTarget
from penstock.upstream.webhook_http import HttpWebhookSender
from tests.upstreams import (
    Received,
    ScriptedUpstream,
    answer,
    empty,
    fail,
    hold,
    stall,
)

from .bench import Bench, line, until

SECRET, OLD_SECRET = new_secret(), new_secret()
QUICK = DeliveryPolicy(first_wait_s=0.05, max_wait_s=0.05)
FAR = DeliveryPolicy(first_wait_s=3600)
ALL = Page(limit=1000)


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as server:
        yield server


@pytest.fixture
async def receiver() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream(lambda *_: empty()) as server:
        yield server


def hook(receiver: ScriptedUpstream, name: str = "hook", **more: Any) -> dict[str, Any]:
    return {
        "project": "default",
        "url": f"http://127.0.0.1:{receiver.port}/{name}",
        "secret": SECRET,
        "allow_private_addresses": True,
        **more,
    }


def open_bench(
    data_dir: Path,
    upstream: ScriptedUpstream,
    *hooks: dict[str, Any],
    deliveries: DeliveryPolicy = QUICK,
    **more: Any,
) -> Bench:
    return Bench(data_dir, upstream, webhooks=list(hooks), deliveries=deliveries, **more)


def unwrap(request: Received, secret: str = SECRET) -> Any:
    """The event, as OpenAI's client reads it."""
    with OpenAI(api_key="-", base_url="http://127.0.0.1:9") as client:
        return client.webhooks.unwrap(request.body, request.headers, secret=secret)


async def deliveries(bench: Bench) -> list[Delivery]:
    """Newest first."""
    return await bench.store.list_deliveries(ALL)


async def wait_for(bench: Bench, status: DeliveryStatus, count: int = 1) -> list[Delivery]:
    """Wait until that many deliveries have that status."""

    async def are_there() -> bool:
        return len(await bench.store.list_deliveries(ALL, status=status)) >= count

    await until(are_there)
    return await bench.store.list_deliveries(ALL, status=status)


async def end_one(bench: Bench) -> Batch:
    return await bench.wait_until_ended(await bench.create("a"))


# Events


async def test_the_end_of_a_batch_is_told(
    tmp_path: Path, upstream: ScriptedUpstream, receiver: ScriptedUpstream
) -> None:
    async with open_bench(tmp_path, upstream, hook(receiver)) as bench:
        batch = await end_one(bench)
        await receiver.wait_for_requests(1)
        [delivery] = await wait_for(bench, DeliveryStatus.DELIVERED)

    [request] = receiver.requests
    event = unwrap(request)
    assert event.type == "batch.completed"
    assert event.data.id == batch.id
    assert event.created_at == batch.completed_at
    assert request.json["data"]["output_file_id"] == batch.output_file_id
    assert request.json["data"]["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
    assert request.headers["webhook-id"] == delivery.id
    assert (delivery.attempts, delivery.last_status_code) == (1, 200)
    assert delivery.last_error is None


async def test_each_end_has_its_event(
    tmp_path: Path, upstream: ScriptedUpstream, receiver: ScriptedUpstream
) -> None:
    upstream.behave = lambda *_: stall()
    async with open_bench(
        tmp_path, upstream, hook(receiver), worker={"cancel_grace_s": 0}
    ) as bench:
        failed = await bench.create_from(line("a") * 2)
        expired = await bench.create("a", window="1s")
        cancelled = await bench.create("a")
        await upstream.wait_for_requests(2)
        await bench.cancel(cancelled)
        await receiver.wait_for_requests(3)
        upstream.behave = lambda *_: answer()
        completed = await end_one(bench)
        await receiver.wait_for_requests(4)

    events = [unwrap(request) for request in receiver.requests]
    assert {event.type: event.data.id for event in events} == {
        "batch.failed": failed.id,
        "batch.expired": expired.id,
        "batch.cancelled": cancelled.id,
        "batch.completed": completed.id,
    }
    assert len({event.id for event in events}) == 4
    assert len({request.headers["webhook-id"] for request in receiver.requests}) == 4


async def test_every_webhook_of_the_project_is_told_and_no_other(
    tmp_path: Path, upstream: ScriptedUpstream, receiver: ScriptedUpstream
) -> None:
    hooks = [
        hook(receiver, "one"),
        hook(receiver, "two", previous_secret=OLD_SECRET),
        hook(receiver, "other", project="alpha"),
    ]
    projects = [{"name": "alpha"}]
    async with open_bench(tmp_path, upstream, *hooks, projects=projects) as bench:
        await end_one(bench)
        await wait_for(bench, DeliveryStatus.DELIVERED, 2)

    assert sorted(request.path for request in receiver.requests) == ["/one", "/two"]
    [two] = [request for request in receiver.requests if request.path == "/two"]
    assert unwrap(two, SECRET).id == unwrap(two, OLD_SECRET).id


async def test_without_webhooks_nothing_is_kept(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    async with open_bench(tmp_path, upstream) as bench:
        await end_one(bench)

        assert await deliveries(bench) == []


# Attempts


async def test_an_event_that_is_not_taken_comes_again_signed_anew(
    tmp_path: Path, upstream: ScriptedUpstream, receiver: ScriptedUpstream
) -> None:
    receiver.behave = lambda path, headers, body, nth: fail(500) if nth < 3 else empty()
    policy = DeliveryPolicy(first_wait_s=1.0, max_wait_s=1.0)  # stamps are whole seconds
    async with open_bench(tmp_path, upstream, hook(receiver), deliveries=policy) as bench:
        await end_one(bench)
        [failing] = await wait_for(bench, DeliveryStatus.PENDING)
        await receiver.wait_for_requests(3)
        [delivery] = await wait_for(bench, DeliveryStatus.DELIVERED)

    headers = [request.headers for request in receiver.requests]
    assert len(headers) == 3
    assert {each["webhook-id"] for each in headers} == {delivery.id}
    assert len({each["webhook-timestamp"] for each in headers}) == 3
    assert len({each["webhook-signature"] for each in headers}) == 3
    assert len({unwrap(request).id for request in receiver.requests}) == 1
    assert failing.attempts <= 2
    assert delivery.attempts == 3
    assert delivery.last_error is None


async def test_an_event_that_is_never_taken_is_given_up(
    tmp_path: Path, upstream: ScriptedUpstream, receiver: ScriptedUpstream
) -> None:
    receiver.behave = lambda *_: fail(500, "Out to lunch.")
    policy = dataclasses.replace(QUICK, life_s=2.0)  # `queued_at` is in whole seconds
    async with open_bench(tmp_path, upstream, hook(receiver), deliveries=policy) as bench:
        await end_one(bench)
        [delivery] = await wait_for(bench, DeliveryStatus.FAILED)

    assert delivery.attempts == len(receiver.requests)
    assert delivery.attempts > 1
    assert delivery.last_status_code == 500
    assert delivery.last_error is not None
    assert "Out to lunch." in delivery.last_error
    assert delivery.ended_at is not None
    assert delivery.next_attempt_at is None


async def test_a_failed_attempt_is_not_repeated_before_its_time(
    tmp_path: Path, upstream: ScriptedUpstream, receiver: ScriptedUpstream
) -> None:
    """Not even by the look for what is due, which finds it while it is being tried."""
    go_on = asyncio.Event()
    receiver.behave = lambda *_: hold(fail(500), until=go_on)
    async with open_bench(tmp_path, upstream, hook(receiver), deliveries=FAR) as bench:
        await end_one(bench)
        await receiver.wait_for_requests(1)
        await asyncio.sleep(2.2)  # a look
        go_on.set()
        await until(lambda: is_tried(bench))
        await asyncio.sleep(0.3)

        [delivery] = await deliveries(bench)

    assert len(receiver.requests) == 1
    assert delivery.status is DeliveryStatus.PENDING
    assert delivery.next_attempt_at is not None
    assert 3590 < delivery.next_attempt_at - time.time() <= 4500


async def is_tried(bench: Bench) -> bool:
    return (await deliveries(bench))[0].attempts == 1


async def test_a_dead_webhook_holds_up_no_other_one(
    tmp_path: Path, upstream: ScriptedUpstream, receiver: ScriptedUpstream
) -> None:
    async with ScriptedUpstream(lambda *_: stall()) as dead:
        hooks = [hook(dead), hook(receiver)]
        async with open_bench(tmp_path, upstream, *hooks) as bench:
            batches = [await bench.create("a") for _ in range(10)]
            for batch in batches:
                await bench.wait_until_ended(batch)
            await receiver.wait_for_requests(10)
            await dead.wait_for_requests(4)
            await asyncio.sleep(0.1)

            assert dead.max_in_flight == 4
            assert len(await wait_for(bench, DeliveryStatus.DELIVERED, 10)) == 10


async def test_a_webhook_that_left_the_settings_gets_nothing_more(
    tmp_path: Path, upstream: ScriptedUpstream, receiver: ScriptedUpstream
) -> None:
    receiver.behave = lambda *_: fail(500)
    async with open_bench(tmp_path, upstream, hook(receiver), deliveries=FAR) as bench:
        await end_one(bench)
        await until(lambda: is_tried(bench))
    await make_due(tmp_path)

    async with open_bench(tmp_path, upstream, hook(receiver, "another")) as bench:
        [delivery] = await wait_for(bench, DeliveryStatus.FAILED)

    assert delivery.last_error == "The webhook is not in the settings any more."
    assert len(receiver.requests) == 1

    receiver.behave = lambda *_: empty()
    await make_due(tmp_path)
    async with open_bench(tmp_path, upstream, hook(receiver)) as bench:
        [again] = await wait_for(bench, DeliveryStatus.DELIVERED)

    assert again.id == delivery.id
    assert receiver.requests[-1].path == "/hook"


async def make_due(data_dir: Path) -> None:
    """Replay every delivery from another process than the one that serves."""
    store = SqlStore(store_url(data_dir))
    for delivery in await store.list_deliveries(ALL):
        await store.replay_delivery(delivery.id, now=int(time.time()))
    await store.close()


# Restarts


async def test_an_event_waits_for_its_next_attempt_across_restarts(
    tmp_path: Path, upstream: ScriptedUpstream, receiver: ScriptedUpstream
) -> None:
    receiver.behave = lambda *_: fail(500)
    policy = DeliveryPolicy(first_wait_s=1.0, max_wait_s=1.0)
    async with open_bench(tmp_path, upstream, hook(receiver), deliveries=policy) as bench:
        await end_one(bench)
        await until(lambda: is_tried(bench))
    receiver.behave = lambda *_: empty()

    async with open_bench(tmp_path, upstream, hook(receiver)) as bench:
        [delivery] = await wait_for(bench, DeliveryStatus.DELIVERED)

    first, second = receiver.requests
    assert second.at - first.at >= 1.0
    assert first.headers["webhook-id"] == second.headers["webhook-id"] == delivery.id
    assert delivery.attempts == 2


class Recorder(MemoryEngine):
    """An engine that remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[Job] = []

    async def enqueue(self, jobs: Sequence[Job], *, connection: object | None = None) -> None:
        self.jobs += jobs


async def test_a_start_knows_of_every_delivery_that_is_pending(
    tmp_path: Path, upstream: ScriptedUpstream, receiver: ScriptedUpstream
) -> None:
    """It need not wait for the look for what is due."""
    receiver.behave = lambda *_: fail(500)
    async with open_bench(tmp_path, upstream, hook(receiver), deliveries=FAR) as bench:
        await end_one(bench)
        await until(lambda: is_tried(bench))
        [delivery] = await deliveries(bench)

    engine = Recorder()
    store = SqlStore(store_url(tmp_path))
    blobs, segments = FolderBlobs(tmp_path / "blobs"), LocalSegments(tmp_path / "segments")
    await recover(store=store, blobs=blobs, segments=segments, engine=engine)
    await store.close()

    due_at = delivery.next_attempt_at
    assert engine.jobs == [Job(kind=JobKind.WEBHOOK, id=delivery.id, due_at=due_at)]


async def test_an_attempt_that_a_stop_cut_off_is_made_again(
    tmp_path: Path, upstream: ScriptedUpstream, receiver: ScriptedUpstream
) -> None:
    receiver.behave = lambda *_: stall()
    async with open_bench(tmp_path, upstream, hook(receiver)) as bench:
        await end_one(bench)
        await receiver.wait_for_requests(1)
        [delivery] = await deliveries(bench)
        stopping_at = time.monotonic()
    assert time.monotonic() - stopping_at < 5  # and not the time of a whole attempt
    assert (delivery.status, delivery.attempts) == (DeliveryStatus.PENDING, 0)

    receiver.behave = lambda *_: empty()
    async with open_bench(tmp_path, upstream, hook(receiver)) as bench:
        await wait_for(bench, DeliveryStatus.DELIVERED)

    assert len(receiver.requests) == 2


async def test_an_attempt_in_flight_may_end_at_a_stop(
    tmp_path: Path, upstream: ScriptedUpstream, receiver: ScriptedUpstream
) -> None:
    go_on = asyncio.Event()
    receiver.behave = lambda *_: hold(empty(), until=go_on)
    bench = open_bench(tmp_path, upstream, hook(receiver))
    server = bench.settings.server.model_copy(update={"shutdown_grace_s": 10})
    bench.settings = bench.settings.model_copy(update={"server": server})
    async with bench:
        await end_one(bench)
        await receiver.wait_for_requests(1)
        asyncio.get_running_loop().call_later(0.2, go_on.set)

    store = SqlStore(store_url(tmp_path))
    [delivery] = await store.list_deliveries(ALL)
    await store.close()
    assert delivery.status is DeliveryStatus.DELIVERED


async def test_a_replay_from_another_process_is_seen(
    tmp_path: Path, upstream: ScriptedUpstream, receiver: ScriptedUpstream
) -> None:
    """Of a delivery that was taken, and of one whose next attempt is far away."""
    async with open_bench(tmp_path, upstream, hook(receiver), deliveries=FAR) as bench:
        await end_one(bench)
        await wait_for(bench, DeliveryStatus.DELIVERED)
        receiver.behave = lambda *_: fail(500)
        await end_one(bench)
        await wait_for(bench, DeliveryStatus.PENDING)
        await receiver.wait_for_requests(2)
        receiver.behave = lambda *_: empty()
        await until(lambda: is_tried(bench))

        await make_due(tmp_path)
        await receiver.wait_for_requests(4)
        await wait_for(bench, DeliveryStatus.DELIVERED, 2)

    ids = [request.headers["webhook-id"] for request in receiver.requests]
    assert sorted(ids[:2]) == sorted(ids[2:])


# Storage


class FlakyStore(SqlStore):
    """A store that takes no report at first."""

    refusals = 1

    async def report_delivery(self, report: DeliveryReport) -> bool:
        if self.refusals:
            self.refusals -= 1
            raise StorageUnavailable("The disk is full.")
        return await super().report_delivery(report)


async def test_an_event_is_not_sent_again_because_its_report_was_not_kept(
    tmp_path: Path, upstream: ScriptedUpstream, receiver: ScriptedUpstream
) -> None:
    receiver.behave = lambda *_: stall()
    async with open_bench(tmp_path, upstream, hook(receiver)) as bench:
        await end_one(bench)
        await receiver.wait_for_requests(1)
    receiver.behave = lambda *_: empty()

    async with run_deliverer(tmp_path, receiver) as store:
        await receiver.wait_for_requests(2)

        async def is_delivered() -> bool:
            [delivery] = await store.list_deliveries(ALL)
            return delivery.status is DeliveryStatus.DELIVERED

        await until(is_delivered)

    assert store.refusals == 0
    assert len(receiver.requests) == 2


async def test_a_worker_with_older_settings_leaves_an_event_to_the_others(
    tmp_path: Path, upstream: ScriptedUpstream, receiver: ScriptedUpstream
) -> None:
    receiver.behave = lambda *_: stall()
    async with open_bench(tmp_path, upstream, hook(receiver)) as bench:
        await end_one(bench)
        await receiver.wait_for_requests(1)
    receiver.behave = lambda *_: empty()

    async with run_deliverer(tmp_path, receiver, knows=False) as store:

        async def is_tried_again() -> bool:
            [delivery] = await store.list_deliveries(ALL)
            assert delivery.status is DeliveryStatus.PENDING
            return delivery.attempts > 1

        await until(is_tried_again)
    async with run_deliverer(tmp_path, receiver):
        await receiver.wait_for_requests(2)


class run_deliverer:  # noqa: N801  (used as a function)
    """A deliverer over a store that is flaky, and nothing beside it.

    Args:
        knows: Whether the webhook is in its settings; else it is one of a cluster's workers.
    """

    def __init__(
        self, data_dir: Path, receiver: ScriptedUpstream, *, knows: bool = True
    ) -> None:
        self._knows = knows
        self._engine = MemoryEngine()
        self._store = FlakyStore(store_url(data_dir), jobs=self._engine)
        self._url = f"http://127.0.0.1:{receiver.port}/hook"

    async def __aenter__(self) -> FlakyStore:
        [webhook] = await self._store.list_webhooks()
        target = WebhookTarget(
            url=self._url, keys=(read_secret(SECRET) or b"",), allow_private_addresses=True
        )
        self._sender = HttpWebhookSender()
        self._deliverer = Deliverer(
            store=self._store,
            engine=self._engine,
            sender=self._sender,
            targets={webhook.id: target} if self._knows else {},
            policy=QUICK,
            stop_grace_s=0,
            is_alone=self._knows,
        )
        self._engine.handle(JobKind.WEBHOOK, self._deliverer.deliver)
        await self._engine.enqueue(await self._store.list_due_deliveries(until=None))
        self._running = asyncio.create_task(self._engine.run())
        return self._store

    async def __aexit__(self, *_: object) -> None:
        self._deliverer.stop()
        await self._engine.stop()
        await self._running
        await self._sender.close()
        await self._store.close()
