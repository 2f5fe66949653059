"""Server-sent events, as they come over HTTP. Pure.

Source: the WHATWG's HTML standard, 9.2.6, "Interpreting an event stream".
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_LINE_ENDS = re.compile(rb"\r\n|\n|\r")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Event:
    """One event."""

    name: bytes
    """Empty if it has none."""
    data: bytes


def iter_events(stream: bytes) -> Iterator[Event]:
    """Read a whole stream.

    An event that the stream's end cuts off is given as well, for some servers end without the
    empty line; whether it is whole shows in its data.
    """
    name = b""
    data: list[bytes] = []
    for line in _LINE_ENDS.split(stream.removeprefix(_BYTE_ORDER_MARK)):
        if not line:
            if data:
                yield Event(name, b"\n".join(data))
            name, data = b"", []
            continue
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
    if data:
        yield Event(name, b"\n".join(data))
