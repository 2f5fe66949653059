"""Amazon Bedrock's batch inference: model invocation jobs, which read from and write to S3.

All that belongs to a job lies in a folder of its own, named by our key: the input, and below
`output` what Bedrock writes. The key is also the end of the job's name and part of its token of
idempotency, so a job whose creation brought no answer is found among those with such a name.

Sources: https://docs.aws.amazon.com/bedrock/latest/userguide/batch-inference-data.html,
https://docs.aws.amazon.com/bedrock/latest/userguide/batch-inference-results.html and
https://docs.aws.amazon.com/bedrock/latest/APIReference/API_CreateModelInvocationJob.html,
25 November 2026.
"""

import math
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from penstock.errors import (
    InvalidSettings,
    JobNotTaken,
    JobRefused,
    UpstreamDown,
)
from penstock.upstream.aws import AwsSigner
from penstock.upstream.base import (
    BatchLimits,
    Details,
    Lack,
    NativeJob,
    NativeLine,
    NativeResult,
    NativeState,
    NativeStatus,
    Note,
    Reply,
)
from penstock.upstream.cloud_storage import (
    INPUT,
    CloudStorage,
    Place,
    job_place,
    open_s3,
    parse_place,
)
from penstock.upstream.provider_http import NoConnection, ProviderAnswer, ProviderHttp
from penstock.upstream.translation import anthropic, bedrock
from penstock.upstream.translation.answers import write_untranslatable
from penstock.upstream.translation.base import CHAT, EMBEDDINGS, RESPONSES, Untranslatable

T = TypeVar("T")

LIMITS = BatchLimits(
    endpoints=frozenset({CHAT, RESPONSES, EMBEDDINGS, anthropic.MESSAGES}),
    min_requests=100,
    max_requests=50_000,
    max_bytes=1_000_000_000,
)
"""The defaults of the quotas, which Amazon raises for some models."""
BUCKET_HEADER = "x-tfy-aws-s3-bucket"
JOB_HEADERS = frozenset({BUCKET_HEADER})
BUCKET, OUTPUT = "bucket", "output"
"""Details: the bucket of a job, and the folder of its results in it."""

_PATH = "/model-invocation-job"
_PAGE = 100
_SLACK_S = 3600.0
"""By how much Amazon's clock may be behind ours."""
_NAME_CHARACTERS = 63
_HOURS = (24, 168)
"""How long a job may take: at least and at most."""
_STATES = {
    "Submitted": NativeState.PENDING,
    "Validating": NativeState.PENDING,
    "Scheduled": NativeState.PENDING,
    "InProgress": NativeState.RUNNING,
    "Stopping": NativeState.RUNNING,
    "Completed": NativeState.ENDED,
    "PartiallyCompleted": NativeState.EXPIRED,
    "Expired": NativeState.EXPIRED,
    "Failed": NativeState.FAILED,
    "Stopped": NativeState.CANCELLED,
}
_PASSING = frozenset(
    {
        "ServiceQuotaExceededException",
        "ThrottlingException",
        "ExpiredTokenException",
        "RequestExpired",
    }
)
"""Errors that Amazon answers with a 4xx, and that are over some time later."""
_CONFLICT = "ConflictException"
"""Of a creation it may mean that the job is there; of a stop, that the job has ended."""
_ROLE = re.compile(r"arn:aws(-[^:]+)?:iam::([0-9]{12})?:role/.+")
_REGION = re.compile(r"[a-z]{2,4}(?:-[a-z]+)+-[0-9]{1,2}")


class BedrockBatchUpstream:
    """Speaks to Bedrock in one region.

    Args:
        name: As the settings call it.
        region: Such as `us-east-1`.
        storage: Where the files of jobs lie, such as `s3://bucket/folder`, in that region.
        role_arn: The role by which Bedrock reads and writes there.
        endpoint: Where Bedrock is; None: where Amazon's is for the region.
        storage_endpoint: Where S3 is; None: where Amazon's is for the region.

    Raises:
        InvalidSettings: One of these is not what it must be, or botocore is not installed.
    """

    def __init__(
        self,
        *,
        name: str,
        region: str,
        storage: str,
        role_arn: str,
        endpoint: str | None = None,
        storage_endpoint: str | None = None,
        connect_timeout_s: float = 10.0,
        call_timeout_s: float = 60.0,
        find_after_s: float = 60.0,
    ) -> None:
        if not _REGION.fullmatch(region):
            raise InvalidSettings(
                f"The region of upstream {name} is {region!r}; it must be one of Amazon's, "
                "such as us-east-1."
            )
        if not _ROLE.fullmatch(role_arn):
            raise InvalidSettings(
                f"The role_arn of upstream {name} is {role_arn!r}; it must be a role's ARN, "
                "such as arn:aws:iam::123456789012:role/batch."
            )
        self.name = name
        self.limits = LIMITS
        self.find_after_s = find_after_s
        self._place = parse_place(name, "s3", storage)
        self._role_arn = role_arn
        suffix = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
        self._signer = AwsSigner(name=name, service="bedrock", region=region)
        self._http = ProviderHttp(
            name=f"The upstream {name}",
            base_url=endpoint or f"https://bedrock.{region}.{suffix}",
            headers={},
            is_versioned=False,
            connect_timeout_s=connect_timeout_s,
            call_timeout_s=call_timeout_s,
        )
        self._storage = CloudStorage(
            name,
            lambda bucket: open_s3(
                bucket,
                region=region,
                credential_provider=self._signer.for_storage,
                endpoint=storage_endpoint,
                connect_timeout_s=connect_timeout_s,
            ),
        )

    def encode(self, job: NativeJob, line: NativeLine) -> bytes | Reply:
        try:
            said = bedrock.translate_request(job.endpoint, job.model, line.body)
        except Untranslatable as error:
            return write_untranslatable(error.field, error.message)
        return b'{"recordId":"%b","modelInput":%b}' % (_record_id(line.custom_id), said)

    async def submit(self, job: NativeJob, records: AsyncIterator[bytes], note: Note) -> str:
        place = self._job_place(job)
        await note({BUCKET: place.bucket})
        return await self._storage.hand_in(place, records, lambda: self._create(job, place))

    async def _create(self, job: NativeJob, place: Place) -> str:
        hours = math.ceil((job.expires_at - time.time()) / 3600)
        body = {
            "jobName": job_name(job),
            "clientRequestToken": _token(job),
            "modelId": job.model,
            "roleArn": self._role_arn,
            "inputDataConfig": {
                "s3InputDataConfig": {
                    "s3InputFormat": "JSONL",
                    "s3Uri": place.inside(INPUT).url("s3"),
                }
            },
            "outputDataConfig": {
                "s3OutputDataConfig": {"s3Uri": place.inside("output").url("s3") + "/"}
            },
            "timeoutDurationInHours": min(max(hours, _HOURS[0]), _HOURS[1]),
        }
        try:
            headers = await self._sign("POST", _PATH, body)
        except UpstreamDown as error:
            raise JobNotTaken(str(error)) from error
        try:
            answer = await self._http.call(
                "POST", _PATH, json=msgspec.Raw(_encode(body)), headers=headers
            )
        except NoConnection as error:
            raise JobNotTaken(str(error)) from error
        self._refuse(answer, "create a job")
        return self._http.read(answer, _Created).jobArn

    async def find(self, job: NativeJob, details: Details, *, since: float) -> str | None:
        if BUCKET not in details:
            return None  # it did not come to the creation of a job
        async for found in self._iter_jobs(job, since=since):
            if found.clientRequestToken == _token(job) or found.jobName == job_name(job):
                return found.jobArn
        return None

    async def _iter_jobs(
        self, job: NativeJob, *, since: float
    ) -> AsyncGenerator["_Invocation"]:
        """The jobs since a time in whose name our key stands."""
        after = datetime.fromtimestamp(since - _SLACK_S, UTC)
        query = {
            "nameContains": job.key,
            "submitTimeAfter": after.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "maxResults": str(_PAGE),
        }
        while True:
            answer = await self._call("GET", "/model-invocation-jobs", query=query)
            self._must_answer(answer, "list its jobs")
            page = self._http.read(answer, _Page)
            for found in page.invocationJobSummaries:
                yield found
            if not page.nextToken or page.nextToken == query.get("nextToken"):
                return
            query["nextToken"] = page.nextToken

    async def check(self, job: NativeJob, native_id: str) -> NativeStatus:
        answer = await self._call("GET", f"{_PATH}/{_short_id(native_id)}")
        self._must_answer(answer, f"know the job {native_id}")
        found = self._http.read(answer, _Invocation)
        place = self._job_place(job)
        return NativeStatus(
            state=_STATES.get(found.status, NativeState.RUNNING),
            completed=found.successRecordCount or 0,
            failed=found.errorRecordCount or 0,
            details={
                BUCKET: place.bucket,
                OUTPUT: place.inside("output", _short_id(native_id)).path,
            },
            message=found.message or "",
        )

    async def results(
        self, job: NativeJob, native_id: str, status: NativeStatus
    ) -> AsyncGenerator[NativeResult]:
        bucket, path = status.details[BUCKET], status.details[OUTPUT]
        files = await self._storage.list_files(Place(bucket, path))
        written = [file for file in files if file.path.endswith(".jsonl.out")]
        if not written and status.state is NativeState.ENDED:
            raise JobRefused(
                f"The upstream {self.name} has left no results of the job {native_id} at "
                f"{bucket}/{path}."
            )
        for file in written:
            async for text in self._storage.read_lines(bucket, file):
                result = read_result(text, job, created_at=int(time.time()))
                if result is not None:
                    yield result

    async def cancel(self, job: NativeJob, native_id: str) -> None:
        answer = await self._call("POST", f"{_PATH}/{_short_id(native_id)}/stop")
        if answer.error_type == _CONFLICT and (await self.check(job, native_id)).is_final:
            return
        self._must_answer(answer, f"stop the job {native_id}")

    async def clean_up(self, job: NativeJob, details: Details) -> None:
        if BUCKET in details:
            await self._storage.delete_all(self._job_place(job))

    async def close(self) -> None:
        await self._http.close()

    def _job_place(self, job: NativeJob) -> Place:
        return job_place(job, self._place, header=BUCKET_HEADER)

    async def _call(
        self, method: str, path: str, *, query: Mapping[str, str] | None = None
    ) -> ProviderAnswer:
        if query:
            path = f"{path}?{urlencode(query, quote_via=quote, safe='')}"
        return await self._http.call(method, path, headers=await self._sign(method, path, None))

    async def _sign(self, method: str, path: str, body: Any) -> dict[str, str]:
        raw = b"" if body is None else _encode(body)
        return await self._signer.sign(method, self._http.base + path, raw)

    def _refuse(self, answer: ProviderAnswer, what: str) -> None:
        """As `ProviderHttp.refuse`, but with Amazon's names of errors.

        Raises:
            JobNotTaken: It has too much to do, or our credentials have just ended.
            JobRefused: It never will.
            UpstreamDown: Nobody knows.
        """
        try:
            self._http.refuse(answer, what)
        except JobRefused as error:
            if answer.error_type in _PASSING:
                raise JobNotTaken(str(error)) from error
            if answer.error_type == _CONFLICT:
                raise UpstreamDown(str(error)) from error
            raise

    def _must_answer(self, answer: ProviderAnswer, what: str) -> None:
        """Raise what an answer to a question means that is no answer.

        Raises:
            JobRefused: There is no such thing.
            UpstreamDown: It is another refusal, which may be mended: of a role, for example.
        """
        try:
            self._refuse(answer, what)
        except JobRefused as error:
            if answer.status == 404:
                raise
            raise UpstreamDown(str(error)) from error
        except JobNotTaken as error:
            raise UpstreamDown(str(error), retry_after_s=error.retry_after_s) from error


def read_result(text: bytes, job: NativeJob, *, created_at: int) -> NativeResult | None:
    """What a line of an output file says; None if it says of no record."""
    try:
        text.decode()
        line = msgspec.json.decode(text, type=_Record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    custom_id = line.recordId.replace("X", "-")
    told = next((raw for raw in (line.modelOutput, line.error) if bytes(raw) != b"null"), None)
    if told is None:
        return NativeResult(custom_id=custom_id, lack=Lack.LOST)
    reply = bedrock.translate_reply(job.endpoint, job.model, bytes(told), created_at=created_at)
    return NativeResult(custom_id=custom_id, reply=reply)


def job_name(job: NativeJob) -> str:
    """What a job is called at Amazon: as its batch, as far as letters allow, and by its key."""
    room = _NAME_CHARACTERS - len(job.key) - 1
    told = re.sub(r"[^a-zA-Z0-9]+", "-", job.display_name).strip("-")[:room].rstrip("-")
    return f"{told or 'penstock'}-{job.key}"


def _token(job: NativeJob) -> str:
    """The token of idempotency, which begins and ends with a letter."""
    return f"penstock-{job.key}-job"


def _record_id(custom_id: str) -> bytes:
    """A line's name in letters and digits alone, which is all that Amazon promises to take;
    ours have no capitals."""
    return custom_id.replace("-", "X").encode()


def _short_id(native_id: str) -> str:
    """What an ARN ends with, which stands for it in a path."""
    return quote(native_id.rpartition("/")[2], safe="")


_encode = msgspec.json.encode


# The wire, as far as it is read, with Amazon's names


class _Created(msgspec.Struct):
    jobArn: str  # noqa: N815


class _Invocation(msgspec.Struct):
    jobArn: str  # noqa: N815
    jobName: str = ""  # noqa: N815
    clientRequestToken: str | None = None  # noqa: N815
    status: str = ""
    message: str | None = None
    successRecordCount: int | None = None  # noqa: N815
    errorRecordCount: int | None = None  # noqa: N815


class _Page(msgspec.Struct):
    invocationJobSummaries: list[_Invocation] = []  # noqa: N815
    nextToken: str | None = None  # noqa: N815


class _Record(msgspec.Struct):
    recordId: str  # noqa: N815
    modelOutput: msgspec.Raw = msgspec.Raw(b"null")  # noqa: N815
    error: msgspec.Raw = msgspec.Raw(b"null")
