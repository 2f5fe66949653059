"""Events over HTTP: what is sent, what counts as taken, and where nothing is sent to."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable

import pytest
from openai import OpenAI

from penstock import __version__
from penstock.signing import new_secret, read_secret
from penstock.upstream.webhook import WebhookReply, WebhookTarget
from penstock.upstream.webhook_http import HttpWebhookSender, Resolve, SystemNames
from tests.upstreams import (
    Action,
    ScriptedUpstream,
    answer,
    cut,
    cut_in_headers,
    empty,
    fail,
    raw,
    redirect,
    stall,
    stall_in_body,
)

SECRET, OLD_SECRET = new_secret(), new_secret()
BODY = json.dumps(
    {
        "id": "evt_1",
        "object": "event",
        "created_at": 1_750_000_000,
        "type": "batch.completed",
        "data": {"id": "batch_1", "job_name": "Zürich"},
    },
    ensure_ascii=False,
)
PUBLIC = "8.8.8.8"


def target(url: str, *, allow: bool = True, secrets: tuple[str, ...] = (SECRET,)):
    keys = tuple(read_secret(secret) or b"" for secret in secrets)
    return WebhookTarget(url=url, keys=keys, allow_private_addresses=allow)


def names(**addresses: list[str]) -> Resolve:
    """A world in which there are these names, `x` standing for `x.test`."""

    async def resolve(host: str) -> list[str]:
        return addresses[host.removesuffix(".test")]

    return resolve


async def send(
    url: str,
    *,
    allow: bool = True,
    resolve: Resolve | None = None,
    timeout_s: float = 10,
    secrets: tuple[str, ...] = (SECRET,),
) -> WebhookReply:
    sender = HttpWebhookSender(timeout_s=timeout_s, resolve=resolve)
    reply = await sender.send(
        target(url, allow=allow, secrets=secrets), message_id="wh_1", body=BODY
    )
    await sender.close()
    return reply


async def send_to(action: Action, *, timeout_s: float = 10) -> WebhookReply:
    """Send an event to a webhook that does `action`, and see that it came once at most."""
    async with ScriptedUpstream(lambda *_: action) as server:
        reply = await send(f"http://127.0.0.1:{server.port}/hook", timeout_s=timeout_s)
        assert len(server.requests) == 1
    return reply


# What is sent


async def test_the_event_is_posted_as_it_is_and_signed() -> None:
    async with ScriptedUpstream(lambda *_: empty()) as server:
        reply = await send(f"http://127.0.0.1:{server.port}/hook?token=1")

    assert reply == WebhookReply(status_code=200)
    [request] = server.requests
    assert (request.method, request.path) == ("POST", "/hook?token=1")
    assert request.body == BODY.encode()
    assert request.headers["content-type"] == "application/json"
    assert request.headers["user-agent"] == f"Penstock/{__version__}"
    assert request.headers["webhook-id"] == "wh_1"
    assert abs(int(request.headers["webhook-timestamp"]) - time.time()) < 10
    with OpenAI(api_key="-", base_url="http://127.0.0.1:9") as client:
        event = client.webhooks.unwrap(request.body, request.headers, secret=SECRET)
    assert event.type == "batch.completed"
    assert event.data.id == "batch_1"


async def test_it_is_signed_with_the_previous_secret_too() -> None:
    async with ScriptedUpstream(lambda *_: empty()) as server:
        url = f"http://127.0.0.1:{server.port}/hook"
        await send(url, secrets=(SECRET, OLD_SECRET))

    [request] = server.requests
    with OpenAI(api_key="-", base_url="http://127.0.0.1:9") as client:
        for secret in (SECRET, OLD_SECRET):
            client.webhooks.verify_signature(request.body, request.headers, secret=secret)


# What counts as taken


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
async def test_any_2xx_takes_the_event(status: int) -> None:
    action = raw(f"HTTP/1.1 {status} Whatever\r\nContent-Length: 0\r\n\r\n".encode())

    assert await send_to(action) == WebhookReply(status_code=status)


async def test_a_2xx_takes_the_event_whatever_follows() -> None:
    assert await send_to(stall_in_body()) == WebhookReply(status_code=200)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_a_failure_and_is_not_followed(status: int) -> None:
    async with ScriptedUpstream(lambda *_: redirect("/elsewhere", status)) as server:
        reply = await send(f"http://127.0.0.1:{server.port}/hook")

    assert [request.path for request in server.requests] == ["/hook"]
    assert reply.status_code == status
    assert reply.error == (
        f"It answered with HTTP status {status}, a redirect, which is not followed: set its "
        "url to where it leads."
    )


@pytest.mark.parametrize("status", [400, 401, 404, 410, 429, 500, 503])
async def test_any_other_answer_is_a_failure(status: int) -> None:
    reply = await send_to(answer(b"Sorry,\x1b[31m\r\n not now", status=status))

    assert reply.status_code == status
    assert reply.error == f"It answered with HTTP status {status}: Sorry, [31m not now."


async def test_an_answer_without_an_end_is_left() -> None:
    piece = b"3e8\r\n" + b"x" * 1000 + b"\r\n"
    head = b"HTTP/1.1 500 Whatever\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with ScriptedUpstream(lambda *_: raw(head, *[piece] * 50_000)) as server:
        reply = await send(f"http://127.0.0.1:{server.port}/hook")
        await server.wait_for_drops(1)

    assert reply.status_code == 500
    assert reply.error == f"It answered with HTTP status 500: {'x' * 200}…."


async def test_a_webhook_that_says_nothing_has_15_s() -> None:
    assert HttpWebhookSender()._timeout_s == 15

    reply = await send_to(stall(), timeout_s=0.2)

    assert reply == WebhookReply(error="No answer came within 0.2 s.")


@pytest.mark.parametrize("action", [cut(), cut_in_headers(), raw(b"SSH-2.0-OpenSSH\r\n\r\n")])
async def test_no_answer_is_a_failure(action: Action) -> None:
    reply = await send_to(action)

    assert reply.status_code is None
    assert reply.error is not None
    assert reply.error.startswith("The connection ended before an answer came: ")


async def test_a_refused_connection_is_a_failure() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]

        reply = await send(f"http://127.0.0.1:{port}/hook")

    assert reply.status_code is None
    assert reply.error is not None
    assert reply.error.startswith("No connection to 127.0.0.1: Connection refused")


async def test_a_webhook_without_tls_is_no_https() -> None:
    async with await asyncio.start_server(
        lambda _, writer: writer.close(), "127.0.0.1", 0
    ) as server:
        port = server.sockets[0].getsockname()[1]
        reply = await send(f"https://127.0.0.1:{port}/hook")

    assert reply.status_code is None
    assert reply.error is not None


async def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ScriptedUpstream() as proxy, ScriptedUpstream(lambda *_: empty()) as server:
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        resolve = names(hook=["127.0.0.1"])

        reply = await send(f"http://hook.test:{server.port}/hook", resolve=resolve)

    assert reply.error is None
    assert proxy.connections == 0


# Where nothing is sent to


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.1", "0x7f000001", "2130706433", "[::ffff:127.0.0.1]", "0.0.0.0"]
)
async def test_a_private_address_gets_nothing(host: str) -> None:
    async with ScriptedUpstream() as server:
        reply = await send(f"http://{host}:{server.port}/hook", allow=False)

    assert server.connections == 0
    assert reply.status_code is None
    assert reply.error is not None
    assert "an address that is not public; nothing was sent." in reply.error


async def test_a_name_that_resolves_to_loopback_gets_nothing() -> None:
    async with ScriptedUpstream() as server:
        reply = await send(f"http://localhost:{server.port}/hook", allow=False)

    assert server.connections == 0
    assert reply.error is not None
    assert reply.error.startswith("localhost resolves to ")


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], [PUBLIC, "127.0.0.1"], ["127.0.0.1", PUBLIC], ["::ffff:127.0.0.1"]],
)
async def test_a_name_of_which_any_address_is_private_gets_nothing(
    addresses: list[str],
) -> None:
    async with ScriptedUpstream() as server:
        url = f"http://hook.test:{server.port}/hook"
        reply = await send(url, allow=False, resolve=names(hook=addresses))

    assert server.connections == 0
    assert reply.error is not None
    assert reply.error.startswith("hook.test resolves to ")


async def test_the_connection_goes_to_the_address_that_was_looked_at() -> None:
    """`localhost` means 127.0.0.1 to the system, whatever was looked at."""
    async with (
        ScriptedUpstream(lambda *_: empty(), host="127.0.0.2") as looked_at,
        ScriptedUpstream() as other,
    ):
        url = f"http://localhost:{looked_at.port}/hook"
        away = f"http://localhost:{other.port}/hook"

        async def resolve(host: str) -> list[str]:
            return ["127.0.0.2"]

        assert (await send(url, resolve=resolve)).error is None
        assert (await send(away, resolve=resolve)).error is not None

    assert looked_at.requests[0].headers["host"] == f"localhost:{looked_at.port}"
    assert other.connections == 0


async def test_a_name_is_looked_up_at_each_attempt() -> None:
    answers = [["127.0.0.1"], [PUBLIC, "127.0.0.1"]]

    async def rebinding(host: str) -> list[str]:
        return answers.pop()

    async with ScriptedUpstream() as server:
        url = f"http://hook.test:{server.port}/hook"
        for _ in range(2):
            reply = await send(url, allow=False, resolve=rebinding)
            assert reply.error is not None
            assert "resolves to 127.0.0.1" in reply.error

    assert answers == []
    assert server.connections == 0


# Names and addresses


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="there is no IPv6 here")


@needs_ipv6
async def test_a_webhook_may_have_an_ipv6_address() -> None:
    async with ScriptedUpstream(lambda *_: empty(), host="::1") as server:
        assert (await send(f"http://[::1]:{server.port}/hook")).error is None
        url = f"http://hook.test:{server.port}/hook"
        assert (await send(url, resolve=names(hook=["::1"]))).error is None
        refused = await send(f"http://[::1]:{server.port}/hook", allow=False)

    assert refused.error is not None
    assert len(server.requests) == 2


async def test_the_next_address_is_tried_if_one_takes_no_connection() -> None:
    async with ScriptedUpstream(lambda *_: fail(500)) as server:
        resolve = names(hook=["127.0.0.9", "127.0.0.1", "127.0.0.1"])
        reply = await send(f"http://hook.test:{server.port}/hook", resolve=resolve)

    assert reply.status_code == 500
    assert len(server.requests) == 1


async def test_a_name_that_is_not_there_is_a_failure() -> None:
    reply = await send("http://hook.invalid/hook")

    assert reply.error is not None
    assert reply.error.startswith("The name hook.invalid cannot be resolved: ")


async def test_a_name_that_cannot_be_one_is_a_failure() -> None:
    reply = await send(f"http://{'a' * 64}.example/hook")

    assert reply.error is not None
    assert "cannot be resolved" in reply.error


async def test_a_look_up_that_takes_too_long_is_a_failure() -> None:
    async def never(host: str) -> list[str]:
        await asyncio.Event().wait()
        return []

    reply = await send("http://hook.test/hook", resolve=never, timeout_s=0.05)

    assert reply == WebhookReply(error="No answer came within 0.05 s.")


async def test_a_name_is_looked_up_once_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that does not answer holds one thread for each name, not for each event."""
    asked: list[str] = []
    go_on = threading.Event()
    place = (socket.AF_INET, socket.SOCK_STREAM, 6, "", (PUBLIC, 0))

    def getaddrinfo(host: str, *_: object, **__: object) -> list[object]:
        asked.append(host)
        assert go_on.wait(10)
        return [place, place]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    system = SystemNames()
    waiting = [asyncio.ensure_future(system.resolve("a.test")) for _ in range(5)]
    other = asyncio.ensure_future(system.resolve("b.test"))
    await until(lambda: len(asked) == 2)
    waiting.pop().cancel()
    go_on.set()

    assert await asyncio.gather(*waiting, other) == [[PUBLIC]] * 5
    assert sorted(asked) == ["a.test", "b.test"]
    assert await system.resolve("a.test") == [PUBLIC]
    assert len(asked) == 3


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():
            await asyncio.sleep(0.01)
