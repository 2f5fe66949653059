"""Whatever comes in: it is translated, or a field is named. Nothing else is raised."""

import json
from types import ModuleType
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import CreateEmbeddingResponse
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from penstock.upstream.base import Failure
from penstock.upstream.translation import anthropic, bedrock, gemini, mistral
from penstock.upstream.translation.base import Untranslatable
from tests.unit.translation.bodies import (
    CHAT,
    CITY_FORMAT,
    EMBEDDINGS,
    LOOSE_TOOL,
    PNG,
    RESPONSES,
    WEATHER_TOOL,
    Json,
    call,
)

Provider = tuple[ModuleType, str]
PROVIDERS: list[Provider] = [
    (anthropic, "claude-3-5-haiku-20241022"),
    (anthropic, "claude-sonnet-4-5-20250929"),
    (anthropic, "claude-sonnet-5-5"),
    (gemini, "gemini-2.5-flash"),
    (gemini, "gemini-3.8-flash"),
    (mistral, "mistral-small-latest"),
    (bedrock, "us.anthropic.claude-sonnet-4-5-20250929-v1:0"),
    (bedrock, "global.amazon.nova-2-lite-v1:0"),
    (bedrock, "meta.llama3-8b-instruct-v1:0"),
    (bedrock, "mistral.mistral-large-2407-v1:0"),
    (bedrock, "mistral.mixtral-8x7b-instruct-v0:1"),
    (bedrock, "amazon.titan-embed-text-v2:0"),
    (bedrock, "cohere.embed-v4:0"),
]
providers = st.sampled_from(PROVIDERS)
often = settings(max_examples=300, deadline=None)
ENDPOINTS = [CHAT, RESPONSES, EMBEDDINGS, "/v1/messages", "/v1/moderations"]

texts = st.sampled_from(["Hello.", "", "<|eot_id|>", "[INST]", "Grüße \u2028 🌊", "x" * 200])
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
images = st.sampled_from(
    ["https://example.com/a.png", "https://example.com/a", f"data:image/png;base64,{PNG}"]
).map(lambda url: {"type": "image_url", "image_url": {"url": url}})
text_parts = texts.map(lambda text: {"type": "text", "text": text})
users = st.builds(
    lambda content: {"role": "user", "content": content},
    texts | st.lists(text_parts | images, max_size=3),
)


@st.composite
def talks(draw: st.DrawFn) -> list[Json]:
    messages: list[Json] = []
    if draw(st.booleans()):
        role = draw(st.sampled_from(["system", "developer"]))
        messages.append({"role": role, "content": draw(texts)})
    messages.append(draw(users))
    for turn in range(draw(st.integers(0, 3))):
        if draw(st.booleans()):
            ids = [f"call_{turn}_{nth}" for nth in range(draw(st.integers(1, 3)))]
            calls = [call(each, "Paris") for each in ids]
            messages.append({"role": "assistant", "tool_calls": calls})
            messages += [
                {"role": "tool", "tool_call_id": each, "content": draw(texts)} for each in ids
            ]
        messages.append({"role": "assistant", "content": draw(texts)})
        messages.append(draw(users))
    return messages


FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "frequency_penalty": st.sampled_from([0, 0.5, 3]),
    "logprobs": st.booleans(),
    "max_completion_tokens": st.sampled_from([None, 1, 5000]),
    "metadata": st.just({"a": "b"}),
    "n": st.integers(1, 9),
    "parallel_tool_calls": st.booleans(),
    "presence_penalty": st.sampled_from([0, 0.5]),
    "reasoning_effort": st.sampled_from(["none", "minimal", "low", "high", "xhigh", "max"]),
    "response_format": st.sampled_from(
        [{"type": "text"}, {"type": "json_object"}, CITY_FORMAT]
    ),
    "seed": st.integers(0, 1 << 40),
    "stop": st.sampled_from(["END", ["a", "b", "c", "d"]]),
    "temperature": st.sampled_from([0, 0.5, 1, 1.5]),
    "tool_choice": st.sampled_from(["auto", "none", "required"]),
    "tools": st.sampled_from([[WEATHER_TOOL], [LOOSE_TOOL]]),
    "top_k": st.integers(1, 50),
    "top_p": st.sampled_from([0.5, 1]),
}
chats = st.builds(
    lambda messages, fields: {"model": "m", "messages": messages, **fields},
    talks(),
    st.fixed_dictionaries({}, optional=FIELDS) | st.just({}),
)


def translate(provider: Provider, endpoint: str, body: bytes) -> bytes | None:
    """The translated body; None if a field was named instead."""
    module, model = provider
    try:
        return module.translate_request(endpoint, model, body)
    except Untranslatable as refused:
        assert refused.message
        return None


@often
@given(provider=providers, body=chats)
def test_any_chat_is_translated_or_names_a_field(provider: Provider, body: Json) -> None:
    module, model = provider
    try:
        written = module.translate_request(CHAT, model, json.dumps(body).encode())
    except Untranslatable as refused:
        assert refused.field.partition(".")[0].partition("[")[0] in {"url", *body}
    else:
        assert isinstance(json.loads(written), dict)


@often
@given(provider=providers, talk=talks())
def test_a_talk_alone_keeps_every_word(provider: Provider, talk: list[Json]) -> None:
    body = json.dumps({"messages": talk, "tools": [LOOSE_TOOL]}).encode()
    if (written := translate(provider, CHAT, body)) is not None:
        told = json.dumps(json.loads(written), ensure_ascii=False)
        for message in talk:
            content = message.get("content")
            parts = content if isinstance(content, list) else [{"text": content or ""}]
            for part in parts:
                if text := part.get("text"):
                    assert json.dumps(text, ensure_ascii=False)[1:-1] in told


@often
@given(
    provider=providers,
    endpoint=st.sampled_from(ENDPOINTS),
    body=st.binary() | st.text().map(str.encode),
)
def test_any_bytes_are_refused_at_most(provider: Provider, endpoint: str, body: bytes) -> None:
    translate(provider, endpoint, body)


@often
@given(
    provider=providers,
    endpoint=st.sampled_from(ENDPOINTS),
    body=st.dictionaries(
        st.sampled_from(["messages", "input", "tools", "text", "stop", "model", "reasoning"]),
        json_values
        | st.lists(
            st.dictionaries(
                st.sampled_from(["role", "type", "content", "name", "output", "call_id"]),
                st.sampled_from(["user", "assistant", "tool", "message", "function"])
                | json_values,
            ),
            max_size=3,
        ),
    ),
)
def test_any_json_is_refused_at_most(provider: Provider, endpoint: str, body: Json) -> None:
    translate(provider, endpoint, json.dumps(body).encode())


ANSWER_KEYS = [
    "type", "content", "id", "usage", "stop_reason", "error", "message", "candidates",
    "usageMetadata", "promptFeedback", "output", "outputs", "choices", "generation",
    "embedding", "embeddings", "errorCode", "errorMessage", "results", "values", "parts",
    "text", "functionCall", "finishReason", "input_tokens", "code", "status",
]  # fmt: skip
answer_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.integers() | st.floats(allow_nan=False) | st.sampled_from(
        ["message", "error", "text", "tool_use", "STOP", "end_turn", "x"]
    ),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(ANSWER_KEYS), inner, max_size=5),
    max_leaves=12,
)  # fmt: skip


@often
@given(
    provider=providers,
    endpoint=st.sampled_from(ENDPOINTS[:4]),
    answer=st.binary()
    | st.dictionaries(st.sampled_from(ANSWER_KEYS), answer_values).map(
        lambda answer: json.dumps(answer).encode()
    ),
    status_code=st.sampled_from([None, 200, 400, 429, 500]),
)
def test_any_answer_becomes_a_reply(
    provider: Provider, endpoint: str, answer: bytes, status_code: int | None
) -> None:
    module, model = provider
    reply = module.translate_reply(
        endpoint, model, answer, created_at=1, status_code=status_code
    )

    if reply.failure is not None:
        assert (reply.failure, reply.body) == (Failure.INVALID, b"")
        assert status_code in (None, 200)
    elif not reply.is_success:
        assert json.loads(reply.body)["error"]["message"]
    elif endpoint == CHAT:
        ChatCompletion.model_validate_json(reply.body, strict=True)
    elif endpoint == RESPONSES:
        Response.model_validate_json(reply.body, strict=True)
    elif endpoint == EMBEDDINGS:
        CreateEmbeddingResponse.model_validate_json(reply.body, strict=True)
