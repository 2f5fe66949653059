"""Anthropic's Message Batches API.

A batch is one call that carries all requests; there is no file, no name and no metadata. What a
batch shows of us are the IDs of its requests, and these only once it has ended. So each ID
begins with the job's key, and a batch whose creation brought no answer is looked for among
those of its size that were created since: one that has ended shows in its results whose it is,
and as long as one is at work nobody can tell, which `find` says rather than guess.

Source: https://platform.claude.com/docs/en/api/messages/batches and
https://platform.claude.com/docs/en/build-with-claude/batch-processing, 25 November 2026.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import datetime
from typing import TypeVar

import msgspec

from penstock.errors import JobNotTaken, JobRefused, UpstreamDown
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
from penstock.upstream.translation import anthropic
from penstock.upstream.translation.answers import write_untranslatable
from penstock.upstream.translation.base import CHAT, RESPONSES, Untranslatable

T = TypeVar("T")

LIMITS = BatchLimits(
    endpoints=frozenset({CHAT, RESPONSES, anthropic.MESSAGES}),
    max_requests=100_000,
    max_bytes=256_000_000,
    one_model=False,
)
BATCH_ID = "batch_id"
REQUESTS = "requests"
"""How many there are, by which `find` knows a batch of another size for another's."""
_PATH = "/messages/batches"
_PAGE = 100
_SLACK_S = 3600.0
"""By how much the provider's clock may be behind ours."""
_LACKS = {"canceled": Lack.CANCELLED, "expired": Lack.EXPIRED}
_LOST = NativeResult(custom_id="", lack=Lack.LOST)


class AnthropicBatchUpstream:
    """Speaks to Anthropic, or to a server with the same API.

    Args:
        name: As the settings call it.
        base_url: Where the API lies, such as `https://api.anthropic.com/v1`.
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
        headers = {"anthropic-version": anthropic.API_VERSION}
        if api_key:
            headers["x-api-key"] = api_key
        self._http = ProviderHttp(
            name=f"The upstream {name}",
            base_url=base_url,
            headers=headers,
            secrets=(api_key or "",),
            connect_timeout_s=connect_timeout_s,
            call_timeout_s=call_timeout_s,
        )

    def encode(self, job: NativeJob, line: NativeLine) -> bytes | Reply:
        try:
            model = msgspec.json.decode(line.body, type=_Model).model or job.model
            params = anthropic.translate_request(job.endpoint, model, line.body)
        except msgspec.DecodeError:
            return write_untranslatable("model", "It must be a string.")
        except Untranslatable as error:
            return write_untranslatable(error.field, error.message)
        custom_id = msgspec.json.encode(_prefix(job) + line.custom_id)
        return b'{"custom_id":%b,"params":%b}' % (custom_id, params)

    async def submit(self, job: NativeJob, records: AsyncIterator[bytes], note: Note) -> str:
        await note({REQUESTS: str(job.requests)})
        try:
            answer = await self._http.post_stream(_PATH, _body(records))
        except NoConnection as error:
            raise JobNotTaken(str(error)) from error
        self._http.refuse(answer, "create a batch")
        return self._read(answer, _Batch).id

    async def find(self, job: NativeJob, details: Details, *, since: float) -> str | None:
        if REQUESTS not in details:
            return None  # it did not come to the creation of a batch
        at_work: list[str] = []
        async for batch in self._iter_batches(since=since):
            if str(batch.request_counts.total) != details[REQUESTS]:
                continue
            if batch.processing_status != "ended":
                at_work.append(batch.id)
            elif await self._is_ours(job, batch.id):
                return batch.id
        if at_work:
            raise UpstreamDown(
                f"The upstream {self.name} works on {len(at_work)} batches of this size, and "
                "shows only at their end whose they are."
            )
        return None

    async def _is_ours(self, job: NativeJob, native_id: str) -> bool:
        lines = self._http.download_lines(f"{_PATH}/{native_id}/results")
        try:
            async for text in lines:
                return _decode(text, _Result).custom_id.startswith(_prefix(job))
        except JobRefused:  # archived, so older than any job that is looked for
            return False
        except msgspec.DecodeError as error:
            raise UpstreamDown(
                f"The results of the batch {native_id} of the upstream {self.name} do not say "
                "of which requests they are."
            ) from error
        finally:
            await lines.aclose()
        return False

    async def _iter_batches(self, *, since: float) -> AsyncGenerator["_Batch"]:
        """The batches that were created since a time, newest first."""
        query = {"limit": str(_PAGE)}
        while True:
            answer = await self._http.call("GET", _PATH, query=query)
            self._http.must_answer(answer, "list its batches")
            page = self._read(answer, _Page)
            for batch in page.data:
                if batch.created_at.timestamp() < since - _SLACK_S:
                    return
                yield batch
            last = page.data[-1].id if page.data else None
            if not page.has_more or last is None or last == query.get("after_id"):
                return
            query["after_id"] = last

    async def check(self, job: NativeJob, native_id: str) -> NativeStatus:
        answer = await self._http.call("GET", f"{_PATH}/{native_id}")
        self._http.must_answer(answer, f"know the batch {native_id}")
        batch = self._read(answer, _Batch)
        return NativeStatus(
            state=_state(batch),
            completed=batch.request_counts.succeeded,
            failed=batch.request_counts.errored,
            details={BATCH_ID: native_id},
        )

    async def results(
        self, job: NativeJob, native_id: str, status: NativeStatus
    ) -> AsyncGenerator[NativeResult]:
        prefix = _prefix(job)
        async for text in self._http.download_lines(f"{_PATH}/{native_id}/results"):
            try:
                result = read_result(text, job, created_at=int(time.time()))
            except msgspec.DecodeError:
                continue  # it does not say of which line it is
            if result.custom_id.startswith(prefix):
                custom_id = result.custom_id.removeprefix(prefix)
                yield msgspec.structs.replace(result, custom_id=custom_id)

    async def cancel(self, job: NativeJob, native_id: str) -> None:
        answer = await self._http.call("POST", f"{_PATH}/{native_id}/cancel")
        if answer.status in (400, 409):
            return  # it has ended, or is being cancelled
        self._http.must_answer(answer, f"cancel the batch {native_id}")

    async def clean_up(self, job: NativeJob, details: Details) -> None:
        if native_id := details.get(BATCH_ID):
            answer = await self._http.call("DELETE", f"{_PATH}/{native_id}")
            if answer.status != 404:
                self._http.must_answer(answer, f"delete the batch {native_id}")

    async def close(self) -> None:
        await self._http.close()

    def _read(self, answer: ProviderAnswer, type_: type[T]) -> T:
        try:
            return _decode(answer.body, type_)
        except msgspec.DecodeError as error:
            raise UpstreamDown(
                f"The upstream {self.name} answered with something else than was asked for: "
                f"{self._http.quote(answer)}"
            ) from error


def read_result(text: bytes, job: NativeJob, *, created_at: int) -> NativeResult:
    """What a line of results says, under the ID that the provider was given.

    Raises:
        msgspec.DecodeError: It does not say of which request it is.
    """
    found = _decode(text, _Result)
    try:
        result = _decode(bytes(found.result), _Outcome)
    except msgspec.DecodeError:
        return msgspec.structs.replace(_LOST, custom_id=found.custom_id)
    match result.type:
        case "succeeded":
            told = result.message
        case "errored":
            told = result.error
        case kind:
            lack = _LACKS.get(kind, Lack.LOST)
            return NativeResult(custom_id=found.custom_id, lack=lack)
    reply = anthropic.translate_reply(
        job.endpoint, job.model, bytes(told), created_at=created_at
    )
    return NativeResult(custom_id=found.custom_id, reply=reply)


def _prefix(job: NativeJob) -> str:
    """What the IDs of a job's requests begin with; with a line's, at most 53 of 64."""
    return f"{job.key}_"


async def _body(records: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    separator = b'{"requests":['
    async for record in records:
        yield separator + record
        separator = b","
    yield b"]}"


def _state(batch: "_Batch") -> NativeState:
    if batch.processing_status != "ended":
        return NativeState.RUNNING
    counts = batch.request_counts
    if counts.canceled:
        return NativeState.CANCELLED
    return NativeState.EXPIRED if counts.expired else NativeState.ENDED


def _decode(body: bytes, type_: type[T]) -> T:
    """As msgspec does, with one error for all that is wrong."""
    try:
        body.decode()
        return msgspec.json.decode(body, type=type_)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error


# The wire, as far as it is read


class _Model(msgspec.Struct):
    model: str | None = None


class _Counts(msgspec.Struct):
    processing: int = 0
    succeeded: int = 0
    errored: int = 0
    canceled: int = 0
    expired: int = 0

    @property
    def total(self) -> int:
        return self.processing + self.succeeded + self.errored + self.canceled + self.expired


class _Batch(msgspec.Struct):
    id: str
    processing_status: str
    created_at: datetime
    request_counts: _Counts


class _Page(msgspec.Struct):
    data: list[_Batch]
    has_more: bool = False


class _Result(msgspec.Struct):
    custom_id: str
    result: msgspec.Raw = msgspec.Raw(b"null")


class _Outcome(msgspec.Struct):
    type: str
    message: msgspec.Raw = msgspec.Raw(b"null")
    error: msgspec.Raw = msgspec.Raw(b"null")
