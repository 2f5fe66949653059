"""Which bytes of a download are asked for, if any (RFC 9110, sections 13 and 14)."""

import re
from collections.abc import Iterable

_TAG = re.compile(r'(?:W/)?("[^"]*")')
_SINGLE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


class Unsatisfiable(Exception):
    """The range begins after the last byte."""


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Find which bytes of `size` a `Range` header asks for.

    Returns:
        Offsets of the first byte and after the last one; None if the whole is to be given:
        there is no header, or it is not a single range in bytes, which a server may ignore.

    Raises:
        Unsatisfiable: There is no such range in that many bytes.
    """
    match = _SINGLE.fullmatch(header.strip()) if header else None
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match[1], match[2]
    if not first:
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    if start >= size:
        raise Unsatisfiable
    return start, end


def has_match(if_none_match: Iterable[str] | None, etag: str) -> bool:
    """Whether a client that sends these `If-None-Match` headers has the content already.

    Args:
        if_none_match: The values of all such headers, each a list of entity tags or `*`; None
            if there is none.
        etag: The content's entity tag, with its quotes. They are compared weakly.
    """
    return any(
        value.strip() == "*" or etag in _TAG.findall(value) for value in if_none_match or ()
    )
