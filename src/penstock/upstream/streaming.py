"""Asking for an answer piece by piece, and putting it together again. Pure.

A proxy that ends connections on which nothing has come for a minute cuts off long answers. An
upstream that streams sends something all the time. The line's result is to be what it would
have been without the stream, so the pieces are put together as each API defines them:

- `/v1/chat/completions`, `/v1/completions`: chunks of choices by index, up to `[DONE]`;
- `/v1/responses`: the whole response stands in the last event;
- `/v1/messages`: a message that begins, content blocks by index, deltas, and its stop.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import msgspec

from penstock.upstream.sse import Event, iter_events

_DONE = b"[DONE]"
_Object = dict[str, Any]
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_object = msgspec.json.Decoder(dict[str, Any]).decode
_encode = msgspec.json.encode
_WHOLE_TEXTS = frozenset({"role", "id", "type", "name"})
"""Texts that come at once; others come in pieces."""
_ERROR_STATUSES = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "api_error": 500,
    "server_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}


class CutStream(Exception):
    """A stream ended before its answer was whole."""


class BadStream(Exception):
    """What came is no stream of this API.

    Args:
        reason: What is wrong, for a person.
    """


class _Refused(Exception):
    """The upstream tells of an error in the stream itself."""

    def __init__(self, error: object) -> None:
        super().__init__()
        self.error = error


def can_stream(endpoint: str) -> bool:
    """Whether answers of an endpoint can come piece by piece."""
    return endpoint in _ASSEMBLERS


def ask_for_stream(endpoint: str, body: bytes) -> bytes:
    """A request's body with the wish for a stream, the rest as it is.

    Raises:
        msgspec.DecodeError: It is not one JSON object.
    """
    fields: dict[str, Any] = dict(_decode_fields(body))
    fields["stream"] = True
    if endpoint in _TELLS_USAGE_WHEN_ASKED:
        try:
            options = _decode_fields(fields.get("stream_options", b"{}"))
        except msgspec.DecodeError:
            options = {}
        fields["stream_options"] = {**options, "include_usage": True}
    return _encode(fields)


def assemble(endpoint: str, stream: bytes) -> tuple[int, bytes]:
    """Put the answer together that the endpoint would have given at once.

    Returns:
        Its HTTP status, which is not 200 if the upstream told of an error in the stream, and
        its body.

    Raises:
        CutStream: The end is missing.
        BadStream: It is no stream of this endpoint.
    """
    try:
        stream.decode()
        return 200, _encode(_ASSEMBLERS[endpoint](stream))
    except _Refused as refusal:
        return _status_of(refusal.error), _encode({"error": refusal.error})
    except UnicodeDecodeError as error:
        raise BadStream(f"it is not UTF-8 ({error.reason} at byte {error.start})") from error
    except (
        TypeError,
        AttributeError,
        KeyError,
        ValueError,
        RecursionError,
        msgspec.DecodeError,
    ) as error:
        raise BadStream("an event does not have the form that this API defines") from error


def _read(event: Event) -> _Object:
    try:
        found = _decode_object(event.data)
    except msgspec.ValidationError as error:
        raise BadStream("an event is not a JSON object") from error
    except msgspec.DecodeError as error:
        raise CutStream from error
    error = found.get("error")
    if error and found.get("type") in (None, "error"):
        raise _Refused(error)
    if found.get("type") == "error" or event.name == b"error":
        raise _Refused(found)
    return found


def _assemble_choices(
    stream: bytes, take_choice: Callable[[_Object, _Object], None]
) -> _Object:
    whole: _Object = {}
    choices: dict[int, _Object] = {}
    for event in iter_events(stream):
        if event.data.strip() == _DONE:
            whole["choices"] = [choices[index] for index in sorted(choices)]
            return whole
        chunk = _read(event)
        for name, value in chunk.items():
            if name == "choices":
                for piece in value or ():
                    index = int(piece.get("index", 0))
                    take_choice(choices.setdefault(index, {"index": index}), piece)
                whole.setdefault("choices", [])  # which keeps its place
            elif value is not None or name not in whole:
                whole[name] = value
    raise CutStream


def _assemble_chat(stream: bytes) -> _Object:
    def take(choice: _Object, piece: _Object) -> None:
        message = choice.setdefault("message", {"role": "assistant", "content": None})
        for name, value in piece.items():
            if name == "delta":
                _add(message, cast("_Object", value or {}))
            elif name == "logprobs":
                _add_lists(choice, "logprobs", value)
            elif value is not None or name not in choice:
                choice[name] = value

    whole = _assemble_choices(stream, take)
    whole["object"] = "chat.completion"
    for choice in whole["choices"]:
        for call in choice["message"].get("tool_calls") or ():
            call.pop("index", None)
    return whole


def _assemble_completion(stream: bytes) -> _Object:
    def take(choice: _Object, piece: _Object) -> None:
        for name, value in piece.items():
            if name == "text":
                choice["text"] = choice.get("text", "") + (value or "")
            elif name == "logprobs":
                _add_lists(choice, "logprobs", value)
            elif value is not None or name not in choice:
                choice[name] = value

    whole = _assemble_choices(stream, take)
    whole["object"] = "text_completion"
    return whole


def _assemble_response(stream: bytes) -> _Object:
    last: _Object | None = None
    for event in iter_events(stream):
        if event.data.strip() == _DONE:
            continue
        found = _read(event)
        kind = found.get("type") or event.name.decode()
        if kind in ("response.completed", "response.incomplete", "response.failed"):
            last = found["response"]
    if not isinstance(last, dict):
        raise CutStream
    return last


def _assemble_message(stream: bytes) -> _Object:
    message: _Object = {}
    blocks: dict[int, _Object] = {}
    inputs: dict[int, str] = {}
    for event in iter_events(stream):
        found = _read(event)
        match found.get("type"):
            case "message_start":
                message = dict(found["message"])
            case "content_block_start":
                blocks[found["index"]] = dict(found["content_block"])
            case "content_block_delta":
                index, delta = found["index"], found["delta"]
                if delta["type"] == "input_json_delta":
                    inputs[index] = inputs.get(index, "") + delta["partial_json"]
                elif delta["type"] == "citations_delta":
                    block = blocks[index]
                    block["citations"] = [*(block.get("citations") or ()), delta["citation"]]
                else:
                    _add(blocks[index], {k: v for k, v in delta.items() if k != "type"})
            case "message_delta":
                message.update(found.get("delta") or {})
                usage: _Object = message.get("usage") or {}
                message["usage"] = {**usage, **(found.get("usage") or {})}
            case "message_stop":
                for index, text in inputs.items():
                    blocks[index]["input"] = msgspec.json.decode(text or "{}")
                message["content"] = [blocks[index] for index in sorted(blocks)]
                return message
            case _:
                pass  # a ping, or what later versions add
    raise CutStream


def _add(whole: _Object, delta: Mapping[str, Any]) -> None:
    """Add a piece of an object: texts grow, lists are merged by `index`, objects deeply."""
    for name, value in delta.items():
        before: Any = whole.get(name)
        if value is None:
            whole.setdefault(name, None)
        elif isinstance(value, str) and isinstance(before, str) and name not in _WHOLE_TEXTS:
            whole[name] = before + value
        elif isinstance(value, dict):
            whole[name] = before if isinstance(before, dict) else {}
            _add(whole[name], cast("_Object", value))
        elif isinstance(value, list):
            whole[name] = before if isinstance(before, list) else []
            _merge(whole[name], cast("list[Any]", value))
        else:
            whole[name] = value


def _merge(items: list[Any], pieces: list[Any]) -> None:
    for piece in pieces:
        index: Any = cast("_Object", piece).get("index") if isinstance(piece, dict) else None
        same = (each for each in items if index is not None and each.get("index") == index)
        if (found := next(same, None)) is None:
            items.append(piece)
        else:
            _add(found, cast("_Object", piece))


def _add_lists(whole: _Object, name: str, piece: Mapping[str, Any] | None) -> None:
    """Add a piece of an object whose members are lists, or null."""
    if piece is None:
        whole.setdefault(name, None)
        return
    lists: _Object = whole.get(name) or {}
    for key, value in piece.items():
        lists[key] = [*(lists.get(key) or ()), *value] if isinstance(value, list) else value
    whole[name] = lists


def _status_of(error: object) -> int:
    """The HTTP status that an error in a stream would have had; 502 if it does not tell."""
    if not isinstance(error, dict):
        return 502
    fields = cast("_Object", error)
    for name in ("code", "status", "status_code"):
        value = fields.get(name)
        if isinstance(value, str) and value.isdecimal() and len(value) == 3:
            value = int(value)
        if isinstance(value, int) and 400 <= value <= 599:
            return value
    for name in ("type", "code"):
        if (status := _ERROR_STATUSES.get(str(fields.get(name)))) is not None:
            return status
    return 502


_TELLS_USAGE_WHEN_ASKED = frozenset({"/v1/chat/completions", "/v1/completions"})
_ASSEMBLERS: dict[str, Callable[[bytes], _Object]] = {
    "/v1/chat/completions": _assemble_chat,
    "/v1/completions": _assemble_completion,
    "/v1/responses": _assemble_response,
    "/v1/messages": _assemble_message,
}
