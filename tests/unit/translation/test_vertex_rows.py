"""Rows of Vertex AI's batches: what a table can hold, and what is said otherwise for it."""

import json
from typing import Any

import pytest

from penstock.upstream.base import Lack
from penstock.upstream.translation.base import CHAT, RESPONSES, Untranslatable
from penstock.upstream.translation.vertex_rows import read_row, write_row

FLASH = "gemini-2.5-flash"


def chat(**fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "Hi."}], **fields}).encode()


def written(body: bytes, *, endpoint: str = CHAT) -> dict[str, Any]:
    return json.loads(write_row(endpoint, FLASH, "l1", body))["request"]


def with_schema(schema: dict[str, Any]) -> bytes:
    told = {"name": "answer", "schema": schema}
    return chat(response_format={"type": "json_schema", "json_schema": told})


def schema_of(schema: dict[str, Any]) -> Any:
    return written(with_schema(schema))["generationConfig"]["responseJsonSchema"]


def refused(body: bytes, *, endpoint: str = CHAT) -> Untranslatable:
    with pytest.raises(Untranslatable) as error:
        write_row(endpoint, FLASH, "l1", body)
    return error.value


def test_a_row_has_a_label_that_no_table_takes_for_a_number() -> None:
    row = json.loads(write_row(CHAT, FLASH, "0007", chat()))

    assert row["request"]["labels"] == {"penstock_line": "line-0007"}
    assert row["request"]["contents"] == [{"role": "user", "parts": [{"text": "Hi."}]}]


def test_references_are_replaced_by_what_they_name() -> None:
    point = {"type": "object", "properties": {"x": {"type": "number"}}}
    line = {
        "type": "object",
        "title": "Line",
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$defs": {
            "Point": point,
            "Pair": {"type": "array", "items": {"$ref": "#/$defs/Point"}},
        },
        "properties": {
            "start": {"$ref": "#/$defs/Point", "description": "Where it begins."},
            "more": {"$ref": "#/$defs/Pair"},
        },
        "required": ["start"],
    }

    assert schema_of(line) == {
        "type": "object",
        "title": "Line",
        "properties": {
            "start": {**point, "description": "Where it begins."},
            "more": {"type": "array", "items": point},
        },
        "required": ["start"],
    }


def test_a_list_of_types_is_a_choice_of_schemas() -> None:
    found = schema_of({"type": "object", "properties": {"a": {"type": ["string", "null"]}}})

    assert found["properties"]["a"] == {"anyOf": [{"type": "string"}, {"type": "null"}]}


def test_keywords_that_say_nothing_are_left_out() -> None:
    field = {"type": "string", "default": None, "$comment": "x"}
    empty = {"additionalProperties": {}, "items": {}, "patternProperties": {}}

    found = schema_of({"type": "object", "properties": {"a": field}, **empty})

    assert found == {"type": "object", "properties": {"a": {"type": "string"}}}


@pytest.mark.parametrize(
    "name", ["definitions", "items", "default", "properties", "args", "enum"]
)
def test_names_of_the_client_are_no_keywords(name: str) -> None:
    schema = {"type": "object", "properties": {name: {"type": "string"}}, "required": [name]}

    assert schema_of(schema) == schema


def test_data_in_a_schema_is_no_schema() -> None:
    default = {"type": ["a"], "definitions": "x"}

    assert schema_of({"type": "object", "default": default}) == {
        "type": "object",
        "default": default,
    }


def test_a_tool_without_parameters_has_none() -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": {"properties": {}}}}

    [declared] = written(chat(tools=[tool]))["tools"]

    assert declared["functionDeclarations"] == [{"name": "now"}]


def test_a_call_without_arguments_has_none() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "Noon."},
    ]

    contents = written(json.dumps({"messages": messages}).encode())["contents"]

    assert contents[1]["parts"] == [{"functionCall": {"id": "c1", "name": "now"}}]


def deep(levels: int) -> dict[str, Any]:
    """A schema that lies so many columns deep, beside three above it."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range((levels - 1) // 2):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def test_what_a_table_still_holds_is_written() -> None:
    assert schema_of(deep(13)) == deep(13)


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        (deep(15), "deeper than 15 levels"),
        ({"type": "object", "properties": {"first name": {"type": "string"}}}, "'first name'"),
        ({"type": "object", "properties": {"a": {}}}, "nothing in 'a'"),
        ({"type": "object", "properties": {"a": None}}, "nothing in 'a'"),
        ({"type": "object", "$ref": "#/$defs/None"}, "There is no #/$defs/None"),
        (
            {"$defs": {"T": {"properties": {"t": {"$ref": "#/$defs/T"}}}}, "$ref": "#/$defs/T"},
            "part of itself (#/$defs/T)",
        ),
        ({"enum": ["a", None]}, "different kinds"),
        ({"enum": ["a", 1]}, "different kinds"),
        ({"enum": [["a"]]}, "different kinds"),
    ],
)
def test_a_schema_that_no_table_holds_fails_its_line(schema: dict[str, Any], told: str) -> None:
    error = refused(with_schema({"type": "object", "properties": {"n": schema}} | schema))

    assert error.field == "response_format"
    assert told in error.message


def test_references_that_would_make_endless_schemas_fail_their_line() -> None:
    twice = [
        {"properties": {"a": {"$ref": f"#/$defs/D{n + 1}"}, "b": {"$ref": f"#/$defs/D{n + 1}"}}}
        for n in range(60)
    ]
    defs = {f"D{n}": part for n, part in enumerate([*twice, {"type": "string"}])}

    assert (
        "more than 10000 schemas"
        in refused(with_schema({"$defs": defs, "$ref": "#/$defs/D0"})).message
    )


def test_a_schema_deeper_than_we_can_go_fails_its_line() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(450):
        schema = {"items": schema}

    assert "deeper than 15 levels" in refused(with_schema(schema)).message


def test_the_field_is_the_endpoints_own() -> None:
    schema = {"type": "object", "properties": {"a b": {"type": "string"}}}
    text = {"format": {"type": "json_schema", "name": "answer", "schema": schema}}
    function = {"name": "f", "parameters": schema}
    call = {"name": "f", "arguments": '{"a b": 1}'}
    called = [
        {"role": "user", "content": "Hi."},
        {
            "role": "assistant",
            "tool_calls": [{"id": "c", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "1"},
    ]

    asked = json.dumps({"input": "Hi.", "text": text}).encode()
    assert refused(asked, endpoint=RESPONSES).field == "text.format"
    assert refused(chat(tools=[{"type": "function", "function": function}])).field == "tools"
    assert refused(json.dumps({"messages": called}).encode()).field == "messages"


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ('Bad Request: {"error": {"code": 400, "message": "No."}}', 400),
        ('Too Many Requests: {"error": {"code": 429, "message": "No."}}', 429),
        ("Internal Server Error: No.", 500),
        ("Not Found: No.", 404),
        ("No.", 500),
    ],
)
def test_the_status_of_a_row_is_its_error(status: str, code: int) -> None:
    row = {"request": {"labels": {"penstock_line": "line-l1"}}, "status": status}

    result = read_row(CHAT, FLASH, json.dumps(row).encode(), created_at=1)

    assert result is not None
    assert result.custom_id == "l1"
    assert result.reply is not None
    assert result.reply.status_code == code
    assert "No." in json.loads(result.reply.body)["error"]["message"]


def test_a_row_without_answer_or_error_is_lost() -> None:
    row = {"request": {"labels": {"penstock_line": "line-l1"}}, "status": "", "response": {}}

    result = read_row(CHAT, FLASH, json.dumps(row).encode(), created_at=1)

    assert result is not None
    assert (result.reply, result.lack) == (None, Lack.LOST)


@pytest.mark.parametrize(
    "row", [b"", b"[]", b'{"request":{"labels":{"penstock_line":"l1"}}}', b'{"key":"other"}']
)
def test_a_row_of_somebody_else_is_left_aside(row: bytes) -> None:
    assert read_row(CHAT, FLASH, row, created_at=1) is None
