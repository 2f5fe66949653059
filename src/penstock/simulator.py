"""An OpenAI-compatible upstream that answers without a model, for trials, demos and load.

It has to be faster than what it measures, so it speaks HTTP/1.1 on an `asyncio.Protocol` with
httptools rather than through a web framework: one process answers tens of thousands of
requests a second, pipelined ones in one write.

It can take its time as an inference engine does (`batching`), and then tells of its queue under
`/metrics` in the words of vLLM or SGLang.

The same request gets the same reply, byte for byte, whatever came before. Chance (`error_rate`,
`jitter_ms`) is drawn in order of arrival from generators that `seed` starts.
"""

import asyncio
import signal
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from random import Random
from typing import cast

import httptools
import msgspec
import uvloop

from penstock.batching import BatchingEngine, EngineOptions
from penstock.simulated_replies import CREATED, WRITERS, Writer, count_reply

MAX_BODY_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatorOptions:
    """How the simulator behaves."""

    latency_ms: float = 0
    """How long every answer takes at least."""
    jitter_ms: float = 0
    """How much longer it takes at most, spread evenly."""
    error_rate: float = 0
    """The share of requests, from 0 to 1, that are answered with `error_status`."""
    error_status: int = 500
    """An HTTP status from 400 to 599."""
    rate_limit: float = 0
    """Requests per second above which it answers 429; 0 means no limit."""
    models: tuple[str, ...] = ("simulated",)
    """What `/models` lists. A request may name any model."""
    tokens: int = 16
    """How many words, taken to be one token each, a written reply has; from 1."""
    fail_match: str = ""
    """Requests whose body holds this text, as it is written there, always get
    `error_status`."""
    token_spread: float = 0
    """By what part of `tokens` a reply may have fewer or more, from 0 to 1."""
    engine: EngineOptions | None = None
    """Answers take as long as they would in this engine, beside `latency_ms`."""
    metrics: str = "vllm"
    """In whose words it tells of its engine: `vllm`, `sglang` or `none`."""
    seed: int = 0
    """Starts the chance behind `error_rate` and `jitter_ms`."""

    def __post_init__(self) -> None:
        if not 0 <= self.error_rate <= 1:
            raise ValueError(f"error_rate is {self.error_rate}; it must be from 0 to 1.")
        if not 400 <= self.error_status <= 599:
            raise ValueError(f"error_status is {self.error_status}; it must be 400 to 599.")
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}; it must be at least 1.")
        if not 0 <= self.token_spread <= 1:
            raise ValueError(f"token_spread is {self.token_spread}; it must be from 0 to 1.")
        if self.metrics not in _METRICS:
            names = ", ".join(_METRICS)
            raise ValueError(f"metrics is {self.metrics}; it must be one of {names}.")
        for name in ("latency_ms", "jitter_ms", "rate_limit"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative.")


_METRICS = {
    "vllm": (
        "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{{{0}}} {1}\n"
        "# TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting{{{0}}} {2}\n"
        "# TYPE vllm:kv_cache_usage_perc gauge\nvllm:kv_cache_usage_perc{{{0}}} {3}\n"
    ),
    "sglang": (
        "# TYPE sglang:num_running_reqs gauge\nsglang:num_running_reqs{{{0}}} {1}\n"
        "# TYPE sglang:num_queue_reqs gauge\nsglang:num_queue_reqs{{{0}}} {2}\n"
        "# TYPE sglang:token_usage gauge\nsglang:token_usage{{{0}}} {3}\n"
    ),
    "none": "",
}
_FULL_CACHE = 0.9
"""How much of its cache the engine uses when all slots are taken."""


async def serve_simulator(
    options: SimulatorOptions,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    ready: Callable[[int], None] | None = None,
) -> None:
    """Answer requests until the call is cancelled; then all connections are dropped.

    Args:
        options: How to behave.
        host: The address to listen on.
        port: The port to listen on; 0 means any free one.
        ready: Called once with the port, when connections are taken.

    Raises:
        OSError: The address is in use or is not one of this machine.
    """
    simulator = _Simulator(options)
    server = await asyncio.get_running_loop().create_server(
        lambda: _Connection(simulator), host, port, backlog=4096
    )
    try:
        if ready is not None:
            ready(server.sockets[0].getsockname()[1])
        await server.serve_forever()
    finally:
        server.close()
        for connection in list(simulator.connections):
            connection.drop()


def run_simulator(
    options: SimulatorOptions,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    ready: Callable[[int], None] | None = None,
) -> None:
    """Run `serve_simulator` on a loop of its own until SIGTERM or SIGINT, then return.

    Only for the main thread, which alone receives signals.
    """

    async def serve() -> None:
        serving = asyncio.ensure_future(serve_simulator(options, host, port, ready=ready))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, serving.cancel)
        with suppress(asyncio.CancelledError):
            await serving

    uvloop.run(serve())


@dataclass(slots=True)
class _Stats:
    """What `/stats` shows. Only requests to the endpoints count, not `/models` and the like."""

    requests: int = 0
    answered: int = 0
    in_flight: int = 0
    max_in_flight: int = 0
    errors: int = 0
    """Answers whose status is not 200."""
    by_status: dict[str, int] = field(default_factory=dict[str, int])


@dataclass(slots=True, eq=False)
class _Waiting:
    """A reply that waits for its latency, or for one before it on the same connection."""

    status: int
    reply: bytes
    keep_alive: bool
    timer: asyncio.TimerHandle | None = None
    is_due: bool = False


class _Simulator:
    """What all connections share: options, chance, rate limit, statistics."""

    def __init__(self, options: SimulatorOptions) -> None:
        self.options = options
        self.stats = _Stats()
        self.connections: set[_Connection] = set()
        self._fail_match = options.fail_match.encode()
        self._error_chance = Random(f"error {options.seed}")
        self._jitter_chance = Random(f"jitter {options.seed}")
        self._engine: BatchingEngine[tuple[_Connection, _Waiting]] | None = None
        if options.engine is not None:
            self._engine = BatchingEngine(options.engine, now=time.monotonic())
        self._engine_timer: asyncio.TimerHandle | None = None
        self._second = 0
        self._taken_in_second = 0

    def answer(self, write: Writer, body: bytes) -> tuple[int, bytes]:
        """The status and body that a request to an endpoint gets."""
        options = self.options
        if options.rate_limit and self._is_over_rate():
            return _error(429, "Rate limit reached.", "rate_limit_exceeded")
        if (self._fail_match and self._fail_match in body) or (
            options.error_rate and self._error_chance.random() < options.error_rate
        ):
            return _error(options.error_status, "The simulator was told to fail this request.")
        try:
            return 200, write(body, options)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return _error(400, f"The body is not a valid request: {error}.")
        except RecursionError:
            return _error(400, "The body is nested too deeply.")

    def delay_s(self) -> float:
        options = self.options
        if not options.jitter_ms:
            return options.latency_ms / 1000
        return (options.latency_ms + self._jitter_chance.random() * options.jitter_ms) / 1000

    def page(self, path: str) -> tuple[int, bytes] | None:
        """What a GET brings; None if there is no such page."""
        if path == "/health":
            return 200, b'{"status":"ok"}'
        if path == "/stats":
            return 200, _encode(self.stats)
        if path in ("/models", "/v1/models"):
            models = [
                {"id": model, "object": "model", "created": CREATED, "owned_by": "penstock"}
                for model in self.options.models
            ]
            return 200, _encode({"object": "list", "data": models})
        return None

    def metrics(self) -> bytes | None:
        """What the engine tells of itself; None if it tells nothing."""
        engine, template = self._engine, _METRICS[self.options.metrics]
        if engine is None or not template:
            return None
        label = f'model_name="{self.options.models[0]}"'
        usage = _FULL_CACHE * engine.running / engine.slots
        return template.format(label, engine.running, engine.waiting, usage).encode()

    def run(self, connection: "_Connection", waiting: _Waiting, body: bytes) -> None:
        """Let the reply to a request wait for the engine."""
        assert self._engine is not None  # noqa: S101
        ended = self._engine.add(
            (connection, waiting),
            prompt_tokens=len(body) // 4,
            output_tokens=count_reply(body, self.options),
            now=time.monotonic(),
        )
        self._end(ended)

    def stop(self, connection: "_Connection") -> None:
        """Forget the replies of a connection that is gone."""
        if self._engine is not None:
            now = time.monotonic()
            self._end(self._engine.remove(lambda each: each[0] is connection, now=now))

    def _end(self, ended: "Iterable[tuple[_Connection, _Waiting]]") -> None:
        for connection, waiting in ended:
            connection.fall_due(waiting)
        assert self._engine is not None  # noqa: S101
        if self._engine_timer is not None:
            self._engine_timer.cancel()
            self._engine_timer = None
        at = self._engine.next_end_at()
        if at is not None:
            loop = asyncio.get_running_loop()
            wait_s = max(at - time.monotonic(), 0.0)
            self._engine_timer = loop.call_later(wait_s, self._look)

    def _look(self) -> None:
        assert self._engine is not None  # noqa: S101
        self._end(self._engine.advance(time.monotonic()))

    def _is_over_rate(self) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._taken_in_second = second, 0
        self._taken_in_second += 1
        return self._taken_in_second > self.options.rate_limit


class _Connection(asyncio.Protocol):
    """One client connection. Replies leave in the order in which the requests came."""

    def __init__(self, simulator: _Simulator) -> None:
        self._simulator = simulator
        self._stats = simulator.stats
        self._has_engine = simulator.options.engine is not None
        self._is_slow = simulator.options.latency_ms > 0 or simulator.options.jitter_ms > 0
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._out: list[bytes] = []
        self._waiting: deque[_Waiting] = deque()
        self._is_closing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()
        self._simulator.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._simulator.connections.discard(self)
        self._stats.in_flight -= len(self._waiting)
        for waiting in self._waiting:
            if waiting.timer is not None:
                waiting.timer.cancel()
        if self._waiting and self._has_engine:
            self._simulator.stop(self)
        self._waiting.clear()

    def drop(self) -> None:
        self._transport.abort()

    # A client that does not read its replies may not send more requests.
    def pause_writing(self) -> None:
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self._is_closing:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # refused when the message was complete
        except httptools.HttpParserError as error:
            self._refuse(_error(400, f"This is not HTTP: {error}."))
        self._flush()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > MAX_BODY_BYTES:
            self._refuse(_error(413, f"The body is longer than {MAX_BODY_BYTES} bytes."))
        elif not self._is_closing:
            self._body.append(body)

    def on_message_complete(self) -> None:
        if self._is_closing:
            return
        url, parts = self._url, self._body
        self._url, self._body, self._body_bytes = b"", [], 0
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        if self._parser.should_upgrade():  # the parser skips the body of such a request
            self._refuse(_error(400, "Upgrades are not supported."))
            return
        keep_alive = self._parser.should_keep_alive()
        self._is_closing = not keep_alive

        write = WRITERS.get(url) or WRITERS.get(url.partition(b"?")[0])
        if write is None or self._parser.get_method() != b"POST":
            status, reply = self._answer_other(url)
            self._send(status, reply, keep_alive)
            return
        stats = self._stats
        stats.requests += 1
        stats.in_flight += 1
        if stats.in_flight > stats.max_in_flight:  # noqa: PLR1730 - half the cost of max()
            stats.max_in_flight = stats.in_flight
        status, reply = self._simulator.answer(write, body)
        if self._has_engine and status == 200:
            waiting = _Waiting(status, reply, keep_alive)
            self._waiting.append(waiting)
            self._simulator.run(self, waiting, body)
        elif (self._is_slow and status != 429) or self._waiting:
            self._send_later(_Waiting(status, reply, keep_alive))
        else:
            self._count(status)
            self._send(status, reply, keep_alive)

    def _answer_other(self, url: bytes) -> tuple[int, bytes]:
        path = url.partition(b"?")[0].decode("latin-1")
        if path == "/metrics" and (metrics := self._simulator.metrics()) is not None:
            return 200, metrics
        method = self._parser.get_method().decode("latin-1")
        page = self._simulator.page(path)
        if page is not None:
            return page if method == "GET" else _error(405, f"{path} takes GET only.")
        if path.encode("latin-1") in WRITERS:
            return _error(405, f"{path} takes POST only.")
        return _error(404, f"There is no {path} here.", "unknown_url")

    def _send_later(self, waiting: _Waiting) -> None:
        self._waiting.append(waiting)
        delay_s = self._simulator.delay_s()
        waiting.timer = self._loop.call_later(delay_s, self.fall_due, waiting)

    def fall_due(self, waiting: _Waiting) -> None:
        """Send a reply, once those before it were sent."""
        waiting.is_due = True
        while self._waiting and self._waiting[0].is_due:
            first = self._waiting.popleft()
            self._count(first.status)
            self._send(first.status, first.reply, first.keep_alive)
        self._flush()

    def _count(self, status: int) -> None:
        stats = self._stats
        stats.in_flight -= 1
        stats.answered += 1
        name = _NAMES[status]
        stats.by_status[name] = stats.by_status.get(name, 0) + 1
        if status != 200:
            stats.errors += 1

    def _refuse(self, answer: tuple[int, bytes]) -> None:
        if not self._is_closing:
            self._is_closing = True
            self._send(*answer, keep_alive=False)

    def _send(self, status: int, body: bytes, keep_alive: bool) -> None:
        if body.startswith(b"data: "):
            head = _STREAM_HEAD if keep_alive else _LAST_STREAM_HEAD
        else:
            head = _HEADS[status] if keep_alive else _LAST_HEADS[status]
        self._out.append(head % (len(body), zlib.crc32(body)))
        self._out.append(body)

    def _flush(self) -> None:
        if self._out:
            self._transport.write(b"".join(self._out))
            self._out.clear()
        if self._is_closing and not self._waiting:
            self._transport.close()


# Only the statuses that can occur: all errors a person may ask for, and 200.
_STATUSES = (200, *range(400, 600))
_NAMES = {status: str(status) for status in _STATUSES}


def _head(status: int, connection: str, media_type: str = "application/json") -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Unknown"
    retry_after = "Retry-After: 1\r\n" if status == 429 else ""
    return (
        f"HTTP/1.1 {status} {phrase}\r\nServer: penstock-simulator\r\n{retry_after}"
        f"Content-Type: {media_type}\r\nConnection: {connection}\r\n"
        "Content-Length: %d\r\nX-Request-Id: req_%08x\r\n\r\n"
    ).encode()


_HEADS = {status: _head(status, "keep-alive") for status in _STATUSES}
_LAST_HEADS = {status: _head(status, "close") for status in _STATUSES}
_STREAM_HEAD = _head(200, "keep-alive", "text/event-stream")
_LAST_STREAM_HEAD = _head(200, "close", "text/event-stream")

_encode = msgspec.json.Encoder().encode


def _error(status: int, message: str, code: str | None = None) -> tuple[int, bytes]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    return status, _encode({"error": error})
