"""Amazon Nova's own form at InvokeModel: nearly that of Bedrock's Converse."""

import re
from typing import Any

import msgspec

from penstock.upstream.translation import answers
from penstock.upstream.translation.base import (
    Answer,
    Choice,
    Finish,
    Image,
    Part,
    Request,
    Text,
    Tool,
    ToolCall,
    ToolMode,
    ToolResult,
    Turn,
    Untranslatable,
    Usage,
)
from penstock.upstream.translation.decoding import find

_Json = dict[str, Any]
_NAME = "Amazon Nova"
_FORMATS = {
    "image/jpeg": "jpeg",
    "image/png": "png",
    "image/gif": "gif",
    "image/webp": "webp",
}
_THINKS = re.compile(r"amazon\.nova-2-")
_EFFORTS = {"minimal": "low", "low": "low", "medium": "medium", "high": "high"}
_PARAMETERS = {
    "maxTokens": "max_tokens",
    "temperature": "temperature",
    "topP": "top_p",
    "topK": "top_k",
}


def build(request: Request, model: str) -> _Json:
    """The body for one of Nova's models that write text."""
    request.refuse_unknown(
        _NAME, "seed", "presence_penalty", "frequency_penalty", "top_logprobs", "one_call"
    )
    if request.choices != 1:
        request.refuse("choices", f"{_NAME} gives one answer to a request; give 1.")
    if request.output is not None:
        raise Untranslatable(request.output.field, f"{_NAME} writes text; leave it out.")
    request.check_range("temperature", 0, 1, _NAME)
    request.check_range("top_k", 1, 128, _NAME)
    body: _Json = {"messages": [_write_turn(turn) for turn in request.turns]}
    if request.system:
        body["system"] = [{"text": text.text} for text in request.system]
    config: _Json = {
        wire: value
        for wire, field in _PARAMETERS.items()
        if (value := getattr(request, field)) is not None
    }
    if request.stop:
        config["stopSequences"] = request.stop
    if config:
        body["inferenceConfig"] = config
    if request.tools:
        body["toolConfig"] = _write_tools(request)
    if reasoning := _write_reasoning(request, model):
        body["reasoningConfig"] = reasoning
    return body


def _write_turn(turn: Turn) -> _Json:
    role = "assistant" if turn.is_model else "user"
    return {"role": role, "content": [_write_part(part) for part in turn.parts]}


def _write_part(part: Part) -> _Json:
    match part:
        case Text():
            return {"text": part.text}
        case Image():
            return {"image": _write_image(part)}
        case ToolCall():
            return {
                "toolUse": {"toolUseId": part.id, "name": part.name, "input": part.arguments}
            }
        case ToolResult():
            content = [_write_part(each) for each in part.parts]
            return {"toolResult": {"toolUseId": part.id, "content": content}}


def _write_image(image: Image) -> _Json:
    if image.url:
        raise Untranslatable(image.field, "Only a data URL is taken here.")
    if image.media_type not in _FORMATS:
        allowed = ", ".join(_FORMATS)
        raise Untranslatable(image.field, f"{image.media_type!r} is not one of {allowed}.")
    return {"format": _FORMATS[image.media_type], "source": {"bytes": image.data}}


def _write_tools(request: Request) -> _Json:
    choice = request.tool_choice
    written: _Json = {"tools": [{"toolSpec": _write_tool(tool)} for tool in request.tools]}
    match choice.mode if choice else None:
        case None:
            pass
        case ToolMode.AUTO:
            written["toolChoice"] = {"auto": {}}
        case ToolMode.REQUIRED:
            name = choice.name if choice else None
            written["toolChoice"] = {"any": {}} if name is None else {"tool": {"name": name}}
        case ToolMode.NONE:
            request.refuse("tool_choice", f"{_NAME} has no 'none'; leave `tools` out instead.")
    return written


def _write_tool(tool: Tool) -> _Json:
    if tool.is_strict:
        raise Untranslatable(
            f"{tool.field}.strict", f"{_NAME} does not hold to a schema strictly; give false."
        )
    written: _Json = {"name": tool.name, "inputSchema": {"json": tool.parameters}}
    if tool.description is not None:
        written["description"] = tool.description
    return written


def _write_reasoning(request: Request, model: str) -> _Json | None:
    request.refuse_unknown(_NAME, "reasoning_summary")
    effort = request.effort
    if effort is None:
        return None
    if not _THINKS.search(model):
        request.refuse("effort", f"{model} does not think; leave it out.")
    if effort == "none":
        return {"type": "disabled"}
    if effort not in _EFFORTS:
        allowed = ", ".join(("none", *_EFFORTS))
        request.refuse("effort", f"{model} has no {effort!r}; allowed: {allowed}.")
    if effort == "high":
        for field in ("temperature", "top_p", "top_k", "max_tokens"):
            if getattr(request, field) is not None:
                request.refuse(field, f"{model} takes none with high effort; leave it out.")
    return {"type": "enabled", "maxReasoningEffort": _EFFORTS[effort]}


# Answers, with the names of Amazon's JSON


class _ToolUse(msgspec.Struct):
    toolUseId: str  # noqa: N815
    name: str
    input: dict[str, Any] | None = None


class _ReasoningText(msgspec.Struct):
    text: str = ""


class _Reasoning(msgspec.Struct):
    reasoningText: _ReasoningText | None = None  # noqa: N815


class _Block(msgspec.Struct):
    text: str | None = None
    toolUse: _ToolUse | None = None  # noqa: N815
    reasoningContent: _Reasoning | None = None  # noqa: N815


class _Message(msgspec.Struct):
    content: list[_Block]


class _Output(msgspec.Struct):
    message: _Message


class _Usage(msgspec.Struct):
    inputTokens: int = 0  # noqa: N815
    outputTokens: int = 0  # noqa: N815
    totalTokens: int = 0  # noqa: N815
    cacheReadInputTokenCount: int | None = None  # noqa: N815
    cacheWriteInputTokenCount: int | None = None  # noqa: N815


class _Answer(msgspec.Struct):
    output: _Output
    stopReason: str | None = None  # noqa: N815
    usage: _Usage = msgspec.field(default_factory=_Usage)


_decoder = msgspec.json.Decoder(_Answer)
_FINISHES = {
    None: Finish.STOP,
    "end_turn": Finish.STOP,
    "stop_sequence": Finish.STOP,
    "tool_use": Finish.TOOL_CALLS,
    "max_tokens": Finish.LENGTH,
    "model_context_window_exceeded": Finish.LENGTH,
}
"""All other reasons mean that the provider ended the answer, and are told as a refusal."""
_REDACTED = "[REDACTED]"


def read(body: bytes, model: str, created_at: int) -> Answer | None:
    """An answer; None if it is something else."""
    found = find(_decoder, body)
    if found is None:
        return None
    blocks = found.output.message.content
    texts = [block.text for block in blocks if block.text is not None]
    thoughts = [
        block.reasoningContent.reasoningText.text
        for block in blocks
        if block.reasoningContent and block.reasoningContent.reasoningText
    ]
    finish = _FINISHES.get(found.stopReason, Finish.CONTENT_FILTER)
    is_refusal = finish is Finish.CONTENT_FILTER
    choice = Choice(
        finish=finish,
        text="".join(texts) if texts else None,
        refusal=answers.ended_by(_NAME, found.stopReason) if is_refusal else None,
        reasoning=[thought for thought in thoughts if thought not in ("", _REDACTED)],
        calls=[
            answers.make_call(used.toolUseId, used.name, used.input)
            for used in (block.toolUse for block in blocks)
            if used
        ],
    )
    return Answer(
        id=answers.make_id(body),
        model=model,
        choices=[choice],
        usage=_read_usage(found.usage),
        created_at=created_at,
    )


def _read_usage(usage: _Usage) -> Usage:
    # What came from the cache is part of the total, and not always of the input.
    inputs = max(usage.inputTokens, usage.totalTokens - usage.outputTokens)
    return Usage(
        input=inputs,
        cached=usage.cacheReadInputTokenCount or 0,
        cache_written=usage.cacheWriteInputTokenCount or 0,
        output=usage.outputTokens,
    )
