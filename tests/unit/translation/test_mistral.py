"""Golden examples between OpenAI's bodies and Mistral's.

The shapes on Mistral's side are those of https://docs.mistral.ai/api/endpoint/chat and
https://docs.mistral.ai/api/endpoint/embeddings.
"""

import json
from typing import Any

import pytest

from penstock.upstream.base import Failure
from penstock.upstream.translation import mistral
from penstock.upstream.translation.base import Untranslatable
from tests.unit.translation.bodies import (
    CHAT,
    CITY,
    CITY_FORMAT,
    EMBEDDINGS,
    PNG,
    RESPONSES,
    TOOL_TALK,
    WEATHER_TOOL,
    chat,
    embeddings,
    image,
    response,
    user,
)

MODEL = "mistral-small-latest"
HELLO = {"role": "user", "content": [{"type": "text", "text": "Hello."}]}
CALL = {"id": "abcDEF123", "function": {"name": "get_weather", "arguments": '{"city":"Rome"}'}}
USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "total_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 1},
}


def translate(endpoint: str, body: bytes) -> Any:
    return json.loads(mistral.translate_request(endpoint, MODEL, body))


def answered(message: dict[str, Any], finish: str = "stop", **choice: Any) -> Any:
    told = {
        "id": "cmpl-1",
        "model": MODEL,
        "created": 1_700_000_001,
        "choices": [{"index": 0, "message": message, "finish_reason": finish, **choice}],
        "usage": USAGE,
    }
    return mistral.translate_reply(CHAT, MODEL, json.dumps(told).encode(), created_at=1)


def choice_of(reply: Any) -> Any:
    return json.loads(reply.body)["choices"][0]


class TestRequests:
    def test_a_question_needs_nothing_else(self) -> None:
        assert translate(CHAT, chat()) == {"model": MODEL, "messages": [HELLO]}

    def test_in_a_batch_a_line_names_no_model(self) -> None:
        assert json.loads(mistral.translate_unnamed(CHAT, chat())) == {"messages": [HELLO]}

    def test_every_parameter_with_a_counterpart_is_said_by_its_name_there(self) -> None:
        body = chat(
            {"role": "developer", "content": "Be brief."},
            user("Hello."),
            max_completion_tokens=9,
            seed=5,
            n=2,
            stop="END",
            temperature=1.5,
            top_p=0.5,
            top_k=5,
            presence_penalty=1,
            frequency_penalty=-1,
            reasoning_effort="high",
            logprobs=True,
            top_logprobs=2,
            user="ada",
            store=True,
        )

        assert translate(CHAT, body) == {
            "model": MODEL,
            "messages": [{"role": "system", "content": "Be brief."}, HELLO],
            "max_tokens": 9,
            "random_seed": 5,
            "n": 2,
            "stop": ["END"],
            "temperature": 1.5,
            "top_p": 0.5,
            "top_k": 5,
            "presence_penalty": 1,
            "frequency_penalty": -1,
            "reasoning_effort": "high",
            "logprobs": True,
            "top_logprobs": 2,
        }

    def test_calls_and_results_have_ids_of_nine_characters(self) -> None:
        body = chat(*TOOL_TALK, tools=[WEATHER_TOOL], parallel_tool_calls=False)

        told = translate(CHAT, body)

        calls = told["messages"][1]["tool_calls"]
        results = [each for each in told["messages"] if each["role"] == "tool"]
        assert [len(each["id"]) for each in calls] == [9, 9]
        assert [each["id"] for each in calls] == [each["tool_call_id"] for each in results]
        assert calls[0]["function"] == {"name": "get_weather", "arguments": '{"city":"Paris"}'}
        assert [(each["name"], each["content"]) for each in results] == [
            ("get_weather", "18 degrees"),
            ("get_weather", "25"),
        ]
        assert told["tools"] == [WEATHER_TOOL]
        assert told["parallel_tool_calls"] is False

    @pytest.mark.parametrize(
        ("given", "told"),
        [
            ("auto", "auto"),
            ("none", "none"),
            ("required", "any"),
            (
                {"type": "function", "function": {"name": "get_weather"}},
                {"type": "function", "function": {"name": "get_weather"}},
            ),
        ],
    )
    def test_a_choice_of_tools_is_said(self, given: Any, told: Any) -> None:
        body = chat(tools=[WEATHER_TOOL], tool_choice=given)

        assert translate(CHAT, body)["tool_choice"] == told

    def test_a_schema_has_a_name_and_is_held_to(self) -> None:
        told = translate(CHAT, chat(response_format=CITY_FORMAT))

        assert told["response_format"] == {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": CITY, "strict": True},
        }
        told = translate(CHAT, chat(response_format={"type": "json_object"}))
        assert told["response_format"] == {"type": "json_object"}

    def test_images_go_by_address_and_by_value(self) -> None:
        data_url = f"data:image/png;base64,{PNG}"
        told = translate(
            CHAT, chat(user([image("https://example.com/a.png"), image(data_url)]))
        )

        assert [part["image_url"]["url"] for part in told["messages"][0]["content"]] == [
            "https://example.com/a.png",
            data_url,
        ]

    def test_a_response_is_a_chat(self) -> None:
        told = translate(RESPONSES, response("Hello.", instructions="Be brief."))

        assert told["messages"] == [{"role": "system", "content": "Be brief."}, HELLO]
        assert mistral.locate(RESPONSES, MODEL) == CHAT
        assert mistral.locate(EMBEDDINGS, MODEL) == EMBEDDINGS

    def test_embeddings_of_several_texts(self) -> None:
        body = embeddings(["a", "b"], dimensions=256, user="ada")

        assert translate(EMBEDDINGS, body) == {
            "model": MODEL,
            "input": ["a", "b"],
            "output_dimension": 256,
        }

    @pytest.mark.parametrize(
        ("endpoint", "body", "field"),
        [
            (CHAT, chat(temperature=1.6), "temperature"),
            (CHAT, chat(seed=-1), "seed"),
            (CHAT, chat(logit_bias={"5": 1}), "logit_bias"),
            (CHAT, chat(made_up=1), "made_up"),
            (
                CHAT,
                chat(user("Hello."), {"role": "assistant", "content": "Yes, "}),
                "messages[1].role",
            ),
            (EMBEDDINGS, embeddings(input_type="query"), "input_type"),
            ("/v1/completions", b"{}", "url"),
        ],
    )
    def test_what_has_no_counterpart_is_named(
        self, endpoint: str, body: bytes, field: str
    ) -> None:
        with pytest.raises(Untranslatable) as caught:
            translate(endpoint, body)

        assert caught.value.field == field


class TestReplies:
    def test_an_answer_comes_in_openais_form(self) -> None:
        reply = answered({"role": "assistant", "content": "Yes."})

        body = json.loads(reply.body)
        assert (body["id"], body["model"], body["created"]) == ("cmpl-1", MODEL, 1_700_000_001)
        assert body["choices"][0]["message"]["content"] == "Yes."
        assert body["choices"][0]["finish_reason"] == "stop"
        assert (reply.input_tokens, reply.output_tokens, reply.cached_tokens) == (3, 2, 1)

    @pytest.mark.parametrize(
        ("told", "finish"),
        [("length", "length"), ("model_length", "length"), ("tool_calls", "tool_calls")],
    )
    def test_the_end_of_an_answer_has_openais_reason(self, told: str, finish: str) -> None:
        assert choice_of(answered({"content": "Y"}, told))["finish_reason"] == finish

    def test_calls_come_with_arguments_as_a_text(self) -> None:
        as_object = {"id": "x", "function": {"name": "f", "arguments": {"a": 1}}}
        choice = choice_of(answered({"content": "", "tool_calls": [CALL, as_object]}))

        told = [each["function"]["arguments"] for each in choice["message"]["tool_calls"]]
        assert told == ['{"city":"Rome"}', '{"a":1}']
        assert choice["message"]["content"] is None
        assert choice["finish_reason"] == "tool_calls"

    def test_thoughts_stand_beside_the_text(self) -> None:
        thought = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}
        content = [thought, {"type": "text", "text": "Yes."}]
        message = {"content": content}
        told = {"choices": [{"message": message}], "usage": USAGE}

        assert choice_of(answered(message))["message"]["content"] == "Yes."
        reply = mistral.translate_reply(
            RESPONSES, MODEL, json.dumps(told).encode(), created_at=1
        )
        output = json.loads(reply.body)["output"]
        assert output[0]["summary"] == [{"type": "summary_text", "text": "Hm."}]
        assert output[1]["content"][0]["text"] == "Yes."

    def test_probabilities_are_told(self) -> None:
        other = {"token": "No", "logprob": -2.0, "bytes": [78, 111]}
        scored = {"token": "Yes", "logprob": -0.5, "bytes": [1], "top_logprobs": [other]}
        choice = choice_of(answered({"content": "Yes"}, logprobs={"content": [scored]}))

        [token] = choice["logprobs"]["content"]
        assert (token["token"], token["top_logprobs"][0]["logprob"]) == ("Yes", -2.0)

    def test_vectors_come_in_the_order_of_the_texts(self) -> None:
        data = [{"index": 1, "embedding": [2.0]}, {"index": 0, "embedding": [1.0]}]
        told = json.dumps({"data": data, "usage": USAGE}).encode()

        reply = mistral.translate_reply(EMBEDDINGS, MODEL, told, created_at=1, status_code=200)

        assert [each["embedding"] for each in json.loads(reply.body)["data"]] == [[1.0], [2.0]]
        assert reply.input_tokens == 3

    @pytest.mark.parametrize(
        ("told", "message"),
        [
            ({"object": "error", "message": "Too long."}, "Too long."),
            ({"detail": [{"loc": ["body", "n"], "msg": "Too big"}]}, "body.n: Too big."),
            ({"message": {"detail": [{"msg": "Extra"}]}}, "Extra."),
            (json.dumps({"message": "In a text."}), "In a text."),
            ("Bare.", "Bare."),
        ],
    )
    def test_every_form_of_an_error_is_understood(self, told: Any, message: str) -> None:
        reply = mistral.translate_reply(
            CHAT, MODEL, json.dumps(told).encode(), created_at=1, status_code=422
        )

        assert reply.status_code == 422
        assert json.loads(reply.body)["error"]["message"] == message

    def test_an_answer_that_failed_is_an_error(self) -> None:
        assert answered({"content": ""}, "error").status_code == 500

    @pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"choices": []}', b"\xff"])
    def test_what_is_no_answer_is_said_to_be_none(self, body: bytes) -> None:
        for endpoint in (CHAT, EMBEDDINGS):
            reply = mistral.translate_reply(endpoint, MODEL, body, created_at=1)
            assert reply.failure is Failure.INVALID
