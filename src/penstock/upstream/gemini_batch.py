"""The batch API of Google's Gemini API.

A job is a file of lines, sent by the File API's resumable upload, and a batch that names it.
The model stands in the address of the call that creates the batch. The file's name is noted
before that, so a batch whose creation brought no answer is found by it, and by our key, with
which its display name begins.

Source: https://ai.google.dev/api/batch-api, https://ai.google.dev/gemini-api/docs/batch-api and
https://ai.google.dev/api/files, 25 November 2026, and the official client google-genai 3.6.1.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import msgspec

from penstock.errors import JobNotTaken, JobRefused, PenstockError, UpstreamDown
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
from penstock.upstream.provider_http import NoConnection, ProviderAnswer, ProviderHttp
from penstock.upstream.translation import gemini
from penstock.upstream.translation.answers import write_untranslatable
from penstock.upstream.translation.base import CHAT, EMBEDDINGS, RESPONSES, Untranslatable

LIMITS = BatchLimits(
    endpoints=frozenset({CHAT, RESPONSES, EMBEDDINGS}),
    max_requests=200_000,
    max_bytes=2_000_000_000,
)
"""Google tells the bytes and how many tokens may wait, but no number of lines; that is ours."""
INPUT, OUTPUT = "input_file", "output_file"
_PAGE = 100
_MAX_NAME = 80
"""Characters of a display name that are the client's."""
_STATES = {
    "PENDING": NativeState.PENDING,
    "QUEUED": NativeState.PENDING,
    "SUCCEEDED": NativeState.ENDED,
    "PARTIALLY_SUCCEEDED": NativeState.ENDED,
    "FAILED": NativeState.FAILED,
    "CANCELLED": NativeState.CANCELLED,
    "EXPIRED": NativeState.EXPIRED,
}
"""By what follows `BATCH_STATE_` or `JOB_STATE_`; all others mean that it is at work."""
_FINAL_CANCELS = (400, 409)
"""How Google may answer who cancels a batch that has ended."""
_UPLOADS = "/upload"
_LINES = "application/jsonl"


class GeminiBatchUpstream:
    """Speaks to Google, or to a server with the same API.

    Args:
        name: As the settings call it.
        base_url: Where the API lies, such as
            `https://generativelanguage.googleapis.com/v1beta`.
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

        def speak_to(url: str) -> ProviderHttp:
            return ProviderHttp(
                name=f"The upstream {name}",
                base_url=url,
                headers={"x-goog-api-key": api_key} if api_key else {},
                secrets=(api_key or "",),
                connect_timeout_s=connect_timeout_s,
                call_timeout_s=call_timeout_s,
            )

        self._http = speak_to(base_url)
        parts = urlsplit(base_url)
        self._version = parts.path.rstrip("/")
        self._uploads = speak_to(urlunsplit(parts._replace(path=_UPLOADS)))

    def encode(self, job: NativeJob, line: NativeLine) -> bytes | Reply:
        try:
            gemini.name_model(job.model)
            request = gemini.translate_request(job.endpoint, job.model, line.body)
        except Untranslatable as error:
            return write_untranslatable(error.field, error.message)
        return b'{"key":%b,"request":%b}' % (msgspec.json.encode(line.custom_id), request)

    async def submit(self, job: NativeJob, records: AsyncIterator[bytes], note: Note) -> str:
        file_name = await self._upload(job, records)
        try:
            await note({INPUT: file_name})
            return await self._create(job, file_name)
        except (JobNotTaken, JobRefused):
            await self._forget_file(file_name)
            raise

    async def _upload(self, job: NativeJob, records: AsyncIterator[bytes]) -> str:
        """Send the file; its address is in a header of the answer to its announcement."""
        try:
            began = await self._uploads.call(
                "POST",
                f"{self._version}/files",
                json={"file": {"displayName": job.key}},
                headers={
                    "X-Goog-Upload-Protocol": "resumable",
                    "X-Goog-Upload-Command": "start",
                    "X-Goog-Upload-Header-Content-Length": str(job.bytes),
                    "X-Goog-Upload-Header-Content-Type": _LINES,
                },
            )
            self._uploads.refuse(began, "take a file of requests")
            answer = await self._uploads.send_lines(
                self._upload_path(began),
                records=records,
                length=job.bytes,
                headers={
                    "X-Goog-Upload-Offset": "0",
                    "X-Goog-Upload-Command": "upload, finalize",
                },
            )
            self._uploads.refuse(answer, "take a file of requests")
            return self._uploads.read(answer, _Uploaded).file.name
        except UpstreamDown as error:  # a file alone is no job
            raise JobNotTaken(str(error), retry_after_s=error.retry_after_s) from error

    def _upload_path(self, began: ProviderAnswer) -> str:
        """Where the file goes, at the host that we know: the key is not sent to another."""
        told = urlsplit(began.upload_url or "")
        path = urlunsplit(("", "", told.path, told.query, ""))
        if not path.startswith(f"{_UPLOADS}/"):
            raise UpstreamDown(
                f"The upstream {self.name} did not say below {_UPLOADS}/ where a file is to go."
            )
        return path.removeprefix(_UPLOADS)

    async def _create(self, job: NativeJob, file_name: str) -> str:
        method = (
            "asyncBatchEmbedContent" if job.endpoint == EMBEDDINGS else "batchGenerateContent"
        )
        body: dict[str, Any] = {
            "batch": {
                "displayName": f"{job.key} {job.display_name[:_MAX_NAME]}",
                "inputConfig": {"fileName": file_name},
            }
        }
        try:
            path = f"/{gemini.name_model(job.model)}:{method}"
        except Untranslatable as error:
            raise JobRefused(error.message) from error
        try:
            answer = await self._http.call("POST", path, json=body)
        except NoConnection as error:
            raise JobNotTaken(str(error)) from error
        self._http.refuse(answer, "create a batch")
        return self._http.read(answer, _Operation).name

    async def find(self, job: NativeJob, details: Details, *, since: float) -> str | None:
        # The order of the list is nowhere said, so all of it is looked through.
        if INPUT not in details:
            return None  # it did not come to the creation of a batch
        async for found in self._iter_batches():
            batch = found.metadata or _Batch()
            source = batch.inputConfig or _Source()
            is_ours = batch.displayName.partition(" ")[0] == job.key
            if is_ours or source.fileName == details[INPUT]:
                return found.name
        return None

    async def _iter_batches(self) -> AsyncGenerator["_Operation"]:
        query = {"pageSize": str(_PAGE)}
        while True:
            answer = await self._http.call("GET", "/batches", query=query)
            self._http.must_answer(answer, "list its batches")
            page = self._http.read(answer, _Page)
            for found in page.operations:
                yield found
            if not page.nextPageToken or page.nextPageToken == query.get("pageToken"):
                return
            query["pageToken"] = page.nextPageToken

    async def check(self, job: NativeJob, native_id: str) -> NativeStatus:
        answer = await self._http.call("GET", f"/{native_id}")
        self._http.must_answer(answer, f"know {native_id}")
        return _read_status(self._http.read(answer, _Operation))

    async def results(
        self, job: NativeJob, native_id: str, status: NativeStatus
    ) -> AsyncGenerator[NativeResult]:
        if not (file_name := status.details.get(OUTPUT)):
            return
        path = f"/{file_name}:download?alt=media"
        async for text in self._http.download_lines(path):
            if (result := read_result(text, job, created_at=int(time.time()))) is not None:
                yield result

    async def cancel(self, job: NativeJob, native_id: str) -> None:
        answer = await self._http.call("POST", f"/{native_id}:cancel", json={})
        if answer.status in _FINAL_CANCELS:
            return
        self._http.must_answer(answer, f"cancel {native_id}")

    async def clean_up(self, job: NativeJob, details: Details) -> None:
        """Delete the file of requests. Google deletes results by itself, after 48 hours."""
        if file_name := details.get(INPUT):
            answer = await self._http.call("DELETE", f"/{file_name}")
            if answer.status not in (403, 404):  # 403 is what Google says of what is gone
                self._http.must_answer(answer, f"delete {file_name}")

    async def close(self) -> None:
        await self._http.close()
        await self._uploads.close()

    async def _forget_file(self, file_name: str) -> None:
        """Delete a file that no batch names, if that can be done now."""
        try:
            await self._http.call("DELETE", f"/{file_name}")
        except PenstockError:
            return


def read_result(text: bytes, job: NativeJob, *, created_at: int) -> NativeResult | None:
    """What a line of results says; None if it says of no line."""
    try:
        text.decode()
        line = msgspec.json.decode(text, type=_ResultLine)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if response := bytes(line.response):
        told = response
    elif error := bytes(line.error) or bytes(line.status):
        told = b'{"error":%b}' % error
    else:
        return NativeResult(custom_id=line.key, lack=Lack.LOST)
    reply = gemini.translate_reply(job.endpoint, job.model, told, created_at=created_at)
    return NativeResult(custom_id=line.key, reply=reply)


def _read_status(found: "_Operation") -> NativeStatus:
    batch = found.metadata or _Batch()
    stats = batch.batchStats or _Stats()
    outputs = (batch.output, found.response)
    files = [each.responsesFile for each in outputs if each is not None and each.responsesFile]
    return NativeStatus(
        state=_state(batch.state, found),
        completed=_count(stats.successfulRequestCount),
        failed=_count(stats.failedRequestCount),
        details={OUTPUT: files[0]} if files else {},
        message=found.error.message if found.error else "",
    )


def _count(told: int | str) -> int:
    return told if isinstance(told, int) else int(told) if told.isdecimal() else 0


def _state(told: str, found: "_Operation") -> NativeState:
    state = _STATES.get(told.removeprefix("BATCH_STATE_").removeprefix("JOB_STATE_"))
    if state is not None:
        return state
    if found.done:
        return NativeState.FAILED if found.error else NativeState.ENDED
    return NativeState.RUNNING


# The wire, as far as it is read, with the names of Google's JSON


class _File(msgspec.Struct):
    name: str


class _Uploaded(msgspec.Struct):
    file: _File


class _Source(msgspec.Struct):
    fileName: str = ""  # noqa: N815


class _Stats(msgspec.Struct):
    """Counts are 64 bits wide, which Google writes as texts."""

    successfulRequestCount: int | str = 0  # noqa: N815
    failedRequestCount: int | str = 0  # noqa: N815


class _Output(msgspec.Struct):
    responsesFile: str | None = None  # noqa: N815


class _Batch(msgspec.Struct):
    displayName: str = ""  # noqa: N815
    state: str = ""
    inputConfig: _Source | None = None  # noqa: N815
    batchStats: _Stats | None = None  # noqa: N815
    output: _Output | None = None


class _Fault(msgspec.Struct):
    message: str = ""


class _Operation(msgspec.Struct):
    name: str
    done: bool = False
    metadata: _Batch | None = None
    response: _Output | None = None
    error: _Fault | None = None


class _Page(msgspec.Struct):
    operations: list[_Operation] = []
    nextPageToken: str | None = None  # noqa: N815


class _ResultLine(msgspec.Struct):
    key: str
    response: msgspec.Raw = msgspec.Raw()
    error: msgspec.Raw = msgspec.Raw()
    status: msgspec.Raw = msgspec.Raw()
