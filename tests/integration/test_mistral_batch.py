"""Mistral's batch jobs, against a server that misbehaves: the contract, and what is its own."""

import json
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from penstock.checkup import Verdict, check_upstream
from penstock.errors import InvalidSettings, JobRefused
from penstock.executor.native import NativePolicy
from penstock.model import BatchStatus, Counts, Usage
from penstock.prices import UNKNOWN
from penstock.settings import Upstream
from penstock.testing.native import KEY, BatchUpstreamContract, nobody_notes
from penstock.upstream.base import Failure, Lack, NativeJob, NativeLine, NativeState, Reply
from penstock.upstream.mistral_batch import MistralBatchUpstream, read_result
from tests.integration.bench import Bench, ids, line, until
from tests.providers import mistral_server
from tests.providers.far import FarProvider
from tests.providers.mistral_server import (
    CHAT,
    CONTENT,
    CREATE,
    LIST,
    MistralProvider,
    completion,
    fault,
)
from tests.providers.openai_server import Trouble

EMBEDDINGS = "/v1/embeddings"
HASTY = NativePolicy(
    first_poll_s=0.02, max_poll_s=0.05, first_wait_s=0.02, max_wait_s=0.05, cancel_grace_s=9
)
NAMES = [f"line-{n}" for n in range(10)]


class FarMistral(FarProvider):
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
                return 200, completion(texts[custom_id])
            if custom_id in statuses:
                return statuses[custom_id], fault("No.")
            return None

        names = {
            NativeState.ENDED: "SUCCESS",
            NativeState.EXPIRED: "TIMEOUT_EXCEEDED",
            NativeState.CANCELLED: "CANCELLED",
        }
        self._provider.behave = behave
        self._provider.end(native_id, names[state])

    def cut_results(self) -> None:
        self._provider.spoil(CONTENT, Trouble(is_cut=True))


@pytest.fixture
async def provider(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MistralProvider]:
    monkeypatch.setattr(mistral_server, "KEY", KEY)
    async with MistralProvider() as provider:
        yield provider


@pytest.fixture
async def upstream(provider: MistralProvider) -> AsyncIterator[MistralBatchUpstream]:
    upstream = MistralBatchUpstream(
        name="mistral", base_url=provider.base_url, api_key=KEY, find_after_s=0.05
    )
    yield upstream
    await upstream.close()


class TestMistralBatchUpstream(BatchUpstreamContract):
    model = "mistral-small-latest"

    @pytest.fixture
    def far_side(self, provider: MistralProvider) -> FarMistral:
        return FarMistral(provider)


def job(key: str = "nat-1", **more: Any) -> NativeJob:
    usual = {
        "key": key,
        "display_name": "Reviews",
        "endpoint": "/v1/chat/completions",
        "model": "mistral-small-latest",
        "requests": 1,
        "expires_at": time.time() + 90_000,
    }
    return NativeJob(**(usual | more))


async def submit(upstream: MistralBatchUpstream, the_job: NativeJob, **body: Any) -> str:
    given = body or {"messages": [{"role": "user", "content": "Hello."}]}
    line = NativeLine(custom_id="l1", body=json.dumps({"model": "m", **given}).encode())
    record = upstream.encode(the_job, line)
    assert isinstance(record, bytes)

    async def records() -> AsyncIterator[bytes]:
        yield record

    measured = replace(the_job, bytes=len(record) + 1)
    return await upstream.submit(measured, records(), nobody_notes)


async def test_the_job_names_the_model_and_the_lines_do_not(
    provider: MistralProvider, upstream: MistralBatchUpstream
) -> None:
    native_id = await submit(upstream, job(metadata={"team": "search"}))

    taken = provider.jobs[native_id]
    assert taken["model"] == "mistral-small-latest"
    assert taken["timeout_hours"] == 24
    assert taken["metadata"] == {
        "penstock_job": "nat-1",
        "penstock_name": "Reviews",
        "team": "search",
    }
    [line] = provider.lines_of(native_id)
    assert line.keys() == {"custom_id", "body"}
    assert "model" not in line["body"]


@pytest.mark.parametrize(("left_s", "hours"), [(60, 1), (7300, 2), (9_000_000, 168)])
async def test_mistral_is_given_whole_hours_of_what_is_left(
    provider: MistralProvider, upstream: MistralBatchUpstream, left_s: float, hours: int
) -> None:
    native_id = await submit(upstream, job(expires_at=time.time() + left_s))

    assert provider.jobs[native_id]["timeout_hours"] == hours


async def test_responses_and_embeddings_are_answered_as_such(
    provider: MistralProvider, upstream: MistralBatchUpstream
) -> None:
    spoken = job("nat-1", endpoint="/v1/responses")
    embedded = job("nat-2", endpoint=EMBEDDINGS, model="mistral-embed")
    first = await submit(upstream, spoken, input="Hello.")
    second = await submit(upstream, embedded, input=["a", "b"])
    assert provider.jobs[first]["endpoint"] == "/v1/chat/completions"
    assert provider.jobs[second]["endpoint"] == EMBEDDINGS
    found: list[Any] = []

    for the_job, native_id in ((spoken, first), (embedded, second)):
        provider.end(native_id)
        status = await upstream.check(the_job, native_id)
        [result] = [each async for each in upstream.results(the_job, native_id, status)]
        assert result.reply is not None
        found.append(json.loads(result.reply.body))

    assert found[0]["output"][0]["content"][0]["text"] == "Hello."
    assert len(found[1]["data"]) == 2


async def test_a_line_that_cannot_be_said_gets_a_400_that_names_the_field(
    upstream: MistralBatchUpstream,
) -> None:
    body = {"messages": [{"role": "user", "content": "Hello."}], "logit_bias": {"5": 1}}

    reply = upstream.encode(job(), NativeLine(custom_id="l1", body=json.dumps(body).encode()))

    assert isinstance(reply, Reply)
    assert reply.status_code == 400
    assert json.loads(reply.body)["error"]["param"] == "logit_bias"


async def test_a_job_is_found_behind_many_others_and_old_ones_are_not_looked_through(
    provider: MistralProvider, upstream: MistralBatchUpstream
) -> None:
    began = time.time()
    wanted = await submit(upstream, job("nat-0"))
    details = {"input_file": provider.jobs[wanted]["input_files"][0]}
    for n in range(250):
        new = {**provider.jobs[wanted], "id": f"j{n}", "input_files": [f"f{n}"]}
        provider.jobs[f"j{n}"] = new | {"metadata": None}

    assert await upstream.find(job("nat-0"), details, since=began) == wanted
    assert provider.calls.count(LIST) == 3
    for each in provider.jobs.values():
        each["created_at"] -= 86400
    assert await upstream.find(job("nat-9"), {"input_file": "f"}, since=began) is None
    assert provider.calls.count(LIST) == 4


async def test_a_file_whose_job_was_refused_is_deleted(
    provider: MistralProvider, upstream: MistralBatchUpstream
) -> None:
    provider.spoil(CREATE, Trouble(status=400))

    with pytest.raises(JobRefused):
        await submit(upstream, job())

    assert provider.files == {}


async def test_why_a_job_failed_is_told(
    provider: MistralProvider, upstream: MistralBatchUpstream
) -> None:
    native_id = await submit(upstream, job())
    provider.jobs[native_id] |= {
        "status": "FAILED",
        "errors": [{"message": "Bad.", "count": 2}],
    }

    status = await upstream.check(job(), native_id)

    assert status.state is NativeState.FAILED
    assert status.message == "Bad."


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b'{"custom_id":"l1","response":null,"error":null}', Lack.LOST),
        (b'{"custom_id":"l1","response":7}', Lack.LOST),
        (b'{"custom_id":"l1","error":{"message":"Odd."}}', Failure.INVALID),
        (b'{"custom_id":"l1","error":"Odd."}', Failure.INVALID),
        (b'{"custom_id":"l1","response":{"status_code":200,"body":{}}}', Failure.INVALID),
        (b'{"custom_id":"l1","response":{"status_code":429,"body":"{}"}}', None),
    ],
)
def test_every_kind_of_result_line_is_understood(
    text: bytes, told: Lack | Failure | None
) -> None:
    result = read_result(text, job(), created_at=1)

    assert result is not None
    assert result.custom_id == "l1"
    assert told in (result.lack, result.reply.failure if result.reply else "no reply")


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"[" * 2000, b"\xff"])
def test_a_line_that_is_of_no_line_is_none(text: bytes) -> None:
    assert read_result(text, job(), created_at=1) is None


def test_a_key_that_cannot_be_sent_is_refused_and_not_told() -> None:
    with pytest.raises(InvalidSettings) as caught:
        MistralBatchUpstream(name="m", base_url="http://h", api_key="secret\n")

    assert "secret" not in str(caught.value)


# The whole way


def bench(data_dir: Path, provider: MistralProvider, **upstream: Any) -> Bench:
    one = {"kind": "mistral", "api_key": KEY, **upstream}
    return Bench(data_dir, provider, upstream=one, natives=HASTY, worker={"slice_requests": 4})


def texts(lines: list[Any]) -> list[str]:
    return [each["response"]["body"]["choices"][0]["message"]["content"] for each in lines]


async def test_a_batch_is_run_as_one_job_and_answered_in_openais_form(
    tmp_path: Path, provider: MistralProvider
) -> None:
    async def is_taken() -> bool:
        return bool(provider.jobs)

    async with bench(tmp_path, provider, mode="native") as it:
        batch = await it.create(*NAMES)
        await until(is_taken)
        provider.end(next(iter(provider.jobs)))
        ended = await it.wait_until_ended(batch)
        output, errors = await it.results(batch)

    assert ended.status is BatchStatus.COMPLETED
    assert ended.counts == Counts(total=10, completed=10, failed=0)
    assert ids(output) == texts(output) == NAMES
    assert errors == []
    assert CHAT not in provider.calls


async def test_what_a_job_cost_is_known_from_list_prices(
    tmp_path: Path, provider: MistralProvider
) -> None:
    names = ("mistral-small-latest", "nobody-knows-me")

    async def are_taken() -> bool:
        return len(provider.jobs) == len(names)

    async with bench(tmp_path, provider, mode="native") as it:
        batch = await it.create_from(
            b"".join(line(n + x, model=n) for n in names for x in "ab")
        )
        await until(are_taken)
        for native_id in provider.jobs:
            provider.end(native_id)
        await it.wait_until_ended(batch)

        async def are_counted() -> bool:
            runs = await it.store.list_native_runs(batch.id)
            return all(run.spent is not None for run in runs)

        await until(are_counted)
        items = await it.app.service.get_costs(it.app.project_id, batch.id)

    by_model = {item.model: item for item in items}
    assert set(by_model) == set(names)
    known, unknown = (by_model[name] for name in names)
    assert (
        known.usage == unknown.usage == Usage(input_tokens=6, output_tokens=4, total_tokens=10)
    )
    assert known.cost.source is not None
    assert known.cost.source.startswith("genai-prices")
    assert known.cost.usd is not None
    assert known.cost.by_line_usd == 2 * known.cost.usd > 0
    assert unknown.cost == UNKNOWN


async def test_what_a_job_leaves_is_sent_line_by_line(
    tmp_path: Path, provider: MistralProvider
) -> None:
    async def is_taken() -> bool:
        return bool(provider.jobs)

    async with bench(tmp_path, provider, mode="native", fallback="lines") as it:
        batch = await it.create(*NAMES)
        await until(is_taken)
        provider.end(next(iter(provider.jobs)), "TIMEOUT_EXCEEDED", only=6)
        await it.wait_until_ended(batch)
        output, _ = await it.results(batch)

    assert texts(output) == NAMES
    assert provider.calls.count(CHAT) == 4


async def test_line_by_line_a_refusal_is_said_in_openais_form(
    tmp_path: Path, provider: MistralProvider
) -> None:
    provider.behave = lambda custom_id, body: (400, fault("No."))

    async with bench(tmp_path, provider) as it:
        batch = await it.create("a")
        await it.wait_until_ended(batch)
        _, [error] = await it.results(batch)

    assert error["response"]["status_code"] == 400
    assert error["response"]["body"]["error"]["message"] == "No."


async def test_the_checkup_lists_its_models(provider: MistralProvider) -> None:
    settings = Upstream(
        name="m", kind="mistral", base_url=provider.base_url, api_key=KEY, models=("mistral-*",)
    )

    finding = await check_upstream(settings)

    assert finding.verdict is Verdict.OK
