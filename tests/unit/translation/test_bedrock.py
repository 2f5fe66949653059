"""Golden examples between OpenAI's bodies and those of InvokeModel, family by family.

The shapes are those of the pages on inference parameters below
https://docs.aws.amazon.com/bedrock/latest/userguide/model-parameters.html and
https://docs.aws.amazon.com/nova/latest/userguide/complete-request-schema.html; `tests/clients`
holds Nova's against botocore's model of Converse, and Claude's against Anthropic's client.
"""

import json
from typing import Any

import botocore.session
import pytest
from botocore.validate import ParamValidator

from penstock.upstream.base import Failure
from penstock.upstream.translation import bedrock
from penstock.upstream.translation.base import Untranslatable
from tests.unit.translation.bodies import (
    CHAT,
    CITY_FORMAT,
    EMBEDDINGS,
    LOOSE_TOOL,
    PNG,
    RESPONSES,
    SAMPLES,
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
from tests.unit.translation.test_anthropic import HELLO, MESSAGE

CLAUDE = "us.anthropic.claude-sonnet-4-5-20250929-v1:0"
NOVA = "amazon.nova-lite-v1:0"
NOVA_2 = "global.amazon.nova-2-lite-v1:0"
LLAMA_3 = "us.meta.llama3-3-70b-instruct-v1:0"
LLAMA_4 = "us.meta.llama4-scout-17b-instruct-v1:0"
MISTRAL = "mistral.mistral-large-2407-v1:0"
MIXTRAL = "mistral.mixtral-8x7b-instruct-v0:1"
PIXTRAL = "us.mistral.pixtral-large-2502-v1:0"
TITAN_1 = "amazon.titan-embed-text-v1"
TITAN_2 = "amazon.titan-embed-text-v2:0"
COHERE_3 = "cohere.embed-english-v3"
COHERE_4 = "us.cohere.embed-v4:0"
TALK = (
    {"role": "system", "content": "Be brief."},
    {"role": "developer", "content": "In French."},
    user("Hello."),
    {"role": "assistant", "content": "Bonjour."},
    user([{"type": "text", "text": "Who"}, {"type": "text", "text": "are you?"}]),
)


def translate(endpoint: str, body: bytes, model: str) -> Any:
    return json.loads(bedrock.translate_request(endpoint, model, body))


def reply_to(endpoint: str, model: str, answer: Any, status_code: int | None = None) -> Any:
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return bedrock.translate_reply(
        endpoint, model, body, created_at=1_700_000_000, status_code=status_code
    )


def first_choice(model: str, answer: Any) -> Any:
    return json.loads(reply_to(CHAT, model, answer).body)["choices"][0]


class TestFamilies:
    @pytest.mark.parametrize(
        ("model", "field"),
        [
            ("anthropic.claude-3-5-haiku-20241022-v1:0", "anthropic_version"),
            ("eu.anthropic.claude-sonnet-4-5-20250929-v1:0", "anthropic_version"),
            ("us-gov.anthropic.claude-3-5-sonnet-20240620-v1:0", "anthropic_version"),
            (
                "arn:aws:bedrock:us-east-1:1:inference-profile/global.anthropic.claude-opus-4-6-v1",
                "anthropic_version",
            ),
            (
                "arn:aws:bedrock:us-east-1::foundation-model/meta.llama3-8b-instruct-v1:0",
                "max_gen_len",
            ),
            (
                "arn:aws:bedrock:us-east-1:1:custom-model/amazon.nova-lite-v1:0:300k/abc",
                "messages",
            ),
            ("apac.amazon.nova-pro-v1:0", "messages"),
            (MIXTRAL, "prompt"),
            ("mistral.ministral-3-8b-instruct", "max_tokens"),
        ],
    )
    def test_the_id_tells_the_family(self, model: str, field: str) -> None:
        assert field in translate(CHAT, chat(), model)

    @pytest.mark.parametrize(
        "model",
        [
            "",
            "amazon.nova-canvas-v1:0",
            "amazon.nova-2-sonic-v1:0",
            "anthropic.claude-v2",
            "ai21.jamba-1-5-large-v1:0",
            "myanthropic.claude-3-5-haiku-20241022-v1:0",
            "arn:aws:bedrock:us-east-1:1:application-inference-profile/abc123",
        ],
    )
    def test_another_model_is_refused(self, model: str) -> None:
        with pytest.raises(Untranslatable, match=r"anthropic\.claude-\*") as refused:
            translate(CHAT, chat(), model)

        assert refused.value.field == "model"
        assert reply_to(CHAT, model, MESSAGE).failure is Failure.INVALID


class TestClaude:
    def test_the_body_names_no_model(self) -> None:
        assert translate(CHAT, chat(), CLAUDE) == {
            "anthropic_version": "bedrock-2023-05-31",
            "max_tokens": 32_000,
            "messages": [HELLO],
        }

    def test_a_message_body_loses_its_model(self) -> None:
        body = b'{"model": "mine", "max_tokens": 5, "messages": []}'

        assert translate("/v1/messages", body, CLAUDE) == {
            "anthropic_version": "bedrock-2023-05-31",
            "max_tokens": 5,
            "messages": [],
        }

    def test_images_come_by_value_only(self) -> None:
        translate(CHAT, chat(user([image(f"data:image/png;base64,{PNG}")])), CLAUDE)
        with pytest.raises(Untranslatable) as refused:
            translate(CHAT, chat(user([image("https://a/b.png")])), CLAUDE)

        assert refused.value.field == "messages[0].content[0].image_url.url"

    def test_an_answer(self) -> None:
        reply = reply_to(CHAT, CLAUDE, MESSAGE)

        assert (reply.status_code, reply.total_tokens) == (200, 40)
        assert first_choice(CLAUDE, MESSAGE)["message"]["content"] == "Bonjour."
        sent = json.dumps(MESSAGE).encode()
        assert reply_to("/v1/messages", CLAUDE, sent).body == sent


NOVA_ANSWER: Json = {
    "output": {"message": {"role": "assistant", "content": [{"text": "Bonjour."}]}},
    "stopReason": "end_turn",
    "usage": {
        "inputTokens": 10,
        "outputTokens": 7,
        "totalTokens": 42,
        "cacheReadInputTokenCount": 20,
        "cacheWriteInputTokenCount": 5,
    },
}


class TestNova:
    def test_every_parameter_with_a_counterpart_is_said(self) -> None:
        body = chat(*TALK, temperature=0.5, top_p=0.9, top_k=40, max_tokens=100, stop="END")

        assert translate(CHAT, body, NOVA) == {
            "system": [{"text": "Be brief."}, {"text": "In French."}],
            "messages": [
                {"role": "user", "content": [{"text": "Hello."}]},
                {"role": "assistant", "content": [{"text": "Bonjour."}]},
                {"role": "user", "content": [{"text": "Who"}, {"text": "are you?"}]},
            ],
            "inferenceConfig": {
                "maxTokens": 100,
                "temperature": 0.5,
                "topP": 0.9,
                "topK": 40,
                "stopSequences": ["END"],
            },
        }

    def test_calls_results_and_images(self) -> None:
        body = chat(
            *TOOL_TALK[:4],
            user([image(f"data:image/jpeg;base64,{PNG}")]),
            tools=[LOOSE_TOOL],
            tool_choice="auto",
        )

        assert translate(CHAT, body, NOVA) == {
            "messages": [
                {"role": "user", "content": [{"text": "Weather in Paris and Rome?"}]},
                {
                    "role": "assistant",
                    "content": [
                        {
                            "toolUse": {
                                "toolUseId": call_id,
                                "name": "get_weather",
                                "input": {"city": city},
                            }
                        }
                        for call_id, city in (("call_1", "Paris"), ("call_2", "Rome"))
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {
                            "toolResult": {
                                "toolUseId": "call_1",
                                "content": [{"text": "18 degrees"}],
                            }
                        },
                        {"toolResult": {"toolUseId": "call_2", "content": [{"text": "25"}]}},
                        {"image": {"format": "jpeg", "source": {"bytes": PNG}}},
                    ],
                },
            ],
            "toolConfig": {
                "tools": [
                    {"toolSpec": {"name": "get_weather", "inputSchema": {"json": WEATHER}}}
                ],
                "toolChoice": {"auto": {}},
            },
        }

    @pytest.mark.parametrize(
        ("choice", "written"),
        [
            ("required", {"any": {}}),
            (
                {"type": "function", "function": {"name": "get_weather"}},
                {"tool": {"name": "get_weather"}},
            ),
        ],
    )
    def test_tool_choice(self, choice: Any, written: Json) -> None:
        body = chat(tools=[LOOSE_TOOL], tool_choice=choice)

        assert translate(CHAT, body, NOVA)["toolConfig"]["toolChoice"] == written

    @pytest.mark.parametrize(
        ("effort", "written"),
        [
            ("none", {"type": "disabled"}),
            ("minimal", {"type": "enabled", "maxReasoningEffort": "low"}),
            ("high", {"type": "enabled", "maxReasoningEffort": "high"}),
        ],
    )
    def test_effort(self, effort: str, written: Json) -> None:
        body = response(reasoning={"effort": effort})

        assert translate(RESPONSES, body, NOVA_2)["reasoningConfig"] == written

    def test_an_answer(self) -> None:
        reply = reply_to(CHAT, NOVA, NOVA_ANSWER)

        assert first_choice(NOVA, NOVA_ANSWER)["message"]["content"] == "Bonjour."
        assert (reply.input_tokens, reply.cached_tokens) == (35, 20)
        assert (reply.output_tokens, reply.total_tokens) == (7, 42)
        assert json.loads(reply.body)["id"].startswith("answer-")

    def test_calls_and_thoughts(self) -> None:
        blocks = [
            {"reasoningContent": {"reasoningText": {"text": "[REDACTED]"}}},
            {"reasoningContent": {"reasoningText": {"text": "Hm."}}},
            {"toolUse": {"toolUseId": "t1", "name": "f", "input": {"x": 1}}},
        ]
        answer = {"output": {"message": {"content": blocks}}, "stopReason": "tool_use"}

        body = json.loads(reply_to(RESPONSES, NOVA_2, answer).body)

        assert [item["type"] for item in body["output"]] == ["reasoning", "function_call"]
        assert body["output"][0]["summary"] == [{"type": "summary_text", "text": "Hm."}]
        assert (body["output"][1]["call_id"], body["output"][1]["arguments"]) == (
            "t1",
            '{"x":1}',
        )

    @pytest.mark.parametrize(
        ("reason", "finish_reason"),
        [
            ("stop_sequence", "stop"),
            ("max_tokens", "length"),
            ("tool_use", "tool_calls"),
            ("content_filtered", "content_filter"),
            ("guardrail_intervened", "content_filter"),
            ("malformed_tool_use", "content_filter"),
        ],
    )
    def test_stop_reasons(self, reason: str, finish_reason: str) -> None:
        choice = first_choice(NOVA, {**NOVA_ANSWER, "stopReason": reason})

        assert choice["finish_reason"] == finish_reason
        assert (reason in (choice["message"]["refusal"] or "")) is (
            finish_reason == "content_filter"
        )


def test_novas_bodies_are_those_of_converse() -> None:
    """But for what Converse keeps for models' own fields."""
    service = botocore.session.get_session().get_service_model("bedrock-runtime")
    shape = service.operation_model("Converse").input_shape
    checked = 0
    for endpoint, body in SAMPLES:
        for model in (NOVA, NOVA_2):
            try:
                written = translate(endpoint, body, model)
            except Untranslatable:
                continue
            written.pop("reasoningConfig", None)
            written.get("inferenceConfig", {}).pop("topK", None)
            report = ParamValidator().validate({"modelId": model, **written}, shape)
            assert not report.has_errors(), report.generate_report()
            checked += 1

    assert checked >= 10


class TestLlama:
    def test_llama_3(self) -> None:
        body = chat(*TALK, temperature=0.5, top_p=0.9, max_tokens=100)

        assert translate(CHAT, body, LLAMA_3) == {
            "prompt": "<|begin_of_text|>"
            "<|start_header_id|>system<|end_header_id|>\n\nBe brief.\n\nIn French.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHello.<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nBonjour.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWho\n\nare you?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "max_gen_len": 100,
            "temperature": 0.5,
            "top_p": 0.9,
        }

    def test_llama_4(self) -> None:
        assert translate(CHAT, chat(), LLAMA_4) == {
            "prompt": "<|begin_of_text|><|header_start|>user<|header_end|>\n\nHello.<|eot|>"
            "<|header_start|>assistant<|header_end|>\n\n",
            "max_gen_len": 2048,
        }

    @pytest.mark.parametrize(
        ("reason", "finish_reason"), [("stop", "stop"), ("length", "length")]
    )
    def test_an_answer(self, reason: str, finish_reason: str) -> None:
        answer = {
            "generation": "Bonjour.",
            "prompt_token_count": 10,
            "generation_token_count": 7,
            "stop_reason": reason,
        }
        reply = reply_to(CHAT, LLAMA_3, answer)
        choice = first_choice(LLAMA_3, answer)

        assert (choice["message"]["content"], choice["finish_reason"]) == (
            "Bonjour.",
            finish_reason,
        )
        assert (reply.input_tokens, reply.output_tokens) == (10, 7)


class TestMistral:
    def test_a_chat(self) -> None:
        body = chat(
            {"role": "system", "content": "Be brief."},
            *TOOL_TALK,
            tools=[LOOSE_TOOL],
            tool_choice="required",
            temperature=0.5,
        )

        assert translate(CHAT, body, MISTRAL) == {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Weather in Paris and Rome?"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {
                            "id": call_id,
                            "function": {"name": "get_weather", "arguments": arguments},
                        }
                        for call_id, arguments in (
                            ("call_1", '{"city":"Paris"}'),
                            ("call_2", '{"city":"Rome"}'),
                        )
                    ],
                },
                {"role": "tool", "tool_call_id": "call_1", "content": "18 degrees"},
                {"role": "tool", "tool_call_id": "call_2", "content": "25"},
                {"role": "user", "content": "Which is warmer?"},
            ],
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "get_weather", "parameters": WEATHER},
                }
            ],
            "tool_choice": "any",
            "temperature": 0.5,
            "max_tokens": 8192,
        }

    def test_a_tool_that_must_be_called_is_the_only_one_told(self) -> None:
        other = {"type": "function", "function": {"name": "other", "description": "Other."}}
        choice = {"type": "function", "function": {"name": "other"}}
        written = translate(CHAT, chat(tools=[LOOSE_TOOL, other], tool_choice=choice), MISTRAL)

        assert [tool["function"]["name"] for tool in written["tools"]] == ["other"]
        assert written["tool_choice"] == "any"

    def test_an_image_for_a_model_that_sees(self) -> None:
        url = f"data:image/png;base64,{PNG}"
        body = chat(user([{"type": "text", "text": "What?"}, image(url)]))

        assert translate(CHAT, body, PIXTRAL)["messages"][0]["content"] == [
            {"type": "text", "text": "What?"},
            {"type": "image_url", "image_url": {"url": url}},
        ]

    def test_a_prompt(self) -> None:
        body = chat(*TALK, stop=["END"], top_k=5)

        assert translate(CHAT, body, MIXTRAL) == {
            "prompt": "<s>[INST] Be brief.\n\nIn French.\n\nHello. [/INST] Bonjour.</s>"
            "[INST] Who\n\nare you? [/INST]",
            "max_tokens": 4096,
            "stop": ["END"],
            "top_k": 5,
        }

    def test_an_answer_to_a_chat(self) -> None:
        calls = [{"id": "c1", "function": {"name": "f", "arguments": '{"x": 1}'}}]
        message = {"role": "assistant", "content": "", "tool_calls": calls}
        choice = first_choice(
            MISTRAL, {"choices": [{"message": message, "stop_reason": "tool_calls"}]}
        )

        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        assert choice["message"]["tool_calls"] == [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "f", "arguments": '{"x": 1}'},
            }
        ]

    def test_an_answer_of_a_newer_model_tells_tokens(self) -> None:
        answer = {
            "id": "m1",
            "choices": [{"message": {"content": "Hi."}, "finish_reason": "length"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2},
        }
        reply = reply_to(CHAT, PIXTRAL, answer)

        assert json.loads(reply.body)["id"] == "m1"
        assert first_choice(PIXTRAL, answer)["finish_reason"] == "length"
        assert (reply.input_tokens, reply.output_tokens) == (3, 2)

    def test_an_answer_to_a_prompt(self) -> None:
        choice = first_choice(
            MIXTRAL, {"outputs": [{"text": " Bonjour.", "stop_reason": "length"}]}
        )

        assert (choice["message"]["content"], choice["finish_reason"]) == (
            "Bonjour.",
            "length",
        )


class TestEmbeddings:
    @pytest.mark.parametrize(
        ("model", "body", "written"),
        [
            (TITAN_1, embeddings(), {"inputText": "Hello."}),
            (
                TITAN_2,
                embeddings(["Hello."], dimensions=256),
                {"inputText": "Hello.", "dimensions": 256},
            ),
            (
                COHERE_3,
                embeddings(["a", "b"]),
                {
                    "texts": ["a", "b"],
                    "input_type": "search_document",
                    "embedding_types": ["float"],
                },
            ),
            (
                COHERE_4,
                embeddings("a", dimensions=1536, input_type="search_query"),
                {
                    "texts": ["a"],
                    "input_type": "search_query",
                    "embedding_types": ["float"],
                    "output_dimension": 1536,
                },
            ),
        ],
    )
    def test_texts(self, model: str, body: bytes, written: Json) -> None:
        assert translate(EMBEDDINGS, body, model) == written

    @pytest.mark.parametrize(
        ("model", "answer", "vectors", "tokens"),
        [
            (TITAN_1, {"embedding": [0.5, 1], "inputTextTokenCount": 2}, [[0.5, 1.0]], 2),
            (COHERE_3, {"embeddings": [[1], [2]]}, [[1.0], [2.0]], 0),
            (COHERE_4, {"embeddings": {"float": [[1], [2]]}}, [[1.0], [2.0]], 0),
        ],
    )
    def test_vectors(
        self, model: str, answer: Json, vectors: list[list[float]], tokens: int
    ) -> None:
        reply = reply_to(EMBEDDINGS, model, answer)

        data = json.loads(reply.body)["data"]
        assert [each["embedding"] for each in data] == vectors
        assert [each["index"] for each in data] == list(range(len(vectors)))
        assert reply.input_tokens == tokens


FIRST_IMAGE = "messages[0].content[0].image_url.url"


class TestRefusals:
    @pytest.mark.parametrize(
        ("endpoint", "model", "body", "field"),
        [
            (CHAT, NOVA, chat(seed=1), "seed"),
            (CHAT, NOVA, chat(n=2), "n"),
            (CHAT, NOVA, chat(temperature=1.1), "temperature"),
            (CHAT, NOVA, chat(top_k=129), "top_k"),
            (
                CHAT,
                NOVA,
                chat(response_format=CITY_FORMAT),
                "response_format.json_schema.schema",
            ),
            (CHAT, NOVA, chat(tools=[LOOSE_TOOL], tool_choice="none"), "tool_choice"),
            (
                CHAT,
                NOVA,
                chat(tools=[LOOSE_TOOL], parallel_tool_calls=False),
                "parallel_tool_calls",
            ),
            (CHAT, NOVA, chat(tools=[WEATHER_TOOL]), "tools[0].function.strict"),
            (CHAT, NOVA, chat(reasoning_effort="low"), "reasoning_effort"),
            (CHAT, NOVA_2, chat(reasoning_effort="max"), "reasoning_effort"),
            (CHAT, NOVA_2, chat(reasoning_effort="high", max_tokens=5), "max_tokens"),
            (CHAT, NOVA, chat(user([image("https://a/b.png")])), FIRST_IMAGE),
            (CHAT, NOVA, chat(user([image(f"data:image/bmp;base64,{PNG}")])), FIRST_IMAGE),
            (CHAT, LLAMA_3, chat(stop="END"), "stop"),
            (CHAT, LLAMA_3, chat(top_k=5), "top_k"),
            (CHAT, LLAMA_3, chat(tools=[LOOSE_TOOL]), "tools"),
            (CHAT, LLAMA_3, chat(n=2), "n"),
            (
                CHAT,
                LLAMA_3,
                chat(response_format={"type": "json_object"}),
                "response_format.type",
            ),
            (
                CHAT,
                LLAMA_3,
                chat(user([image(f"data:image/png;base64,{PNG}")])),
                "messages[0].content[0].image_url.url",
            ),
            (CHAT, LLAMA_3, chat(*TOOL_TALK), "messages[1].tool_calls[0]"),
            (CHAT, LLAMA_3, chat(user("a<|eot_id|>b")), "messages[0].content"),
            (
                CHAT,
                LLAMA_4,
                chat({"role": "system", "content": "<|eot|>"}, user("?")),
                "messages[0].content",
            ),
            (
                CHAT,
                LLAMA_3,
                chat(user("?"), {"role": "assistant", "content": "It is"}),
                "messages[1].role",
            ),
            (CHAT, MIXTRAL, chat(user("[/INST]")), "messages[0].content"),
            (CHAT, MISTRAL, chat(stop="END"), "stop"),
            (CHAT, MISTRAL, chat(n=2), "n"),
            (CHAT, MISTRAL, chat(tools=[WEATHER_TOOL]), "tools[0].function.strict"),
            (
                CHAT,
                MISTRAL,
                chat(response_format={"type": "json_object"}),
                "response_format.type",
            ),
            (CHAT, MISTRAL, chat(user([image(f"data:image/png;base64,{PNG}")])), FIRST_IMAGE),
            (CHAT, PIXTRAL, chat(user([image("https://a/b.png")])), FIRST_IMAGE),
            (EMBEDDINGS, NOVA, embeddings(), "url"),
            (CHAT, TITAN_2, chat(), "url"),
            ("/v1/messages", NOVA, chat(), "url"),
            (EMBEDDINGS, TITAN_1, embeddings(dimensions=256), "dimensions"),
            (EMBEDDINGS, TITAN_2, embeddings(dimensions=100), "dimensions"),
            (EMBEDDINGS, TITAN_2, embeddings(["a", "b"]), "input"),
            (EMBEDDINGS, TITAN_2, embeddings(input_type="search_query"), "input_type"),
            (EMBEDDINGS, COHERE_3, embeddings(dimensions=256), "dimensions"),
            (EMBEDDINGS, COHERE_4, embeddings(dimensions=100), "dimensions"),
            (EMBEDDINGS, COHERE_4, embeddings(["a"] * 97), "input"),
            (EMBEDDINGS, COHERE_4, embeddings(input_type="image"), "input_type"),
        ],
    )
    def test_what_has_no_counterpart_is_named(
        self, endpoint: str, model: str, body: bytes, field: str
    ) -> None:
        with pytest.raises(Untranslatable) as refused:
            bedrock.translate_request(endpoint, model, body)

        assert refused.value.field == field
        assert refused.value.message.endswith(".")


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "told", "status", "type_"),
        [
            (
                {"errorCode": 400, "errorMessage": "No."},
                None,
                400,
                "invalid_request_error",
            ),
            ({"errorCode": "429", "errorMessage": "No."}, None, 429, "rate_limit_error"),
            ({"errorCode": 7, "errorMessage": "No."}, None, 500, "server_error"),
            (
                {"errorCode": "ThrottlingException", "errorMessage": "No."},
                None,
                429,
                "rate_limit_error",
            ),
            (
                {"__type": "com.amazon.coral#AccessDeniedException", "message": "No."},
                None,
                403,
                "permission_error",
            ),
            ({"errorMessage": "No."}, None, 500, "server_error"),
            ({"message": "No."}, 503, 503, "server_error"),
            ({"message": "No."}, 424, 424, "server_error"),
        ],
    )
    @pytest.mark.parametrize("model", [CLAUDE, NOVA, LLAMA_3, MISTRAL, TITAN_2])
    def test_errors(
        self, model: str, error: Json, told: int | None, status: int, type_: str
    ) -> None:
        reply = reply_to(CHAT, model, error, told)

        assert reply.status_code == status
        written = json.loads(reply.body)["error"]
        assert (written["message"], written["type"]) == ("No.", type_)

    @pytest.mark.parametrize("answer", [b"", b"{}", b"\xff", b'{"choices": []}', b"[]"])
    @pytest.mark.parametrize(
        "model", [CLAUDE, NOVA, LLAMA_3, MISTRAL, MIXTRAL, TITAN_2, COHERE_4]
    )
    def test_what_is_no_answer_is_a_failure(self, model: str, answer: bytes) -> None:
        endpoint = EMBEDDINGS if "embed" in model else CHAT
        reply = reply_to(endpoint, model, answer)

        assert (reply.failure, reply.status_code) == (Failure.INVALID, None)
