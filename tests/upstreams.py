"""An HTTP upstream that does what a test tells it to, right or wrong.

It runs on the test's own loop, on a free port of loopback:

    def behave(path: str, headers: dict[str, str], body: bytes, nth: int) -> Action:
        return cut() if nth == 1 else answer({"choices": []})

    async with ScriptedUpstream(behave) as upstream:
        ...  # send to upstream.base_url
        assert len(upstream.requests) == 2

`nth` says how often this very body came to this path, from 1, so that "fails twice, then
succeeds" is a condition on `nth`. Headers are lower case. An event may hold an answer back:
`hold(answer(...), until=event)`.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any, Self

TIMEOUT_S = 10.0
"""How long `wait_for_requests` and the like wait before the test fails."""


class Then(Enum):
    """What becomes of the connection after the bytes of an action."""

    KEEP = auto()  # wait for the next request
    CLOSE = auto()  # end it in order
    RESET = auto()  # end it with a TCP reset
    STALL = auto()  # say nothing more until the client drops it


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """What is done with one request. The functions below make the usual ones."""

    pieces: tuple[bytes, ...] = ()
    """Sent one by one, as they are: head and body."""
    pause_s: float = 0
    """Waited after each piece."""
    then: Then = Then.KEEP
    until: asyncio.Event | None = None
    """Waited for before the first piece."""


def answer(
    body: object = None,
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    indent: int | None = None,
) -> Action:
    """A whole answer. `body` is sent as it is if it is bytes, and as JSON otherwise."""
    if body is None:
        body = chat_completion("Hello.")
    data = body if isinstance(body, bytes) else json.dumps(body, indent=indent).encode()
    return Action(pieces=(_head(status, len(data), headers) + data,))


def fail(
    status: int, message: str = "No.", *, headers: Mapping[str, str] | None = None
) -> Action:
    """An error in the shape of OpenAI's API."""
    error = {"message": message, "type": "server_error", "param": None, "code": None}
    return answer({"error": error}, status=status, headers=headers)


def html(status: int = 502) -> Action:
    """The page of a proxy that has lost its server."""
    page = b"<html><head><title>Bad Gateway</title></head>\r\n<body>nginx</body></html>\r\n"
    return answer(page, status=status, headers={"Content-Type": "text/html"})


def empty(status: int = 200) -> Action:
    """An answer without a body."""
    return answer(b"", status=status)


def redirect(location: str, status: int = 302) -> Action:
    return answer(b"", status=status, headers={"Location": location})


def raw(*pieces: bytes, then: Then = Then.CLOSE, pause_s: float = 0) -> Action:
    """Any bytes at all, head and body."""
    return Action(pieces=pieces, then=then, pause_s=pause_s)


def cut(then: Then = Then.CLOSE) -> Action:
    """The connection ends before any byte of an answer."""
    return Action(then=then)


def cut_in_headers() -> Action:
    return raw(b"HTTP/1.1 200 OK\r\nContent-Type: applicat")


def cut_in_body() -> Action:
    """Less comes than Content-Length says."""
    return raw(_head(200, 1000) + b'{"choices":[')


def cut_in_chunk() -> Action:
    return raw(_CHUNKED_HEAD + b'c\r\n{"choices":[\r\n20\r\n{"index"')


def cut_between_chunks() -> Action:
    """What came is a whole JSON object, but the end of the body is missing."""
    return raw(_CHUNKED_HEAD + b'e\r\n{"choices":[]}\r\n')


def stall() -> Action:
    """No byte ever comes, and the connection stays."""
    return Action(then=Then.STALL)


def stall_in_body() -> Action:
    return raw(_head(200, 1000) + b'{"choices":[', then=Then.STALL)


def drip(body: object = None, *, pieces: int = 10, pause_s: float = 0.01) -> Action:
    """A whole answer, in chunks that come slowly."""
    data = json.dumps(chat_completion("Hello.") if body is None else body).encode()
    size = -(-len(data) // pieces)
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    chunks = [b"%x\r\n%b\r\n" % (len(part), part) for part in parts]
    return Action(pieces=(_CHUNKED_HEAD, *chunks, b"0\r\n\r\n"), pause_s=pause_s)


def events(*data: object, done: bool = True, pause_s: float = 0.0) -> Action:
    """A stream of server-sent events, each in a chunk of its own."""
    parts = [b"data: " + json.dumps(each).encode() + b"\n\n" for each in data]
    if done:
        parts.append(b"data: [DONE]\n\n")
    chunks = [b"%x\r\n%b\r\n" % (len(part), part) for part in parts]
    head = _CHUNKED_HEAD.replace(b"application/json", b"text/event-stream")
    return Action(pieces=(head, *chunks, b"0\r\n\r\n"), pause_s=pause_s)


def chat_chunk(text: str, *, usage: object = None) -> dict[str, Any]:
    """A piece of a chat completion."""
    choices = [{"index": 0, "delta": {"role": "assistant", "content": text}}]
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return {**head, "choices": choices, "usage": usage}


def chunked(*parts: bytes) -> Action:
    """A whole answer in chunks, without a Content-Length."""
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return Action(pieces=(_CHUNKED_HEAD, chunks, b"0\r\n\r\n"))


def wrong_length(body: bytes, length: int) -> Action:
    """An answer whose Content-Length says `length`, whatever its body has."""
    return raw(_head(200, length) + body)


def hold(action: Action, *, until: asyncio.Event) -> Action:
    """The same, but not before `until` is set."""
    return replace(action, until=until)


def chat_completion(text: str, *, model: str = "m", usage: object = None) -> dict[str, Any]:
    """A good answer of `/v1/chat/completions`, of 3 and 2 tokens unless `usage` is given."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1750000000,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop",
            }
        ],
        "usage": usage or {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def model_list(*models: str) -> dict[str, Any]:
    """A good answer of `/v1/models`."""
    data = [
        {"id": model, "object": "model", "created": 0, "owned_by": "us"} for model in models
    ]
    return {"object": "list", "data": data}


Behave = Callable[[str, dict[str, str], bytes, int], Action]


def be_good(path: str, headers: dict[str, str], body: bytes, nth: int) -> Action:
    """Answer everything as a server should whose one model is `m`."""
    return answer(model_list("m") if path.endswith("/models") else chat_completion("Hello."))


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """One request, as it came."""

    method: str
    path: str
    headers: dict[str, str]
    """By lower-case name."""
    body: bytes
    nth: int
    """How often this body came to this path by then, from 1."""
    connection: int
    """On which connection it came, from 1."""
    at: float
    """When it was whole, on the loop's clock."""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class ScriptedUpstream:
    """Listens while its `async with` block runs; at its end all connections are dropped."""

    def __init__(self, behave: Behave = be_good, *, host: str = "127.0.0.1") -> None:
        self._host = host
        self.behave = behave
        """What is done with each request; may be replaced at any time."""
        self.requests: list[Received] = []
        """All that came whole, in order."""
        self.connections = 0
        """How many were opened."""
        self.metrics: bytes | None = None
        """What `/metrics` shows, which is not among the requests; None answers 404."""
        self.in_flight = 0
        """How many requests are taken and not yet dealt with."""
        self.max_in_flight = 0
        self.drops = 0
        """How many connections the client dropped while an answer was due."""
        self._seen: Counter[tuple[str, bytes]] = Counter()
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def bodies(self) -> list[bytes]:
        """The bodies of all requests that came, in order."""
        return [request.body for request in self.requests]

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, self._host, 0, backlog=1024)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks)
        await self._server.wait_closed()

    async def wait_for_requests(self, count: int) -> None:
        """Wait until `count` requests have come in all."""
        await self._wait_until(lambda: len(self.requests) >= count)

    async def wait_for_drops(self, count: int) -> None:
        """Wait until `count` connections were dropped while an answer was due."""
        await self._wait_until(lambda: self.drops >= count)

    async def _wait_until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S), self._changed:
            await self._changed.wait_for(is_so)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        connection = self.connections
        try:
            while (request := await self._receive(reader, writer, connection)) is not None:
                self.in_flight += 1
                self.max_in_flight = max(self.max_in_flight, self.in_flight)
                await self._tell()
                try:
                    action = self.behave(
                        request.path, request.headers, request.body, request.nth
                    )
                    may_go_on = await self._carry_out(action, reader, writer)
                finally:
                    self.in_flight -= 1
                if not may_go_on:
                    break
        except (ConnectionError, asyncio.CancelledError):
            pass  # dropped by the client, or by the end of the block
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _receive(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: int
    ) -> Received | None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            start, *lines = head.decode("latin-1").rstrip().split("\r\n")
            pairs = (line.split(":", 1) for line in lines)
            headers = {name.lower(): value.strip() for name, value in pairs}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
        except asyncio.IncompleteReadError:
            return None
        method, path, _ = start.split(" ")
        if path == "/metrics":
            status = 404 if self.metrics is None else 200
            data = self.metrics or b""
            writer.write(_head(status, len(data)) + data)
            return await self._receive(reader, writer, connection)
        self._seen[path, body] += 1
        request = Received(
            method=method,
            path=path,
            headers=headers,
            body=body,
            nth=self._seen[path, body],
            connection=connection,
            at=asyncio.get_running_loop().time(),
        )
        self.requests.append(request)
        return request

    async def _carry_out(
        self, action: Action, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Do what `action` says; whether the connection takes another request then."""
        try:
            if action.until is not None and not await _is_set_before_drop(action.until, reader):
                raise ConnectionResetError
            for piece in action.pieces:
                writer.write(piece)
                await writer.drain()
                if action.pause_s:
                    await asyncio.sleep(action.pause_s)
            if action.then is Then.STALL:
                await reader.read()
                raise ConnectionResetError
        except ConnectionError:
            self.drops += 1
            await self._tell()
            raise
        if action.then is Then.RESET:
            writer.transport.abort()
        return action.then is Then.KEEP


async def _is_set_before_drop(event: asyncio.Event, reader: asyncio.StreamReader) -> bool:
    setting = asyncio.ensure_future(event.wait())
    dropping = asyncio.ensure_future(_until_dropped(reader))
    try:
        await asyncio.wait({setting, dropping}, return_when=asyncio.FIRST_COMPLETED)
        return setting.done()
    finally:
        setting.cancel()
        dropping.cancel()
        await asyncio.gather(setting, dropping, return_exceptions=True)


async def _until_dropped(reader: asyncio.StreamReader) -> None:
    # Reading would take the bytes of a next request away.
    while not reader.at_eof() and reader.exception() is None:
        await asyncio.sleep(0.01)


_CHUNKED_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
)


def _head(status: int, length: int, headers: Mapping[str, str] | None = None) -> bytes:
    fields = {"Content-Type": "application/json", "Content-Length": str(length)}
    fields.update(headers or {})
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} Whatever\r\n{lines}\r\n".encode("latin-1")
