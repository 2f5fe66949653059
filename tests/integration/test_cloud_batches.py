"""Whole batches, from the settings to the result files, by way of a cloud's buckets."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.executor.native import NativePolicy
from penstock.model import BatchStatus, Counts
from penstock.upstream import bedrock_batch, vertex_batch
from penstock.upstream.kinds import KINDS
from tests.integration.bench import Bench, ids, line, until
from tests.providers import bedrock_server, vertex_server
from tests.providers.bedrock_server import BedrockProvider
from tests.providers.buckets import Buckets
from tests.providers.vertex_server import VertexProvider

HASTY = NativePolicy(first_poll_s=0.02, max_poll_s=0.05, first_wait_s=0.02, max_wait_s=0.05)
NAMES = [f"line-{n}" for n in range(120)]
CLAUDE = "anthropic.claude-sonnet-4-5-20250929-v1:0"


class Nowhere:
    """Where lines would be sent one by one, which they are not here."""

    base_url = "http://127.0.0.1:9/v1"


@pytest.fixture
def buckets() -> Iterator[Buckets]:
    with Buckets() as buckets:
        yield buckets


@pytest.fixture
async def bedrock(
    buckets: Buckets, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[BedrockProvider]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", bedrock_server.ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", bedrock_server.SECRET_KEY)
    async with BedrockProvider(buckets) as provider:
        yield provider


@pytest.fixture
async def vertex(buckets: Buckets) -> AsyncIterator[VertexProvider]:
    async with VertexProvider(buckets) as provider:
        buckets.may_enter = provider.lets_in
        yield provider


async def run(
    data_dir: Path,
    provider: Any,
    model: str,
    *,
    headers: dict[str, str] | None = None,
    **upstream: str,
) -> list[Any]:
    """The output of a batch whose job was run, when nothing of it is left in the bucket."""
    bucket = provider.buckets.create()
    scheme = "s3" if upstream["kind"] == "bedrock" else "gs"
    told = {
        "mode": "native",
        "batch_storage": f"{scheme}://{bucket}/folder",
        "batch_url": provider.url,
        "batch_storage_url": provider.buckets.url,
        **upstream,
    }
    data = b"".join(line(name, model=model, max_tokens=9) for name in NAMES)

    async def is_there() -> bool:
        return bool(provider.jobs)

    async def is_tidy() -> bool:
        return provider.buckets.names(bucket) == []

    projects = [{"name": "default", "allow_upstreams": ["one"]}]
    async with Bench(
        data_dir, Nowhere(), upstream=told, natives=HASTY, projects=projects
    ) as it:
        batch = await it.create_from(data, headers=headers)
        await until(is_there)
        [native_id] = provider.jobs
        provider.end(native_id)
        ended = await it.wait_until_ended(batch)
        output, errors = await it.results(batch)
        await until(is_tidy)

    assert ended.status is BatchStatus.COMPLETED
    assert ended.counts == Counts(total=120, completed=120, failed=0)
    assert errors == []
    return output


def texts(lines: list[Any]) -> list[str]:
    return [each["response"]["body"]["choices"][0]["message"]["content"] for each in lines]


async def test_a_batch_goes_through_bedrock(bedrock: BedrockProvider, tmp_path: Path) -> None:
    where = {"region": bedrock_server.REGION, "role_arn": bedrock_server.ROLE}

    output = await run(tmp_path, bedrock, CLAUDE, kind="bedrock", **where)

    assert ids(output) == texts(output) == NAMES


async def test_a_batch_goes_through_vertex(vertex: VertexProvider, tmp_path: Path) -> None:
    key_file = str(vertex.key_file(tmp_path))
    where = {"region": vertex_server.REGION, "google_project": vertex_server.PROJECT}

    output = await run(
        tmp_path / "data",
        vertex,
        "gemini-2.5-flash",
        kind="vertex",
        service_account=key_file,
        **where,
    )

    assert ids(output) == texts(output) == NAMES


async def test_bedrock_runs_the_model_that_is_asked_for(
    bedrock: BedrockProvider, tmp_path: Path
) -> None:
    where = {"region": bedrock_server.REGION, "role_arn": bedrock_server.ROLE}
    asked = {"x-tfy-aws-bedrock-model": CLAUDE, "x-tfy-provider-model": "not-this"}

    output = await run(tmp_path, bedrock, "gpt-5", kind="bedrock", headers=asked, **where)

    assert texts(output) == NAMES
    assert [job["modelId"] for job in bedrock.jobs.values()] == [CLAUDE]


async def test_vertex_runs_the_model_that_is_asked_for(
    vertex: VertexProvider, tmp_path: Path
) -> None:
    where = {"region": vertex_server.REGION, "google_project": vertex_server.PROJECT}

    output = await run(
        tmp_path / "data",
        vertex,
        "gpt-5",
        kind="vertex",
        headers={"x-tfy-provider-model": "gemini-2.5-flash"},
        service_account=str(vertex.key_file(tmp_path)),
        **where,
    )

    assert texts(output) == NAMES
    [job] = vertex.jobs.values()
    assert job["model"] == "publishers/google/models/gemini-2.5-flash"


def test_the_kinds_know_the_headers_that_their_adapters_read() -> None:
    assert KINDS["bedrock"].job_headers == bedrock_batch.JOB_HEADERS
    assert KINDS["vertex"].job_headers == vertex_batch.JOB_HEADERS
