"""The body of a chat completion, read into a `Request`."""

from typing import Any, Literal

import msgspec

from penstock.upstream.translation.base import (
    OutputFormat,
    Part,
    Request,
    Text,
    Tool,
    ToolCall,
    ToolChoice,
    ToolMode,
    Untranslatable,
)
from penstock.upstream.translation.decoding import (
    decode,
    read_arguments,
    read_image,
    read_schema,
)
from penstock.upstream.translation.turns import (
    Effort,
    Harmless,
    TurnsBuilder,
    check_common,
    choose_tools,
    join_description,
    refuse_given,
)

IGNORED = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "stream_options",
        "user",
    }
)
"""Fields that change nothing of the answer; `docs/translation.md` lists them."""

_REFUSED = {
    "audio": "Answers are text; leave it out.",
    "function_call": "Give `tool_choice` instead.",
    "functions": "Give `tools` instead.",
    "logit_bias": "No provider here has a counterpart; leave it out.",
    "moderation": "No provider here has a counterpart; leave it out.",
    "web_search_options": "No provider here has a counterpart; leave it out.",
}


class _Part(msgspec.Struct, tag_field="type", forbid_unknown_fields=True, kw_only=True):
    prompt_cache_breakpoint: Harmless = None


class _TextPart(_Part, tag="text", kw_only=True):
    text: str


class _ImageUrl(msgspec.Struct, forbid_unknown_fields=True):
    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class _ImagePart(_Part, tag="image_url", kw_only=True):
    image_url: _ImageUrl


class _RefusalPart(_Part, tag="refusal", kw_only=True):
    refusal: str


class _Function(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: str


class _Call(msgspec.Struct, tag_field="type", tag="function", forbid_unknown_fields=True):
    id: str
    function: _Function


class _Message(msgspec.Struct, tag_field="role", forbid_unknown_fields=True, kw_only=True):
    name: str | None = None


class _System(_Message, tag="system", kw_only=True):
    content: str | list[_TextPart]


class _Developer(_Message, tag="developer", kw_only=True):
    content: str | list[_TextPart]


class _User(_Message, tag="user", kw_only=True):
    content: str | list[_TextPart | _ImagePart]


class _Assistant(_Message, tag="assistant", kw_only=True):
    content: str | list[_TextPart | _RefusalPart] | None = None
    refusal: str | None = None
    tool_calls: list[_Call] | None = None
    annotations: Harmless = None
    audio: None = None
    function_call: None = None


class _ToolMessage(_Message, tag="tool", kw_only=True):
    tool_call_id: str
    content: str | list[_TextPart | _ImagePart]


class _FunctionTool(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Tool(msgspec.Struct, tag_field="type", tag="function", forbid_unknown_fields=True):
    function: _FunctionTool


class _Name(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class _NamedTool(msgspec.Struct, tag_field="type", tag="function", forbid_unknown_fields=True):
    function: _Name


class _AllowedList(msgspec.Struct, forbid_unknown_fields=True):
    mode: Literal["auto", "required"]
    tools: list[_NamedTool]


class _AllowedTools(
    msgspec.Struct, tag_field="type", tag="allowed_tools", forbid_unknown_fields=True
):
    allowed_tools: _AllowedList


class _TextFormat(msgspec.Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    pass


class _ObjectFormat(
    msgspec.Struct, tag_field="type", tag="json_object", forbid_unknown_fields=True
):
    pass


class _JsonSchema(msgspec.Struct, forbid_unknown_fields=True):
    name: Harmless = None
    description: str | None = None
    schema: Any = None
    strict: bool | None = None


class _SchemaFormat(
    msgspec.Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True
):
    json_schema: _JsonSchema


class _Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: Harmless = None
    messages: list[_System | _Developer | _User | _Assistant | _ToolMessage]
    audio: Any = None
    frequency_penalty: float | None = None
    function_call: Any = None
    functions: Any = None
    logit_bias: dict[str, Any] | None = None
    logprobs: bool | None = None
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    metadata: Harmless = None
    modalities: list[Literal["text"]] | None = None
    moderation: Any = None
    n: int | None = None
    parallel_tool_calls: bool | None = None
    prediction: Harmless = None
    presence_penalty: float | None = None
    prompt_cache_key: Harmless = None
    prompt_cache_options: Harmless = None
    prompt_cache_retention: Harmless = None
    reasoning_effort: Effort | None = None
    response_format: _TextFormat | _ObjectFormat | _SchemaFormat | None = None
    safety_identifier: Harmless = None
    seed: int | None = None
    service_tier: Harmless = None
    stop: str | list[str] | None = None
    store: Harmless = None
    stream: Literal[False] | None = None
    stream_options: Harmless = None
    temperature: float | None = None
    tool_choice: Literal["auto", "none", "required"] | _NamedTool | _AllowedTools | None = None
    tools: list[_Tool] | None = None
    top_k: int | None = None
    top_logprobs: int | None = None
    top_p: float | None = None
    user: Harmless = None
    verbosity: Literal["medium"] | None = None
    web_search_options: Any = None


_decoder = msgspec.json.Decoder(_Body)
_NAMES = {"choices": "n", "one_call": "parallel_tool_calls", "effort": "reasoning_effort"}


def read(body: bytes) -> Request:
    """Read the body of a chat completion.

    Raises:
        Untranslatable: It is not one, or no provider has a counterpart to a field of it.
    """
    chat = decode(_decoder, body)
    refuse_given(chat, _REFUSED)
    builder = TurnsBuilder()
    for index, message in enumerate(chat.messages):
        _add_message(builder, message, f"messages[{index}]")
    tools, choice = choose_tools(*_read_tools(chat))
    names = dict(_NAMES)
    if chat.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    names["top_logprobs"] = "logprobs" if chat.top_logprobs is None else "top_logprobs"
    request = Request(
        system=builder.system,
        turns=builder.finish("messages"),
        tools=tools,
        tool_choice=choice,
        one_call=chat.parallel_tool_calls is False and bool(tools),
        output=_read_format(chat),
        stop=[chat.stop] if isinstance(chat.stop, str) else chat.stop or [],
        temperature=chat.temperature,
        top_p=chat.top_p,
        top_k=chat.top_k,
        max_tokens=_read_max_tokens(chat),
        seed=chat.seed,
        choices=1 if chat.n is None else chat.n,
        presence_penalty=chat.presence_penalty or None,
        frequency_penalty=chat.frequency_penalty or None,
        effort=chat.reasoning_effort,
        reasoning_summary=False,
        top_logprobs=_read_top_logprobs(chat),
        names=names,
    )
    check_common(request)
    return request


def _add_message(
    builder: TurnsBuilder,
    message: _System | _Developer | _User | _Assistant | _ToolMessage,
    field: str,
) -> None:
    if message.name is not None:
        raise Untranslatable(
            f"{field}.name", "Participants have no names here; leave it out or say it in text."
        )
    match message:
        case _System() | _Developer():
            builder.add_system(_read_texts(message.content, f"{field}.content"), field)
        case _User():
            builder.add_user(_read_parts(message.content, f"{field}.content"), field)
        case _ToolMessage():
            builder.add_result(
                message.tool_call_id,
                f"{field}.tool_call_id",
                _read_parts(message.content, f"{field}.content"),
                field,
            )
        case _Assistant():
            _add_assistant(builder, message, field)


def _add_assistant(builder: TurnsBuilder, message: _Assistant, field: str) -> None:
    parts: list[Part] = [*_read_texts(message.content or [], f"{field}.content")]
    if message.refusal:
        parts.append(Text(message.refusal, f"{field}.refusal"))
    for index, call in enumerate(message.tool_calls or []):
        where = f"{field}.tool_calls[{index}]"
        arguments = read_arguments(call.function.arguments, f"{where}.function.arguments")
        parts.append(ToolCall(call.id, call.function.name, arguments, where))
    builder.add_model(parts, field)


def _read_texts(
    content: "str | list[_TextPart] | list[_TextPart | _RefusalPart]", field: str
) -> list[Text]:
    if isinstance(content, str):
        return [Text(content, field)]
    texts: list[Text] = []
    for index, part in enumerate(content):
        text = part.text if isinstance(part, _TextPart) else part.refusal
        texts.append(Text(text, f"{field}[{index}]"))
    return texts


def _read_parts(content: str | list[_TextPart | _ImagePart], field: str) -> list[Part]:
    if isinstance(content, str):
        return [Text(content, field)]
    parts: list[Part] = []
    for index, part in enumerate(content):
        where = f"{field}[{index}]"
        if isinstance(part, _TextPart):
            parts.append(Text(part.text, where))
            continue
        if part.image_url.detail == "low":
            raise Untranslatable(
                f"{where}.image_url.detail", "Images are sent whole: give `auto` or `high`."
            )
        parts.append(read_image(part.image_url.url, f"{where}.image_url.url"))
    return parts


def _read_tools(
    chat: _Body,
) -> tuple[list[Tool], ToolChoice | None, list[str] | None, str]:
    tools = [
        Tool(
            name=tool.function.name,
            description=tool.function.description,
            parameters=tool.function.parameters or {"type": "object", "properties": {}},
            is_strict=bool(tool.function.strict),
            field=f"tools[{index}].function",
        )
        for index, tool in enumerate(chat.tools or [])
    ]
    match chat.tool_choice:
        case None:
            return tools, None, None, ""
        case str(mode):
            return tools, ToolChoice(ToolMode(mode)), None, "tool_choice"
        case _NamedTool(function=function):
            choice = ToolChoice(ToolMode.REQUIRED, function.name)
            return tools, choice, None, "tool_choice.function.name"
        case _AllowedTools(allowed_tools=allowed):
            names = [tool.function.name for tool in allowed.tools]
            choice = ToolChoice(ToolMode(allowed.mode))
            return tools, choice, names, "tool_choice.allowed_tools.tools"


def _read_format(chat: _Body) -> OutputFormat | None:
    match chat.response_format:
        case None | _TextFormat():
            return None
        case _ObjectFormat():
            return OutputFormat("response_format.type")
        case _SchemaFormat(json_schema=given):
            field = "response_format.json_schema.schema"
            schema = read_schema(given.schema, field)
            return OutputFormat(field, join_description(schema, given.description))


def _read_max_tokens(chat: _Body) -> int | None:
    given = chat.max_completion_tokens
    if given is None or chat.max_tokens is None:
        return chat.max_tokens if given is None else given
    if given != chat.max_tokens:
        raise Untranslatable("max_tokens", "Give it or `max_completion_tokens`, not both.")
    return given


def _read_top_logprobs(chat: _Body) -> int | None:
    if chat.logprobs:
        return chat.top_logprobs or 0
    if chat.top_logprobs:
        raise Untranslatable("top_logprobs", "It needs `logprobs` to be true.")
    return None
