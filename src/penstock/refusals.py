"""What is refused, in OpenAI's words: clients look at the code and the first words.

Each function makes the error and leaves it to its caller to raise it.
"""

import re
from collections.abc import Iterable

from penstock.errors import InvalidRequest

_QUOTED_CHARS = 100
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def quoted(text: str) -> str:
    """A client's value as a message repeats it: not more than is needed to recognise it."""
    return text if len(text) <= _QUOTED_CHARS else f"{text[:_QUOTED_CHARS]}…"


def unknown_parameter(name: str) -> InvalidRequest:
    """A parameter that there is not: an option that is let pass and ignored does harm."""
    name = quoted(name)
    return InvalidRequest(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")


def missing_parameter(name: str) -> InvalidRequest:
    """A parameter that is required."""
    return InvalidRequest(
        f"Missing required parameter: '{name}'.",
        param=name,
        code="missing_required_parameter",
    )


def unsupported(value: str, allowed: Iterable[str], *, param: str) -> InvalidRequest:
    """A value that is none of those that are allowed."""
    values = ", ".join(f"'{text}'" for text in allowed)
    return InvalidRequest(
        f"Invalid value: '{quoted(value)}'. Supported values are: {values}.",
        param=param,
        code="invalid_value",
    )


def wrong_type(param: str, *, expected: str, given: str) -> InvalidRequest:
    """A value of another type.

    Args:
        param: Empty for the body itself.
        expected: Such as `a string`.
    """
    name = f"'{param}'" if param else "the request body"
    return InvalidRequest(
        f"Invalid type for {name}: expected {expected}, but got {given} instead.",
        param=param or None,
        code="invalid_type",
    )


def below_minimum(param: str, value: str, minimum: int) -> InvalidRequest:
    """A whole number that is too small."""
    return InvalidRequest(
        f"Invalid '{param}': integer below minimum value. Expected a value >= {minimum}, "
        f"but got {quoted(value)} instead.",
        param=param,
        code="integer_below_min_value",
    )


def above_maximum(param: str, value: str, maximum: int) -> InvalidRequest:
    """A whole number that is too large."""
    return InvalidRequest(
        f"Invalid '{param}': integer above maximum value. Expected a value <= {maximum}, "
        f"but got {quoted(value)} instead.",
        param=param,
        code="integer_above_max_value",
    )


def check_text(text: str, *, param: str, max_chars: int, noun: str = "string") -> None:
    """
    Raises:
        InvalidRequest: `text` is longer than `max_chars`, or no database would take it.
    """
    if len(text) > max_chars:
        raise InvalidRequest(
            f"Invalid '{param}': {noun} too long. Expected a {noun} with maximum length "
            f"{max_chars}, but got a {noun} with length {len(text)} instead.",
            param=param,
            code="string_above_max_length",
        )
    # PostgreSQL takes no NUL, and half a surrogate pair is not UTF-8.
    if _UNSTORABLE.search(text):
        raise InvalidRequest(
            f"Invalid '{param}': a {noun} may not hold the NUL character.",
            param=param,
            code="invalid_value",
        )
