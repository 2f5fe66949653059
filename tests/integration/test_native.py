"""Batches that a provider's own batch API runs, over a provider that misbehaves."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from penstock.executor.native import NativePolicy
from penstock.model import Batch, BatchStatus, Counts, NativeRun
from tests.integration.bench import Bench, ids, until
from tests.providers.openai_server import (
    KEY,
    OpenAIProvider,
)

HASTY = NativePolicy(
    first_poll_s=0.02, max_poll_s=0.05, first_wait_s=0.02, max_wait_s=0.05, cancel_grace_s=9
)


@pytest.fixture
async def provider() -> AsyncIterator[OpenAIProvider]:
    async with OpenAIProvider() as provider:
        yield provider


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


def bench(data_dir: Path, provider: OpenAIProvider, **upstream: Any) -> Bench:
    one = {"mode": "native", "api_key": KEY, **upstream}
    return Bench(data_dir, provider, upstream=one, natives=HASTY, worker={"slice_requests": 4})


async def runs_of(bench: Bench, batch: Batch) -> list[NativeRun]:
    return await bench.store.list_native_runs(batch.id)


async def wait_for_jobs(provider: OpenAIProvider, count: int) -> list[str]:
    async def are_there() -> bool:
        return len(provider.batches) >= count

    await until(are_there)
    return provider.native_ids


def texts(lines: list[Any]) -> list[str]:
    return [each["response"]["body"]["choices"][0]["message"]["content"] for each in lines]


NAMES = [f"line-{n}" for n in range(10)]


async def test_a_batch_is_run_as_one_job_and_its_results_stand_in_input_order(
    data_dir: Path, provider: OpenAIProvider
) -> None:
    async with bench(data_dir, provider) as it:
        batch = await it.create(*NAMES)
        [native_id] = await wait_for_jobs(provider, 1)
        provider.end(native_id)

        ended = await it.wait_until_ended(batch)

        output, errors = await it.results(batch)
    assert ended.status is BatchStatus.COMPLETED
    assert ended.counts == Counts(total=10, completed=10, failed=0)
    assert ended.usage.total_tokens > 0
    assert ids(output) == texts(output) == NAMES
    assert errors == []
    assert provider.files == {}
    assert "POST /chat/completions" not in provider.calls
