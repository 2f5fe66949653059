"""Secrets of webhooks and the signatures made with them, as Standard Webhooks has them. Pure.

Here alone is the library spoken to. It would take any text for base64, so a secret is read
here and handed over as bytes.
"""

import base64
import binascii
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime

SECRET_PREFIX = "whsec_"  # noqa: S105  (what a secret begins with)
_FEWEST = 24
"""Bytes after the prefix, or characters without it; OpenAI's Go client asks for as many."""
_NEW_BYTES = 32


def new_secret() -> str:
    """Make a secret: `whsec_` and 32 random bytes in base64."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(_NEW_BYTES)).decode()


def read_secret(secret: str) -> bytes | None:
    """The key that a secret stands for.

    Returns:
        What stands after `whsec_`, decoded, or without that prefix the text itself in UTF-8.
        None if it is no secret: too short, not printable, or not base64 in its one canonical
        form, which some clients insist on.
    """
    if secret.startswith(SECRET_PREFIX):
        text = secret.removeprefix(SECRET_PREFIX)
        try:
            key = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            return None
        is_canonical = base64.b64encode(key).decode() == text
        return key if is_canonical and len(key) >= _FEWEST else None
    is_good = len(secret) >= _FEWEST and secret.isprintable()
    return secret.encode() if is_good else None


def sign(keys: Sequence[bytes], *, message_id: str, at: int, body: str) -> dict[str, str]:
    """The headers that prove where a message comes from.

    Args:
        keys: One signature is made with each; a receiver takes any that it knows.
        message_id: The same for each attempt at a message.
        at: When this attempt is made, in Unix seconds. Receivers refuse what is older than
            5 minutes.
        body: What is sent, to the byte, once encoded in UTF-8.
    """
    from standardwebhooks.webhooks import Webhook  # noqa: PLC0415  (keeps the start short)

    moment = datetime.fromtimestamp(at, UTC)
    signatures = [Webhook(key).sign(message_id, moment, body) for key in keys]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(at),
        "webhook-signature": " ".join(signatures),
    }
