"""Fireworks' batch inference jobs, against a server that misbehaves: the contract, and more."""

import json
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from penstock.errors import InvalidSettings, JobNotTaken, JobRefused, UpstreamDown
from penstock.executor.native import NativePolicy
from penstock.model import BatchStatus
from penstock.settings import load_settings
from penstock.testing.native import KEY, BatchUpstreamContract, nobody_notes
from penstock.upstream.base import Failure, Lack, NativeJob, NativeLine, NativeState, Reply
from penstock.upstream.fireworks_batch import FireworksBatchUpstream, read_result
from tests.integration.bench import Bench, ids, until
from tests.providers import fireworks_server
from tests.providers.far import FarProvider
from tests.providers.fireworks_server import (
    ACCOUNT,
    CHAT,
    CONTENT,
    CREATE,
    MAKE,
    UPLOAD,
    FireworksProvider,
)
from tests.providers.openai_server import Trouble
from tests.upstreams import chat_completion

HASTY = NativePolicy(
    first_poll_s=0.02, max_poll_s=0.05, first_wait_s=0.02, max_wait_s=0.05, cancel_grace_s=9
)
NAMES = [f"line-{n}" for n in range(10)]


class FarFireworks(FarProvider):
    """The fake provider, as the contract kit speaks to it."""

    create = CREATE

    def custom_ids(self, native_id: str) -> list[str]:
        return [line["custom_id"] for line in self._provider.lines_of(native_id)]

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
                return 400, {"message": "No.", "code": statuses[custom_id]}
            return None

        self._provider.behave = behave
        name = "COMPLETED" if state is NativeState.ENDED else state.value.upper()
        self._provider.end(native_id, name)

    def cut_results(self) -> None:
        self._provider.spoil(CONTENT, Trouble(is_cut=True))


@pytest.fixture
async def provider(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FireworksProvider]:
    monkeypatch.setattr(fireworks_server, "KEY", KEY)
    async with FireworksProvider() as provider:
        yield provider


@pytest.fixture
async def upstream(provider: FireworksProvider) -> AsyncIterator[FireworksBatchUpstream]:
    upstream = FireworksBatchUpstream(
        name="fireworks",
        base_url=provider.base_url,
        api_key=KEY,
        account=ACCOUNT,
        find_after_s=0.05,
        ready_poll_s=0.01,
        ready_patience_s=0.5,
    )
    yield upstream
    await upstream.close()


class TestFireworksBatchUpstream(BatchUpstreamContract):
    model = "accounts/fireworks/models/m"

    @pytest.fixture
    def far_side(self, provider: FireworksProvider) -> FarFireworks:
        return FarFireworks(provider)


def job(key: str = "nat-1", **more: Any) -> NativeJob:
    usual = {
        "key": key,
        "display_name": "Reviews",
        "endpoint": "/v1/chat/completions",
        "model": "accounts/fireworks/models/m",
        "requests": 1,
        "expires_at": time.time() + 90_000,
    }
    return NativeJob(**(usual | more))


async def submit(upstream: FireworksBatchUpstream, the_job: NativeJob) -> str:
    body = b'{"model":"m","messages":[{"role":"user","content":"Hello."}]}'
    record = upstream.encode(the_job, NativeLine(custom_id="l1", body=body))
    assert isinstance(record, bytes)

    async def records() -> AsyncIterator[bytes]:
        yield record

    measured = replace(the_job, bytes=len(record) + 1)
    return await upstream.submit(measured, records(), nobody_notes)


def test_a_body_goes_out_as_it_stands_but_for_its_model(
    upstream: FireworksBatchUpstream,
) -> None:
    body = b'{ "model": "m",\n "n": 1.0, "text": "\\u2028", "deep": {"model":\n"x"} }'

    record = upstream.encode(job(), NativeLine(custom_id="l7", body=body))

    assert record == (
        b'{"custom_id":"l7","body":{"n":1.0,"text":"\\u2028","deep":{"model": "x"}}}'
    )
    refused = upstream.encode(job(), NativeLine(custom_id="l7", body=b"[]"))
    assert isinstance(refused, Reply)
    assert refused.status_code == 400


async def test_a_job_has_the_ids_that_its_key_makes(
    provider: FireworksProvider, upstream: FireworksBatchUpstream
) -> None:
    assert await submit(upstream, job()) == "penstock-nat-1"

    taken = provider.jobs["penstock-nat-1"]
    assert taken["model"] == "accounts/fireworks/models/m"
    assert taken["inputDatasetId"] == f"accounts/{ACCOUNT}/datasets/penstock-nat-1-in"
    assert taken["outputDatasetId"] == f"accounts/{ACCOUNT}/datasets/penstock-nat-1-out"
    assert provider.datasets["penstock-nat-1-in"]["exampleCount"] == "1"


async def test_the_same_job_is_never_made_twice(
    provider: FireworksProvider, upstream: FireworksBatchUpstream
) -> None:
    await submit(upstream, job())
    provider.datasets.clear()

    with pytest.raises(UpstreamDown):  # nobody knows, until it is asked for
        await submit(upstream, job())

    assert len(provider.jobs) == 1


async def test_what_an_earlier_attempt_left_is_swept_away(
    provider: FireworksProvider, upstream: FireworksBatchUpstream
) -> None:
    provider.datasets["penstock-nat-1-in"] = {"state": "UPLOADING"}

    with pytest.raises(JobNotTaken):
        await submit(upstream, job())

    assert await submit(upstream, job()) in provider.jobs


@pytest.mark.parametrize("route", [MAKE, UPLOAD])
@pytest.mark.parametrize("trouble", [Trouble(status=500), Trouble(is_lost=True)])
async def test_a_dataset_alone_is_no_job(
    provider: FireworksProvider,
    upstream: FireworksBatchUpstream,
    route: str,
    trouble: Trouble,
) -> None:
    provider.spoil(route, trouble)

    with pytest.raises(JobNotTaken):
        await submit(upstream, job())

    assert provider.jobs == provider.datasets == {}


async def test_a_dataset_that_is_never_ready_is_given_up(
    provider: FireworksProvider, upstream: FireworksBatchUpstream
) -> None:
    provider.looks_until_ready = 1_000_000

    with pytest.raises(JobNotTaken, match="ready"):
        await submit(upstream, job())

    assert provider.jobs == provider.datasets == {}


async def test_the_key_is_not_sent_where_results_lie(
    provider: FireworksProvider, upstream: FireworksBatchUpstream
) -> None:
    native_id = await submit(upstream, job())
    provider.end(native_id)

    status = await upstream.check(job(), native_id)
    [result] = [each async for each in upstream.results(job(), native_id, status)]

    assert result.reply is not None
    assert provider.keys_at_storage == [None, None]


async def test_results_that_are_not_there_are_no_results_unless_all_was_run(
    provider: FireworksProvider, upstream: FireworksBatchUpstream
) -> None:
    native_id = await submit(upstream, job())
    await upstream.cancel(job(), native_id)
    status = await upstream.check(job(), native_id)

    assert status.state is NativeState.CANCELLED
    assert [each async for each in upstream.results(job(), native_id, status)] == []
    ended = replace(status, state=NativeState.ENDED)
    with pytest.raises(JobRefused):
        assert [each async for each in upstream.results(job(), native_id, ended)]


async def test_why_a_job_failed_is_told(
    provider: FireworksProvider, upstream: FireworksBatchUpstream
) -> None:
    native_id = await submit(upstream, job())
    bad = {"code": "INVALID_ARGUMENT", "message": "Bad."}
    provider.jobs[native_id] |= {"state": "JOB_STATE_FAILED", "status": bad}

    status = await upstream.check(job(), native_id)

    assert (status.state, status.message) == (NativeState.FAILED, "Bad.")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b'{"custom_id":"l1"}', Lack.LOST),
        (b'{"custom_id":"l1","response":{}}', Lack.LOST),
        (b'{"custom_id":"l1","error":"Odd."}', Failure.INVALID),
        (b'{"custom_id":"l1","error":{"message":"Odd."}}', Failure.INVALID),
        (b'{"custom_id":"l1","error":{"error":{"message":"Odd.","code":429}}}', 429),
        (b'{"custom_id":"l1","response":{"error":{"message":"Odd.","code":400}}}', 400),
        (b'{"custom_id":"l1","response":{"choices":[{}]}}', 200),
    ],
)
def test_every_kind_of_result_line_is_understood(text: bytes, told: object) -> None:
    result = read_result(text)

    assert result is not None
    assert result.custom_id == "l1"
    reply = result.reply or Reply()
    assert told in (result.lack, reply.failure, reply.status_code)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"[" * 2000, b"\xff"])
def test_a_line_that_is_of_no_line_is_none(text: bytes) -> None:
    assert read_result(text) is None


@pytest.mark.parametrize(
    ("one", "told"),
    [
        ({"kind": "fireworks", "mode": "native"}, "upstreams[0].account is not set"),
        ({"kind": "openai", "account": "team"}, "it must not be set for the kind openai"),
        ({"kind": "fireworks", "account": "../x"}, "upstreams[0].account"),
    ],
)
def test_an_account_is_asked_for_where_it_is_needed(one: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        load_settings(
            overrides={"upstreams": [{"name": "f", "base_url": "http://h/v1", **one}]}
        )

    assert told in str(caught.value)


async def test_a_batch_is_run_as_one_job_and_what_it_leaves_line_by_line(
    tmp_path: Path, provider: FireworksProvider
) -> None:
    async def is_taken() -> bool:
        return bool(provider.jobs)

    one = {
        "kind": "fireworks",
        "api_key": KEY,
        "account": ACCOUNT,
        "mode": "native",
        "fallback": "lines",
    }
    provider.looks_until_ready = 0
    async with Bench(tmp_path, provider, upstream=one, natives=HASTY) as it:
        batch = await it.create(*NAMES)
        await until(is_taken)
        provider.end(next(iter(provider.jobs)), "EXPIRED", only=6)
        ended = await it.wait_until_ended(batch)
        output, errors = await it.results(batch)

    assert ended.status is BatchStatus.COMPLETED
    assert ids(output) == NAMES
    assert errors == []
    assert provider.calls.count(CHAT) == 4
    told = [each["response"]["body"]["choices"][0]["message"]["content"] for each in output]
    assert json.dumps(told) == json.dumps(NAMES)
