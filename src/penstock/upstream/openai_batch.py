"""The batch API of OpenAI, and of those that are compatible with it, another Penstock too.

A job is a file of lines that is uploaded, and a batch that names it. The file's ID is noted
before the batch is created, so a batch whose creation brought no answer is found by it, and by
our key in its metadata. Where providers differ from OpenAI stands in `DIALECTS`.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import msgspec

from penstock.errors import JobNotTaken, JobRefused, PenstockError, UpstreamDown
from penstock.model import ENDPOINTS
from penstock.upstream.azure import VERSION_HEADER, is_classic
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
from penstock.upstream.provider_http import NoConnection, ProviderAnswer, ProviderHttp

KEY = "penstock_job"
"""The name of our key in a batch's metadata."""
INPUT, OUTPUT, ERRORS = "input_file_id", "output_file_id", "error_file_id"
_PAGE = 100
_SLACK_S = 3600.0
"""By how much a provider's clock may be behind ours."""
_MAX_METADATA = 16
_STATES = {
    "validating": NativeState.PENDING,
    "queued": NativeState.PENDING,
    "in_progress": NativeState.RUNNING,
    "finalizing": NativeState.RUNNING,
    "cancelling": NativeState.RUNNING,
    "completed": NativeState.ENDED,
    "failed": NativeState.FAILED,
    "expired": NativeState.EXPIRED,
    "cancelled": NativeState.CANCELLED,
}
_PASSING_CODES = frozenset({"token_limit_exceeded", "rate_limit_exceeded"})
"""Why a batch fails before any of it is run, and what may be otherwise later."""
_LACKS = {"batch_expired": Lack.EXPIRED, "batch_cancelled": Lack.CANCELLED}
_FAILURES = {
    "request_timeout": Failure.TIMEOUT,
    "upstream_unreachable": Failure.UNREACHABLE,
    "upstream_disconnected": Failure.DISCONNECTED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """In what a provider differs from OpenAI."""

    limits: BatchLimits
    upload_path: str = "/files"
    upload_fields: Mapping[str, str]
    window: Callable[[float], str]
    """The completion window to ask for, with so many seconds left."""
    has_metadata: bool = True
    key_header: str | None = None
    """Which header holds the key; None: `Authorization`, as a bearer token."""
    is_azure: bool = False
    """Whether a client's header may name a version of the API, and `base_url` may be without
    `/v1`: then endpoints are named without it, too."""
    title: str = "The upstream"
    """What it is, before its name: whose words an error quotes."""
    find_after_s: float = 60.0
    """After how long the list shows a batch whose creation brought no answer."""


def _one_day(left_s: float) -> str:
    del left_s
    return "24h"


def _seconds(left_s: float) -> str:
    return f"{max(int(left_s), 60)}s"


def _whole_days(left_s: float) -> str:
    """From 24 h to 7 days."""
    return f"{min(max(int(left_s // 86400), 1), 7)}d" if left_s >= 2 * 86400 else "24h"


_MB = 1_000_000
_PURPOSE = {"purpose": "batch"}

DIALECTS: dict[str, Dialect] = {
    "openai": Dialect(
        limits=BatchLimits(
            endpoints=frozenset(
                {
                    "/v1/responses",
                    "/v1/chat/completions",
                    "/v1/embeddings",
                    "/v1/completions",
                    "/v1/moderations",
                    "/v1/images/generations",
                    "/v1/images/edits",
                    "/v1/videos",
                }
            ),
            max_requests=50_000,
            max_bytes=200 * _MB,
        ),
        upload_fields=_PURPOSE,
        window=_one_day,
    ),
    "penstock": Dialect(
        limits=BatchLimits(
            endpoints=frozenset(ENDPOINTS),
            max_requests=50_000,
            max_bytes=200 * _MB,
            one_model=False,
        ),
        upload_fields=_PURPOSE,
        window=_seconds,
        title="The other Penstock at upstream",
    ),
    "azure": Dialect(
        limits=BatchLimits(
            endpoints=frozenset({"/v1/chat/completions", "/v1/responses", "/v1/embeddings"}),
            max_requests=50_000,
            max_bytes=200 * _MB,
        ),
        upload_fields=_PURPOSE,
        window=_one_day,
        key_header="api-key",
        is_azure=True,
    ),
    "groq": Dialect(
        limits=BatchLimits(
            endpoints=frozenset({"/v1/chat/completions"}),
            max_requests=50_000,
            max_bytes=100 * _MB,
        ),
        upload_fields=_PURPOSE,
        window=_whole_days,
    ),
    "together": Dialect(
        limits=BatchLimits(
            endpoints=frozenset({"/v1/chat/completions"}),
            max_requests=50_000,
            max_bytes=100 * _MB,
        ),
        upload_path="/files/upload",
        upload_fields={"purpose": "batch-api", "file_type": "jsonl"},
        window=_one_day,
        has_metadata=False,
    ),
}
"""By the kind of upstream."""


class OpenAIBatchUpstream:
    """Speaks to one provider.

    Args:
        name: As the settings call it.
        base_url: Where the API lies, usually ending in `/v1`.
        api_key: None sends none.
        api_version: That of Azure's API, for jobs whose client names none.

    Raises:
        InvalidSettings: `base_url` is not an HTTP URL, or `api_key` cannot stand in a header.
    """

    def __init__(
        self,
        *,
        name: str,
        base_url: str,
        api_key: str | None,
        dialect: Dialect,
        api_version: str | None = None,
        connect_timeout_s: float = 10.0,
        call_timeout_s: float = 60.0,
    ) -> None:
        self.name = name
        self.limits = dialect.limits
        self.find_after_s = dialect.find_after_s
        self._dialect = dialect
        self._api_version = api_version
        self._is_classic = dialect.is_azure and is_classic(base_url)
        if not api_key:
            headers = {}
        elif dialect.key_header is None:
            headers = {"Authorization": f"Bearer {api_key}"}
        else:
            headers = {dialect.key_header: api_key}
        self._http = ProviderHttp(
            name=f"{dialect.title} {name}",
            base_url=base_url,
            headers=headers,
            secrets=(api_key or "",),
            connect_timeout_s=connect_timeout_s,
            call_timeout_s=call_timeout_s,
        )

    def encode(self, job: NativeJob, line: NativeLine) -> bytes | Reply:
        # Byte for byte, but for line ends, which JSON allows between tokens.
        body = line.body.replace(b"\r", b" ").replace(b"\n", b" ")
        return b'{"custom_id":%b,"method":"POST","url":%b,"body":%b}' % (
            msgspec.json.encode(line.custom_id),
            msgspec.json.encode(self._endpoint(job)),
            body,
        )

    def _endpoint(self, job: NativeJob) -> str:
        """As the provider calls it."""
        return job.endpoint.removeprefix("/v1") if self._is_classic else job.endpoint

    def _at(self, job: NativeJob, path: str) -> str:
        """A path, with the version of the API that the client names for this job."""
        asked = job.parameters.get(VERSION_HEADER) if self._dialect.is_azure else None
        version = asked or self._api_version
        return path if version is None else f"{path}?api-version={quote(version, safe='')}"

    async def submit(self, job: NativeJob, records: AsyncIterator[bytes], note: Note) -> str:
        file_id = await self._upload(job, records)
        try:
            await note({INPUT: file_id})
            return await self._create(job, file_id)
        except (JobNotTaken, JobRefused):
            await self._delete_file(job, file_id)
            raise

    async def _upload(self, job: NativeJob, records: AsyncIterator[bytes]) -> str:
        name = f"{job.key}.jsonl"
        fields = dict(self._dialect.upload_fields)
        if "file_type" in fields:
            fields["file_name"] = name
        try:
            answer = await self._http.upload(
                self._at(job, self._dialect.upload_path),
                fields=fields,
                file_name=name,
                records=records,
                length=job.bytes,
            )
            self._http.refuse(answer, "take a file of requests")
            return self._read(answer, _Id).id
        except UpstreamDown as error:  # a file alone is no job
            raise JobNotTaken(str(error), retry_after_s=error.retry_after_s) from error

    async def _create(self, job: NativeJob, file_id: str) -> str:
        body: dict[str, Any] = {
            "input_file_id": file_id,
            "endpoint": self._endpoint(job),
            "completion_window": self._dialect.window(job.expires_at - time.time()),
        }
        if self._dialect.has_metadata:
            body["metadata"] = write_metadata(job)
        try:
            answer = await self._http.call(
                "POST",
                self._at(job, "/batches"),
                json=body,
                # The file makes it another request, with the same key or not.
                headers={"Idempotency-Key": f"{job.key}-{file_id}"},
            )
        except NoConnection as error:
            raise JobNotTaken(str(error)) from error
        self._http.refuse(answer, "create a batch")
        return self._batch(answer).id

    async def find(self, job: NativeJob, details: Details, *, since: float) -> str | None:
        if INPUT not in details:
            return None  # it did not come to the creation of a batch
        async for batch in self._iter_batches(job, since=since):
            is_ours = (batch.metadata or {}).get(KEY) == job.key
            if is_ours or batch.input_file_id == details[INPUT]:
                return batch.id
        return None

    async def _iter_batches(self, job: NativeJob, *, since: float) -> AsyncGenerator["_Batch"]:
        """The batches that were created since a time, newest first."""
        query = {"limit": str(_PAGE)}
        seen: set[str] = set()
        while True:
            answer = await self._http.call("GET", self._at(job, "/batches"), query=query)
            self._http.must_answer(answer, "list its batches")
            page = self._read_page(answer)
            for batch in page.data:
                yield batch
            fresh = [batch for batch in page.data if batch.id not in seen]
            oldest = page.data[-1].created_at if page.data else 0
            is_old = isinstance(oldest, (int, float)) and 0 < oldest < since - _SLACK_S
            if not fresh or not page.has_more or is_old:
                return
            seen.update(batch.id for batch in fresh)
            query["after"] = page.data[-1].id

    async def check(self, job: NativeJob, native_id: str) -> NativeStatus:
        answer = await self._http.call("GET", self._at(job, f"/batches/{native_id}"))
        self._http.must_answer(answer, f"know the batch {native_id}")
        batch = self._batch(answer)
        counts = batch.request_counts or _Counts()
        faults = (batch.errors.data if batch.errors else None) or []
        files = {OUTPUT: batch.output_file_id, ERRORS: batch.error_file_id}
        state = _STATES.get(batch.status.lower(), NativeState.RUNNING)
        return NativeStatus(
            state=state,
            completed=counts.completed or 0,
            failed=counts.failed or 0,
            details={name: file_id for name, file_id in files.items() if file_id},
            message=" ".join(filter(None, (fault.message for fault in faults[:3])))
            or batch.told_error,
            may_pass=bool(faults) and all(fault.code in _PASSING_CODES for fault in faults),
        )

    async def results(
        self, job: NativeJob, native_id: str, status: NativeStatus
    ) -> AsyncGenerator[NativeResult]:
        for name in (OUTPUT, ERRORS):
            if file_id := status.details.get(name):
                async for result in self._read_file(job, file_id):
                    yield result

    async def _read_file(self, job: NativeJob, file_id: str) -> AsyncGenerator[NativeResult]:
        about = await self._http.call("GET", self._at(job, f"/files/{file_id}"))
        self._http.must_answer(about, f"know the file {file_id}")
        size = self._read(about, _Size).bytes
        path = self._at(job, f"/files/{file_id}/content")
        async for text in self._http.download_lines(path, least_bytes=size):
            if (result := read_result(text)) is not None:
                yield result

    async def cancel(self, job: NativeJob, native_id: str) -> None:
        answer = await self._http.call("POST", self._at(job, f"/batches/{native_id}/cancel"))
        if answer.status in (400, 409):
            return  # it has ended, or is being cancelled
        self._http.must_answer(answer, f"cancel the batch {native_id}")

    async def clean_up(self, job: NativeJob, details: Details) -> None:
        for name in (INPUT, OUTPUT, ERRORS):
            if file_id := details.get(name):
                path = self._at(job, f"/files/{file_id}")
                answer = await self._http.call("DELETE", path)
                if answer.status != 404:
                    self._http.must_answer(answer, f"delete the file {file_id}")

    async def close(self) -> None:
        await self._http.close()

    async def _delete_file(self, job: NativeJob, file_id: str) -> None:
        """Delete a file that no batch names, if that can be done now."""
        try:
            await self._http.call("DELETE", self._at(job, f"/files/{file_id}"))
        except PenstockError:
            return

    def _batch(self, answer: ProviderAnswer) -> "_Batch":
        try:
            return msgspec.json.decode(answer.body, type=_Batch)
        except msgspec.DecodeError:
            return self._read(answer, _Wrapped).job

    def _read_page(self, answer: ProviderAnswer) -> "_Page":
        try:
            return msgspec.json.decode(answer.body, type=_Page)
        except msgspec.DecodeError:
            return _Page(data=self._read(answer, list[_Batch]))

    def _read(self, answer: ProviderAnswer, type_: type[Any]) -> Any:
        try:
            return msgspec.json.decode(answer.body, type=type_)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UpstreamDown(
                f"{self._dialect.title} {self.name} answered with something else than was "
                f"asked for: {self._http.quote(answer)}"
            ) from error


def read_result(text: bytes) -> NativeResult | None:
    """What a line of an output or error file says; None if it says of no line."""
    try:
        line = msgspec.json.decode(text, type=_ResultLine)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _read_broken(text)
    if line.response is not None and line.response.status_code is not None:
        return NativeResult(custom_id=line.custom_id, reply=_reply(line.response))
    error = line.error or _LineError()
    code = error.code or ""
    if (lack := _LACKS.get(code)) is not None:
        return NativeResult(custom_id=line.custom_id, lack=lack)
    if not code and not error.message:
        return NativeResult(custom_id=line.custom_id, lack=Lack.LOST)
    reply = Reply(
        failure=_FAILURES.get(code, Failure.INVALID),
        message=error.message or f"The provider gives no other reason than {code}.",
    )
    return NativeResult(custom_id=line.custom_id, reply=reply)


def _reply(response: "_Response") -> Reply:
    status, body = response.status_code or 0, bytes(response.body)
    if not 200 <= status < 300:
        return Reply(status_code=status, body=body, request_id=response.request_id)
    reply = read_success(status, body, response.request_id)
    return reply or Reply(
        status_code=status,
        failure=Failure.INVALID,
        message="The answer in the provider's output file is not a JSON object.",
    )


def _read_broken(text: bytes) -> NativeResult | None:
    """A line that is not as it should be, but says whose it is."""
    try:
        custom_id = msgspec.json.decode(text, type=_CustomId).custom_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return NativeResult(custom_id=custom_id, lack=Lack.LOST)


def write_metadata(job: NativeJob) -> dict[str, str]:
    """Ours, and as much of the client's as there is room for."""

    def pairs() -> Iterator[tuple[str, str]]:
        yield KEY, job.key
        yield "penstock_name", job.display_name[:512]
        for key, value in job.metadata.items():
            if len(key) <= 64 and len(value) <= 512:
                yield key, value

    found: dict[str, str] = {}
    for key, value in pairs():
        if len(found) < _MAX_METADATA:
            found.setdefault(key, value)
    return found


# The wire, as far as it is read


class _Id(msgspec.Struct):
    id: str


class _Size(msgspec.Struct):
    bytes: int | None = None


class _Counts(msgspec.Struct):
    """None as long as a provider has not counted."""

    completed: int | None = None
    failed: int | None = None


class _Fault(msgspec.Struct):
    code: str | None = None
    message: str | None = None


class _Faults(msgspec.Struct):
    data: list[_Fault] | None = None


class _Batch(msgspec.Struct):
    id: str
    status: str
    input_file_id: str | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: float | str = 0.0
    """Unix seconds, but with some a date, which is not needed."""
    errors: _Faults | None = None
    error: Any = None
    """What some say in place of `errors`: a sentence."""
    request_counts: _Counts | None = None
    metadata: dict[str, Any] | None = None

    @property
    def told_error(self) -> str:
        """Why it failed, where a provider says it in one text."""
        return self.error if isinstance(self.error, str) else ""


class _Wrapped(msgspec.Struct):
    job: _Batch


class _Page(msgspec.Struct):
    data: list[_Batch]
    has_more: bool = False


class _Response(msgspec.Struct):
    status_code: int | None = None
    request_id: str | None = None
    body: msgspec.Raw = msgspec.Raw(b"null")


class _LineError(msgspec.Struct):
    code: str | None = None
    message: str | None = None


class _ResultLine(msgspec.Struct):
    custom_id: str
    response: _Response | None = None
    error: _LineError | None = None


class _CustomId(msgspec.Struct):
    custom_id: str
