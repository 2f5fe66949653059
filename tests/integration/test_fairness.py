"""Projects beside each other, over the whole service."""

import asyncio
from pathlib import Path

from tests.integration.bench import CHAT, Bench, Upload, line, prompt_of
from tests.upstreams import Action, ScriptedUpstream, answer, chat_completion, hold

SLICE = 256


def slow(path: str, headers: dict[str, str], body: bytes, nth: int) -> Action:
    del path, headers, body, nth
    is_time = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, is_time.set)
    return hold(answer(chat_completion("Hello.")), until=is_time)


async def test_a_hundred_lines_start_within_two_slice_times_of_a_hundred_thousand(
    tmp_path: Path,
) -> None:
    async with (
        ScriptedUpstream(slow) as upstream,
        Bench(
            tmp_path / "data",
            upstream,
            upstream={"max_concurrency": 16},
            limits={"requests_per_batch": 100_000},
            projects=[{"name": "small", "api_keys": ["sk-small-0123456789abcdef"]}],
        ) as bench,
    ):
        large = b"".join(line(f"large-{n}") for n in range(100_000))
        await bench.create_from(large)
        await upstream.wait_for_requests(200)

        small = (await bench.store.ensure_project("small")).id
        data = b"".join(line(f"small-{n}") for n in range(100))
        service = bench.app.service
        file = await service.create_file(small, Upload(data))
        await service.create_batch(
            small, input_file_id=file.id, endpoint=CHAT, completion_window="24h"
        )
        before = len(upstream.requests)
        await upstream.wait_for_requests(before + 2 * SLICE)

    sent = [prompt_of(body) for body in upstream.bodies[before : before + 2 * SLICE]]
    assert sum(prompt.startswith("small") for prompt in sent) == 100
