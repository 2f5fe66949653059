"""Lanes: one queue of lines for each upstream, and as many senders as it takes.

A sender takes a line, sends it, and asks the retry policy what the reply means. A line that
waits for its next attempt holds no place. Slices share a lane in the order they came, so a
slow line delays nothing but its own slice.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from penstock.executor.retry import RetryPolicy
from penstock.jsonl import RequestLine
from penstock.upstream.base import Failure, LineUpstream, Reply

_log = structlog.get_logger()
_TELL_EVERY = 64
_HIGH_WATER = 2
_TELL_EVERY_S = 30.0

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
        low_water: int,
        held_bytes: int,
    ) -> None:
        self.upstream = upstream
        self._policy = policy
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

    def put(self, owner: LineOwner, lines: list[RequestLine]) -> None:
        """Queue lines for their first attempt."""
        for line in lines:
            self._queue.append(_Queued(owner, line, 1))
            self.queued_bytes += len(line.body)
        self._start_senders()

    def withdraw(self, owner: LineOwner) -> None:
        """Drop the lines of an owner that are not sent yet."""
        mine = [queued.line for queued in self._queue if queued.owner is owner]
        if mine:
            self._queue = deque(queued for queued in self._queue if queued.owner is not owner)
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
                owner.flights[line.line] = task
                try:
                    reply = await send(owner.endpoint, line.body)
                except asyncio.CancelledError:
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
                    owner.keep(line, reply)
                else:
                    self._decide(queued, reply)
        finally:
            self._senders -= 1

    def _decide(self, queued: _Queued, reply: Reply) -> None:
        owner, line = queued.owner, queued.line
        wait_s = self._policy.wait_s(
            reply,
            attempt=queued.attempt,
            jitter=random.random(),
            time_left_s=owner.expires_at - time.time(),
        )
        if wait_s is None:
            self._tell(reply)
            owner.keep(line, reply)
        elif owner.is_stopping:
            owner.drop(line)
        else:
            queued.attempt += 1
            timer = asyncio.get_running_loop().call_later(wait_s, self._put_back, queued)
            owner.timers[line.line] = (timer, line, self)
            self.queued_bytes += len(line.body)

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
