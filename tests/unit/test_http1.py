"""What the transport of our own does beyond what `test_openai_http` asks of each."""

import asyncio
from contextlib import suppress

import pytest

from penstock.upstream.base import Failure
from penstock.upstream.http1 import Connection, Http1Transport
from penstock.upstream.transport import TransportFailed, TransportOptions
from tests.upstreams import Action, ScriptedUpstream, Then, answer, raw, stall

PATH = "/v1/chat/completions"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def connect(
    port: int,
    *,
    host: str = "127.0.0.1",
    max_idle: int = 64,
    max_body_bytes: int = 1 << 20,
    timeout_s: float = 5,
) -> Http1Transport:
    options = TransportOptions(
        headers={"X-One": "1"},
        timeout_s=timeout_s,
        connect_timeout_s=5,
        max_body_bytes=max_body_bytes,
        max_idle=max_idle,
    )
    return Http1Transport(host=host, port=port, options=options)


async def bodies(server: ScriptedUpstream, count: int = 2, **options: int) -> list[bytes]:
    """The bodies of answers to requests that are sent one after another."""
    transport = connect(server.port, **options)
    found = [(await transport.post(PATH, b"{}")).body for _ in range(count)]
    await transport.close()
    return found


async def test_a_call_that_is_cancelled_ends_its_connection_and_no_other() -> None:
    go = asyncio.Event()

    def behave(path: str, headers: dict[str, str], body: bytes, nth: int) -> Action:
        return stall() if body == b"{}" else Action(pieces=answer({}).pieces, until=go)

    async with ScriptedUpstream(behave) as server:
        transport = connect(server.port)
        other = asyncio.ensure_future(transport.post(PATH, b"[]"))
        call = asyncio.ensure_future(transport.post(PATH, b"{}"))
        await server.wait_for_requests(2)

        call.cancel()

        await server.wait_for_drops(1)
        with pytest.raises(asyncio.CancelledError):
            await call
        go.set()
        assert (await other).body == b"{}"
        await transport.close()


async def test_hints_that_come_before_the_answer_are_passed_over() -> None:
    early = b"HTTP/1.1 103 Early Hints\r\nX-Request-Id: no\r\n\r\n"
    late = b"HTTP/1.1 201 Created\r\nX-Request-Id: yes\r\nContent-Length: 2\r\n\r\n{}"
    for pieces in ((early + late,), (early, late), (early, early + late)):
        async with ScriptedUpstream(lambda *_: raw(*pieces, then=Then.KEEP)) as server:  # noqa: B023
            transport = connect(server.port)
            for _ in range(2):
                reply = await transport.post(PATH, b"{}")
                assert (reply.status, reply.request_id, reply.body) == (201, "yes", b"{}")
            await transport.close()
        assert server.connections == 1


@pytest.mark.parametrize(
    "pieces",
    [
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}",),
        (OK + b"more",),
        (OK + OK,),
        (OK, OK),
    ],
    ids=["close", "1.0", "more", "two answers", "two answers apart"],
)
async def test_a_connection_that_cannot_be_trusted_is_not_used_again(
    pieces: tuple[bytes, ...],
) -> None:
    async with ScriptedUpstream(lambda *_: raw(*pieces, then=Then.KEEP)) as server:
        assert await bodies(server) == [b"{}", b"{}"]

    assert server.connections == 2


async def test_a_connection_that_the_other_side_has_closed_is_not_used_again() -> None:
    async with ScriptedUpstream(lambda *_: raw(OK, then=Then.CLOSE)) as server:
        transport = connect(server.port)
        await transport.post(PATH, b"{}")
        await asyncio.sleep(0.05)
        assert (await transport.post(PATH, b"{}")).status == 200
        await transport.close()


async def test_what_comes_unasked_ends_the_connection() -> None:
    async with ScriptedUpstream(lambda *_: raw(OK, then=Then.KEEP)) as server:
        transport = connect(server.port)
        await transport.post(PATH, b"{}")
    # It is closed on the other side; nothing that comes now belongs to a call.
    with pytest.raises(TransportFailed):
        await transport.post(PATH, b"{}")
    await transport.close()


async def test_only_so_many_connections_are_kept() -> None:
    go = asyncio.Event()
    held = Action(pieces=(OK,), until=go)
    async with ScriptedUpstream(lambda *_: held) as server:
        transport = connect(server.port, max_idle=2)
        calls = [asyncio.ensure_future(transport.post(PATH, b"{}")) for _ in range(5)]
        await server.wait_for_requests(5)
        go.set()
        await asyncio.gather(*calls)

        await asyncio.gather(*(transport.post(PATH, b"{}") for _ in range(3)))
        await transport.close()

    assert server.connections == 6


async def test_an_answer_that_comes_before_the_request_is_out_ends_the_connection() -> None:
    ended: list[bool] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\n{}")
        await writer.drain()
        await asyncio.sleep(0.1)  # by then it is known there that the request is not out
        with suppress(ConnectionError):
            while await reader.read(1 << 20):
                continue
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        ended.append(True)

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        transport = connect(server.sockets[0].getsockname()[1])
        for count in (1, 2):
            assert (await transport.post(PATH, b"x" * 30_000_000)).status == 413
            async with asyncio.timeout(5):
                while len(ended) < count:
                    await asyncio.sleep(0.01)
        await transport.close()


async def test_an_endless_head_is_given_up() -> None:
    head = b"HTTP/1.1 200 OK\r\n" + b"X-More: %b\r\n" % (b"x" * 1000) * 200
    async with ScriptedUpstream(lambda *_: raw(head, then=Then.STALL)) as server:
        transport = connect(server.port)
        with pytest.raises(TransportFailed) as caught:
            await transport.post(PATH, b"{}")
        await transport.close()

    assert caught.value.failure is Failure.DISCONNECTED
    assert "its head is longer than 65536 bytes" in caught.value.message


async def test_what_stands_behind_a_body_changes_nothing() -> None:
    trailing = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Request-Id\r\n\r\n"
        b"2\r\n{}\r\n0\r\nX-Request-Id: late\r\n\r\n"
    )
    async with ScriptedUpstream(lambda *_: raw(trailing, then=Then.KEEP)) as server:
        transport = connect(server.port)
        reply = await transport.post(PATH, b"{}")
        await transport.close()

    assert (reply.body, reply.request_id) == (b"{}", None)


async def test_byte_by_byte_makes_no_difference() -> None:
    pieces = [OK[n : n + 1] for n in range(len(OK))]
    async with ScriptedUpstream(lambda *_: raw(*pieces, then=Then.KEEP)) as server:
        assert await bodies(server, 3) == [b"{}"] * 3

    assert server.connections == 1


async def test_an_ipv6_host_is_named_in_brackets() -> None:
    seen: list[bytes] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(OK)
        await writer.drain()
        writer.close()

    try:
        server = await asyncio.start_server(take, "::1", 0)
    except OSError:
        pytest.skip("this machine has no IPv6")
    async with server:
        port = server.sockets[0].getsockname()[1]
        transport = connect(port, host="::1")
        await transport.get("/v1/models")
        await transport.close()

    head = f"GET /v1/models HTTP/1.1\r\nHost: [::1]:{port}\r\nX-One: 1\r\n\r\n"
    assert seen == [head.encode()]


async def test_a_thousand_calls_at_once_each_get_their_own_answer() -> None:
    def echo(path: str, headers: dict[str, str], body: bytes, nth: int) -> Action:
        return answer(body)

    async with ScriptedUpstream(echo) as server:
        transport = connect(server.port)
        sent = [b'{"n":%d}' % number for number in range(1000)]
        replies = await asyncio.gather(*(transport.post(PATH, each) for each in sent))
        await transport.close()

    assert [reply.body for reply in replies] == sent


async def test_a_call_on_a_connection_that_has_just_become_free_has_its_time_out() -> None:
    def behave(path: str, headers: dict[str, str], body: bytes, nth: int) -> Action:
        return stall() if body == b"[]" else answer({})

    async with ScriptedUpstream(behave) as server:
        transport = connect(server.port, timeout_s=0.3)
        release = transport.release
        later: list[asyncio.Future[object]] = []

        def release_and_ask(connection: Connection) -> None:
            release(connection)
            if not later:  # which comes before the first caller goes on
                later.append(asyncio.ensure_future(transport.post(PATH, b"[]")))

        transport.release = release_and_ask
        await transport.post(PATH, b"{}")
        async with asyncio.timeout(3):
            with pytest.raises(TransportFailed, match=r"No whole answer came within 0\.3 s"):
                await later[0]
        await transport.close()

    assert server.connections == 1
