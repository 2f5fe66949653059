"""Mistral's batch jobs.

A job is a file of lines that is uploaded, and a job that names it, the endpoint and the one
model of all its lines. The file's ID is noted before the job is created, so a job whose
creation brought no answer is found by it, and by our key in its metadata.

Source: https://docs.mistral.ai/api/endpoint/batch, https://docs.mistral.ai/api/endpoint/files
and https://docs.mistral.ai/studio-api/batch-processing, 25 November 2026.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

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
from penstock.upstream.openai_batch import KEY, write_metadata
from penstock.upstream.provider_http import NoConnection, ProviderHttp
from penstock.upstream.translation import mistral
from penstock.upstream.translation.answers import write_untranslatable
from penstock.upstream.translation.base import CHAT, EMBEDDINGS, RESPONSES, Untranslatable

LIMITS = BatchLimits(
    endpoints=frozenset({CHAT, RESPONSES, EMBEDDINGS}),
    max_requests=100_000,
    max_bytes=512_000_000,
)
INPUT, OUTPUT, ERRORS = "input_file", "output_file", "error_file"
_JOBS = "/batch/jobs"
_PAGE = 100
_SLACK_S = 3600.0
"""By how much the provider's clock may be behind ours."""
_MAX_HOURS = 7 * 24
_STATES = {
    "QUEUED": NativeState.PENDING,
    "RUNNING": NativeState.RUNNING,
    "CANCELLATION_REQUESTED": NativeState.RUNNING,
    "SUCCESS": NativeState.ENDED,
    "FAILED": NativeState.FAILED,
    "TIMEOUT_EXCEEDED": NativeState.EXPIRED,
    "CANCELLED": NativeState.CANCELLED,
}
_FINAL_CANCELS = (400, 409, 422)
"""How Mistral may answer who cancels a job that has ended."""


class MistralBatchUpstream:
    """Speaks to Mistral, or to a server with the same API.

    Args:
        name: As the settings call it.
        base_url: Where the API lies, such as `https://api.mistral.ai/v1`.
        api_key: None sends none.

    Raises:
        InvalidSettings: `base_url` is not an HTTP URL, or `api_key` cannot stand in a header.
    """

    def __init__(
        self,
        *,
        name: str,
        base_url: str,
        api_key: str | None,
        connect_timeout_s: float = 10.0,
        call_timeout_s: float = 60.0,
        find_after_s: float = 60.0,
    ) -> None:
        self.name = name
        self.limits = LIMITS
        self.find_after_s = find_after_s
        self._http = ProviderHttp(
            name=f"The upstream {name}",
            base_url=base_url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            secrets=(api_key or "",),
            connect_timeout_s=connect_timeout_s,
            call_timeout_s=call_timeout_s,
        )

    def encode(self, job: NativeJob, line: NativeLine) -> bytes | Reply:
        try:
            body = mistral.translate_unnamed(job.endpoint, line.body)
        except Untranslatable as error:
            return write_untranslatable(error.field, error.message)
        return b'{"custom_id":%b,"body":%b}' % (msgspec.json.encode(line.custom_id), body)

    async def submit(self, job: NativeJob, records: AsyncIterator[bytes], note: Note) -> str:
        file_id = await self._upload(job, records)
        try:
            await note({INPUT: file_id})
            return await self._create(job, file_id)
        except (JobNotTaken, JobRefused):
            await self._forget_file(file_id)
            raise

    async def _upload(self, job: NativeJob, records: AsyncIterator[bytes]) -> str:
        try:
            answer = await self._http.upload(
                "/files",
                fields={"purpose": "batch"},
                file_name=f"{job.key}.jsonl",
                records=records,
                length=job.bytes,
            )
            self._http.refuse(answer, "take a file of requests")
            return self._http.read(answer, _File).id
        except UpstreamDown as error:  # a file alone is no job
            raise JobNotTaken(str(error), retry_after_s=error.retry_after_s) from error

    async def _create(self, job: NativeJob, file_id: str) -> str:
        body: dict[str, Any] = {
            "input_files": [file_id],
            "endpoint": mistral.locate(job.endpoint, job.model),
            "model": job.model,
            "metadata": write_metadata(job),
            "timeout_hours": _hours(job.expires_at - time.time()),
        }
        try:
            answer = await self._http.call("POST", _JOBS, json=body)
        except NoConnection as error:
            raise JobNotTaken(str(error)) from error
        self._http.refuse(answer, "create a batch job")
        return self._http.read(answer, _Job).id

    async def find(self, job: NativeJob, details: Details, *, since: float) -> str | None:
        if INPUT not in details:
            return None  # it did not come to the creation of a job
        async for found in self._iter_jobs(since=since):
            is_ours = (found.metadata or {}).get(KEY) == job.key
            if is_ours or details[INPUT] in found.input_files:
                return found.id
        return None

    async def _iter_jobs(self, *, since: float) -> AsyncGenerator["_Job"]:
        """The jobs that were created since a time, newest first.

        Jobs that come meanwhile push older ones to later pages, so some are seen twice and
        none is missed.
        """
        page = 0
        while True:
            query = {"page": str(page), "page_size": str(_PAGE), "order_by": "-created"}
            answer = await self._http.call("GET", _JOBS, query=query)
            self._http.must_answer(answer, "list its batch jobs")
            jobs = self._http.read(answer, _Page).data or []
            for found in jobs:
                if found.created_at < since - _SLACK_S:
                    return
                yield found
            if len(jobs) < _PAGE:
                return
            page += 1

    async def check(self, job: NativeJob, native_id: str) -> NativeStatus:
        answer = await self._http.call("GET", f"{_JOBS}/{native_id}")
        self._http.must_answer(answer, f"know the batch job {native_id}")
        found = self._http.read(answer, _Job)
        files = {OUTPUT: found.output_file, ERRORS: found.error_file}
        return NativeStatus(
            state=_STATES.get(found.status, NativeState.RUNNING),
            completed=found.succeeded_requests,
            failed=found.failed_requests,
            details={name: file_id for name, file_id in files.items() if file_id},
            message=" ".join(error.message for error in (found.errors or [])[:3]),
        )

    async def results(
        self, job: NativeJob, native_id: str, status: NativeStatus
    ) -> AsyncGenerator[NativeResult]:
        for name in (OUTPUT, ERRORS):
            if file_id := status.details.get(name):
                async for text in self._read_lines(file_id):
                    if (
                        result := read_result(text, job, created_at=int(time.time()))
                    ) is not None:
                        yield result

    async def _read_lines(self, file_id: str) -> AsyncGenerator[bytes]:
        about = await self._http.call("GET", f"/files/{file_id}")
        self._http.must_answer(about, f"know the file {file_id}")
        size = self._http.read(about, _File).bytes
        path = f"/files/{file_id}/content"
        async for text in self._http.download_lines(path, least_bytes=size):
            yield text

    async def cancel(self, job: NativeJob, native_id: str) -> None:
        answer = await self._http.call("POST", f"{_JOBS}/{native_id}/cancel")
        if answer.status in _FINAL_CANCELS:
            return
        self._http.must_answer(answer, f"cancel the batch job {native_id}")

    async def clean_up(self, job: NativeJob, details: Details) -> None:
        for name in (INPUT, OUTPUT, ERRORS):
            if file_id := details.get(name):
                answer = await self._http.call("DELETE", f"/files/{file_id}")
                if answer.status != 404:
                    self._http.must_answer(answer, f"delete the file {file_id}")

    async def close(self) -> None:
        await self._http.close()

    async def _forget_file(self, file_id: str) -> None:
        """Delete a file that no job names, if that can be done now."""
        try:
            await self._http.call("DELETE", f"/files/{file_id}")
        except PenstockError:
            return


def read_result(text: bytes, job: NativeJob, *, created_at: int) -> NativeResult | None:
    """What a line of an output or error file says; None if it says of no line."""
    try:
        text.decode()
        custom_id = msgspec.json.decode(text, type=_CustomId).custom_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    try:
        line = msgspec.json.decode(text, type=_ResultLine)
    except (msgspec.DecodeError, RecursionError):
        return NativeResult(custom_id=custom_id, lack=Lack.LOST)
    response = line.response
    if response is not None and response.status_code is not None:
        reply = mistral.translate_reply(
            job.endpoint,
            job.model,
            bytes(response.body),
            created_at=created_at,
            status_code=response.status_code,
        )
        return NativeResult(custom_id=custom_id, reply=reply)
    told = mistral.read_error(bytes(line.error))
    if not told:
        return NativeResult(custom_id=custom_id, lack=Lack.LOST)
    return NativeResult(custom_id=custom_id, reply=Reply(failure=Failure.INVALID, message=told))


def _hours(left_s: float) -> int:
    """How long Mistral may take, with so many seconds left: whole hours within them."""
    return min(max(int(left_s // 3600), 1), _MAX_HOURS)


# The wire, as far as it is read


class _File(msgspec.Struct):
    id: str
    bytes: int | None = None


class _Fault(msgspec.Struct):
    message: str = ""


class _Job(msgspec.Struct):
    id: str
    status: str
    input_files: list[str] = []
    metadata: dict[str, Any] | None = None
    output_file: str | None = None
    error_file: str | None = None
    errors: list[_Fault] | None = None
    created_at: float = 0.0
    succeeded_requests: int = 0
    failed_requests: int = 0


class _Page(msgspec.Struct):
    data: list[_Job] | None = None


class _CustomId(msgspec.Struct):
    custom_id: str


class _Response(msgspec.Struct):
    status_code: int | None = None
    body: msgspec.Raw = msgspec.Raw(b"null")


class _ResultLine(msgspec.Struct):
    response: _Response | None = None
    error: msgspec.Raw = msgspec.Raw(b"null")
