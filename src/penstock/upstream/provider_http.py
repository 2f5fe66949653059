"""HTTP to a provider's batch API: calls, uploads and downloads, all in bounded memory.

For the few large exchanges that a batch takes. Lines that are sent one by one go through
`transport`. What went wrong is told in the words of the contract (`upstream.base`): a 4xx is
final, a 429 or a connection that never was is no harm, and of all else nobody knows what the
provider has done.
"""

import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import msgspec
from pyreqwest.client import ClientBuilder
from pyreqwest.exceptions import RequestError
from pyreqwest.http import Url
from pyreqwest.multipart import FormBuilder, PartBuilder
from pyreqwest.request import RequestBuilder
from pyreqwest.response import Response

from penstock import __version__
from penstock.errors import InvalidSettings, JobNotTaken, JobRefused, UpstreamDown
from penstock.upstream.openai_http import (
    SENDABLE,
    parse_base_url,
    parse_retry_after,
    uses_proxy,
)
from penstock.upstream.result_lines import ResultLines

T = TypeVar("T")

_ANSWER_BYTES = 8 << 20
_QUOTE_CHARACTERS = 300
_PIECE_BYTES = 256 << 10
_CALL_S = 60.0
_TRANSFER_S = 1800.0
_NOT_KNOWN = frozenset({408, 409, 425})
"""4xx after which a provider may have done what it was asked all the same."""


@dataclass(frozen=True, slots=True)
class ProviderAnswer:
    """A whole answer."""

    status: int
    body: bytes
    retry_after_s: float | None
    upload_url: str | None = None
    """Where Google wants a file to be sent, as a header of its own says."""
    error_type: str = ""
    """The name of an error, where a provider tells it in `x-amzn-errortype`."""

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300


class NoConnection(UpstreamDown):
    """The provider was not reached, so it has done nothing."""


class ProviderHttp:
    """One provider's API.

    Args:
        name: The upstream's, for messages.
        base_url: To which paths are added.
        headers: Sent with each request; what they hold is never told.
        secrets: What is blotted out where a provider sends it back.
        is_versioned: Whether a `base_url` without a path means the one with `/v1`.

    Raises:
        InvalidSettings: `base_url` is not an HTTP URL, or a header cannot be sent.
    """

    def __init__(
        self,
        *,
        name: str,
        base_url: str,
        headers: Mapping[str, str],
        secrets: tuple[str, ...] = (),
        is_versioned: bool = True,
        connect_timeout_s: float = 10.0,
        call_timeout_s: float = _CALL_S,
        transfer_timeout_s: float = _TRANSFER_S,
    ) -> None:
        base = parse_base_url(name, base_url)
        self._name = name
        if not is_versioned and not Url(base_url.strip()).path.rstrip("/"):
            base = base.with_path("/")
        self.base = str(base).rstrip("/")
        """To which paths are added, without a slash at its end."""
        self._secrets = [secret for secret in secrets if secret]
        self._call_s = timedelta(seconds=call_timeout_s)
        self._transfer_s = timedelta(seconds=transfer_timeout_s)
        for value in headers.values():
            if not SENDABLE.fullmatch(value):
                raise InvalidSettings(  # without the key
                    f"The api_key of upstream {name} has characters that cannot be sent in a "
                    "header; it must be one line of visible characters."
                )
        builder = (
            ClientBuilder()
            .connect_timeout(timedelta(seconds=connect_timeout_s))
            .pool_idle_timeout(timedelta(seconds=4))
            .follow_redirects(False)
            .referer(False)
            .gzip(False)
            .brotli(False)
            .zstd(False)
            .deflate(False)
        )
        if not uses_proxy(base):
            builder = builder.no_proxy()
        agent = {"User-Agent": f"penstock/{__version__}", "Accept": "application/json"}
        self._client = builder.default_headers({**agent, **headers}).build()
        self._is_closed = False

    async def call(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> ProviderAnswer:
        """Make a call and read the whole answer, of at most 8 MiB.

        Raises:
            UpstreamDown: No whole answer came; `NoConnection` if the provider was not reached.
        """
        request = self._request(method, path).timeout(self._call_s)
        if query:
            request = request.query(query)
        if json is not None:
            request = request.header("Content-Type", "application/json")
            request = request.body_bytes(msgspec.json.encode(json))
        for key, value in (headers or {}).items():
            request = request.header(key, value)
        return await self._exchange(request)

    async def upload(
        self,
        path: str,
        *,
        fields: Mapping[str, str],
        file_name: str,
        records: AsyncIterator[bytes],
        length: int,
    ) -> ProviderAnswer:
        """Send a file of lines in a form, as it is read.

        Args:
            records: The lines, without line ends.
            length: Of all lines with their ends, in bytes.

        Raises:
            UpstreamDown: As `call`.
        """
        part = PartBuilder.from_stream_with_length(_pieces(records), length)
        form = FormBuilder()
        for key, value in fields.items():
            form = form.text(key, value)
        form = form.part("file", part.file_name(file_name).mime("application/jsonl"))
        request = self._request("POST", path).timeout(self._transfer_s).multipart(form)
        return await self._exchange(request)

    async def send_lines(
        self,
        path: str,
        *,
        records: AsyncIterator[bytes],
        length: int,
        headers: Mapping[str, str] | None = None,
        method: str = "POST",
    ) -> ProviderAnswer:
        """Send a file of lines as the body itself, as it is read.

        Args:
            records: The lines, without line ends.
            length: Of all lines with their ends, in bytes.

        Raises:
            UpstreamDown: As `call`.
        """
        request = self._request(method, path).timeout(self._transfer_s)
        for key, value in {"Content-Length": str(length), **(headers or {})}.items():
            request = request.header(key, value)
        return await self._exchange(request.body_stream(_pieces(records)))

    async def post_stream(self, path: str, pieces: AsyncIterator[bytes]) -> ProviderAnswer:
        """Send a JSON body as it is made.

        Raises:
            UpstreamDown: As `call`.
        """
        request = self._request("POST", path).timeout(self._transfer_s)
        request = request.header("Content-Type", "application/json")
        return await self._exchange(request.body_stream(_join(pieces)))

    async def download_lines(
        self, path: str, *, least_bytes: int | None = None
    ) -> AsyncGenerator[bytes]:
        """The lines of a file, without their ends; one is held at a time.

        Args:
            path: Or a whole URL, which gets all headers of this one: give it only to a
                `ProviderHttp` without a key.
            least_bytes: How long the file is, if that is known: less of it was cut off.

        Raises:
            JobRefused: The provider does not have it (any more).
            UpstreamDown: It did not come, or not all of it.
        """
        request = self._request("GET", path).timeout(self._transfer_s)
        request = request.header("Accept", "*/*")
        try:
            async with request.build_streamed() as response:
                if response.status != 200:
                    self.refuse(await self._read(response), "give its results")
                lines = ResultLines(self._name)
                while (chunk := await response.body_reader.read(_PIECE_BYTES)) is not None:
                    data = chunk.to_bytes()
                    if not data:
                        break
                    for line in lines.feed(data):
                        yield line
        except RequestError as error:
            raise self._down(error) from None
        if least_bytes is not None and lines.size < least_bytes:
            raise UpstreamDown(
                f"{self._name} sent {lines.size} of {least_bytes} bytes of the results."
            )
        for line in lines.finish():
            yield line

    def refuse(self, answer: ProviderAnswer, what: str) -> None:
        """Raise what an answer means that is not a success.

        Args:
            what: What the provider was asked for, as in "did not ...".

        Raises:
            JobNotTaken: It has too much to do; nothing was done.
            JobRefused: It never will.
            UpstreamDown: Nobody knows.
        """
        if answer.is_success:
            return
        message = f"{self._name} did not {what} (HTTP {answer.status}): {self.quote(answer)}"
        if answer.status == 429:
            raise JobNotTaken(message, retry_after_s=answer.retry_after_s)
        if answer.status >= 500 or answer.status in _NOT_KNOWN:
            raise UpstreamDown(message, retry_after_s=answer.retry_after_s)
        raise JobRefused(message, is_too_large=answer.status == 413)

    def must_answer(self, answer: ProviderAnswer, what: str) -> None:
        """Raise what an answer to a question means that is no answer.

        Args:
            what: As for `refuse`.

        Raises:
            JobRefused: There is no such thing.
            UpstreamDown: It is another refusal, which may be mended: of a key, for example.
        """
        try:
            self.refuse(answer, what)
        except JobRefused as error:
            if answer.status in (404, 410):
                raise
            raise UpstreamDown(str(error), retry_after_s=answer.retry_after_s) from error
        except JobNotTaken as error:
            raise UpstreamDown(str(error), retry_after_s=error.retry_after_s) from error

    def read(self, answer: ProviderAnswer, type_: type[T], *, strict: bool = True) -> T:
        """What a successful answer says.

        Args:
            strict: Whether numbers must be such; some providers write large ones as texts.

        Raises:
            UpstreamDown: It is something else.
        """
        try:
            answer.body.decode()
            return msgspec.json.decode(answer.body, type=type_, strict=strict)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UpstreamDown(
                f"{self._name} answered with something else than was asked for: "
                f"{self.quote(answer)}"
            ) from error

    def quote(self, answer: ProviderAnswer) -> str:
        """What an answer says, for a person, without secrets."""
        text = _error_message(answer.body) or answer.body[: 8 * _QUOTE_CHARACTERS].decode(
            errors="replace"
        )
        for secret in self._secrets:
            text = text.replace(secret, "***")
        text = " ".join(re.sub(r"[^\x20-\x7e\xa0-\U0010ffff]", " ", text).split())
        if not text:
            return "it did not say why."
        return text if len(text) <= _QUOTE_CHARACTERS else text[:_QUOTE_CHARACTERS] + "…"

    async def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            await self._client.close()

    def _request(self, method: str, path: str) -> RequestBuilder:
        url = path if path.startswith(("http://", "https://")) else self.base + path
        return self._client.request(method, Url(url))

    async def _exchange(self, request: RequestBuilder) -> ProviderAnswer:
        try:
            async with request.build_streamed() as response:
                return await self._read(response)
        except RequestError as error:
            raise self._down(error) from None

    async def _read(self, response: Response) -> ProviderAnswer:
        received = await response.body_reader.read(_ANSWER_BYTES + 1)
        body = b"" if received is None else received.to_bytes()
        if len(body) > _ANSWER_BYTES:
            raise UpstreamDown(f"{self._name} sent more than {_ANSWER_BYTES} bytes.")
        retry_after = _header(response, "retry-after")
        in_ms = _header(response, "retry-after-ms")
        return ProviderAnswer(
            status=response.status,
            body=body,
            retry_after_s=parse_retry_after(retry_after, in_ms, now=time.time()),
            upload_url=_header(response, "x-goog-upload-url"),
            error_type=(_header(response, "x-amzn-errortype") or "").partition(":")[0],
        )

    def _down(self, error: RequestError) -> UpstreamDown:
        causes = [cause["message"] for cause in error.details.get("causes") or ()]
        reason = causes[-1] if causes else error.message
        if "client error (Connect)" in causes:
            return NoConnection(f"{self._name} cannot be reached: {reason}.")
        return UpstreamDown(f"{self._name} did not answer: {reason}.")


async def _pieces(records: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """Records as lines, joined to pieces that are worth sending."""
    async for piece in _join(record + b"\n" async for record in records):
        yield piece


async def _join(small: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """What comes, joined to pieces that are worth sending."""
    waiting: list[bytes] = []
    size = 0
    async for piece in small:
        waiting.append(piece)
        size += len(piece)
        if size >= _PIECE_BYTES:
            yield b"".join(waiting)
            waiting, size = [], 0
    if waiting:
        yield b"".join(waiting)


def _header(response: Response, name: str) -> str | None:
    try:
        return response.get_header(name)
    except ValueError:  # not ASCII
        return None


class _Error(msgspec.Struct):
    message: str


class _ErrorBody(msgspec.Struct):
    error: _Error | None = None
    message: str | None = None


def _error_message(body: bytes) -> str | None:
    """What stands in `error.message`, where nearly all providers have it, or in `message`."""
    try:
        found = msgspec.json.decode(body, type=_ErrorBody)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return found.error.message if found.error is not None else found.message
