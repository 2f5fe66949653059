"""The adapter for OpenAI's batch API: the contract, and what is its own."""

import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError

from penstock.errors import InvalidSettings, JobRefused, UpstreamDown
from penstock.testing.native import KEY, BatchUpstreamContract, nobody_notes
from penstock.upstream.base import Failure, Lack, NativeJob, NativeLine, NativeState
from penstock.upstream.kinds import KINDS
from penstock.upstream.openai_batch import (
    DIALECTS,
    Dialect,
    OpenAIBatchUpstream,
    read_result,
)
from penstock.upstream.provider_http import ProviderHttp
from tests.providers import openai_server
from tests.providers.openai_server import (
    CONTENT,
    CREATE,
    LIST,
    OpenAIProvider,
    Trouble,
    echo,
)
from tests.upstreams import chat_completion

HASTY = replace(DIALECTS["openai"], find_after_s=0.05)


class FarOpenAI:
    """The fake provider, as the contract kit speaks to it."""

    def __init__(self, provider: OpenAIProvider) -> None:
        self._provider = provider

    @property
    def native_ids(self) -> list[str]:
        return self._provider.native_ids

    def custom_ids(self, native_id: str) -> list[str]:
        return [line["custom_id"] for line in self._provider.lines_of(native_id)]

    def lose_answer(self) -> None:
        self._provider.spoil(CREATE, Trouble(is_lost=True))

    def answer_submissions(self, status: int) -> None:
        self._provider.spoil(CREATE, Trouble(status=status))

    def go_down(self) -> None:
        self._provider.is_down = True

    def end(
        self,
        native_id: str,
        state: NativeState,
        *,
        texts: Mapping[str, str],
        statuses: Mapping[str, int],
    ) -> None:
        def behave(custom_id: str, body: dict[str, Any]) -> tuple[int, Any] | None:
            if custom_id in texts:
                return 200, chat_completion(texts[custom_id])
            if custom_id in statuses:
                return statuses[custom_id], {"error": {"message": "No."}}
            return None

        self._provider.behave = behave
        names = {NativeState.ENDED: "completed"}
        self._provider.end(native_id, names.get(state, state.value))

    def cut_results(self) -> None:
        self._provider.spoil(CONTENT, Trouble(is_cut=True))


@pytest.fixture
async def provider(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[OpenAIProvider]:
    monkeypatch.setattr(openai_server, "KEY", KEY)
    async with OpenAIProvider() as provider:
        yield provider


async def opened(provider: OpenAIProvider, dialect: Dialect) -> OpenAIBatchUpstream:
    return OpenAIBatchUpstream(
        name="hosted", base_url=provider.base_url, api_key=KEY, dialect=dialect
    )


@pytest.fixture
async def upstream(provider: OpenAIProvider) -> AsyncIterator[OpenAIBatchUpstream]:
    upstream = await opened(provider, HASTY)
    yield upstream
    await upstream.close()


class TestOpenAIBatchUpstream(BatchUpstreamContract):
    @pytest.fixture
    def far_side(self, provider: OpenAIProvider) -> FarOpenAI:
        return FarOpenAI(provider)


def job(key: str = "nat-1", **more: Any) -> NativeJob:
    usual = {
        "key": key,
        "display_name": "Reviews",
        "endpoint": "/v1/chat/completions",
        "model": "m",
        "requests": 1,
        "expires_at": time.time() + 3600,
    }
    return NativeJob(**(usual | more))


async def records_of(*bodies: bytes) -> AsyncIterator[bytes]:
    for number, body in enumerate(bodies, 1):
        yield b'{"custom_id":"l%d","method":"POST","url":"/v1/x","body":%b}' % (number, body)


async def submit(upstream: OpenAIBatchUpstream, key: str, body: bytes = b"{}") -> str:
    size = sum([len(record) + 1 async for record in records_of(body)])
    return await upstream.submit(job(key, bytes=size), records_of(body), nobody_notes)


async def test_a_body_goes_out_byte_for_byte_but_for_its_line_ends(
    upstream: OpenAIBatchUpstream,
) -> None:
    body = b'{ "model":"m",\r\n "n":1.0, "n":2, "text":"\xc3\xa9\\u2028" }'

    record = upstream.encode(job(), NativeLine(custom_id="l7", body=body))

    assert isinstance(record, bytes)
    assert record == (
        b'{"custom_id":"l7","method":"POST","url":"/v1/chat/completions",'
        b'"body":{ "model":"m",   "n":1.0, "n":2, "text":"\xc3\xa9\\u2028" }}'
    )


async def test_metadata_is_ours_first_and_as_much_of_the_clients_as_fits(
    provider: OpenAIProvider, upstream: OpenAIBatchUpstream
) -> None:
    mine = {f"key-{n}": "v" for n in range(20)} | {"long": "x" * 600, "k" * 65: "v"}
    body = b"{}"
    size = sum([len(record) + 1 async for record in records_of(body)])

    native_id = await upstream.submit(
        job("nat-9", metadata=mine, bytes=size), records_of(body), nobody_notes
    )

    kept = provider.batches[native_id]["metadata"]
    assert len(kept) == 16
    assert kept["penstock_job"] == "nat-9"
    assert kept["penstock_name"] == "Reviews"
    assert "long" not in kept


async def test_a_job_is_found_behind_many_others_and_old_ones_are_not_looked_through(
    provider: OpenAIProvider, upstream: OpenAIBatchUpstream
) -> None:
    began = time.time()
    wanted = await submit(upstream, "nat-0")
    template = provider.batches[wanted]
    for n in range(250):
        new = template | {"id": f"batch_{n}", "input_file_id": f"file-{n}", "metadata": None}
        provider.batches[f"batch_{n}"] = new
    details = {"input_file_id": template["input_file_id"]}

    assert await upstream.find(job("nat-0"), details, since=began) == wanted
    assert provider.calls.count(LIST) == 3
    for batch in provider.batches.values():
        batch["created_at"] -= 86400
    assert await upstream.find(job("nat-2"), {"input_file_id": "f"}, since=began) is None
    assert provider.calls.count(LIST) == 4


async def test_what_was_noted_finds_a_job_of_a_provider_without_metadata(
    provider: OpenAIProvider,
) -> None:
    upstream = await opened(provider, replace(HASTY, has_metadata=False))
    native_id = await submit(upstream, "nat-1")
    assert provider.batches[native_id]["metadata"] is None
    details = {"input_file_id": provider.batches[native_id]["input_file_id"]}

    assert await upstream.find(job("nat-1"), details, since=time.time()) == native_id
    assert await upstream.find(job("nat-1"), {}, since=time.time()) is None
    await upstream.close()


async def test_a_file_whose_batch_was_refused_is_deleted(
    provider: OpenAIProvider, upstream: OpenAIBatchUpstream
) -> None:
    provider.spoil(CREATE, Trouble(status=400))

    with pytest.raises(JobRefused):
        await submit(upstream, "nat-1")

    assert provider.files == {}


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        (b'{"custom_id":"l1","response":null,"error":{"code":"batch_expired"}}', Lack.EXPIRED),
        (b'{"custom_id":"l1","error":{"code":"batch_cancelled"}}', Lack.CANCELLED),
        (b'{"custom_id":"l1","response":null,"error":null}', Lack.LOST),
        (b'{"custom_id":"l1","response":7}', Lack.LOST),
        (
            b'{"custom_id":"l1","error":{"code":"request_timeout","message":"Too slow."}}',
            Failure.TIMEOUT,
        ),
        (b'{"custom_id":"l1","error":{"code":"odd"}}', Failure.INVALID),
        (b'{"custom_id":"l1","response":{"status_code":200,"body":[]}}', Failure.INVALID),
        (b'{"custom_id":"l1","response":{"status_code":200,"body":{}}}', None),
        (b'{"custom_id":"l1","response":{"status_code":429,"body":"x"}}', None),
    ],
)
def test_every_kind_of_result_line_is_understood(
    text: bytes, reply: Lack | Failure | None
) -> None:
    result = read_result(text)

    assert result is not None
    assert result.custom_id == "l1"
    assert reply in (result.lack, result.reply.failure if result.reply else "no reply")


@pytest.mark.parametrize("text", [b"", b"[]", b"not json", b'{"response":{}}', b"[" * 2000])
def test_a_line_that_is_of_no_line_is_none(text: bytes) -> None:
    assert read_result(text) is None


async def test_a_line_that_is_larger_than_a_piece_comes_whole(
    provider: OpenAIProvider, upstream: OpenAIBatchUpstream
) -> None:
    long = "x" * 1_000_000
    provider.behave = lambda custom_id, body: (200, chat_completion(long))
    native_id = await submit(upstream, "nat-1")
    provider.end(native_id)

    status = await upstream.check(job(), native_id)
    [result] = [each async for each in upstream.results(job(), native_id, status)]

    assert result.reply is not None
    assert json.loads(result.reply.body)["choices"][0]["message"]["content"] == long


async def test_a_key_that_cannot_be_sent_is_not_told(provider: OpenAIProvider) -> None:
    with pytest.raises(InvalidSettings) as caught:
        ProviderHttp(
            name="x", base_url=provider.base_url, headers={"Authorization": "Bearer a\nb"}
        )

    assert "a\nb" not in str(caught.value)


async def test_where_nobody_listens_a_job_cannot_be_looked_at() -> None:
    upstream = OpenAIBatchUpstream(
        name="lost", base_url="http://127.0.0.1:1/v1", api_key=None, dialect=HASTY
    )
    with pytest.raises(UpstreamDown):
        await upstream.check(job(), "batch_1")
    await upstream.close()


def test_each_kind_whose_batches_are_like_openais_has_a_dialect() -> None:
    assert {name for name, kind in KINDS.items() if kind.batches == "openai"} == set(DIALECTS)


@pytest.mark.parametrize(
    ("kind", "left_s", "window"),
    [
        ("openai", 60.0, "24h"),
        ("penstock", 7200.5, "7200s"),
        ("penstock", 1.0, "60s"),
        ("groq", 3600.0, "24h"),
        ("groq", 3 * 86400.0, "3d"),
        ("groq", 30 * 86400.0, "7d"),
        ("azure", 30 * 86400.0, "24h"),
    ],
)
def test_the_window_is_one_that_the_provider_knows(
    kind: str, left_s: float, window: str
) -> None:
    assert DIALECTS[kind].window(left_s) == window


# The fake is right: OpenAI's own client runs against it


async def test_openais_client_runs_a_batch_at_the_fake_provider(
    provider: OpenAIProvider,
) -> None:
    line = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": [{"role": "user", "content": "Hello."}]},
    }
    provider.behave = echo
    client = AsyncOpenAI(base_url=provider.base_url, api_key=KEY, max_retries=0)
    file = await client.files.create(
        file=("in.jsonl", json.dumps(line).encode() + b"\n"), purpose="batch"
    )
    batch = await client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"a": "b"},
    )
    assert batch.status == "validating"
    assert [each.id async for each in client.batches.list()] == [batch.id]
    provider.end(batch.id)

    ended = await client.batches.retrieve(batch.id)

    assert (ended.status, ended.metadata) == ("completed", {"a": "b"})
    assert ended.request_counts is not None
    assert ended.request_counts.completed == 1
    assert ended.output_file_id is not None
    content = await client.files.content(ended.output_file_id)
    [result] = map(json.loads, content.text.splitlines())
    assert result["custom_id"] == "a"
    assert result["response"]["body"]["choices"][0]["message"]["content"] == "Hello."
    about = await client.files.retrieve(ended.output_file_id)
    assert about.bytes == len(content.content)
    assert (await client.files.delete(file.id)).deleted
    with pytest.raises(BadRequestError):
        await client.batches.create(
            input_file_id="file-none", endpoint="/v1/completions", completion_window="24h"
        )
    await client.close()


async def test_openais_client_cancels_a_batch_at_the_fake_provider(
    provider: OpenAIProvider,
) -> None:
    client = AsyncOpenAI(base_url=provider.base_url, api_key=KEY, max_retries=0)
    file = await client.files.create(file=("in.jsonl", b"{}\n"), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
    )
    provider.cancels_at_once = False

    assert (await client.batches.cancel(batch.id)).status == "cancelling"

    await client.close()
