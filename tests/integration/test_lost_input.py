"""An input file that is gone from the storage while its batch runs, and comes back."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog

from penstock.executor.native import NativePolicy
from penstock.model import BatchStatus, Counts, NativeRunStatus
from tests.integration.bench import CHAT, Bench, Upload, ids, line, prompts, script, until
from tests.providers.openai_server import KEY, UPLOAD, OpenAIProvider
from tests.upstreams import ScriptedUpstream, answer, chat_completion, hold

NAMES = [f"line-{n}" for n in range(2000)]
WAITS = "A batch waits for its input file, which is gone from the storage."


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream(script({})) as upstream:
        yield upstream


def input_file(data_dir: Path) -> Path:
    [path] = (data_dir / "blobs" / "files").iterdir()
    return path


async def test_a_batch_waits_for_its_input_file_and_holds_up_no_other(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    data_dir, go = tmp_path / "data", asyncio.Event()
    upstream.behave = script({NAMES[0]: hold(answer(chat_completion(NAMES[0])), until=go)})
    options = {"upstream": {"max_concurrency": 1}, "worker": {"slice_requests": 20}}
    with structlog.testing.capture_logs() as logs:
        async with Bench(data_dir, upstream, **options) as bench:
            batch = await bench.create(*NAMES)
            await upstream.wait_for_requests(1)
            there, aside = input_file(data_dir), tmp_path / "aside"
            there.rename(aside)
            go.set()

            async def is_told() -> bool:
                return any(log["event"].startswith(WAITS) for log in logs)

            await until(is_told)
            other = await bench.wait_until_ended(await bench.create("other"))
            assert other.status is BatchStatus.COMPLETED
            waiting = await bench.get(batch)
            assert waiting.status is BatchStatus.IN_PROGRESS
            assert 0 < waiting.counts.completed < len(NAMES)
            tries = len([piece for piece in await bench.slices(batch) if piece.attempt > 2])
            assert tries <= 1
            aside.rename(there)

            ended = await bench.wait_until_ended(batch)

            output, errors = await bench.results(batch)
    assert ended.counts == Counts(total=len(NAMES), completed=len(NAMES), failed=0)
    assert ids(output) == NAMES
    assert errors == []
    assert Counter(prompts(upstream)) == Counter([*NAMES, "other"])
    told = [log for log in logs if log["log_level"] in ("warning", "error")]
    assert [log["event"].startswith(WAITS) for log in told] == [True]
    assert told[0]["batch_id"] == batch.id
    assert len([log for log in logs if log["event"] == "An input file is back."]) == 1


async def test_a_cancel_while_the_input_is_gone_makes_no_empty_error_file(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    data_dir, go = tmp_path / "data", asyncio.Event()
    upstream.behave = script({NAMES[0]: hold(answer(chat_completion(NAMES[0])), until=go)})
    options = {"upstream": {"max_concurrency": 1}, "worker": {"slice_requests": 20}}
    async with Bench(data_dir, upstream, **options) as bench:
        batch = await bench.create(*NAMES)
        await upstream.wait_for_requests(1)
        input_file(data_dir).unlink()
        go.set()
        await bench.wait_until_counted(batch, 20)
        await bench.cancel(batch)
        ended = await bench.wait_until_ended(batch)
        output, _ = await bench.results(batch)
        kept = [path for path in (data_dir / "blobs" / "files").iterdir() if path.is_file()]

    assert ended.status is BatchStatus.CANCELLED
    assert ended.error_file_id is None
    assert len(output) == ended.counts.completed
    assert [path.name for path in kept] == [ended.output_file_id]


async def test_a_batch_whose_input_is_gone_before_it_is_read_fails_and_says_so(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    data_dir = tmp_path / "data"
    with structlog.testing.capture_logs() as logs:
        async with Bench(data_dir, upstream) as bench:
            service, project_id = bench.app.service, bench.app.project_id
            file = await service.create_file(project_id, Upload(line("a")))
            input_file(data_dir).unlink()
            batch = await service.create_batch(
                project_id, input_file_id=file.id, endpoint=CHAT, completion_window="24h"
            )
            ended = await bench.wait_until_ended(batch)

    assert ended.status is BatchStatus.FAILED
    [fault] = ended.faults
    assert fault.message.startswith(f"The bytes of file {file.id} are gone from this server's")
    assert any(log["event"] == "An input file is gone." for log in logs)


async def test_a_batch_for_a_provider_waits_for_its_input_file(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    hasty = NativePolicy(first_poll_s=0.02, max_poll_s=0.05, first_wait_s=0.5, max_wait_s=0.5)
    async with OpenAIProvider(is_quick=True) as provider:
        upstream = {"mode": "native", "api_key": KEY}
        with structlog.testing.capture_logs() as logs:
            async with Bench(data_dir, provider, upstream=upstream, natives=hasty) as bench:
                aside = tmp_path / "aside"

                def take(now: str) -> None:
                    if now == f"after {UPLOAD}":
                        provider.on_call = None
                        input_file(data_dir).rename(aside)

                provider.on_call = take
                batch = await bench.create("a", "b")

                async def is_told() -> bool:
                    return any(log["event"] == WAITS for log in logs)

                await until(is_told)
                [run] = await bench.store.list_native_runs(batch.id)
                assert run.status is NativeRunStatus.COLLECTING
                aside.rename(data_dir / "blobs" / "files" / batch.input_file_id)
                ended = await bench.wait_until_ended(batch)
                output, _ = await bench.results(batch)
    assert ended.status is BatchStatus.COMPLETED
    assert ids(output) == ["a", "b"]
    assert len(provider.batches) == 1
