"""The lines that wait in a lane: whose is next, and whether more are wanted. Pure.

Each project has its own queue. The lines of several go out in proportion to their weights
(start-time fair queueing), so that a project which comes to a full lane does not wait behind
the lines of another. Lines of background projects go out only when no other waits, and never
in the last of the places, so that another's first line finds one.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from penstock.model import ProjectId

T = TypeVar("T")

_HIGH_WATER = 2
_AHEAD_S = 0.1
"""For how long the lines ahead are to last at least: to have more takes a claim, which is a
dozen turns of a loop that is busy with hundreds of replies."""
_TELL_EVERY = 64
"""How many lines are taken from one look for more slices to the next."""
_KEPT_FREE = 16
"""Background lines leave one place in so many, and at least one of several."""


class Owned(Protocol):
    """What says whose it is: a batch with a backlog, or a claimed slice."""

    @property
    def project_id(self) -> ProjectId: ...
    @property
    def weight(self) -> int: ...
    @property
    def is_background(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Flow:
    """The lines of one project."""

    project_id: ProjectId
    weight: int
    is_background: bool


def flow_of(owned: Owned) -> Flow:
    return Flow(owned.project_id, owned.weight, owned.is_background)


def background_places(places: int) -> int:
    """How many of an upstream's places background lines may take."""
    return places - max(places // _KEPT_FREE, 1) if places > 1 else places


@dataclass(slots=True)
class _Queue(Generic[T]):
    """The lines of one flow."""

    had: float = 0.0
    """How many it has sent, divided by its weight."""
    lines: deque[T] = field(default_factory=deque[T])
    expected: int = 0


@dataclass(slots=True)
class _Tier(Generic[T]):
    """The flows that are served alike."""

    queues: dict[Flow, _Queue[T]] = field(default_factory=dict[Flow, _Queue[T]])
    ready: list[tuple[Flow, _Queue[T]]] = field(default_factory=list[tuple[Flow, _Queue[T]]])
    """Those with lines."""
    count: int = 0
    expected: int = 0
    bytes: int = 0
    """Of the bodies of lines that wait, for their first attempt or another."""
    expected_bytes: int = 0
    now: float = 0.0
    """What the flow that was served last had had by then."""
    has_emptied: bool = False
    """Whether it was the last line of its flow."""

    def queue(self, flow: Flow) -> _Queue[T]:
        return self.queues.setdefault(flow, _Queue[T]())

    def wake(self, flow: Flow) -> deque[T]:
        """The lines of a flow to which some are about to be added."""
        queue = self.queue(flow)
        if not queue.lines:
            # One that comes late does not make up for the past.
            queue.had = max(queue.had, self.now)
            self.ready.append((flow, queue))
        return queue.lines

    def take(self) -> T | None:
        if not self.ready:
            return None
        place = 0
        if len(self.ready) > 1:
            place = min(range(len(self.ready)), key=lambda n: self.ready[n][1].had)
        flow, queue = self.ready[place]
        self.now = queue.had
        queue.had += 1 / flow.weight
        self.count -= 1
        line = queue.lines.popleft()
        self.has_emptied = not queue.lines
        if self.has_emptied:
            del self.ready[place]
        return line

    def remove(self, is_meant: Callable[[T], bool]) -> list[T]:
        gone: list[T] = []
        for _, queue in self.ready:
            mine = [line for line in queue.lines if is_meant(line)]
            if mine:
                queue.lines = deque(line for line in queue.lines if not is_meant(line))
                gone += mine
        self.ready = [entry for entry in self.ready if entry[1].lines]
        self.count -= len(gone)
        return gone

    def ahead_of(self, flow: Flow) -> int:
        """How many lines of a flow wait or are expected."""
        queue = self.queues.get(flow)
        return len(queue.lines) + queue.expected if queue else 0

    def forget_idle(self) -> None:
        """Forget flows that have nothing here and would begin like new ones."""
        self.queues = {
            flow: queue
            for flow, queue in self.queues.items()
            if queue.lines or queue.expected or queue.had > self.now
        }


class Waiting(Generic[T]):
    """The lines of a lane that are ready to be sent.

    Args:
        low_water: With fewer lines than this, or than go out in a tenth of a second, it has
            room, until it has twice as many: slices are claimed a few at a time, since a claim
            costs a sync of the disk.
        held_bytes: With as many bytes of waiting bodies it is full.
    """

    def __init__(self, *, low_water: int, held_bytes: int) -> None:
        self._least = self._low_water = low_water
        self._added = 0
        self._judged = (float("-inf"), 0)
        """When the pace was judged last, and how many lines had gone out by then."""
        self._held_bytes = held_bytes
        self._is_filling = True
        self._normal = _Tier[T]()
        self._background = _Tier[T]()
        self._taken_from = self._normal

    def __len__(self) -> int:
        return self._normal.count + self._background.count

    @property
    def expected(self) -> int:
        """Lines of slices that are handed out but not held yet."""
        return self._normal.expected + self._background.expected

    @property
    def bytes(self) -> int:
        return self._normal.bytes + self._background.bytes

    # Lines

    def put(self, flow: Flow, lines: Iterable[T]) -> None:
        """Add lines behind those of their project."""
        self._add(flow, list(lines), deque[T].extend)

    def put_first(self, flow: Flow, lines: Iterable[T]) -> None:
        """Add lines before those of their project, in their order."""
        self._add(flow, list(lines)[::-1], deque[T].extendleft)

    def _add(
        self, flow: Flow, lines: list[T], add: Callable[[deque[T], list[T]], None]
    ) -> None:
        if lines:
            tier = self._tier(flow)
            add(tier.wake(flow), lines)
            tier.count += len(lines)
            self._added += len(lines)

    def take(self, *, in_flight: int, places: int) -> T | None:
        """Take out the line that is next; None if none is to be sent now."""
        line = self._normal.take()
        if line is not None:
            self._taken_from = self._normal
        elif self._background.count and in_flight < background_places(places):
            line = self._background.take()
            self._taken_from = self._background
        return line

    def give_back(self, flow: Flow, line: T) -> None:
        """Put a line that was taken, but could not be sent, where it was."""
        self.put_first(flow, [line])
        self._tier(flow).queue(flow).had -= 1 / flow.weight

    def remove(self, is_meant: Callable[[T], bool]) -> list[T]:
        """Take out all lines of a kind."""
        return self._normal.remove(is_meant) + self._background.remove(is_meant)

    def to_send(self, *, in_flight: int, places: int) -> int:
        """How many of them would be sent, were there senders enough."""
        background = max(background_places(places) - in_flight, 0)
        return self._normal.count + min(self._background.count, background)

    def weigh(self, flow: Flow, count: int) -> None:
        """Count bytes of bodies that wait, or with a minus do so no more."""
        self._tier(flow).bytes += count

    # Slices to come

    def expect(self, flow: Flow, lines: int, bytes_: int) -> None:
        """Count lines of a slice that was handed out or, with a minus, is held or came back."""
        tier = self._tier(flow)
        tier.queue(flow).expected += lines
        tier.expected += lines
        tier.expected_bytes += bytes_
        if lines < 0:
            tier.forget_idle()

    def has_room(self, flow: Flow, *, places: int) -> bool:
        """Whether another slice of a project is wanted."""
        normal, background = self._normal, self._background
        ahead = normal.count + normal.expected
        if flow.is_background:
            least = background_places(places) / 2
            return not ahead and background.count + background.expected < least
        if not places:
            return not ahead
        self._is_filling = ahead < self._low_water * (_HIGH_WATER if self._is_filling else 1)
        return self._is_filling or not normal.ahead_of(flow)

    def is_full(self, flow: Flow) -> bool:
        """Whether it holds as many bytes of bodies as it may. A project of which nothing is
        here does not wait until those of others have gone, but finds room for a slice."""
        normal, background = self._normal, self._background
        held = normal.bytes + normal.expected_bytes
        if flow.is_background:
            return held + background.bytes + background.expected_bytes >= self._held_bytes
        return held >= self._held_bytes * (1 if normal.ahead_of(flow) else 2)

    def is_short(self, places: int) -> bool:
        """Whether more slices may be wanted, now that a line was taken: asked after each."""
        tier = self._taken_from
        is_time = not tier.count % _TELL_EVERY
        if tier is self._background:
            return is_time or tier.count == (background_places(places) - 1) // 2
        return tier.has_emptied or (is_time and tier.count < _HIGH_WATER * self._low_water)

    def judge_pace(self, now: float) -> None:
        """Learn how fast its lines go out. To be called now and then, such as when it is short.

        Args:
            now: In seconds of a monotonic clock.
        """
        (then, gone_then), gone = self._judged, self._added - len(self)
        if now - then >= _AHEAD_S:
            pace = (gone - gone_then) / (now - then)
            self._low_water = max(self._least, int(pace * _AHEAD_S))
            self._judged = (now, gone)

    def _tier(self, flow: Flow) -> _Tier[T]:
        return self._background if flow.is_background else self._normal
