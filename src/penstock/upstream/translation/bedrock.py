"""Amazon Bedrock's InvokeModel, whose body is each model's own.

The model's ID tells its family, also with a region before it (`us.`, `global.`) or inside an
ARN that names the model. Sources: the pages on inference parameters of each family on
docs.aws.amazon.com; the addresses and what was read from them are in `docs/translation.md`.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from penstock.upstream.base import Reply
from penstock.upstream.translation import (
    answers,
    anthropic,
    bedrock_llama,
    bedrock_mistral,
    bedrock_nova,
    chat,
    embeddings,
    responses,
)
from penstock.upstream.translation.base import (
    CHAT,
    EMBEDDINGS,
    RESPONSES,
    Answer,
    Request,
    Untranslatable,
    Vectors,
)
from penstock.upstream.translation.decoding import decode, find

_Json = dict[str, Any]
_encode = msgspec.json.encode
_NAME = "Bedrock"
_ANTHROPIC_VERSION = "bedrock-2023-05-31"
_TITAN_DIMENSIONS = (256, 512, 1024)
_COHERE_DIMENSIONS = (256, 512, 1024, 1536)
_COHERE_TYPES = ("search_document", "search_query", "classification", "clustering")
_COHERE_TEXTS = 96
"""The most texts of one request."""


def _build_claude(request: Request, model: str) -> _Json:
    body = anthropic.build(request, model, image_urls=False)
    return {"anthropic_version": _ANTHROPIC_VERSION, **body}


class _ChatFamily(NamedTuple):
    build: Callable[[Request, str], _Json]
    read: Callable[[bytes, str, int], Answer | None]


class _EmbeddingFamily(NamedTuple):
    build: Callable[[embeddings.EmbeddingRequest, str], _Json]
    read: Callable[[bytes], tuple[list[list[float]], int] | None]
    """The vectors and the tokens of the input, 0 if it does not tell."""


def translate_request(endpoint: str, model: str, body: bytes) -> bytes:
    """See `base.Translation`; a body of `/v1/messages` passes to Claude but for its model."""
    family = _family(model)
    if isinstance(family, _EmbeddingFamily):
        if endpoint != EMBEDDINGS:
            raise answers.wrong_endpoint(endpoint, EMBEDDINGS)
        return _encode(family.build(embeddings.read(body), model))
    match endpoint:
        case "/v1/chat/completions":
            return _encode(family.build(chat.read(body), model))
        case "/v1/responses":
            return _encode(family.build(responses.read(body), model))
        case "/v1/messages" if family.build is _build_claude:
            given = decode(_object_decoder, body)
            kept = {name: value for name, value in given.items() if name != "model"}
            return _encode({"anthropic_version": _ANTHROPIC_VERSION, **kept})
        case _:
            raise answers.wrong_endpoint(endpoint, CHAT, RESPONSES)


def translate_reply(
    endpoint: str,
    model: str,
    body: bytes,
    *,
    created_at: int,
    status_code: int | None = None,
    request_id: str | None = None,
) -> Reply:
    """See `base.Translation`; also takes the `error` of a batch's record."""
    if error := find(_error_decoder, body):
        status = _error_status(error, status_code)
        if status is not None:
            return answers.write_error(status, error.errorMessage or error.message, request_id)
    if status_code is not None and status_code >= 300:
        return answers.write_error(status_code, "", request_id)
    family = _find_family(model)
    if family is None or isinstance(family, _EmbeddingFamily) != (endpoint == EMBEDDINGS):
        return answers.unusable(_NAME, request_id)
    if isinstance(family, _EmbeddingFamily):
        found = family.read(body)
        if found is None or not found[0]:
            return answers.unusable(_NAME, request_id)
        vectors = Vectors(model=model, vectors=found[0], input_tokens=found[1])
        return answers.write_vectors(vectors, request_id)
    answer = family.read(body, model, created_at)
    if answer is None:
        return answers.unusable(_NAME, request_id)
    reply = answers.write(endpoint, answer, request_id)
    is_theirs = endpoint == anthropic.MESSAGES
    return msgspec.structs.replace(reply, body=body) if is_theirs else reply


# Embeddings


def _build_titan_1(request: embeddings.EmbeddingRequest, model: str) -> _Json:
    request.refuse_input_type(model)
    if request.dimensions is not None:
        raise Untranslatable("dimensions", f"{model} has one size only; leave it out.")
    return {"inputText": request.one_text(model)}


def _build_titan_2(request: embeddings.EmbeddingRequest, model: str) -> _Json:
    request.refuse_input_type(model)
    body: _Json = {"inputText": request.one_text(model)}
    if request.dimensions is not None:
        _check_dimensions(request.dimensions, _TITAN_DIMENSIONS)
        body["dimensions"] = request.dimensions
    return body


def _build_cohere_3(request: embeddings.EmbeddingRequest, model: str) -> _Json:
    if request.dimensions is not None:
        raise Untranslatable("dimensions", f"{model} has one size only; leave it out.")
    return _build_cohere(request, model)


def _build_cohere_4(request: embeddings.EmbeddingRequest, model: str) -> _Json:
    body = _build_cohere(request, model)
    if request.dimensions is not None:
        _check_dimensions(request.dimensions, _COHERE_DIMENSIONS)
        body["output_dimension"] = request.dimensions
    return body


def _build_cohere(request: embeddings.EmbeddingRequest, model: str) -> _Json:
    if len(request.texts) > _COHERE_TEXTS:
        raise Untranslatable(
            "input", f"There are {len(request.texts)}; {model} takes {_COHERE_TEXTS}."
        )
    kind = request.input_type or _COHERE_TYPES[0]
    if kind not in _COHERE_TYPES:
        allowed = ", ".join(_COHERE_TYPES)
        raise Untranslatable("input_type", f"Invalid value {kind!r}; allowed: {allowed}.")
    return {"texts": request.texts, "input_type": kind, "embedding_types": ["float"]}


def _check_dimensions(dimensions: int, allowed: tuple[int, ...]) -> None:
    if dimensions not in allowed:
        told = ", ".join(map(str, allowed))
        raise Untranslatable("dimensions", f"{dimensions} is not one of {told}.")


class _TitanAnswer(msgspec.Struct):
    embedding: list[float]
    inputTextTokenCount: int = 0  # noqa: N815


class _CohereVectors(msgspec.Struct):
    float: list[list[float]]


class _CohereAnswer(msgspec.Struct):
    embeddings: _CohereVectors | list[list[float]]


_titan_decoder = msgspec.json.Decoder(_TitanAnswer)
_cohere_decoder = msgspec.json.Decoder(_CohereAnswer)
_object_decoder = msgspec.json.Decoder(dict[str, Any])


def _read_titan(body: bytes) -> tuple[list[list[float]], int] | None:
    found = find(_titan_decoder, body)
    return found and ([found.embedding], found.inputTextTokenCount)


def _read_cohere(body: bytes) -> tuple[list[list[float]], int] | None:
    found = find(_cohere_decoder, body)
    if found is None:
        return None
    vectors = found.embeddings
    return (vectors.float if isinstance(vectors, _CohereVectors) else vectors), 0


# Models

_CLAUDE = _ChatFamily(_build_claude, anthropic.read_answer)
_NOVA = _ChatFamily(bedrock_nova.build, bedrock_nova.read)
_LLAMA = _ChatFamily(bedrock_llama.build, bedrock_llama.read)
_MISTRAL_PROMPT = _ChatFamily(bedrock_mistral.build_prompt, bedrock_mistral.read_texts)
_MISTRAL_CHAT = _ChatFamily(bedrock_mistral.build, bedrock_mistral.read)
_FAMILIES: tuple[tuple[re.Pattern[str], _ChatFamily | _EmbeddingFamily], ...] = tuple(
    (re.compile(rf"(?:^|[./]){pattern}"), family)
    for pattern, family in (
        (r"anthropic\.claude-(?!v2|instant)", _CLAUDE),
        (r"amazon\.nova-(?:2-)?(?:micro|lite|pro|premier|omni)", _NOVA),
        (r"meta\.llama[34]", _LLAMA),
        (r"mistral\.(?:mistral-7b|mixtral-8x7b|mistral-small-2402)", _MISTRAL_PROMPT),
        (r"mistral\.", _MISTRAL_CHAT),
        (
            r"amazon\.titan-embed-(?:text-v1|g1-text)",
            _EmbeddingFamily(_build_titan_1, _read_titan),
        ),
        (r"amazon\.titan-embed-text-v2", _EmbeddingFamily(_build_titan_2, _read_titan)),
        (
            r"cohere\.embed-(?:english|multilingual)-v3",
            _EmbeddingFamily(_build_cohere_3, _read_cohere),
        ),
        (r"cohere\.embed-v4", _EmbeddingFamily(_build_cohere_4, _read_cohere)),
    )
)
"""The first that the ID matches."""
_TOLD_FAMILIES = (
    "anthropic.claude-*, amazon.nova-* for text, meta.llama3*, meta.llama4*, mistral.*, "
    "amazon.titan-embed-text-*, cohere.embed-*"
)


def _find_family(model: str) -> _ChatFamily | _EmbeddingFamily | None:
    return next((family for pattern, family in _FAMILIES if pattern.search(model)), None)


def _family(model: str) -> _ChatFamily | _EmbeddingFamily:
    if (family := _find_family(model)) is not None:
        return family
    raise Untranslatable(
        "model", f"{model} is of no family with a known form; known: {_TOLD_FAMILIES}."
    )


# Errors


class _Error(msgspec.Struct):
    errorCode: int | str | None = None  # noqa: N815
    errorMessage: str = ""  # noqa: N815
    message: str = ""
    kind: str = msgspec.field(default="", name="__type")


_error_decoder = msgspec.json.Decoder(_Error)
_STATUSES = {
    "ValidationException": 400,
    "ServiceQuotaExceededException": 400,
    "AccessDeniedException": 403,
    "ResourceNotFoundException": 404,
    "ModelTimeoutException": 408,
    "ModelErrorException": 424,
    "ModelNotReadyException": 429,
    "ThrottlingException": 429,
    "InternalServerException": 500,
    "ServiceUnavailableException": 503,
}


def _error_status(error: _Error, status_code: int | None) -> int | None:
    """The HTTP status of an error; None if it is none."""
    if status_code is not None and status_code >= 400:
        return status_code
    code = error.errorCode
    if isinstance(code, str) and code.isdecimal() and len(code) == 3:
        code = int(code)
    if isinstance(code, int):
        return code if 400 <= code <= 599 else 500
    name = (code or error.kind).rpartition("#")[2]
    return _STATUSES.get(name, 500) if name or error.errorMessage else None
