"""Fair and urgent, simulated: the real feeder over a worker whose clock is a number.

The worker sends so many lines at a time, each of which takes one second. A slice time is what a
slice would take if the worker had it alone.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.executor.feeder import Feeder
from penstock.executor.waiting import Waiting, flow_of
from penstock.model import BatchId, Job, ProjectId, Slice
from penstock.store.base import Backlog

SLICE = 256


@dataclass
class Simulated:
    """A batch of a million lines or less, whose slices are made as they are asked for."""

    batch: Backlog
    lines: int
    claimed: set[int]

    @property
    def slices(self) -> int:
        return -(-self.lines // SLICE)

    def piece(self, index: int) -> Slice:
        first = index * SLICE
        return Slice(
            batch_id=self.batch.batch_id,
            index=index,
            start=first * 1000,
            end=min(first + SLICE, self.lines) * 1000,
            first_line=first + 1,
            requests=min(SLICE, self.lines - first),
            models=("m",),
        )


class Simulation:
    """Store, engine and worker in one, as far as a feeder can tell."""

    def __init__(self, *, places: int) -> None:
        self.places = places
        self.now = 0
        self.batches: dict[str, Simulated] = {}
        self.sent: list[tuple[int, str]] = []
        """Which second, and whose line."""
        self.waiting = Waiting[str](low_water=512, held_bytes=8 << 20)
        self.in_flight = 0
        self.feeder = Feeder(store=self, engine=self)  # pyright: ignore[reportArgumentType]
        self.feeder.serve(self)

    def add(
        self,
        name: str,
        lines: int,
        *,
        project: str | None = None,
        weight: int = 1,
        expires_at: int = 99_999,
        is_background: bool = False,
    ) -> None:
        batch = Backlog(
            batch_id=BatchId(name),
            project_id=ProjectId(project or name),
            weight=weight,
            expires_at=expires_at,
            created_at=self.now,
            is_background=is_background,
        )
        self.batches[name] = Simulated(batch, lines, set())

    # As a store

    async def list_backlog(self, *, now: int) -> list[Backlog]:
        del now
        return [each.batch for each in self.batches.values() if len(each.claimed) < each.slices]

    async def list_pending(
        self, batch_id: BatchId, *, limit: int, share: tuple[int, int]
    ) -> list[Slice]:
        batch, found = self.batches[batch_id], list[Slice]()
        for index in range(share[0], batch.slices, share[1]):
            if index not in batch.claimed:
                found.append(batch.piece(index))
                if len(found) == limit:
                    break
        return found

    # As an engine and a worker

    async def enqueue(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            name, _, index = job.id.rpartition(":")
            batch = self.batches[name]
            piece = batch.piece(int(index))
            batch.claimed.add(piece.index)
            self.waiting.put(flow_of(batch.batch), [name] * piece.requests)
            self.waiting.weigh(flow_of(batch.batch), piece.end - piece.start)
            self.feeder.hold(job.id)

    def has_room(self, piece: Slice, batch: Backlog) -> bool:
        del piece
        flow = flow_of(batch)
        has_room = self.waiting.has_room(flow, places=self.places)
        return has_room and not self.waiting.is_full(flow)

    def is_blocked(self, piece: Slice) -> bool:
        del piece
        return False

    def expect(self, piece: Slice, batch: Backlog, *, sign: int = 1) -> None:
        bytes_ = piece.end - piece.start
        self.waiting.expect(flow_of(batch), sign * piece.requests, sign * bytes_)

    async def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.feeder.poke()
            await self.feeder.feed()
            self.in_flight = 0
            while self.in_flight < self.places:
                name = self.waiting.take(in_flight=self.in_flight, places=self.places)
                if name is None:
                    break
                self.waiting.weigh(flow_of(self.batches[name].batch), -1000)
                self.sent.append((self.now, name))
                self.in_flight += 1
                if self.waiting.is_short(self.places):
                    await self.feeder.feed()
            self.now += 1

    def counts(self, since: int = 0) -> Counter[str]:
        return Counter(name for at, name in self.sent if at >= since)

    def times(self, name: str) -> list[int]:
        return [at for at, whose in self.sent if whose == name]


def test_a_hundred_lines_start_within_two_slice_times_of_a_million() -> None:
    for places in (4, 16, 64, 256):
        world = Simulation(places=places)
        world.add("large", 1_000_000)
        asyncio.run(world.run(50))
        world.add("small", 100)
        asyncio.run(world.run(2 * max(SLICE // places, 1)))

        started = world.times("small")
        assert len(started) == 100
        assert started[0] == 50
        assert len(world.sent) == places * world.now  # and no place stood idle


def test_weights_of_one_and_three_give_one_and_three() -> None:
    world = Simulation(places=16)
    world.add("light", 1_000_000)
    world.add("heavy", 1_000_000, weight=3)
    asyncio.run(world.run(1000))

    assert abs(world.counts()["light"] - 4000) <= 1
    assert abs(world.counts(since=900)["light"] - 400) <= 1


def test_the_earliest_deadline_goes_first_inside_a_project() -> None:
    world = Simulation(places=16)
    world.add("later", 2000, project="one", expires_at=2000)
    asyncio.run(world.run(20))
    world.add("sooner", 1000, project="one", expires_at=1000)
    world.add("other", 1_000_000)
    asyncio.run(world.run(400))

    # What the lane held already goes first: four slices and a bit.
    before = [name for _, name in world.sent if name != "other"]
    last_sooner = max(n for n, name in enumerate(before) if name == "sooner")
    assert before[: last_sooner + 1].count("later") <= 20 * 16 + 1024 + SLICE


def test_a_background_project_has_what_is_left() -> None:
    world = Simulation(places=16)
    world.add("grey", 1_000_000, is_background=True)
    asyncio.run(world.run(100))
    assert world.counts()["grey"] == 15 * 100  # the last place stays free

    world.add("red", 1600)
    asyncio.run(world.run(100))
    assert world.times("red") == [100 + n // 16 for n in range(1600)]  # all, and at once
    assert world.counts(since=100)["grey"] == 0

    asyncio.run(world.run(100))
    assert world.counts(since=200)["grey"] == 15 * 100


def test_two_projects_share_although_a_third_runs_in_the_background() -> None:
    world = Simulation(places=16)
    world.add("grey", 1_000_000, is_background=True)
    asyncio.run(world.run(10))
    world.add("red", 1_000_000)
    world.add("blue", 1_000_000)
    asyncio.run(world.run(100))

    counts = world.counts(since=10)
    assert counts == {"red": 800, "blue": 800}
