"""Google's Gemini API, line by line and in batches, against a server that misbehaves."""

import json
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from penstock.checkup import Verdict, check_upstream
from penstock.errors import InvalidSettings, JobNotTaken, JobRefused
from penstock.executor.native import NativePolicy
from penstock.model import BatchStatus, Counts
from penstock.settings import Upstream, load_settings
from penstock.testing.native import KEY, BatchUpstreamContract, nobody_notes
from penstock.upstream.base import Failure, Lack, NativeJob, NativeLine, NativeState, Reply
from penstock.upstream.gemini_batch import GeminiBatchUpstream, read_result
from penstock.upstream.openai_http import OpenAIHttpUpstream
from penstock.upstream.translated import TranslatedUpstream
from penstock.upstream.translation import gemini
from tests.integration.bench import Bench, ids, until
from tests.providers import gemini_server
from tests.providers.far import FarProvider
from tests.providers.gemini_server import (
    CONTENT,
    CREATE,
    GENERATE,
    LIST,
    UPLOAD,
    GeminiProvider,
    content,
    fault,
)
from tests.providers.openai_server import Trouble

CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"
MODEL = "gemini-2.5-flash"
HASTY = NativePolicy(
    first_poll_s=0.02, max_poll_s=0.05, first_wait_s=0.02, max_wait_s=0.05, cancel_grace_s=9
)
NAMES = [f"line-{n}" for n in range(10)]


class FarGemini(FarProvider):
    """The fake provider, as the contract kit speaks to it."""

    create = CREATE

    @property
    def native_ids(self) -> list[str]:
        return list(self._provider.batches)

    def custom_ids(self, native_id: str) -> list[str]:
        return [line["key"] for line in self._provider.lines_of(native_id)]

    def end(
        self,
        native_id: str,
        state: NativeState,
        *,
        texts: Mapping[str, str],
        statuses: Mapping[str, int],
    ) -> None:
        def behave(key: str, request: dict[str, Any]) -> dict[str, Any] | None:
            if key in texts:
                return content(texts[key])
            return fault(statuses[key], "No.") if key in statuses else None

        self._provider.behave = behave
        name = "SUCCEEDED" if state is NativeState.ENDED else state.value.upper()
        self._provider.end(native_id, name)

    def cut_results(self) -> None:
        self._provider.spoil(CONTENT, Trouble(is_cut=True))


@pytest.fixture
async def provider(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[GeminiProvider]:
    monkeypatch.setattr(gemini_server, "KEY", KEY)
    async with GeminiProvider() as provider:
        yield provider


@pytest.fixture
async def upstream(provider: GeminiProvider) -> AsyncIterator[GeminiBatchUpstream]:
    upstream = GeminiBatchUpstream(
        name="gemini", base_url=provider.base_url, api_key=KEY, find_after_s=0.05
    )
    yield upstream
    await upstream.close()


class TestGeminiBatchUpstream(BatchUpstreamContract):
    model = MODEL

    @pytest.fixture
    def far_side(self, provider: GeminiProvider) -> FarGemini:
        return FarGemini(provider)


def job(key: str = "nat-1", **more: Any) -> NativeJob:
    usual = {
        "key": key,
        "display_name": "Reviews",
        "endpoint": CHAT,
        "model": MODEL,
        "requests": 1,
        "expires_at": time.time() + 90_000,
    }
    return NativeJob(**(usual | more))


async def submit(upstream: GeminiBatchUpstream, the_job: NativeJob, **body: Any) -> str:
    given = body or {"messages": [{"role": "user", "content": "Hello."}]}
    line = NativeLine(custom_id="l1", body=json.dumps({"model": MODEL, **given}).encode())
    record = upstream.encode(the_job, line)
    assert isinstance(record, bytes)

    async def records() -> AsyncIterator[bytes]:
        yield record

    measured = replace(the_job, bytes=len(record) + 1)
    return await upstream.submit(measured, records(), nobody_notes)


async def test_a_file_is_announced_and_sent_and_named_by_the_batch(
    provider: GeminiProvider, upstream: GeminiBatchUpstream
) -> None:
    native_id = await submit(upstream, job())

    [file] = provider.files.values()
    assert (file["displayName"], file["mimeType"]) == ("nat-1", "application/jsonl")
    assert provider.calls[:2] == [UPLOAD, UPLOAD]
    taken = provider.batches[native_id]["metadata"]
    assert taken["displayName"] == "nat-1 Reviews"
    assert taken["model"] == f"models/{MODEL}"
    [line] = provider.lines_of(native_id)
    hello = {"role": "user", "parts": [{"text": "Hello."}]}
    assert line == {"key": "l1", "request": {"contents": [hello]}}


async def test_a_file_goes_to_no_other_host_than_the_one_that_has_the_key(
    provider: GeminiProvider, upstream: GeminiBatchUpstream
) -> None:
    provider.upload_host = "http://203.0.113.1:9"

    assert await submit(upstream, job()) in provider.batches


async def test_a_file_that_cannot_be_sent_makes_no_job(
    provider: GeminiProvider, upstream: GeminiBatchUpstream
) -> None:
    for trouble in (Trouble(status=500), Trouble(is_lost=True)):
        provider.spoil(UPLOAD, Trouble(), trouble)
        with pytest.raises(JobNotTaken):
            await submit(upstream, job())

    assert provider.batches == {}


async def test_responses_and_embeddings_are_answered_as_such(
    provider: GeminiProvider, upstream: GeminiBatchUpstream
) -> None:
    spoken = job("nat-1", endpoint="/v1/responses")
    embedded = job("nat-2", endpoint=EMBEDDINGS, model="gemini-embedding-001")
    found: list[Any] = []

    for the_job in (spoken, embedded):
        native_id = await submit(upstream, the_job, input="Hello.")
        provider.end(native_id)
        status = await upstream.check(the_job, native_id)
        [result] = [each async for each in upstream.results(the_job, native_id, status)]
        assert result.reply is not None
        found.append(json.loads(result.reply.body))

    assert found[0]["output"][0]["content"][0]["text"] == "Hello."
    assert found[1]["data"][0]["embedding"] == [0.5, 0.25]
    kinds = [each["metadata"]["@type"] for each in provider.batches.values()]
    assert [kind.rpartition(".")[2] for kind in kinds] == [
        "GenerateContentBatch",
        "EmbedContentBatch",
    ]


async def test_a_job_is_found_on_any_page_in_any_order(
    provider: GeminiProvider, upstream: GeminiBatchUpstream
) -> None:
    wanted = await submit(upstream, job("nat-0"))
    taken = provider.batches[wanted]
    details = {"input_file": taken["metadata"]["inputConfig"]["fileName"]}
    for n in range(250):
        other = {"displayName": f"nat-00{n} nat-0", "inputConfig": {"fileName": f"files/{n}"}}
        provider.batches[f"b{n}"] = {"name": f"b{n}", "metadata": other}

    assert await upstream.find(job("nat-0"), details, since=time.time()) == wanted
    assert await upstream.find(job("nat-0"), {"input_file": "?"}, since=0) == wanted
    assert await upstream.find(job("nat-9"), {"input_file": "?"}, since=0) is None
    assert provider.calls.count(LIST) == 9


@pytest.mark.parametrize("model", ["../batches", "a/b?c", "", "models/a:b", "m#x", "a/../b"])
async def test_what_cannot_be_a_model_never_stands_in_an_address(
    upstream: GeminiBatchUpstream, model: str
) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "Hello."}]}).encode()

    reply = upstream.encode(job(model=model), NativeLine(custom_id="l1", body=body))

    assert isinstance(reply, Reply)
    assert json.loads(reply.body)["error"]["param"] == "model"
    with pytest.raises(JobRefused):
        await upstream.submit(job(model=model, bytes=3), one(b"{}"), nobody_notes)


async def one(record: bytes) -> AsyncIterator[bytes]:
    yield record


@pytest.mark.parametrize(
    ("operation", "state"),
    [
        ({"metadata": {"state": "JOB_STATE_RUNNING"}}, NativeState.RUNNING),
        ({"metadata": {"state": "BATCH_STATE_PENDING"}}, NativeState.PENDING),
        ({"metadata": {"state": "BATCH_STATE_NEW"}}, NativeState.RUNNING),
        ({"done": True, "error": {"code": 3, "message": "Bad."}}, NativeState.FAILED),
        ({"done": True, "response": {"responsesFile": "files/x"}}, NativeState.ENDED),
        ({}, NativeState.RUNNING),
    ],
)
async def test_every_state_is_understood(
    provider: GeminiProvider,
    upstream: GeminiBatchUpstream,
    operation: dict[str, Any],
    state: NativeState,
) -> None:
    provider.batches["batches/b1"] = {"name": "batches/b1", **operation}

    status = await upstream.check(job(), "batches/b1")

    assert status.state is state
    assert status.message == ("Bad." if state is NativeState.FAILED else "")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b'{"key":"l1"}', Lack.LOST),
        (b'{"key":"l1","response":{}}', Failure.INVALID),
        (b'{"key":"l1","error":{"code":8,"message":"Full."}}', 429),
        (b'{"key":"l1","status":{"code":3,"message":"Bad."}}', 400),
    ],
)
def test_every_kind_of_result_line_is_understood(text: bytes, told: object) -> None:
    result = read_result(text, job(), created_at=1)

    assert result is not None
    assert result.custom_id == "l1"
    reply = result.reply or Reply()
    assert told in (result.lack, reply.failure, reply.status_code)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"[" * 2000, b"\xff"])
def test_a_line_that_is_of_no_line_is_none(text: bytes) -> None:
    assert read_result(text, job(), created_at=1) is None


def test_a_key_that_cannot_be_sent_is_refused_and_not_told() -> None:
    with pytest.raises(InvalidSettings) as caught:
        GeminiBatchUpstream(name="g", base_url="http://h/v1beta", api_key="secret\n")

    assert "secret" not in str(caught.value)


# Line by line


@pytest.fixture
async def lines(provider: GeminiProvider) -> AsyncIterator[TranslatedUpstream]:
    http = OpenAIHttpUpstream(
        name="gemini",
        base_url=provider.base_url,
        api_key=KEY,
        key_header="x-goog-api-key",
        max_concurrency=8,
        request_timeout_s=10,
    )
    upstream = TranslatedUpstream(http, translation=gemini, locate=gemini.locate)
    yield upstream
    await upstream.close()


async def test_a_line_goes_to_the_address_of_its_model(
    provider: GeminiProvider, lines: TranslatedUpstream
) -> None:
    messages = [{"role": "user", "content": "Hello."}]
    body = json.dumps({"model": MODEL, "messages": messages}).encode()
    embedding = json.dumps({"model": "gemini-embedding-001", "input": "Hello."}).encode()

    reply = await lines.send(CHAT, body)
    vectors = await lines.send(EMBEDDINGS, embedding)

    assert json.loads(reply.body)["choices"][0]["message"]["content"] == "Hello."
    assert json.loads(vectors.body)["data"][0]["embedding"] == [0.5, 0.25]
    assert provider.calls == [GENERATE, gemini_server.EMBED]


async def test_a_line_whose_model_cannot_be_one_is_not_sent(
    provider: GeminiProvider, lines: TranslatedUpstream
) -> None:
    reply = await lines.send(CHAT, b'{"model": "../batches"}')

    assert reply.status_code == 400
    assert json.loads(reply.body)["error"]["param"] == "model"
    assert provider.calls == []


async def test_all_pages_of_models_are_listed(lines: TranslatedUpstream) -> None:
    assert await lines.list_models() == list(gemini_server.NAMES)


async def test_the_checkup_sends_the_key_where_google_wants_it(
    provider: GeminiProvider,
) -> None:
    settings = Upstream(
        name="g", kind="gemini", base_url=provider.base_url, api_key=KEY, models=("gemini-*",)
    )

    assert (await check_upstream(settings)).verdict is Verdict.OK


@pytest.mark.parametrize("kind", ["gemini", "mistral"])
def test_streams_are_refused_where_they_are_not_spoken(kind: str) -> None:
    one = {"name": "g", "kind": kind, "base_url": "http://h/v1", "stream": True}

    with pytest.raises(InvalidSettings, match=rf"upstreams\[0\].stream.*false for kind {kind}"):
        load_settings(overrides={"upstreams": [one]})


# The whole way


def bench(data_dir: Path, provider: GeminiProvider, **upstream: Any) -> Bench:
    one = {"kind": "gemini", "api_key": KEY, **upstream}
    return Bench(data_dir, provider, upstream=one, natives=HASTY, worker={"slice_requests": 4})


def input_of(*names: str) -> bytes:
    lines = [
        {
            "custom_id": name,
            "method": "POST",
            "url": CHAT,
            "body": {"model": MODEL, "messages": [{"role": "user", "content": name}]},
        }
        for name in names
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def texts(lines: list[Any]) -> list[str]:
    return [each["response"]["body"]["choices"][0]["message"]["content"] for each in lines]


async def test_a_batch_is_run_by_google_and_answered_in_openais_form(
    tmp_path: Path, provider: GeminiProvider
) -> None:
    async def is_taken() -> bool:
        return bool(provider.batches)

    async with bench(tmp_path, provider, mode="native") as it:
        batch = await it.create_from(input_of(*NAMES))
        await until(is_taken)
        provider.end(next(iter(provider.batches)))
        ended = await it.wait_until_ended(batch)
        output, errors = await it.results(batch)

    assert ended.status is BatchStatus.COMPLETED
    assert ended.counts == Counts(total=10, completed=10, failed=0)
    assert ids(output) == texts(output) == NAMES
    assert errors == []


async def test_what_a_batch_leaves_is_sent_line_by_line(
    tmp_path: Path, provider: GeminiProvider
) -> None:
    async def is_taken() -> bool:
        return bool(provider.batches)

    async with bench(tmp_path, provider, mode="native", fallback="lines") as it:
        batch = await it.create_from(input_of(*NAMES))
        await until(is_taken)
        provider.end(next(iter(provider.batches)), "EXPIRED", only=6)
        await it.wait_until_ended(batch)
        output, _ = await it.results(batch)

    assert texts(output) == NAMES
    assert provider.calls.count(GENERATE) == 4
