"""Lanes: one queue of lines for each upstream, and as many senders as it takes.

A sender takes a line, sends it, and asks the retry policy what the reply means. A line that
waits for its next attempt holds no place. Slices share a lane in the order they came, so a
slow line delays nothing but its own slice.

Lines of a model whose circuit does not let them pass are parked; those of other models pass
them by. Parked lines go on, one as a probe or all of them, when the circuit says so.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from penstock.executor.circuit import Circuit, CircuitPolicy, Verdict, asks_to_wait, is_outage
from penstock.executor.retry import RetryPolicy
from penstock.jsonl import RequestLine
from penstock.upstream.base import Failure, LineUpstream, Reply

_log = structlog.get_logger()
_TELL_EVERY = 64
_HIGH_WATER = 2
_TELL_EVERY_S = 30.0
_LATE_S = 0.001
"""How much later than it must a lane looks at a circuit, so that it need not look twice."""

Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
"""Starts a task that somebody owns."""


class LineOwner(Protocol):
    """Whose lines they are: a slice that is held."""

    endpoint: str
    expires_at: float
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


@dataclass(slots=True)
class _Queued:
    owner: LineOwner
    line: RequestLine
    attempt: int


class Lane:
    """The lines for one upstream.

    Args:
        gate: Nothing is sent while this is not set.
        spawn: Starts the senders.
        wants_more: Called now and then while the queue grows shorter.
        circuits: When to leave the upstream alone.
        low_water: With fewer lines than this it has room, until it has twice as many: slices
            are claimed a few at a time, since a claim costs a sync of the disk.
        held_bytes: With as many bytes of waiting bodies it is full.
    """

    def __init__(
        self,
        upstream: LineUpstream,
        policy: RetryPolicy,
        *,
        gate: asyncio.Event,
        spawn: Spawn,
        wants_more: Callable[[], None],
        circuits: CircuitPolicy,
        low_water: int,
        held_bytes: int,
    ) -> None:
        self.upstream = upstream
        self._policy = policy
        self._circuit_policy = circuits
        self._circuits: dict[str, Circuit] = {}
        """By model; one that never failed has none."""
        self._parked: dict[str, deque[_Queued]] = {}
        self._wakers: dict[str, asyncio.TimerHandle] = {}
        self._gate = gate
        self._spawn = spawn
        self._wants_more = wants_more
        self._low_water = low_water
        self._held_bytes = held_bytes
        self._queue: deque[_Queued] = deque()
        self._senders = 0
        self._is_filling = True
        self._told_at = float("-inf")
        self.queued_bytes = 0
        """Bytes of the bodies that wait, for their first attempt or another."""
        self.expected = 0
        """Lines of slices that are handed out but not held yet."""
        self.expected_bytes = 0
        """The bytes of their bodies, about."""

    @property
    def has_room(self) -> bool:
        """Whether it is to be given more lines."""
        ahead = len(self._queue) + self.expected
        self._is_filling = ahead < self._low_water * (_HIGH_WATER if self._is_filling else 1)
        return self._is_filling

    @property
    def is_full(self) -> bool:
        """Whether it holds as many bytes of bodies as it may."""
        return self.queued_bytes + self.expected_bytes >= self._held_bytes

    def is_blocked(self, model: str) -> bool:
        """Whether lines of a model would be parked now."""
        circuit = self._circuits.get(model)
        return circuit is not None and circuit.is_blocking(time.monotonic())

    def put(self, owner: LineOwner, lines: list[RequestLine]) -> None:
        """Queue lines for their first attempt."""
        for line in lines:
            self._queue.append(_Queued(owner, line, 1))
            self.queued_bytes += len(line.body)
        self._start_senders()

    def parked_of(self, owner: LineOwner) -> list[str]:
        """The models of an owner's lines that are parked."""
        return [
            model
            for model, waiting in self._parked.items()
            if any(queued.owner is owner for queued in waiting)
        ]

    def withdraw(self, owner: LineOwner) -> None:
        """Drop the lines of an owner that are not sent yet."""
        mine = [queued.line for queued in self._queue if queued.owner is owner]
        if mine:
            self._queue = deque(queued for queued in self._queue if queued.owner is not owner)
        parked = 0
        for model, waiting in self._parked.items():
            mine += [queued.line for queued in waiting if queued.owner is owner]
            left = deque(queued for queued in waiting if queued.owner is not owner)
            parked += len(waiting) - len(left)
            self._parked[model] = left
        owner.park(-parked)
        for line in mine:
            self.queued_bytes -= len(line.body)
            owner.drop(line)

    def _start_senders(self) -> None:
        # A sender that has just been started has taken no line yet, so starting one for each
        # waiting line never starts too few.
        wanted = min(len(self._queue), self.upstream.max_concurrency - self._senders)
        for _ in range(wanted):
            self._senders += 1
            self._spawn(self._send_lines())

    async def _send_lines(self) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101
        send = self.upstream.send
        try:
            while self._queue:
                if not self._gate.is_set():
                    await self._gate.wait()
                    continue
                queued = self._queue.popleft()
                owner, line = queued.owner, queued.line
                self.queued_bytes -= len(line.body)
                if not len(self._queue) % _TELL_EVERY:
                    self._wants_more()
                if owner.is_stopping:
                    owner.drop(line)
                    continue
                circuit = self._circuits.get(line.model)
                verdict = circuit.admit(time.monotonic()) if circuit else Verdict.SEND
                if verdict is Verdict.PARK:
                    self._park(queued)
                    continue
                owner.flights[line.line] = task
                try:
                    reply = await send(owner.endpoint, line.body)
                except asyncio.CancelledError:
                    if circuit and verdict is Verdict.PROBE:
                        circuit.forget_probe()
                        self._set_waker(line.model, circuit)
                    if not owner.is_aborted:
                        raise
                    task.uncancel()
                    owner.drop(line)
                    continue
                except Exception as error:
                    # An adapter must not raise. If one does, the line pays, not the batch.
                    _log.exception("An upstream adapter failed.", upstream=self.upstream.name)
                    reply = Reply(
                        failure=Failure.INVALID, message=f"Penstock failed: {error!r}."
                    )
                finally:
                    del owner.flights[line.line]
                if reply.is_success:
                    if circuit:
                        self._note_answer(line.model, circuit)
                    owner.keep(line, reply)
                else:
                    self._decide(queued, reply, was_probe=verdict is Verdict.PROBE)
        finally:
            self._senders -= 1

    def _decide(self, queued: _Queued, reply: Reply, *, was_probe: bool) -> None:
        owner, line = queued.owner, queued.line
        circuit = self._circuits.get(line.model)
        if circuit is None:
            circuit = self._circuits[line.model] = Circuit(self._circuit_policy)
        now = time.monotonic()
        if is_outage(reply):
            if circuit.note_failure(now, was_probe=was_probe, jitter=random.random()):
                self._tell_outage(line.model, reply)
        else:
            self._note_answer(line.model, circuit)
        if asks_to_wait(reply):
            circuit.hold(now, reply.retry_after_s or 0.0)
        # What an outage does to a line is not its fault, and so is no attempt at it.
        is_free = asks_to_wait(reply) or (was_probe and is_outage(reply))
        wait_s = self._policy.wait_s(
            reply,
            attempt=1 if is_free and self._policy.max_attempts > 1 else queued.attempt,
            jitter=random.random(),
            time_left_s=owner.expires_at - time.time(),
        )
        if wait_s is None:
            self._tell(reply)
            owner.keep(line, reply)
        elif owner.is_stopping:
            owner.drop(line)
        elif circuit.is_blocking(now):
            queued.attempt += not is_free
            self._park(queued)
            self.queued_bytes += len(line.body)
        else:
            queued.attempt += 1
            timer = asyncio.get_running_loop().call_later(wait_s, self._put_back, queued)
            owner.timers[line.line] = (timer, line, self)
            self.queued_bytes += len(line.body)

    # Circuits

    def _park(self, queued: _Queued) -> None:
        """Let a line wait until its circuit lets it pass."""
        model = queued.line.model
        self._parked.setdefault(model, deque()).append(queued)
        queued.owner.park(1)
        self._set_waker(model, self._circuits[model])

    def _set_waker(self, model: str, circuit: Circuit) -> None:
        at = circuit.wake_at()
        if at is None or model in self._wakers:
            return
        wait_s = max(at - time.monotonic(), 0.0) + _LATE_S
        loop = asyncio.get_running_loop()
        self._wakers[model] = loop.call_later(wait_s, self._wake, model)

    def _wake(self, model: str) -> None:
        """Let go what the circuit of a model lets pass now."""
        del self._wakers[model]
        circuit = self._circuits[model]
        if circuit.is_blocking(time.monotonic()):
            self._set_waker(model, circuit)
            return
        self._let_go(model, 1 if circuit.is_open else None)
        self._wants_more()  # if none waits here, a slice of the model has lines to probe with

    def _let_go(self, model: str, most: int | None) -> None:
        """Put parked lines before the others, in their order."""
        waiting = self._parked.get(model)
        count = len(waiting or ()) if most is None else min(most, len(waiting or ()))
        if not waiting or not count:
            return
        first = [waiting.popleft() for _ in range(count)]
        for queued in first:
            queued.owner.park(-1)
        self._queue.extendleft(reversed(first))
        self._start_senders()

    def _note_answer(self, model: str, circuit: Circuit) -> None:
        if circuit.note_answer():
            _log.info("An upstream is back.", upstream=self.upstream.name, model=model)
            if not circuit.is_blocking(time.monotonic()):
                self._let_go(model, None)
            self._wants_more()

    def _tell_outage(self, model: str, reply: Reply) -> None:
        _log.error(
            "An upstream is down; its lines wait until it is back.",
            upstream=self.upstream.name,
            model=model,
            error=reply.message or f"HTTP status {reply.status_code}",
        )

    def _tell(self, reply: Reply) -> None:
        """Say in the log, now and then, that lines fail because of the upstream itself."""
        now = time.monotonic()
        if reply.failure is not None and now - self._told_at > _TELL_EVERY_S:
            self._told_at = now
            _log.warning(
                "Lines fail.",
                upstream=self.upstream.name,
                failure=reply.failure.value,
                error=reply.message,
            )

    def _put_back(self, queued: _Queued) -> None:
        del queued.owner.timers[queued.line.line]
        # It has waited long enough: it goes before the lines that were never sent.
        self._queue.appendleft(queued)
        self._start_senders()
