"""A client asks for the model with which all lines of a batch are run, whatever they name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import InvalidRequest
from penstock.executor.native import NativePolicy
from penstock.model import Batch, BatchStatus
from penstock.upstream.kinds import KINDS
from tests.integration.bench import Bench, ids, line, until
from tests.providers import (
    anthropic_server,
    fireworks_server,
    gemini_server,
    mistral_server,
    openai_server,
)
from tests.providers.anthropic_server import AnthropicProvider
from tests.providers.dialects import AzureProvider, GroqProvider, TogetherProvider
from tests.providers.fireworks_server import FireworksProvider
from tests.providers.gemini_server import GeminiProvider
from tests.providers.mistral_server import MistralProvider
from tests.providers.openai_server import OpenAIProvider
from tests.upstreams import ScriptedUpstream

HASTY = NativePolicy(first_poll_s=0.02, max_poll_s=0.05, first_wait_s=0.02, max_wait_s=0.05)
HEADER = "x-tfy-provider-model"
NAMES = [f"line-{n}" for n in range(6)]
MAY_CHOOSE = [{"name": "default", "allow_upstreams": ["one"]}]
MIXED = b"".join(line(name, model=f"other-{n % 2}") for n, name in enumerate(NAMES))
"""Neighbouring lines name different models."""


@dataclass(frozen=True)
class Case:
    """A provider, and where a job of it shows the models that it is run with."""

    kind: str
    server: type[Any]
    key: str
    models_of: Callable[[Any, str], set[str]]
    model: str = "asked-for"


def in_lines(provider: OpenAIProvider, native_id: str) -> set[str]:
    return {each["body"]["model"] for each in provider.lines_of(native_id)}


def in_requests(provider: AnthropicProvider, native_id: str) -> set[str]:
    return {each["params"]["model"] for each in provider.requests[native_id]}


def in_job(provider: MistralProvider | FireworksProvider, native_id: str) -> set[str]:
    assert all("model" not in each["body"] for each in provider.lines_of(native_id))
    return {provider.jobs[native_id]["model"]}


def in_address(provider: GeminiProvider, native_id: str) -> set[str]:
    return {provider.batches[native_id]["metadata"]["model"].removeprefix("models/")}


CASES = [
    Case("openai", OpenAIProvider, openai_server.KEY, in_lines),
    Case("azure", AzureProvider, openai_server.KEY, in_lines),
    Case("groq", GroqProvider, openai_server.KEY, in_lines),
    Case("together", TogetherProvider, openai_server.KEY, in_lines),
    Case("anthropic", AnthropicProvider, anthropic_server.KEY, in_requests),
    Case("mistral", MistralProvider, mistral_server.KEY, in_job),
    Case("fireworks", FireworksProvider, fireworks_server.KEY, in_job),
    Case("gemini", GeminiProvider, gemini_server.KEY, in_address, "gemini-3.8-flash"),
]
"""`penstock` is as `openai`, but for its window; `bedrock` and `vertex` need buckets
(`test_cloud_batches`)."""


def jobs_of(provider: Any) -> list[str]:
    return list(provider.jobs if hasattr(provider, "jobs") else provider.batches)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
async def test_a_job_is_run_with_the_model_that_is_asked_for(
    case: Case, tmp_path: Path
) -> None:
    told = {"kind": case.kind, "api_key": case.key, "mode": "native"}
    if "account" in KINDS[case.kind].needs:
        told["account"] = fireworks_server.ACCOUNT
    async with (
        case.server() as provider,
        Bench(tmp_path, provider, upstream=told, natives=HASTY, projects=MAY_CHOOSE) as bench,
    ):

        async def is_there() -> bool:
            return bool(jobs_of(provider))

        batch = await bench.create_from(MIXED, headers={HEADER: case.model})
        await until(is_there)
        [native_id] = jobs_of(provider)
        seen = case.models_of(provider, native_id)
        provider.end(native_id)
        ended = await bench.wait_until_ended(batch)
        output, errors = await bench.results(batch)

    assert seen == {case.model}
    assert (ids(output), errors) == (NAMES, [])
    assert (ended.status, ended.model) == (BatchStatus.COMPLETED, case.model)


async def test_lines_are_sent_one_by_one_with_the_model_and_else_as_they_are(
    tmp_path: Path,
) -> None:
    body = b'{ "messages" : [{"role":"user","content":"Hi."}], "model":"%b" , "n": 1.0 }'
    envelope = b'{"custom_id":"%b","method":"POST","url":"/v1/chat/completions","body":%b}\n'
    names = {b"a": b"other", b"b": b"asked", b"c": b"third"}
    data = b"".join(envelope % (key, body % name) for key, name in names.items())
    async with (
        ScriptedUpstream() as upstream,
        Bench(tmp_path, upstream, projects=MAY_CHOOSE) as bench,
    ):
        batch = await bench.create_from(data, headers={HEADER: "asked"})
        ended = await bench.wait_until_ended(batch)

    assert ended.model == "asked"
    assert upstream.bodies == [body % b"asked"] * 3


async def test_what_is_too_little_for_a_job_is_sent_with_the_model_too(tmp_path: Path) -> None:
    told = {
        "kind": "bedrock",
        "mode": "native",
        "region": "us-east-1",
        "batch_storage": "s3://bucket",
        "role_arn": "arn:aws:iam::123456789012:role/batch",
    }
    asked = {HEADER: "not-this", "x-tfy-aws-bedrock-model": "this"}
    async with (
        ScriptedUpstream() as upstream,
        Bench(tmp_path, upstream, upstream=told, projects=MAY_CHOOSE) as bench,
    ):
        batch = await bench.create_from(MIXED, headers=asked)
        await bench.wait_until_ended(batch)

    assert len(upstream.bodies) == len(NAMES)
    assert all(b'"model": "this"' in sent for sent in upstream.bodies)


async def test_what_a_job_leaves_is_sent_with_the_model_too(tmp_path: Path) -> None:
    told = {"mode": "native", "fallback": "lines", "api_key": openai_server.KEY}
    async with (
        OpenAIProvider() as provider,
        Bench(tmp_path, provider, upstream=told, natives=HASTY, projects=MAY_CHOOSE) as bench,
    ):

        async def is_there() -> bool:
            return bool(provider.batches)

        batch = await bench.create_from(MIXED, headers={HEADER: "asked"})
        await until(is_there)
        provider.end(provider.native_ids[0], "expired", only=2)
        await bench.wait_until_ended(batch)
        output, _ = await bench.results(batch)

    assert ids(output) == NAMES
    assert provider.models_by_line == ["asked"] * 4


@pytest.mark.parametrize(
    ("headers", "param", "message"),
    [
        ({HEADER: ""}, HEADER, "it is empty"),
        ({HEADER: "a" * 513}, HEADER, "maximum length 512"),
        ({HEADER: "a b"}, HEADER, "in ASCII without spaces"),
        ({HEADER: "caf\xe9"}, HEADER, "in ASCII without spaces"),
        ({HEADER: "gpt-5"}, HEADER, "'gpt-5'. The models of the upstream 'one' are a*, b."),
        ({"x-tfy-aws-bedrock-model": "a"}, "x-tfy-aws-bedrock-model", f"understands {HEADER}."),
        ({"x-tfy-azure-api-version": "1"}, "x-tfy-azure-api-version", f"understands {HEADER}."),
    ],
)
async def test_a_header_that_does_not_fit_is_refused(
    headers: dict[str, str], param: str, message: str, tmp_path: Path
) -> None:
    told = {"kind": "azure", "models": ["a*", "b"]}  # of which no line becomes a job
    async with (
        ScriptedUpstream() as upstream,
        Bench(tmp_path, upstream, upstream=told, projects=MAY_CHOOSE) as bench,
    ):

        async def create(headers: dict[str, str]) -> Batch:
            return await bench.create_from(MIXED, headers=headers)

        with pytest.raises(InvalidRequest) as refusal:
            await create(headers)
        assert (await create({HEADER: "abc"})).asked_model == "abc"

    assert refusal.value.param == param
    assert message in str(refusal.value)
