"""In which order the lines of a slice are sent. Pure.

Inference engines keep the prefix of a prompt for a while, and an answer costs less if its
prompt begins as one before it did. So lines with the same beginning, which in a chat is the
system prompt, are sent one after another. The output has the input's order all the same.
"""

from collections.abc import Sequence

import msgspec

from penstock.jsonl import RequestLine

_FEWEST = 3
"""With fewer lines there is nothing to gain."""


class _Prompt(msgspec.Struct, gc=False):
    """Where each API keeps what prompts begin with."""

    messages: list[msgspec.Raw] | None = None
    instructions: msgspec.Raw = msgspec.Raw()
    system: msgspec.Raw = msgspec.Raw()


_decode = msgspec.json.Decoder(_Prompt).decode


def by_prefix(lines: Sequence[RequestLine]) -> Sequence[RequestLine]:
    """Bring lines of one model that begin alike together.

    Groups stand in the order in which their first lines came, and so do the lines in each.
    """
    if len(lines) < _FEWEST:
        return lines
    groups: dict[tuple[str, bytes], list[RequestLine]] = {}
    for line in lines:
        groups.setdefault((line.model, _prefix(line.body)), []).append(line)
    if len(groups) in (1, len(lines)):
        return lines
    return [line for group in groups.values() for line in group]


def _prefix(body: bytes) -> bytes:
    """What a prompt begins with, as it stands in the request; empty if there is no such."""
    try:
        prompt = _decode(body)
    except (msgspec.DecodeError, RecursionError):
        return b""
    if beginning := bytes(prompt.system) + bytes(prompt.instructions):
        return beginning
    # A conversation of one message has no beginning of its own.
    return bytes(prompt.messages[0]) if prompt.messages and len(prompt.messages) > 1 else b""
