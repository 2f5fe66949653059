"""Lines whose client asks for another model than they name.

Only the bytes of the name change; the rest of a body goes out as it stands in the input file.
"""

import json
import re
from collections.abc import Iterable, Iterator

import msgspec

from penstock.request_lines import RequestLine

_TOKEN = re.compile(rb'"([^"\\]*(?:\\.[^"\\]*)*)"\s*(:)?|[{}\[\]]', re.DOTALL)
"""Of valid JSON all that matters here: strings, whether a colon follows, and brackets."""
_OPENING, _CLOSING = b"{[", b"}]"


def rename(lines: Iterable[RequestLine], model: str | None) -> Iterable[RequestLine]:
    """Lines as they are to be sent.

    Args:
        model: What takes the place of the models that they name; None leaves all as they are.
    """
    return lines if model is None else _renamed(lines, model)


def _renamed(lines: Iterable[RequestLine], model: str) -> Iterator[RequestLine]:
    for line in lines:
        if line.model == model:
            yield line
        else:
            body = put_model(line.body, model)
            yield msgspec.structs.replace(line, body=body, model=model)


def put_model(body: bytes, model: str) -> bytes:
    """A body with another value for its `model`, wherever it has one, and else untouched.

    Args:
        body: A JSON object, checked, of which `model` is a string.
    """
    name = msgspec.json.encode(model)
    parts: list[bytes] = []
    kept = depth = 0
    is_model = False
    for token in _TOKEN.finditer(body):
        if is_model:
            parts += (body[kept : token.start()], name)
            kept = token.end(1) + 1
        first = body[token.start()]
        if first in _OPENING:
            depth += 1
        elif first in _CLOSING:
            depth -= 1
        is_model = depth == 1 and token[2] is not None and _is_model(token[1])
    return b"".join((*parts, body[kept:]))


def _is_model(key: bytes) -> bool:
    if b"\\" not in key:
        return key == b"model"
    return json.loads(b'"%b"' % key) == "model"  # letters can be written by their numbers
