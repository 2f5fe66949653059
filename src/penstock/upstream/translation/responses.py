"""The body of a response, read into a `Request`."""

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
        "background",
        "background_options",
        "metadata",
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

_KEPT_BY_OPENAI = "Only OpenAI keeps it; give all of it in `input`."
_NO_COUNTERPART = "No provider here has a counterpart; leave it out."
_REFUSED = {
    "access_programs": _NO_COUNTERPART,
    "context_management": _NO_COUNTERPART,
    "conversation": _KEPT_BY_OPENAI,
    "image": _NO_COUNTERPART,
    "max_tool_calls": _NO_COUNTERPART,
    "moderation": _NO_COUNTERPART,
    "previous_response_id": _KEPT_BY_OPENAI,
    "prompt": _KEPT_BY_OPENAI,
}
_ITEMS = "message, function_call, function_call_output, reasoning"


class _Part(msgspec.Struct, tag_field="type", forbid_unknown_fields=True, kw_only=True):
    prompt_cache_breakpoint: Harmless = None


class _InputText(_Part, tag="input_text", kw_only=True):
    text: str


class _InputImage(_Part, tag="input_image", kw_only=True):
    image_url: str | None = None
    file_id: str | None = None
    detail: Literal["auto", "low", "high", "original"] | None = None


class _OutputText(_Part, tag="output_text", kw_only=True):
    text: str
    annotations: Harmless = None
    logprobs: Harmless = None


class _Refusal(_Part, tag="refusal", kw_only=True):
    refusal: str


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[_InputText | _InputImage | _OutputText | _Refusal]
    type: Literal["message"] | None = None
    id: Harmless = None
    status: Harmless = None
    phase: Harmless = None


class _FunctionCall(msgspec.Struct, forbid_unknown_fields=True):
    call_id: str
    name: str
    arguments: str
    type: Literal["function_call"]
    id: Harmless = None
    status: Harmless = None
    caller: None = None
    namespace: None = None


class _FunctionCallOutput(msgspec.Struct, forbid_unknown_fields=True):
    call_id: str
    output: str | list[_InputText | _InputImage]
    type: Literal["function_call_output"]
    id: Harmless = None
    name: Harmless = None
    status: Harmless = None
    caller: None = None
    namespace: None = None


class _Kind(msgspec.Struct):
    type: str | None = None


class _Tool(msgspec.Struct, tag_field="type", tag="function", forbid_unknown_fields=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    defer_loading: Literal[False] | None = None
    output_schema: Harmless = None


class _NamedTool(msgspec.Struct, tag_field="type", tag="function", forbid_unknown_fields=True):
    name: str


class _AllowedTools(
    msgspec.Struct, tag_field="type", tag="allowed_tools", forbid_unknown_fields=True
):
    mode: Literal["auto", "required"]
    tools: list[_NamedTool]


class _TextFormat(msgspec.Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    pass


class _ObjectFormat(
    msgspec.Struct, tag_field="type", tag="json_object", forbid_unknown_fields=True
):
    pass


class _SchemaFormat(
    msgspec.Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True
):
    name: Harmless = None
    description: str | None = None
    schema: Any = None
    strict: bool | None = None


class _TextConfig(msgspec.Struct, forbid_unknown_fields=True):
    format: _TextFormat | _ObjectFormat | _SchemaFormat | None = None
    verbosity: Literal["medium"] | None = None


class _Reasoning(msgspec.Struct, forbid_unknown_fields=True):
    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class _Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    input: str | list[msgspec.Raw]
    model: Harmless = None
    access_programs: Any = None
    background: Harmless = None
    background_options: Harmless = None
    context_management: Any = None
    conversation: Any = None
    image: Any = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: Any = None
    metadata: Harmless = None
    moderation: Any = None
    parallel_tool_calls: bool | None = None
    previous_response_id: Any = None
    prompt: Any = None
    prompt_cache_key: Harmless = None
    prompt_cache_options: Harmless = None
    prompt_cache_retention: Harmless = None
    reasoning: _Reasoning | None = None
    safety_identifier: Harmless = None
    service_tier: Harmless = None
    store: Harmless = None
    stream: Literal[False] | None = None
    stream_options: Harmless = None
    temperature: float | None = None
    text: _TextConfig | None = None
    tool_choice: Literal["auto", "none", "required"] | _NamedTool | _AllowedTools | None = None
    tools: list[_Tool] | None = None
    top_k: int | None = None
    top_logprobs: int | None = None
    top_p: float | None = None
    truncation: Literal["disabled"] | None = None
    user: Harmless = None


_decoder = msgspec.json.Decoder(_Body)
_kind_decoder = msgspec.json.Decoder(_Kind)
_message_decoder = msgspec.json.Decoder(_Message)
_call_decoder = msgspec.json.Decoder(_FunctionCall)
_output_decoder = msgspec.json.Decoder(_FunctionCallOutput)
_NAMES = {
    "max_tokens": "max_output_tokens",
    "one_call": "parallel_tool_calls",
    "effort": "reasoning.effort",
    "reasoning_summary": "reasoning.summary",
}


def read(body: bytes) -> Request:
    """Read the body of a response.

    Raises:
        Untranslatable: It is not one, or no provider has a counterpart to a field of it.
    """
    given = decode(_decoder, body)
    refuse_given(given, _REFUSED)
    builder = TurnsBuilder()
    if given.instructions:
        builder.add_system([Text(given.instructions, "instructions")], "instructions")
    if isinstance(given.input, str):
        builder.add_user([Text(given.input, "input")], "input")
    else:
        for index, item in enumerate(given.input):
            _add_item(builder, item, f"input[{index}]")
    tools, choice = choose_tools(*_read_tools(given))
    reasoning = given.reasoning or _Reasoning()
    wants_tokens = bool(given.include) or bool(given.top_logprobs)
    request = Request(
        system=builder.system,
        turns=builder.finish("input"),
        tools=tools,
        tool_choice=choice,
        one_call=given.parallel_tool_calls is False and bool(tools),
        output=_read_format(given.text),
        stop=[],
        temperature=given.temperature,
        top_p=given.top_p,
        top_k=given.top_k,
        max_tokens=given.max_output_tokens,
        seed=None,
        choices=1,
        presence_penalty=None,
        frequency_penalty=None,
        effort=reasoning.effort,
        reasoning_summary=bool(reasoning.summary or reasoning.generate_summary),
        top_logprobs=(given.top_logprobs or 0) if wants_tokens else None,
        names={**_NAMES, **({} if given.top_logprobs else {"top_logprobs": "include"})},
    )
    check_common(request)
    return request


def _add_item(builder: TurnsBuilder, item: msgspec.Raw, field: str) -> None:
    match decode(_kind_decoder, item, field).type:
        case None | "message":
            _add_message(builder, decode(_message_decoder, item, field), field)
        case "function_call":
            call = decode(_call_decoder, item, field)
            arguments = read_arguments(call.arguments, f"{field}.arguments")
            builder.add_model([ToolCall(call.call_id, call.name, arguments, field)], field)
        case "function_call_output":
            output = decode(_output_decoder, item, field)
            parts = _read_parts(output.output, f"{field}.output")
            builder.add_result(output.call_id, f"{field}.call_id", parts, field)
        case "reasoning":
            pass  # what a model thought in earlier turns; providers drop it as well
        case kind:
            raise Untranslatable(f"{field}.type", f"Invalid value {kind!r}; allowed: {_ITEMS}.")


def _add_message(builder: TurnsBuilder, message: _Message, field: str) -> None:
    parts = _read_parts(message.content, f"{field}.content")
    if message.role == "user":
        builder.add_user(parts, field)
        return
    texts = [part for part in parts if isinstance(part, Text)]
    if len(texts) != len(parts):
        where = next(part.field for part in parts if not isinstance(part, Text))
        raise Untranslatable(where, "Only the user may send images.")
    if message.role == "assistant":
        builder.add_model(list(texts), field)
    else:
        builder.add_system(texts, field)


def _read_parts(
    content: str
    | list[_InputText | _InputImage | _OutputText | _Refusal]
    | list[_InputText | _InputImage],
    field: str,
) -> list[Part]:
    if isinstance(content, str):
        return [Text(content, field)]
    parts: list[Part] = []
    for index, part in enumerate(content):
        where = f"{field}[{index}]"
        match part:
            case _InputText() | _OutputText():
                parts.append(Text(part.text, where))
            case _Refusal():
                parts.append(Text(part.refusal, where))
            case _InputImage():
                if part.file_id is not None:
                    raise Untranslatable(f"{where}.file_id", "Give `image_url` instead.")
                if part.image_url is None:
                    raise Untranslatable(f"{where}.image_url", "This field is required.")
                if part.detail == "low":
                    raise Untranslatable(
                        f"{where}.detail", "Images are sent whole: give `auto` or `high`."
                    )
                parts.append(read_image(part.image_url, f"{where}.image_url"))
    return parts


def _read_tools(
    given: _Body,
) -> tuple[list[Tool], ToolChoice | None, list[str] | None, str]:
    tools = [
        Tool(
            name=tool.name,
            description=tool.description,
            parameters=tool.parameters or {"type": "object", "properties": {}},
            is_strict=bool(tool.strict),
            field=f"tools[{index}]",
        )
        for index, tool in enumerate(given.tools or [])
    ]
    match given.tool_choice:
        case None:
            return tools, None, None, ""
        case str(mode):
            return tools, ToolChoice(ToolMode(mode)), None, "tool_choice"
        case _NamedTool(name=name):
            return tools, ToolChoice(ToolMode.REQUIRED, name), None, "tool_choice.name"
        case _AllowedTools(mode=mode, tools=allowed):
            names = [tool.name for tool in allowed]
            return tools, ToolChoice(ToolMode(mode)), names, "tool_choice.tools"


def _read_format(text: _TextConfig | None) -> OutputFormat | None:
    match text.format if text else None:
        case None | _TextFormat():
            return None
        case _ObjectFormat():
            return OutputFormat("text.format.type")
        case _SchemaFormat(schema=given, description=description):
            schema = read_schema(given, "text.format.schema")
            return OutputFormat("text.format.schema", join_description(schema, description))
