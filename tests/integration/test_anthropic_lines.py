"""Lines in OpenAI's form at a server that speaks Anthropic's, one by one and as a batch."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from penstock.checkup import Verdict, check_upstream
from penstock.executor.native import NativePolicy
from penstock.model import BatchStatus, Counts
from penstock.settings import Upstream
from penstock.upstream.base import Failure
from penstock.upstream.openai_http import OpenAIHttpUpstream
from penstock.upstream.translated import TranslatedUpstream
from penstock.upstream.translation import anthropic
from tests.integration.bench import Bench, ids, until
from tests.providers.anthropic_server import KEY, MESSAGE, AnthropicProvider, errored
from tests.providers.openai_server import Trouble

CHAT = "/v1/chat/completions"
HASTY = NativePolicy(
    first_poll_s=0.02, max_poll_s=0.05, first_wait_s=0.02, max_wait_s=0.05, cancel_grace_s=9
)


@pytest.fixture
async def provider() -> AsyncIterator[AnthropicProvider]:
    async with AnthropicProvider() as provider:
        yield provider


@pytest.fixture
async def upstream(provider: AnthropicProvider) -> AsyncIterator[TranslatedUpstream]:
    http = OpenAIHttpUpstream(
        name="ant",
        base_url=provider.base_url,
        api_key=KEY,
        max_concurrency=8,
        request_timeout_s=10,
        headers={"anthropic-version": anthropic.API_VERSION},
    )
    upstream = TranslatedUpstream(
        http, translation=anthropic, locate=lambda endpoint, model: anthropic.MESSAGES
    )
    yield upstream
    await upstream.close()


def body(**fields: Any) -> bytes:
    messages = [{"role": "user", "content": "Hello."}]
    return json.dumps({"model": "claude-sonnet-4-5", "messages": messages, **fields}).encode()


def bench(data_dir: Path, provider: AnthropicProvider, **upstream: Any) -> Bench:
    one = {"kind": "anthropic", "api_key": KEY, **upstream}
    return Bench(data_dir, provider, upstream=one, natives=HASTY, worker={"slice_requests": 4})


def texts(lines: list[Any]) -> list[str]:
    return [each["response"]["body"]["choices"][0]["message"]["content"] for each in lines]


async def test_a_line_is_answered_in_openais_form(upstream: TranslatedUpstream) -> None:
    reply = await upstream.send(CHAT, body())

    assert reply.is_success
    assert json.loads(reply.body)["choices"][0]["message"]["content"] == "Hello."
    assert (reply.input_tokens, reply.output_tokens, reply.total_tokens) == (3, 2, 5)
    assert await upstream.list_models() == ["claude-sonnet-4-5"]
    assert await upstream.read_load() is None


@pytest.mark.parametrize(
    ("given", "param"), [(body(seed=5), "seed"), (b'{"messages": []}', "model"), (b"", "model")]
)
async def test_a_line_that_cannot_be_translated_is_not_sent(
    provider: AnthropicProvider, upstream: TranslatedUpstream, given: bytes, param: str
) -> None:
    reply = await upstream.send(CHAT, given)

    assert reply.status_code == 400
    assert json.loads(reply.body)["error"]["param"] == param
    assert provider.calls == []


async def test_errors_are_openais_and_keep_how_long_to_wait(
    provider: AnthropicProvider, upstream: TranslatedUpstream
) -> None:
    provider.behave = lambda *_: errored("invalid_request_error", "Too long.")
    provider.spoil(MESSAGE, Trouble(status=429, headers={"Retry-After": "7"}))

    limited, refused = await upstream.send(CHAT, body()), await upstream.send(CHAT, body())

    assert (limited.status_code, limited.retry_after_s) == (429, 7)
    assert json.loads(limited.body)["error"]["code"] == "rate_limit_exceeded"
    assert refused.status_code == 400
    assert json.loads(refused.body)["error"]["message"] == "Too long."


async def test_an_answer_that_is_cut_off_is_a_failure(
    provider: AnthropicProvider, upstream: TranslatedUpstream
) -> None:
    provider.spoil(MESSAGE, Trouble(is_cut=True))

    assert (await upstream.send(CHAT, body())).failure is Failure.DISCONNECTED


@pytest.mark.parametrize("mode", ["lines", "native"])
async def test_a_batch_comes_out_alike_either_way(
    tmp_path: Path, provider: AnthropicProvider, mode: str
) -> None:
    names = [f"line-{n}" for n in range(6)]
    async with bench(tmp_path / "data", provider, mode=mode) as it:
        batch = await it.create(*names)
        if mode == "native":

            async def is_there() -> bool:
                return bool(provider.batches)

            await until(is_there)
            provider.end(next(iter(provider.batches)))
        ended = await it.wait_until_ended(batch)
        output, errors = await it.results(batch)

    assert ended.status is BatchStatus.COMPLETED
    assert ended.counts == Counts(total=6, completed=6, failed=0)
    assert ended.usage.total_tokens == 30
    assert ids(output) == texts(output) == names
    assert errors == []
    assert (MESSAGE in provider.calls) is (mode == "lines")


async def test_the_checkup_finds_its_models(provider: AnthropicProvider) -> None:
    settings = Upstream(name="ant", kind="anthropic", base_url=provider.base_url, api_key=KEY)

    assert (await check_upstream(settings)).verdict is Verdict.OK
