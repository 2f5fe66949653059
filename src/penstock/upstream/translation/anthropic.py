"""Anthropic's Messages API.

Sources: the reference of `POST /v1/messages`, the guides on thinking and structured outputs,
and the page on errors, all on platform.claude.com; the addresses and what was read from them
are in `docs/translation.md`.
"""

import re
from typing import Any

import msgspec

from penstock.upstream.base import Reply
from penstock.upstream.translation import answers, chat, responses
from penstock.upstream.translation.base import (
    CHAT,
    RESPONSES,
    Answer,
    Choice,
    Finish,
    Image,
    Part,
    Request,
    Text,
    Tool,
    ToolCall,
    ToolChoice,
    ToolMode,
    ToolResult,
    Turn,
    Untranslatable,
    Usage,
)
from penstock.upstream.translation.decoding import decode, find

_Json = dict[str, Any]
_encode = msgspec.json.encode
MESSAGES = "/v1/messages"
API_VERSION = "2023-06-01"
"""For the header `anthropic-version`: 2026-10-21 takes no sampling parameters."""
_NAME = "Anthropic"
_MEDIA_TYPES = ("image/jpeg", "image/png", "image/gif", "image/webp")
_CALL_ID = re.compile(r"[a-zA-Z0-9_-]+")
_VERSION = re.compile(r"claude-(?:[a-z]+-)?(\d{1,2})(?:[-.](\d{1,2}))?(?!\d)")
_NEWEST = (99, 0)
_MIN_BUDGET_TOKENS = 1024
_BUDGET_TOKENS = {
    "minimal": 1024,
    "low": 2048,
    "medium": 8192,
    "high": 16384,
    "xhigh": 24576,
    "max": 30720,
}
"""How much a model that is told its budget may think. All are below the smallest of
`_DEFAULT_MAX_TOKENS` of a model that thinks."""
_DEFAULT_MAX_TOKENS = (((4, 0), 32_000), ((3, 7), 32_000), ((3, 5), 8_192), ((0, 0), 4_096))
"""By the oldest version: what every model since can write, and is asked for where OpenAI's
API knows no bound but the model's."""


def translate_request(endpoint: str, model: str, body: bytes) -> bytes:
    """See `base.Translation`; a body of `/v1/messages` passes but for its model."""
    if endpoint == MESSAGES:
        return _encode({**decode(_object_decoder, body), "model": model})
    return _encode({"model": model, **build(read(endpoint, body), model)})


def translate_reply(
    endpoint: str,
    model: str,
    body: bytes,
    *,
    created_at: int,
    status_code: int | None = None,
    request_id: str | None = None,
) -> Reply:
    """See `base.Translation`; an answer to `/v1/messages` passes, errors become OpenAI's."""
    if error := find(_error_decoder, body):
        status = _error_status(error.error.type, status_code)
        told = request_id or error.request_id
        return answers.write_error(status, error.error.message, told)
    if status_code is not None and status_code >= 300:
        return answers.write_error(status_code, "", request_id)
    answer = read_answer(body, model, created_at)
    if answer is None:
        return answers.unusable(_NAME, request_id)
    reply = answers.write(endpoint, answer, request_id)
    return msgspec.structs.replace(reply, body=body) if endpoint == MESSAGES else reply


def read(endpoint: str, body: bytes) -> Request:
    """A body of one of the endpoints that a chat model answers."""
    match endpoint:
        case "/v1/chat/completions":
            return chat.read(body)
        case "/v1/responses":
            return responses.read(body)
        case _:
            raise answers.wrong_endpoint(endpoint, CHAT, RESPONSES, MESSAGES)


def build(request: Request, model: str, *, image_urls: bool = True) -> _Json:
    """The body without its model, as Bedrock wants it too.

    Args:
        image_urls: Whether images may be named by their address.
    """
    request.refuse_unknown(
        _NAME, "seed", "presence_penalty", "frequency_penalty", "top_logprobs"
    )
    if request.choices != 1:
        request.refuse("choices", f"{_NAME} gives one answer to a request; give 1.")
    version = _version(model)
    _check_sampling(request, model, version)
    default = next(tokens for oldest, tokens in _DEFAULT_MAX_TOKENS if version >= oldest)
    body: _Json = {
        "max_tokens": request.max_tokens or default,
        "messages": [_write_turn(turn, image_urls) for turn in request.turns],
    }
    if request.system:
        body["system"] = [{"type": "text", "text": text.text} for text in request.system]
    for field in ("temperature", "top_p", "top_k"):
        if (value := getattr(request, field)) is not None:
            body[field] = value
    if request.stop:
        body["stop_sequences"] = request.stop
    if request.tools:
        body["tools"] = [_write_tool(tool) for tool in request.tools]
        if choice := _write_choice(request.tool_choice, request.one_call):
            body["tool_choice"] = choice
    output: _Json = {}
    if request.output is not None:
        output["format"] = {"type": "json_schema", "schema": _schema(request)}
    _add_thinking(request, model, version, body, output)
    if output:
        body["output_config"] = output
    return body


def _version(model: str) -> tuple[int, int]:
    """Of a Claude model, from its name; models without one are taken for the newest."""
    found = _VERSION.search(model)
    return (int(found[1]), int(found[2] or 0)) if found else _NEWEST


def _check_sampling(request: Request, model: str, version: tuple[int, int]) -> None:
    request.check_range("temperature", 0, 1, _NAME)
    if version >= (4, 7):
        for field in ("temperature", "top_p", "top_k"):
            if getattr(request, field) not in (None, 1):
                request.refuse(field, f"{model} takes no sampling parameters; leave it out.")


def _schema(request: Request) -> _Json:
    output = request.output
    if output is None or output.schema is None:
        raise Untranslatable(
            output.field if output else "",
            f"{_NAME} needs a schema; give `json_schema` or `text`.",
        )
    return output.schema


def _write_turn(turn: Turn, image_urls: bool) -> _Json:
    role = "assistant" if turn.is_model else "user"
    return {"role": role, "content": [_write_part(part, image_urls) for part in turn.parts]}


def _write_part(part: Part, image_urls: bool) -> _Json:
    match part:
        case Text():
            return {"type": "text", "text": part.text}
        case Image():
            return {"type": "image", "source": _write_source(part, image_urls)}
        case ToolCall():
            if not _CALL_ID.fullmatch(part.id):
                raise Untranslatable(
                    f"{part.field}.id", "An ID must be of letters, digits, `_` and `-`."
                )
            return {
                "type": "tool_use",
                "id": part.id,
                "name": part.name,
                "input": part.arguments,
            }
        case ToolResult():
            content = [_write_part(each, image_urls) for each in part.parts]
            kept = [each for each in content if each.get("text") != ""]
            return {"type": "tool_result", "tool_use_id": part.id, "content": kept}


def _write_source(image: Image, image_urls: bool) -> _Json:
    if image.url:
        if not image_urls:
            raise Untranslatable(image.field, "Only a data URL is taken here.")
        return {"type": "url", "url": image.url}
    if image.media_type not in _MEDIA_TYPES:
        allowed = ", ".join(_MEDIA_TYPES)
        raise Untranslatable(image.field, f"{image.media_type!r} is not one of {allowed}.")
    return {"type": "base64", "media_type": image.media_type, "data": image.data}


def _write_tool(tool: Tool) -> _Json:
    if tool.parameters.get("type", "object") != "object":
        raise Untranslatable(f"{tool.field}.parameters.type", "It must be `object`.")
    written: _Json = {
        "name": tool.name,
        "input_schema": {"type": "object", **tool.parameters},
    }
    if tool.description is not None:
        written["description"] = tool.description
    if tool.is_strict:
        written["strict"] = True
    return written


def _write_choice(choice: ToolChoice | None, one_call: bool) -> _Json | None:
    mode = choice.mode if choice else ToolMode.AUTO
    if mode is ToolMode.NONE:
        return {"type": "none"}
    if choice and choice.name is not None:
        written: _Json = {"type": "tool", "name": choice.name}
    elif choice or one_call:
        written = {"type": "any" if mode is ToolMode.REQUIRED else "auto"}
    else:
        return None
    return {**written, "disable_parallel_tool_use": True} if one_call else written


def _add_thinking(
    request: Request, model: str, version: tuple[int, int], body: _Json, output: _Json
) -> None:
    """Say how much to think, in the way that the model understands.

    Since 4.6 a model decides by itself and is told an effort; before, it is told a budget.
    """
    effort = request.effort
    if effort is None:
        if request.reasoning_summary:
            request.refuse("reasoning_summary", "Only with an effort are thoughts told.")
        return
    if effort == "none":
        body["thinking"] = {"type": "disabled"}
        return
    if version < (3, 7):
        request.refuse("effort", f"{model} does not think; leave it out.")
    if request.tool_choice and request.tool_choice.mode is ToolMode.REQUIRED:
        request.refuse("tool_choice", f"{_NAME} cannot both think and be made to call a tool.")
    if request.temperature not in (None, 1) or request.top_k is not None:
        field = "top_k" if request.top_k is not None else "temperature"
        request.refuse(field, f"{_NAME} cannot think with it; leave it out.")
    told = {"display": "summarized"} if request.reasoning_summary else {}
    if version >= (4, 6):
        body["thinking"] = {"type": "adaptive", **told}
        output["effort"] = "low" if effort == "minimal" else effort
        return
    budget = min(_BUDGET_TOKENS[effort], body["max_tokens"] - 1)
    if budget < _MIN_BUDGET_TOKENS:
        request.refuse("max_tokens", f"To think it must be above {_MIN_BUDGET_TOKENS}.")
    body["thinking"] = {"type": "enabled", "budget_tokens": budget, **told}


# Answers


class _Block(msgspec.Struct):
    type: str
    text: str = ""
    thinking: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] = {}


class _OutputDetails(msgspec.Struct):
    thinking_tokens: int = 0


class _Usage(msgspec.Struct):
    input_tokens: int = 0
    output_tokens: int = 0
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    output_tokens_details: _OutputDetails | None = None


class _StopDetails(msgspec.Struct):
    explanation: str | None = None


class _Message(msgspec.Struct, tag_field="type", tag="message"):
    content: list[_Block]
    id: str
    model: str = ""
    stop_reason: str | None = None
    stop_details: _StopDetails | None = None
    usage: _Usage = msgspec.field(default_factory=_Usage)


class _ErrorObject(msgspec.Struct):
    type: str = ""
    message: str = ""


class _ErrorBody(msgspec.Struct, tag_field="type", tag="error"):
    error: _ErrorObject
    request_id: str | None = None


_object_decoder = msgspec.json.Decoder(dict[str, Any])
_message_decoder = msgspec.json.Decoder(_Message)
_error_decoder = msgspec.json.Decoder(_ErrorBody)
_FINISHES = {
    "max_tokens": Finish.LENGTH,
    "model_context_window_exceeded": Finish.LENGTH,
    "tool_use": Finish.TOOL_CALLS,
    "refusal": Finish.CONTENT_FILTER,
}
"""By stop reason; all others are an end by itself or by a stop sequence."""
_STATUSES = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
_REFUSAL = "The model declined to answer."


def _error_status(kind: str, status_code: int | None) -> int:
    if status_code is not None and status_code >= 400:
        return status_code
    return _STATUSES.get(kind, 500)


def read_answer(body: bytes, model: str, created_at: int) -> Answer | None:
    """A message; None if it is something else."""
    message = find(_message_decoder, body)
    return message and Answer(
        id=message.id,
        model=message.model or model,
        choices=[_read_choice(message)],
        usage=_read_usage(message.usage),
        created_at=created_at,
    )


def _read_choice(message: _Message) -> Choice:
    finish = _FINISHES.get(message.stop_reason or "", Finish.STOP)
    texts = [block.text for block in message.content if block.type == "text"]
    thoughts = [block.thinking for block in message.content if block.type == "thinking"]
    refusal = None
    if finish is Finish.CONTENT_FILTER:
        details = message.stop_details
        refusal = (details.explanation if details else None) or _REFUSAL
    return Choice(
        finish=finish,
        text="".join(texts) if texts else None,
        refusal=refusal,
        reasoning=[thought for thought in thoughts if thought],
        calls=[
            answers.make_call(block.id, block.name, block.input)
            for block in message.content
            if block.type == "tool_use"
        ],
    )


def _read_usage(usage: _Usage) -> Usage:
    cached = usage.cache_read_input_tokens or 0
    written = usage.cache_creation_input_tokens or 0
    details = usage.output_tokens_details
    return Usage(
        input=usage.input_tokens + cached + written,
        cached=cached,
        cache_written=written,
        output=usage.output_tokens,
        reasoning=details.thinking_tokens if details else 0,
    )
