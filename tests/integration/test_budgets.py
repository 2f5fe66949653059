"""Workers that share an upstream, over one database and a server that counts."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from penstock.blobs.folder import FolderBlobs
from penstock.blobs.local_segments import LocalSegments
from penstock.engine.memory import MemoryEngine
from penstock.executor.admission import Admission, AdmissionPolicy
from penstock.executor.budgets import Budgets, is_due
from penstock.executor.feeder import Feeder
from penstock.executor.limits import ConcurrencyPolicy
from penstock.executor.worker import Worker, WorkerOptions
from penstock.model import Batch, BatchId, BatchStatus, File, FileId, JobKind, Purpose, Slice
from penstock.places import store_url
from penstock.store.base import BatchChange
from penstock.store.sql import SqlStore
from penstock.telemetry import Health, Metrics
from penstock.upstream.openai_http import OpenAIHttpUpstream
from penstock.upstream.routes import Route, Routes
from tests.integration.bench import CHAT, PATIENCE_S, line, prompt_of
from tests.upstreams import Action, ScriptedUpstream, answer, chat_completion, fail, hold

LEASE_S = 2.5
LINES = 20
"""In each slice."""


@dataclass
class Rig:
    """A worker with all that it needs."""

    worker: Worker
    engine: MemoryEngine
    tasks: list[asyncio.Task[None]]
    is_dead: bool = False

    @property
    def door(self) -> Admission:
        [lane] = self.worker.lanes
        return lane.admissions[0]

    async def kill(self) -> None:
        """Drop all that it does, as it stands. What its engine waits for never comes."""
        self.is_dead = True
        for task in self.tasks:
            task.cancel()
        await asyncio.sleep(0)

    async def stop(self) -> None:
        """End it in good order."""
        self.worker.stop()
        await self.engine.stop()
        self.worker.close()
        for task in self.tasks[1:]:
            task.cancel()
        await asyncio.wait(self.tasks, timeout=PATIENCE_S)


async def until(is_so: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    async with asyncio.timeout(patience_s):
        while not is_so():
            await asyncio.sleep(0.01)


async def fill(data_dir: Path, name: str, *, slices: int, project: str = "p") -> None:
    """Add a batch whose slices wait to be handed out."""
    data = b"".join(line(f"{name}-{n:06d}") for n in range(slices * LINES))
    size, now = len(data) // slices, int(time.time())
    key = f"files/{name}"

    async def chunks() -> AsyncIterator[bytes]:
        yield data

    await FolderBlobs(data_dir / "blobs").put(key, chunks())
    store = SqlStore(store_url(data_dir))
    await store.open()
    owner = await store.ensure_project(project)
    file = File(
        id=FileId(f"file-{name}"),
        project_id=owner.id,
        purpose=Purpose.BATCH,
        filename="f",
        bytes=len(data),
        sha256="",
        blob_key=key,
        created_at=now,
    )
    await store.add_file(file)
    batch = Batch(
        id=BatchId(name),
        project_id=owner.id,
        status=BatchStatus.VALIDATING,
        endpoint=CHAT,
        input_file_id=file.id,
        input_blob_key=key,
        completion_window="1h",
        expires_at=now + 3600,
        created_at=now,
    )
    await store.add_batch(batch)
    pieces = [
        Slice(
            batch_id=batch.id,
            index=index,
            start=index * size,
            end=(index + 1) * size,
            first_line=index * LINES + 1,
            requests=LINES,
            models=("m",),
        )
        for index in range(slices)
    ]
    change = BatchChange(slices=pieces)
    await store.move_batch(batch.id, BatchStatus.IN_PROGRESS, now=now, change=change)
    await store.close()


@asynccontextmanager
async def working(
    data_dir: Path,
    name: str,
    server: ScriptedUpstream,
    *,
    most: int = 20,
    requests_per_minute: int = 0,
    part: tuple[int, int] = (0, 1),
) -> AsyncIterator[Rig]:
    """Run a worker that shares the upstream `one`."""
    engine, health = MemoryEngine(), Health()
    store = SqlStore(store_url(data_dir), jobs=engine)
    await store.open()
    upstream = OpenAIHttpUpstream(
        name="one",
        base_url=server.base_url,
        api_key=None,
        max_concurrency=most,
        request_timeout_s=30,
    )
    routes = Routes([Route(name="one", upstreams=(upstream,), models=("*",))])
    feeder = Feeder(store=store, engine=engine, share=lambda: part)
    policy = AdmissionPolicy(
        concurrency=ConcurrencyPolicy(most=most),
        requests_per_minute=requests_per_minute,
        is_shared=True,
    )
    worker = Worker(
        store=store,
        blobs=FolderBlobs(data_dir / "blobs"),
        segments=LocalSegments(data_dir / "segments"),
        routes=routes,
        policies={"one": policy},
        health=health,
        metrics=Metrics(health),
        options=WorkerOptions(
            worker_id=name,
            lease_s=30,
            flush_interval_s=0.01,
            flush_bytes=1 << 18,
            cancel_grace_s=0,
            shutdown_grace_s=0,
            lines_ahead=40,
        ),
        wants_more=feeder.has_room,
        took=feeder.hold,
        lacks=feeder.lacks,
    )
    feeder.serve(worker)
    engine.handle(JobKind.SLICE, worker.run_slice)
    budgets = Budgets(
        store=store, lanes=lambda: worker.lanes, worker_id=name, health=health, lease_s=LEASE_S
    )
    loops = (worker.run(), engine.run(), feeder.run(), budgets.run())
    rig = Rig(worker, engine, [asyncio.create_task(loop) for loop in loops])
    try:
        await until(lambda: any(True for _ in worker.lanes))
        yield rig
    finally:
        if not rig.is_dead:
            await rig.stop()
        await store.close()
        await routes.close()


def slow(path: str, headers: dict[str, str], body: bytes, nth: int) -> Action:
    """Answer after a while."""
    del path, headers, body, nth
    is_time = asyncio.Event()
    asyncio.get_running_loop().call_later(0.15, is_time.set)
    return hold(answer(chat_completion("Hello.")), until=is_time)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    (tmp_path / "blobs").mkdir()
    return tmp_path


@pytest.fixture
async def server() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream(slow) as server:
        yield server


def test_when_a_part_is_renewed() -> None:
    def due(
        *,
        since_s: float = 0.1,
        demand: int = 5,
        asked: int = 5,
        part: int = 5,
        news: bool = False,
        every_s: float = 2,
    ) -> bool:
        return is_due(
            since_s=since_s,
            demand=demand,
            asked=asked,
            part=part,
            has_news=news,
            every_s=every_s,
        )

    assert not due()
    assert due(since_s=2)
    assert not due(since_s=2, every_s=4)
    assert due(since_s=4, every_s=4)
    assert due(news=True)
    assert due(demand=1, asked=0, part=0)
    assert not due(demand=2, asked=0, part=2)
    assert not due(demand=9)
    assert due(demand=10)


async def test_one_worker_alone_uses_the_whole(
    data_dir: Path, server: ScriptedUpstream
) -> None:
    await fill(data_dir, "a", slices=20)
    async with working(data_dir, "w0", server):
        await server.wait_for_requests(60)

    assert server.max_in_flight == 20


async def test_three_workers_share_one_upstream_evenly_and_never_go_beyond_it(
    data_dir: Path, server: ScriptedUpstream
) -> None:
    await fill(data_dir, "a", slices=200)
    async with working(data_dir, "w0", server, part=(0, 3)) as one:
        await server.wait_for_requests(40)
        async with (
            working(data_dir, "w1", server, part=(1, 3)) as two,
            working(data_dir, "w2", server, part=(2, 3)) as three,
        ):
            rigs = (one, two, three)
            await until(lambda: sorted(rig.door.limit.current for rig in rigs) == [6, 7, 7])
            await server.wait_for_requests(len(server.requests) + 60)

    assert server.max_in_flight == 20


async def test_a_dead_worker_s_part_comes_back_within_its_lease(
    data_dir: Path, server: ScriptedUpstream
) -> None:
    await fill(data_dir, "a", slices=200)
    async with (
        working(data_dir, "w0", server, part=(0, 2)) as dead,
        working(data_dir, "w1", server, part=(1, 2)) as alive,
    ):
        await until(lambda: dead.door.limit.current == alive.door.limit.current == 10)
        await dead.kill()
        killed_at = time.monotonic()
        await until(lambda: alive.door.limit.current == 20)

    # The lease, the time to the next renewal, and what a busy machine adds.
    assert time.monotonic() - killed_at < LEASE_S + 2 + 3
    assert server.max_in_flight <= 20


def refuse_first_worker(path: str, headers: dict[str, str], body: bytes, nth: int) -> Action:
    """Refuse lines of the slices that the first of two workers begins with."""
    is_first = int(prompt_of(body)[2:]) // LINES % 2 == 0
    return fail(429) if is_first else slow(path, headers, body, nth)


async def test_a_refusal_that_one_sees_slows_all(
    data_dir: Path, server: ScriptedUpstream
) -> None:
    await fill(data_dir, "a", slices=200)
    async with (
        working(data_dir, "w0", server, part=(0, 2)) as one,
        working(data_dir, "w1", server, part=(1, 2)) as two,
    ):
        await until(lambda: one.door.limit.current == two.door.limit.current == 10)
        server.behave = refuse_first_worker
        await until(lambda: one.door.limit.cut_at > 0)
        await until(lambda: two.door.limit.limiter == "refusals")

        assert two.door.limit.current == 5
        assert two.door.limit.cut_at < 0  # it met with none itself


async def test_what_asks_one_to_wait_holds_all(
    data_dir: Path, server: ScriptedUpstream
) -> None:
    await fill(data_dir, "a", slices=200)
    refused: list[float] = []

    def refuse_one(path: str, headers: dict[str, str], body: bytes, nth: int) -> Action:
        if len(server.requests) == 100:
            refused.append(time.monotonic())
            return fail(429, headers={"Retry-After": "30"})
        return slow(path, headers, body, nth)

    server.behave = refuse_one
    async with (
        working(data_dir, "w0", server, part=(0, 2)) as one,
        working(data_dir, "w1", server, part=(1, 2)) as two,
    ):
        await until(lambda: bool(refused))
        ends = refused[0] + 30
        doors = (one.door, two.door)
        await until(
            lambda: all(door.held_until == pytest.approx(ends, abs=1) for door in doors)
        )
        await until(lambda: all(not door.in_flight for door in doors))
        seen = len(server.requests)
        await asyncio.sleep(0.3)

        assert len(server.requests) == seen


async def test_a_rate_is_shared(data_dir: Path, server: ScriptedUpstream) -> None:
    await fill(data_dir, "a", slices=40)
    server.behave = lambda *_: answer(chat_completion("Hello."))
    async with (
        working(data_dir, "w0", server, part=(0, 2), requests_per_minute=1200),
        working(data_dir, "w1", server, part=(1, 2), requests_per_minute=1200),
    ):
        await server.wait_for_requests(100)

    times = [request.at for request in server.requests]
    # 20 a second, and as many more as the largest burst.
    assert all(sum(at <= other < at + 1 for other in times) <= 42 for at in times)
    assert times[99] - times[0] >= 3


async def test_without_the_database_nothing_is_sent_after_the_lease_and_then_it_goes_on(
    data_dir: Path, server: ScriptedUpstream
) -> None:
    await fill(data_dir, "a", slices=200)
    async with working(data_dir, "w0", server) as rig:
        await server.wait_for_requests(40)
        place = data_dir / "penstock.db"

        rival = sqlite3.connect(place, isolation_level=None)
        rival.execute("BEGIN IMMEDIATE")
        await until(lambda: rig.door.hindrance(time.monotonic()) == "no_lease")
        await until(lambda: not rig.door.in_flight)
        seen = len(server.requests)
        await asyncio.sleep(0.3)
        assert len(server.requests) == seen

        rival.execute("ROLLBACK")
        rival.close()
        await server.wait_for_requests(seen + 20)
