"""Answers, embeddings and errors, written as OpenAI's endpoints give them."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from penstock.upstream.base import Failure, Reply
from penstock.upstream.translation.base import (
    CHAT,
    Answer,
    Choice,
    Finish,
    MadeCall,
    Token,
    Untranslatable,
    Usage,
    Vectors,
)

_Json = dict[str, Any]
_encode = msgspec.json.encode


class _Error(NamedTuple):
    type: str
    code: str | None


_ERRORS: dict[int, _Error] = {
    400: _Error("invalid_request_error", None),
    401: _Error("authentication_error", "invalid_api_key"),
    402: _Error("insufficient_quota", "insufficient_quota"),
    403: _Error("permission_error", "permission_denied"),
    404: _Error("not_found_error", "not_found"),
    408: _Error("timeout_error", "timeout"),
    413: _Error("invalid_request_error", "request_too_large"),
    424: _Error("server_error", "model_error"),
    429: _Error("rate_limit_error", "rate_limit_exceeded"),
    500: _Error("server_error", "server_error"),
    503: _Error("server_error", "overloaded"),
    504: _Error("timeout_error", "timeout"),
    529: _Error("server_error", "overloaded"),
}
"""How an error is called in OpenAI's words, by HTTP status."""


def write(endpoint: str, answer: Answer, request_id: str | None) -> Reply:
    """An answer as `/v1/chat/completions` or `/v1/responses` gives it."""
    body = _write_chat(answer) if endpoint == CHAT else _write_response(answer)
    usage = answer.usage
    return Reply(
        status_code=200,
        body=_encode(body),
        request_id=request_id,
        input_tokens=usage.input,
        cached_tokens=usage.cached,
        output_tokens=usage.output,
        reasoning_tokens=usage.reasoning,
        total_tokens=usage.input + usage.output,
    )


def write_vectors(vectors: Vectors, request_id: str | None) -> Reply:
    """Embeddings as `/v1/embeddings` gives them, as numbers."""
    used = vectors.input_tokens
    data = [
        {"object": "embedding", "index": index, "embedding": vector}
        for index, vector in enumerate(vectors.vectors)
    ]
    body = {
        "object": "list",
        "data": data,
        "model": vectors.model,
        "usage": {"prompt_tokens": used, "total_tokens": used},
    }
    return Reply(
        status_code=200,
        body=_encode(body),
        request_id=request_id,
        input_tokens=used,
        total_tokens=used,
    )


def write_error(status_code: int, message: str, request_id: str | None) -> Reply:
    """An error of a provider as OpenAI's error object, with the provider's own message."""
    known = _ERRORS.get(status_code) or _ERRORS[400 if status_code < 500 else 500]
    text = message or f"The provider answered with status {status_code} and no message."
    error = {"message": text, "type": known.type, "param": None, "code": known.code}
    return Reply(status_code=status_code, body=_encode({"error": error}), request_id=request_id)


def write_untranslatable(field: str, message: str) -> Reply:
    """What a line gets instead that was never sent: a 400 that names the field."""
    error = {
        "message": message,
        "type": "invalid_request_error",
        "param": field or None,
        "code": "unsupported_by_provider",
    }
    return Reply(status_code=400, body=_encode({"error": error}))


def unusable(provider: str, request_id: str | None) -> Reply:
    """What a line gets if nothing could be made of what came."""
    return Reply(
        request_id=request_id,
        failure=Failure.INVALID,
        message=f"What came from {provider} is neither an answer nor an error of its API.",
    )


def wrong_endpoint(endpoint: str, *allowed: str) -> Untranslatable:
    told = ", ".join(allowed)
    return Untranslatable("url", f"{endpoint} has no counterpart; allowed: {told}.")


def make_call(call_id: str, name: str, arguments: Mapping[str, Any] | None) -> MadeCall:
    """A call whose arguments came as an object."""
    return MadeCall(call_id, name, _encode(arguments or {}).decode())


def make_id(body: bytes) -> str:
    """An ID for an answer that has none, the same for the same answer."""
    return f"answer-{hashlib.sha256(body).hexdigest()[:24]}"


def ended_by(provider: str, reason: str | None, told: str | None = None) -> str:
    """What a refusal says where the provider ended the answer."""
    return told or f"{provider} ended the answer: {reason}."


# Chat completions


def _write_chat(answer: Answer) -> _Json:
    choices = [_write_choice(index, choice) for index, choice in enumerate(answer.choices)]
    usage = answer.usage
    return {
        "id": answer.id,
        "object": "chat.completion",
        "created": answer.created_at,
        "model": answer.model,
        "choices": choices,
        "usage": {
            "prompt_tokens": usage.input,
            "completion_tokens": usage.output,
            "total_tokens": usage.input + usage.output,
            "prompt_tokens_details": _input_details(usage),
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
        },
    }


def _write_choice(index: int, choice: Choice) -> _Json:
    message: _Json = {
        "role": "assistant",
        "content": choice.text,
        "refusal": choice.refusal,
        "annotations": [],
    }
    if choice.calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in choice.calls
        ]
    tokens = choice.tokens
    logprobs = None if tokens is None else {"content": _write_tokens(tokens), "refusal": None}
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": choice.finish,
    }


# Responses


def _write_response(answer: Answer) -> _Json:
    choice = answer.choices[0]
    reason = _INCOMPLETE.get(choice.finish)
    status = "completed" if reason is None else "incomplete"
    usage = answer.usage
    return {
        "id": answer.id,
        "object": "response",
        "created_at": answer.created_at,
        "status": status,
        "error": None,
        "incomplete_details": None if reason is None else {"reason": reason},
        "instructions": None,
        "metadata": {},
        "model": answer.model,
        "output": _write_items(answer.id, choice, status),
        "parallel_tool_calls": True,
        "temperature": None,
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "usage": {
            "input_tokens": usage.input,
            "input_tokens_details": _input_details(usage),
            "output_tokens": usage.output,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning},
            "total_tokens": usage.input + usage.output,
        },
    }


_INCOMPLETE = {Finish.LENGTH: "max_output_tokens", Finish.CONTENT_FILTER: "content_filter"}


def _write_items(answer_id: str, choice: Choice, status: str) -> list[_Json]:
    items: list[_Json] = []
    if choice.reasoning:
        summary = [{"type": "summary_text", "text": text} for text in choice.reasoning]
        items.append({"id": f"rs_{answer_id}", "type": "reasoning", "summary": summary})
    content: list[_Json] = []
    if choice.text is not None:
        content.append(
            {
                "type": "output_text",
                "text": choice.text,
                "annotations": [],
                "logprobs": _write_tokens(choice.tokens or []),
            }
        )
    if choice.refusal is not None:
        content.append({"type": "refusal", "refusal": choice.refusal})
    if content:
        items.append(
            {
                "id": f"msg_{answer_id}",
                "type": "message",
                "role": "assistant",
                "status": status,
                "content": content,
            }
        )
    items += [
        {
            "id": f"fc_{call.id}",
            "type": "function_call",
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
            "status": "completed",
        }
        for call in choice.calls
    ]
    return items


def _input_details(usage: Usage) -> _Json:
    return {"cached_tokens": usage.cached, "cache_write_tokens": usage.cache_written}


def _write_tokens(tokens: list[Token]) -> list[_Json]:
    return [
        _write_token(token.token, token.logprob)
        | {"top_logprobs": [_write_token(a.token, a.logprob) for a in token.alternatives]}
        for token in tokens
    ]


def _write_token(token: str, logprob: float) -> _Json:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}
