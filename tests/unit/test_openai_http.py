import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping

import pytest

from penstock import __version__
from penstock.errors import InvalidSettings, UpstreamDown
from penstock.testing.upstream import KEY, LineUpstreamContract
from penstock.upstream.base import Failure, Reply
from penstock.upstream.openai_http import (
    MAX_RETRY_AFTER_S,
    MakeTransport,
    OpenAIHttpUpstream,
    choose_transport,
    make_reqwest,
    parse_retry_after,
)
from tests.upstreams import (
    Action,
    ScriptedUpstream,
    Then,
    answer,
    be_good,
    chat_chunk,
    chat_completion,
    chunked,
    cut,
    cut_between_chunks,
    cut_in_body,
    cut_in_chunk,
    cut_in_headers,
    drip,
    empty,
    events,
    hold,
    html,
    raw,
    redirect,
    stall,
    stall_in_body,
    wrong_length,
)

CHAT = "/v1/chat/completions"
REQUEST = b'{"model":"m","messages":[{"role":"user","content":"Hello."}]}'


@pytest.fixture(params=[choose_transport, make_reqwest], ids=["http1", "reqwest"], autouse=True)
def transport(request: pytest.FixtureRequest) -> MakeTransport:
    """Each test runs over each way to send; `connect` uses the one of the test."""
    global _make_transport
    _make_transport = request.param
    return request.param


_make_transport: MakeTransport = choose_transport


def connect(base_url: str, **settings: object) -> OpenAIHttpUpstream:
    defaults: dict[str, object] = {
        "make_transport": _make_transport,
        "name": "local",
        "api_key": KEY,
        "max_concurrency": 16,
        "request_timeout_s": 10,
    }
    return OpenAIHttpUpstream(base_url=base_url, **(defaults | settings))


async def send_to(action: Action, **settings: object) -> Reply:
    """Send one request to a server that does `action`."""
    async with ScriptedUpstream(lambda *_: action) as server:
        upstream = connect(server.base_url, **settings)
        reply = await upstream.send(CHAT, REQUEST)
        await upstream.close()
    return reply


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class ScriptedFarSide(ScriptedUpstream):
    """The contract's far side, played by the scripted upstream."""

    def answer(
        self, body: bytes, *, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        self.behave = lambda *_: answer(body, status=status, headers=headers)

    def stall(self) -> None:
        self.behave = lambda *_: stall()

    def cut(self) -> None:
        self.behave = lambda *_: cut_in_body()


class TestContract(LineUpstreamContract):
    @pytest.fixture
    async def far_side(self) -> AsyncIterator[ScriptedFarSide]:
        async with ScriptedFarSide() as far_side:
            yield far_side

    @pytest.fixture
    async def upstream(self, far_side: ScriptedFarSide) -> AsyncIterator[OpenAIHttpUpstream]:
        upstream = connect(far_side.base_url)
        yield upstream
        await upstream.close()

    @pytest.fixture
    async def hasty_upstream(
        self, far_side: ScriptedFarSide
    ) -> AsyncIterator[OpenAIHttpUpstream]:
        upstream = connect(far_side.base_url, request_timeout_s=0.1)
        yield upstream
        await upstream.close()

    @pytest.fixture
    async def lost_upstream(self, free_port: int) -> AsyncIterator[OpenAIHttpUpstream]:
        upstream = connect(f"http://127.0.0.1:{free_port}/v1")
        yield upstream
        await upstream.close()


class TestRequest:
    async def test_it_carries_type_key_and_version(self) -> None:
        async with ScriptedUpstream() as server:
            upstream = connect(server.base_url)
            await upstream.send(CHAT, REQUEST)
            await upstream.close()

        [request] = server.requests
        assert request.method == "POST"
        assert request.body == REQUEST
        assert request.headers == {
            "content-type": "application/json",
            "accept": "application/json",
            "authorization": f"Bearer {KEY}",
            "user-agent": f"penstock/{__version__}",
            "host": f"127.0.0.1:{server.port}",
            "content-length": str(len(REQUEST)),
        }

    @pytest.mark.parametrize("api_key", [None, ""])
    async def test_without_a_key_there_is_no_authorization(self, api_key: str | None) -> None:
        async with ScriptedUpstream() as server:
            upstream = connect(server.base_url, api_key=api_key)
            await upstream.send(CHAT, REQUEST)
            await upstream.close()

        assert "authorization" not in server.requests[0].headers

    @pytest.mark.parametrize(
        ("path", "endpoint", "sent"),
        [
            ("/v1", CHAT, "/v1/chat/completions"),
            ("/v1/", CHAT, "/v1/chat/completions"),
            ("", CHAT, "/v1/chat/completions"),
            ("/", CHAT, "/v1/chat/completions"),
            ("//", CHAT, "/v1/chat/completions"),
            ("/openai/v3//", CHAT, "/openai/v3/chat/completions"),
            ("/a%20b", CHAT, "/a%20b/chat/completions"),
            ("/v1", "/v1/images/generations", "/v1/images/generations"),
            ("/v1", "/v1/brand/new", "/v1/brand/new"),
            ("/v1", "/chat/completions", "/v1/chat/completions"),
        ],
    )
    async def test_it_goes_to_the_endpoint_below_the_base_url(
        self, path: str, endpoint: str, sent: str
    ) -> None:
        async with ScriptedUpstream() as server:
            upstream = connect(f"http://127.0.0.1:{server.port}{path}")
            await upstream.send(endpoint, REQUEST)
            await upstream.close()

        assert [request.path for request in server.requests] == [sent]

    async def test_calls_share_a_connection(self) -> None:
        async with ScriptedUpstream(
            lambda path, headers, body, nth: drip(pause_s=0) if nth % 2 else answer()
        ) as server:
            upstream = connect(server.base_url)
            for _ in range(6):
                assert (await upstream.send(CHAT, REQUEST)).is_success
            await upstream.close()

        assert server.connections == 1

    async def test_a_body_of_megabytes_goes_out_whole(self) -> None:
        body = json.dumps({"model": "m", "text": "é" * 3_000_000}).encode()
        async with ScriptedUpstream() as server:
            upstream = connect(server.base_url)
            reply = await upstream.send(CHAT, body)
            await upstream.close()

        assert reply.is_success
        assert server.bodies == [body]

    async def test_a_proxy_of_the_environment_is_not_used_for_loopback(
        self, monkeypatch: pytest.MonkeyPatch, free_port: int
    ) -> None:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port}")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)

        assert (await send_to(answer())).is_success


class TestGoodAnswer:
    async def test_tokens_are_counted(self) -> None:
        reply = await send_to(answer(chat_completion("Hello.")))

        assert (reply.input_tokens, reply.output_tokens, reply.total_tokens) == (3, 2, 5)

    async def test_one_odd_figure_does_not_spoil_the_others(self) -> None:
        usage = {
            "prompt_tokens": 7,
            "completion_tokens": -1,
            "total_tokens": 12.5,
            "prompt_tokens_details": {"cached_tokens": 3, "reasoning_tokens": "x"},
            "completion_tokens_details": {"reasoning_tokens": 2**60},
            "service_tokens_details": {},
            "cost": None,
        }

        reply = await send_to(answer(chat_completion("Hello.", usage=usage)))

        assert reply.is_success
        assert (reply.input_tokens, reply.cached_tokens) == (7, 3)
        assert (reply.output_tokens, reply.reasoning_tokens) == (0, 0)
        assert reply.total_tokens == 0

    async def test_details_may_be_null(self) -> None:
        usage = {"prompt_tokens": 7, "prompt_tokens_details": None}

        reply = await send_to(answer({"usage": usage}))

        assert (reply.input_tokens, reply.cached_tokens) == (7, 0)

    async def test_pretty_printed_json_comes_as_it_was_sent(self) -> None:
        action = answer(chat_completion("One\nTwo"), indent=4)

        reply = await send_to(action)

        assert reply.is_success
        assert reply.body.count(b"\n") > 10
        assert action.pieces[0].endswith(reply.body)

    async def test_a_body_of_10_mb_comes_whole(self) -> None:
        action = answer(chat_completion("x" * 10_000_000))

        reply = await send_to(action)

        assert reply.is_success
        assert len(reply.body) > 10_000_000

    async def test_chunks_and_pauses_make_no_difference(self) -> None:
        reply = await send_to(drip(chat_completion("Hello."), pieces=7, pause_s=0.001))

        assert reply.is_success
        assert json.loads(reply.body) == chat_completion("Hello.")

    async def test_a_body_that_ends_with_the_connection_is_whole(self) -> None:
        reply = await send_to(raw(b'HTTP/1.1 200 OK\r\n\r\n{"choices":[]}'))

        assert reply.is_success

    @pytest.mark.parametrize("status", [200, 201, 202, 299])
    async def test_every_2xx_is_a_success(self, status: int) -> None:
        assert (await send_to(answer({}, status=status))).is_success

    async def test_a_request_id_that_is_not_ascii_is_passed_over(self) -> None:
        head = b"HTTP/1.1 200 OK\r\nX-Request-Id: \xe9t\xe9\r\nContent-Length: 2\r\n\r\n"

        reply = await send_to(raw(head + b"{}"))

        assert reply.is_success
        assert reply.request_id is None


class TestInvalidAnswer:
    async def test_the_message_quotes_status_type_and_beginning(self) -> None:
        reply = await send_to(html(status=200))

        assert reply.failure is Failure.INVALID
        assert reply.message == (
            "The answer (HTTP 200, content type text/html) is not one JSON object:"
            " <html><head><title>Bad Gateway</title></head> <body>nginx</body></html>"
        )

    async def test_a_long_body_is_quoted_by_its_first_200_characters(self) -> None:
        reply = await send_to(answer(b"\x00\xff" + b"x" * 5_000))

        assert reply.message.endswith(": \N{REPLACEMENT CHARACTER}" + "x" * 199 + "…")

    async def test_a_key_at_the_edge_of_the_quote_is_masked(self) -> None:
        reply = await send_to(answer(b"x" * 190 + KEY.encode()))

        assert KEY[:4] not in reply.message
        assert reply.message.endswith("***")

    async def test_an_empty_body_is_said_to_be_empty(self) -> None:
        reply = await send_to(empty())

        assert reply.failure is Failure.INVALID
        assert reply.message.endswith("it is empty.")

    async def test_no_content_is_invalid(self) -> None:
        reply = await send_to(raw(b"HTTP/1.1 204 No Content\r\n\r\n"))

        assert (reply.failure, reply.status_code) == (Failure.INVALID, 204)

    async def test_switching_protocols_is_no_success(self) -> None:
        head = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"

        assert not (await send_to(raw(head))).is_success

    async def test_a_content_type_that_is_not_ascii_is_passed_over(self) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: \xff\r\nContent-Length: 2\r\n\r\n"

        assert (await send_to(raw(head + b"[]"))).failure is Failure.INVALID

    async def test_broken_utf8_in_a_field_that_nobody_reads_is_found(self) -> None:
        assert (await send_to(answer(b'{"x":"\xc3\x28"}'))).failure is Failure.INVALID

    async def test_broken_json_behind_an_odd_usage_is_found(self) -> None:
        assert (await send_to(answer(b'{"usage":[],"x":}'))).failure is Failure.INVALID

    async def test_deep_nesting_inside_the_usage_is_found(self) -> None:
        body = b'{"usage":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

        assert (await send_to(answer(body))).failure is Failure.INVALID

    async def test_less_than_the_announced_length_is_a_disconnection(self) -> None:
        assert (await send_to(wrong_length(b"{}", 3))).failure is Failure.DISCONNECTED

    async def test_more_than_the_announced_length_does_not_reach_the_next_answer(self) -> None:
        def behave(path: str, headers: dict[str, str], body: bytes, nth: int) -> Action:
            if nth == 1:
                return raw(*wrong_length(b'{"a":1}{"b":2}', 7).pieces, then=Then.KEEP)
            return be_good(path, headers, body, nth)

        async with ScriptedUpstream(behave) as server:
            upstream = connect(server.base_url)
            first = await upstream.send(CHAT, REQUEST)
            second = await upstream.send(CHAT, REQUEST)
            await upstream.close()

        assert first.body == b'{"a":1}'
        assert second.is_success
        assert b'"b"' not in second.body


LIMIT = 100_000


class TestLongAnswer:
    def too_long(self, status: int = 200) -> str:
        return f"The answer (HTTP {status}) is longer than {LIMIT} bytes."

    async def test_as_long_as_allowed_is_not_too_long(self) -> None:
        body = b'{"x":"%b"}' % (b"x" * (LIMIT - 8))

        for action in (answer(body), chunked(body)):
            assert (await send_to(action, max_reply_bytes=LIMIT)).body == body

    async def test_an_answer_that_announces_too_much_is_not_read_to_its_end(self) -> None:
        # The client reads ahead by 64 KiB before it shows the head of an answer.
        begun = wrong_length(b"x" * 70_000, LIMIT + 1)
        action = raw(*begun.pieces, then=Then.STALL)

        reply = await send_to(action, max_reply_bytes=LIMIT)

        assert (reply.failure, reply.status_code) == (Failure.INVALID, 200)
        assert reply.body == b""
        assert reply.message == self.too_long()

    async def test_an_answer_that_turns_out_too_long_is_dropped(self) -> None:
        head, chunk, _ = chunked(b"x" * 70_000).pieces
        endless = raw(head, chunk, chunk, then=Then.STALL)

        async with ScriptedUpstream(lambda *_: endless) as server:
            upstream = connect(server.base_url, max_reply_bytes=LIMIT)
            reply = await upstream.send(CHAT, REQUEST)
            await server.wait_for_drops(1)
            await upstream.close()

        assert reply.failure is Failure.INVALID
        assert reply.message == self.too_long()

    async def test_an_error_that_is_too_long_keeps_its_status(self) -> None:
        action = answer(b"x" * (LIMIT + 1), status=500)

        reply = await send_to(action, max_reply_bytes=LIMIT)

        assert (reply.failure, reply.status_code) == (Failure.INVALID, 500)
        assert reply.message == self.too_long(500)


class TestOtherStatus:
    async def test_a_redirect_is_not_followed(self) -> None:
        async with ScriptedUpstream(lambda *_: redirect("/v1/elsewhere", 307)) as server:
            upstream = connect(server.base_url)
            reply = await upstream.send(CHAT, REQUEST)
            await upstream.close()

        assert (reply.status_code, reply.failure, reply.is_success) == (307, None, False)
        assert len(server.requests) == 1

    async def test_a_page_of_a_proxy_comes_as_it_was_sent(self) -> None:
        reply = await send_to(html(status=502))

        assert (reply.status_code, reply.failure) == (502, None)
        assert b"nginx" in reply.body

    async def test_an_empty_error_is_a_reply(self) -> None:
        reply = await send_to(empty(status=503))

        assert (reply.status_code, reply.failure, reply.body) == (503, None, b"")

    @pytest.mark.parametrize("status", [600, 999])
    async def test_a_status_that_does_not_exist_is_a_reply(self, status: int) -> None:
        reply = await send_to(answer({}, status=status))

        assert (reply.status_code, reply.is_success) == (status, False)

    async def test_the_finer_wait_counts_first(self) -> None:
        headers = {"Retry-After": "2", "retry-after-ms": "1500"}

        reply = await send_to(answer({}, status=429, headers=headers))

        assert reply.retry_after_s == 1.5


NOON = 1_750_000_000.0  # Sun, 15 Jun 2025 15:06:40 GMT


@pytest.mark.parametrize(
    ("value", "wait_s"),
    [
        ("0", 0),
        ("7", 7),
        ("0.25", 0.25),
        ("86400", MAX_RETRY_AFTER_S),
        ("86401", None),
        ("-1", None),
        ("", None),
        ("soon", None),
        ("nan", None),
        ("inf", None),
        ("1e3", None),
        ("1_000", None),
        ("٣", None),
        ("9" * 1000, None),
        ("Sun, 15 Jun 2025 15:07:10 GMT", 30),
        ("Sun, 15 Jun 2025 17:07:10 +0200", 30),
        ("Sun, 15 Jun 2025 15:07:10 -0000", 30),
        ("Sunday, 15-Jun-25 15:07:10 GMT", 30),
        ("Sun, 15 Jun 2025 15:06:00 GMT", None),
        ("Sun, 15 Jun 9999 15:06:00 GMT", None),
        ("Sun, 99 Jun 2025 15:06:00 GMT", None),
        (None, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, wait_s: float | None) -> None:
    assert parse_retry_after(value, now=NOON) == wait_s


@pytest.mark.parametrize(
    ("value", "value_ms", "wait_s"),
    [("7", "250", 0.25), (None, "250", 0.25), ("7", "x", 7), ("7", "", 7), (None, "-1", None)],
)
def test_retry_after_ms_counts_first(
    value: str | None, value_ms: str, wait_s: float | None
) -> None:
    assert parse_retry_after(value, value_ms, now=NOON) == wait_s


class TestFailure:
    @pytest.mark.parametrize(
        "action",
        [
            cut,
            lambda: cut(Then.RESET),
            cut_in_headers,
            cut_in_body,
            cut_in_chunk,
            cut_between_chunks,
            lambda: raw(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"),
            lambda: raw(b"\x00" * 100),
            lambda: raw(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n{}"),
            lambda: raw(
                b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}1"
            ),
            lambda: raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}"),
        ],
        ids=range(11),
    )
    async def test_an_answer_that_is_not_whole_is_a_disconnection(
        self, action: Callable[[], Action]
    ) -> None:
        reply = await send_to(action())

        assert reply.failure is Failure.DISCONNECTED
        assert reply.status_code is None
        assert reply.message.startswith("The connection ended before the answer was whole: ")

    async def test_a_kept_connection_that_is_cut_was_not_unreachable(self) -> None:
        async with ScriptedUpstream(
            lambda path, headers, body, nth: answer() if nth == 1 else cut()
        ) as server:
            upstream = connect(server.base_url)
            await upstream.send(CHAT, REQUEST)
            reply = await upstream.send(CHAT, REQUEST)
            await upstream.close()

        assert reply.failure is Failure.DISCONNECTED
        assert len(server.requests) == 2

    @pytest.mark.parametrize(
        "action", [stall, stall_in_body, lambda: drip(pieces=50, pause_s=0.02)], ids=range(3)
    )
    async def test_the_timeout_is_one_for_the_whole_answer(
        self, action: Callable[[], Action]
    ) -> None:
        begun = time.monotonic()

        reply = await send_to(action(), request_timeout_s=0.1)

        assert reply.failure is Failure.TIMEOUT
        assert reply.message == "No whole answer came within 0.1 s."
        assert time.monotonic() - begun < 0.9

    async def test_refused_means_unreachable(self, free_port: int) -> None:
        upstream = connect(f"http://127.0.0.1:{free_port}")
        reply = await upstream.send(CHAT, REQUEST)
        await upstream.close()

        assert reply.failure is Failure.UNREACHABLE
        assert reply.message.startswith("No connection: Connection refused")

    async def test_a_name_that_does_not_exist_is_unreachable(self) -> None:
        upstream = connect("http://nowhere.invalid")
        reply = await upstream.send(CHAT, REQUEST)
        await upstream.close()

        assert reply.failure is Failure.UNREACHABLE

    async def test_a_handshake_that_does_not_end_is_unreachable(self) -> None:
        async with ScriptedUpstream() as server:
            upstream = connect(f"https://127.0.0.1:{server.port}", connect_timeout_s=0.1)
            reply = await upstream.send(CHAT, REQUEST)
            await upstream.close()

        assert reply.failure is Failure.UNREACHABLE
        assert reply.message == "No connection within 0.1 s: operation timed out."

    async def test_the_next_call_finds_a_server_that_is_back(self, free_port: int) -> None:
        async with ScriptedUpstream(lambda path, headers, body, nth: cut()) as server:
            upstream = connect(server.base_url)
            first = await upstream.send(CHAT, REQUEST)
            server.behave = be_good
            second = await upstream.send(CHAT, REQUEST)
            await upstream.close()

        assert first.failure is Failure.DISCONNECTED
        assert second.is_success

    async def test_an_answer_that_is_held_back_comes_when_it_is_let_go(self) -> None:
        go = asyncio.Event()
        async with ScriptedUpstream(lambda *_: hold(answer(), until=go)) as server:
            upstream = connect(server.base_url)
            calls = [asyncio.ensure_future(upstream.send(CHAT, REQUEST)) for _ in range(3)]
            await server.wait_for_requests(3)
            assert not any(call.done() for call in calls)

            go.set()

            assert all([(await call).is_success for call in calls])
            await upstream.close()
        assert server.max_in_flight == 3

    async def test_after_close_a_call_is_a_disconnection(self) -> None:
        async with ScriptedUpstream() as server:
            upstream = connect(server.base_url)
            await upstream.close()

            assert (await upstream.send(CHAT, REQUEST)).failure is Failure.DISCONNECTED

    @pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs one CPU")
    async def test_a_process_that_has_closed_exits_in_order(self) -> None:
        # On one CPU and asyncio's own loop, half of such processes aborted without the pause.
        program = f"""
import asyncio, os
from penstock.upstream.openai_http import OpenAIHttpUpstream
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
async def main():
    upstream = OpenAIHttpUpstream(
        name="local", base_url=os.environ["URL"], api_key=None,
        max_concurrency=64, request_timeout_s=10,
    )
    replies = await asyncio.gather(*[upstream.send({CHAT!r}, {REQUEST!r}) for _ in range(256)])
    assert all(reply.is_success for reply in replies)
    await upstream.close()
asyncio.run(main())
"""
        async with ScriptedUpstream() as server:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", program, env=os.environ | {"URL": server.base_url}
            )
            assert await process.wait() == 0


class TestModels:
    async def test_they_are_asked_for_below_the_base_url(self) -> None:
        async with ScriptedUpstream() as server:
            upstream = connect(server.base_url)
            models = await upstream.list_models()
            await upstream.close()

        assert models == ["m"]
        assert [(request.method, request.path) for request in server.requests] == [
            ("GET", "/v1/models")
        ]

    async def test_the_reason_why_there_is_no_list_is_told(self) -> None:
        async with ScriptedUpstream(lambda *_: answer({}, status=401)) as server:
            upstream = connect(server.base_url)
            with pytest.raises(UpstreamDown) as caught:
                await upstream.list_models()
            await upstream.close()

        assert str(caught.value) == (
            "The upstream local did not list its models: it answered with HTTP status 401."
        )


class TestSettings:
    @pytest.mark.parametrize(
        "base_url",
        [
            "",
            "localhost:8000",
            "/v1",
            "ftp://host/v1",
            "http://",
            "http://host:99999/v1",
            "http://[::1/v1",
            "http://host/v1?api-version=1",
            "http://host/v1#x",
            "mailto:a@b",
        ],
    )
    def test_what_is_no_http_url_is_refused(self, base_url: str) -> None:
        with pytest.raises(InvalidSettings, match="base_url of upstream local"):
            connect(base_url)

    @pytest.mark.parametrize("api_key", ["sk-a\nb", "sk-a\x00b"])
    def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(self, api_key: str) -> None:
        with pytest.raises(InvalidSettings) as caught:
            connect("http://127.0.0.1:9", api_key=api_key)

        assert "api_key of upstream local" in str(caught.value)
        assert "sk-a" not in str(caught.value)
        assert caught.value.__context__ is None

    def test_name_and_concurrency_are_told(self) -> None:
        upstream = connect("http://127.0.0.1:9", max_concurrency=3)

        assert (upstream.name, upstream.max_concurrency) == ("local", 3)


class TestTimes:
    """Each time-out of its own, well below the one of the whole call."""

    async def test_an_answer_must_begin_in_time(self) -> None:
        reply = await send_to(stall(), first_byte_timeout_s=0.1, request_timeout_s=1)

        assert reply.failure is Failure.TIMEOUT
        assert reply.message == "No answer began within 0.1 s."

    async def test_an_answer_must_not_fall_silent(self) -> None:
        reply = await send_to(stall_in_body(), silence_timeout_s=0.1)

        assert reply.failure is Failure.TIMEOUT
        assert reply.message == "Nothing more of the answer came within 0.1 s."

    async def test_an_answer_that_comes_slowly_is_neither_late_nor_silent(self) -> None:
        slow = drip(pieces=20, pause_s=0.03)
        reply = await send_to(slow, first_byte_timeout_s=0.3, silence_timeout_s=0.3)

        assert reply.is_success

    async def test_a_connection_is_good_for_another_request_after_a_silence(self) -> None:
        async with ScriptedUpstream() as server:
            upstream = connect(server.base_url, silence_timeout_s=0.1)
            for _ in range(3):
                assert (await upstream.send(CHAT, REQUEST)).is_success
                await asyncio.sleep(0.2)
            server.behave = lambda *_: drip(pieces=3, pause_s=0.01)
            assert (await upstream.send(CHAT, REQUEST)).is_success
            await upstream.close()


class TestStream:
    async def test_a_stream_gives_the_reply_that_it_would_have_been(self) -> None:
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        action = events(chat_chunk("Hell"), chat_chunk("o.", usage=usage), pause_s=0.01)
        async with ScriptedUpstream(lambda *_: action) as server:
            upstream = connect(server.base_url, streams=True)
            reply = await upstream.send(CHAT, REQUEST)
            await upstream.close()

        sent = server.requests[0].json
        assert sent["stream"] is True
        assert sent["stream_options"] == {"include_usage": True}
        assert reply.is_success
        assert (reply.input_tokens, reply.output_tokens) == (3, 2)
        body = json.loads(reply.body)
        assert body["object"] == "chat.completion"
        assert body["choices"][0]["message"]["content"] == "Hello."

    async def test_what_cannot_stream_is_not_asked_to(self) -> None:
        async with ScriptedUpstream() as server:
            upstream = connect(server.base_url, streams=True)
            await upstream.send("/v1/embeddings", b'{"model":"m","input":"x"}')
            await upstream.close()

        assert server.bodies == [b'{"model":"m","input":"x"}']

    async def test_an_upstream_may_answer_at_once_all_the_same(self) -> None:
        assert (await send_to(answer(chat_completion("x")), streams=True)).is_success

    async def test_an_http_error_is_what_it_is(self) -> None:
        reply = await send_to(answer({"error": {"message": "no"}}, status=429), streams=True)

        assert reply.status_code == 429

    async def test_an_error_in_the_stream_is_one(self) -> None:
        error = {"error": {"message": "Too many.", "code": 429}}
        reply = await send_to(events(chat_chunk("x"), error), streams=True)

        assert reply.status_code == 429
        assert json.loads(reply.body) == error

    async def test_half_a_stream_is_no_reply(self) -> None:
        reply = await send_to(events(chat_chunk("x"), done=False), streams=True)

        assert reply.failure is Failure.DISCONNECTED

    async def test_a_stream_that_cannot_be_read_is_told(self) -> None:
        reply = await send_to(events([1]), streams=True)

        assert reply.failure is Failure.INVALID
        assert "an event is not a JSON object" in reply.message

    async def test_a_stream_that_is_too_long_is_refused(self) -> None:
        action = events(*(chat_chunk("x" * 1000) for _ in range(20)))
        reply = await send_to(action, streams=True, max_reply_bytes=5000)

        assert reply.failure is Failure.INVALID
        assert "longer than 5000 bytes" in reply.message


class TestLoad:
    async def test_it_is_read_beside_the_api(self) -> None:
        async with ScriptedUpstream() as server:
            upstream = connect(server.base_url)
            assert await upstream.read_load() is None
            server.metrics = b"vllm:num_requests_waiting 3\n"
            load = await upstream.read_load()
            await upstream.close()

        assert load is not None
        assert load.waiting == 3

    async def test_an_upstream_that_is_away_tells_nothing(self, free_port: int) -> None:
        upstream = connect(f"http://127.0.0.1:{free_port}/v1")
        assert await upstream.read_load() is None
        await upstream.close()
