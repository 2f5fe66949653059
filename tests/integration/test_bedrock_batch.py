"""The adapter for Amazon Bedrock's batch inference: the contract, and what is its own."""

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import boto3
import botocore.config
import pytest
from botocore.exceptions import ClientError

from penstock.errors import InvalidSettings, JobNotTaken, JobRefused, UpstreamDown
from penstock.testing.native import BatchUpstreamContract, body_of, nobody_notes
from penstock.upstream.base import (
    BatchUpstream,
    Lack,
    NativeJob,
    NativeLine,
    NativeState,
    Reply,
)
from penstock.upstream.bedrock_batch import (
    BUCKET_HEADER,
    LIMITS,
    BedrockBatchUpstream,
    job_name,
)
from tests.providers import bedrock_server
from tests.providers.bedrock_server import CREATE, LIST, REGION, ROLE, BedrockProvider
from tests.providers.buckets import Buckets
from tests.providers.far import FarProvider
from tests.providers.openai_server import Trouble

CLAUDE = "anthropic.claude-sonnet-4-5-20250929-v1:0"
TITAN = "amazon.titan-embed-text-v2:0"
RETRIES = 2
"""How often the storage is asked again."""
STATES = {
    NativeState.ENDED: "Completed",
    NativeState.EXPIRED: "PartiallyCompleted",
    NativeState.CANCELLED: "Stopped",
}


class FarBedrock(FarProvider):
    """The fake provider, as the contract kit speaks to it."""

    create = CREATE

    def custom_ids(self, native_id: str) -> list[str]:
        return [record["recordId"] for record in self._provider.records_of(native_id)]

    def end(
        self,
        native_id: str,
        state: NativeState,
        *,
        texts: Mapping[str, str],
        statuses: Mapping[str, int],
    ) -> None:
        def behave(record_id: str, model_input: dict[str, Any]) -> dict[str, Any] | None:
            if record_id in texts:
                return bedrock_server.claude(texts[record_id])
            if record_id in statuses:
                return bedrock_server.failed(statuses[record_id], "No.")
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
) -> AsyncIterator[BedrockProvider]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", bedrock_server.ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", bedrock_server.SECRET_KEY)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(
        buckets, "may_enter", lambda told: f"Credential={bedrock_server.ACCESS_KEY}/" in told
    )
    async with BedrockProvider(buckets) as provider:
        yield provider
    buckets.spoil("GET")


@pytest.fixture
async def upstream(
    provider: BedrockProvider, buckets: Buckets, bucket: str
) -> AsyncIterator[BedrockBatchUpstream]:
    upstream = open_upstream(provider.url, buckets.url, f"s3://{bucket}/batches/all")
    yield upstream
    await upstream.close()


def open_upstream(
    endpoint: str | None, storage_endpoint: str | None, storage: str, **more: str
) -> BedrockBatchUpstream:
    usual = {"name": "hosted", "region": REGION, "role_arn": ROLE}
    return BedrockBatchUpstream(
        **(usual | more),
        storage=storage,
        endpoint=endpoint,
        storage_endpoint=storage_endpoint,
        find_after_s=0.05,
    )


class TestBedrockBatchUpstream(BatchUpstreamContract):
    model = CLAUDE
    lines = 100  # the fewest that Bedrock takes

    @pytest.fixture
    def far_side(self, provider: BedrockProvider) -> FarBedrock:
        return FarBedrock(provider)

    async def test_no_message_holds_the_key(
        self, provider: BedrockProvider, upstream: BatchUpstream, bucket: str
    ) -> None:
        provider.spoil(CREATE, Trouble(status=401))
        with pytest.raises(JobRefused) as refused:
            await self.submit(upstream, self.job(upstream))
        provider.buckets.may_enter = lambda authorization: False
        with pytest.raises(JobRefused, match=f"{bucket}/batches/all.*AccessDenied") as denied:
            await self.submit(upstream, self.job(upstream))

        for told in (str(refused.value), str(denied.value)):
            assert bedrock_server.ACCESS_KEY not in told
            assert bedrock_server.SECRET_KEY not in told


def job(key: str = "nat-01234567", **more: Any) -> NativeJob:
    usual = {
        "key": key,
        "display_name": "Reviews",
        "endpoint": "/v1/chat/completions",
        "model": CLAUDE,
        "requests": 100,
        "expires_at": time.time() + 3600,
    }
    return NativeJob(**(usual | more))


async def submit(
    upstream: BedrockBatchUpstream, asked: NativeJob, *, lines: int = 100, body: bytes = b""
) -> str:
    async def records() -> AsyncIterator[bytes]:
        for number in range(1, lines + 1):
            said = body or body_of(f"prompt {number}", asked.model)
            record = upstream.encode(asked, NativeLine(custom_id=f"l{number}", body=said))
            assert isinstance(record, bytes)
            yield record

    return await upstream.submit(asked, records(), nobody_notes)


async def replies(
    upstream: BedrockBatchUpstream, asked: NativeJob, arn: str
) -> dict[str, Reply | None]:
    status = await upstream.check(asked, arn)
    return {
        result.custom_id: result.reply async for result in upstream.results(asked, arn, status)
    }


async def test_a_job_says_where_its_files_are_and_how_long_it_may_take(
    provider: BedrockProvider, upstream: BedrockBatchUpstream, bucket: str
) -> None:
    asked = job(display_name="Été & reviews, 2nd!", expires_at=time.time() + 40.5 * 3600)

    arn = await submit(upstream, asked)

    created = provider.jobs[arn]
    place = f"s3://{bucket}/batches/all/nat-01234567"
    assert created["jobName"] == "t-reviews-2nd-nat-01234567"
    assert created["clientRequestToken"] == "penstock-nat-01234567-job"
    assert created["modelId"] == CLAUDE
    assert created["roleArn"] == ROLE
    told = created["inputDataConfig"]["s3InputDataConfig"]
    assert told == {"s3InputFormat": "JSONL", "s3Uri": f"{place}/input.jsonl"}
    assert created["outputDataConfig"]["s3OutputDataConfig"] == {"s3Uri": f"{place}/output/"}
    assert created["timeoutDurationInHours"] == 41


@pytest.mark.parametrize(
    ("display_name", "key"),
    [("x" * 300, "nat-" + "0" * 32), ("…", "nat-01234567"), ("--", "a" * 8), ("a-", "a" * 36)],
)
def test_a_jobs_name_is_one_that_amazon_takes_and_ends_with_the_key(
    display_name: str, key: str
) -> None:
    name = job_name(job(key, display_name=display_name))

    assert re.fullmatch(r"[a-zA-Z0-9]{1,63}(-*[a-zA-Z0-9\+\-\.]){0,63}", name)
    assert len(name) <= 63
    assert name.endswith(f"-{key}")


@pytest.mark.parametrize(("hours", "asked"), [(-1, 24), (1, 24), (24.2, 25), (1000, 168)])
async def test_the_time_of_a_job_is_in_the_range_that_amazon_allows(
    hours: float, asked: int, provider: BedrockProvider, upstream: BedrockBatchUpstream
) -> None:
    arn = await submit(upstream, job(expires_at=time.time() + hours * 3600))

    assert provider.jobs[arn]["timeoutDurationInHours"] == asked


async def test_a_header_of_the_client_names_the_bucket(
    provider: BedrockProvider, upstream: BedrockBatchUpstream, buckets: Buckets
) -> None:
    other = buckets.create()
    asked = job(model="us." + CLAUDE, parameters={BUCKET_HEADER: other})

    arn = await submit(upstream, asked)
    provider.end(arn)

    assert provider.jobs[arn]["modelId"] == "us." + CLAUDE
    assert len(await replies(upstream, asked, arn)) == 100
    assert all(name.startswith("batches/all/nat-01234567/") for name in buckets.names(other))
    await upstream.clean_up(asked, {"bucket": other})
    assert buckets.names(other) == []


async def test_a_header_that_names_no_bucket_is_refused(upstream: BedrockBatchUpstream) -> None:
    asked = job(parameters={BUCKET_HEADER: "No/bucket"})

    with pytest.raises(JobRefused, match="x-tfy-aws-s3-bucket is 'No/bucket'"):
        await submit(upstream, asked)


async def test_all_that_a_job_has_left_is_deleted_and_nothing_else(
    provider: BedrockProvider, upstream: BedrockBatchUpstream, buckets: Buckets, bucket: str
) -> None:
    first, second = job("nat-01234567"), job("nat-01234567-2")
    arns = [await submit(upstream, each) for each in (first, second)]
    provider.end(arns[0])
    kept = [name for name in buckets.names(bucket) if "/nat-01234567-2/" in name]
    status = await upstream.check(first, arns[0])

    await upstream.clean_up(first, {"bucket": bucket, **status.details})

    assert buckets.names(bucket) == kept == ["batches/all/nat-01234567-2/input.jsonl"]


async def test_the_input_of_a_job_that_was_refused_is_deleted(
    provider: BedrockProvider, upstream: BedrockBatchUpstream, buckets: Buckets, bucket: str
) -> None:
    provider.spoil(CREATE, Trouble(status=400))

    with pytest.raises(JobRefused):
        await submit(upstream, job())

    assert buckets.names(bucket) == []


@pytest.mark.parametrize(
    ("error_type", "error"),
    [
        ("ServiceQuotaExceededException", JobNotTaken),  # a 400, but it passes
        ("ThrottlingException", JobNotTaken),
        ("ConflictException", UpstreamDown),  # a 400, but the job may be there
        ("ValidationException", JobRefused),
        ("AccessDeniedException", JobRefused),
        ("InternalServerException", UpstreamDown),
    ],
)
async def test_what_an_error_of_amazon_means_for_a_job(
    error_type: str,
    error: type[Exception],
    provider: BedrockProvider,
    upstream: BedrockBatchUpstream,
) -> None:
    provider.refuse(error_type)

    with pytest.raises(error, match=r"did not create a job \(HTTP \d+\): No\."):
        await submit(upstream, job())


async def test_a_storage_that_fails_has_taken_no_job(
    provider: BedrockProvider, upstream: BedrockBatchUpstream, buckets: Buckets
) -> None:
    buckets.spoil("PUT", *[Trouble(status=503)] * (1 + RETRIES))

    with pytest.raises(JobNotTaken, match="did not take a file of requests"):
        await submit(upstream, job())

    assert provider.calls == []


async def test_a_bucket_that_is_not_there_is_refused(
    provider: BedrockProvider, buckets: Buckets
) -> None:
    upstream = open_upstream(provider.url, buckets.url, "s3://nowhere-0123")

    with pytest.raises(
        JobRefused, match=r"nowhere-0123/nat-01234567/input.jsonl: NoSuchBucket"
    ):
        await submit(upstream, job())

    await upstream.close()


async def test_what_records_raise_comes_out_of_a_submission(
    provider: BedrockProvider, upstream: BedrockBatchUpstream
) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"{}"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await upstream.submit(job(), broken(), nobody_notes)

    assert provider.calls == []


async def test_a_large_file_goes_up_in_parts(
    provider: BedrockProvider, upstream: BedrockBatchUpstream
) -> None:
    body = json.dumps(
        {
            "model": CLAUDE,
            "max_tokens": 9,
            "messages": [{"role": "user", "content": "x" * 600_000}],
        }
    ).encode()

    arn = await submit(upstream, job(), lines=60, body=body)

    assert any("POST" in call for call in provider.buckets.calls)  # which begins and ends parts
    assert [record["recordId"] for record in provider.records_of(arn)][-1] == "l60"
    provider.min_records = 1
    provider.end(arn)
    assert len(await replies(upstream, job(), arn)) == 60


async def test_a_job_is_found_on_any_page_by_the_end_of_its_name(
    provider: BedrockProvider, upstream: BedrockBatchUpstream, bucket: str
) -> None:
    provider.page = 1
    began = time.time()
    arns = [await submit(upstream, job(f"nat-01234567{end}")) for end in ("", "-1", "-2")]

    found = await upstream.find(job(), {"bucket": bucket}, since=began)

    assert found == arns[0]
    assert provider.calls.count(LIST) == 3


async def test_nothing_is_looked_for_that_was_never_created(
    provider: BedrockProvider, upstream: BedrockBatchUpstream
) -> None:
    assert await upstream.find(job(), {}, since=time.time()) is None
    assert provider.calls == []


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("Submitted", NativeState.PENDING),
        ("Validating", NativeState.PENDING),
        ("Scheduled", NativeState.PENDING),
        ("InProgress", NativeState.RUNNING),
        ("Stopping", NativeState.RUNNING),
        ("SomethingNew", NativeState.RUNNING),
        ("Failed", NativeState.FAILED),
        ("Stopped", NativeState.CANCELLED),
        ("Expired", NativeState.EXPIRED),
        ("PartiallyCompleted", NativeState.EXPIRED),
        ("Completed", NativeState.ENDED),
    ],
)
async def test_each_status_of_amazon_is_a_state(
    status: str, state: NativeState, provider: BedrockProvider, upstream: BedrockBatchUpstream
) -> None:
    arn = await submit(upstream, job())
    provider.move(arn, status)

    assert (await upstream.check(job(), arn)).state is state


async def test_a_job_with_too_few_records_fails_and_says_why(
    provider: BedrockProvider, upstream: BedrockBatchUpstream
) -> None:
    assert LIMITS.min_requests == 100
    arn = await submit(upstream, job(), lines=99)
    provider.end(arn)

    status = await upstream.check(job(), arn)

    assert status.state is NativeState.FAILED
    assert status.message == (
        "Batch job contains less records (99) than the required minimum of: 100."
    )


async def test_counts_errors_and_odd_lines_are_told_apart(
    provider: BedrockProvider, upstream: BedrockBatchUpstream
) -> None:
    def behave(record_id: str, model_input: dict[str, Any]) -> dict[str, Any] | None:
        odd: dict[str, Callable[[], dict[str, Any] | None]] = {
            "l1": lambda: bedrock_server.failed(429, "Too many tokens."),
            "l2": dict,
            "l3": lambda: None,
        }
        return odd.get(record_id, lambda: bedrock_server.echo(record_id, model_input))()

    provider.behave = behave
    twice = {"recordId": "l4", "modelInput": {}, **bedrock_server.claude("again")}
    provider.extra_lines = [b"{not JSON", b'{"a":1}', b"\xff", json.dumps(twice).encode()]
    arn = await submit(upstream, job())
    provider.end(arn)

    status = await upstream.check(job(), arn)
    found = [result async for result in upstream.results(job(), arn, status)]

    assert (status.completed, status.failed) == (98, 1)
    by_name = {result.custom_id: result for result in found}
    assert len(found) == 100  # one is not there, one twice
    assert by_name["l1"].reply is not None
    assert by_name["l1"].reply.status_code == 429
    assert "Too many tokens." in by_name["l1"].reply.body.decode()
    assert by_name["l2"].lack is Lack.LOST
    assert "l3" not in by_name


async def test_a_job_that_ended_without_a_file_says_so(
    provider: BedrockProvider, upstream: BedrockBatchUpstream
) -> None:
    arn = await submit(upstream, job())
    provider.move(arn, "Completed")

    with pytest.raises(JobRefused, match="has left no results"):
        await replies(upstream, job(), arn)
    provider.move(arn, "Expired")
    assert await replies(upstream, job(), arn) == {}


async def test_a_hyphen_in_a_lines_name_goes_there_and_back(
    provider: BedrockProvider, upstream: BedrockBatchUpstream
) -> None:
    line = NativeLine(custom_id="a-1-b", body=body_of("Hi.", CLAUDE))
    record = upstream.encode(job(), line)
    assert isinstance(record, bytes)
    provider.min_records = 1

    async def records() -> AsyncIterator[bytes]:
        yield record

    arn = await upstream.submit(job(), records(), nobody_notes)
    provider.end(arn)

    assert provider.records_of(arn)[0]["recordId"].isalnum()
    assert list(await replies(upstream, job(), arn)) == ["a-1-b"]


async def test_embeddings_go_there_and_back(
    provider: BedrockProvider, upstream: BedrockBatchUpstream
) -> None:
    output = {"embedding": [0.25, -1.0], "inputTextTokenCount": 4}
    provider.behave = lambda record_id, model_input: {"modelOutput": output}
    asked = job(endpoint="/v1/embeddings", model=TITAN)
    body = json.dumps({"model": TITAN, "input": "Hello."}).encode()

    arn = await submit(upstream, asked, body=body)
    provider.end(arn)

    assert provider.records_of(arn)[0]["modelInput"] == {"inputText": "Hello."}
    reply = (await replies(upstream, asked, arn))["l7"]
    assert reply is not None
    assert json.loads(reply.body)["data"][0]["embedding"] == [0.25, -1.0]
    assert reply.input_tokens == 4


def test_a_line_that_cannot_be_translated_gets_a_400(upstream: BedrockBatchUpstream) -> None:
    line = NativeLine(custom_id="l1", body=body_of("Hi.", CLAUDE))

    reply = upstream.encode(job(model="unknown.model"), line)

    assert isinstance(reply, Reply)
    assert reply.status_code == 400
    assert json.loads(reply.body)["error"]["param"] == "model"


async def test_stopping_is_asked_again_while_amazon_is_down(
    provider: BedrockProvider, upstream: BedrockBatchUpstream
) -> None:
    arn = await submit(upstream, job())
    provider.refuse("ConflictException")

    with pytest.raises(UpstreamDown):
        await upstream.cancel(job(), arn)
    await upstream.cancel(job(), arn)

    assert provider.jobs[arn]["status"] == "Stopping"


async def test_without_credentials_nothing_is_taken(
    provider: BedrockProvider,
    upstream: BedrockBatchUpstream,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))

    with pytest.raises(JobNotTaken):
        await submit(upstream, job())
    with pytest.raises(UpstreamDown, match="no credentials of Amazon for the upstream hosted"):
        await upstream.check(job(), "x")


async def test_a_role_that_is_not_given_us_is_no_crash(
    provider: BedrockProvider,
    upstream: BedrockBatchUpstream,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
) -> None:
    config = tmp_path / "config"
    config.write_text(
        "[profile own]\naws_access_key_id = a\naws_secret_access_key = b\n"
        f"[profile role]\nrole_arn = {ROLE}\nsource_profile = own\nregion = {REGION}\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "role")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", provider.buckets.url)  # which answers 403
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")

    with pytest.raises(UpstreamDown, match=r"cannot be had: ClientError\.$"):
        await upstream.check(job(), "0" * 12)


def test_without_botocore_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "botocore.auth", None)

    with pytest.raises(InvalidSettings, match=r"install the extra bedrock"):
        open_upstream(None, None, "s3://bucket")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"region": "US East"}, "region of upstream hosted is 'US East'"),
        ({"region": "us-east-1.evil.example#"}, "region of upstream hosted"),
        ({"role_arn": "batch"}, "role_arn of upstream hosted is 'batch'"),
        ({"storage": "bucket"}, "batch_storage of upstream hosted is 'bucket'"),
        ({"storage": "gs://bucket"}, "s3://bucket/folder"),
        ({"storage": "s3://bucket/a b"}, "batch_storage of upstream hosted"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, str], told: str) -> None:
    with pytest.raises(InvalidSettings, match=re.escape(told)):
        open_upstream(None, None, **({"storage": "s3://bucket"} | wrong))


async def test_amazons_own_client_takes_the_fake_for_amazon(
    provider: BedrockProvider, bucket: str, buckets: Buckets
) -> None:
    client: Any = boto3.session.Session().client(
        "bedrock",
        region_name=REGION,
        endpoint_url=provider.url,
        config=botocore.config.Config(retries={"max_attempts": 0}),
    )
    asked: dict[str, Any] = {
        "jobName": "job.1",
        "roleArn": ROLE,
        "modelId": CLAUDE,
        "clientRequestToken": "token-1",
        "inputDataConfig": {"s3InputDataConfig": {"s3Uri": f"s3://{bucket}/in.jsonl"}},
        "outputDataConfig": {"s3OutputDataConfig": {"s3Uri": f"s3://{bucket}/out/"}},
    }
    call = asyncio.to_thread
    record = {"recordId": "a", "modelInput": {"messages": [{"content": "Hi."}]}}
    buckets.write(bucket, "in.jsonl", json.dumps(record).encode() + b"\n")
    provider.min_records = 1

    arn = (await call(client.create_model_invocation_job, **asked))["jobArn"]
    again = (await call(client.create_model_invocation_job, **asked))["jobArn"]
    listed = await call(client.list_model_invocation_jobs, nameContains="job", maxResults=5)
    provider.end(arn)
    got = await call(client.get_model_invocation_job, jobIdentifier=arn)

    assert again == arn
    assert [each["jobArn"] for each in listed["invocationJobSummaries"]] == [arn]
    assert got["status"] == "Completed"
    assert got["successRecordCount"] == 1
    for name, wrong in (
        ("stop_model_invocation_job", arn),
        ("get_model_invocation_job", "0" * 12),
    ):
        with pytest.raises(ClientError) as error:
            await call(getattr(client, name), jobIdentifier=wrong)
        kinds = ("ConflictException", "ResourceNotFoundException")
        assert error.value.response["Error"]["Code"] in kinds
    with pytest.raises(ClientError, match="JobName"):
        await call(client.create_model_invocation_job, **(asked | {"jobName": "_"}))
    client.close()
