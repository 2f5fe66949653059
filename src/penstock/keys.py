"""API keys: how they are made, kept and shown.

A key is long and random, so a plain SHA-256 of it is all that is stored: there is nothing to
guess that a slow hash would have to guard.
"""

import hashlib
import secrets

_PREFIX = "sk-penstock-"


def new_key() -> str:
    """Make a key: `sk-penstock-` and 43 random URL-safe characters, 256 bits."""
    return _PREFIX + secrets.token_urlsafe(32)


def key_digest(key: str) -> str:
    """The form in which a key is stored and looked up: its SHA-256 in hex."""
    return hashlib.sha256(key.encode()).hexdigest()


def key_hint(key: str) -> str:
    """What may be shown of a key: its first 15 and last 4 characters.

    Of a key that someone chose and that is too short to hide its middle, a quarter.
    """
    if len(key) < 32:
        return key[: len(key) // 4] + "…"
    return f"{key[:15]}…{key[-4:]}"
