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
import base64
import hashlib
import signal
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import cycle, islice
from random import Random
from typing import Any, cast

import httptools
import msgspec
import uvloop

from penstock.batching import BatchingEngine, EngineOptions

MAX_BODY_BYTES = 64 * 1024 * 1024
_CREATED = 1_750_000_000  # `created` of all replies: a clock would make them differ
_EMBEDDING_SIZE = 8
_ECHO_CHARACTERS = 16  # how much of a message is looked at for each word of the reply
_PIXEL = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010804000000b51c0c02"
        "0000000b4944415478da6364600000000600023081d02f0000000049454e44ae426082"
    )
).decode()
"""A PNG of one pixel, transparent."""


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

    def answer(self, write: "_Writer", body: bytes) -> tuple[int, bytes]:
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
                {"id": model, "object": "model", "created": _CREATED, "owned_by": "penstock"}
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
            output_tokens=_count_reply(body, self.options),
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

        write = _WRITERS.get(url) or _WRITERS.get(url.partition(b"?")[0])
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
        if path.encode("latin-1") in _WRITERS:
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


# What the endpoints read. A field without a default is required; others are skipped.


class _Part(msgspec.Struct):
    text: str = ""


class _Message(msgspec.Struct):
    role: str = ""
    content: str | list[_Part] | None = None


_Texts = str | list[str | int | list[int]]
"""One text or several, each of which may be a list of tokens."""


class _Chat(msgspec.Struct):
    model: str
    messages: list[_Message]
    stream: bool | None = None


class _Completion(msgspec.Struct):
    model: str
    prompt: _Texts
    stream: bool | None = None


class _Response(msgspec.Struct):
    model: str
    input: str | list[_Message] = ""


class _Embedding(msgspec.Struct):
    model: str
    input: _Texts
    encoding_format: str | None = None


class _Moderation(msgspec.Struct):
    model: str
    input: str | list[str | _Part]


class _Image(msgspec.Struct):
    model: str
    prompt: str
    n: int | None = None


class _Video(msgspec.Struct):
    model: str
    prompt: str
    seconds: str = "4"
    size: str = "720x1280"


class _Rerank(msgspec.Struct):
    model: str
    query: str
    documents: list[str | _Part]
    top_n: int | None = None


class _Score(msgspec.Struct):
    model: str
    text_1: str | list[str] = ""
    text_2: str | list[str] = ""


_chat_decode = msgspec.json.Decoder(_Chat).decode
_completion_decode = msgspec.json.Decoder(_Completion).decode
_response_decode = msgspec.json.Decoder(_Response).decode
_embedding_decode = msgspec.json.Decoder(_Embedding).decode
_moderation_decode = msgspec.json.Decoder(_Moderation).decode
_image_decode = msgspec.json.Decoder(_Image).decode
_video_decode = msgspec.json.Decoder(_Video).decode
_rerank_decode = msgspec.json.Decoder(_Rerank).decode
_score_decode = msgspec.json.Decoder(_Score).decode

_Writer = Callable[[bytes, SimulatorOptions], bytes]


def _text(content: str | list[_Part] | None) -> str:
    if isinstance(content, list):
        return " ".join(part.text for part in content)
    return content or ""


def _texts(texts: _Texts) -> list[str]:
    if isinstance(texts, str):
        return [texts]
    if texts and isinstance(texts[0], int):  # one text, as tokens
        return [" ".join(map(str, texts))]
    return [text if isinstance(text, str) else str(text) for text in texts]


def _last_user_text(messages: list[_Message]) -> str:
    for message in reversed(messages):
        if message.role == "user":
            return _text(message.content)
    return ""


def _count_reply(body: bytes, options: SimulatorOptions) -> int:
    """How many tokens the reply to a request has: the same number for the same request."""
    if not options.token_spread:
        return options.tokens
    part = (zlib.crc32(body) % 2001 - 1000) / 1000
    return max(round(options.tokens * (1 + part * options.token_spread)), 1)


def _count_tokens(texts: Iterable[str]) -> int:
    # Four characters to a token, as a rule of thumb for English goes.
    return sum(map(len, texts)) // 4 + 1


def _write_words(text: str, count: int) -> str:
    """The first words of `text`, over and over until there are `count`."""
    words = text[: count * _ECHO_CHARACTERS].split(None, count)[:count] or ["(silence)"]
    return " ".join(words if len(words) == count else islice(cycle(words), count))


# The reply that load tests ask for. Filling a template costs half of what encoding a
# dictionary does.
_CHAT_REPLY = (
    b'{"id":"chatcmpl-%08x","object":"chat.completion","created":'
    + str(_CREATED).encode()
    + b',"model":%b,"choices":[{"index":0,"message":{"role":"assistant","content":%b,'
    b'"refusal":null},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":%d,'
    b'"completion_tokens":%d,"total_tokens":%d,"prompt_tokens_details":{"cached_tokens":0},'
    b'"completion_tokens_details":{"reasoning_tokens":0}}}'
)


def _write_chat(body: bytes, options: SimulatorOptions) -> bytes:
    request = _chat_decode(body)
    tokens = _count_reply(body, options)
    prompt_tokens = _count_tokens([_text(message.content) for message in request.messages])
    text = _write_words(_last_user_text(request.messages), tokens)
    reply = _CHAT_REPLY % (
        zlib.crc32(body),
        _encode(request.model),
        _encode(text),
        prompt_tokens,
        tokens,
        prompt_tokens + tokens,
    )
    return _stream(reply) if request.stream else reply


def _stream(reply: bytes) -> bytes:
    """A chat or text completion as a stream of events, one for each word, with its usage."""
    whole = msgspec.json.decode(reply)
    usage, choices = whole.pop("usage"), whole.pop("choices")
    is_chat = whole["object"] == "chat.completion"
    head = {**whole, "object": "chat.completion.chunk"} if is_chat else whole
    events: list[dict[str, Any]] = []
    for choice in choices:
        text = choice["message"]["content"] if is_chat else choice["text"]
        words = text.split(" ")
        for number, word in enumerate(words):
            piece = word if number == len(words) - 1 else f"{word} "
            said = (
                {"delta": {"role": "assistant", "content": piece}}
                if is_chat
                else {"text": piece}
            )
            reason = choice["finish_reason"] if number == len(words) - 1 else None
            one = {"index": choice["index"], **said, "logprobs": None, "finish_reason": reason}
            events.append({**head, "choices": [one]})
    events.append({**head, "choices": [], "usage": usage})
    return b"".join(b"data: %b\n\n" % _encode(event) for event in events) + b"data: [DONE]\n\n"


def _write_completion(body: bytes, options: SimulatorOptions) -> bytes:
    request = _completion_decode(body)
    tokens = _count_reply(body, options)
    prompts = _texts(request.prompt)
    prompt_tokens = _count_tokens(prompts)
    completion_tokens = tokens * len(prompts)
    choices = [
        {
            "index": index,
            "text": _write_words(prompt, tokens),
            "logprobs": None,
            "finish_reason": "stop",
        }
        for index, prompt in enumerate(prompts)
    ]
    reply = _encode(
        {
            "id": f"cmpl-{zlib.crc32(body):08x}",
            "object": "text_completion",
            "created": _CREATED,
            "model": request.model,
            "choices": choices,
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }
    )
    return _stream(reply) if request.stream else reply


def _write_response(body: bytes, options: SimulatorOptions) -> bytes:
    request = _response_decode(body)
    tokens = _count_reply(body, options)
    prompt = request.input if isinstance(request.input, str) else _last_user_text(request.input)
    number = zlib.crc32(body)
    input_tokens, output_tokens = _count_tokens([prompt]), tokens
    text = _write_words(prompt, tokens)
    message: dict[str, Any] = {
        "id": f"msg_{number:08x}",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": text, "annotations": []}],
    }
    return _encode(
        {
            "id": f"resp_{number:08x}",
            "object": "response",
            "created_at": _CREATED,
            "status": "completed",
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "model": request.model,
            "output": [message],
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "usage": {
                "input_tokens": input_tokens,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": output_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": input_tokens + output_tokens,
            },
        }
    )


def _write_message(body: bytes, options: SimulatorOptions) -> bytes:
    request = _chat_decode(body)
    tokens = _count_reply(body, options)
    input_tokens = _count_tokens([_text(message.content) for message in request.messages])
    text = _write_words(_last_user_text(request.messages), tokens)
    return _encode(
        {
            "id": f"msg_{zlib.crc32(body):08x}",
            "type": "message",
            "role": "assistant",
            "model": request.model,
            "content": [{"type": "text", "text": text}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": input_tokens, "output_tokens": tokens},
        }
    )


def _embed(text: str) -> list[float]:
    """A vector of length 1 that depends on the text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=_EMBEDDING_SIZE).digest()
    raw = [byte - 127.5 for byte in digest]
    length = sum(value * value for value in raw) ** 0.5
    return [round(value / length, 6) for value in raw]


def _write_embedding(body: bytes, options: SimulatorOptions) -> bytes:
    request = _embedding_decode(body)
    texts = _texts(request.input)
    data: list[dict[str, Any]] = []
    for index, text in enumerate(texts):
        vector: list[float] | str = _embed(text)
        if request.encoding_format == "base64":
            vector = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        data.append({"object": "embedding", "index": index, "embedding": vector})
    tokens = _count_tokens(texts)
    return _encode(
        {
            "object": "list",
            "data": data,
            "model": request.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


_CATEGORIES = ("harassment", "hate", "illicit", "self-harm", "sexual", "violence")


def _write_moderation(body: bytes, options: SimulatorOptions) -> bytes:
    request = _moderation_decode(body)
    if isinstance(request.input, list) and all(isinstance(part, str) for part in request.input):
        count = len(request.input)
    else:
        count = 1  # parts of one multi-modal input
    result = {
        "flagged": False,
        "categories": dict.fromkeys(_CATEGORIES, False),
        "category_scores": dict.fromkeys(_CATEGORIES, 0.001),
        "category_applied_input_types": {category: ["text"] for category in _CATEGORIES},
    }
    return _encode(
        {
            "id": f"modr-{zlib.crc32(body):08x}",
            "model": request.model,
            "results": [result] * count,
        }
    )


def _write_image(body: bytes, options: SimulatorOptions) -> bytes:
    request = _image_decode(body)
    count = min(max(request.n or 1, 1), 10)  # the API's own bounds
    input_tokens = _count_tokens([request.prompt])
    return _encode(
        {
            "created": _CREATED,
            "data": [{"b64_json": _PIXEL}] * count,
            "usage": {
                "input_tokens": input_tokens,
                "input_tokens_details": {"text_tokens": input_tokens, "image_tokens": 0},
                "output_tokens": count,
                "total_tokens": input_tokens + count,
            },
        }
    )


def _write_video(body: bytes, options: SimulatorOptions) -> bytes:
    request = _video_decode(body)
    return _encode(
        {
            "id": f"video_{zlib.crc32(body):08x}",
            "object": "video",
            "created_at": _CREATED,
            "completed_at": _CREATED,
            "expires_at": None,
            "status": "completed",
            "progress": 100,
            "error": None,
            "model": request.model,
            "prompt": request.prompt,
            "seconds": request.seconds,
            "size": request.size,
            "remixed_from_video_id": None,
        }
    )


def _similarity(one: str, other: str) -> float:
    """A score from 0 to 1 that depends on the texts alone."""
    return round(zlib.crc32(f"{one}\0{other}".encode()) / 0xFFFFFFFF, 6)


def _write_rerank(body: bytes, options: SimulatorOptions) -> bytes:
    request = _rerank_decode(body)
    texts = [item if isinstance(item, str) else item.text for item in request.documents]
    scores = [_similarity(request.query, text) for text in texts]
    ranking = sorted(range(len(texts)), key=scores.__getitem__, reverse=True)
    results = [
        {"index": index, "document": {"text": texts[index]}, "relevance_score": scores[index]}
        for index in ranking[: request.top_n]
    ]
    tokens = _count_tokens([request.query, *texts])
    return _encode(
        {
            "id": f"rerank-{zlib.crc32(body):08x}",
            "model": request.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "results": results,
        }
    )


def _write_score(body: bytes, options: SimulatorOptions) -> bytes:
    request = _score_decode(body)
    ones = [request.text_1] if isinstance(request.text_1, str) else request.text_1
    others = [request.text_2] if isinstance(request.text_2, str) else request.text_2
    if len(ones) == 1:
        ones = ones * len(others)
    pairs = zip(ones, others, strict=False)
    tokens = _count_tokens([*ones, *others])
    data = [
        {"index": index, "object": "score", "score": _similarity(one, other)}
        for index, (one, other) in enumerate(pairs)
    ]
    return _encode(
        {
            "id": f"score-{zlib.crc32(body):08x}",
            "object": "list",
            "created": _CREATED,
            "model": request.model,
            "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


_WRITERS: dict[bytes, _Writer] = {
    prefix + path: write
    for prefix in (b"", b"/v1")
    for path, write in (
        (b"/chat/completions", _write_chat),
        (b"/completions", _write_completion),
        (b"/responses", _write_response),
        (b"/messages", _write_message),
        (b"/embeddings", _write_embedding),
        (b"/moderations", _write_moderation),
        (b"/images/generations", _write_image),
        (b"/images/edits", _write_image),
        (b"/videos", _write_video),
        (b"/rerank", _write_rerank),
        (b"/score", _write_score),
    )
}
"""By the path of the request. To add an endpoint, add a row."""
