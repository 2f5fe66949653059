"""Mistral's two forms at InvokeModel: chats, and for the first models one marked text."""

import re
from typing import Any

import msgspec

from penstock.upstream.translation import answers
from penstock.upstream.translation.base import (
    Answer,
    Choice,
    Finish,
    Image,
    MadeCall,
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
from penstock.upstream.translation.prompts import check_plain, join_texts, refuse_marks

_Json = dict[str, Any]
_encode = msgspec.json.encode
_NAME = "Mistral on Bedrock"
_SEES = re.compile(r"mistral\.pixtral")
_PARAMETERS = ("max_tokens", "temperature", "top_p")
_DEFAULT_MAX_TOKENS = 8192
_DEFAULT_PROMPT_MAX_TOKENS = 4096
"""What every such model can write; without a bound Bedrock cuts at fewer."""
_MARKS = ("[INST]", "[/INST]", "<s>", "</s>")
_FINISHES = {"length": Finish.LENGTH, "tool_calls": Finish.TOOL_CALLS}


def build(request: Request, model: str) -> _Json:
    """The body for a model that takes chats."""
    request.refuse_unknown(
        _NAME,
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "top_logprobs",
        "effort",
        "reasoning_summary",
        "one_call",
        "stop",
        "top_k",
    )
    if request.choices != 1:
        request.refuse("choices", f"{_NAME} gives one answer to a request; give 1.")
    if request.output is not None:
        raise Untranslatable(request.output.field, f"{_NAME} writes text; leave it out.")
    request.check_range("temperature", 0, 1, _NAME)
    messages: list[_Json] = []
    if request.system:
        text = "\n\n".join(text.text for text in request.system)
        messages.append({"role": "system", "content": text})
    for turn in request.turns:
        messages += _write_model(turn) if turn.is_model else _write_user(turn, model)
    body: _Json = {"messages": messages, "max_tokens": _DEFAULT_MAX_TOKENS}
    _add_parameters(request, body)
    if tools := _choose_tools(request):
        body["tools"] = [_write_tool(tool) for tool in tools]
        if request.tool_choice:
            mode = request.tool_choice.mode
            body["tool_choice"] = "any" if mode is ToolMode.REQUIRED else mode.value
    return body


def build_prompt(request: Request, _model: str) -> _Json:
    """The body for a model that takes one text."""
    check_plain(request, _NAME)
    for text in request.system:
        refuse_marks(text, _MARKS)
    system = "\n\n".join(text.text for text in request.system)
    prompt = "<s>"
    for index, turn in enumerate(request.turns):
        text = join_texts(turn, _MARKS)
        if turn.is_model:
            prompt += f" {text}</s>"
        else:
            first = f"{system}\n\n" if system and index == 0 else ""
            prompt += f"[INST] {first}{text} [/INST]"
    body: _Json = {"prompt": prompt, "max_tokens": _DEFAULT_PROMPT_MAX_TOKENS}
    _add_parameters(request, body)
    if request.top_k is not None:
        body["top_k"] = request.top_k
    if request.stop:
        body["stop"] = request.stop
    return body


def _add_parameters(request: Request, body: _Json) -> None:
    for field in _PARAMETERS:
        if (value := getattr(request, field)) is not None:
            body[field] = value


def _choose_tools(request: Request) -> list[Tool]:
    """One tool that must be called is the only one told: `any` names none."""
    choice = request.tool_choice
    if choice is None or choice.name is None:
        return request.tools
    return [tool for tool in request.tools if tool.name == choice.name]


def _write_tool(tool: Tool) -> _Json:
    if tool.is_strict:
        raise Untranslatable(
            f"{tool.field}.strict", f"{_NAME} does not hold to a schema strictly; give false."
        )
    function: _Json = {"name": tool.name, "parameters": tool.parameters}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _write_model(turn: Turn) -> list[_Json]:
    texts = [part.text for part in turn.parts if isinstance(part, Text)]
    message: _Json = {"role": "assistant", "content": "\n\n".join(texts)}
    calls = [part for part in turn.parts if isinstance(part, ToolCall)]
    if calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "function": {
                    "name": call.name,
                    "arguments": _encode(call.arguments).decode(),
                },
            }
            for call in calls
        ]
    return [message]


def _write_user(turn: Turn, model: str) -> list[_Json]:
    messages = [
        {"role": "tool", "tool_call_id": part.id, "content": _write_result(part)}
        for part in turn.parts
        if isinstance(part, ToolResult)
    ]
    said = [part for part in turn.parts if isinstance(part, Text | Image)]
    if said:
        messages.append({"role": "user", "content": _write_content(said, model)})
    return messages


def _write_result(result: ToolResult) -> str:
    for part in result.parts:
        if isinstance(part, Image):
            raise Untranslatable(part.field, "Results of tools must be text here.")
    return "".join(part.text for part in result.parts if isinstance(part, Text))


def _write_content(parts: list[Text | Image], model: str) -> Any:
    images = [part for part in parts if isinstance(part, Image)]
    if not images:
        return "\n\n".join(part.text for part in parts if isinstance(part, Text))
    for image in images:
        if not _SEES.search(model):
            raise Untranslatable(image.field, f"{model} takes text only.")
        if image.url:
            raise Untranslatable(image.field, "Only a data URL is taken here.")
    return [
        {"type": "text", "text": part.text}
        if isinstance(part, Text)
        else {
            "type": "image_url",
            "image_url": {"url": f"data:{part.media_type};base64,{part.data}"},
        }
        for part in parts
    ]


# Answers


class _Function(msgspec.Struct):
    name: str
    arguments: str | dict[str, Any] = ""


class _Call(msgspec.Struct):
    function: _Function
    id: str


class _Message(msgspec.Struct):
    content: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct):
    message: _Message
    stop_reason: str | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _ChatAnswer(msgspec.Struct):
    choices: list[_Choice]
    id: str | None = None
    usage: _Usage | None = None


class _Output(msgspec.Struct):
    text: str
    stop_reason: str | None = None


class _TextAnswer(msgspec.Struct):
    outputs: list[_Output]


_chat_decoder = msgspec.json.Decoder(_ChatAnswer)
_text_decoder = msgspec.json.Decoder(_TextAnswer)


def read(body: bytes, model: str, created_at: int) -> Answer | None:
    """An answer to a chat; None if it is something else."""
    found = find(_chat_decoder, body)
    if found is None or not found.choices:
        return None
    usage = found.usage or _Usage()
    return Answer(
        id=found.id or answers.make_id(body),
        model=model,
        choices=[_read_choice(choice) for choice in found.choices],
        usage=Usage(input=usage.prompt_tokens, output=usage.completion_tokens),
        created_at=created_at,
    )


def read_texts(body: bytes, model: str, created_at: int) -> Answer | None:
    """An answer to a text; None if it is something else. It tells no tokens."""
    found = find(_text_decoder, body)
    if found is None or not found.outputs:
        return None
    return Answer(
        id=answers.make_id(body),
        model=model,
        choices=[
            Choice(
                finish=_FINISHES.get(output.stop_reason or "", Finish.STOP),
                text=output.text.removeprefix(" "),
            )
            for output in found.outputs
        ],
        usage=Usage(),
        created_at=created_at,
    )


def _read_choice(choice: _Choice) -> Choice:
    calls = choice.message.tool_calls or []
    reason = choice.stop_reason or choice.finish_reason or ""
    finish = _FINISHES.get(reason, Finish.STOP)
    return Choice(
        finish=Finish.TOOL_CALLS if calls and finish is Finish.STOP else finish,
        text=choice.message.content or (None if calls else ""),
        calls=[_read_call(call) for call in calls],
    )


def _read_call(call: _Call) -> MadeCall:
    given = call.function.arguments
    if isinstance(given, str):
        return MadeCall(call.id, call.function.name, given)
    return answers.make_call(call.id, call.function.name, given)
