"""The adapter for Gemini at Vertex AI: the contract, and what is its own."""

import json
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import InvalidSettings, JobNotTaken, JobRefused, UpstreamDown
from penstock.testing.native import BatchUpstreamContract, body_of, nobody_notes
from penstock.upstream.base import (
    BatchUpstream,
    Lack,
    NativeJob,
    NativeLine,
    NativeResult,
    NativeState,
    Reply,
)
from penstock.upstream.vertex_batch import (
    BUCKET_HEADER,
    REGION_HEADER,
    VertexBatchUpstream,
)
from tests.providers import vertex_server
from tests.providers.buckets import Buckets
from tests.providers.far import FarProvider
from tests.providers.openai_server import Trouble
from tests.providers.vertex_server import CREATE, LIST, PROJECT, REGION, TOKEN, VertexProvider

FLASH = "gemini-2.5-flash"
RETRIES = 2
"""How often the storage is asked again."""
STATES = {
    NativeState.ENDED: "SUCCEEDED",
    NativeState.EXPIRED: "EXPIRED",
    NativeState.CANCELLED: "CANCELLED",
}


class FarVertex(FarProvider):
    """The fake provider, as the contract kit speaks to it."""

    create = CREATE

    def custom_ids(self, native_id: str) -> list[str]:
        return [vertex_server.name_of(row) for row in self._provider.rows_of(native_id)]

    def end(
        self,
        native_id: str,
        state: NativeState,
        *,
        texts: Mapping[str, str],
        statuses: Mapping[str, int],
    ) -> None:
        def behave(name: str, request: dict[str, Any]) -> dict[str, Any] | None:
            if name in texts:
                return vertex_server.gemini(texts[name])
            if name in statuses:
                return vertex_server.failed(statuses[name], "No.")
            return None

        self._provider.behave = behave
        self._provider.end(native_id, STATES[state])

    def cut_results(self) -> None:
        listing, cut = Trouble(), Trouble(is_cut=True)
        self._provider.buckets.spoil("GET", listing, *[cut] * (1 + RETRIES))


@pytest.fixture(scope="module")
def buckets() -> Iterator[Buckets]:
    with Buckets() as buckets:
        yield buckets


@pytest.fixture
def bucket(buckets: Buckets) -> str:
    return buckets.create()


@pytest.fixture
async def provider(
    buckets: Buckets, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[VertexProvider]:
    async with VertexProvider(buckets) as provider:
        monkeypatch.setattr(buckets, "may_enter", provider.lets_in)
        yield provider


@pytest.fixture
async def upstream(
    provider: VertexProvider, bucket: str, tmp_path: Path
) -> AsyncIterator[VertexBatchUpstream]:
    upstream = open_upstream(provider, bucket, service_account=provider.key_file(tmp_path))
    yield upstream
    await upstream.close()


def open_upstream(
    provider: VertexProvider | None, bucket: str, **more: Any
) -> VertexBatchUpstream:
    usual: dict[str, Any] = {
        "name": "hosted",
        "project": PROJECT,
        "region": REGION,
        "storage": f"gs://{bucket}/batches/all",
        "endpoint": provider and provider.url,
        "storage_endpoint": provider and provider.buckets.url,
        "find_after_s": 0.05,
    }
    return VertexBatchUpstream(**(usual | more))


class TestVertexBatchUpstream(BatchUpstreamContract):
    model = FLASH

    @pytest.fixture
    def far_side(self, provider: VertexProvider) -> FarVertex:
        return FarVertex(provider)

    async def test_no_message_holds_the_key(
        self, provider: VertexProvider, upstream: BatchUpstream, bucket: str
    ) -> None:
        provider.spoil(CREATE, Trouble(status=401))
        with pytest.raises(JobRefused) as refused:
            await self.submit(upstream, self.job(upstream))
        provider.buckets.may_enter = lambda authorization: False
        with pytest.raises(JobRefused, match=f"{bucket}/batches/all.*AccessDenied") as denied:
            await self.submit(upstream, self.job(upstream))

        for told in (str(refused.value), str(denied.value)):
            assert not any(token in told for token in provider.tokens)


def job(key: str = "nat-01234567", **more: Any) -> NativeJob:
    usual = {
        "key": key,
        "display_name": "Reviews of été",
        "endpoint": "/v1/chat/completions",
        "model": FLASH,
        "requests": 2,
        "expires_at": time.time() + 3600,
    }
    return NativeJob(**(usual | more))


async def submit(
    upstream: VertexBatchUpstream, asked: NativeJob, *, lines: int = 2, body: bytes = b""
) -> str:
    async def records() -> AsyncIterator[bytes]:
        for number in range(1, lines + 1):
            said = body or body_of(f"prompt {number}", asked.model)
            record = upstream.encode(asked, NativeLine(custom_id=f"l{number}", body=said))
            assert isinstance(record, bytes)
            yield record

    return await upstream.submit(asked, records(), nobody_notes)


async def results(
    upstream: VertexBatchUpstream, asked: NativeJob, name: str
) -> list[NativeResult]:
    status = await upstream.check(asked, name)
    return [result async for result in upstream.results(asked, name, status)]


async def test_a_job_says_what_it_is_and_where_its_files_are(
    provider: VertexProvider, upstream: VertexBatchUpstream, bucket: str
) -> None:
    name = await submit(upstream, job(display_name="é" * 200))

    created = provider.jobs[name]
    place = f"gs://{bucket}/batches/all/nat-01234567"
    assert name.startswith(f"projects/{PROJECT}/locations/{REGION}/batchPredictionJobs/")
    assert created["displayName"] == "é" * 128
    assert created["labels"] == {"penstock_job": "nat-01234567"}
    assert created["model"] == "publishers/google/models/gemini-2.5-flash"
    assert created["inputConfig"]["gcsSource"]["uris"] == [f"{place}/input.jsonl"]
    told = created["outputConfig"]["gcsDestination"]["outputUriPrefix"]
    assert told == f"{place}/output"


async def test_headers_of_the_client_name_bucket_and_region(
    provider: VertexProvider, upstream: VertexBatchUpstream, buckets: Buckets
) -> None:
    other, began = buckets.create(), time.time()
    headers = {BUCKET_HEADER: other, REGION_HEADER: "europe-west4"}
    asked = job(parameters=headers)

    name = await submit(upstream, asked)
    found = await upstream.find(asked, {"bucket": other}, since=began)
    provider.end(name)

    assert found == name
    assert "/locations/europe-west4/" in name
    assert len(await results(upstream, asked, name)) == 2
    await upstream.clean_up(asked, {"bucket": other})
    assert buckets.names(other) == []


@pytest.mark.parametrize(
    ("header", "wrong"),
    [
        (BUCKET_HEADER, "no/bucket"),
        (REGION_HEADER, "evil.example/"),
    ],
)
async def test_headers_that_cannot_be_are_refused(
    header: str, wrong: str, upstream: VertexBatchUpstream
) -> None:
    async def records() -> AsyncIterator[bytes]:
        yield b"{}"

    with pytest.raises(JobRefused, match=re.escape(wrong)):
        await upstream.submit(job(parameters={header: wrong}), records(), nobody_notes)


async def test_a_model_of_another_publisher_is_refused(upstream: VertexBatchUpstream) -> None:
    async def records() -> AsyncIterator[bytes]:
        yield b"{}"

    with pytest.raises(JobRefused, match="publishers/other/models/x is not a model"):
        await upstream.submit(job(model="publishers/other/models/x"), records(), nobody_notes)


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("gemini-2.5-flash", "publishers/google/models/gemini-2.5-flash"),
        ("google/gemini-2.5-flash", "publishers/google/models/gemini-2.5-flash"),
        ("publishers/google/models/gemini-2.5-pro", "publishers/google/models/gemini-2.5-pro"),
        ("projects/p/locations/us-central1/models/123", None),
    ],
)
async def test_models_by_all_their_names(
    model: str, path: str | None, provider: VertexProvider, upstream: VertexBatchUpstream
) -> None:
    name = await submit(upstream, job(model=model))

    assert provider.jobs[name]["model"] == (path or model)


def test_a_model_of_another_publisher_fails_its_line(upstream: VertexBatchUpstream) -> None:
    asked = job(model="publishers/anthropic/models/claude-sonnet-4-5")

    reply = upstream.encode(asked, NativeLine(custom_id="l1", body=body_of("Hi.", "m")))

    assert isinstance(reply, Reply)
    assert json.loads(reply.body)["error"]["param"] == "model"


async def test_one_token_serves_until_it_ends(
    provider: VertexProvider, upstream: VertexBatchUpstream
) -> None:
    name = await submit(upstream, job())
    await upstream.check(job(), name)

    assert provider.calls.count(TOKEN) == 1


async def test_googles_own_chain_is_asked_without_a_key_file(
    provider: VertexProvider, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(provider.key_file(tmp_path)))
    upstream = open_upstream(provider, bucket)

    name = await submit(upstream, job())

    assert list(provider.jobs) == [name]
    await upstream.close()


async def test_without_a_token_nothing_is_taken(
    provider: VertexProvider, bucket: str, tmp_path: Path
) -> None:
    upstream = open_upstream(provider, bucket, service_account=provider.key_file(tmp_path))
    provider.spoil(TOKEN, *[Trouble(status=401)] * 20)

    with pytest.raises(JobNotTaken, match="has no token of Google: RefreshError"):
        await submit(upstream, job())
    with pytest.raises(UpstreamDown, match="has no token of Google: RefreshError"):
        await upstream.check(job(), "projects/p/locations/l/batchPredictionJobs/1")

    assert provider.jobs == {}
    await upstream.close()


async def test_all_that_a_job_has_left_is_deleted_and_nothing_else(
    provider: VertexProvider, upstream: VertexBatchUpstream, buckets: Buckets, bucket: str
) -> None:
    first, second = job("nat-01234567"), job("nat-01234567-2")
    names = [await submit(upstream, each) for each in (first, second)]
    provider.end(names[0])
    status = await upstream.check(first, names[0])

    await upstream.clean_up(first, {"bucket": bucket, **status.details})

    assert buckets.names(bucket) == ["batches/all/nat-01234567-2/input.jsonl"]


async def test_the_input_of_a_job_that_was_refused_is_deleted(
    provider: VertexProvider, upstream: VertexBatchUpstream, buckets: Buckets, bucket: str
) -> None:
    provider.spoil(CREATE, Trouble(status=400))

    with pytest.raises(JobRefused, match=r"did not create a job \(HTTP 400\): Not now\."):
        await submit(upstream, job())

    assert buckets.names(bucket) == []


async def test_a_job_is_found_on_any_page_by_its_label(
    provider: VertexProvider, upstream: VertexBatchUpstream, bucket: str
) -> None:
    provider.page = 1
    name = await submit(upstream, job())
    twin = provider.jobs[name] | {
        "name": f"{name}0",
        "labels": {"penstock_job": "nat-01234567"},
    }
    provider.jobs = {f"{name}0": twin | {"labels": {}}, name: provider.jobs[name]}

    assert await upstream.find(job(), {"bucket": bucket}, since=time.time()) == name
    assert await upstream.find(job("nat-0123"), {"bucket": bucket}, since=time.time()) is None


async def test_nothing_is_looked_for_that_was_never_created(
    provider: VertexProvider, upstream: VertexBatchUpstream
) -> None:
    assert await upstream.find(job(), {}, since=time.time()) is None
    assert LIST not in provider.calls


@pytest.mark.parametrize(
    ("told", "state"),
    [
        ("QUEUED", NativeState.PENDING),
        ("PENDING", NativeState.PENDING),
        ("RUNNING", NativeState.RUNNING),
        ("UPDATING", NativeState.RUNNING),
        ("PAUSED", NativeState.RUNNING),
        ("CANCELLING", NativeState.RUNNING),
        ("SOMETHING_NEW", NativeState.RUNNING),
        ("SUCCEEDED", NativeState.ENDED),
        ("PARTIALLY_SUCCEEDED", NativeState.ENDED),
        ("FAILED", NativeState.FAILED),
        ("CANCELLED", NativeState.CANCELLED),
        ("EXPIRED", NativeState.EXPIRED),
    ],
)
async def test_each_state_of_google_is_one_of_ours(
    told: str, state: NativeState, provider: VertexProvider, upstream: VertexBatchUpstream
) -> None:
    name = await submit(upstream, job())
    provider.move(name, told)

    assert (await upstream.check(job(), name)).state is state


@pytest.mark.parametrize(
    ("code", "done", "may_pass"),
    [(8, "0", True), (14, "0", True), (8, "1", False), (3, "0", False)],
)
async def test_a_failed_job_says_why_and_whether_it_may_pass(
    code: int,
    done: str,
    may_pass: bool,
    provider: VertexProvider,
    upstream: VertexBatchUpstream,
) -> None:
    name = await submit(upstream, job())
    error = {"code": code, "message": "Failed to import data."}
    provider.move(name, "FAILED", error=error, completionStats={"successfulCount": done})

    status = await upstream.check(job(), name)

    assert (status.message, status.may_pass) == ("Failed to import data.", may_pass)


async def test_shards_counts_errors_and_odd_rows_are_told_apart(
    provider: VertexProvider, upstream: VertexBatchUpstream
) -> None:
    odd = {
        "l1": vertex_server.failed(429, "Slow down.", "Too Many Requests"),
        "l2": {"status": "", "response": {}},
        "l3": {"status": "Something new.", "response": {}},
        "l4": None,
    }
    provider.behave = lambda name, request: odd.get(name, vertex_server.echo(name, request))
    labels = {"labels": {"penstock_line": "line-l5"}}
    twice = {"request": labels, **vertex_server.gemini("again")}
    provider.extra_lines = [b"{no JSON", b'{"a":1}', b"\xff", json.dumps(twice).encode()]
    provider.file_names = [
        "incremental_predictions.jsonl",
        "predictions.jsonl-00000-of-00002",
        "predictions.jsonl-00001-of-00002",
    ]
    name = await submit(upstream, job(), lines=20)
    provider.end(name, "PARTIALLY_SUCCEEDED")

    status = await upstream.check(job(), name)
    found = [result async for result in upstream.results(job(), name, status)]

    assert (status.completed, status.failed) == (17, 2)
    assert len(found) == 20  # one is not there, one twice
    by_name = {result.custom_id: result for result in found}
    slow, new = by_name["l1"].reply, by_name["l3"].reply
    assert slow is not None
    assert slow.status_code == 429
    assert json.loads(slow.body)["error"]["message"] == "Slow down."
    assert new is not None
    assert (new.status_code, "Something new." in new.body.decode()) == (500, True)
    assert by_name["l2"].lack is Lack.LOST
    assert "l4" not in by_name


async def test_a_job_that_ended_without_a_file_says_so(
    provider: VertexProvider, upstream: VertexBatchUpstream
) -> None:
    name = await submit(upstream, job())
    provider.move(name, "SUCCEEDED")

    with pytest.raises(JobRefused, match="has left no results"):
        await results(upstream, job(), name)
    provider.move(name, "EXPIRED")
    assert await results(upstream, job(), name) == []


async def test_embeddings_go_there_and_back(
    provider: VertexProvider, upstream: VertexBatchUpstream
) -> None:
    response = {"embedding": {"values": [0.25, -1.0]}, "tokenCount": "4"}
    provider.behave = lambda name, request: {"status": "", "response": response}
    asked = job(endpoint="/v1/embeddings", model="gemini-embedding-001")
    body = {"model": "gemini-embedding-001", "input": "Hello.", "dimensions": 768}

    name = await submit(upstream, asked, body=json.dumps(body).encode())
    provider.end(name)

    assert provider.rows_of(name)[0] == {
        "key": "line-l1",
        "request": {
            "content": {"parts": [{"text": "Hello."}]},
            "embed_content_config": {"output_dimensionality": 768},
        },
    }
    reply = (await results(upstream, asked, name))[0].reply
    assert reply is not None
    assert json.loads(reply.body)["data"][0]["embedding"] == [0.25, -1.0]
    assert reply.input_tokens == 4


async def test_a_cancel_that_is_refused_while_the_job_goes_on_is_told(
    provider: VertexProvider, upstream: VertexBatchUpstream
) -> None:
    name = await submit(upstream, job())
    provider.spoil(vertex_server.CANCEL, Trouble(status=400))

    with pytest.raises(UpstreamDown):
        await upstream.cancel(job(), name)


async def test_an_id_that_is_none_of_googles_is_refused(upstream: VertexBatchUpstream) -> None:
    with pytest.raises(JobRefused, match=r"has no job '\.\./secrets'"):
        await upstream.check(job(), "../secrets")


def test_without_google_auth_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "google.auth", None)

    with pytest.raises(InvalidSettings, match=r"install the extra vertex"):
        open_upstream(None, "bucket")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"region": "us/central"}, "region of upstream hosted is 'us/central'"),
        ({"project": "a b"}, "project of upstream hosted is 'a b'"),
        ({"storage": "s3://bucket"}, "gs://bucket/folder"),
        ({"service_account": Path("/nowhere/key.json")}, "/nowhere/key.json, is not the file"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidSettings, match=re.escape(told)):
        open_upstream(None, "bucket", **wrong)


async def test_a_large_file_goes_up_in_parts(
    provider: VertexProvider, upstream: VertexBatchUpstream
) -> None:
    body = body_of("x" * 600_000, FLASH)

    name = await submit(upstream, job(), lines=60, body=body)

    assert any("POST" in call for call in provider.buckets.calls)  # which begins and ends parts
    assert [vertex_server.name_of(row) for row in provider.rows_of(name)][-1] == "l60"
