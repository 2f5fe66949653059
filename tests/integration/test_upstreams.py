"""Upstreams as they are: shared by several, limited, overloaded, watched."""

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from penstock.executor.circuit import CircuitPolicy
from penstock.model import Counts
from tests.integration.bench import Bench, ids, line, prompt_of, prompts, until
from tests.upstreams import (
    Action,
    ScriptedUpstream,
    answer,
    chat_chunk,
    chat_completion,
    cut,
    events,
    fail,
)

QUICK = CircuitPolicy(quiet_s=0, first_pause_s=0.1, max_pause_s=0.5, patience_s=0.2)


def slowly(seconds: float) -> Action:
    """A good answer that takes a while."""
    return Action(pieces=(b"", *answer(chat_completion("x")).pieces), pause_s=seconds)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        yield upstream


@pytest.fixture
async def servers() -> AsyncIterator[list[ScriptedUpstream]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(ScriptedUpstream()) for _ in range(2)]


def group(*servers: ScriptedUpstream, **settings: Any) -> list[dict[str, Any]]:
    """Upstreams that share their lines; a tuple has one value for each of them."""
    return [
        {
            "name": f"u{n}",
            "group": "both",
            "base_url": server.base_url,
            **{k: v[n] if isinstance(v, tuple) else v for k, v in settings.items()},
        }
        for n, server in enumerate(servers)
    ]


def shown(bench: Bench) -> str:
    """What `/metrics` shows."""
    return bench.app.metrics.render().decode()


async def test_a_group_shares_its_lines_by_weight(
    data_dir: Path, servers: list[ScriptedUpstream]
) -> None:
    light, heavy = servers
    for server in servers:
        server.behave = lambda *_: slowly(0.02)
    settings = group(light, heavy, weight=(1, 3), max_concurrency=8, initial_concurrency=8)
    async with Bench(data_dir, light, upstreams=settings) as bench:
        batch = await bench.create(*(f"line-{n}" for n in range(120)))
        ended = await bench.wait_until_ended(batch)

    assert ended.counts == Counts(total=120, completed=120, failed=0)
    sent = prompts(light) + prompts(heavy)
    assert Counter(sent).most_common(1)[0][1] == 1  # no line went to both
    assert light.max_in_flight <= 8
    assert heavy.max_in_flight <= 8
    assert len(heavy.requests) > len(light.requests)


async def test_a_line_that_fails_at_one_upstream_goes_to_the_other(
    data_dir: Path, servers: list[ScriptedUpstream]
) -> None:
    bad, good = servers
    bad.behave = lambda *_: fail(500)
    settings = group(bad, good, max_attempts=2)
    async with Bench(data_dir, bad, upstreams=settings) as bench:
        batch = await bench.create(*(f"line-{n}" for n in range(10)))
        ended = await bench.wait_until_ended(batch)

    assert ended.counts == Counts(total=10, completed=10, failed=0)
    assert bad.requests
    assert max(Counter(prompts(good)).values()) == 1


async def test_an_upstream_that_is_down_is_passed_by_and_taken_back(
    data_dir: Path, servers: list[ScriptedUpstream]
) -> None:
    sick, well = servers
    is_down = True

    def behave(path: str, headers: dict[str, str], body: bytes, nth: int) -> Action:
        return cut() if is_down else answer(chat_completion("x"))

    sick.behave = behave
    settings = group(sick, well, initial_concurrency=4, max_concurrency=4)
    async with Bench(data_dir, sick, upstreams=settings, circuits=QUICK) as bench:
        batch = await bench.create(*(f"line-{n}" for n in range(300)))
        ended = await bench.wait_until_ended(batch)
        assert ended.counts == Counts(total=300, completed=300, failed=0)
        assert len(sick.requests) < 40
        is_down = False
        met = len(sick.requests)
        again = await bench.create(*(f"again-{n}" for n in range(300)))
        await asyncio.sleep(0.6)
        more = await bench.create(*(f"more-{n}" for n in range(300)))
        for each in (again, more):
            assert (await bench.wait_until_ended(each)).counts.completed == 300

    assert len(sick.requests) > met + 20


async def test_requests_a_minute_are_not_exceeded(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    async with Bench(data_dir, upstream, upstream={"requests_per_minute": 1200}) as bench:
        batch = await bench.create(*(f"line-{n}" for n in range(50)))
        ended = await bench.wait_until_ended(batch)

    assert ended.counts.completed == 50
    times = [request.at for request in upstream.requests]
    # 20 a second, after a burst of as many.
    assert times[-1] - times[0] >= (50 - 20) / 20 * 0.95


async def test_tokens_a_minute_are_not_exceeded(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    usage = {"prompt_tokens": 50, "completion_tokens": 50, "total_tokens": 100}
    upstream.behave = lambda *_: answer(chat_completion("x", usage=usage))
    async with Bench(data_dir, upstream, upstream={"tokens_per_minute": 60_000}) as bench:
        batch = await bench.create_from(
            b"".join(line(f"line-{n}", max_tokens=50) for n in range(30))
        )
        ended = await bench.wait_until_ended(batch)

    assert ended.usage.total_tokens == 3000
    times = [request.at for request in upstream.requests]
    # 1,000 a second, after a burst of as many.
    assert times[-1] - times[0] >= (3000 - 1000 - 200) / 1000 * 0.9


async def test_an_overloaded_upstream_gets_less_and_loses_no_line(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    def behave(path: str, headers: dict[str, str], body: bytes, nth: int) -> Action:
        if upstream.in_flight > 8:
            return fail(429, headers={"retry-after-ms": "50"})
        return slowly(0.02)

    upstream.behave = behave
    async with Bench(data_dir, upstream, upstream={"initial_concurrency": 64}) as bench:
        batch = await bench.create(*(f"line-{n}" for n in range(300)))
        ended = await bench.wait_until_ended(batch)

    assert ended.counts == Counts(total=300, completed=300, failed=0)
    late = [request.nth for request in upstream.requests[-100:]]
    assert len(upstream.requests) < 900, late


async def test_an_engine_that_tells_of_its_queue_is_given_no_more_than_it_can_use(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    upstream.behave = lambda *_: slowly(0.2)
    upstream.metrics = b"vllm:num_requests_running 8\nvllm:num_requests_waiting 30\n"
    async with Bench(data_dir, upstream) as bench:
        await bench.create(*(f"line-{n}" for n in range(3000)))

        async def has_eased() -> bool:
            limited = 'penstock_upstream_limited{reason="engine_queue",upstream="one"} 1.0'
            return 0 < upstream.in_flight <= 6 and limited in shown(bench)

        await until(has_eased)
        assert 'penstock_upstream_engine_waiting_requests{upstream="one"} 30.0' in shown(bench)
        upstream.metrics = b"vllm:num_requests_running 8\nvllm:num_requests_waiting 0\n"

        async def has_grown() -> bool:
            return upstream.in_flight >= 20

        await until(has_grown)


async def test_lines_with_the_same_system_prompt_go_together_and_come_back_in_order(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    def chat(n: int) -> bytes:
        system = {"role": "system", "content": f"You are number {n % 3}."}
        messages = [system, {"role": "user", "content": f"line-{n}"}]
        return line(f"line-{n}", messages=messages)

    async with Bench(data_dir, upstream, upstream={"max_concurrency": 1}) as bench:
        batch = await bench.create_from(b"".join(map(chat, range(30))))
        await bench.wait_until_ended(batch)
        output, _ = await bench.results(batch)

    systems = [prompt_of(body) for body in upstream.bodies]
    changes = sum(a != b for a, b in itertools.pairwise(systems))
    assert changes == 2
    assert ids(output) == [f"line-{n}" for n in range(30)]


async def test_metrics_tell_what_was_done(data_dir: Path, upstream: ScriptedUpstream) -> None:
    def behave(path: str, headers: dict[str, str], body: bytes, nth: int) -> Action:
        return fail(400) if json.loads(body)["messages"][0]["content"] == "bad" else answer()

    upstream.behave = behave
    async with Bench(data_dir, upstream) as bench:
        batch = await bench.create("a", "b", "bad")
        await bench.wait_until_ended(batch)
        text = shown(bench)

    for sample in (
        'penstock_lines_total{result="completed"} 2.0',
        'penstock_lines_total{result="failed"} 1.0',
        'penstock_batches_total{status="completed"} 1.0',
        'penstock_upstream_requests_total{outcome="200",upstream="one"} 2.0',
        'penstock_upstream_requests_total{outcome="400",upstream="one"} 1.0',
        'penstock_upstream_request_duration_seconds_count{upstream="one"} 3.0',
        'penstock_upstream_max_concurrency{upstream="one"} 256.0',
        'penstock_lane_queued_lines{lane="one"} 0.0',
        "penstock_slices_held 0.0",
    ):
        assert f"{sample}\n" in text


async def test_a_streamed_answer_stands_in_the_output_as_any_other(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    whole = events(chat_chunk("Hell"), chat_chunk("o.", usage=usage), pause_s=0.01)
    half = events(chat_chunk("Hell"), done=False)
    upstream.behave = lambda _path, _headers, _body, nth: half if nth == 1 else whole
    async with Bench(data_dir, upstream, upstream={"stream": True}) as bench:
        batch = await bench.create("a", "b")
        ended = await bench.wait_until_ended(batch)
        output, errors = await bench.results(batch)

    assert errors == []
    assert ended.usage.total_tokens == 10
    for each in output:
        assert each["response"]["body"]["choices"][0]["message"]["content"] == "Hello."
