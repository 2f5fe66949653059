"""HTTP/1.1 to one origin, over plain TCP: the call that every line pays for.

A request is one write, an answer one future, and a connection is used again as soon as its
answer is whole. httptools (llhttp) reads what comes. A call that is cancelled ends its
connection at once, so the upstream notices that nobody waits.

Times are looked at together, a few times a second, instead of with a timer for each call.
"""

import asyncio
import os
from typing import Final, cast

import httptools

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

_MAX_HEAD_BYTES = 64 << 10
_JOINED_BYTES = 64 << 10
"""A longer body is not copied to be sent in one piece with its head."""
_LOOKS: Final = 20
"""How many looks at the time there are within a timeout, so how exact it is."""
_MAX_LOOK_S = 0.5
_NEVER: Final = float("inf")
# uvicorn, and so vLLM, closes a connection that is idle for 5 s. One that is taken from the
# pool at that moment would be cut under a request.
_MAX_IDLE_S = 4.0


class Http1Transport:
    """Sends requests to one origin.

    Args:
        host: A name or an address, without brackets.
    """

    def __init__(self, *, host: str, port: int, options: TransportOptions) -> None:
        self._host = host
        self._port = port
        self._timeout_s = options.timeout_s
        self._connect_timeout_s = min(options.connect_timeout_s, options.timeout_s)
        self.max_body_bytes = options.max_body_bytes
        self._max_idle = options.max_idle
        self._first_byte_s = options.first_byte_timeout_s
        self.silence_s = options.silence_timeout_s
        """How long nothing may come of an answer that has begun; 0 sets no limit."""
        shortest_s = min(filter(None, (options.timeout_s, self._first_byte_s, self.silence_s)))
        self._look_s = min(shortest_s / _LOOKS, _MAX_LOOK_S)
        name = f"[{host}]" if ":" in host else host
        lines = {"Host": name if port == 80 else f"{name}:{port}", **options.headers}
        text = "".join(f"{key}: {value}\r\n" for key, value in lines.items())
        self._after_path = f" HTTP/1.1\r\n{text}".encode("latin-1")
        self._heads: dict[str, bytes] = {}
        self._idle: dict[Connection, float] = {}
        """Since when each has been idle, the longest one first."""
        self._busy: set[Connection] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        """The one that it lives on, once it is known; asking for it each time costs a system
        call."""
        self._look: asyncio.TimerHandle | None = None
        self._is_closed = False

    async def post(self, path: str, body: bytes) -> Answer:
        start = self._heads.get(path)
        if start is None:
            start = b"POST " + path.encode("latin-1") + self._after_path + b"Content-Length: "
            self._heads[path] = start
        return await self._exchange(b"%b%d\r\n\r\n" % (start, len(body)), body)

    async def get(self, path: str) -> Answer:
        return await self._exchange(
            b"GET " + path.encode("latin-1") + self._after_path + b"\r\n", b""
        )

    async def close(self) -> None:
        self._is_closed = True
        for connection in [*self._idle, *self._busy]:
            connection.fail(cut_off("it was closed on this side"))
        if self._look is not None:
            self._look.cancel()
            self._look = None

    async def _exchange(self, head: bytes, body: bytes) -> Answer:
        if self._is_closed:
            raise cut_off("it was closed on this side")
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        now = loop.time()
        deadline = now + self._timeout_s
        connection = self._take_idle(now) or await self._connect(loop)
        self._busy.add(connection)
        if self._look is None:
            self._look = loop.call_later(self._look_s, self._look_at_times, loop)
        connection.quiet_until = now + self._first_byte_s if self._first_byte_s else _NEVER
        answer = connection.send(loop, head, body, deadline)
        try:
            return await answer
        except asyncio.CancelledError:
            connection.drop()
            raise

    def _take_idle(self, now: float) -> "Connection | None":
        if not self._idle:
            return None
        connection, since = self._idle.popitem()
        if now - since <= _MAX_IDLE_S:
            return connection
        connection.drop()
        for other in list(self._idle):  # which have been idle for longer
            other.drop()
        self._idle.clear()
        return None

    async def _connect(self, loop: asyncio.AbstractEventLoop) -> "Connection":
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: Connection(self), self._host, self._port
                )
        except TimeoutError:
            raise no_connection(
                "operation timed out", within_s=self._connect_timeout_s
            ) from None
        except OSError as error:
            raise no_connection(_reason(error)) from None
        return connection

    def release(self, connection: "Connection") -> None:
        """Keep a connection whose answer is whole for the next call."""
        # Now, not once its caller goes on: by then another call may have it.
        self._busy.discard(connection)
        if self._is_closed or len(self._idle) >= self._max_idle:
            connection.drop()
        else:
            assert self._loop is not None  # noqa: S101  (it has sent something)
            self._idle[connection] = self._loop.time()

    def forget(self, connection: "Connection") -> None:
        """Never use a connection again: it has ended."""
        self._busy.discard(connection)
        self._idle.pop(connection, None)

    def _look_at_times(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for connection in [each for each in self._busy if each.deadline <= now]:
            connection.fail(no_answer(self._timeout_s))
        for connection in [each for each in self._busy if each.quiet_until <= now]:
            connection.fail(
                gone_silent(self.silence_s)
                if connection.has_begun
                else no_first_byte(self._first_byte_s)
            )
        for connection, since in list(self._idle.items()):
            if now - since <= _MAX_IDLE_S:
                break
            del self._idle[connection]
            connection.drop()
        is_needed = self._busy or self._idle
        self._look = (
            loop.call_later(self._look_s, self._look_at_times, loop) if is_needed else None
        )


class Connection(asyncio.Protocol):
    """One connection: the answer to one request at a time."""

    __slots__ = (
        "_answer",
        "_body_bytes",
        "_chunks",
        "_has_length",
        "_is_over",
        "_is_whole",
        "_parser",
        "_pool",
        "_read_bytes",
        "_transport",
        "_waiter",
        "deadline",
        "quiet_until",
    )

    def __init__(self, pool: Http1Transport) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[Answer] | None = None
        self._is_over = False
        self.deadline = _NEVER
        self.quiet_until = _NEVER
        """When to give up if nothing comes until then."""
        self._reset()

    def _reset(self) -> None:
        self._answer = Answer(status=0)
        self._chunks: list[bytes] = []
        self._body_bytes = 0
        self._read_bytes = 0
        self._has_length = False
        self._is_whole = False

    # The pool's side

    @property
    def has_begun(self) -> bool:
        """Whether anything of the present answer has come."""
        return self._read_bytes > 0

    def send(
        self, loop: asyncio.AbstractEventLoop, head: bytes, body: bytes, deadline: float
    ) -> asyncio.Future[Answer]:
        """Send a request; its answer comes later."""
        waiter = self._waiter = loop.create_future()
        self.deadline = deadline
        transport = self._transport
        if transport is None or self._is_over:
            self.fail(cut_off("it was closed by the other side"))
        elif len(body) <= _JOINED_BYTES:
            transport.write(head + body)
        else:
            transport.write(head)
            transport.write(body)
        return waiter

    def drop(self) -> None:
        """End the connection at once."""
        self._is_over = True
        self._waiter = None
        self._pool.forget(self)
        if self._transport is not None:
            self._transport.abort()

    def fail(self, error: TransportFailed) -> None:
        """End the connection and tell who waits why."""
        waiter = self._waiter
        self.drop()
        if waiter is not None and not waiter.done():
            waiter.set_exception(error)

    # The loop's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._waiter is None:
            self.drop()  # nobody has asked for anything
            return
        self._read_bytes += len(data)
        if silence_s := self._pool.silence_s:
            self.quiet_until = asyncio.get_running_loop().time() + silence_s
        else:
            self.quiet_until = _NEVER
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._is_over = True
        except httptools.HttpParserError as error:
            if not self._is_whole:
                self.fail(cut_off(f"what came is not HTTP ({error})"))
                return
            self._is_over = True  # more came than the answer
        if self._is_whole:
            self._finish()
        elif not self._answer.status and self._read_bytes > _MAX_HEAD_BYTES:
            self.fail(cut_off(f"its head is longer than {_MAX_HEAD_BYTES} bytes"))
        elif self._answer.is_too_long:
            self._is_over = True
            self._finish()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_over = True
        self._pool.forget(self)
        if self._waiter is None:
            return
        if exc is None and self._answer.status >= 200 and not self._has_length:
            self._finish()  # a body that ends with the connection
        else:
            self.fail(cut_off(_reason(exc) if exc else "it was closed by the other side"))

    def _finish(self) -> None:
        waiter, self._waiter = self._waiter, None
        answer, chunks = self._answer, self._chunks
        if answer.is_too_long:
            answer.body = b""
        else:
            answer.body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        transport = self._transport
        is_kept = (
            not self._is_over
            and transport is not None
            and not transport.is_closing()
            and not transport.get_write_buffer_size()
        )
        if is_kept:
            self._reset()
            self._pool.release(self)
        else:
            self.drop()
        if waiter is not None and not waiter.done():
            waiter.set_result(answer)

    # The parser's side

    def on_message_begin(self) -> None:
        if self._is_whole:
            self._is_over = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._answer.status:
            return  # it stands behind the body
        match name.lower():
            case b"content-length":
                self._has_length = True
                # The parser has refused what is no number.
                if len(value) > 18 or int(value) > self._pool.max_body_bytes:
                    self._answer.is_too_long = True
            case b"transfer-encoding":
                self._has_length = True
            case b"x-request-id":
                self._answer.request_id = _text(value)
            case b"content-type":
                self._answer.content_type = _text(value)
            case b"retry-after":
                self._answer.retry_after = _text(value)
            case b"retry-after-ms":
                self._answer.retry_after_ms = _text(value)
            case _:
                pass

    def on_headers_complete(self) -> None:
        if not self._is_whole:
            self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._is_whole or self._answer.is_too_long:
            return
        self._chunks.append(body)
        self._body_bytes += len(body)
        if self._body_bytes > self._pool.max_body_bytes:
            self._answer.is_too_long = True
            self._chunks.clear()

    def on_message_complete(self) -> None:
        if self._is_whole:
            self._is_over = True  # an answer that nobody has asked for
        elif 100 <= self._answer.status < 200 and self._answer.status != 101:
            self._reset()  # the real answer comes after it
        else:
            self._is_whole = True
            # Only here does the parser know; it forgets with the next message.
            self._is_over |= not self._parser.should_keep_alive()


def _text(value: bytes) -> str | None:
    return value.decode() if value.isascii() else None


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return str(error).strip().rstrip(".") or type(error).__name__
