"""Mistral's chat completions and embeddings: OpenAI's, but for names, shapes and some fields.

A body with a field that Mistral does not know is refused there as a whole, so only what it
knows is said. Sources: https://docs.mistral.ai/api/endpoint/chat and
https://docs.mistral.ai/api/endpoint/embeddings, 25 November 2026, and the types of its official
client, version 3.7.0.
"""

import hashlib
import re
from typing import Any, cast

import msgspec

from penstock.upstream.base import Reply
from penstock.upstream.translation import answers, chat, embeddings, responses
from penstock.upstream.translation.base import (
    CHAT,
    EMBEDDINGS,
    RESPONSES,
    Alternative,
    Answer,
    Choice,
    Finish,
    Image,
    MadeCall,
    Request,
    Text,
    Token,
    Tool,
    ToolCall,
    ToolMode,
    ToolResult,
    Turn,
    Untranslatable,
    Usage,
    Vectors,
)
from penstock.upstream.translation.decoding import find

_Json = dict[str, Any]
_encode = msgspec.json.encode
_NAME = "Mistral"
_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")
"""The only IDs of calls that Mistral takes."""
_CALL_ID_LENGTH = 9
_SCHEMA_NAME = "answer"
"""Mistral wants one; OpenAI's is not kept, for it changes nothing."""
_MAX_TEMPERATURE = 1.5
_MAX_SEED = (1 << 31) - 1
_PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "max_tokens": "max_tokens",
    "random_seed": "seed",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "reasoning_effort": "effort",
}
_FINISHES = {
    "length": Finish.LENGTH,
    "model_length": Finish.LENGTH,
    "tool_calls": Finish.TOOL_CALLS,
}
_FAILED = "error"
"""As the reason for the end of an answer: there is none."""


def translate_request(endpoint: str, model: str, body: bytes) -> bytes:
    """See `base.Translation`."""
    return _encode({"model": model, **_build(endpoint, body)})


def translate_unnamed(endpoint: str, body: bytes) -> bytes:
    """The body of a line of a batch, whose model stands in the job.

    Raises:
        Untranslatable: As `translate_request`.
    """
    return _encode(_build(endpoint, body))


def locate(endpoint: str, model: str) -> str:
    """Where a line is sent: a response is a chat here."""
    del model
    return CHAT if endpoint == RESPONSES else endpoint


def translate_reply(
    endpoint: str,
    model: str,
    body: bytes,
    *,
    created_at: int,
    status_code: int | None = None,
    request_id: str | None = None,
) -> Reply:
    """See `base.Translation`."""
    if status_code is not None and status_code >= 300:
        return answers.write_error(status_code, read_error(body), request_id)
    if endpoint == EMBEDDINGS:
        vectors = _read_vectors(body, model)
        if vectors is None:
            return answers.unusable(_NAME, request_id)
        return answers.write_vectors(vectors, request_id)
    found = find(_chat_decoder, body)
    if found is None or not found.choices:
        return answers.unusable(_NAME, request_id)
    if all(choice.finish_reason == _FAILED for choice in found.choices):
        return answers.write_error(500, f"{_NAME} failed while it answered.", request_id)
    answer = _read_answer(found, found.id or answers.make_id(body), model, created_at)
    return answers.write(endpoint, answer, request_id)


def read_error(body: bytes) -> str:
    """What an error says, for a person; empty if it says nothing.

    It comes as a text, as an object whose `message` or `detail` tells more, or as a list of
    faults with their places.
    """
    told = find(_any_decoder, body)
    if isinstance(told, str):  # in files of errors, an error is written into a text
        told = find(_any_decoder, told.encode()) or told
    return _say(told)


# Requests


def _build(endpoint: str, body: bytes) -> _Json:
    match endpoint:
        case "/v1/chat/completions":
            return _build_chat(chat.read(body))
        case "/v1/responses":
            return _build_chat(responses.read(body))
        case "/v1/embeddings":
            return _build_embeddings(embeddings.read(body))
        case _:
            raise answers.wrong_endpoint(endpoint, CHAT, RESPONSES, EMBEDDINGS)


def _build_chat(request: Request) -> _Json:
    request.check_range("temperature", 0, _MAX_TEMPERATURE, _NAME)
    request.check_range("seed", 0, _MAX_SEED, _NAME)
    if request.turns[-1].is_model:
        raise Untranslatable(
            f"{request.turns[-1].field}.role", f"{_NAME} wants the user's message last."
        )
    messages: list[_Json] = [
        {"role": "system", "content": text.text} for text in request.system
    ]
    for turn in request.turns:
        messages += [_write_model(turn)] if turn.is_model else _write_user(turn)
    body: _Json = {"messages": messages}
    for wire, field in _PARAMETERS.items():
        if (value := getattr(request, field)) is not None:
            body[wire] = value
    if request.choices > 1:
        body["n"] = request.choices
    if request.stop:
        body["stop"] = request.stop
    if request.top_logprobs is not None:
        body["logprobs"] = True
        body["top_logprobs"] = request.top_logprobs
    if request.output is not None:
        body["response_format"] = _write_format(request.output.schema)
    return body | _write_tools(request)


def _write_tools(request: Request) -> _Json:
    if not request.tools:
        return {}
    body: _Json = {"tools": [_write_tool(tool) for tool in request.tools]}
    if request.one_call:
        body["parallel_tool_calls"] = False
    if choice := request.tool_choice:
        if choice.name is not None:
            body["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        else:
            body["tool_choice"] = (
                "any" if choice.mode is ToolMode.REQUIRED else choice.mode.value
            )
    return body


def _write_tool(tool: Tool) -> _Json:
    function: _Json = {"name": tool.name, "parameters": tool.parameters}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.is_strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def _write_format(schema: _Json | None) -> _Json:
    if schema is None:
        return {"type": "json_object"}
    named = {"name": _SCHEMA_NAME, "schema": schema, "strict": True}
    return {"type": "json_schema", "json_schema": named}


def _write_model(turn: Turn) -> _Json:
    texts = [part.text for part in turn.parts if isinstance(part, Text)]
    calls = [
        {
            "id": _call_id(part.id),
            "type": "function",
            "function": {"name": part.name, "arguments": _encode(part.arguments).decode()},
        }
        for part in turn.parts
        if isinstance(part, ToolCall)
    ]
    message: _Json = {"role": "assistant", "content": "\n\n".join(texts)}
    return message | ({"tool_calls": calls} if calls else {})


def _write_user(turn: Turn) -> list[_Json]:
    messages: list[_Json] = [
        {
            "role": "tool",
            "tool_call_id": _call_id(part.id),
            "name": part.name,
            "content": _write_result(part),
        }
        for part in turn.parts
        if isinstance(part, ToolResult)
    ]
    said = [part for part in turn.parts if isinstance(part, Text | Image)]
    if said:
        messages.append({"role": "user", "content": [_write_part(part) for part in said]})
    return messages


def _write_result(result: ToolResult) -> str:
    for part in result.parts:
        if isinstance(part, Image):
            raise Untranslatable(part.field, "Results of tools must be text here.")
    return "".join(part.text for part in result.parts if isinstance(part, Text))


def _write_part(part: Text | Image) -> _Json:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    url = part.url or f"data:{part.media_type};base64,{part.data}"
    return {"type": "image_url", "image_url": {"url": url}}


def _call_id(given: str) -> str:
    """An ID as Mistral takes it, the same for the same ID."""
    if _CALL_ID.fullmatch(given):
        return given
    return hashlib.sha256(given.encode()).hexdigest()[:_CALL_ID_LENGTH]


def _build_embeddings(request: embeddings.EmbeddingRequest) -> _Json:
    request.refuse_input_type(_NAME)
    body: _Json = {"input": request.texts}
    if request.dimensions is not None:
        body["output_dimension"] = request.dimensions
    return body


# Answers


class _Function(msgspec.Struct):
    name: str
    arguments: str | dict[str, Any] = ""


class _Call(msgspec.Struct):
    function: _Function
    id: str | None = None


class _Thought(msgspec.Struct):
    text: str = ""


class _Chunk(msgspec.Struct):
    type: str
    text: str = ""
    thinking: list[_Thought] | str = ""


class _Message(msgspec.Struct):
    content: str | list[_Chunk] | None = None
    tool_calls: list[_Call] | None = None


class _Scored(msgspec.Struct):
    token: str
    logprob: float
    top_logprobs: "list[_Scored]" = []


class _Logprobs(msgspec.Struct):
    content: list[_Scored] = []


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _InputDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _InputDetails | None = None


class _ChatAnswer(msgspec.Struct):
    choices: list[_Choice]
    id: str | None = None
    model: str | None = None
    created: int | None = None
    usage: _Usage | None = None


class _Vector(msgspec.Struct):
    embedding: list[float]
    index: int = 0


class _EmbeddingAnswer(msgspec.Struct):
    data: list[_Vector]
    model: str | None = None
    usage: _Usage | None = None


_chat_decoder = msgspec.json.Decoder(_ChatAnswer)
_embedding_decoder = msgspec.json.Decoder(_EmbeddingAnswer)
_any_decoder: "msgspec.json.Decoder[Any]" = msgspec.json.Decoder()


def _read_answer(found: _ChatAnswer, answer_id: str, model: str, created_at: int) -> Answer:
    usage = found.usage or _Usage()
    details = usage.prompt_tokens_details or _InputDetails()
    return Answer(
        id=answer_id,
        model=found.model or model,
        choices=[
            _read_choice(choice, f"{answer_id}_{index}")
            for index, choice in enumerate(found.choices)
        ],
        usage=Usage(
            input=usage.prompt_tokens or 0,
            cached=details.cached_tokens or 0,
            output=usage.completion_tokens or 0,
        ),
        created_at=found.created or created_at,
    )


def _read_choice(choice: _Choice, call_prefix: str) -> Choice:
    message = choice.message
    chunks = message.content if isinstance(message.content, list) else []
    text = (
        "".join(chunk.text for chunk in chunks if chunk.type == "text")
        if chunks
        else cast("str | None", message.content or None)
    )
    calls = [
        _read_call(call, f"call_{call_prefix}_{index}")
        for index, call in enumerate(message.tool_calls or [])
    ]
    finish = _FINISHES.get(choice.finish_reason or "", Finish.STOP)
    return Choice(
        finish=Finish.TOOL_CALLS if calls and finish is Finish.STOP else finish,
        text=text or (None if calls else ""),
        reasoning=[_read_thought(chunk) for chunk in chunks if chunk.type == "thinking"],
        calls=calls,
        tokens=None if choice.logprobs is None else _read_tokens(choice.logprobs),
    )


def _read_thought(chunk: _Chunk) -> str:
    if isinstance(chunk.thinking, str):
        return chunk.thinking
    return "".join(thought.text for thought in chunk.thinking)


def _read_call(call: _Call, call_id: str) -> MadeCall:
    given, made_id = call.function.arguments, call.id or call_id
    if isinstance(given, str):
        return MadeCall(made_id, call.function.name, given)
    return answers.make_call(made_id, call.function.name, given)


def _read_tokens(logprobs: _Logprobs) -> list[Token]:
    return [
        Token(
            each.token,
            each.logprob,
            [Alternative(other.token, other.logprob) for other in each.top_logprobs],
        )
        for each in logprobs.content
    ]


def _read_vectors(body: bytes, model: str) -> Vectors | None:
    found = find(_embedding_decoder, body)
    if found is None or not found.data:
        return None
    return Vectors(
        model=found.model or model,
        vectors=[each.embedding for each in sorted(found.data, key=lambda each: each.index)],
        input_tokens=(found.usage or _Usage()).prompt_tokens or 0,
    )


def _say(told: Any) -> str:
    if isinstance(told, str):
        return told
    if isinstance(told, list):
        faults = [_say(fault) for fault in cast("list[Any]", told)[:3]]
        return " ".join(filter(None, faults))
    if not isinstance(told, dict):
        return ""
    fields = cast("dict[str, Any]", told)
    if isinstance(fields.get("msg"), str):
        place = ".".join(map(str, cast("list[Any]", fields.get("loc") or [])))
        return f"{place}: {fields['msg']}." if place else f"{fields['msg']}."
    for name in ("message", "detail", "error"):
        if said := _say(fields.get(name)):
            return said
    return ""
