"""Whole batches, from the settings to the result files, by way of a cloud's buckets."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from penstock.checkup import Verdict, check_batches, check_upstream
from penstock.executor.native import NativePolicy
from penstock.model import BatchStatus, Counts
from penstock.settings import Upstream
from penstock.upstream import bedrock_batch, vertex_batch
from penstock.upstream.kinds import KINDS
from tests.integration.bench import Bench, ids, line, until
from tests.providers import bedrock_server, vertex_server
from tests.providers.bedrock_server import BedrockProvider
from tests.providers.buckets import Buckets
from tests.providers.vertex_server import VertexProvider
from tests.upstreams import ScriptedUpstream, fail

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


def without_key(kind: str, base_url: str, provider: Any, **more: str) -> Upstream:
    """An upstream whose batches alone can be asked for."""
    scheme = "s3" if kind == "bedrock" else "gs"
    told = {
        "name": "cloud",
        "kind": kind,
        "base_url": base_url,
        "mode": "native",
        "batch_storage": f"{scheme}://{provider.buckets.create()}",
        "batch_url": provider.url,
        "batch_storage_url": provider.buckets.url,
        **more,
    }
    return Upstream.model_validate(told)


async def check(settings: Upstream) -> list[Verdict]:
    return [
        (await check_upstream(settings)).verdict,
        (await check_batches(settings)).verdict,
    ]


async def test_a_check_of_bedrock_without_a_key_for_lines_finds_no_problem(
    bedrock: BedrockProvider,
) -> None:
    where = {"region": bedrock_server.REGION, "role_arn": bedrock_server.ROLE}
    async with ScriptedUpstream(lambda *_: fail(403, "No key.")) as lines:
        told = without_key("bedrock", lines.base_url, bedrock, **where)
        found = await check_upstream(told)
        in_turn = await check(told.model_copy(update={"mode": "auto"}))

    assert await check(told) == [Verdict.NOTE, Verdict.OK]
    assert "403" in found.message
    assert "set one if such lines are to be sent one by one" in found.message
    assert in_turn == [Verdict.PROBLEM, Verdict.OK]


async def test_a_check_of_vertex_without_a_key_for_lines_finds_no_problem(
    vertex: VertexProvider, tmp_path: Path
) -> None:
    where = {"region": vertex_server.REGION, "google_project": vertex_server.PROJECT}
    key_file = str(vertex.key_file(tmp_path))
    async with ScriptedUpstream(lambda *_: fail(401, "No token.")) as lines:
        told = without_key("vertex", lines.base_url, vertex, service_account=key_file, **where)
        with_key = told.model_copy(update={"api_key": SecretStr("sk-of-lines-0123456789")})

        assert await check(told) == [Verdict.NOTE, Verdict.OK]
        assert await check(with_key) == [Verdict.PROBLEM, Verdict.OK]


def test_the_kinds_know_the_headers_that_their_adapters_read() -> None:
    assert KINDS["bedrock"].job_headers == bedrock_batch.JOB_HEADERS
    assert KINDS["vertex"].job_headers == vertex_batch.JOB_HEADERS
