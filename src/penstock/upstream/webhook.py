"""The contract of whoever sends events to webhooks."""

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookTarget:
    """Where events are sent, and how."""

    url: str
    keys: tuple[bytes, ...] = field(repr=False)
    """Each event is signed with each of them, in this order."""
    allow_private_addresses: bool = False
    """Whether its host may have an address of a network of one's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookReply:
    """What one attempt at sending an event brought."""

    status_code: int | None = None
    """The HTTP status; None if there was no answer."""
    error: str | None = None
    """Why the webhook has not taken the event, in a sentence; None: it has."""


class WebhookSender(Protocol):
    """Sends events."""

    async def send(self, target: WebhookTarget, *, message_id: str, body: str) -> WebhookReply:
        """Make one attempt, stamped and signed now. Never raises for what comes from outside.

        Args:
            message_id: The same for each attempt at an event.
            body: JSON.
        """
        ...
