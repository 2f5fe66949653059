"""The lines of a checked input file, read to be sent."""

from collections.abc import Container, Iterator

import msgspec


class RequestLine(msgspec.Struct, frozen=True, gc=False):
    """One request, ready to be sent. A msgspec struct, because one is made for every line."""

    line: int
    """Its number in the input file, from 1."""
    custom_id: str
    body: bytes
    """Byte for byte as it stands in the file."""
    model: str
    beginning: int
    """The same for prompts that begin alike: with the same system prompt or, of a conversation,
    the same first message. 0 if a prompt has no such beginning."""


class _Envelope(msgspec.Struct):
    custom_id: str
    body: msgspec.Raw


class _Model(msgspec.Struct):
    model: str


class _Prompt(_Model, gc=False):
    """Where each API keeps what prompts begin with."""

    messages: list[msgspec.Raw] | None = None
    instructions: msgspec.Raw = msgspec.Raw()
    system: msgspec.Raw = msgspec.Raw()


_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_model = msgspec.json.Decoder(_Model).decode
_decode_prompt = msgspec.json.Decoder(_Prompt).decode


def iter_requests(
    data: bytes, *, first_line: int, models: Container[str] | None = None
) -> Iterator[RequestLine]:
    """Read the requests of a slice of a checked file.

    Args:
        data: The bytes of the slice.
        first_line: The number of its first line in the input file, from 1.
        models: Those of the slice, where others may share its bytes; None reads all lines.
    """
    for line, text in enumerate(data.split(b"\n"), first_line):
        if text.strip():
            envelope = _decode_envelope(text)
            body = bytes(envelope.body)
            model, beginning = _read_prompt(body)
            if models is None or model in models:
                yield RequestLine(line, envelope.custom_id, body, model, beginning)


def _read_prompt(body: bytes) -> tuple[str, int]:
    """A request's model, and what tells its prompt's beginning from others."""
    try:
        prompt = _decode_prompt(body)
    except msgspec.ValidationError:  # no prompt that any API knows; its upstream will say so
        return _decode_model(body).model, 0
    messages = prompt.messages
    if prompt.system or prompt.instructions:
        return prompt.model, hash((bytes(prompt.system), bytes(prompt.instructions)))
    # A conversation of one message has no beginning of its own.
    return prompt.model, hash(bytes(messages[0])) if messages and len(messages) > 1 else 0
