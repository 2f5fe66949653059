"""Secrets of webhooks, and signatures as receivers check them."""

import base64

import pytest
from openai import InvalidWebhookSignatureError, OpenAI
from openai.types.webhooks import BatchCompletedWebhookEvent

from penstock.signing import new_secret, read_secret, sign

SECRET = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
BODY = (
    '{"id":"evt_0001","object":"event","created_at":1750000000,"type":"batch.completed",'
    '"data":{"id":"batch_0001"}}'
)
AT = 1_750_000_000
RAW = "a secret that somebody chose, with ü"


def key_of(secret: str) -> bytes:
    key = read_secret(secret)
    assert key is not None
    return key


def headers(*secrets: str, at: int = AT, body: str = BODY) -> dict[str, str]:
    return sign([key_of(each) for each in secrets], message_id="wh_0001", at=at, body=body)


def verify(signed: dict[str, str], *, secret: str, body: str = BODY) -> None:
    """Raises unless OpenAI's client accepts it, however old it is."""
    with OpenAI(api_key="-", base_url="http://127.0.0.1:9") as client:
        client.webhooks.verify_signature(body, signed, secret=secret, tolerance=10**10)


def test_the_signature_of_the_contract() -> None:
    assert headers(SECRET) == {
        "webhook-id": "wh_0001",
        "webhook-timestamp": "1750000000",
        "webhook-signature": "v1,OU+HXszhbdp7eQlJbm6//1nP2h76fF0GJ2OTJecj2UE=",
    }


@pytest.mark.parametrize("secret", [SECRET, RAW, new_secret()], ids=["signing", "text", "new"])
def test_openai_s_client_accepts_what_was_signed(secret: str) -> None:
    verify(headers(secret), secret=secret)


def test_openai_s_client_knows_the_event() -> None:
    import time

    signed = headers(SECRET, at=int(time.time()))

    with OpenAI(api_key="-", base_url="http://127.0.0.1:9") as client:
        event = client.webhooks.unwrap(BODY, signed, secret=SECRET)

    assert isinstance(event, BatchCompletedWebhookEvent)
    assert event.data.id == "batch_0001"


def test_what_was_changed_on_its_way_is_refused() -> None:
    signed = headers(SECRET)

    for changed, body in (
        (signed, BODY.replace("0001", "0002")),
        (signed | {"webhook-id": "wh_0002"}, BODY),
        (signed | {"webhook-timestamp": "1750000001"}, BODY),
    ):
        with pytest.raises(InvalidWebhookSignatureError):
            verify(changed, secret=SECRET, body=body)


def test_either_of_two_secrets_is_enough() -> None:
    signed = headers(SECRET, RAW)

    assert signed["webhook-signature"].count("v1,") == 2
    assert signed["webhook-signature"].split() == [
        headers(SECRET)["webhook-signature"],
        headers(RAW)["webhook-signature"],
    ]
    verify(signed, secret=SECRET)
    verify(signed, secret=RAW)
    with pytest.raises(InvalidWebhookSignatureError):
        verify(signed, secret=new_secret())


def test_a_body_may_hold_any_text() -> None:
    body = '{"name":"Zürich — 東京 🏔"}'

    verify(headers(SECRET, body=body), secret=SECRET, body=body)


def test_a_new_secret_has_32_bytes_and_is_new() -> None:
    secret = new_secret()

    assert secret.startswith("whsec_")
    assert len(key_of(secret)) == 32
    assert secret != new_secret()


@pytest.mark.parametrize(
    ("secret", "key"),
    [
        (SECRET, bytes(range(32))),
        ("whsec_" + base64.b64encode(b"x" * 24).decode(), b"x" * 24),
        ("whsec_" + base64.b64encode(b"\xff\xfe" * 12).decode(), b"\xff\xfe" * 12),
        ("x" * 24, b"x" * 24),
        ("twelve ü and spaces, yes", "twelve ü and spaces, yes".encode()),
    ],
)
def test_a_secret_stands_for_a_key(secret: str, key: bytes) -> None:
    assert read_secret(secret) == key


@pytest.mark.parametrize(
    "secret",
    [
        "",
        "x" * 23,
        "x" * 24 + "\n",
        "x" * 24 + "\x00",
        "whsec_",
        "whsec_" + "x" * 30 + "!!",  # no base64
        "whsec_" + base64.b64encode(b"x" * 23).decode(),  # too short
        SECRET.rstrip("="),  # not padded
        SECRET.replace("h8=", "h9="),  # not canonical
        "whsec_" + base64.urlsafe_b64encode(b"\xff\xfe" * 12).decode(),  # another alphabet
        SECRET + "\n",
        "whsec_ü" + "A" * 43,
    ],
)
def test_what_is_no_secret_is_refused(secret: str) -> None:
    assert read_secret(secret) is None
