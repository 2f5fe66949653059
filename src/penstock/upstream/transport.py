"""What lies between an upstream's dialect and the wire: one request, one whole answer.

`http1` is ours and fast, for plain HTTP without a proxy, which is how a server of one's own
is reached. `reqwest` does the rest: TLS, HTTP/2, proxies.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec

from penstock.upstream.base import Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportOptions:
    """How requests are sent."""

    headers: Mapping[str, str]
    """Sent with each request, beside `Host` and `Content-Length`."""
    timeout_s: float
    """How long a call may take, from connecting to the answer's last byte."""
    connect_timeout_s: float
    """How long connecting may take of that."""
    first_byte_timeout_s: float = 0.0
    """How long the answer's first byte may take, once the request is sent; 0: as long as all
    of it."""
    silence_timeout_s: float = 0.0
    """How long nothing may come of an answer that has begun; 0: as long as all of it."""
    max_body_bytes: int
    """The longest body of an answer that is read."""
    max_idle: int
    """How many connections are kept while they are not used."""


class Answer(msgspec.Struct, kw_only=True, gc=False):
    """A whole answer over HTTP. Headers that are not ASCII are taken as not there."""

    status: int
    body: bytes = b""
    is_too_long: bool = False
    """Whether it was dropped because its body is longer than allowed; then `body` is empty."""
    request_id: str | None = None
    content_type: str | None = None
    retry_after: str | None = None
    retry_after_ms: str | None = None


class TransportFailed(Exception):
    """No whole answer came.

    Args:
        message: A sentence for a person.
    """

    def __init__(self, failure: Failure, message: str) -> None:
        super().__init__(message)
        self.failure = failure
        self.message = message


def no_connection(reason: str, *, within_s: float | None = None) -> TransportFailed:
    """The upstream was not reached, and never saw the request."""
    within = "" if within_s is None else f" within {within_s:g} s"
    return TransportFailed(Failure.UNREACHABLE, f"No connection{within}: {reason}.")


def no_answer(timeout_s: float) -> TransportFailed:
    """The answer was not whole in time."""
    return TransportFailed(Failure.TIMEOUT, f"No whole answer came within {timeout_s:g} s.")


def no_first_byte(timeout_s: float) -> TransportFailed:
    """The answer did not begin in time."""
    return TransportFailed(Failure.TIMEOUT, f"No answer began within {timeout_s:g} s.")


def gone_silent(timeout_s: float) -> TransportFailed:
    """The answer began, and then nothing came for too long."""
    return TransportFailed(
        Failure.TIMEOUT, f"Nothing more of the answer came within {timeout_s:g} s."
    )


def cut_off(reason: str) -> TransportFailed:
    """The connection ended, or what came over it was not HTTP."""
    return TransportFailed(
        Failure.DISCONNECTED, f"The connection ended before the answer was whole: {reason}."
    )


class Transport(Protocol):
    """Sends requests to one origin; many at once."""

    async def post(self, path: str, body: bytes) -> Answer:
        """Send a JSON body and wait for the whole answer.

        Args:
            path: The path on the origin, from the root.

        Raises:
            TransportFailed: There is none.
        """
        ...

    async def get(self, path: str) -> Answer:
        """Ask for what lies at a path. As `post`."""
        ...

    async def close(self) -> None:
        """Close all connections. A second call does nothing."""
        ...
