"""What no provider is asked, because reading a body refuses it; and what is ignored."""

import json
from typing import Any

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase
from openai.types.responses.response_create_params import ResponseCreateParamsBase

from penstock.upstream.translation import chat as chat_bodies
from penstock.upstream.translation import responses as response_bodies
from penstock.upstream.translation.answers import write_untranslatable
from penstock.upstream.translation.base import Request, Untranslatable
from tests.unit.translation.bodies import (
    CHAT,
    LOOSE_TOOL,
    RESPONSES,
    TOOL_TALK,
    Json,
    call,
    chat,
    image,
    response,
    user,
)

ASSISTANT = {"role": "assistant", "content": "Yes?"}
CALL_ITEM = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}


def read(endpoint: str, body: bytes) -> Request:
    return (chat_bodies if endpoint == CHAT else response_bodies).read(body)


def two_calls(call_id: str) -> list[Json]:
    return [
        user("?"),
        {"role": "assistant", "tool_calls": [call("a", "Paris"), call(call_id, "Rome")]},
    ]


@pytest.mark.parametrize(
    ("body", "field", "told"),
    [
        (b"", "", "valid JSON"),
        (b"nonsense", "", "valid JSON"),
        (b"\xff{}", "", "valid JSON"),
        (b'{"metadata": ' + b"[" * 100_000, "", "valid JSON"),
        (b"[]", "", "Expected `object`"),
        (b"{}", "messages", "required"),
        (b'{"messages": []}', "messages", "user"),
        (chat(user("")), "messages[0].content", "empty"),
        (chat(user("?"), messages_="?"), "messages_", "not known"),
        (chat({"role": "critic", "content": "?"}), "messages[0].role", "'developer'"),
        (chat(user(5)), "messages[0].content", "Expected `str | array`"),
        (
            chat(user("?"), user([{"type": "input_audio"}])),
            "messages[1].content[0].type",
            "'image_url'",
        ),
        (chat(user([{"type": "text"}])), "messages[0].content[0].text", "required"),
        (
            chat(user([image("https://a/b.png", size="big")])),
            "messages[0].content[0].image_url.size",
            "not known",
        ),
        (
            chat(user([image("https://a/b.png", detail="low")])),
            "messages[0].content[0].image_url.detail",
            "`auto`",
        ),
        (chat(user([image("ftp://a")])), "messages[0].content[0].image_url.url", "http"),
        (
            chat(user([image("data:image/png;base64,*")])),
            "messages[0].content[0].image_url.url",
            "base64",
        ),
        (
            chat(user([image("data:image/png;base64,")])),
            "messages[0].content[0].image_url.url",
            "empty",
        ),
        (chat({**user("?"), "name": "Ada"}), "messages[0].name", "name"),
        (chat(ASSISTANT, user("?")), "messages[0].role", "user"),
        (
            chat(user("?"), {"role": "system", "content": "Be brief."}),
            "messages[1].role",
            "before",
        ),
        (chat(user("?"), {"role": "assistant"}), "messages[1].content", "empty"),
        (
            chat(user("?"), {"role": "assistant", "function_call": {}}),
            "messages[1].function_call",
            "Expected `null`",
        ),
        (
            chat(*two_calls("b"), {"role": "tool", "tool_call_id": "a", "content": "1"}),
            "messages[1].tool_calls[1]",
            "no result",
        ),
        (chat(*two_calls("a")), "messages[1].tool_calls[1].id", "Two calls"),
        (chat(*two_calls("b"), user("?")), "messages[1].tool_calls[0]", "no result"),
        (
            chat(user("?"), {"role": "tool", "tool_call_id": "x", "content": "1"}),
            "messages[1].tool_call_id",
            "no call",
        ),
        (
            chat(
                *TOOL_TALK[:4],
                {"role": "tool", "tool_call_id": "call_1", "content": "again"},
            ),
            "messages[4].tool_call_id",
            "has a result",
        ),
        (
            chat(
                user("?"),
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "id": "a",
                            "type": "function",
                            "function": {"name": "f", "arguments": "[1]"},
                        }
                    ],
                },
            ),
            "messages[1].tool_calls[0].function.arguments",
            "JSON object",
        ),
        (chat(tools=[{"type": "custom"}]), "tools[0].type", "'function'"),
        (chat(tools=[LOOSE_TOOL, LOOSE_TOOL]), "tools[1].function.name", "Two tools"),
        (chat(tool_choice="required"), "tool_choice", "`tools` gives none"),
        (
            chat(
                tools=[LOOSE_TOOL],
                tool_choice={"type": "function", "function": {"name": "other"}},
            ),
            "tool_choice.function.name",
            "'get_weather'",
        ),
        (
            chat(
                tools=[LOOSE_TOOL],
                tool_choice={
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": []},
                },
            ),
            "tool_choice.allowed_tools.tools",
            "One tool",
        ),
        (chat(tool_choice="any"), "tool_choice", "'required'"),
        (chat(functions=[{"name": "f"}]), "functions", "`tools`"),
        (chat(function_call="auto"), "function_call", "`tool_choice`"),
        (chat(logit_bias={"1": 5}), "logit_bias", "leave it out"),
        (chat(web_search_options={"a": 1}), "web_search_options", "leave it out"),
        (chat(audio={"voice": "x"}), "audio", "text"),
        (chat(modalities=["text", "audio"]), "modalities[1]", "'text'"),
        (chat(verbosity="low"), "verbosity", "'medium'"),
        (chat(stream=True), "stream", "False"),
        (chat(temperature="hot"), "temperature", "Expected `float | null`"),
        (chat(temperature=2.1), "temperature", "0 to 2"),
        (chat(top_p=-1), "top_p", "0 to 1"),
        (chat(n=0), "n", "1 to 128"),
        (chat(max_tokens=0), "max_tokens", "1 to"),
        (chat(max_completion_tokens=-1), "max_completion_tokens", "1 to"),
        (chat(max_tokens=5, max_completion_tokens=6), "max_tokens", "not both"),
        (chat(seed=1 << 70), "seed", "out of range"),
        (chat(stop=["a", "b", "c", "d", "e"]), "stop", "4"),
        (chat(stop=[""]), "stop", "empty"),
        (chat(top_logprobs=2), "top_logprobs", "`logprobs`"),
        (chat(logprobs=True, top_logprobs=21), "top_logprobs", "0 to 20"),
        (chat(reasoning_effort="extreme"), "reasoning_effort", "'xhigh'"),
        (chat(response_format={"type": "xml"}), "response_format.type", "'json_object'"),
        (
            chat(response_format={"type": "json_schema", "json_schema": {"name": "x"}}),
            "response_format.json_schema.schema",
            "object",
        ),
    ],
)
def test_a_chat_that_cannot_be_read_names_its_field(body: bytes, field: str, told: str) -> None:
    with pytest.raises(Untranslatable) as refused:
        chat_bodies.read(body)

    assert refused.value.field == field
    assert told in refused.value.message


@pytest.mark.parametrize(
    ("body", "field", "told"),
    [
        (b"{}", "input", "required"),
        (response([]), "input", "user"),
        (response(""), "input.content", "empty"),
        (response([5]), "input[0]", "Expected `object`"),
        (response([{"type": "computer_call"}]), "input[0].type", "function_call_output"),
        (response([{"role": "user"}]), "input[0].content", "required"),
        (response([{"role": "critic", "content": "?"}]), "input[0].role", "'developer'"),
        (
            response([user([{"type": "input_file"}])]),
            "input[0].content[0].type",
            "'input_image'",
        ),
        (
            response([user([{"type": "input_image", "file_id": "file-1"}])]),
            "input[0].content[0].file_id",
            "`image_url`",
        ),
        (
            response([user([{"type": "input_image"}])]),
            "input[0].content[0].image_url",
            "required",
        ),
        (
            response(
                [user([{"type": "input_image", "image_url": "http://a", "detail": "low"}])]
            ),
            "input[0].content[0].detail",
            "`auto`",
        ),
        (
            response(
                [
                    user("?"),
                    {
                        "role": "assistant",
                        "content": [{"type": "input_image", "image_url": "http://a"}],
                    },
                ]
            ),
            "input[1].content[0].image_url",
            "Only the user",
        ),
        (response([user("?"), CALL_ITEM]), "input[1]", "no result"),
        (
            response([user("?"), {**CALL_ITEM, "arguments": "x"}]),
            "input[1].arguments",
            "JSON object",
        ),
        (
            response([user("?"), {"type": "function_call_output", "call_id": "x"}]),
            "input[1].output",
            "required",
        ),
        (
            response(
                [user("?"), {"type": "function_call_output", "call_id": "x", "output": "1"}]
            ),
            "input[1].call_id",
            "no call",
        ),
        (response(tools=[{"type": "web_search"}]), "tools[0].type", "'function'"),
        (
            response(
                tools=[{"type": "function", "name": "f"}],
                tool_choice={"type": "function", "name": "g"},
            ),
            "tool_choice.name",
            "'f'",
        ),
        (response(tool_choice={"type": "web_search"}), "tool_choice.type", "'function'"),
        (response(previous_response_id="resp_1"), "previous_response_id", "`input`"),
        (response(conversation="conv_1"), "conversation", "`input`"),
        (response(prompt={"id": "p"}), "prompt", "`input`"),
        (response(max_tool_calls=0), "max_tool_calls", "leave it out"),
        (response(truncation="auto"), "truncation", "'disabled'"),
        (
            response(include=["reasoning.encrypted_content"]),
            "include[0]",
            "'message.output_text.logprobs'",
        ),
        (response(max_output_tokens=0), "max_output_tokens", "1 to"),
        (response(reasoning={"effort": "extreme"}), "reasoning.effort", "'none'"),
        (response(text={"verbosity": "high"}), "text.verbosity", "'medium'"),
        (
            response(text={"format": {"type": "json_schema", "name": "x"}}),
            "text.format.schema",
            "object",
        ),
        (response(seed=5), "seed", "not known"),
        (response(stop="x"), "stop", "not known"),
    ],
)
def test_a_response_that_cannot_be_read_names_its_field(
    body: bytes, field: str, told: str
) -> None:
    with pytest.raises(Untranslatable) as refused:
        response_bodies.read(body)

    assert refused.value.field == field
    assert told in refused.value.message


@pytest.mark.parametrize("value", ["x", 5, True, {"a": [1]}, None])
@pytest.mark.parametrize(
    ("endpoint", "field"),
    [
        *[(CHAT, field) for field in sorted(chat_bodies.IGNORED)],
        *[(RESPONSES, field) for field in sorted(response_bodies.IGNORED)],
    ],
)
def test_what_is_harmless_changes_nothing(endpoint: str, field: str, value: Any) -> None:
    write = chat if endpoint == CHAT else response

    assert read(endpoint, write(**{field: value})) == read(endpoint, write())


@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES])
def test_every_field_of_openais_client_is_known_and_may_be_null(endpoint: str) -> None:
    if endpoint == CHAT:
        fields = CompletionCreateParamsBase.__annotations__.keys() - {"messages"}
        assert read(CHAT, chat(**dict.fromkeys(fields))) == read(CHAT, chat())
    else:
        fields = ResponseCreateParamsBase.__annotations__.keys() - {"input"}
        assert read(RESPONSES, response(**dict.fromkeys(fields))) == read(RESPONSES, response())


def test_both_endpoints_read_the_same_talk_alike() -> None:
    talk = [
        user("Weather?"),
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "18"},
        {"role": "assistant", "content": "18."},
    ]
    said = [
        user("Weather?"),
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "18"},
        {"role": "assistant", "content": "18."},
    ]

    def shape(request: Request) -> Any:
        return [
            (turn.is_model, [(type(part), getattr(part, "id", None)) for part in turn.parts])
            for turn in request.turns
        ]

    assert shape(response_bodies.read(response(talk))) == shape(chat_bodies.read(chat(*said)))


def test_a_schema_takes_the_description_that_stood_beside_it() -> None:
    given = {"name": "x", "description": "A city.", "schema": {"type": "object"}}
    wanted = {"type": "object", "description": "A city."}

    one = chat_bodies.read(
        chat(response_format={"type": "json_schema", "json_schema": given})
    ).output
    other = response_bodies.read(
        response(text={"format": {"type": "json_schema", **given}})
    ).output

    assert one is not None
    assert other is not None
    assert one.schema == other.schema == wanted


def test_a_refused_line_gets_openais_error() -> None:
    reply = write_untranslatable("messages[0].role", "No.")

    assert reply.status_code == 400
    assert json.loads(reply.body)["error"] == {
        "message": "No.",
        "type": "invalid_request_error",
        "param": "messages[0].role",
        "code": "unsupported_by_provider",
    }
