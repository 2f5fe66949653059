"""HTTP by pyreqwest: TLS, HTTP/2, proxies of the environment.

Facts about pyreqwest 0.15 that shape this module, each held by a test:

- its `ConnectError` and `ConnectTimeoutError` also stand for a connection that was cut, or an
  answer that did not come, after the request had left; only their causes tell which it was;
- `get_header` raises `ValueError` for a value that is not ASCII;
- it cannot tell connecting from waiting for the answer to begin, so a first byte may take the
  time for connecting as well;
- a cancelled call returns at once, but its connection stays until the answer begins or the
  time is up: the client lets its task run on, so the upstream works on for nobody;
- on asyncio's own loop, the interpreter can abort at exit while the client's thread lets go of
  its last call, closed or not: `close` therefore waits a moment.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from datetime import timedelta

from pyreqwest.client import Client, ClientBuilder
from pyreqwest.exceptions import RequestError, RequestTimeoutError
from pyreqwest.http import Url
from pyreqwest.request import StreamRequest
from pyreqwest.response import Response

from penstock.upstream.transport import (
    Answer,
    TransportFailed,
    TransportOptions,
    cut_off,
    gone_silent,
    no_answer,
    no_connection,
    no_first_byte,
)

# uvicorn, and so vLLM, closes a connection that is idle for 5 s. One that is taken from the
# pool at that moment would be cut under a request.
_POOL_IDLE_S = 4.0
# 10 ms were enough in each of 15 runs on one CPU in which 8 aborted without; see above.
_EXIT_PAUSE_S = 0.025
_MAX_URLS = 1000


class ReqwestTransport:
    """Sends requests to one origin.

    An answer is read as a stream with a bound, so never more than that is held. Redirects are
    not followed, and compressed answers are not asked for.

    Args:
        origin: Such as `https://api.example.com`.
        uses_proxy: Whether a proxy that the environment names is used.

    Raises:
        ValueError: A header cannot be sent.
    """

    def __init__(self, *, origin: str, options: TransportOptions, uses_proxy: bool) -> None:
        self._origin = origin
        self._timeout_s = options.timeout_s
        self._connect_timeout_s = options.connect_timeout_s
        self._first_byte_s = options.first_byte_timeout_s
        self._silence_s = options.silence_timeout_s
        self._max_body_bytes = options.max_body_bytes
        self._urls: dict[str, Url] = {}
        builder = (
            ClientBuilder()
            .timeout(timedelta(seconds=options.timeout_s))
            .connect_timeout(timedelta(seconds=options.connect_timeout_s))
            .pool_idle_timeout(timedelta(seconds=_POOL_IDLE_S))
            .pool_max_idle_per_host(options.max_idle)
            .follow_redirects(False)
            .referer(False)
            .gzip(False)
            .brotli(False)
            .zstd(False)
            .deflate(False)
        )
        if not uses_proxy:
            builder = builder.no_proxy()
        self._client: Client = builder.default_headers(dict(options.headers)).build()
        self._is_closed = False

    async def post(self, path: str, body: bytes) -> Answer:
        request = self._client.post(self._url(path)).body_bytes(body)
        if self._silence_s:
            # Or the first read would come back only with so many bytes, or at the end.
            request = request.streamed_read_buffer_limit(0)
        return await self._exchange(request.build_streamed())

    async def get(self, path: str) -> Answer:
        return await self._exchange(self._client.get(self._url(path)).build_streamed())

    async def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        await self._client.close()
        await asyncio.sleep(_EXIT_PAUSE_S)

    def _url(self, path: str) -> Url:
        url = self._urls.get(path)
        if url is None:
            if len(self._urls) > _MAX_URLS:
                self._urls.clear()  # clients choose the models that may stand in them
            url = self._urls[path] = Url(self._origin + path)
        return url

    async def _exchange(self, request: StreamRequest) -> Answer:
        limit = self._max_body_bytes
        try:
            async with self._begun(request) as response:
                answer = Answer(
                    status=response.status,
                    request_id=_header(response, "x-request-id"),
                    content_type=_header(response, "content-type"),
                )
                if answer.status >= 300:
                    answer.retry_after = _header(response, "retry-after")
                    answer.retry_after_ms = _header(response, "retry-after-ms")
                if _announces_more_than(limit, response):
                    answer.is_too_long = True
                    return answer
                body = await self._read(response, limit + 1)
        except RequestError as error:
            raise self._failed(error) from None
        if len(body) > limit:
            answer.is_too_long = True
        else:
            answer.body = body
        return answer

    @contextlib.asynccontextmanager
    async def _begun(self, request: StreamRequest) -> AsyncGenerator[Response]:
        """The response to a request, once its head is there."""
        if not self._first_byte_s:
            async with request as response:
                yield response
            return
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(self._connect_timeout_s + self._first_byte_s):
                    response = await stack.enter_async_context(request)
            except TimeoutError:
                raise no_first_byte(self._first_byte_s) from None
            yield response

    async def _read(self, response: Response, most: int) -> bytes:
        """The body, or `most` bytes of it."""
        if not self._silence_s:
            received = await response.body_reader.read(most)
            return b"" if received is None else received.to_bytes()
        chunks: list[bytes] = []
        left = most
        while left > 0:
            reading = asyncio.ensure_future(response.body_reader.read_chunk())
            done, _ = await asyncio.wait({reading}, timeout=self._silence_s)
            if not done:
                reading.cancel()
                raise gone_silent(self._silence_s)
            chunk = reading.result()
            if chunk is None:
                break
            chunks.append(chunk.to_bytes())
            left -= len(chunks[-1])
        return b"".join(chunks)

    def _failed(self, error: RequestError) -> TransportFailed:
        causes = [cause["message"] for cause in error.details.get("causes") or ()]
        reason = causes[-1] if causes else error.message
        is_timeout = isinstance(error, RequestTimeoutError)
        if "client error (Connect)" in causes:
            within_s = self._connect_timeout_s if is_timeout else None
            return no_connection(reason, within_s=within_s)
        return no_answer(self._timeout_s) if is_timeout else cut_off(reason)


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
