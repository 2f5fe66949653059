"""An upstream that is down costs time and nothing else, and only the lines that are for it."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.executor.circuit import CircuitPolicy
from penstock.model import BatchStatus, Counts, SliceStatus
from tests.integration.bench import Bench, codes, ids, line, prompt_of, prompts, until
from tests.upstreams import (
    Action,
    ScriptedUpstream,
    answer,
    chat_completion,
    cut,
    fail,
)

QUICK = CircuitPolicy(quiet_s=0, first_pause_s=0.1, max_pause_s=0.5, patience_s=0.2)


class Outage:
    """Fails the lines of one model while it lasts."""

    def __init__(self, action: Action, *, model: str = "m") -> None:
        self.action = action
        self.lasts = True
        self._model = f'"model": "{model}"'.encode()
        self.met: list[float] = []

    def behave(self, path: str, headers: dict[str, str], body: bytes, nth: int) -> Action:
        if self.lasts and self._model in body:
            self.met.append(time.monotonic())
            return self.action
        return answer(chat_completion(prompt_of(body)))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        yield upstream


def mixed(count: int) -> bytes:
    """Lines of two models in turn: `m` and `sick`."""
    lines = (line(f"m{n}") + line(f"sick{n}", model="sick") for n in range(count))
    return b"".join(lines)


@pytest.mark.parametrize(
    "action", [fail(503), fail(502), cut()], ids=["unavailable", "bad gateway", "cut"]
)
async def test_lines_outlast_an_outage_that_would_use_up_their_attempts(
    data_dir: Path, upstream: ScriptedUpstream, action: Action
) -> None:
    outage = Outage(action)
    upstream.behave = outage.behave
    async with Bench(data_dir, upstream, circuits=QUICK, upstream={"max_attempts": 4}) as bench:
        batch = await bench.create("a", "b")
        await until(lambda: is_met(outage, 6))
        outage.lasts = False
        ended = await bench.wait_until_ended(batch)
        output, _ = await bench.results(batch)

    assert ended.counts == Counts(total=2, completed=2, failed=0)
    assert ids(output) == ["a", "b"]


async def test_probes_do_not_use_up_the_attempts_of_a_line_that_is_held(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    outage = Outage(fail(503))
    upstream.behave = outage.behave
    # So it is not given back meanwhile, which would give it all its attempts anew.
    held = replace(QUICK, max_pause_s=0.1, patience_s=60)
    async with Bench(data_dir, upstream, circuits=held, upstream={"max_attempts": 4}) as bench:
        batch = await bench.create("a", "b")
        await until(lambda: is_met(outage, 14))
        outage.lasts = False
        ended = await bench.wait_until_ended(batch)

    assert ended.counts == Counts(total=2, completed=2, failed=0)


async def is_met(outage: Outage, count: int) -> bool:
    return len(outage.met) >= count


async def test_an_upstream_that_is_down_is_asked_less_and_less(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    outage = Outage(fail(503))
    upstream.behave = outage.behave
    async with Bench(
        data_dir, upstream, circuits=QUICK, upstream={"max_concurrency": 4}
    ) as bench:
        await bench.create(*(f"line-{n}" for n in range(500)))
        await asyncio.sleep(2)

    gaps = [b - a for a, b in zip(outage.met, outage.met[1:], strict=False)]
    pauses = [gap for gap in gaps if gap > 0.08]
    assert pauses[:3] == sorted(pauses[:3])
    assert pauses[0] >= 0.1
    assert pauses[1] >= 0.2
    assert max(pauses[2:]) >= 0.4
    # Those that were in flight before it opened, and then one by one.
    assert len(gaps) - len(pauses) <= 4 + QUICK.failures


async def test_lines_of_other_models_go_on_also_in_the_same_slices(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    outage = Outage(fail(503), model="sick")
    upstream.behave = outage.behave
    options = {"slice_requests": 10}
    async with Bench(data_dir, upstream, circuits=QUICK, worker=options) as bench:
        batch = await bench.create_from(mixed(1500))
        async with asyncio.timeout(15):
            await bench.wait_until_counted(batch, 1500)
        assert len(outage.met) < 256 + 10  # those in flight when it began, and some probes
        outage.lasts = False
        ended = await bench.wait_until_ended(batch)
        output, errors = await bench.results(batch)

    assert ended.counts == Counts(total=3000, completed=3000, failed=0)
    assert errors == []
    assert len(set(ids(output))) == 3000
    healthy = [prompt for prompt in prompts(upstream) if prompt.startswith("m")]
    assert Counter(healthy).most_common(1)[0][1] == 1


async def test_slices_of_which_only_waiting_lines_are_left_are_given_back(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    outage = Outage(fail(503), model="sick")
    upstream.behave = outage.behave
    async with Bench(
        data_dir, upstream, circuits=QUICK, worker={"slice_requests": 10}
    ) as bench:
        batch = await bench.create_from(mixed(10))

        async def are_given_back() -> bool:
            slices = await bench.slices(batch)
            return bool(slices) and all(
                piece.status is SliceStatus.PENDING and piece.completed == 5 for piece in slices
            )

        await until(are_given_back)
        outage.lasts = False
        ended = await bench.wait_until_ended(batch)

    assert ended.counts.completed == 20


async def test_a_line_that_alone_brings_its_upstream_down_ends_after_its_attempts(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    def behave(path: str, headers: dict[str, str], body: bytes, nth: int) -> Action:
        prompt = prompt_of(body)
        return cut() if prompt == "poison" else answer(chat_completion(prompt))

    upstream.behave = behave
    healthy = [f"line-{n}" for n in range(50)]
    options = {"max_attempts": 3, "max_concurrency": 2}
    async with Bench(data_dir, upstream, circuits=QUICK, upstream=options) as bench:
        # Others are answered between its attempts, so the circuit stays closed.
        batch = await bench.create("poison", *healthy)
        await bench.wait_until_counted(batch, 50)
        more = await bench.create(*(f"more-{n}" for n in range(400)))
        ended = await bench.wait_until_ended(batch)
        _, errors = await bench.results(batch)
        await bench.wait_until_ended(more)

    assert ended.counts == Counts(total=51, completed=50, failed=1)
    assert codes(errors) == {"poison": "upstream_disconnected"}


async def test_a_refusal_is_final_at_once_and_opens_nothing(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    upstream.behave = lambda *_: fail(404, "No such model.")
    async with Bench(data_dir, upstream, circuits=QUICK) as bench:
        batch = await bench.create(*(f"line-{n}" for n in range(20)))
        async with asyncio.timeout(5):
            ended = await bench.wait_until_ended(batch)

    assert ended.counts == Counts(total=20, completed=0, failed=20)
    assert len(upstream.requests) == 20


async def test_lines_that_still_wait_when_the_window_closes_expire(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    outage = Outage(fail(503), model="sick")
    upstream.behave = outage.behave
    async with Bench(data_dir, upstream, circuits=QUICK) as bench:
        batch = await bench.create_from(mixed(3), window="3s")
        ended = await bench.wait_until_ended(batch)
        output, errors = await bench.results(batch)

    assert ended.status is BatchStatus.EXPIRED
    assert ids(output) == ["m0", "m1", "m2"]
    assert set(codes(errors).values()) <= {"batch_expired", 503}
    assert "batch_expired" in codes(errors).values()


async def test_a_cancel_does_not_wait_for_an_upstream_that_is_down(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    outage = Outage(fail(503))
    upstream.behave = outage.behave
    async with Bench(data_dir, upstream, circuits=QUICK) as bench:
        batch = await bench.create("a", "b", "c")
        await until(lambda: is_met(outage, 4))
        await bench.cancel(batch)
        async with asyncio.timeout(3):
            ended = await bench.wait_until_ended(batch)
        _, errors = await bench.results(batch)

    assert ended.status is BatchStatus.CANCELLED
    assert codes(errors) == dict.fromkeys(["a", "b", "c"], "batch_cancelled")


async def test_a_restart_in_an_outage_loses_nothing(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    outage = Outage(fail(503), model="sick")
    upstream.behave = outage.behave
    async with Bench(data_dir, upstream, circuits=QUICK, worker={"slice_requests": 4}) as bench:
        batch = await bench.create_from(mixed(20))
        await bench.wait_until_counted(batch, 20)
    outage.lasts = False
    async with Bench(data_dir, upstream, circuits=QUICK, worker={"slice_requests": 4}) as bench:
        ended = await bench.wait_until_ended(batch)
        output, _ = await bench.results(batch)

    assert ended.counts == Counts(total=40, completed=40, failed=0)
    assert len(set(ids(output))) == 40
