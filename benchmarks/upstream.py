"""An upstream that does as little as can be, so that it is never what is measured.

It answers every POST with the same completion, at once or after a latency, and counts which
lines it saw: a line names itself by `line-<number> ` in its body. `GET /stats` tells. The ID of
the completion names the line in turn, so that a reply kept for another line is found.

    python -m benchmarks.upstream --port 9000 --latency-ms 0
    python -m benchmarks.upstream --latency-ms 2000 --spread 0.5    from 1 to 3 s, by chance
    python -m benchmarks.upstream --wild 1     misbehaves half of the time, by chance
"""

import argparse
import asyncio
import json
import random
import re
import time

_LINE = re.compile(rb"line-([0-9]+) ")
_LENGTH = re.compile(rb"content-length: *([0-9]+)", re.IGNORECASE)

_ID = b"chatcmpl-%09d"
_NO_LINE = _ID % 0
_BODY = json.dumps(
    {
        "id": _NO_LINE.decode(),
        "object": "chat.completion",
        "created": 1750000000,
        "model": "sim",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "All work and no play. " * 16},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 180, "completion_tokens": 64, "total_tokens": 244},
    }
).encode()
_ROUND_S = 0.1
_ANSWER = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    % len(_BODY)
) + _BODY


_JSON = b"content-type: application/json\r\n"


def _with_length(length: int, body: bytes, status: bytes = b"200 OK") -> bytes:
    head = b"HTTP/1.1 %b\r\n%bcontent-length: %d\r\n\r\n" % (status, _JSON, length)
    return head + body


def _whole(body: bytes, status: bytes = b"200 OK") -> bytes:
    return _with_length(len(body), body, status)


_LONG = json.dumps(
    {
        "id": _NO_LINE.decode(),
        "choices": [],
        "text": "x" * 10_000_000,
        "usage": {"total_tokens": 1},
    }
)
_CUT, _STALL = b"cut", b"stall"
_WILD: tuple[tuple[int, bytes, bytes | None], ...] = (
    (50, _ANSWER, None),
    (4, b"", _CUT),
    (4, b"HTTP/1.1 200 OK\r\ncontent-ty", _CUT),
    (4, _ANSWER[:-50], _CUT),
    (3, b"", _STALL),
    (3, _ANSWER[:-50], _STALL),
    (4, _with_length(len(_BODY) + 100, _BODY), _CUT),
    (4, _with_length(len(_BODY) - 100, _BODY), None),
    (2, b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n", None),
    (2, b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n", _CUT),
    (1, _whole(_LONG.encode()), None),
    (3, _whole(_BODY.replace(b"work", b"wo\x00k")), None),
    (3, _whole(_BODY.replace(b"work", b"wo\xffk")), None),
    (3, _whole(b"<html>It works.</html>"), None),
    (2, _whole(b""), None),
    (1, b"\x00\xff garbage\r\n\r\n", None),
    (3, _whole(b"oops", b"500 Oops"), None),
    (2, _whole(b"<html>", b"503 Busy"), None),
    (2, _whole(b'{"error":{"message":"slow down"}}', b"429 Slow"), None),
)
"""How often out of a hundred it says what, and what it does then."""


def _naming(line: int, answer: bytes) -> bytes:
    return answer.replace(_NO_LINE, _ID % line, 1)


class Counts:
    """What was seen, over all connections."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}
        self.requests = 0
        self.in_flight = 0
        self.max_in_flight = 0
        self.last_at = 0.0
        self.first_at = 0.0
        self.marks: list[float] = []
        """When every hundredth request came."""
        self.round_at = 0.0
        """When the first request came after a while without any."""

    def as_json(self) -> bytes:
        return json.dumps(
            {
                "requests": self.requests,
                "lines": len(self.seen),
                "again": sum(count - 1 for count in self.seen.values()),
                "most": max(self.seen.values(), default=0),
                "beyond_five": sum(max(count - 5, 0) for count in self.seen.values()),
                "in_flight": self.in_flight,
                "max_in_flight": self.max_in_flight,
                "first_at": self.first_at,
                "last_at": self.last_at,
                "round_at": self.round_at,
                "marks": self.marks,
            }
        ).encode()


class Upstream(asyncio.Protocol):
    """One connection."""

    def __init__(
        self,
        counts: Counts,
        latency_s: float,
        chance: random.Random | None = None,
        spread: float = 0.0,
    ) -> None:
        self._spread = spread
        self._chance = chance
        self._counts = counts
        self._latency_s = latency_s
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        while True:
            head = self._buffer.find(b"\r\n\r\n")
            if head < 0:
                return
            match = _LENGTH.search(self._buffer, 0, head)
            end = head + 4 + (int(match[1]) if match else 0)
            if len(self._buffer) < end:
                return
            request, self._buffer = self._buffer[:end], self._buffer[end:]
            self._take(request)

    def _take(self, request: bytes) -> None:
        if request.startswith(b"GET"):
            body = (
                self._counts.as_json()
                if b"/stats" in request[:40]
                else b'{"object":"list","data":[{"id":"sim","object":"model"}]}'
            )
            self._write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%b" % (len(body), body)
            )
            return
        counts = self._counts
        if not counts.requests % 100:
            counts.marks.append(time.time())
        counts.requests += 1
        now = time.time()
        if now - counts.last_at > _ROUND_S:
            counts.round_at = now
        counts.last_at = now
        counts.first_at = counts.first_at or counts.last_at
        line = 0
        if match := _LINE.search(request):
            line = int(match[1])
            counts.seen[line] = counts.seen.get(line, 0) + 1
        if self._latency_s:
            counts.in_flight += 1
            counts.max_in_flight = max(counts.max_in_flight, counts.in_flight)
            latency_s = self._latency_s * random.uniform(1 - self._spread, 1 + self._spread)
            asyncio.get_running_loop().call_later(latency_s, self._answer_late, line)
        else:
            self._write(_naming(line, _ANSWER))

    def _answer_late(self, line: int) -> None:
        self._counts.in_flight -= 1
        if self._chance is None:
            self._write(_naming(line, _ANSWER))
            return
        weights = [weight for weight, _, _ in _WILD]
        _, answer, then = self._chance.choices(_WILD, weights)[0]
        self._write(_naming(line, answer))
        if then is _CUT and self._transport is not None:
            self._transport.close()

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)


async def _serve(port: int, latency_s: float, spread: float, wild: int | None) -> None:
    counts = Counts()
    chance = None if wild is None else random.Random(wild)
    server = await asyncio.get_running_loop().create_server(
        lambda: Upstream(counts, latency_s, chance, spread), "127.0.0.1", port, backlog=4096
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--spread", type=float, default=0.0)
    parser.add_argument("--wild", type=int)
    options = parser.parse_args()
    latency_ms = (
        max(options.latency_ms, 1.0) if options.wild is not None else options.latency_ms
    )
    uvloop.run(_serve(options.port, latency_ms / 1000, options.spread, options.wild))


if __name__ == "__main__":
    main()
