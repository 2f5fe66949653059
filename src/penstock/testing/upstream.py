"""The promises of `LineUpstream`, one test each."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import pytest

from penstock.errors import UpstreamDown
from penstock.upstream.base import Failure, LineUpstream

CHAT = "/v1/chat/completions"
KEY = "sk-contract-0123456789"
"""The key that the upstreams under test are to be given."""
REQUEST = b'{"model":"m","messages":[{"role":"user","content":"Hello."}]}'
ANSWER = b'{"id":"chatcmpl-1","object":"chat.completion","choices":[]}'
TIMEOUT_S = 10
"""How long a test waits for what it has caused before it fails."""


class FarSide(Protocol):
    """The server to which the upstream under test sends, played by a test."""

    bodies: Sequence[bytes]
    """The bodies of the requests that came so far, in order."""

    def answer(
        self, body: bytes, *, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """From now on, answer every request like this."""
        ...

    def stall(self) -> None:
        """From now on, take requests and never answer."""
        ...

    def cut(self) -> None:
        """From now on, end the connection in the middle of each answer."""
        ...

    async def wait_for_requests(self, count: int) -> None:
        """Wait until that many requests have come in all."""
        ...


class LineUpstreamContract:
    """Inherit, and give four fixtures.

    - `far_side`: a `FarSide` that has seen no request yet.
    - `upstream`: the upstream under test, which sends to `far_side` with `KEY`, takes at
      least 8 requests at the same time and waits some seconds for an answer.
    - `hasty_upstream`: the same, but it waits a fraction of a second only.
    - `lost_upstream`: the same, but it sends to where nobody listens.
    """

    async def test_a_json_object_is_a_success_and_comes_as_it_was_sent(
        self, far_side: FarSide, upstream: LineUpstream
    ) -> None:
        body = b'{ "choices" : [],\n\t"text": "\xe2\x80\xa8 \\u0041",\r\n "n": 1.0e2 }\n'
        far_side.answer(body)

        reply = await upstream.send(CHAT, REQUEST)

        assert reply.is_success
        assert reply.status_code == 200
        assert reply.body == body
        assert reply.message == ""

    async def test_the_body_goes_out_byte_for_byte(
        self, far_side: FarSide, upstream: LineUpstream
    ) -> None:
        body = b'{ "model":"m",  "a":1.0,"a":2, "text":"\xc3\xa9\\u00e9\xe2\x80\xa8" } '
        far_side.answer(ANSWER)

        await upstream.send(CHAT, body)

        assert list(far_side.bodies) == [body]

    @pytest.mark.parametrize("status", [300, 302, 400, 404, 429, 500, 503])
    async def test_another_status_is_a_reply_with_its_body_as_it_came(
        self, status: int, far_side: FarSide, upstream: LineUpstream
    ) -> None:
        far_side.answer(b"<h1>\xff\x00 no</h1>\r\n", status=status)

        reply = await upstream.send(CHAT, REQUEST)

        assert (reply.status_code, reply.failure) == (status, None)
        assert reply.body == b"<h1>\xff\x00 no</h1>\r\n"
        assert not reply.is_success

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"null",
            b"[]",
            b'"text"',
            b"<html></html>",
            b'{"choices":[',
            b"{}{}",
            b'{"choices":NaN}',
            b'{"text":"\xff"}',
            b'{"text":"\x00"}',
            b"[" * 100_000,
            b'{"a":' * 100_000,
        ],
        ids=lambda body: repr(body[:16]),
    )
    async def test_a_2xx_body_that_is_not_one_json_object_is_invalid(
        self, body: bytes, far_side: FarSide, upstream: LineUpstream
    ) -> None:
        far_side.answer(body)

        reply = await upstream.send(CHAT, REQUEST)

        assert reply.failure is Failure.INVALID
        assert reply.status_code == 200
        assert not reply.is_success
        assert reply.message

    @pytest.mark.parametrize(
        "usage",
        [
            {
                "prompt_tokens": 7,
                "completion_tokens": 5,
                "total_tokens": 12,
                "prompt_tokens_details": {"cached_tokens": 3},
                "completion_tokens_details": {"reasoning_tokens": 2},
            },
            {
                "input_tokens": 7,
                "output_tokens": 5,
                "total_tokens": 12,
                "input_tokens_details": {"cached_tokens": 3},
                "output_tokens_details": {"reasoning_tokens": 2},
            },
        ],
        ids=["chat", "responses"],
    )
    async def test_tokens_are_read_from_the_answer(
        self, usage: dict[str, Any], far_side: FarSide, upstream: LineUpstream
    ) -> None:
        far_side.answer(json.dumps({"choices": [], "usage": usage}).encode())

        reply = await upstream.send(CHAT, REQUEST)

        assert (reply.input_tokens, reply.cached_tokens) == (7, 3)
        assert (reply.output_tokens, reply.reasoning_tokens) == (5, 2)
        assert reply.total_tokens == 12

    @pytest.mark.parametrize(
        "usage",
        [
            b"null",
            b"[]",
            b'"many"',
            b"{}",
            b'{"prompt_tokens":null,"total_tokens":-1}',
            b'{"prompt_tokens":"7","total_tokens":1e999}',
            b'{"prompt_tokens":%b}' % (b"9" * 5000),
            b'{"prompt_tokens":18446744073709551616,"completion_tokens":true}',
            b'{"prompt_tokens_details":[],"input_tokens_details":{"cached_tokens":{}}}',
        ],
        ids=lambda usage: repr(usage[:40]),
    )
    async def test_tokens_that_make_no_sense_count_as_0(
        self, usage: bytes, far_side: FarSide, upstream: LineUpstream
    ) -> None:
        far_side.answer(b'{"choices":[],"usage":%b}' % usage)

        reply = await upstream.send(CHAT, REQUEST)

        assert reply.is_success
        assert (reply.input_tokens, reply.cached_tokens, reply.total_tokens) == (0, 0, 0)
        assert (reply.output_tokens, reply.reasoning_tokens) == (0, 0)

    @pytest.mark.parametrize("status", [200, 500])
    async def test_the_request_id_is_the_upstreams_own(
        self, status: int, far_side: FarSide, upstream: LineUpstream
    ) -> None:
        far_side.answer(ANSWER, status=status, headers={"X-Request-Id": "req_7"})

        reply = await upstream.send(CHAT, REQUEST)

        assert reply.request_id == "req_7"

    async def test_without_a_request_id_there_is_none(
        self, far_side: FarSide, upstream: LineUpstream
    ) -> None:
        far_side.answer(ANSWER)

        assert (await upstream.send(CHAT, REQUEST)).request_id is None

    async def test_the_wait_that_the_upstream_asks_for_is_told(
        self, far_side: FarSide, upstream: LineUpstream
    ) -> None:
        far_side.answer(b"{}", status=429, headers={"Retry-After": "7"})

        assert (await upstream.send(CHAT, REQUEST)).retry_after_s == 7

    async def test_where_nobody_listens_the_upstream_is_unreachable(
        self, lost_upstream: LineUpstream
    ) -> None:
        reply = await lost_upstream.send(CHAT, REQUEST)

        assert reply.failure is Failure.UNREACHABLE
        assert reply.status_code is None
        assert reply.message

    async def test_an_answer_that_does_not_come_in_time_is_a_timeout(
        self, far_side: FarSide, hasty_upstream: LineUpstream
    ) -> None:
        far_side.stall()

        reply = await hasty_upstream.send(CHAT, REQUEST)

        assert reply.failure is Failure.TIMEOUT
        assert reply.status_code is None
        assert reply.message

    async def test_an_answer_that_is_cut_is_a_disconnection(
        self, far_side: FarSide, upstream: LineUpstream
    ) -> None:
        far_side.cut()

        reply = await upstream.send(CHAT, REQUEST)

        assert reply.failure is Failure.DISCONNECTED
        assert reply.status_code is None
        assert reply.message

    async def test_one_call_is_one_request_also_when_it_fails(
        self, far_side: FarSide, upstream: LineUpstream
    ) -> None:
        far_side.answer(ANSWER)
        await upstream.send(CHAT, b'{"n":1}')
        far_side.cut()
        await upstream.send(CHAT, b'{"n":2}')
        far_side.answer(ANSWER)
        await upstream.send(CHAT, b'{"n":3}')

        assert list(far_side.bodies) == [b'{"n":1}', b'{"n":2}', b'{"n":3}']

    async def test_a_cancelled_call_returns_at_once(
        self, far_side: FarSide, upstream: LineUpstream
    ) -> None:
        far_side.stall()
        call = asyncio.ensure_future(upstream.send(CHAT, REQUEST))
        async with asyncio.timeout(TIMEOUT_S):
            await far_side.wait_for_requests(1)

            call.cancel()

            with pytest.raises(asyncio.CancelledError):
                await call

    async def test_many_calls_run_at_once(
        self, far_side: FarSide, upstream: LineUpstream
    ) -> None:
        far_side.stall()
        calls = [asyncio.ensure_future(upstream.send(CHAT, REQUEST)) for _ in range(8)]

        async with asyncio.timeout(TIMEOUT_S):
            await far_side.wait_for_requests(8)

        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    @pytest.mark.parametrize("status", [200, 401])
    async def test_no_message_holds_the_key(
        self, status: int, far_side: FarSide, upstream: LineUpstream
    ) -> None:
        far_side.answer(f"<p>I do not know {KEY}</p>".encode(), status=status)

        assert KEY not in (await upstream.send(CHAT, REQUEST)).message

    async def test_the_models_are_listed_by_id(
        self, far_side: FarSide, upstream: LineUpstream
    ) -> None:
        far_side.answer(b'{"object":"list","data":[{"id":"b","object":"model"},{"id":"a"}]}')

        assert await upstream.list_models() == ["b", "a"]

    @pytest.mark.parametrize(
        ("status", "body"),
        [(200, b"<html>"), (200, b"{}"), (200, b'{"data":[{}]}'), (401, b"{}"), (302, b"")],
    )
    async def test_an_answer_that_is_no_list_of_models_means_it_is_down(
        self, status: int, body: bytes, far_side: FarSide, upstream: LineUpstream
    ) -> None:
        far_side.answer(body, status=status)

        with pytest.raises(UpstreamDown):
            await upstream.list_models()

    async def test_an_upstream_that_is_unreachable_is_down(
        self, lost_upstream: LineUpstream
    ) -> None:
        with pytest.raises(UpstreamDown):
            await lost_upstream.list_models()

    async def test_closing_twice_is_closing_once(self, upstream: LineUpstream) -> None:
        await upstream.close()
        await upstream.close()

    async def test_closing_before_the_answer_ends_the_call(
        self, far_side: FarSide, upstream: LineUpstream
    ) -> None:
        far_side.stall()
        call = asyncio.ensure_future(upstream.send(CHAT, REQUEST))
        async with asyncio.timeout(TIMEOUT_S):
            await far_side.wait_for_requests(1)

            await upstream.close()

            assert (await call).failure is Failure.DISCONNECTED
