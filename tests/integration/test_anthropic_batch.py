"""The adapter for Message Batches, against a server that misbehaves."""

import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from penstock.errors import InvalidSettings, JobNotTaken, JobRefused, UpstreamDown
from penstock.upstream.anthropic_batch import LIMITS, AnthropicBatchUpstream
from penstock.upstream.base import (
    Lack,
    NativeJob,
    NativeLine,
    NativeResult,
    NativeState,
    NativeStatus,
    Reply,
)
from tests.providers.anthropic_server import (
    CANCEL,
    CREATE,
    GET,
    KEY,
    LIST,
    RESULTS,
    AnthropicProvider,
    errored,
    message,
)
from tests.providers.openai_server import Trouble

CHAT = "/v1/chat/completions"
NOTHING = b"{}"


@pytest.fixture
async def provider() -> AsyncIterator[AnthropicProvider]:
    async with AnthropicProvider() as provider:
        yield provider


@pytest.fixture
async def upstream(provider: AnthropicProvider) -> AsyncIterator[AnthropicBatchUpstream]:
    upstream = AnthropicBatchUpstream(name="ant", base_url=provider.base_url, api_key=KEY)
    yield upstream
    await upstream.close()


def job(key: str = "job-0123", **fields: Any) -> NativeJob:
    given = {
        "key": key,
        "display_name": "a job",
        "endpoint": CHAT,
        "model": "claude-sonnet-4-5",
        "requests": 3,
        "expires_at": time.time() + 86400,
    }
    return NativeJob(**{**given, **fields})


def line(number: int, text: str = "Hello.", **fields: Any) -> NativeLine:
    messages = [{"role": "user", "content": text}]
    body = {"model": "claude-sonnet-5-5", "messages": messages, **fields}
    return NativeLine(custom_id=f"l{number}", body=json.dumps(body).encode())


class Notes:
    def __init__(self) -> None:
        self.details: Mapping[str, str] = {}

    async def __call__(self, details: Mapping[str, str]) -> None:
        self.details = details


async def submit(
    upstream: AnthropicBatchUpstream, the_job: NativeJob, notes: Notes | None = None
) -> str:
    async def records() -> AsyncIterator[bytes]:
        for number in range(the_job.requests):
            record = upstream.encode(the_job, line(number, f"Line {number}."))
            assert isinstance(record, bytes)
            yield record

    return await upstream.submit(the_job, records(), notes or Notes())


async def collect(
    upstream: AnthropicBatchUpstream, the_job: NativeJob, native_id: str
) -> dict[str, NativeResult]:
    status = await upstream.check(the_job, native_id)
    results = upstream.results(the_job, native_id, status)
    return {result.custom_id: result async for result in results}


def text_of(result: NativeResult) -> str:
    assert result.reply is not None
    body = json.loads(result.reply.body)
    return body["choices"][0]["message"]["content"]


class TestEncode:
    def test_a_line_names_its_own_model_and_the_job(
        self, upstream: AnthropicBatchUpstream
    ) -> None:
        record = upstream.encode(job(), line(7))

        assert isinstance(record, bytes)
        written = json.loads(record)
        assert written["custom_id"] == "job-0123_l7"
        assert written["params"]["model"] == "claude-sonnet-5-5"
        assert b"\n" not in record

    @pytest.mark.parametrize(
        ("given", "param"),
        [
            (line(1, seed=5), "seed"),
            (NativeLine(custom_id="l1", body=b'{"model": 5}'), "model"),
            (NativeLine(custom_id="l1", body=NOTHING), "messages"),
        ],
    )
    def test_a_line_that_cannot_be_translated_gets_a_400(
        self, upstream: AnthropicBatchUpstream, given: NativeLine, param: str
    ) -> None:
        reply = upstream.encode(job(), given)

        assert isinstance(reply, Reply)
        assert reply.status_code == 400
        assert json.loads(reply.body)["error"]["param"] == param

    def test_ids_fit_however_long_the_key(self, upstream: AnthropicBatchUpstream) -> None:
        record = upstream.encode(
            job("k" * 36), NativeLine(custom_id="l" * 16, body=line(1).body)
        )

        assert isinstance(record, bytes)
        assert len(json.loads(record)["custom_id"]) <= 64


class TestRun:
    async def test_results_come_in_openais_form_under_our_names(
        self, provider: AnthropicProvider, upstream: AnthropicBatchUpstream
    ) -> None:
        native_id = await submit(upstream, job())
        assert (await upstream.check(job(), native_id)).state is NativeState.RUNNING
        provider.end(native_id)

        status = await upstream.check(job(), native_id)
        results = await collect(upstream, job(), native_id)

        assert status.state is NativeState.ENDED
        assert (status.completed, status.failed) == (3, 0)
        assert {name: text_of(result) for name, result in results.items()} == {
            f"l{number}": f"Line {number}." for number in range(3)
        }
        assert results["l0"].reply is not None
        assert results["l0"].reply.total_tokens == 5

    async def test_every_outcome_of_a_request(
        self, provider: AnthropicProvider, upstream: AnthropicBatchUpstream
    ) -> None:
        outcomes: dict[str, Any] = {
            "job-0123_l0": errored("invalid_request_error", "max_tokens: too large"),
            "job-0123_l1": {"type": "canceled"},
            "job-0123_l2": message("Well?", content=5),
        }
        provider.behave = lambda custom_id, _: outcomes[custom_id]
        provider.extra_lines = [
            b'{"custom_id": "job-0123_l3", "result": {"type": "new"}}',
            b'{"custom_id": "job-0123_l4", "result": 5}',
            b'{"custom_id": "another_l5", "result": {"type": "expired"}}',
            b'{"result": {"type": "expired"}}',
            b"nonsense \xff",
        ]
        native_id = await submit(upstream, job())
        provider.end(native_id)

        results = await collect(upstream, job(), native_id)

        assert results.keys() == {"l0", "l1", "l2", "l3", "l4"}
        refused = results["l0"].reply
        assert refused is not None
        assert refused.status_code == 400
        assert json.loads(refused.body)["error"]["message"] == "max_tokens: too large"
        assert results["l1"].lack is Lack.CANCELLED
        assert results["l2"].reply is not None
        assert results["l2"].reply.failure is not None
        assert results["l3"].lack is Lack.LOST
        assert results["l4"].lack is Lack.LOST

    @pytest.mark.parametrize(
        ("rest", "state", "lack"),
        [
            ("expired", NativeState.EXPIRED, Lack.EXPIRED),
            ("canceled", NativeState.CANCELLED, Lack.CANCELLED),
        ],
    )
    async def test_a_batch_that_ended_early(
        self,
        provider: AnthropicProvider,
        upstream: AnthropicBatchUpstream,
        rest: str,
        state: NativeState,
        lack: Lack,
    ) -> None:
        native_id = await submit(upstream, job())
        provider.end(native_id, only=1, rest=rest)

        assert (await upstream.check(job(), native_id)).state is state
        results = await collect(upstream, job(), native_id)
        assert [results[name].lack for name in ("l0", "l1", "l2")] == [None, lack, lack]

    async def test_results_that_are_cut_off_are_no_results(
        self, provider: AnthropicProvider, upstream: AnthropicBatchUpstream
    ) -> None:
        native_id = await submit(upstream, job())
        provider.end(native_id)
        provider.spoil(RESULTS, Trouble(is_cut=True))

        with pytest.raises(UpstreamDown):
            await collect(upstream, job(), native_id)

        assert len(await collect(upstream, job(), native_id)) == 3

    async def test_a_cancel_and_a_second_one(
        self, provider: AnthropicProvider, upstream: AnthropicBatchUpstream
    ) -> None:
        native_id = await submit(upstream, job())

        await upstream.cancel(job(), native_id)
        assert (await upstream.check(job(), native_id)).state is NativeState.RUNNING
        provider.end(native_id, only=1, rest="canceled")
        await upstream.cancel(job(), native_id)

        assert provider.calls.count(CANCEL) == 2

    async def test_cleaning_up_twice(
        self, provider: AnthropicProvider, upstream: AnthropicBatchUpstream
    ) -> None:
        native_id = await submit(upstream, job())
        provider.end(native_id)
        status = await upstream.check(job(), native_id)

        await upstream.clean_up(job(), status.details)
        await upstream.clean_up(job(), status.details)
        await upstream.clean_up(job(), {})

        assert provider.batches == {}


class TestSubmit:
    @pytest.mark.parametrize(
        ("trouble", "error"),
        [
            (Trouble(status=429), JobNotTaken),
            (Trouble(status=400), JobRefused),
            (Trouble(status=413), JobRefused),
            (Trouble(status=500), UpstreamDown),
            (Trouble(status=529), UpstreamDown),
            (Trouble(is_lost=True), UpstreamDown),
        ],
    )
    async def test_what_goes_wrong(
        self,
        provider: AnthropicProvider,
        upstream: AnthropicBatchUpstream,
        trouble: Trouble,
        error: type[Exception],
    ) -> None:
        provider.spoil(CREATE, trouble)

        with pytest.raises(error):
            await submit(upstream, job())

    async def test_nobody_there(self) -> None:
        upstream = AnthropicBatchUpstream(
            name="ant", base_url="http://127.0.0.1:9/v1", api_key=KEY
        )
        with pytest.raises(JobNotTaken):
            await submit(upstream, job())
        await upstream.close()

    async def test_a_wrong_key_is_refused_and_never_told(
        self, provider: AnthropicProvider
    ) -> None:
        upstream = AnthropicBatchUpstream(
            name="ant", base_url=provider.base_url, api_key="sk-ant-wrong-key"
        )
        with pytest.raises(JobRefused) as refused:
            await submit(upstream, job())
        await upstream.close()

        assert "sk-ant-wrong-key" not in str(refused.value)
        with pytest.raises(InvalidSettings):
            AnthropicBatchUpstream(name="ant", base_url=provider.base_url, api_key="a\nb")


class TestFind:
    async def test_nothing_was_begun(
        self, provider: AnthropicProvider, upstream: AnthropicBatchUpstream
    ) -> None:
        assert await upstream.find(job(), {}, since=time.time()) is None
        assert provider.calls == []

    async def test_one_that_never_arrived(
        self, provider: AnthropicProvider, upstream: AnthropicBatchUpstream
    ) -> None:
        await submit(upstream, job("other-job", requests=2))
        notes = Notes()
        provider.spoil(CREATE, Trouble(status=500))
        with pytest.raises(UpstreamDown):
            await submit(upstream, job(), notes)

        assert await upstream.find(job(), notes.details, since=time.time()) is None

    async def test_one_whose_answer_was_lost_shows_at_its_end(
        self, provider: AnthropicProvider, upstream: AnthropicBatchUpstream
    ) -> None:
        notes, since = Notes(), time.time()
        provider.spoil(CREATE, Trouble(is_lost=True))
        with pytest.raises(UpstreamDown):
            await submit(upstream, job(), notes)
        [native_id] = provider.batches

        with pytest.raises(UpstreamDown, match="at their end"):
            await upstream.find(job(), notes.details, since=since)
        provider.end(native_id)

        # Lines that could not be translated are counted elsewhere, but were never sent.
        assert await upstream.find(job(requests=9), notes.details, since=since) == native_id

    async def test_another_of_the_same_size_is_not_ours(
        self, provider: AnthropicProvider, upstream: AnthropicBatchUpstream
    ) -> None:
        other = await submit(upstream, job("other-job"))
        provider.end(other)

        assert await upstream.find(job(), {"requests": "3"}, since=time.time()) is None

    async def test_it_is_looked_for_over_all_pages(
        self, provider: AnthropicProvider, upstream: AnthropicBatchUpstream
    ) -> None:
        native_id = await submit(upstream, job())
        provider.end(native_id)
        for number in range(101):
            await submit(upstream, job(f"other-{number:03}", requests=1))

        assert await upstream.find(job(), {"requests": "3"}, since=time.time()) == native_id
        assert provider.calls.count(LIST) == 2

    async def test_batches_from_before_are_not_looked_at(
        self, provider: AnthropicProvider, upstream: AnthropicBatchUpstream
    ) -> None:
        await submit(upstream, job("other-job"))

        found = await upstream.find(job(), {"requests": "3"}, since=time.time() + 7200)

        assert found is None

    @pytest.mark.parametrize("trouble", [Trouble(status=500), Trouble(is_cut=True)])
    async def test_a_list_that_cannot_be_had_is_no_no(
        self, provider: AnthropicProvider, upstream: AnthropicBatchUpstream, trouble: Trouble
    ) -> None:
        provider.spoil(LIST, trouble)

        with pytest.raises(UpstreamDown):
            await upstream.find(job(), {"requests": "3"}, since=time.time())


@pytest.mark.parametrize(
    ("trouble", "error"),
    [(Trouble(status=500), UpstreamDown), (Trouble(status=403), UpstreamDown)],
)
async def test_a_check_that_fails_says_nothing_of_the_job(
    provider: AnthropicProvider,
    upstream: AnthropicBatchUpstream,
    trouble: Trouble,
    error: type[Exception],
) -> None:
    native_id = await submit(upstream, job())
    provider.spoil(GET, trouble)

    with pytest.raises(error):
        await upstream.check(job(), native_id)
    with pytest.raises(JobRefused):
        await upstream.check(job(), "msgbatch_unknown")
    with pytest.raises(JobRefused):
        async for _ in upstream.results(
            job(), "msgbatch_unknown", NativeStatus(state=NativeState.ENDED)
        ):
            pass


def test_the_limits_are_those_of_the_reference() -> None:
    assert (LIMITS.max_requests, LIMITS.max_bytes) == (100_000, 256_000_000)
    assert LIMITS.one_model is False
