"""What tells a request from the same request sent again."""

from typing import Annotated

from fastapi import Depends, Header

from penstock import clock
from penstock.service import Asked

MAX_KEY_CHARS = 255


def read_asked(
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=MAX_KEY_CHARS,
            pattern="^[ -~]*$",
            description="Makes the request safe to be sent again: the same key with the same "
            "request gives the same object, for a day; with another one it is refused.",
        ),
    ] = None,
    x_stainless_retry_count: Annotated[
        str | None,
        Header(
            description="How often OpenAI's clients have sent the request before. From 1, "
            "an equal request of the last 15 minutes is answered with the object it made."
        ),
    ] = None,
) -> Asked:
    """When the request arrived, its key, and whether it is sent again."""
    count = x_stainless_retry_count or ""
    is_retry = count.isascii() and count.isdigit() and count.strip("0") != ""
    return Asked(at=clock.now(), key=idempotency_key, is_retry=is_retry)


AskedOnce = Annotated[Asked, Depends(read_asked)]
