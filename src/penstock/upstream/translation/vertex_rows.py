"""Requests to Gemini as rows of Vertex AI's batches, and back.

A row is `{"request": ...}`. Before anything is run, Google reads all rows as a table: each name
in a body becomes a column, so names, depth and emptiness are limited, and one row that breaks
these limits fails the whole job. What can be said otherwise is (schemas without references,
without lists of types, without empty parts); what cannot fails its own line here.

A row of an embedding carries our name of it in `key`, which the guide to these names. Rows of
content have no such field in the guide, but a request's labels, which come back with it.

Sources: the pages on batch inference that `docs/providers.md` names.
"""

import re
from http import HTTPStatus
from typing import Any, cast

import msgspec

from penstock.upstream.base import Lack, NativeResult, Reply
from penstock.upstream.translation import gemini
from penstock.upstream.translation.base import EMBEDDINGS, RESPONSES, Untranslatable

LABEL = "penstock_line"
_PREFIX = "line-"
"""So that no name looks like a number, which Google would make of it."""
_LEVELS = 15
"""How deep columns may lie."""
_COLUMN = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,299}")
_ANNOTATIONS = frozenset({"$schema", "$id", "$comment", "$anchor", "$defs", "definitions"})
_EMPTY = frozenset({"properties", "patternProperties", "items", "additionalProperties"})
"""Keywords that say nothing when they are empty."""
_MAPS = frozenset({"properties", "patternProperties", "dependentSchemas"})
"""Keywords with a schema for each name of the client's."""
_DATA = frozenset({"enum", "const", "default", "examples", "required"})
"""Keywords with values in which there is no schema."""
_MAX_SCHEMAS = 10_000
"""In one schema, once its references are replaced; no table has more columns."""
_STATUSES = {status.phrase: status.value for status in HTTPStatus}

_Json = dict[str, Any]


def write_row(endpoint: str, model: str, custom_id: str, body: bytes) -> bytes:
    """The row of a line.

    Args:
        custom_id: At most 16 of `a-z`, `0-9` and `-`.
        body: In OpenAI's form.

    Raises:
        Untranslatable: Gemini has no form for it, or a table has none.
    """
    said = msgspec.json.decode(gemini.translate_request(endpoint, model, body), type=_Json)
    name = _PREFIX + custom_id
    if endpoint == EMBEDDINGS:
        return msgspec.json.encode({"key": name, "request": _embedding(said)})
    try:
        request = _table_row(said, endpoint)
    except RecursionError:
        raise _refused("", f"something deeper than {_LEVELS} levels") from None
    return msgspec.json.encode({"request": {**request, "labels": {LABEL: name}}})


def read_row(endpoint: str, model: str, row: bytes, *, created_at: int) -> NativeResult | None:
    """What a row of the output says; None if it does not say of which line."""
    try:
        row.decode()
        found = msgspec.json.decode(row, type=_Row)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    name = found.key or (found.request.labels or {}).get(LABEL, "")
    if not name.startswith(_PREFIX):
        return None
    custom_id = name.removeprefix(_PREFIX)
    reply = _reply(found, endpoint, model, created_at)
    lack = Lack.LOST if reply is None else None
    return NativeResult(custom_id=custom_id, reply=reply, lack=lack)


def _reply(found: "_Row", endpoint: str, model: str, created_at: int) -> Reply | None:
    if found.status:
        body, status_code = _error(found.status), _status_code(found.status)
    elif found.response:
        body, status_code = msgspec.json.encode(_with_usage(found.response)), None
    else:
        return None
    return gemini.translate_reply(
        endpoint, model, body, created_at=created_at, status_code=status_code
    )


def _error(status: str) -> bytes:
    """The error in a row's status, which stands behind its name, as Google's API gives it."""
    start = status.find('{"error"')
    if start >= 0:
        return status[start:].encode()
    return msgspec.json.encode({"error": {"message": status}})


def _status_code(status: str) -> int:
    """By the phrase at its beginning; the code in the error itself is the same."""
    return _STATUSES.get(status.partition(":")[0].strip(), 500)


def _with_usage(response: _Json) -> _Json:
    """An embedding's count of tokens where Gemini's own answer has it."""
    count = response.get("tokenCount")
    if count is None or "usageMetadata" in response or not str(count).isdecimal():
        return response
    return {**response, "usageMetadata": {"promptTokenCount": int(count)}}


def _table_row(said: _Json, endpoint: str) -> _Json:
    is_response = endpoint == RESPONSES
    _flatten_schemas(said, "text.format" if is_response else "response_format")
    _leave_out_empty_arguments(said)
    return _column(said, "input" if is_response else "messages", 1)


def _embedding(said: _Json) -> _Json:
    request: _Json = {"content": said["content"]}
    if "outputDimensionality" in said:
        config = {"output_dimensionality": said["outputDimensionality"]}
        request["embed_content_config"] = config
    return request


# What a table can hold


def _column(value: Any, field: str, level: int) -> Any:
    """A value, if a table has columns for it.

    Args:
        field: Whose fault it is.
        level: At which the columns of its names would lie.

    Raises:
        Untranslatable: It has a name, a depth, an emptiness or a mixture that no table has.
    """
    if isinstance(value, list):
        items = cast("list[Any]", value)
        _check_list(items, field)
        return [_column(each, field, level) for each in items]
    if not isinstance(value, dict):
        return value
    named = cast("_Json", value)
    if level > _LEVELS:
        raise _refused(field, f"something deeper than {_LEVELS} levels")
    for name, each in named.items():
        if not _COLUMN.fullmatch(name):
            raise _refused(field, f"the name {name!r}, which is not of letters, digits and _")
        if each == {} or each is None:
            raise _refused(field, f"nothing in {name!r}")
    return {name: _column(each, field, level + 1) for name, each in named.items()}


def _check_list(items: list[Any], field: str) -> None:
    kinds = {_kind(each) for each in items}
    if len(kinds) > 1 or kinds & {"list", "nothing"}:
        raise _refused(field, "a list with null, lists, nothing or different kinds in it")


def _kind(value: Any) -> str:
    if value is None or value == {}:
        return "nothing"
    return "number" if type(value) in (int, float) else type(value).__name__


def _refused(field: str, what: str) -> Untranslatable:
    return Untranslatable(
        field, f"It has {what}; Vertex AI's batches are read as a table and cannot hold it."
    )


def _leave_out_empty_arguments(said: _Json) -> None:
    for content in said["contents"]:
        for part in content["parts"]:
            if part.get("functionCall", {}).get("args") == {}:
                del part["functionCall"]["args"]


# Schemas


def _flatten_schemas(said: _Json, output_field: str) -> None:
    config = said.get("generationConfig", {})
    if "responseJsonSchema" in config:
        schema = _Flattening(config["responseJsonSchema"], output_field).result()
        config["responseJsonSchema"] = _column(schema, output_field, 3)
    for tool in said.get("tools", []):
        for declared in tool.get("functionDeclarations", []):
            schema = _Flattening(declared.pop("parametersJsonSchema"), "tools").result()
            if schema:  # a function without parameters has none
                declared["parametersJsonSchema"] = _column(schema, "tools", 4)


class _Flattening:
    """Makes a schema one without references to its parts and without lists of types."""

    def __init__(self, schema: _Json, field: str) -> None:
        self._schema = schema
        self._field = field
        self._parts = {**schema.get("definitions", {}), **schema.get("$defs", {})}
        self._left = _MAX_SCHEMAS

    def result(self) -> _Json:
        return self._flat(self._schema, ())

    def _flat(self, schema: _Json, inside: tuple[str, ...]) -> _Json:
        self._left -= 1
        if self._left < 0:  # a few references to references would make any number of them
            raise _refused(self._field, f"more than {_MAX_SCHEMAS} schemas in its schema")
        found = {name: each for name, each in schema.items() if name not in _ANNOTATIONS}
        if isinstance(reference := found.pop("$ref", None), str):
            part = self._look_up(reference, inside)
            return self._flat({**part, **found}, (*inside, reference))
        types = found.get("type")
        if isinstance(types, list) and "anyOf" not in found:
            del found["type"]
            found["anyOf"] = [{"type": each} for each in cast("list[Any]", types)]
        if found.get("default", "") is None:
            del found["default"]  # an annotation
        flat = {name: self._keyword(name, each, inside) for name, each in found.items()}
        return {name: each for name, each in flat.items() if each != {} or name not in _EMPTY}

    def _keyword(self, name: str, value: Any, inside: tuple[str, ...]) -> Any:
        if name in _DATA:
            return value
        if isinstance(value, list):
            items = cast("list[Any]", value)
            return [
                self._flat(cast("_Json", each), inside) if isinstance(each, dict) else each
                for each in items
            ]
        if not isinstance(value, dict):
            return value
        named = cast("_Json", value)
        if name in _MAPS:
            return {key: self._keyword("", each, inside) for key, each in named.items()}
        return self._flat(named, inside)

    def _look_up(self, reference: str, inside: tuple[str, ...]) -> _Json:
        if reference in inside:
            raise _refused(self._field, f"a schema that is part of itself ({reference})")
        part = self._parts.get(reference.rpartition("/")[2])
        if not isinstance(part, dict):
            raise Untranslatable(self._field, f"There is no {reference} in the schema.")
        return cast("_Json", part)


# The wire, as far as it is read


class _Request(msgspec.Struct):
    labels: dict[str, str] | None = None


class _Row(msgspec.Struct):
    key: str = ""
    status: str = ""
    request: _Request = msgspec.field(default_factory=_Request)
    response: _Json | None = None
