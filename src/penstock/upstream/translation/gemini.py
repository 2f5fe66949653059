"""Google's Gemini API, and Gemini at Vertex AI: `generateContent` and `embedContent`.

Sources: the reference of both methods and the guides on thinking, thought signatures and file
input, all on ai.google.dev; the addresses and what was read from them are in
`docs/translation.md`. A body does not name its model: that stands in the address.
"""

import re
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

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
    Part,
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
_NAME = "Gemini"
_MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp", "image/heic", "image/heif")
_BY_SUFFIX = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".heic": "image/heic",
    ".heif": "image/heif",
}
_MAX_CHOICES = 8
_MAX_SEED = (1 << 31) - 1
_VERSION = re.compile(r"gemini-(?:[a-z-]+-)?(\d{1,2})(?:\.(\d{1,2}))?(?![\d])")
_NEWEST = (99, 0)
_MODEL = re.compile(r"[a-z]+[A-Za-z]*(/[A-Za-z0-9_][A-Za-z0-9_.@-]*)+")
_SHOWN_MODEL = 64
_LEVELS = {
    "minimal": "MINIMAL",
    "low": "LOW",
    "medium": "MEDIUM",
    "high": "HIGH",
    "xhigh": "XHIGH",
}
_BUDGET_TOKENS = {"none": 0, "minimal": 1024, "low": 1024, "medium": 8192, "high": 24576}
"""As Google's own OpenAI-compatible endpoint reads an effort."""
_FOREIGN_CALL = "skip_thought_signature_validator"
"""The signature that Google gives for calls which its own model did not make."""


def translate_request(endpoint: str, model: str, body: bytes) -> bytes:
    """See `base.Translation`."""
    match endpoint:
        case "/v1/chat/completions":
            return _encode(_build(chat.read(body), model))
        case "/v1/responses":
            return _encode(_build(responses.read(body), model))
        case "/v1/embeddings":
            return _encode(_build_embedding(embeddings.read(body), model))
        case _:
            raise answers.wrong_endpoint(endpoint, CHAT, RESPONSES, EMBEDDINGS)


def translate_reply(
    endpoint: str,
    model: str,
    body: bytes,
    *,
    created_at: int,
    status_code: int | None = None,
    request_id: str | None = None,
) -> Reply:
    """See `base.Translation`; also takes the errors of a batch, which are no HTTP errors."""
    if error := find(_error_decoder, body):
        status = _error_status(error.error, status_code)
        return answers.write_error(status, error.error.message, request_id)
    if status_code is not None and status_code >= 300:
        return answers.write_error(status_code, "", request_id)
    if endpoint == EMBEDDINGS:
        embedded = find(_embedding_decoder, body)
        if embedded is None:
            return answers.unusable(_NAME, request_id)
        vectors = Vectors(
            model=model,
            vectors=[embedded.embedding.values],
            input_tokens=embedded.usageMetadata.promptTokenCount or 0,
        )
        return answers.write_vectors(vectors, request_id)
    content = find(_content_decoder, body)
    if content is None or not (content.candidates or content.promptFeedback):
        return answers.unusable(_NAME, request_id)
    answer_id = content.responseId or answers.make_id(body)
    answer = _read_answer(content, answer_id, model, created_at)
    return answers.write(endpoint, answer, request_id)


def locate(endpoint: str, model: str) -> str:
    """Where a line is sent, below the address of the API: the model stands in the path.

    Raises:
        Untranslatable: It cannot be the name of a model.
    """
    return f"/{name_model(model)}:{'embed' if endpoint == EMBEDDINGS else 'generate'}Content"


def name_model(model: str) -> str:
    """The full name of a model, such as `models/gemini-2.5-flash`.

    Raises:
        Untranslatable: It cannot be one.
    """
    name = model if "/" in model else f"models/{model}"
    if not _MODEL.fullmatch(name):
        shown = model if len(model) <= _SHOWN_MODEL else f"{model[:_SHOWN_MODEL]}…"
        raise Untranslatable(
            "model", f"{shown!r} cannot be the name of a model of {_NAME}, such as models/NAME."
        )
    return name


# Requests


def _build(request: Request, model: str) -> _Json:
    version = _version(model)
    body: _Json = {"contents": [_write_turn(turn, version) for turn in request.turns]}
    if request.system:
        body["systemInstruction"] = {"parts": [{"text": text.text} for text in request.system]}
    if request.one_call:
        request.refuse("one_call", f"{_NAME} may call several tools at once; leave it out.")
    if request.tools:
        declared = [_write_tool(tool) for tool in request.tools]
        body["tools"] = [{"functionDeclarations": declared}]
        if calling := _write_choice(request):
            body["toolConfig"] = {"functionCallingConfig": calling}
    if config := _write_config(request, model, version):
        body["generationConfig"] = config
    return body


def _version(model: str) -> tuple[int, int]:
    """Of a Gemini model, from its name; models without one are taken for the newest."""
    found = _VERSION.search(model)
    return (int(found[1]), int(found[2] or 0)) if found else _NEWEST


def _write_turn(turn: Turn, version: tuple[int, int]) -> _Json:
    role = "model" if turn.is_model else "user"
    return {"role": role, "parts": [_write_part(part, version) for part in turn.parts]}


def _write_part(part: Part, version: tuple[int, int]) -> _Json:
    match part:
        case Text():
            return {"text": part.text}
        case Image():
            return _write_image(part)
        case ToolCall():
            call = {"id": part.id, "name": part.name, "args": part.arguments}
            signature = {"thoughtSignature": _FOREIGN_CALL} if version >= (3, 0) else {}
            return {"functionCall": call, **signature}
        case ToolResult():
            for each in part.parts:
                if isinstance(each, Image):
                    raise Untranslatable(each.field, "Results of tools must be text here.")
            output = "".join(each.text for each in part.parts if isinstance(each, Text))
            written = {"id": part.id, "name": part.name, "response": {"output": output}}
            return {"functionResponse": written}


def _write_image(image: Image) -> _Json:
    if image.url:
        suffix = PurePosixPath(_path_of(image)).suffix.lower()
        kind = {"mimeType": _BY_SUFFIX[suffix]} if suffix in _BY_SUFFIX else {}
        return {"fileData": {"fileUri": image.url, **kind}}
    if image.media_type not in _MEDIA_TYPES:
        allowed = ", ".join(_MEDIA_TYPES)
        raise Untranslatable(image.field, f"{image.media_type!r} is not one of {allowed}.")
    return {"inlineData": {"mimeType": image.media_type, "data": image.data}}


def _path_of(image: Image) -> str:
    try:
        return urlsplit(image.url).path
    except ValueError as error:
        raise Untranslatable(image.field, f"It is not a URL: {error}.") from error


def _write_tool(tool: Tool) -> _Json:
    written: _Json = {"name": tool.name, "parametersJsonSchema": tool.parameters}
    if tool.description is not None:
        written["description"] = tool.description
    return written


def _write_choice(request: Request) -> _Json | None:
    choice = request.tool_choice
    mode = choice.mode if choice else ToolMode.AUTO
    if mode is ToolMode.NONE:
        return {"mode": "NONE"}
    if mode is ToolMode.REQUIRED:
        names = [choice.name] if choice and choice.name is not None else []
        return {"mode": "ANY", **({"allowedFunctionNames": names} if names else {})}
    if any(tool.is_strict for tool in request.tools):
        return {"mode": "VALIDATED"}
    return {"mode": "AUTO"} if choice else None


def _write_config(request: Request, model: str, version: tuple[int, int]) -> _Json:
    request.check_range("choices", 1, _MAX_CHOICES, _NAME)
    request.check_range("seed", -_MAX_SEED - 1, _MAX_SEED, _NAME)
    config: _Json = {
        wire: value
        for wire, field in _PARAMETERS.items()
        if (value := getattr(request, field)) is not None
    }
    if request.choices > 1:
        config["candidateCount"] = request.choices
    if request.stop:
        config["stopSequences"] = request.stop
    if request.top_logprobs is not None:
        config["responseLogprobs"] = True
        if request.top_logprobs:
            config["logprobs"] = request.top_logprobs
    if request.output is not None:
        config["responseMimeType"] = "application/json"
        if request.output.schema is not None:
            config["responseJsonSchema"] = request.output.schema
    if thinking := _write_thinking(request, model, version):
        config["thinkingConfig"] = thinking
    return config


_PARAMETERS = {
    "temperature": "temperature",
    "topP": "top_p",
    "topK": "top_k",
    "maxOutputTokens": "max_tokens",
    "seed": "seed",
    "presencePenalty": "presence_penalty",
    "frequencyPenalty": "frequency_penalty",
}


def _write_thinking(request: Request, model: str, version: tuple[int, int]) -> _Json:
    """How much to think: a level since version 3, a budget in 2.5."""
    told: _Json = {"includeThoughts": True} if request.reasoning_summary else {}
    if version < (2, 5):
        for field, given in (
            ("effort", request.effort is not None),
            ("reasoning_summary", request.reasoning_summary),
        ):
            if given:
                request.refuse(field, f"{model} does not think; leave it out.")
        return {}
    if request.effort is None:
        return told
    name, table = (
        ("thinkingLevel", _LEVELS) if version >= (3, 0) else ("thinkingBudget", _BUDGET_TOKENS)
    )
    if request.effort not in table:
        allowed = ", ".join(table)
        request.refuse("effort", f"{model} has no {request.effort!r}; allowed: {allowed}.")
    return {name: table[request.effort], **told}


def _build_embedding(request: embeddings.EmbeddingRequest, model: str) -> _Json:
    request.refuse_input_type(_NAME)
    body: _Json = {
        "model": name_model(model),
        "content": {"parts": [{"text": request.one_text(_NAME)}]},
    }
    if request.dimensions is not None:
        body["outputDimensionality"] = request.dimensions
    return body


# Answers, with the names of Google's JSON


class _FunctionCall(msgspec.Struct):
    name: str
    args: dict[str, Any] | None = None
    id: str | None = None


class _Part(msgspec.Struct):
    text: str | None = None
    thought: bool = False
    functionCall: _FunctionCall | None = None  # noqa: N815


class _Content(msgspec.Struct):
    parts: list[_Part] = []


class _Scored(msgspec.Struct):
    token: str = ""
    logProbability: float = 0.0  # noqa: N815


class _Top(msgspec.Struct):
    candidates: list[_Scored] = []


class _Logprobs(msgspec.Struct):
    chosenCandidates: list[_Scored] = []  # noqa: N815
    topCandidates: list[_Top] = []  # noqa: N815


class _Candidate(msgspec.Struct):
    content: _Content = msgspec.field(default_factory=_Content)
    finishReason: str | None = None  # noqa: N815
    finishMessage: str | None = None  # noqa: N815
    logprobsResult: _Logprobs | None = None  # noqa: N815


class _Feedback(msgspec.Struct):
    blockReason: str | None = None  # noqa: N815
    blockReasonMessage: str | None = None  # noqa: N815


class _Usage(msgspec.Struct):
    promptTokenCount: int | None = None  # noqa: N815
    toolUsePromptTokenCount: int | None = None  # noqa: N815
    cachedContentTokenCount: int | None = None  # noqa: N815
    candidatesTokenCount: int | None = None  # noqa: N815
    thoughtsTokenCount: int | None = None  # noqa: N815


class _ContentAnswer(msgspec.Struct):
    candidates: list[_Candidate] = []
    promptFeedback: _Feedback | None = None  # noqa: N815
    usageMetadata: _Usage = msgspec.field(default_factory=_Usage)  # noqa: N815
    modelVersion: str | None = None  # noqa: N815
    responseId: str | None = None  # noqa: N815


class _Vector(msgspec.Struct):
    values: list[float]


class _EmbeddingAnswer(msgspec.Struct):
    embedding: _Vector
    usageMetadata: _Usage = msgspec.field(default_factory=_Usage)  # noqa: N815


class _Error(msgspec.Struct):
    code: int = 0
    message: str = ""
    status: str = ""


class _ErrorBody(msgspec.Struct):
    error: _Error


_content_decoder = msgspec.json.Decoder(_ContentAnswer)
_embedding_decoder = msgspec.json.Decoder(_EmbeddingAnswer)
_error_decoder = msgspec.json.Decoder(_ErrorBody)
_FINISHES = {
    None: Finish.STOP,
    "STOP": Finish.STOP,
    "MAX_TOKENS": Finish.LENGTH,
    "CONTINUATION": Finish.LENGTH,
}
"""All other reasons mean that the provider ended the answer, and are told as a refusal."""
# google.rpc.Code, by number and by name, with the HTTP status that it stands for.
_STATUSES: dict[int | str, int] = {
    status: http
    for number, name, http in (
        (1, "CANCELLED", 499),
        (2, "UNKNOWN", 500),
        (3, "INVALID_ARGUMENT", 400),
        (4, "DEADLINE_EXCEEDED", 504),
        (5, "NOT_FOUND", 404),
        (6, "ALREADY_EXISTS", 409),
        (7, "PERMISSION_DENIED", 403),
        (8, "RESOURCE_EXHAUSTED", 429),
        (9, "FAILED_PRECONDITION", 400),
        (10, "ABORTED", 409),
        (11, "OUT_OF_RANGE", 400),
        (12, "UNIMPLEMENTED", 501),
        (13, "INTERNAL", 500),
        (14, "UNAVAILABLE", 503),
        (15, "DATA_LOSS", 500),
        (16, "UNAUTHENTICATED", 401),
    )
    for status in (number, name)
}


def _error_status(error: _Error, status_code: int | None) -> int:
    for told in (status_code, error.code):
        if told is not None and 400 <= told <= 599:
            return told
    return _STATUSES.get(error.code) or _STATUSES.get(error.status) or 500


def _read_answer(
    content: _ContentAnswer, answer_id: str, model: str, created_at: int
) -> Answer:
    choices = [
        _read_candidate(candidate, f"{answer_id}_{index}")
        for index, candidate in enumerate(content.candidates)
    ]
    return Answer(
        id=answer_id,
        model=content.modelVersion or model,
        choices=choices or [_read_block(content.promptFeedback or _Feedback())],
        usage=_read_usage(content.usageMetadata),
        created_at=created_at,
    )


def _read_block(feedback: _Feedback) -> Choice:
    why = feedback.blockReason or "no reason told"
    refusal = feedback.blockReasonMessage or f"The prompt was blocked: {why}."
    return Choice(finish=Finish.CONTENT_FILTER, refusal=refusal)


def _read_candidate(candidate: _Candidate, call_prefix: str) -> Choice:
    parts = candidate.content.parts
    texts = [part.text for part in parts if part.text is not None and not part.thought]
    calls = [
        answers.make_call(call.id or f"call_{call_prefix}_{index}", call.name, call.args)
        for index, call in enumerate(part.functionCall for part in parts if part.functionCall)
    ]
    finish = _FINISHES.get(candidate.finishReason, Finish.CONTENT_FILTER)
    refusal = None
    if finish is Finish.CONTENT_FILTER:
        refusal = answers.ended_by(_NAME, candidate.finishReason, candidate.finishMessage)
    return Choice(
        finish=Finish.TOOL_CALLS if calls and finish is Finish.STOP else finish,
        text="".join(texts) if texts else None,
        refusal=refusal,
        reasoning=[part.text for part in parts if part.text and part.thought],
        calls=calls,
        tokens=_read_tokens(candidate.logprobsResult),
    )


def _read_tokens(logprobs: _Logprobs | None) -> list[Token] | None:
    if logprobs is None:
        return None
    tops = [top.candidates for top in logprobs.topCandidates]
    tops += [[]] * (len(logprobs.chosenCandidates) - len(tops))
    return [
        Token(
            chosen.token,
            chosen.logProbability,
            [Alternative(each.token, each.logProbability) for each in top],
        )
        for chosen, top in zip(logprobs.chosenCandidates, tops, strict=False)
    ]


def _read_usage(usage: _Usage) -> Usage:
    thoughts = usage.thoughtsTokenCount or 0
    return Usage(
        input=(usage.promptTokenCount or 0) + (usage.toolUsePromptTokenCount or 0),
        cached=usage.cachedContentTokenCount or 0,
        output=(usage.candidatesTokenCount or 0) + thoughts,
        reasoning=thoughts,
    )
