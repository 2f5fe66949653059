"""Fireworks' batch inference jobs.

A job reads a dataset, which is made, filled and waited for first, and writes another. All three
have IDs that we choose, made from our key: so a job whose creation brought no answer is simply
asked for by its ID, and a second one with the same ID would be refused.

Nothing cancels a job; deleting it stops it.

Source: https://docs.fireworks.ai/guides/batch-inference and the reference of batch inference
jobs and datasets at https://docs.fireworks.ai/api-reference, 25 November 2026, and the official
client fireworks-ai 1.2.30.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import msgspec

from penstock.errors import JobNotTaken, JobRefused, PenstockError, UpstreamDown
from penstock.upstream.base import (
    BatchLimits,
    Details,
    Failure,
    Lack,
    NativeJob,
    NativeLine,
    NativeResult,
    NativeState,
    NativeStatus,
    Note,
    Reply,
)
from penstock.upstream.openai_http import read_success
from penstock.upstream.provider_http import NoConnection, ProviderHttp
from penstock.upstream.translation.answers import write_error, write_untranslatable

LIMITS = BatchLimits(
    endpoints=frozenset({"/v1/chat/completions"}),
    max_requests=100_000,
    max_bytes=150_000_000,
)
"""The bytes are what one call may upload; Fireworks tells no number of lines, that is ours."""
INPUT, OUTPUT = "input_dataset", "output_dataset"
_LINES_PATH = "/inference/v1"
_JOBS = "/batchInferenceJobs"
_STATES = {
    "CREATING": NativeState.PENDING,
    "CREATING_INPUT_DATASET": NativeState.PENDING,
    "PENDING": NativeState.PENDING,
    "VALIDATING": NativeState.PENDING,
    "COMPLETED": NativeState.ENDED,
    "EARLY_STOPPED": NativeState.EXPIRED,
    "EXPIRED": NativeState.EXPIRED,
    "FAILED": NativeState.FAILED,
    "CANCELLED": NativeState.CANCELLED,
    "DELETING": NativeState.CANCELLED,
    "DELETING_CLEANING_UP": NativeState.CANCELLED,
}
"""By what follows `JOB_STATE_`; all others mean that it is at work."""
_GONE = (404, 410)


class FireworksBatchUpstream:
    """Speaks to Fireworks, or to a server with the same API.

    Args:
        name: As the settings call it.
        base_url: Where lines are sent, such as `https://api.fireworks.ai/inference/v1`; the
            batch API lies beside it, under `/v1/accounts/ACCOUNT`.
        api_key: None sends none.
        account: The ID of the account.
        ready_poll_s: How long to wait until a dataset is looked at again, in seconds.

    Raises:
        InvalidSettings: `base_url` is not an HTTP URL, or `api_key` cannot stand in a header.
    """

    def __init__(
        self,
        *,
        name: str,
        base_url: str,
        api_key: str | None,
        account: str,
        connect_timeout_s: float = 10.0,
        call_timeout_s: float = 60.0,
        find_after_s: float = 60.0,
        ready_poll_s: float = 1.0,
        ready_patience_s: float = 120.0,
    ) -> None:
        self.name = name
        self.limits = LIMITS
        self.find_after_s = find_after_s
        self._account = f"accounts/{account}"
        self._ready_poll_s = ready_poll_s
        self._ready_patience_s = ready_patience_s
        parts = urlsplit(base_url)
        path = f"{parts.path.rstrip('/').removesuffix(_LINES_PATH)}/v1/{self._account}"

        def speak(key: str | None) -> ProviderHttp:
            return ProviderHttp(
                name=f"The upstream {name}",
                base_url=urlunsplit(parts._replace(path=path)),
                headers={"Authorization": f"Bearer {key}"} if key else {},
                secrets=(key or "",),
                connect_timeout_s=connect_timeout_s,
                call_timeout_s=call_timeout_s,
            )

        self._http = speak(api_key)
        self._storage = speak(None)
        """For signed addresses, at hosts that must not see the key."""

    def encode(self, job: NativeJob, line: NativeLine) -> bytes | Reply:
        # Field by field as it stands, but for the model, which the job names, and line ends.
        try:
            line.body.decode()
            fields = dict(msgspec.json.decode(line.body, type=dict[str, msgspec.Raw]))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return write_untranslatable("", "The body must be one JSON object.")
        fields.pop("model", None)
        body = msgspec.json.encode(fields).replace(b"\r", b" ").replace(b"\n", b" ")
        return b'{"custom_id":%b,"body":%b}' % (msgspec.json.encode(line.custom_id), body)

    async def submit(self, job: NativeJob, records: AsyncIterator[bytes], note: Note) -> str:
        try:
            await self._make_dataset(job)
            await self._fill_dataset(job, records)
        except UpstreamDown as error:  # a dataset alone is no job
            await self._forget(_input(job))
            raise JobNotTaken(str(error), retry_after_s=error.retry_after_s) from error
        try:
            await note({INPUT: _input(job), OUTPUT: _output(job)})
            return await self._create(job)
        except (JobNotTaken, JobRefused):
            await self._forget(_input(job))
            raise

    async def _make_dataset(self, job: NativeJob) -> None:
        dataset: dict[str, Any] = {"userUploaded": {}, "exampleCount": str(job.requests)}
        body: dict[str, Any] = {"datasetId": _input(job), "dataset": dataset}
        answer = await self._http.call("POST", "/datasets", json=body)
        # One that is there already is left from an attempt that made no job, and is deleted
        # by the caller, for nobody knows what is in it: 409 is an `UpstreamDown`.
        self._http.refuse(answer, "make a dataset")

    async def _fill_dataset(self, job: NativeJob, records: AsyncIterator[bytes]) -> None:
        answer = await self._http.upload(
            f"/datasets/{_input(job)}:upload",
            fields={},
            file_name=f"{job.key}.jsonl",
            records=records,
            length=job.bytes,
        )
        self._http.refuse(answer, "take a file of requests")
        for _ in range(int(self._ready_patience_s / self._ready_poll_s) + 1):
            if await self._is_ready(_input(job)):
                return
            await asyncio.sleep(self._ready_poll_s)
        raise UpstreamDown(
            f"The upstream {self.name} did not get the dataset {_input(job)} ready within "
            f"{self._ready_patience_s:g} s."
        )

    async def _is_ready(self, dataset: str) -> bool:
        answer = await self._http.call("GET", f"/datasets/{dataset}")
        self._http.must_answer(answer, f"know the dataset {dataset}")
        return self._http.read(answer, _Dataset).state != "UPLOADING"

    async def _create(self, job: NativeJob) -> str:
        body: dict[str, Any] = {
            "displayName": job.display_name[:_MAX_NAME],
            "model": job.model,
            "inputDatasetId": f"{self._account}/datasets/{_input(job)}",
            "outputDatasetId": f"{self._account}/datasets/{_output(job)}",
        }
        query = {"batchInferenceJobId": _job_id(job)}
        try:
            answer = await self._http.call("POST", _JOBS, json=body, query=query)
        except NoConnection as error:
            raise JobNotTaken(str(error)) from error
        self._http.refuse(answer, "create a batch inference job")
        return _job_id(job)

    async def find(self, job: NativeJob, details: Details, *, since: float) -> str | None:
        answer = await self._http.call("GET", f"{_JOBS}/{_job_id(job)}")
        if answer.status in _GONE:
            return None
        self._http.must_answer(answer, "say whether it has a batch inference job")
        return _job_id(job)

    async def check(self, job: NativeJob, native_id: str) -> NativeStatus:
        answer = await self._http.call("GET", f"{_JOBS}/{native_id}")
        self._http.must_answer(answer, f"know the batch inference job {native_id}")
        found = self._http.read(answer, _Job)
        progress = found.jobProgress or _Progress()
        state = _STATES.get(found.state.removeprefix("JOB_STATE_"), NativeState.RUNNING)
        is_bad = state is NativeState.FAILED and found.status is not None
        return NativeStatus(
            state=state,
            completed=progress.successfullyProcessedRequests or 0,
            failed=progress.failedRequests or 0,
            message=found.status.message if is_bad and found.status else "",
        )

    async def results(
        self, job: NativeJob, native_id: str, status: NativeStatus
    ) -> AsyncGenerator[NativeResult]:
        path = f"/datasets/{_output(job)}:getDownloadEndpoint"
        answer = await self._http.call("GET", path)
        if answer.status in _GONE and status.state is not NativeState.ENDED:
            return  # nothing was run, or it went with the job
        self._http.must_answer(answer, "give its results")
        for url in self._http.read(answer, _Files).filenameToSignedUrls.values():
            async for text in self._storage.download_lines(url):
                if (result := read_result(text)) is not None:
                    yield result

    async def cancel(self, job: NativeJob, native_id: str) -> None:
        """Delete a job that is at work, for nothing else stops it."""
        if (await self.check(job, native_id)).is_final:
            return
        answer = await self._http.call("DELETE", f"{_JOBS}/{native_id}")
        self._http.must_answer(answer, f"stop the batch inference job {native_id}")

    async def clean_up(self, job: NativeJob, details: Details) -> None:
        for name in (INPUT, OUTPUT):
            if dataset := details.get(name):
                answer = await self._http.call("DELETE", f"/datasets/{dataset}")
                if answer.status not in _GONE:
                    self._http.must_answer(answer, f"delete the dataset {dataset}")

    async def close(self) -> None:
        await self._http.close()
        await self._storage.close()

    async def _forget(self, dataset: str) -> None:
        """Delete a dataset that no job reads, if that can be done now."""
        try:
            await self._http.call("DELETE", f"/datasets/{dataset}")
        except PenstockError:
            return


def read_result(text: bytes) -> NativeResult | None:
    """What a line of results or errors says; None if it says of no line.

    A result is the answer itself, without a status. How an error looks is not documented, so
    whatever says something is taken for one.
    """
    try:
        text.decode()
        line = msgspec.json.decode(text, type=_ResultLine)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    reply = _read_answer(bytes(line.response)) or _read_error(line)
    if reply is None:
        return NativeResult(custom_id=line.custom_id, lack=Lack.LOST)
    return NativeResult(custom_id=line.custom_id, reply=reply)


def _read_answer(body: bytes) -> Reply | None:
    try:
        is_answer = bool(msgspec.json.decode(body, type=_Answer).choices)
    except (msgspec.DecodeError, RecursionError):
        return None
    return read_success(200, body, None) if is_answer else None


def _read_error(line: "_ResultLine") -> Reply | None:
    for told in (bytes(line.error), bytes(line.response)):
        try:
            fault = msgspec.json.decode(told, type=_Fault | str | None)
        except (msgspec.DecodeError, RecursionError):
            continue
        if isinstance(fault, _Fault) and fault.error is not None:
            fault = fault.error
        if isinstance(fault, str) and fault:
            return Reply(failure=Failure.INVALID, message=fault)
        if isinstance(fault, _Fault) and fault.message:
            status = fault.code if isinstance(fault.code, int) else 0
            if _LEAST_ERROR <= status <= _MOST_ERROR:
                return write_error(status, fault.message, None)
            return Reply(failure=Failure.INVALID, message=fault.message)
    return None


_LEAST_ERROR, _MOST_ERROR = 400, 599
_MAX_NAME = 60


def _job_id(job: NativeJob) -> str:
    return f"penstock-{job.key}"


def _input(job: NativeJob) -> str:
    return f"{_job_id(job)}-in"


def _output(job: NativeJob) -> str:
    return f"{_job_id(job)}-out"


# The wire, as far as it is read, with the names of Fireworks' JSON


class _Dataset(msgspec.Struct):
    state: str = ""


class _Status(msgspec.Struct):
    message: str = ""


class _Progress(msgspec.Struct):
    successfullyProcessedRequests: int | None = None  # noqa: N815
    failedRequests: int | None = None  # noqa: N815


class _Job(msgspec.Struct):
    state: str = ""
    status: _Status | None = None
    jobProgress: _Progress | None = None  # noqa: N815


class _Files(msgspec.Struct):
    filenameToSignedUrls: dict[str, str] = {}  # noqa: N815


class _Answer(msgspec.Struct):
    choices: list[Any]


class _Fault(msgspec.Struct):
    message: str = ""
    code: int | str | None = None
    error: "_Fault | str | None" = None


class _ResultLine(msgspec.Struct):
    custom_id: str
    response: msgspec.Raw = msgspec.Raw(b"null")
    error: msgspec.Raw = msgspec.Raw(b"null")
