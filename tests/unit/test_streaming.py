"""Answers that come piece by piece, put together."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.upstream.sse import Event, iter_events
from penstock.upstream.streaming import (
    BadStream,
    CutStream,
    ask_for_stream,
    assemble,
    can_stream,
)

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
DONE = b"data: [DONE]\n\n"


def stream(*chunks: Any, done: bool = True) -> bytes:
    events = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)
    return events + (DONE if done else b"")


def named(*events: dict[str, Any]) -> bytes:
    return b"".join(
        f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events
    )


def whole(endpoint: str, data: bytes) -> Any:
    status, body = assemble(endpoint, data)
    assert status == 200
    return json.loads(body)


def chunk(*choices: Any, **more: Any) -> dict[str, Any]:
    return {
        "id": "c1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": list(choices),
        **more,
    }


def piece(index: int = 0, finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": finish_reason}


# Events


@pytest.mark.parametrize(
    ("data", "events"),
    [
        (b"data: a\n\n", [Event(b"", b"a")]),
        (b"data:a\r\rdata: b\r\n\r\n", [Event(b"", b"a"), Event(b"", b"b")]),
        (b"\xef\xbb\xbfdata: a\n\n", [Event(b"", b"a")]),
        (b"data: a\ndata:  b\n\n", [Event(b"", b"a\n b")]),
        (b": ping\n\nevent: x\nid: 7\nretry: 3\ndata: a\n\n", [Event(b"x", b"a")]),
        (b"event: x\n\ndata: a\n\n", [Event(b"", b"a")]),
        (b"data\n\ndata\ndata\n\n", [Event(b"", b""), Event(b"", b"\n")]),
        (b"data: a\x00b\n\n", [Event(b"", b"a\x00b")]),
        (b"data: a", [Event(b"", b"a")]),
        (b"", []),
    ],
)
def test_events_are_read_as_the_standard_says(data: bytes, events: list[Event]) -> None:
    assert list(iter_events(data)) == events


# Requests


def test_the_rest_of_a_request_stays_as_it_is() -> None:
    body = b'{"model":"m","seed":12345678901234567890,"x":1.10,"stream":false,"messages":[ ]}'

    assert ask_for_stream(RESPONSES, body) == (
        b'{"model":"m","seed":12345678901234567890,"x":1.10,"stream":true,"messages":[ ]}'
    )


def test_usage_is_asked_for_where_it_is_not_told_otherwise() -> None:
    body = b'{"model":"m","stream_options":{"include_obfuscation":false}}'

    assert json.loads(ask_for_stream(CHAT, body))["stream_options"] == {
        "include_obfuscation": False,
        "include_usage": True,
    }
    assert json.loads(ask_for_stream(TEXT, b'{"stream_options":null}'))["stream_options"] == {
        "include_usage": True
    }
    assert "stream_options" not in json.loads(ask_for_stream(MESSAGES, b"{}"))


def test_only_written_answers_can_stream() -> None:
    assert all(map(can_stream, (CHAT, TEXT, RESPONSES, MESSAGES)))
    assert not can_stream("/v1/embeddings")


# Answers


def test_a_chat_is_put_together() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    data = stream(
        chunk(piece(role="assistant", content=""), system_fingerprint=None),
        chunk(piece(content="Hell", reasoning_content="Hm")),
        chunk(piece(1, role="assistant", content="Bye")),
        chunk(piece(content="o.", reasoning_content="m."), system_fingerprint="fp"),
        chunk(piece(0, "stop"), piece(1, "length")),
        chunk(usage=usage),
    )

    assert whole(CHAT, data) == {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hello.",
                    "reasoning_content": "Hmm.",
                },
                "finish_reason": "stop",
            },
            {
                "index": 1,
                "message": {"role": "assistant", "content": "Bye"},
                "finish_reason": "length",
            },
        ],
        "system_fingerprint": "fp",
        "usage": usage,
    }


def test_tool_calls_are_put_together_by_index() -> None:
    def call(index: int, **more: Any) -> dict[str, Any]:
        return piece(tool_calls=[{"index": index, **more}])

    data = stream(
        chunk(
            call(0, id="a", type="function", function={"name": "add", "arguments": ""}),
        ),
        chunk(call(0, function={"arguments": '{"x"'})),
        chunk(call(1, id="b", type="function", function={"name": "sub", "arguments": "{"})),
        chunk(call(0, function={"arguments": ":1}"})),
        chunk(call(1, function={"arguments": "}"})),
        chunk(piece(0, "tool_calls")),
    )

    assert whole(CHAT, data)["choices"][0]["message"] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "a",
                "type": "function",
                "function": {"name": "add", "arguments": '{"x":1}'},
            },
            {"id": "b", "type": "function", "function": {"name": "sub", "arguments": "{}"}},
        ],
    }


def test_log_probabilities_are_joined() -> None:
    one = {**piece(content="a"), "logprobs": {"content": [{"token": "a"}], "refusal": None}}
    two = {**piece(content="b"), "logprobs": {"content": [{"token": "b"}], "refusal": None}}

    assert whole(CHAT, stream(chunk(one), chunk(two)))["choices"][0]["logprobs"] == {
        "content": [{"token": "a"}, {"token": "b"}],
        "refusal": None,
    }


def test_a_completion_is_put_together() -> None:
    def text(index: int, words: str, reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "text": words, "logprobs": None, "finish_reason": reason}

    data = stream(
        chunk(text(1, "B")),
        chunk(text(0, "A")),
        chunk(text(0, "a", "stop"), text(1, "b", "stop")),
    )

    answer = whole(TEXT, data)
    assert answer["object"] == "text_completion"
    assert [choice["text"] for choice in answer["choices"]] == ["Aa", "Bb"]
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("end", ["completed", "incomplete", "failed"])
def test_a_response_stands_in_its_last_event(end: str) -> None:
    response = {"id": "r", "object": "response", "status": end, "output": [], "error": None}
    data = named(
        {"type": "response.created", "response": {"id": "r"}},
        {"type": "response.output_text.delta", "delta": "x"},
        {"type": f"response.{end}", "response": response},
    )

    assert whole(RESPONSES, data) == response


def test_a_message_is_put_together() -> None:
    start = {
        "id": "msg",
        "type": "message",
        "role": "assistant",
        "content": [],
        "model": "m",
        "stop_reason": None,
        "usage": {"input_tokens": 5, "output_tokens": 1},
    }

    def delta(index: int, kind: str, **more: Any) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **more}}

    def begin(index: int, **block: Any) -> dict[str, Any]:
        return {"type": "content_block_start", "index": index, "content_block": block}

    data = named(
        {"type": "message_start", "message": start},
        begin(0, type="thinking", thinking="", signature=""),
        {"type": "ping"},
        delta(0, "thinking_delta", thinking="Hm"),
        delta(0, "signature_delta", signature="sig"),
        {"type": "content_block_stop", "index": 0},
        begin(1, type="text", text=""),
        delta(1, "text_delta", text="Hell"),
        delta(1, "text_delta", text="o"),
        delta(1, "citations_delta", citation={"url": "u"}),
        begin(2, type="tool_use", id="t", name="add", input={}),
        delta(2, "input_json_delta", partial_json='{"x": '),
        delta(2, "input_json_delta", partial_json="1}"),
        {
            "type": "message_delta",
            "delta": {"stop_reason": "tool_use"},
            "usage": {"output_tokens": 9},
        },
        {"type": "message_stop"},
    )

    assert whole(MESSAGES, data) == {
        **start,
        "content": [
            {"type": "thinking", "thinking": "Hm", "signature": "sig"},
            {"type": "text", "text": "Hello", "citations": [{"url": "u"}]},
            {"type": "tool_use", "id": "t", "name": "add", "input": {"x": 1}},
        ],
        "stop_reason": "tool_use",
        "usage": {"input_tokens": 5, "output_tokens": 9},
    }


# What goes wrong


@pytest.mark.parametrize(
    ("endpoint", "data"),
    [
        (CHAT, stream(chunk(piece(content="Hell")), done=False)),
        (CHAT, stream(chunk(piece(content="Hell")), done=False) + b'data: {"id":"c'),
        (CHAT, b""),
        (TEXT, b": nothing\n\n"),
        (RESPONSES, named({"type": "response.created", "response": {}})),
        (RESPONSES, DONE),
        (MESSAGES, named({"type": "message_start", "message": {}})),
    ],
)
def test_half_an_answer_is_none(endpoint: str, data: bytes) -> None:
    with pytest.raises(CutStream):
        assemble(endpoint, data)


@pytest.mark.parametrize(
    ("endpoint", "data"),
    [
        (CHAT, b"data: \xff\n\n" + DONE),
        (CHAT, b"data: [1]\n\n" + DONE),
        (CHAT, stream({"choices": 7})),
        (CHAT, stream({"choices": [7]})),
        (CHAT, stream({"choices": [{"index": "x"}]})),
        (CHAT, stream({"choices": [{"index": 0, "delta": 7}]})),
        (MESSAGES, named({"type": "content_block_delta", "index": 3, "delta": {"type": "x"}})),
        (RESPONSES, named({"type": "response.completed"})),
    ],
)
def test_what_is_no_stream_of_the_api_is_told(endpoint: str, data: bytes) -> None:
    with pytest.raises(BadStream):
        assemble(endpoint, data)


@pytest.mark.parametrize(
    ("endpoint", "error", "status"),
    [
        (CHAT, {"error": {"message": "no", "code": 429}}, 429),
        (CHAT, {"error": {"message": "no", "code": "503"}}, 503),
        (CHAT, {"error": {"message": "no", "type": "server_error"}}, 500),
        (CHAT, {"error": {"message": "no"}}, 502),
        (CHAT, {"error": "no"}, 502),
        (RESPONSES, {"type": "error", "code": "server_error", "message": "no"}, 500),
        (MESSAGES, {"type": "error", "error": {"type": "overloaded_error"}}, 529),
    ],
)
def test_an_error_in_the_stream_is_an_answer_with_its_status(
    endpoint: str, error: dict[str, Any], status: int
) -> None:
    got, body = assemble(endpoint, stream(chunk(piece(content="x")), error))

    assert got == status
    assert json.loads(body)["error"]


@given(st.binary(max_size=200), st.sampled_from([CHAT, TEXT, RESPONSES, MESSAGES]))
def test_no_bytes_bring_it_down(noise: bytes, endpoint: str) -> None:
    for data in (noise, b"data: " + noise + b"\n\n" + DONE):
        try:
            status, body = assemble(endpoint, data)
        except (CutStream, BadStream):
            continue
        assert 200 <= status < 600
        assert isinstance(json.loads(body), dict)
