"""Golden examples between OpenAI's bodies and Gemini's.

The shapes on Google's side are those of the reference at
https://ai.google.dev/api/generate-content and https://ai.google.dev/api/embeddings;
`tests/clients` holds them against the official client's types.
"""

import json
from typing import Any

import pytest

from penstock.upstream.base import Failure
from penstock.upstream.translation import gemini
from penstock.upstream.translation.base import Untranslatable
from tests.unit.translation.bodies import (
    CHAT,
    CITY,
    CITY_FORMAT,
    EMBEDDINGS,
    LOOSE_TOOL,
    PNG,
    RESPONSES,
    TOOL_TALK,
    WEATHER,
    WEATHER_TOOL,
    Json,
    chat,
    embeddings,
    image,
    response,
    user,
)

OLD = "gemini-2.0-flash"
BUDGETED = "gemini-2.5-flash"
NEWEST = "gemini-3.8-flash"
HELLO = {"role": "user", "parts": [{"text": "Hello."}]}


def translate(endpoint: str, body: bytes, model: str = NEWEST) -> Any:
    return json.loads(gemini.translate_request(endpoint, model, body))


def reply_to(endpoint: str, answer: Any, status_code: int | None = None) -> Any:
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return gemini.translate_reply(
        endpoint, NEWEST, body, created_at=1_700_000_000, status_code=status_code
    )


class TestRequests:
    def test_a_question_needs_nothing_else(self) -> None:
        assert translate(CHAT, chat()) == {"contents": [HELLO]}

    def test_every_parameter_with_a_counterpart_is_said(self) -> None:
        body = chat(
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": "In French."},
            user("Hello."),
            temperature=1.5,
            top_p=0.9,
            top_k=40,
            max_completion_tokens=100,
            stop="END",
            seed=7,
            n=3,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            logprobs=True,
            top_logprobs=2,
            response_format=CITY_FORMAT,
        )

        assert translate(CHAT, body) == {
            "systemInstruction": {"parts": [{"text": "Be brief."}, {"text": "In French."}]},
            "contents": [HELLO],
            "generationConfig": {
                "temperature": 1.5,
                "topP": 0.9,
                "topK": 40,
                "maxOutputTokens": 100,
                "stopSequences": ["END"],
                "seed": 7,
                "candidateCount": 3,
                "presencePenalty": 0.5,
                "frequencyPenalty": -0.5,
                "responseLogprobs": True,
                "logprobs": 2,
                "responseMimeType": "application/json",
                "responseJsonSchema": CITY,
            },
        }

    def test_json_without_a_schema(self) -> None:
        written = translate(CHAT, chat(response_format={"type": "json_object"}, seed=0))

        assert written["generationConfig"] == {
            "responseMimeType": "application/json",
            "seed": 0,
        }

    @pytest.mark.parametrize(
        ("model", "signature"),
        [
            (BUDGETED, {}),
            (NEWEST, {"thoughtSignature": "skip_thought_signature_validator"}),
        ],
    )
    def test_calls_and_results(self, model: str, signature: Json) -> None:
        written = translate(CHAT, chat(*TOOL_TALK, tools=[LOOSE_TOOL]), model)

        assert written == {
            "contents": [
                {"role": "user", "parts": [{"text": "Weather in Paris and Rome?"}]},
                {
                    "role": "model",
                    "parts": [
                        {
                            "functionCall": {
                                "id": call_id,
                                "name": "get_weather",
                                "args": {"city": city},
                            },
                            **signature,
                        }
                        for call_id, city in (("call_1", "Paris"), ("call_2", "Rome"))
                    ],
                },
                {
                    "role": "user",
                    "parts": [
                        {
                            "functionResponse": {
                                "id": "call_1",
                                "name": "get_weather",
                                "response": {"output": "18 degrees"},
                            }
                        },
                        {
                            "functionResponse": {
                                "id": "call_2",
                                "name": "get_weather",
                                "response": {"output": "25"},
                            }
                        },
                        {"text": "Which is warmer?"},
                    ],
                },
            ],
            "tools": [
                {
                    "functionDeclarations": [
                        {"name": "get_weather", "parametersJsonSchema": WEATHER}
                    ]
                }
            ],
        }

    @pytest.mark.parametrize(
        ("tool", "choice", "calling"),
        [
            (LOOSE_TOOL, "auto", {"mode": "AUTO"}),
            (LOOSE_TOOL, "none", {"mode": "NONE"}),
            (LOOSE_TOOL, "required", {"mode": "ANY"}),
            (
                WEATHER_TOOL,
                {"type": "function", "function": {"name": "get_weather"}},
                {"mode": "ANY", "allowedFunctionNames": ["get_weather"]},
            ),
            (WEATHER_TOOL, None, {"mode": "VALIDATED"}),
            (WEATHER_TOOL, "auto", {"mode": "VALIDATED"}),
        ],
    )
    def test_tool_choice(self, tool: Json, choice: Any, calling: Json) -> None:
        written = translate(CHAT, chat(tools=[tool], tool_choice=choice))

        assert written["toolConfig"] == {"functionCallingConfig": calling}

    def test_images_come_by_address_and_by_value(self) -> None:
        body = chat(
            user(
                [
                    image("https://example.com/cat.JPG?size=1"),
                    image("https://example.com/cat"),
                    image(f"data:image/png;base64,{PNG}"),
                ]
            )
        )

        assert translate(CHAT, body)["contents"][0]["parts"] == [
            {
                "fileData": {
                    "fileUri": "https://example.com/cat.JPG?size=1",
                    "mimeType": "image/jpeg",
                }
            },
            {"fileData": {"fileUri": "https://example.com/cat"}},
            {"inlineData": {"mimeType": "image/png", "data": PNG}},
        ]

    @pytest.mark.parametrize(
        ("model", "effort", "thinking"),
        [
            (BUDGETED, "none", {"thinkingBudget": 0}),
            (BUDGETED, "low", {"thinkingBudget": 1024}),
            (BUDGETED, "high", {"thinkingBudget": 24576}),
            (NEWEST, "minimal", {"thinkingLevel": "MINIMAL"}),
            (NEWEST, "xhigh", {"thinkingLevel": "XHIGH"}),
            ("gemini-flash-latest", "medium", {"thinkingLevel": "MEDIUM"}),
        ],
    )
    def test_effort_is_said_as_the_model_understands_it(
        self, model: str, effort: str, thinking: Json
    ) -> None:
        written = translate(CHAT, chat(reasoning_effort=effort), model)

        assert written["generationConfig"] == {"thinkingConfig": thinking}

    def test_a_response_asks_for_the_same(self) -> None:
        body = response(
            instructions="Be brief.",
            max_output_tokens=50,
            reasoning={"effort": "low", "summary": "auto"},
            include=["message.output_text.logprobs"],
            text={"format": {"type": "json_schema", "name": "city", "schema": CITY}},
        )

        assert translate(RESPONSES, body) == {
            "systemInstruction": {"parts": [{"text": "Be brief."}]},
            "contents": [HELLO],
            "generationConfig": {
                "maxOutputTokens": 50,
                "responseLogprobs": True,
                "responseMimeType": "application/json",
                "responseJsonSchema": CITY,
                "thinkingConfig": {"thinkingLevel": "LOW", "includeThoughts": True},
            },
        }

    @pytest.mark.parametrize("given", ["Hello.", ["Hello."]])
    def test_a_text_to_embed(self, given: Any) -> None:
        body = embeddings(given, dimensions=256, encoding_format="float", user="ada")

        assert translate(EMBEDDINGS, body, "gemini-embedding-001") == {
            "model": "models/gemini-embedding-001",
            "content": {"parts": [{"text": "Hello."}]},
            "outputDimensionality": 256,
        }


class TestRefusals:
    @pytest.mark.parametrize(
        ("endpoint", "model", "body", "field"),
        [
            (CHAT, NEWEST, chat(n=9), "n"),
            (CHAT, NEWEST, chat(seed=1 << 31), "seed"),
            (
                CHAT,
                NEWEST,
                chat(tools=[LOOSE_TOOL], parallel_tool_calls=False),
                "parallel_tool_calls",
            ),
            (CHAT, NEWEST, chat(reasoning_effort="none"), "reasoning_effort"),
            (CHAT, BUDGETED, chat(reasoning_effort="xhigh"), "reasoning_effort"),
            (CHAT, OLD, chat(reasoning_effort="none"), "reasoning_effort"),
            (RESPONSES, OLD, response(reasoning={"summary": "auto"}), "reasoning.summary"),
            (
                CHAT,
                NEWEST,
                chat(user([image(f"data:image/gif;base64,{PNG}")])),
                "messages[0].content[0].image_url.url",
            ),
            (
                CHAT,
                NEWEST,
                chat(user([image("https://[")])),
                "messages[0].content[0].image_url.url",
            ),
            (
                CHAT,
                NEWEST,
                chat(
                    *TOOL_TALK[:3],
                    {
                        "role": "tool",
                        "tool_call_id": "call_2",
                        "content": [image("https://a/b.png")],
                    },
                ),
                "messages[3].content[0].image_url.url",
            ),
            (EMBEDDINGS, NEWEST, embeddings(["a", "b"]), "input"),
            (EMBEDDINGS, NEWEST, embeddings([]), "input"),
            (EMBEDDINGS, NEWEST, embeddings(""), "input"),
            (EMBEDDINGS, NEWEST, embeddings(["a", ""]), "input[1]"),
            (EMBEDDINGS, NEWEST, embeddings([1, 2]), "input[0]"),
            (EMBEDDINGS, NEWEST, embeddings([[1, 2]]), "input[0]"),
            (EMBEDDINGS, NEWEST, embeddings(dimensions=0), "dimensions"),
            (EMBEDDINGS, NEWEST, embeddings(encoding_format="base64"), "encoding_format"),
            (EMBEDDINGS, NEWEST, embeddings(input_type="query"), "input_type"),
            ("/v1/completions", NEWEST, chat(), "url"),
        ],
    )
    def test_what_has_no_counterpart_is_named(
        self, endpoint: str, model: str, body: bytes, field: str
    ) -> None:
        with pytest.raises(Untranslatable) as refused:
            gemini.translate_request(endpoint, model, body)

        assert refused.value.field == field
        assert refused.value.message.endswith(".")


ANSWER: Json = {
    "candidates": [
        {
            "content": {
                "role": "model",
                "parts": [{"text": "Hm.", "thought": True}, {"text": "Bon"}, {"text": "jour."}],
            },
            "finishReason": "STOP",
            "index": 0,
        }
    ],
    "usageMetadata": {
        "promptTokenCount": 10,
        "toolUsePromptTokenCount": 2,
        "cachedContentTokenCount": 4,
        "candidatesTokenCount": 3,
        "thoughtsTokenCount": 5,
        "totalTokenCount": 20,
    },
    "modelVersion": "gemini-3.8-flash-001",
    "responseId": "r1",
}


def candidate(**fields: Any) -> Json:
    return {**ANSWER, "candidates": [{**ANSWER["candidates"][0], **fields}]}


class TestReplies:
    def test_an_answer_becomes_a_chat_completion(self) -> None:
        reply = reply_to(CHAT, ANSWER)

        assert reply.is_success
        assert json.loads(reply.body) == {
            "id": "r1",
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": "gemini-3.8-flash-001",
            "choices": [
                {
                    "index": 0,
                    "message": {
                        "role": "assistant",
                        "content": "Bonjour.",
                        "refusal": None,
                        "annotations": [],
                    },
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": {
                "prompt_tokens": 12,
                "completion_tokens": 8,
                "total_tokens": 20,
                "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": 5},
            },
        }
        assert (reply.input_tokens, reply.cached_tokens) == (12, 4)
        assert (reply.output_tokens, reply.reasoning_tokens) == (8, 5)
        assert reply.total_tokens == 20

    def test_an_answer_becomes_a_response(self) -> None:
        body = json.loads(reply_to(RESPONSES, ANSWER).body)

        assert [item["type"] for item in body["output"]] == ["reasoning", "message"]
        assert body["output"][0]["summary"] == [{"type": "summary_text", "text": "Hm."}]
        assert body["output"][1]["content"][0]["text"] == "Bonjour."

    def test_calls_get_an_id_if_they_have_none(self) -> None:
        parts = [
            {"functionCall": {"name": "a", "args": {"x": 1}}, "thoughtSignature": "AA=="},
            {"functionCall": {"name": "b", "id": "theirs"}},
        ]
        choice = json.loads(reply_to(CHAT, candidate(content={"parts": parts})).body)[
            "choices"
        ][0]

        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        assert [(call["id"], call["function"]) for call in choice["message"]["tool_calls"]] == [
            ("call_r1_0_0", {"name": "a", "arguments": '{"x":1}'}),
            ("theirs", {"name": "b", "arguments": "{}"}),
        ]

    @pytest.mark.parametrize(
        ("reason", "finish_reason"),
        [
            ("STOP", "stop"),
            ("MAX_TOKENS", "length"),
            ("SAFETY", "content_filter"),
            ("RECITATION", "content_filter"),
            ("MALFORMED_FUNCTION_CALL", "content_filter"),
            ("SOMETHING_NEW", "content_filter"),
        ],
    )
    def test_finish_reasons(self, reason: str, finish_reason: str) -> None:
        choice = json.loads(reply_to(CHAT, candidate(finishReason=reason)).body)["choices"][0]

        assert choice["finish_reason"] == finish_reason
        assert (reason in (choice["message"]["refusal"] or "")) is (
            finish_reason == "content_filter"
        )

    def test_a_blocked_prompt_is_a_refusal(self) -> None:
        blocked = {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {}}

        choice = json.loads(reply_to(CHAT, blocked).body)["choices"][0]

        assert choice["finish_reason"] == "content_filter"
        assert choice["message"]["refusal"] == "The prompt was blocked: SAFETY."

    def test_several_candidates_are_several_choices(self) -> None:
        answer = {**ANSWER, "candidates": ANSWER["candidates"] * 2}

        choices = json.loads(reply_to(CHAT, answer).body)["choices"]

        assert [choice["index"] for choice in choices] == [0, 1]

    def test_probabilities_of_tokens(self) -> None:
        chosen = [{"token": "é", "logProbability": -0.5}, {"token": "!", "logProbability": -1}]
        tops = [{"candidates": [chosen[0], {"token": "e", "logProbability": -2}]}]
        result = {"chosenCandidates": chosen, "topCandidates": tops}

        choice = json.loads(reply_to(CHAT, candidate(logprobsResult=result)).body)["choices"][0]

        assert choice["logprobs"]["content"] == [
            {
                "token": "é",
                "logprob": -0.5,
                "bytes": [195, 169],
                "top_logprobs": [
                    {"token": "é", "logprob": -0.5, "bytes": [195, 169]},
                    {"token": "e", "logprob": -2.0, "bytes": [101]},
                ],
            },
            {"token": "!", "logprob": -1.0, "bytes": [33], "top_logprobs": []},
        ]

    def test_an_embedding(self) -> None:
        answer = {"embedding": {"values": [0.5, -1]}, "usageMetadata": {"promptTokenCount": 2}}
        reply = reply_to(EMBEDDINGS, answer)

        assert json.loads(reply.body) == {
            "object": "list",
            "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -1.0]}],
            "model": NEWEST,
            "usage": {"prompt_tokens": 2, "total_tokens": 2},
        }
        assert (reply.input_tokens, reply.total_tokens) == (2, 2)

    @pytest.mark.parametrize(
        ("error", "told", "status", "type_"),
        [
            (
                {"code": 400, "message": "No.", "status": "INVALID_ARGUMENT"},
                400,
                400,
                "invalid_request_error",
            ),
            (
                {"code": 429, "message": "No.", "status": "RESOURCE_EXHAUSTED"},
                None,
                429,
                "rate_limit_error",
            ),
            ({"code": 8, "message": "No."}, None, 429, "rate_limit_error"),
            ({"message": "No.", "status": "UNAVAILABLE"}, None, 503, "server_error"),
            ({"code": 14, "message": "No."}, None, 503, "server_error"),
            ({"code": 16, "message": "No."}, None, 401, "authentication_error"),
            ({"code": 999, "message": "No."}, None, 500, "server_error"),
        ],
    )
    def test_errors(self, error: Json, told: int | None, status: int, type_: str) -> None:
        reply = reply_to(CHAT, {"error": error}, told)

        assert reply.status_code == status
        written = json.loads(reply.body)["error"]
        assert (written["message"], written["type"]) == ("No.", type_)

    @pytest.mark.parametrize("answer", [b"", b"{}", b"\xff", b'{"candidates": []}'])
    @pytest.mark.parametrize("endpoint", [CHAT, RESPONSES, EMBEDDINGS])
    def test_what_is_no_answer_is_a_failure(self, endpoint: str, answer: bytes) -> None:
        reply = reply_to(endpoint, answer)

        assert (reply.failure, reply.status_code) == (Failure.INVALID, None)
