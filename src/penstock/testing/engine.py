"""The contract kits of `Engine`: one test for each promise of its docstrings.

`EngineContract` is for every engine, `SharedEngineContract` for one that several processes
share.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from penstock.engine.base import Engine
from penstock.model import Job, JobKind

TIMEOUT_S = 10.0
"""How long a test waits for what must come."""
FAR_S = 3600.0
"""So far ahead that a test does not live to see it."""

A = Job(kind=JobKind.SLICE, id="batch-1:0")
B = Job(kind=JobKind.SLICE, id="batch-1:1")
OTHER = Job(kind=JobKind.FINALIZE, id="batch-1:0")
LAST = Job(kind=JobKind.VALIDATE, id="last")
"""Enqueued behind others, so that when it is done the others have had their turn."""


class Hands:
    """A handler that does what a test tells it to and remembers it."""

    def __init__(self, engine: Engine) -> None:
        self.begun: list[str] = []
        """The jobs that were handed out, in order."""
        self.ended: list[str] = []
        self.doing = 0
        self.most_at_once = 0
        self.act: Callable[[str, asyncio.Event], Awaitable[None]] | None = None
        """What is done with a job; None means nothing."""
        self._changed = asyncio.Condition()
        for kind in JobKind:
            engine.handle(kind, self._handler(kind))

    def _handler(self, kind: JobKind) -> Callable[[str, asyncio.Event], Awaitable[None]]:
        async def handle(name: str, stop: asyncio.Event) -> None:
            job = f"{kind} {name}"
            self.begun.append(job)
            self.doing += 1
            self.most_at_once = max(self.most_at_once, self.doing)
            await self._tell()
            try:
                if self.act is not None:
                    await self.act(job, stop)
                self.ended.append(job)
            finally:
                self.doing -= 1
                await self._tell()

        return handle

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait until it is so."""
        async with asyncio.timeout(TIMEOUT_S), self._changed:
            await self._changed.wait_for(is_so)

    async def until_done(self, *jobs: Job) -> None:
        """Wait until each of these has been done."""
        await self.until(lambda: {named(job) for job in jobs} <= set(self.ended))


def named(job: Job) -> str:
    return f"{job.kind} {job.id}"


async def until(is_so: Callable[[], bool]) -> None:
    """Wait until it is so, where two engines are looked at."""
    async with asyncio.timeout(TIMEOUT_S):
        while not is_so():  # noqa: ASYNC110  (no event to await)
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running(engine: Engine) -> AsyncGenerator[asyncio.Task[None]]:
    """Let an engine run, and stop it at the end."""
    task = asyncio.create_task(engine.run())
    await asyncio.sleep(0)
    try:
        yield task
    finally:
        async with asyncio.timeout(TIMEOUT_S):
            await engine.stop()
            await task


class EngineContract:
    """Inherit, and give a fixture `engine`, which has no jobs and no handlers."""

    @pytest.fixture
    def hands(self, engine: Engine) -> Hands:
        return Hands(engine)

    async def test_a_job_is_handed_to_the_handler_of_its_kind(
        self, engine: Engine, hands: Hands
    ) -> None:
        jobs = [Job(kind=kind, id=f"id of {kind}") for kind in JobKind]
        await engine.enqueue(jobs[:2])
        async with running(engine):
            await engine.enqueue(jobs[2:])
            await hands.until_done(*jobs)

        assert sorted(hands.begun) == sorted(map(named, jobs))

    async def test_jobs_do_not_wait_for_each_other(self, engine: Engine, hands: Hands) -> None:
        jobs = [Job(kind=JobKind.SLICE, id=f"batch-1:{n}") for n in range(300)]

        async def wait_for_all(job: str, stop: asyncio.Event) -> None:
            await hands.until(lambda: len(hands.begun) == len(jobs))

        hands.act = wait_for_all
        async with running(engine):
            await engine.enqueue(jobs)
            await hands.until_done(*jobs)

        assert hands.most_at_once == len(jobs)

    async def test_a_handler_may_enqueue(self, engine: Engine, hands: Hands) -> None:
        async def go_on(job: str, stop: asyncio.Event) -> None:
            if job == named(A):
                await engine.enqueue([B])

        hands.act = go_on
        async with running(engine):
            await engine.enqueue([A])
            await hands.until_done(A, B)

    async def test_nothing_is_enqueued_without_jobs(self, engine: Engine, hands: Hands) -> None:
        await engine.enqueue([])
        async with running(engine):
            await engine.enqueue([LAST])
            await hands.until_done(LAST)

        assert hands.begun == [named(LAST)]

    # Once

    async def test_a_job_that_waits_is_not_taken_twice(
        self, engine: Engine, hands: Hands
    ) -> None:
        await engine.enqueue([A, A, OTHER])
        await engine.enqueue([A])
        async with running(engine):
            await hands.until_done(A, OTHER)
            await engine.enqueue([LAST])
            await hands.until_done(LAST)

        assert sorted(hands.begun) == sorted(map(named, [A, OTHER, LAST]))

    async def test_a_job_that_is_being_done_is_handed_out_again_after_it(
        self, engine: Engine, hands: Hands
    ) -> None:
        go_on = asyncio.Event()

        async def wait(job: str, stop: asyncio.Event) -> None:
            if job == named(A):
                await go_on.wait()

        hands.act = wait
        async with running(engine):
            await engine.enqueue([A])
            await hands.until(lambda: hands.begun == [named(A)])
            await engine.enqueue([A])
            await engine.enqueue([A, B])
            await hands.until_done(B)
            assert hands.begun.count(named(A)) == 1
            go_on.set()
            await hands.until(lambda: hands.ended.count(named(A)) == 2)
            await engine.enqueue([LAST])
            await hands.until_done(LAST)

        assert hands.begun.count(named(A)) == 2

    async def test_a_job_that_was_done_may_be_enqueued_anew(
        self, engine: Engine, hands: Hands
    ) -> None:
        async with running(engine):
            for times in (1, 2, 3):
                await engine.enqueue([A])
                await hands.until(lambda times=times: hands.ended == [named(A)] * times)

    # Due times

    async def test_a_job_is_not_handed_out_before_it_is_due(
        self, engine: Engine, hands: Hands
    ) -> None:
        due_at = time.time() + 0.3
        begun_at = 0.0

        async def look(job: str, stop: asyncio.Event) -> None:
            nonlocal begun_at
            if job == named(A):
                begun_at = time.time()

        hands.act = look
        async with running(engine):
            await engine.enqueue([Job(kind=A.kind, id=A.id, due_at=due_at)])
            await engine.enqueue([B])
            await hands.until_done(A, B)

        assert hands.begun == [named(B), named(A)]
        assert begun_at >= due_at

    async def test_a_job_that_is_being_done_may_ask_for_itself_at_a_later_time(
        self, engine: Engine, hands: Hands
    ) -> None:
        due_at = time.time() + 0.3
        begun_at: list[float] = []

        async def ask_again(job: str, stop: asyncio.Event) -> None:
            begun_at.append(time.time())
            if len(begun_at) == 1:
                await engine.enqueue([Job(kind=A.kind, id=A.id, due_at=due_at + FAR_S)])
                await engine.enqueue([Job(kind=A.kind, id=A.id, due_at=due_at)])

        hands.act = ask_again
        async with running(engine):
            await engine.enqueue([A])
            await hands.until(lambda: hands.ended == [named(A)] * 2)

        assert begun_at[1] >= due_at

    async def test_a_job_that_waits_becomes_due_when_the_first_of_two_is(
        self, engine: Engine, hands: Hands
    ) -> None:
        far = time.time() + FAR_S
        async with running(engine):
            await engine.enqueue([Job(kind=A.kind, id=A.id, due_at=far)])
            await engine.enqueue([Job(kind=B.kind, id=B.id, due_at=time.time() + 0.2)])
            await engine.enqueue([A, Job(kind=B.kind, id=B.id, due_at=far)])
            await hands.until_done(A, B)
            await engine.enqueue([LAST])
            await hands.until_done(LAST)

        assert hands.begun == [named(A), named(B), named(LAST)]

    async def test_a_job_that_became_due_sooner_can_be_taken_back(
        self, engine: Engine, hands: Hands
    ) -> None:
        far = time.time() + FAR_S
        await engine.enqueue([Job(kind=A.kind, id=A.id, due_at=far + FAR_S)])
        await engine.enqueue([Job(kind=A.kind, id=A.id, due_at=far)])
        await engine.cancel([A])
        await engine.enqueue([Job(kind=A.kind, id=A.id, due_at=far + FAR_S)])
        await engine.enqueue([A])
        async with running(engine):
            await hands.until_done(A)
            await engine.enqueue([LAST])
            await hands.until_done(LAST)

        assert hands.begun == [named(A), named(LAST)]

    async def test_a_job_that_has_long_been_due_is_handed_out(
        self, engine: Engine, hands: Hands
    ) -> None:
        async with running(engine):
            await engine.enqueue([Job(kind=A.kind, id=A.id, due_at=time.time() - FAR_S)])
            await hands.until_done(A)

    # Cancel

    async def test_a_job_that_waits_is_taken_back(self, engine: Engine, hands: Hands) -> None:
        await engine.enqueue([A, B, OTHER])
        await engine.cancel([A])
        async with running(engine):
            await hands.until_done(B, OTHER)
            await engine.enqueue([LAST])
            await hands.until_done(LAST)

        assert named(A) not in hands.begun

    async def test_a_job_that_was_taken_back_may_be_enqueued_anew(
        self, engine: Engine, hands: Hands
    ) -> None:
        async with running(engine):
            await engine.enqueue([Job(kind=A.kind, id=A.id, due_at=time.time() + FAR_S)])
            await engine.cancel([A])
            await engine.enqueue([A])
            await hands.until_done(A)

    async def test_a_job_that_is_being_done_is_told_to_stop_and_others_are_not(
        self, engine: Engine, hands: Hands
    ) -> None:
        told: list[str] = []
        go_on = asyncio.Event()

        async def wait(job: str, stop: asyncio.Event) -> None:
            waits = [asyncio.ensure_future(event.wait()) for event in (stop, go_on)]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for each in waits:
                each.cancel()
            if stop.is_set():
                told.append(job)

        hands.act = wait
        async with running(engine):
            await engine.enqueue([A, B])
            await hands.until(lambda: len(hands.begun) == 2)
            await engine.cancel([A])
            await hands.until_done(A)
            assert named(B) not in hands.ended
            go_on.set()
            await hands.until_done(B)

        assert told == [named(A)]

    async def test_a_cancel_takes_back_what_would_have_come_after_it(
        self, engine: Engine, hands: Hands
    ) -> None:
        async def wait(job: str, stop: asyncio.Event) -> None:
            if job == named(A):
                await stop.wait()

        hands.act = wait
        async with running(engine):
            await engine.enqueue([A])
            await hands.until(lambda: hands.begun == [named(A)])
            await engine.enqueue([A])
            await engine.cancel([A])
            await hands.until_done(A)
            await engine.enqueue([LAST])
            await hands.until_done(LAST)

        assert hands.begun == [named(A), named(LAST)]

    async def test_a_handler_that_does_not_answer_a_cancel_ends_in_its_own_time(
        self, engine: Engine, hands: Hands
    ) -> None:
        go_on = asyncio.Event()

        async def wait(job: str, stop: asyncio.Event) -> None:
            await stop.wait()
            await go_on.wait()

        hands.act = wait
        async with running(engine):
            await engine.enqueue([A])
            await hands.until(lambda: hands.begun == [named(A)])
            await engine.cancel([A])
            await asyncio.sleep(0)
            go_on.set()
            await hands.until_done(A)

    async def test_what_is_not_there_is_passed_over_by_cancel(
        self, engine: Engine, hands: Hands
    ) -> None:
        async with running(engine):
            await engine.cancel([A])
            await engine.cancel([])
            await engine.enqueue([A])
            await hands.until_done(A)

    # Failures and the end

    async def test_a_handler_that_fails_does_not_stop_the_engine(
        self, engine: Engine, hands: Hands
    ) -> None:
        fails = True

        async def fail(job: str, stop: asyncio.Event) -> None:
            if job == named(A) and fails:
                raise ValueError(job)

        hands.act = fail
        async with running(engine):
            await engine.enqueue([A])
            await hands.until(lambda: hands.begun == [named(A)] and not hands.doing)
            await engine.enqueue([B])
            await hands.until_done(B)
            assert hands.begun == [named(A), named(B)]
            fails = False
            await engine.enqueue([A])
            await hands.until_done(A)

    async def test_stop_waits_for_what_is_being_done_and_hands_out_nothing_more(
        self, engine: Engine, hands: Hands
    ) -> None:
        go_on = asyncio.Event()

        async def wait(job: str, stop: asyncio.Event) -> None:
            await go_on.wait()

        hands.act = wait
        async with running(engine) as run:
            await engine.enqueue([A])
            await hands.until(lambda: hands.begun == [named(A)])
            stopping = asyncio.create_task(engine.stop())
            done, _ = await asyncio.wait([stopping, run], timeout=0.05)
            assert not done
            assert hands.ended == []
            await engine.enqueue([B])
            go_on.set()
            async with asyncio.timeout(TIMEOUT_S):
                await stopping
            assert hands.ended == [named(A)]

        assert hands.begun == [named(A)]


SHARED = Job(kind=JobKind.VALIDATE, id="batch-1")
MANY = [Job(kind=JobKind.VALIDATE, id=f"batch-{n}") for n in range(50)]

Transaction = Callable[[], AbstractAsyncContextManager[object]]
"""Begins a transaction on a connection that `enqueue` takes. It is committed at the end of the
block, and rolled back if an exception leaves it."""


class Regret(Exception):
    """Makes a test's transaction roll back."""


class SharedEngineContract:
    """Inherit, and give fixtures: `engine` and `other`, two engines without handlers on the
    same empty queue, of which `validate` jobs are shared; and `transaction`."""

    @pytest.fixture
    def hands(self, engine: Engine) -> Hands:
        return Hands(engine)

    @pytest.fixture
    def others(self, other: Engine) -> Hands:
        return Hands(other)

    # Transactions

    async def test_jobs_of_a_transaction_are_handed_out_once_it_is_committed(
        self, engine: Engine, hands: Hands, transaction: Transaction
    ) -> None:
        async with running(engine):
            async with transaction() as connection:
                await engine.enqueue([SHARED], connection=connection)
                await engine.enqueue([LAST])
                await hands.until(lambda: bool(hands.begun) or bool(hands.ended))
                assert hands.begun == [named(LAST)]
            await hands.until_done(SHARED)

    async def test_jobs_of_a_transaction_that_is_rolled_back_were_never_enqueued(
        self, engine: Engine, hands: Hands, transaction: Transaction
    ) -> None:
        far = Job(kind=MANY[1].kind, id=MANY[1].id, due_at=time.time() + FAR_S)
        await engine.enqueue([far])
        with pytest.raises(Regret):
            async with transaction() as connection:
                await engine.enqueue([MANY[0], MANY[1]], connection=connection)
                raise Regret
        async with running(engine):
            await engine.enqueue([LAST])
            await hands.until_done(LAST)

        assert hands.begun == [named(LAST)]

    async def test_a_job_of_two_transactions_is_one_job(
        self, engine: Engine, other: Engine, hands: Hands, transaction: Transaction
    ) -> None:
        async with transaction() as connection:
            await engine.enqueue([SHARED], connection=connection)
            waiting = asyncio.create_task(other.enqueue([SHARED]))
            await asyncio.wait([waiting], timeout=0.1)
        await waiting
        async with running(engine):
            await hands.until_done(SHARED)
            await engine.enqueue([LAST])
            await hands.until_done(LAST)

        assert hands.begun == [named(SHARED), named(LAST)]

    # Two engines

    async def test_each_job_is_done_by_one_of_two_engines(
        self, engine: Engine, other: Engine, hands: Hands, others: Hands
    ) -> None:
        async with running(engine), running(other):
            await asyncio.gather(engine.enqueue(MANY[:25]), other.enqueue(MANY[25:]))
            await until(lambda: len(hands.ended) + len(others.ended) == len(MANY))

        assert sorted(hands.begun + others.begun) == sorted(map(named, MANY))

    async def test_what_two_enqueue_at_once_is_done_once(
        self, engine: Engine, other: Engine, hands: Hands
    ) -> None:
        await asyncio.gather(
            *(each.enqueue(jobs) for each in (engine, other) for jobs in (MANY, MANY[::-1]))
        )
        async with running(engine):
            await hands.until_done(*MANY)
            await engine.enqueue([LAST])
            await hands.until_done(LAST)

        assert sorted(hands.begun) == sorted(map(named, [*MANY, LAST]))

    async def test_a_job_that_one_does_is_handed_out_after_it_when_another_enqueues_it(
        self, engine: Engine, other: Engine, hands: Hands, others: Hands
    ) -> None:
        go_on = asyncio.Event()

        async def wait(job: str, stop: asyncio.Event) -> None:
            if job == named(SHARED):
                await go_on.wait()

        hands.act = wait
        async with running(engine):
            await engine.enqueue([SHARED])
            await hands.until(lambda: hands.begun == [named(SHARED)])
            async with running(other):
                await other.enqueue([SHARED])
                await other.enqueue([LAST])
                await until(lambda: named(LAST) in hands.ended + others.ended)
                assert (hands.begun + others.begun).count(named(SHARED)) == 1
                go_on.set()
                await until(lambda: (hands.ended + others.ended).count(named(SHARED)) == 2)

    async def test_a_cancel_reaches_a_job_that_another_does(
        self, engine: Engine, other: Engine, hands: Hands
    ) -> None:
        async def wait(job: str, stop: asyncio.Event) -> None:
            await stop.wait()

        hands.act = wait
        async with running(engine):
            await engine.enqueue([SHARED])
            await hands.until(lambda: hands.begun == [named(SHARED)])
            await other.cancel([SHARED])
            await hands.until_done(SHARED)

    async def test_a_cancel_takes_back_what_another_has_enqueued(
        self, engine: Engine, other: Engine, hands: Hands
    ) -> None:
        await engine.enqueue([SHARED])
        await other.cancel([SHARED])
        async with running(engine):
            await engine.enqueue([LAST])
            await hands.until_done(LAST)

        assert hands.begun == [named(LAST)]

    async def test_what_one_that_stops_has_not_begun_is_done_by_another(
        self, engine: Engine, other: Engine, hands: Hands, others: Hands
    ) -> None:
        async def stop_at_first(job: str, stop: asyncio.Event) -> None:
            if len(hands.begun) == 1:
                stopping.append(asyncio.create_task(engine.stop()))
                await asyncio.sleep(0)

        stopping: list[asyncio.Task[None]] = []
        hands.act = stop_at_first
        await engine.enqueue(MANY)
        async with running(engine) as run:
            await run
        await asyncio.gather(*stopping)
        rest = [job for job in MANY if named(job) not in hands.ended]
        async with running(other):
            await others.until_done(*rest)

        assert sorted(hands.begun + others.begun) == sorted(map(named, MANY))
        assert rest
