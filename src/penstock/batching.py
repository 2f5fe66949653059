"""An inference engine's time, simulated: continuous batching as vLLM and SGLang do it. Pure.

The engine works on up to `slots` requests at once. Each of its steps gives every one of them
one token, and takes a little longer the more there are. A request that finds no free slot waits
in a queue, first come, first served. Reading a prompt (prefill) holds up all of them.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How fast the simulated engine is."""

    slots: int
    """How many requests it works on at once."""
    step_ms: float = 20.0
    """How long a step takes with no request in it."""
    step_ms_per_request: float = 0.05
    """How much longer for each request in it."""
    prefill_tokens_per_s: float = 100_000.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative.")
        if self.slots < 1:
            raise ValueError(f"slots is {self.slots}; it must be at least 1.")
        if not self.step_ms and not self.step_ms_per_request:
            raise ValueError("step_ms is 0; a step must take some time.")

    def step_s(self, running: int) -> float:
        """How long a step takes with so many requests in it."""
        return (self.step_ms + running * self.step_ms_per_request) / 1000


class BatchingEngine(Generic[T]):
    """The requests in a simulated engine. All times are of one clock, in seconds."""

    def __init__(self, options: EngineOptions, *, now: float) -> None:
        self._options = options
        self._now = now
        self._steps = 0.0
        """How many steps were taken so far, the present one in part."""
        self._prefill_s = 0.0
        """How much reading of prompts lies ahead of the next step."""
        self._running: list[tuple[float, int, T]] = []
        """By the step at which each ends."""
        self._waiting: deque[tuple[int, int, T]] = deque()
        self._count = 0

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def slots(self) -> int:
        return self._options.slots

    def add(self, request: T, *, prompt_tokens: int, output_tokens: int, now: float) -> list[T]:
        """Take a request.

        Returns:
            Those that have ended by then, in their order.
        """
        ended = self.advance(now)
        self._waiting.append((prompt_tokens, max(output_tokens, 1), request))
        self._admit()
        return ended

    def remove(self, is_gone: Callable[[T], bool], *, now: float) -> list[T]:
        """Forget the requests whose client has gone; as `add`."""
        ended = self.advance(now)
        self._running = [each for each in self._running if not is_gone(each[2])]
        heapq.heapify(self._running)
        self._waiting = deque(each for each in self._waiting if not is_gone(each[2]))
        self._admit()
        return ended

    def advance(self, now: float) -> list[T]:
        """Let time pass.

        Returns:
            The requests that have ended, in their order.
        """
        ended: list[T] = []
        while (at := self.next_end_at()) is not None and at <= now:
            self._prefill_s = 0.0
            self._steps, _, request = heapq.heappop(self._running)
            self._now = at
            ended.append(request)
            self._admit()
        left_s = max(now - self._now, 0.0)
        read_s = min(left_s, self._prefill_s)
        self._prefill_s -= read_s
        if self._running:
            self._steps += (left_s - read_s) / self._options.step_s(len(self._running))
        self._now = max(self._now, now)
        return ended

    def next_end_at(self) -> float | None:
        """When the next request ends if no other comes; None if there is none."""
        if not self._running:
            return None
        step_s = self._options.step_s(len(self._running))
        return self._now + self._prefill_s + (self._running[0][0] - self._steps) * step_s

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._options.slots:
            prompt_tokens, output_tokens, request = self._waiting.popleft()
            self._count += 1
            heapq.heappush(self._running, (self._steps + output_tokens, self._count, request))
            if self._options.prefill_tokens_per_s:
                self._prefill_s += prompt_tokens / self._options.prefill_tokens_per_s
