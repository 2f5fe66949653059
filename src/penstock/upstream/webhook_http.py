"""Webhooks over HTTP, on pyreqwest.

The URL of a webhook must not become a way into the network that Penstock runs in. So the name
of its host is resolved here, at each attempt; all its addresses are looked at; and the
connection is made to one of these addresses and no other, whatever the name means a moment
later. No redirect is followed and no proxy is used, as either would choose another address.

pyreqwest takes such an address when a client is made, so each attempt has a client of its own,
which takes about 5 ms.
"""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from ipaddress import ip_address

from pyreqwest.client import Client, ClientBuilder
from pyreqwest.exceptions import PyreqwestError, RequestError, RequestTimeoutError
from pyreqwest.http import Url
from pyreqwest.response import Response

from penstock import __version__
from penstock.addresses import is_private
from penstock.signing import sign
from penstock.upstream.webhook import WebhookReply, WebhookTarget

Resolve = Callable[[str], Awaitable[list[str]]]
"""Finds the addresses of a host name. Raises `OSError` if it has none."""

TIMEOUT_S = 15.0
"""How long an attempt may take, from the look-up of the name to the head of the answer."""
_CONNECT_S = 5.0
_MOST_ADDRESSES = 3
"""How many of a name's addresses are tried while none takes a connection."""
_ANSWER_BYTES = 4096
_ANSWER_S = 1.0
"""How much of an answer is read, and for how long: its status says it all."""
_QUOTE_CHARACTERS = 200
# See reqwest.py: the client's thread lets go of its last call a moment after `close`.
_EXIT_PAUSE_S = 0.025


class HttpWebhookSender:
    """Sends each event as one POST over a connection of its own.

    Args:
        timeout_s: How long an attempt may take.
        resolve: How names are looked up; None asks the system.
    """

    def __init__(self, *, timeout_s: float = TIMEOUT_S, resolve: Resolve | None = None) -> None:
        self._timeout_s = timeout_s
        self._resolve = resolve or SystemNames().resolve
        self._has_called = False

    async def send(self, target: WebhookTarget, *, message_id: str, body: str) -> WebhookReply:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._send(target, message_id, body)
        except TimeoutError:
            return _failure(f"No answer came within {self._timeout_s:g} s.")

    async def close(self) -> None:
        """Let the last attempts go."""
        if self._has_called:
            await asyncio.sleep(_EXIT_PAUSE_S)

    async def _send(self, target: WebhookTarget, message_id: str, body: str) -> WebhookReply:
        try:
            url = Url(target.url)
        except ValueError:
            return _failure("Its url is not a URL.")
        host = (url.host_str or "").strip("[]")
        try:
            addresses = [host] if _is_address(host) else await self._resolve(host)
        except (OSError, UnicodeError) as error:
            return _failure(f"The name {host} cannot be resolved: {_reason(error)}.")
        if not addresses:
            return _failure(f"The name {host} has no address.")
        private = [address for address in addresses if is_private(address)]
        if private and not target.allow_private_addresses:
            has = "is" if private[0] == host else f"resolves to {private[0]},"
            return _failure(
                f"{host} {has} an address that is not public; nothing was sent. Set "
                "allow_private_addresses to true for this webhook if that is meant."
            )
        reply = _failure("No connection.")
        for address in addresses[:_MOST_ADDRESSES]:
            is_sent, reply = await self._post(url, address, target, message_id, body)
            if is_sent:
                break
        return reply

    async def _post(
        self, url: Url, address: str, target: WebhookTarget, message_id: str, body: str
    ) -> tuple[bool, WebhookReply]:
        """One attempt at one address.

        Returns:
            Whether a connection was made, and what came of it.
        """
        headers = sign(target.keys, message_id=message_id, at=int(time.time()), body=body)
        try:
            client = self._client(url, address)
            request = (
                client.post(url)
                .headers(headers)
                .body_bytes(body.encode())
                .streamed_read_buffer_limit(0)  # else the status is not told before the body
                .build_streamed()
            )
        except (PyreqwestError, ValueError) as error:
            return False, _failure(f"Nothing can be sent to {address}: {error}.")
        self._has_called = True
        try:
            async with request as response:
                return True, await _read(response)
        except RequestError as error:
            return _failed(error, address)
        finally:
            await client.close()

    def _client(self, url: Url, address: str) -> Client:
        builder = (
            ClientBuilder()
            .user_agent(f"Penstock/{__version__}")
            .default_headers({"content-type": "application/json"})
            .timeout(timedelta(seconds=self._timeout_s))
            .connect_timeout(timedelta(seconds=_CONNECT_S))
            .follow_redirects(False)
            .referer(False)
            .no_proxy()
            .gzip(False)
            .brotli(False)
            .zstd(False)
            .deflate(False)
        )
        host = url.host_str or ""
        if not _is_address(host.strip("[]")):
            builder = builder.resolve(host, address, url.port_or_known_default or 0)
        return builder.build()


class SystemNames:
    """Asks the system for the addresses of names.

    A name that nobody answers for takes the system a long time. Each look-up therefore has a
    thread of its own, which nothing else and no exit waits for, and there is never more than
    one for the same name.
    """

    def __init__(self) -> None:
        self._asking: dict[str, asyncio.Future[list[str]]] = {}

    async def resolve(self, host: str) -> list[str]:
        """The addresses of a host name, in the order in which to try them.

        Raises:
            OSError: It has none.
            UnicodeError: It cannot be a name.
        """
        answer = self._asking.get(host)
        if answer is None:
            answer = self._asking[host] = self._ask(host)
        return await asyncio.shield(answer)

    def _ask(self, host: str) -> asyncio.Future[list[str]]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[str]] = loop.create_future()

        def tell(found: list[str] | OSError | UnicodeError) -> None:
            self._asking.pop(host, None)
            if isinstance(found, list):
                answer.set_result(found)
            else:
                answer.set_exception(found)
                answer.exception()  # whoever asked may have gone

        def ask() -> None:
            try:
                places = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
                found: list[str] | OSError | UnicodeError = list(
                    dict.fromkeys(str(place[4][0]) for place in places)
                )
            except (OSError, UnicodeError) as error:
                found = error
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(tell, found)

        threading.Thread(target=ask, name=f"resolve {host}", daemon=True).start()
        return answer


async def _read(response: Response) -> WebhookReply:
    status = response.status
    text = b""
    with contextlib.suppress(RequestError, TimeoutError):
        async with asyncio.timeout(_ANSWER_S):
            received = await response.body_reader.read(_ANSWER_BYTES)
            text = b"" if received is None else received.to_bytes()
    if 200 <= status < 300:
        return WebhookReply(status_code=status)
    if 300 <= status < 400:
        what = "a redirect, which is not followed: set its url to where it leads"
        return _failure(f"It answered with HTTP status {status}, {what}.", status)
    return _failure(f"It answered with HTTP status {status}{_quoted(text)}.", status)


def _failed(error: RequestError, address: str) -> tuple[bool, WebhookReply]:
    causes = [cause["message"] for cause in error.details.get("causes") or ()]
    reason = causes[-1] if causes else error.message
    is_timeout = isinstance(error, RequestTimeoutError)
    if "client error (Connect)" in causes:
        within = f" within {_CONNECT_S:g} s" if is_timeout else ""
        return False, _failure(f"No connection to {address}{within}: {reason}.")
    if is_timeout:
        return True, _failure("No answer came in time.")
    return True, _failure(f"The connection ended before an answer came: {reason}.")


def _failure(message: str, status: int | None = None) -> WebhookReply:
    return WebhookReply(status_code=status, error=message)


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _reason(error: OSError | UnicodeError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _quoted(text: bytes) -> str:
    """What an answer says, to follow its status; empty if it says nothing."""
    shown = "".join(c if c.isprintable() else " " for c in text.decode(errors="replace"))
    shown = " ".join(shown.split())
    if len(shown) > _QUOTE_CHARACTERS:
        shown = shown[:_QUOTE_CHARACTERS] + "…"
    return f": {shown}" if shown else ""
