"""JSON bodies, read by hand.

Clients send them under any content type, and FastAPI's own reading has no bound and its own
shape of errors.
"""

from typing import TypeVar

import msgspec
from fastapi import Request
from pydantic import BaseModel, ValidationError

from penstock.api.errors import explain
from penstock.errors import InvalidRequest

MAX_JSON_BYTES = 1 << 20

T = TypeVar("T", bound=BaseModel)


async def read_json(request: Request, shape: type[T]) -> T:
    """Read a request's body as `shape`.

    Raises:
        InvalidRequest: It is too large, not JSON or not of that shape.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_JSON_BYTES:
            raise InvalidRequest(
                f"The request body is too large: it may have up to {MAX_JSON_BYTES} bytes."
            )
    try:
        return shape.model_validate(parse_json(bytes(body), what="the request body"))
    except ValidationError as error:
        raise explain(error.errors(include_url=False)) from None


def parse_json(text: bytes, *, what: str, param: str | None = None) -> object:
    """Parse JSON, strictly: no NaN, no bad UTF-8, no half surrogate pairs.

    Args:
        what: What is parsed, for the message.
    """
    try:
        return msgspec.json.decode(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise InvalidRequest(
            f"We could not parse the JSON of {what}: {reason}.", param=param
        ) from None
