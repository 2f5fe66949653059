"""Golden examples between OpenAI's bodies and the Messages API.

The shapes on Anthropic's side are those of the reference at
https://platform.claude.com/docs/en/api/messages/create; `tests/clients` holds them against the
official client's types.
"""

import json
from typing import Any

import pytest

from penstock.upstream.base import Failure
from penstock.upstream.translation import anthropic
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
    image,
    response,
    user,
)

OLD = "claude-3-5-haiku-20241022"
BUDGETED = "claude-sonnet-4-5-20250929"
ADAPTIVE = "claude-opus-4-6"
NEWEST = "claude-sonnet-5-5"
HELLO = {"role": "user", "content": [{"type": "text", "text": "Hello."}]}


def translate(endpoint: str, body: bytes, model: str = BUDGETED) -> Any:
    return json.loads(anthropic.translate_request(endpoint, model, body))


def reply_to(endpoint: str, answer: Any, status_code: int | None = None) -> Any:
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return anthropic.translate_reply(
        endpoint, BUDGETED, body, created_at=1_700_000_000, status_code=status_code
    )


class TestRequests:
    def test_a_question_gets_the_bound_that_anthropic_needs(self) -> None:
        assert translate(CHAT, chat()) == {
            "model": BUDGETED,
            "max_tokens": 32_000,
            "messages": [HELLO],
        }

    @pytest.mark.parametrize(
        ("model", "tokens"),
        [
            ("claude-3-opus-20240229", 4096),
            (OLD, 8192),
            ("claude-3-7-sonnet-20250219", 32_000),
            ("claude-sonnet-4-20250514", 32_000),
            ("us.anthropic.claude-sonnet-4-5-20250929-v1:0", 32_000),
            ("claude-mythos-preview", 32_000),
        ],
    )
    def test_the_bound_is_what_the_model_can_write(self, model: str, tokens: int) -> None:
        assert translate(CHAT, chat(), model)["max_tokens"] == tokens

    def test_every_parameter_with_a_counterpart_is_said(self) -> None:
        body = chat(
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": [{"type": "text", "text": "In French."}]},
            user("Hello."),
            temperature=0.5,
            top_p=0.9,
            top_k=40,
            max_completion_tokens=100,
            stop=["END", "\n\n"],
            response_format=CITY_FORMAT,
            n=1,
            presence_penalty=0,
            logprobs=False,
            logit_bias={},
        )

        assert translate(CHAT, body) == {
            "model": BUDGETED,
            "max_tokens": 100,
            "system": [
                {"type": "text", "text": "Be brief."},
                {"type": "text", "text": "In French."},
            ],
            "messages": [HELLO],
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 40,
            "stop_sequences": ["END", "\n\n"],
            "output_config": {"format": {"type": "json_schema", "schema": CITY}},
        }

    def test_one_stop_sequence_and_the_older_bound_are_understood(self) -> None:
        written = translate(CHAT, chat(stop="END", max_tokens=7))

        assert (written["stop_sequences"], written["max_tokens"]) == (["END"], 7)

    def test_tool_results_lead_the_turn_that_follows_the_calls(self) -> None:
        written = translate(CHAT, chat(*TOOL_TALK, tools=[WEATHER_TOOL]))

        assert written["messages"] == [
            {
                "role": "user",
                "content": [{"type": "text", "text": "Weather in Paris and Rome?"}],
            },
            {
                "role": "assistant",
                "content": [
                    {
                        "type": "tool_use",
                        "id": "call_1",
                        "name": "get_weather",
                        "input": {"city": "Paris"},
                    },
                    {
                        "type": "tool_use",
                        "id": "call_2",
                        "name": "get_weather",
                        "input": {"city": "Rome"},
                    },
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "call_1",
                        "content": [{"type": "text", "text": "18 degrees"}],
                    },
                    {
                        "type": "tool_result",
                        "tool_use_id": "call_2",
                        "content": [{"type": "text", "text": "25"}],
                    },
                    {"type": "text", "text": "Which is warmer?"},
                ],
            },
        ]
        assert written["tools"] == [
            {
                "name": "get_weather",
                "description": "Get the weather.",
                "input_schema": WEATHER,
                "strict": True,
            }
        ]
        assert "tool_choice" not in written

    @pytest.mark.parametrize(
        ("fields", "choice"),
        [
            ({"tool_choice": "auto"}, {"type": "auto"}),
            ({"tool_choice": "none"}, {"type": "none"}),
            ({"tool_choice": "required"}, {"type": "any"}),
            (
                {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
                {"type": "tool", "name": "get_weather"},
            ),
            (
                {"parallel_tool_calls": False},
                {"type": "auto", "disable_parallel_tool_use": True},
            ),
            (
                {"parallel_tool_calls": False, "tool_choice": "required"},
                {"type": "any", "disable_parallel_tool_use": True},
            ),
            ({"parallel_tool_calls": True}, None),
        ],
    )
    def test_tool_choice(self, fields: Json, choice: Json | None) -> None:
        written = translate(CHAT, chat(tools=[LOOSE_TOOL], **fields))

        assert written.get("tool_choice") == choice

    def test_only_allowed_tools_are_told(self) -> None:
        other = {"type": "function", "function": {"name": "other"}}
        allowed = {
            "mode": "required",
            "tools": [{"type": "function", "function": {"name": "other"}}],
        }
        written = translate(
            CHAT,
            chat(
                tools=[LOOSE_TOOL, other],
                tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
            ),
        )

        assert written["tools"] == [
            {"name": "other", "input_schema": {"type": "object", "properties": {}}}
        ]
        assert written["tool_choice"] == {"type": "any"}

    def test_images_come_by_address_and_by_value(self) -> None:
        body = chat(
            user(
                [
                    {"type": "text", "text": "What is this?"},
                    image("https://example.com/cat.jpg", detail="high"),
                    image(f"data:image/png;base64,{PNG}"),
                ]
            )
        )

        assert translate(CHAT, body)["messages"][0]["content"][1:] == [
            {
                "type": "image",
                "source": {"type": "url", "url": "https://example.com/cat.jpg"},
            },
            {
                "type": "image",
                "source": {"type": "base64", "media_type": "image/png", "data": PNG},
            },
        ]

    @pytest.mark.parametrize(
        ("model", "effort", "thinking", "output"),
        [
            (
                BUDGETED,
                "minimal",
                {"type": "enabled", "budget_tokens": 1024},
                None,
            ),
            (BUDGETED, "high", {"type": "enabled", "budget_tokens": 16384}, None),
            (ADAPTIVE, "minimal", {"type": "adaptive"}, {"effort": "low"}),
            (NEWEST, "xhigh", {"type": "adaptive"}, {"effort": "xhigh"}),
            (NEWEST, "none", {"type": "disabled"}, None),
        ],
    )
    def test_effort_is_said_as_the_model_understands_it(
        self, model: str, effort: str, thinking: Json, output: Json | None
    ) -> None:
        written = translate(CHAT, chat(reasoning_effort=effort), model)

        assert written["thinking"] == thinking
        assert written.get("output_config") == output

    def test_a_budget_stays_below_the_bound(self) -> None:
        written = translate(CHAT, chat(reasoning_effort="high", max_tokens=2000))

        assert written["thinking"]["budget_tokens"] == 1999

    def test_a_response_asks_for_the_same(self) -> None:
        body = response(
            [
                {"role": "developer", "content": "In French."},
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "Weather?"},
                        {
                            "type": "input_image",
                            "image_url": "https://example.com/a.png",
                            "detail": "auto",
                        },
                    ],
                },
                {"type": "reasoning", "id": "rs_1", "summary": []},
                {
                    "type": "function_call",
                    "id": "fc_1",
                    "call_id": "call_1",
                    "name": "get_weather",
                    "arguments": '{"city": "Paris"}',
                    "status": "completed",
                },
                {"type": "function_call_output", "call_id": "call_1", "output": "18"},
                {
                    "type": "message",
                    "id": "msg_1",
                    "role": "assistant",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "18.", "annotations": []}],
                },
                {"role": "user", "content": "Thanks."},
            ],
            instructions="Be brief.",
            max_output_tokens=5000,
            reasoning={"effort": "low", "summary": "auto"},
            text={"format": {"type": "json_schema", "name": "city", "schema": CITY}},
            tools=[{"type": "function", "strict": True, **WEATHER_TOOL["function"]}],
            tool_choice="auto",
        )

        assert translate(RESPONSES, body, NEWEST) == {
            "model": NEWEST,
            "max_tokens": 5000,
            "system": [
                {"type": "text", "text": "Be brief."},
                {"type": "text", "text": "In French."},
            ],
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "Weather?"},
                        {
                            "type": "image",
                            "source": {"type": "url", "url": "https://example.com/a.png"},
                        },
                    ],
                },
                {
                    "role": "assistant",
                    "content": [
                        {
                            "type": "tool_use",
                            "id": "call_1",
                            "name": "get_weather",
                            "input": {"city": "Paris"},
                        }
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "call_1",
                            "content": [{"type": "text", "text": "18"}],
                        }
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "18."}]},
                {"role": "user", "content": [{"type": "text", "text": "Thanks."}]},
            ],
            "tools": [
                {
                    "name": "get_weather",
                    "description": "Get the weather.",
                    "input_schema": WEATHER,
                    "strict": True,
                }
            ],
            "tool_choice": {"type": "auto"},
            "thinking": {"type": "adaptive", "display": "summarized"},
            "output_config": {
                "effort": "low",
                "format": {"type": "json_schema", "schema": CITY},
            },
        }

    def test_a_message_body_passes_but_for_its_model(self) -> None:
        body = b'{"model": "mine", "max_tokens": 5, "messages": [], "cache_control": {}}'

        assert translate("/v1/messages", body) == {**json.loads(body), "model": BUDGETED}


class TestRefusals:
    @pytest.mark.parametrize(
        ("endpoint", "model", "body", "field"),
        [
            (CHAT, BUDGETED, chat(seed=0), "seed"),
            (CHAT, BUDGETED, chat(n=2), "n"),
            (CHAT, BUDGETED, chat(logprobs=True), "logprobs"),
            (CHAT, BUDGETED, chat(logprobs=True, top_logprobs=3), "top_logprobs"),
            (RESPONSES, BUDGETED, response(top_logprobs=3), "top_logprobs"),
            (
                RESPONSES,
                BUDGETED,
                response(include=["message.output_text.logprobs"]),
                "include",
            ),
            (CHAT, BUDGETED, chat(presence_penalty=0.5), "presence_penalty"),
            (CHAT, BUDGETED, chat(frequency_penalty=0.5), "frequency_penalty"),
            (CHAT, BUDGETED, chat(temperature=1.5), "temperature"),
            (CHAT, NEWEST, chat(temperature=0.5), "temperature"),
            (CHAT, NEWEST, chat(top_p=0.5), "top_p"),
            (CHAT, NEWEST, chat(top_k=5), "top_k"),
            (CHAT, OLD, chat(reasoning_effort="low"), "reasoning_effort"),
            (RESPONSES, OLD, response(reasoning={"effort": "low"}), "reasoning.effort"),
            (RESPONSES, NEWEST, response(reasoning={"summary": "auto"}), "reasoning.summary"),
            (
                CHAT,
                NEWEST,
                chat(reasoning_effort="low", tools=[LOOSE_TOOL], tool_choice="required"),
                "tool_choice",
            ),
            (CHAT, BUDGETED, chat(reasoning_effort="low", temperature=0), "temperature"),
            (CHAT, BUDGETED, chat(reasoning_effort="low", max_tokens=1024), "max_tokens"),
            (
                CHAT,
                BUDGETED,
                chat(response_format={"type": "json_object"}),
                "response_format.type",
            ),
            (
                RESPONSES,
                BUDGETED,
                response(text={"format": {"type": "json_object"}}),
                "text.format.type",
            ),
            (
                CHAT,
                BUDGETED,
                chat(user([image(f"data:image/bmp;base64,{PNG}")])),
                "messages[0].content[0].image_url.url",
            ),
            (
                CHAT,
                BUDGETED,
                chat(
                    tools=[
                        {
                            "type": "function",
                            "function": {"name": "x", "parameters": {"type": "string"}},
                        }
                    ]
                ),
                "tools[0].function.parameters.type",
            ),
            (
                CHAT,
                BUDGETED,
                chat(
                    user("?"),
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {
                                "id": "call:1",
                                "type": "function",
                                "function": {"name": "x", "arguments": ""},
                            }
                        ],
                    },
                    {"role": "tool", "tool_call_id": "call:1", "content": "!"},
                ),
                "messages[1].tool_calls[0].id",
            ),
            (EMBEDDINGS, BUDGETED, response(), "url"),
        ],
    )
    def test_what_has_no_counterpart_is_named(
        self, endpoint: str, model: str, body: bytes, field: str
    ) -> None:
        with pytest.raises(Untranslatable) as refused:
            anthropic.translate_request(endpoint, model, body)

        assert refused.value.field == field
        assert refused.value.message.endswith(".")


MESSAGE: Json = {
    "id": "msg_01",
    "type": "message",
    "role": "assistant",
    "model": "claude-sonnet-4-5-20250929",
    "content": [{"type": "text", "text": "Bonjour."}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {
        "input_tokens": 10,
        "cache_creation_input_tokens": 3,
        "cache_read_input_tokens": 20,
        "output_tokens": 7,
        "output_tokens_details": {"thinking_tokens": 4},
        "service_tier": "batch",
    },
}


class TestReplies:
    def test_a_message_becomes_a_chat_completion(self) -> None:
        reply = reply_to(CHAT, MESSAGE)

        assert reply.is_success
        assert json.loads(reply.body) == {
            "id": "msg_01",
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": "claude-sonnet-4-5-20250929",
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
                "prompt_tokens": 33,
                "completion_tokens": 7,
                "total_tokens": 40,
                "prompt_tokens_details": {"cached_tokens": 20, "cache_write_tokens": 3},
                "completion_tokens_details": {"reasoning_tokens": 4},
            },
        }
        assert (reply.input_tokens, reply.cached_tokens) == (33, 20)
        assert (reply.output_tokens, reply.reasoning_tokens) == (7, 4)
        assert reply.total_tokens == 40

    def test_tool_calls_become_calls_with_text_for_arguments(self) -> None:
        blocks = [
            {"type": "thinking", "thinking": "Hm.", "signature": "x"},
            {"type": "text", "text": "Let me see."},
            {
                "type": "tool_use",
                "id": "toolu_1",
                "name": "get_weather",
                "input": {"city": "Rome"},
            },
        ]
        reply = reply_to(CHAT, {**MESSAGE, "content": blocks, "stop_reason": "tool_use"})

        choice = json.loads(reply.body)["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "Let me see."
        assert choice["message"]["tool_calls"] == [
            {
                "id": "toolu_1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city":"Rome"}'},
            }
        ]

    @pytest.mark.parametrize(
        ("stop_reason", "finish_reason", "status"),
        [
            ("end_turn", "stop", "completed"),
            ("stop_sequence", "stop", "completed"),
            ("pause_turn", "stop", "completed"),
            ("max_tokens", "length", "incomplete"),
            ("model_context_window_exceeded", "length", "incomplete"),
            ("refusal", "content_filter", "incomplete"),
        ],
    )
    def test_stop_reasons(self, stop_reason: str, finish_reason: str, status: str) -> None:
        answer = {**MESSAGE, "stop_reason": stop_reason}

        chat_reply = json.loads(reply_to(CHAT, answer).body)
        response_reply = json.loads(reply_to(RESPONSES, answer).body)

        assert chat_reply["choices"][0]["finish_reason"] == finish_reason
        assert response_reply["status"] == status

    def test_a_refusal_says_why(self) -> None:
        details = {"type": "refusal", "category": "bio", "explanation": "Too dangerous."}
        answer = {**MESSAGE, "stop_reason": "refusal", "stop_details": details, "content": []}

        message = json.loads(reply_to(CHAT, answer).body)["choices"][0]["message"]

        assert (message["content"], message["refusal"]) == (None, "Too dangerous.")

    def test_a_message_becomes_a_response(self) -> None:
        blocks = [
            {"type": "thinking", "thinking": "Hm.", "signature": "x"},
            {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "Let me see."},
            {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {}},
        ]
        body = json.loads(
            reply_to(RESPONSES, {**MESSAGE, "content": blocks, "stop_reason": "tool_use"}).body
        )

        assert (body["id"], body["object"], body["status"]) == (
            "msg_01",
            "response",
            "completed",
        )
        assert body["output"] == [
            {
                "id": "rs_msg_01",
                "type": "reasoning",
                "summary": [{"type": "summary_text", "text": "Hm."}],
            },
            {
                "id": "msg_msg_01",
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [
                    {
                        "type": "output_text",
                        "text": "Let me see.",
                        "annotations": [],
                        "logprobs": [],
                    }
                ],
            },
            {
                "id": "fc_toolu_1",
                "type": "function_call",
                "call_id": "toolu_1",
                "name": "get_weather",
                "arguments": "{}",
                "status": "completed",
            },
        ]
        assert body["usage"] == {
            "input_tokens": 33,
            "input_tokens_details": {"cached_tokens": 20, "cache_write_tokens": 3},
            "output_tokens": 7,
            "output_tokens_details": {"reasoning_tokens": 4},
            "total_tokens": 40,
        }

    def test_a_message_stays_one_where_one_was_asked_for(self) -> None:
        sent = json.dumps(MESSAGE).encode()
        reply = reply_to("/v1/messages", sent)

        assert (reply.body, reply.total_tokens) == (sent, 40)

    @pytest.mark.parametrize(
        ("kind", "told", "status", "type_", "code"),
        [
            ("invalid_request_error", None, 400, "invalid_request_error", None),
            ("authentication_error", 401, 401, "authentication_error", "invalid_api_key"),
            ("billing_error", None, 402, "insufficient_quota", "insufficient_quota"),
            ("permission_error", None, 403, "permission_error", "permission_denied"),
            ("not_found_error", None, 404, "not_found_error", "not_found"),
            ("request_too_large", None, 413, "invalid_request_error", "request_too_large"),
            ("rate_limit_error", None, 429, "rate_limit_error", "rate_limit_exceeded"),
            ("api_error", None, 500, "server_error", "server_error"),
            ("timeout_error", None, 504, "timeout_error", "timeout"),
            ("overloaded_error", None, 529, "server_error", "overloaded"),
            ("invalid_request_error", 409, 409, "invalid_request_error", None),
            ("something_new", None, 500, "server_error", "server_error"),
        ],
    )
    def test_errors(
        self, kind: str, told: int | None, status: int, type_: str, code: str | None
    ) -> None:
        error = {"type": "error", "error": {"type": kind, "message": "No."}, "request_id": "r"}
        reply = reply_to(CHAT, error, told)

        assert (reply.status_code, reply.request_id) == (status, "r")
        assert json.loads(reply.body) == {
            "error": {"message": "No.", "type": type_, "param": None, "code": code}
        }

    def test_an_error_without_a_body_keeps_its_status(self) -> None:
        reply = reply_to(CHAT, b"<html>Bad gateway</html>", 502)

        assert reply.status_code == 502
        assert json.loads(reply.body)["error"]["type"] == "server_error"

    @pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b"<html>"])
    def test_what_is_no_answer_is_a_failure(self, answer: bytes) -> None:
        reply = reply_to(CHAT, answer)

        assert (reply.failure, reply.status_code) == (Failure.INVALID, None)
        assert "Anthropic" in reply.message
