"""An OpenAI-compatible server as a place where lines are sent, on pyreqwest.

`send` is the hottest call of the program, so everything that is the same for all calls (URLs,
headers, limits) is made once. Of an answer only `usage` is read; decoding that proves on the
way that the whole body is one JSON object.

An answer is read as a stream with a bound: one that announces, or turns out to have, more than
`max_reply_bytes` is dropped together with its connection, and never more than that is held.
Compressed answers are not asked for, so that the bound is one on what comes over the wire, too.

Facts about pyreqwest 0.15 that shape this module, each held by a test:

- its `ConnectError` and `ConnectTimeoutError` also stand for a connection that was cut, or an
  answer that did not come, after the request had left; only their causes tell which it was;
- `get_header` raises `ValueError` for a value that is not ASCII;
- a cancelled call returns at once, but its connection stays until the answer begins or the
  time is up: the client lets its task run on, so the upstream works on for nobody;
- on asyncio's own loop, the interpreter can abort at exit while the client's thread lets go of
  its last call, closed or not: `close` therefore waits a moment.
"""

import asyncio
import re
import time
from datetime import UTC, timedelta
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Annotated

import msgspec
from pyreqwest.client import Client, ClientBuilder
from pyreqwest.exceptions import RequestError, RequestTimeoutError
from pyreqwest.http import Url
from pyreqwest.request import StreamRequest
from pyreqwest.response import Response

from penstock import __version__
from penstock.errors import InvalidSettings, UpstreamDown
from penstock.model import ENDPOINTS
from penstock.upstream.base import Failure, Reply

MAX_RETRY_AFTER_S = 24 * 60 * 60
"""A longer wait than this is taken for a mistake of the upstream."""

_QUOTE_CHARACTERS = 200
_MAX_TOKENS = 2**48  # more than this in one reply is no count
# uvicorn, and so vLLM, closes a connection that is idle for 5 s. One that is taken from the
# pool at that moment would be cut under a request.
_POOL_IDLE_S = 4.0
# 10 ms were enough in each of 15 runs on one CPU in which 8 aborted without; see above.
_EXIT_PAUSE_S = 0.025


class OpenAIHttpUpstream:
    """Sends each line as one HTTP/1.1 request of its own.

    Redirects are not followed: a 3xx is a reply like any other that is not 2xx. A proxy that
    the environment names (`HTTPS_PROXY` and the like) is used, but never to reach loopback.

    Args:
        name: As the settings call it.
        base_url: Where the API lies, usually ending in `/v1`, which is added to a URL
            without any path.
        api_key: Sent as a bearer token; None sends none.
        max_concurrency: How many requests it takes at the same time. The caller keeps to it.
        request_timeout_s: How long a call may take, from connecting to the answer's last byte.
        connect_timeout_s: How long connecting may take of that.
        max_reply_bytes: The longest body that is accepted.

    Raises:
        InvalidSettings: `base_url` is not an HTTP URL, or `api_key` cannot stand in a header.
    """

    def __init__(
        self,
        *,
        name: str,
        base_url: str,
        api_key: str | None,
        max_concurrency: int,
        request_timeout_s: float,
        connect_timeout_s: float = 10.0,
        max_reply_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        self.name = name
        self.max_concurrency = max_concurrency
        self._request_timeout_s = request_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._max_reply_bytes = max_reply_bytes
        self._key = api_key.encode() if api_key else None
        base = _parse_base_url(name, base_url)
        self._base = str(base)
        self._urls = {endpoint: self._url(endpoint) for endpoint in ENDPOINTS}
        self._models_url = self._url("/models")
        self._client = self._build_client(base, api_key)
        self._is_closed = False

    async def send(self, endpoint: str, body: bytes) -> Reply:
        url = self._urls.get(endpoint) or self._url(endpoint)
        return await self._exchange(self._client.post(url).body_bytes(body).build_streamed())

    async def list_models(self) -> list[str]:
        reply = await self._exchange(self._client.get(self._models_url).build_streamed())
        if not reply.is_success:
            reason = reply.message or f"it answered with HTTP status {reply.status_code}."
            raise UpstreamDown(f"The upstream {self.name} did not list its models: {reason}")
        try:
            models = _decode_models(reply.body)
        except msgspec.DecodeError as error:
            raise UpstreamDown(
                f"The upstream {self.name} did not answer with a list of models: {error}."
            ) from error
        return [model.id for model in models.data]

    async def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        await self._client.close()
        await asyncio.sleep(_EXIT_PAUSE_S)

    def _url(self, endpoint: str) -> Url:
        return Url(self._base + endpoint.removeprefix("/v1"))

    def _build_client(self, base: Url, api_key: str | None) -> Client:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        builder = (
            ClientBuilder()
            .user_agent(f"penstock/{__version__}")
            .timeout(timedelta(seconds=self._request_timeout_s))
            .connect_timeout(timedelta(seconds=self._connect_timeout_s))
            .pool_idle_timeout(timedelta(seconds=_POOL_IDLE_S))
            .pool_max_idle_per_host(self.max_concurrency)
            .follow_redirects(False)
            .referer(False)
            .gzip(False)
            .brotli(False)
            .zstd(False)
            .deflate(False)
        )
        if _is_loopback(base.host_str):
            builder = builder.no_proxy()
        try:
            return builder.default_headers(headers).build()
        except ValueError:  # its message holds the key
            raise InvalidSettings(
                f"The api_key of upstream {self.name} has characters that cannot be sent in a"
                " header; it must be one line of visible characters."
            ) from None

    async def _exchange(self, request: StreamRequest) -> Reply:
        limit = self._max_reply_bytes
        try:
            async with request as response:
                status = response.status
                request_id = _header(response, "x-request-id")
                if _announces_more_than(limit, response):
                    return self._too_long(status, request_id)
                received = await response.body_reader.read(limit + 1)
                body = b"" if received is None else received.to_bytes()
        except RequestError as error:
            return self._failed(error)
        if len(body) > limit:
            return self._too_long(status, request_id)
        if status >= 300:
            return Reply(
                status_code=status,
                body=body,
                request_id=request_id,
                retry_after_s=parse_retry_after(
                    _header(response, "retry-after"),
                    _header(response, "retry-after-ms"),
                    now=time.time(),
                ),
            )
        try:
            if not body.isascii():
                body.decode()  # msgspec does not look into what it skips
            usage = _decode_answer(body).usage or _NO_USAGE
        except msgspec.ValidationError:
            usage = _read_odd_usage(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            usage = None
        if usage is None:
            return self._invalid(response, request_id, body)
        inputs = usage.prompt_tokens_details or usage.input_tokens_details or _NO_DETAILS
        outputs = usage.completion_tokens_details or usage.output_tokens_details or _NO_DETAILS
        return Reply(
            status_code=status,
            body=body,
            request_id=request_id,
            input_tokens=usage.prompt_tokens or usage.input_tokens,
            cached_tokens=inputs.cached_tokens,
            output_tokens=usage.completion_tokens or usage.output_tokens,
            reasoning_tokens=outputs.reasoning_tokens,
            total_tokens=usage.total_tokens or usage.input_tokens + usage.output_tokens,
        )

    def _failed(self, error: RequestError) -> Reply:
        causes = [cause["message"] for cause in error.details.get("causes") or ()]
        reason = causes[-1] if causes else error.message
        is_timeout = isinstance(error, RequestTimeoutError)
        if "client error (Connect)" in causes:
            failure = Failure.UNREACHABLE
            within = f" within {self._connect_timeout_s:g} s" if is_timeout else ""
            message = f"No connection{within}: {reason}."
        elif is_timeout:
            failure = Failure.TIMEOUT
            message = f"No whole answer came within {self._request_timeout_s:g} s."
        else:
            failure = Failure.DISCONNECTED
            message = f"The connection ended before the answer was whole: {reason}."
        return Reply(failure=failure, message=message)

    def _too_long(self, status: int, request_id: str | None) -> Reply:
        return Reply(
            status_code=status,
            request_id=request_id,
            failure=Failure.INVALID,
            message=f"The answer (HTTP {status}) is longer than {self._max_reply_bytes} bytes.",
        )

    def _invalid(self, response: Response, request_id: str | None, body: bytes) -> Reply:
        content_type = _header(response, "content-type") or "none"
        message = (
            f"The answer (HTTP {response.status}, content type {content_type}) is not one JSON"
            f" object: {self._quote(body)}"
        )
        return Reply(
            status_code=response.status,
            body=body,
            request_id=request_id,
            failure=Failure.INVALID,
            message=message,
        )

    def _quote(self, body: bytes) -> str:
        if not body:
            return "it is empty."
        if self._key:  # some servers send back what they were sent
            body = body.replace(self._key, b"***")
        text = body[: 8 * _QUOTE_CHARACTERS].decode(errors="replace")
        text = "".join(char if char.isprintable() else " " for char in text)
        text = " ".join(text.split())
        return text if len(text) <= _QUOTE_CHARACTERS else text[:_QUOTE_CHARACTERS] + "…"


def parse_retry_after(
    retry_after: str | None, retry_after_ms: str | None = None, *, now: float
) -> float | None:
    """Read how long an upstream asks to wait.

    Args:
        retry_after: The value of `Retry-After`: seconds or an HTTP date (RFC 9110, 10.2.3).
        retry_after_ms: The value of `retry-after-ms`, which some APIs add because it is finer;
            it counts first.
        now: The time, in Unix seconds.

    Returns:
        Seconds from 0 to `MAX_RETRY_AFTER_S`, or None if there is no such figure.
    """
    if retry_after_ms is not None and _NUMBER.fullmatch(retry_after_ms):
        wait_s = float(retry_after_ms) / 1000
    elif retry_after is None:
        return None
    elif _NUMBER.fullmatch(retry_after):
        wait_s = float(retry_after)
    else:
        try:
            date = parsedate_to_datetime(retry_after)
            wait_s = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now
        except (ValueError, OverflowError):
            return None
    return wait_s if 0 <= wait_s <= MAX_RETRY_AFTER_S else None


_NUMBER = re.compile(r"[0-9]{1,300}(\.[0-9]{1,300})?")


def _parse_base_url(name: str, base_url: str) -> Url:
    """The URL to which an endpoint's path is added, without a slash at its end."""
    try:
        url = Url(base_url.strip())
        path = url.path.rstrip("/") or "/v1"
    except ValueError as error:
        raise InvalidSettings(
            f"The base_url of upstream {name} is not a URL ({error}); it must look like"
            " http://host:port/v1."
        ) from error
    if url.scheme not in ("http", "https"):
        raise InvalidSettings(
            f"The base_url of upstream {name} begins with {url.scheme}; it must begin with http"
            " or https."
        )
    if url.query_string or url.fragment:
        raise InvalidSettings(
            f"The base_url of upstream {name} has a query or a fragment; it must end with its"
            " path."
        )
    return url.with_path(path)


def _is_loopback(host: str | None) -> bool:
    if host is None or host == "localhost":
        return host is not None
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _header(response: Response, name: str) -> str | None:
    try:
        return response.get_header(name)
    except ValueError:  # not ASCII
        return None


def _announces_more_than(limit: int, response: Response) -> bool:
    length = _header(response, "content-length")
    # A number of more than 18 digits could be more than Python's limit for reading one.
    return (
        length is not None and length.isdecimal() and (len(length) > 18 or int(length) > limit)
    )


_Count = Annotated[int, msgspec.Meta(ge=0, le=_MAX_TOKENS)]


class _Details(msgspec.Struct, gc=False):
    cached_tokens: _Count = 0
    reasoning_tokens: _Count = 0


class _Usage(msgspec.Struct, gc=False):
    """Each API's names side by side: chat and completions first, then responses, messages."""

    prompt_tokens: _Count = 0
    completion_tokens: _Count = 0
    total_tokens: _Count = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens: _Count = 0
    output_tokens: _Count = 0
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _Answer(msgspec.Struct, gc=False):
    usage: _Usage | None = None


class _AnswerWithAnyUsage(msgspec.Struct):
    usage: msgspec.Raw = msgspec.Raw()


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


_NO_USAGE = _Usage()
_NO_DETAILS = _Details()
_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_answer_with_any_usage = msgspec.json.Decoder(_AnswerWithAnyUsage).decode
_decode_models = msgspec.json.Decoder(_Models).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_count = msgspec.json.Decoder(_Count).decode


def _read_odd_usage(body: bytes) -> _Usage | None:
    """What can be read of a usage that is not as it should be; None if `body` is no object."""
    try:
        raw = _decode_answer_with_any_usage(body).usage
    except (msgspec.DecodeError, RecursionError):
        return None
    usage = _Usage()
    for name, value in _fields(raw).items():
        if name.endswith("_tokens_details"):
            details = _Details()
            for detail, count in _fields(value).items():
                if detail in _Details.__struct_fields__:
                    setattr(details, detail, _count(count))
            if name in _Usage.__struct_fields__:
                setattr(usage, name, details)
        elif name in _Usage.__struct_fields__:
            setattr(usage, name, _count(value))
    return usage


def _fields(raw: msgspec.Raw) -> dict[str, msgspec.Raw]:
    try:
        return _decode_fields(raw)
    except (msgspec.DecodeError, RecursionError):
        return {}


def _count(raw: msgspec.Raw) -> int:
    try:
        return _decode_count(raw)
    except msgspec.DecodeError:
        return 0
