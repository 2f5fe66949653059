"""The delivery of events to webhooks: attempt after attempt, until one is taken.

A delivery and its next attempt stand in the store, so that nothing is forgotten when the
process dies; an attempt whose outcome was not kept is made again. An event may therefore come
twice, with the same `webhook-id`, and never not at all while its webhook answers in time.
"""

import asyncio
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import structlog

from penstock import clock
from penstock.engine.base import Engine
from penstock.errors import NotFound, StorageUnavailable
from penstock.model import Delivery, DeliveryId, DeliveryStatus, Job, JobKind, WebhookId
from penstock.store.base import DeliveryReport, Store
from penstock.upstream.webhook import WebhookReply, WebhookSender, WebhookTarget

_log = structlog.get_logger()

_T = TypeVar("_T")

_AT_ONCE = 4
"""How many attempts are made at one webhook at the same time."""
_AGAIN_S = 1.0
_DOUBLINGS = 64
"""More of them than any wait needs, and few enough for a float."""
_GONE = "The webhook is not in the settings any more."


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryPolicy:
    """How patient to be with a webhook."""

    first_wait_s: float = 5.0
    max_wait_s: float = 6 * 3600.0
    life_s: float = 72 * 3600.0
    """How long after it was queued a delivery is tried."""

    def next_attempt_at(
        self, *, attempt: int, queued_at: float, now: float, jitter: float
    ) -> float | None:
        """When to make the next attempt after one that failed.

        The wait doubles with each attempt, from `first_wait_s` to `max_wait_s`. `jitter` adds
        up to a quarter as long as that is not reached, so that events which failed together
        do not come back together.

        Args:
            attempt: Which attempt failed, from 1.
            queued_at: When the time of the delivery began.
            jitter: A number from 0 to 1.

        Returns:
            Unix seconds, or None: that would be more than `life_s` after `queued_at`.
        """
        wait = self.first_wait_s * 2.0 ** min(attempt - 1, _DOUBLINGS) * (1 + jitter / 4)
        at = now + min(wait, self.max_wait_s)
        return at if at <= queued_at + self.life_s else None


class Deliverer:
    """Makes the attempts that are due.

    Args:
        targets: The webhooks of the settings. An event for another one fails.
        stop_grace_s: How long attempts in flight may go on after `stop`.
        is_alone: Whether no other process can have settings that name the other one. If one
            can, as while a cluster is restarted with new settings, the event is tried again.
    """

    def __init__(
        self,
        *,
        store: Store,
        engine: Engine,
        sender: WebhookSender,
        targets: Mapping[WebhookId, WebhookTarget],
        policy: DeliveryPolicy,
        stop_grace_s: float,
        is_alone: bool = True,
    ) -> None:
        self._store = store
        self._engine = engine
        self._sender = sender
        self._targets = targets
        self._policy = policy
        self._stop_grace_s = stop_grace_s
        self._is_alone = is_alone
        self._places: defaultdict[WebhookId, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(_AT_ONCE)
        )
        self._is_stopping = False
        self._deadlines: set[asyncio.Timeout] = set()

    async def deliver(self, delivery_id: str, stop: asyncio.Event) -> None:
        """Make one attempt, if it is time. The engine's handler for `webhook` jobs."""
        try:
            async with asyncio.timeout(None) as deadline:
                self._deadlines.add(deadline)
                try:
                    await self._deliver(DeliveryId(delivery_id), stop)
                finally:
                    self._deadlines.discard(deadline)
        except NotFound:
            pass  # its batch was forgotten meanwhile
        except TimeoutError:
            pass  # the process ends; the next one makes the attempt again

    def stop(self) -> None:
        """Begin no attempt any more; those in flight may end."""
        self._is_stopping = True
        over_at = asyncio.get_running_loop().time() + self._stop_grace_s
        for deadline in self._deadlines:
            deadline.reschedule(over_at)

    async def _deliver(self, delivery_id: DeliveryId, stop: asyncio.Event) -> None:
        delivery = await self._until_stored(lambda: self._store.get_delivery(delivery_id))
        async with self._places[delivery.webhook_id]:
            # Much may have happened to it while it waited for its place.
            delivery = await self._until_stored(lambda: self._store.get_delivery(delivery_id))
            due_at = delivery.next_attempt_at
            if due_at is None or self._is_stopping or stop.is_set():
                return
            if due_at > clock.now():
                await self._engine.enqueue(
                    [Job(kind=JobKind.WEBHOOK, id=delivery_id, due_at=due_at)]
                )
                return
            target = self._targets.get(delivery.webhook_id)
            reply = WebhookReply(error=_GONE)
            if target is not None:
                reply = await self._attempt(delivery, target)
            may_pass = target is not None or not self._is_alone
            report = self._judge(delivery, reply, may_pass=may_pass)
            _tell(delivery, report)
            await self._until_stored(lambda: self._store.report_delivery(report))

    async def _attempt(self, delivery: Delivery, target: WebhookTarget) -> WebhookReply:
        try:
            return await self._sender.send(
                target, message_id=delivery.id, body=delivery.payload
            )
        except Exception as error:
            # A fault of ours. It must not be met again at once, and so counts as an attempt.
            _log.exception("An event could not be sent.", delivery_id=delivery.id)
            return WebhookReply(error=f"It could not be sent: {type(error).__name__}.")

    def _judge(
        self, delivery: Delivery, reply: WebhookReply, *, may_pass: bool
    ) -> DeliveryReport:
        now, attempt = clock.now(), delivery.attempts + 1
        again_at = None
        if reply.error is None:
            status = DeliveryStatus.DELIVERED
        else:
            if may_pass:
                again_at = self._policy.next_attempt_at(
                    attempt=attempt,
                    queued_at=delivery.queued_at,
                    now=now,
                    jitter=random.random(),
                )
            status = DeliveryStatus.FAILED if again_at is None else DeliveryStatus.PENDING
        return DeliveryReport(
            id=delivery.id,
            attempt=attempt,
            at=int(now),
            status=status,
            next_attempt_at=again_at,
            status_code=reply.status_code,
            error=reply.error,
        )

    async def _until_stored(self, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """Try again every second while the database takes nothing."""
        while True:
            try:
                return await attempt()
            except (StorageUnavailable, OSError) as error:
                _log.error("An event cannot go on for now; trying again.", error=str(error))
                await asyncio.sleep(_AGAIN_S)


def _tell(delivery: Delivery, report: DeliveryReport) -> None:
    log = _log.bind(
        delivery_id=delivery.id,
        webhook_id=delivery.webhook_id,
        batch_id=delivery.batch_id,
        attempt=report.attempt,
    )
    match report.status:
        case DeliveryStatus.DELIVERED:
            log.info("A webhook has taken an event.")
        case DeliveryStatus.PENDING:
            log.warning("A webhook has not taken an event; trying again.", error=report.error)
        case DeliveryStatus.FAILED:
            log.error("An event is given up.", error=report.error)
