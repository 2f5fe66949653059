"""Lanes: one queue of lines for each upstream, or group of upstreams, and as many senders as it
can use.

A sender takes a line, finds an upstream that takes it now, sends it, and asks the retry policy
what the reply means. A line that waits for its next attempt holds no place. The slices of a
project share a lane in the order they came, and projects by their weights (see `waiting`), so
a slow line delays nothing but its own slice.

Lines of a model whose circuit lets none pass at any upstream are parked; those of other models
pass them by. Parked lines go on, one as a probe or all of them, when a circuit says so.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

import msgspec
import structlog

from penstock import clock
from penstock.executor.admission import Admission, Outcome, Ticket, Verdict, choose
from penstock.executor.waiting import Flow, Waiting
from penstock.request_lines import RequestLine
from penstock.telemetry import LaneGauges, UpstreamGauges, UpstreamStats
from penstock.upstream.base import Failure, Reply

_log = structlog.get_logger()
_SEND = Verdict.SEND  # looking up a member takes as long as a call
_TELL_EVERY_S = 30.0
_LATE_S = 0.001
"""How much later than it must a lane looks at a clock, so that it need not look twice."""

Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
"""Starts a task that somebody owns."""


class LineOwner(Protocol):
    """Whose lines they are: a slice that is held."""

    endpoint: str
    expires_at: float
    flow: Flow
    is_stopping: bool
    """Lines that are not sent yet are to be dropped."""
    is_aborted: bool
    """A cancelled sender is to drop its line and go on with the next."""
    flights: dict[int, asyncio.Task[None]]
    """The senders of lines that are on their way, by line."""
    timers: "dict[int, tuple[asyncio.TimerHandle, RequestLine, Lane]]"
    """The lines that wait for another attempt."""

    def park(self, count: int) -> None:
        """Hear that so many of its lines, or with a minus so many less, are parked."""
        ...

    def keep(self, line: RequestLine, reply: Reply) -> None: ...
    def drop(self, line: RequestLine) -> None: ...


class Queued(msgspec.Struct, eq=False):
    """A line that waits. A msgspec struct, because one is made for every line."""

    owner: LineOwner
    line: RequestLine
    attempt: int
    avoid: Admission | None = None
    """Where it has failed last."""


class Lane:
    """The lines for one upstream, or for several that share them.

    Args:
        admissions: The upstreams' doors.
        stats: What is counted of each upstream, in the same order.
        gate: Nothing is sent while this is not set.
        spawn: Starts the senders.
        wants_more: Called now and then while the queue grows shorter.
        waiting: Where its lines wait.
    """

    def __init__(
        self,
        admissions: Sequence[Admission],
        stats: Sequence[UpstreamStats],
        *,
        gate: asyncio.Event,
        spawn: Spawn,
        wants_more: Callable[[], None],
        waiting: Waiting[Queued],
    ) -> None:
        self.admissions = tuple(admissions)
        self._only = self.admissions[0] if len(self.admissions) == 1 else None
        self._stats = dict(zip(self.admissions, stats, strict=True))
        self._parked: dict[str, deque[Queued]] = {}
        self._wakers: dict[str, asyncio.TimerHandle] = {}
        self._restart: asyncio.TimerHandle | None = None
        self._gate = gate
        self._spawn = spawn
        self._wants_more = wants_more
        self._waiting = waiting
        self._senders = 0
        self._told_at = float("-inf")

    @property
    def places(self) -> int:
        """How many lines may be in flight."""
        if self._only:
            return self._only.limit.current
        return sum(each.limit.current for each in self.admissions)

    @property
    def in_flight(self) -> int:
        if self._only:
            return self._only.in_flight
        return sum(each.in_flight for each in self.admissions)

    @property
    def waiting(self) -> int:
        """Lines that are ready to be sent, and those of slices that are on their way here."""
        return len(self._waiting) + self._waiting.expected

    @property
    def is_busy(self) -> bool:
        """Whether any line is on its way or waits."""
        return bool(self._senders or len(self._waiting) or any(self._parked.values()))

    def has_room(self, flow: Flow) -> bool:
        """Whether it is to be given more lines of a project."""
        return self._waiting.has_room(flow, places=self.places)

    def is_full(self, flow: Flow) -> bool:
        """Whether it holds as many bytes of bodies as it may."""
        return self._waiting.is_full(flow)

    def expect(self, flow: Flow, lines: int, bytes_: int) -> None:
        """Count lines of a slice that was handed out or, with a minus, is held or came back."""
        self._waiting.expect(flow, lines, bytes_)

    def is_blocked(self, model: str) -> bool:
        """Whether lines of a model would be parked now."""
        now = time.monotonic()
        return all(each.is_parking(model, now) for each in self.admissions)

    def measure(self) -> LaneGauges:
        """How it stands now."""
        now = time.monotonic()
        return LaneGauges(
            queued=len(self._waiting),
            parked=sum(map(len, self._parked.values())),
            upstreams={
                each.upstream.name: UpstreamGauges(
                    in_flight=each.in_flight,
                    limit=each.limit.current,
                    most=each.policy.concurrency.most,
                    limited_by=each.hindrance(now) if self.is_busy else None,
                    engine_running=each.load.running if each.load else None,
                    engine_waiting=each.load.waiting if each.load else None,
                )
                for each in self.admissions
            },
        )

    def put(self, owner: LineOwner, lines: Sequence[RequestLine]) -> None:
        """Queue lines for their first attempt."""
        self._waiting.put(owner.flow, (Queued(owner, line, 1) for line in lines))
        self._waiting.weigh(owner.flow, sum(len(line.body) for line in lines))
        self.start()

    def parked_of(self, owner: LineOwner) -> list[str]:
        """The models of an owner's lines that are parked."""
        return [
            model
            for model, waiting in self._parked.items()
            if any(queued.owner is owner for queued in waiting)
        ]

    def withdraw(self, owner: LineOwner) -> None:
        """Drop the lines of an owner that are not sent yet."""
        gone = self._waiting.remove(lambda queued: queued.owner is owner)
        mine = [queued.line for queued in gone]
        parked = 0
        for model, waiting in self._parked.items():
            mine += [queued.line for queued in waiting if queued.owner is owner]
            left = deque(queued for queued in waiting if queued.owner is not owner)
            parked += len(waiting) - len(left)
            self._parked[model] = left
        owner.park(-parked)
        for line in mine:
            self.drop(owner, line)

    def drop(self, owner: LineOwner, line: RequestLine) -> None:
        """Drop a line that waited here, or waited to come back."""
        self._waiting.weigh(owner.flow, -len(line.body))
        owner.drop(line)

    def start(self) -> None:
        """Start the senders that the queue and the upstreams' limits call for."""
        # A sender that has just been started has taken no line yet, so starting one for each
        # waiting line never starts too few.
        places = self.places
        ready = self._waiting.to_send(in_flight=self.in_flight, places=places)
        for _ in range(min(ready, places - self._senders)):
            self._senders += 1
            self._spawn(self._send_lines())

    async def _send_lines(self) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101
        only, waiting = self._only, self._waiting
        try:
            while True:
                if not self._gate.is_set():
                    await self._gate.wait()
                    continue
                places = self.places
                queued = waiting.take(in_flight=self.in_flight, places=places)
                if queued is None:
                    break
                owner, line = queued.owner, queued.line
                waiting.weigh(owner.flow, -len(line.body))
                now = time.monotonic()
                if waiting.is_short(places):
                    waiting.judge_pace(now)
                    self._wants_more()
                if owner.is_stopping:
                    owner.drop(line)
                    continue
                if only:
                    verdict, admission = only.look(line.model, now), only
                else:
                    verdict, admission = choose(
                        self.admissions, line.model, now, avoid=queued.avoid
                    )
                if verdict < _SEND or admission is None:
                    waiting.weigh(owner.flow, len(line.body))
                    if verdict is Verdict.PARK:
                        self._park(queued)
                        continue
                    waiting.give_back(owner.flow, queued)
                    self._restart_in_time(now)
                    break
                ticket = admission.take(line.model, line.body, now)
                owner.flights[line.line] = task
                try:
                    reply = await admission.upstream.send(owner.endpoint, line.body)
                except asyncio.CancelledError:
                    admission.forget(ticket, line.model)
                    if ticket.is_probe:
                        self._set_waker(line.model)
                    if not owner.is_aborted:
                        raise
                    task.uncancel()
                    owner.drop(line)
                    continue
                except Exception as error:
                    # An adapter must not raise. If one does, the line pays, not the batch.
                    name = admission.upstream.name
                    _log.exception("An upstream adapter failed.", upstream=name)
                    reply = Reply(
                        failure=Failure.INVALID, message=f"Penstock failed: {error!r}."
                    )
                finally:
                    del owner.flights[line.line]
                self._take_reply(queued, ticket, reply)
        finally:
            self._senders -= 1

    def _take_reply(self, queued: Queued, ticket: Ticket, reply: Reply) -> None:
        """Keep a reply, or try its line again, and let the upstream's door know."""
        owner, line, admission = queued.owner, queued.line, ticket.admission
        now = time.monotonic()
        limit = admission.limit.current
        outcome = admission.note(
            ticket, line.model, line.body, reply, now, jitter=random.random()
        )
        stats = self._stats[admission]
        stats.note(reply.failure or str(reply.status_code), now - ticket.sent_at)
        if admission.limit.current > limit:
            self.start()
        if outcome.is_free:
            stats.free += 1
        if outcome.has_opened:
            self._tell_outage(admission, line.model, reply)
        elif outcome.has_closed:
            self._go_on(admission, line.model)
        if reply.is_success:
            stats.add_tokens(reply.input_tokens, reply.cached_tokens, reply.output_tokens)
            owner.keep(line, reply)
        else:
            self._try_again(queued, admission, reply, outcome, now)

    def _try_again(
        self,
        queued: Queued,
        admission: Admission,
        reply: Reply,
        outcome: Outcome,
        now: float,
    ) -> None:
        """Let a line that failed wait for its next attempt, or keep its last reply."""
        owner, line = queued.owner, queued.line
        policy = admission.policy.retries
        is_free = outcome.is_free and policy.max_attempts > 1
        wait_s = policy.wait_s(
            reply,
            attempt=1 if is_free else queued.attempt,
            jitter=random.random(),
            time_left_s=owner.expires_at - clock.now(),
        )
        if wait_s is None:
            self._tell(admission, reply)
            owner.keep(line, reply)
            return
        if owner.is_stopping:
            owner.drop(line)
            return
        queued.attempt += not is_free
        queued.avoid = admission
        self._waiting.weigh(owner.flow, len(line.body))
        if all(each.is_parking(line.model, now) for each in self.admissions):
            self._park(queued)
        elif outcome.is_free and choose(self.admissions, line.model, now)[0] >= Verdict.SEND:
            self._waiting.put_first(owner.flow, [queued])  # another upstream takes it at once
        else:
            timer = asyncio.get_running_loop().call_later(wait_s, self._put_back, queued)
            owner.timers[line.line] = (timer, line, self)

    def _put_back(self, queued: Queued) -> None:
        del queued.owner.timers[queued.line.line]
        # It has waited long enough: it goes before the lines that were never sent.
        self._waiting.put_first(queued.owner.flow, [queued])
        self.start()

    def _restart_in_time(self, now: float) -> None:
        """Start senders again when time alone lets lines pass; replies do by themselves."""
        ready = [each.ready_at() for each in self.admissions]
        later = [at for at in ready if at > now]
        if self._restart is None and later:
            loop = asyncio.get_running_loop()
            self._restart = loop.call_later(min(later) - now + _LATE_S, self._start_again)

    def _start_again(self) -> None:
        self._restart = None
        self.start()

    # Circuits

    def _park(self, queued: Queued) -> None:
        """Let a line wait until a circuit lets it pass."""
        model = queued.line.model
        self._parked.setdefault(model, deque()).append(queued)
        queued.owner.park(1)
        self._set_waker(model)

    def _set_waker(self, model: str) -> None:
        times = [each.probe_at(model) for each in self.admissions]
        due = [at for at in times if at is not None]
        if not due or model in self._wakers:
            return
        wait_s = max(min(due) - time.monotonic(), 0.0) + _LATE_S
        loop = asyncio.get_running_loop()
        self._wakers[model] = loop.call_later(wait_s, self._wake, model)

    def _wake(self, model: str) -> None:
        """Let go what the circuits of a model let pass now."""
        del self._wakers[model]
        if self.is_blocked(model):
            self._set_waker(model)
            return
        is_closed = any(not each.is_probing(model) for each in self.admissions)
        self._let_go(model, None if is_closed else 1)
        self._wants_more()  # if none waits here, a slice of the model has lines to probe with

    def _let_go(self, model: str, most: int | None) -> None:
        """Put parked lines before the others, in their order."""
        waiting = self._parked.get(model)
        count = len(waiting or ()) if most is None else min(most, len(waiting or ()))
        if not waiting or not count:
            return
        first = [waiting.popleft() for _ in range(count)]
        for queued in reversed(first):
            queued.owner.park(-1)
            self._waiting.put_first(queued.owner.flow, [queued])
        self.start()

    def _go_on(self, admission: Admission, model: str) -> None:
        _log.info("An upstream is back.", upstream=admission.upstream.name, model=model)
        self._let_go(model, None)
        self._wants_more()

    # The log

    def _tell_outage(self, admission: Admission, model: str, reply: Reply) -> None:
        _log.error(
            "An upstream is down; its lines wait until it is back."
            if self._only
            else "An upstream is down; others of its group take its lines.",
            upstream=admission.upstream.name,
            model=model,
            error=reply.message or f"HTTP status {reply.status_code}",
        )

    def _tell(self, admission: Admission, reply: Reply) -> None:
        """Say in the log, now and then, that lines fail because of the upstream itself."""
        now = time.monotonic()
        if reply.failure is not None and now - self._told_at > _TELL_EVERY_S:
            self._told_at = now
            _log.warning(
                "Lines fail.",
                upstream=admission.upstream.name,
                failure=reply.failure.value,
                error=reply.message,
            )
