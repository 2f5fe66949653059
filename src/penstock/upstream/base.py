"""The contract of the places where lines are sent.

What an upstream does to a line, good or bad, is a `Reply`: `send` raises for nothing that
comes from outside. Whether to try again is decided elsewhere (`executor.retry`).
"""

from enum import StrEnum
from typing import Protocol

import msgspec


class Failure(StrEnum):
    """Why an attempt brought no answer that can be used."""

    UNREACHABLE = "unreachable"  # no connection; the upstream never saw the request
    TIMEOUT = "timeout"  # connected, but the answer was not whole in time
    DISCONNECTED = "disconnected"  # the connection ended before the answer was whole
    INVALID = "invalid"  # a 2xx answer that is not one JSON object, or any that is too long


class Reply(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one attempt at a request brought.

    Either an answer (`failure` is None) or a failure, of which `message` tells. A msgspec
    struct, because one is made for every line and it costs a fifteenth of a dataclass.
    """

    status_code: int | None = None
    """The HTTP status; None if no answer came."""
    body: bytes = b""
    """The answer's body as it came. With a 2xx status and no failure: valid UTF-8, one JSON
    object. With another status: anything."""
    request_id: str | None = None
    """The upstream's own `x-request-id`."""
    retry_after_s: float | None = None
    """How long the upstream asked to wait, in seconds."""
    failure: Failure | None = None
    message: str = ""
    """What went wrong, for a person; empty if nothing did. Never holds a key."""
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    total_tokens: int = 0

    @property
    def is_success(self) -> bool:
        """Whether the line succeeded: a 2xx answer that can be used."""
        return self.failure is None and self.status_code is not None and self.status_code < 300


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What an inference engine tells of itself, summed over its replicas and models."""

    running: int
    """Requests that it works on."""
    waiting: int
    """Requests in its queue."""
    cache_usage: float = 0.0
    """How much of the key-value cache is in use, from 0 to 1; of several the highest."""


class LineUpstream(Protocol):
    """Answers one request at a time; many calls run at once."""

    name: str
    """As the settings call it."""
    max_concurrency: int
    """How many requests it takes at the same time."""

    async def send(self, endpoint: str, body: bytes) -> Reply:
        """Send one request and wait for its answer.

        The body goes out byte for byte. A cancelled call returns at once; the upstream may
        still work on its request until it notices that nobody waits.

        Args:
            endpoint: The endpoint's path with `/v1`, such as `/v1/chat/completions`.
            body: The JSON object of the request, as it stands in the input file.
        """
        ...

    async def list_models(self) -> list[str]:
        """The IDs of the models that it serves now.

        Raises:
            UpstreamDown: It did not answer, or not with a list of models.
        """
        ...

    async def read_load(self) -> EngineLoad | None:
        """What its engine tells of itself now; None if it tells nothing."""
        ...

    async def close(self) -> None:
        """Close all connections. A second call does nothing."""
        ...
