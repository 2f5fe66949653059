"""API keys."""

import hashlib

import pytest

from penstock.keys import key_digest, key_hint, new_key


def test_a_new_key_has_43_random_characters() -> None:
    first, second = new_key(), new_key()

    assert first != second
    assert first.startswith("sk-penstock-")
    assert len(first) == len("sk-penstock-") + 43


def test_a_digest_is_the_sha256_of_the_key() -> None:
    assert key_digest("abc") == hashlib.sha256(b"abc").hexdigest()


def test_a_hint_shows_both_ends() -> None:
    key = new_key()

    assert key_hint(key) == f"{key[:15]}…{key[-4:]}"


@pytest.mark.parametrize("key", ["sk-alpha-0123456", "short", "x"])
def test_a_hint_of_a_short_key_hides_most_of_it(key: str) -> None:
    assert len(key_hint(key).rstrip("…")) <= len(key) / 4
