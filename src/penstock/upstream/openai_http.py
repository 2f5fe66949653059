"""An OpenAI-compatible server as a place where lines are sent.

`send` is the hottest call of the program, so everything that is the same for all calls is made
once. Of an answer only `usage` is read; decoding that proves on the way that the whole body is
one JSON object. How the bytes come and go stands in `http1` and `reqwest`.
"""

import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Annotated
from urllib.parse import quote
from urllib.request import getproxies, proxy_bypass

import msgspec
from pyreqwest.http import Url

from penstock import __version__
from penstock.errors import InvalidSettings, UpstreamDown
from penstock.model import ENDPOINTS
from penstock.upstream.base import EngineLoad, Failure, Reply
from penstock.upstream.engine_load import parse_load
from penstock.upstream.http1 import Http1Transport
from penstock.upstream.reqwest import ReqwestTransport
from penstock.upstream.streaming import (
    BadStream,
    CutStream,
    ask_for_stream,
    assemble,
    can_stream,
)
from penstock.upstream.transport import Answer, Transport, TransportFailed, TransportOptions

MAX_RETRY_AFTER_S = 24 * 60 * 60
"""A longer wait than this is taken for a mistake of the upstream."""

_EVENT_STREAM = "text/event-stream"
_QUOTE_CHARACTERS = 200
_MAX_MODELS = 10_000
_MAX_TOKENS = 2**48  # more than this in one reply is no count


Locate = Callable[[str, bytes], str]
"""Where a line is sent, below the base URL, by its endpoint and body."""
MakeTransport = Callable[[Url, TransportOptions], Transport]
"""Gets the base URL, of which it is to use the origin."""


class OpenAIHttpUpstream:
    """Sends each line as one HTTP/1.1 request of its own.

    Redirects are not followed: a 3xx is a reply like any other that is not 2xx. A proxy that
    the environment names (`HTTPS_PROXY` and the like) is used, but never to reach loopback.

    Args:
        name: As the settings call it.
        base_url: Where the API lies, usually ending in `/v1`, which is added to a URL
            without any path.
        api_key: Sent as a bearer token; None sends none.
        key_header: In which header it is sent instead; None as a bearer token.
        max_concurrency: How many requests it takes at the same time. The caller keeps to it.
        request_timeout_s: How long a call may take, from connecting to the answer's last byte.
        connect_timeout_s: How long connecting may take of that.
        first_byte_timeout_s: How long an answer may take to begin; 0 sets no limit.
        silence_timeout_s: How long nothing may come of it then; 0 sets no limit.
        streams: Whether answers are asked for piece by piece, where the endpoint can do that;
            a reply is the same as without.
        headers: Sent with each request, beside those that all have.
        query: Ends each address, such as `api-version=2024-10-21`; empty adds nothing.
        locate: Where a line is sent; None: where its endpoint says.
        max_reply_bytes: The longest body that is accepted.
        make_transport: Makes what its requests go through.

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
        first_byte_timeout_s: float = 0.0,
        silence_timeout_s: float = 0.0,
        streams: bool = False,
        headers: Mapping[str, str] | None = None,
        key_header: str | None = None,
        query: str = "",
        locate: Locate | None = None,
        max_reply_bytes: int = 64 * 1024 * 1024,
        make_transport: MakeTransport | None = None,
    ) -> None:
        self.name = name
        self.max_concurrency = max_concurrency
        self._max_reply_bytes = max_reply_bytes
        self._streams = streams
        self._key = api_key.encode() if api_key else None
        base = parse_base_url(name, base_url)
        self._base_path = base.path.rstrip("/")
        self._query = f"?{query}" if query else ""
        self._locate = locate
        self._paths = {endpoint: self._path(endpoint) for endpoint in ENDPOINTS}
        sent = {
            "User-Agent": f"penstock/{__version__}",
            "Content-Type": "application/json",
            "Accept": "application/json",
            **(headers or {}),
        }
        if api_key:
            if not SENDABLE.fullmatch(api_key):
                raise InvalidSettings(  # without the key
                    f"The api_key of upstream {name} has characters that cannot be sent in a"
                    " header; it must be one line of visible characters."
                )
            if key_header is None:
                sent["Authorization"] = f"Bearer {api_key}"
            else:
                sent[key_header] = api_key
        self._transport = (make_transport or choose_transport)(
            base,
            TransportOptions(
                headers=sent,
                timeout_s=request_timeout_s,
                connect_timeout_s=connect_timeout_s,
                first_byte_timeout_s=first_byte_timeout_s,
                silence_timeout_s=silence_timeout_s,
                max_body_bytes=max_reply_bytes,
                max_idle=max_concurrency,
            ),
        )

    async def send(self, endpoint: str, body: bytes) -> Reply:
        if self._locate is None:
            path = self._paths.get(endpoint) or self._path(endpoint)
        else:
            path = self._path(self._locate(endpoint, body))
        is_streamed = self._streams and can_stream(endpoint)
        if is_streamed:
            body = ask_for_stream(endpoint, body)
        try:
            answer = await self._transport.post(path, body)
        except TransportFailed as error:
            return Reply(failure=error.failure, message=error.message)
        if is_streamed and answer.status < 300 and not answer.is_too_long:
            return self._read_stream(endpoint, answer)
        return self._read(answer)

    async def list_models(self) -> list[str]:
        names: list[str] = []
        query = ""
        while True:
            page = await self._list_models(query)
            names += [model.id for model in page.data or ()]
            names += [model.name.removeprefix("models/") for model in page.models or ()]
            if not page.nextPageToken or len(names) > _MAX_MODELS:
                return names
            sign = "&" if self._query else "?"
            query = f"{sign}pageToken={quote(page.nextPageToken, safe='')}"

    async def _list_models(self, query: str) -> "_Models":
        try:
            reply = self._read(await self._transport.get(self._path("/models") + query))
        except TransportFailed as error:
            reply = Reply(failure=error.failure, message=error.message)
        if not reply.is_success:
            reason = reply.message or f"it answered with HTTP status {reply.status_code}."
            raise UpstreamDown(f"The upstream {self.name} did not list its models: {reason}")
        try:
            page = _decode_models(reply.body)
        except msgspec.DecodeError as error:
            raise UpstreamDown(
                f"The upstream {self.name} did not answer with a list of models: {error}."
            ) from error
        if page.data is msgspec.UNSET and page.models is msgspec.UNSET:
            raise UpstreamDown(
                f"The upstream {self.name} did not answer with a list of models: there is "
                "neither `data` nor `models`."
            )
        return page

    async def read_load(self) -> EngineLoad | None:
        try:
            answer = await self._transport.get(self._base_path.removesuffix("/v1") + "/metrics")
        except TransportFailed:
            return None
        return parse_load(answer.body) if answer.status == 200 else None

    async def close(self) -> None:
        await self._transport.close()

    def _path(self, endpoint: str) -> str:
        return self._base_path + endpoint.removeprefix("/v1") + self._query

    def _read(self, answer: Answer) -> Reply:
        status, body = answer.status, answer.body
        if answer.is_too_long:
            return self._too_long(answer)
        if status >= 300:
            return Reply(
                status_code=status,
                body=body,
                request_id=answer.request_id,
                retry_after_s=parse_retry_after(
                    answer.retry_after, answer.retry_after_ms, now=time.time()
                ),
            )
        return read_success(status, body, answer.request_id) or self._invalid(answer)

    def _read_stream(self, endpoint: str, answer: Answer) -> Reply:
        """Read an answer that was asked for piece by piece, though it may have come at once."""
        if not (answer.content_type or "").startswith(_EVENT_STREAM):
            return self._read(answer)
        try:
            answer.status, answer.body = assemble(endpoint, answer.body)
        except CutStream:
            message = "The stream of the answer ended before it was whole."
            return Reply(failure=Failure.DISCONNECTED, message=message)
        except BadStream as error:
            return Reply(
                status_code=answer.status,
                request_id=answer.request_id,
                failure=Failure.INVALID,
                message=f"The stream of the answer cannot be read: {error}.",
            )
        return self._read(answer)

    def _too_long(self, answer: Answer) -> Reply:
        return Reply(
            status_code=answer.status,
            request_id=answer.request_id,
            failure=Failure.INVALID,
            message=f"The answer (HTTP {answer.status}) is longer than "
            f"{self._max_reply_bytes} bytes.",
        )

    def _invalid(self, answer: Answer) -> Reply:
        content_type = answer.content_type or "none"
        message = (
            f"The answer (HTTP {answer.status}, content type {content_type}) is not one JSON"
            f" object: {self._quote(answer.body)}"
        )
        return Reply(
            status_code=answer.status,
            body=answer.body,
            request_id=answer.request_id,
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


def read_success(status: int, body: bytes, request_id: str | None) -> Reply | None:
    """The reply that a 2xx answer is, with its tokens; None if it is not one JSON object."""
    try:
        if not body.isascii():
            body.decode()  # msgspec does not look into what it skips
        usage = _decode_answer(body).usage or _NO_USAGE
    except msgspec.ValidationError:
        usage = _read_odd_usage(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        usage = None
    if usage is None:
        return None
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


SENDABLE = re.compile(r"[!-~]([ -~]*[!-~])?")
_NUMBER = re.compile(r"[0-9]{1,300}(\.[0-9]{1,300})?")


def parse_base_url(name: str, base_url: str) -> Url:
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


def choose_transport(base: Url, options: TransportOptions) -> Transport:
    """The fast transport where it will do: plain HTTP without a proxy."""
    is_plain = base.scheme == "http" and not base.username
    if is_plain and not uses_proxy(base):
        host = (base.host_str or "").strip("[]")
        return Http1Transport(host=host, port=base.port or 80, options=options)
    return make_reqwest(base, options)


def make_reqwest(base: Url, options: TransportOptions) -> Transport:
    """The transport that can do everything."""
    origin = str(base.with_path("")).rstrip("/")
    return ReqwestTransport(origin=origin, options=options, uses_proxy=uses_proxy(base))


def uses_proxy(base: Url) -> bool:
    """Whether requests go through a proxy that the environment names; never to loopback."""
    host = base.host_str or ""
    return not _is_loopback(host) and _has_proxy(base.scheme, host)


def _has_proxy(scheme: str, host: str) -> bool:
    proxies = getproxies()
    return bool(proxies.get(scheme) or proxies.get("all")) and not proxy_bypass(host)


def _is_loopback(host: str | None) -> bool:
    if host is None or host == "localhost":
        return host is not None
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


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


class _GoogleModel(msgspec.Struct):
    name: str


class _Models(msgspec.Struct):
    """OpenAI's list, or a page of Google's."""

    data: list[_Model] | msgspec.UnsetType = msgspec.UNSET
    models: list[_GoogleModel] | msgspec.UnsetType = msgspec.UNSET
    nextPageToken: str | None = None  # noqa: N815


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
