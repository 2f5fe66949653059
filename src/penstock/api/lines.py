"""The lines of input, output and error files as JSON Schemas (2020-12).

Of an input line they say what `jsonl.InputChecker` checks and nothing more: the rest of a
body is between the client and the upstream. Two rules are about a file and not about a line,
and stand in no schema: each `custom_id` is used once, and all lines name the batch's endpoint.
"""

from typing import Any

from penstock.jsonl import MAX_CUSTOM_ID_CHARS
from penstock.model import ENDPOINTS, Endpoint

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_ID = {
    "type": "string",
    "pattern": "^batch_req_[0-9a-f]{32}$",
    "description": "Names this result.",
}
_CUSTOM_ID = {"type": "string", "description": "That of the input line."}


def spellings(endpoint: Endpoint) -> list[str]:
    """The ways to write an endpoint: with `/v1`, and without it, as Azure's clients do."""
    return [endpoint.path, endpoint.path.removeprefix("/v1")]


def _response(body: str) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["status_code", "request_id", "body"],
        "additionalProperties": False,
        "properties": {
            "status_code": {"type": "integer"},
            "request_id": {
                "type": "string",
                "description": "The upstream's `x-request-id`, or one made for it.",
            },
            "body": {"type": "object", "description": body},
        },
    }


def _make_input_line() -> dict[str, Any]:
    return {
        "$schema": _DIALECT,
        "title": "BatchInputLine",
        "description": "A line of the input file of a batch: one request. Each custom_id is "
        "used once in a file, and all lines name the endpoint of the batch.",
        "type": "object",
        "required": ["custom_id", "method", "url", "body"],
        "properties": {
            "custom_id": {
                "type": "string",
                "minLength": 1,
                "maxLength": MAX_CUSTOM_ID_CHARS,
                "description": "Names the request; its result carries it.",
            },
            "method": {"const": "POST"},
            "url": {
                "enum": [url for one in ENDPOINTS.values() for url in spellings(one)],
                "description": "The endpoint that the request calls.",
            },
            "body": {
                "type": "object",
                "description": "What the endpoint is sent, as it stands here.",
                "required": ["model"],
                "properties": {
                    "model": {
                        "type": "string",
                        "minLength": 1,
                        "description": "Decides which upstream takes the request.",
                    },
                    "stream": {"enum": [False, None]},
                },
            },
        },
        "allOf": [
            {
                "if": {
                    "required": ["url"],
                    "properties": {"url": {"enum": spellings(endpoint)}},
                },
                "then": {"properties": {"body": {"required": list(endpoint.required)}}},
            }
            for endpoint in ENDPOINTS.values()
            if endpoint.required != ("model",)
        ],
    }


def _make_output_line() -> dict[str, Any]:
    response = _response("The upstream's answer, as it came.")
    response["properties"]["status_code"] |= {"minimum": 200, "maximum": 299}
    return {
        "$schema": _DIALECT,
        "title": "BatchOutputLine",
        "description": "A line of the output file of a batch: a request that was answered "
        "with success.",
        "type": "object",
        "required": ["id", "custom_id", "response", "error"],
        "additionalProperties": False,
        "properties": {
            "id": _ID,
            "custom_id": _CUSTOM_ID,
            "response": response,
            "error": {"type": "null"},
        },
    }


def _make_error_line() -> dict[str, Any]:
    response = _response(
        "The upstream's answer, as it came; one that is no JSON object is told in an `error` "
        "object."
    )
    response["properties"]["status_code"] |= {"not": {"minimum": 200, "maximum": 299}}
    error = {
        "type": "object",
        "required": ["code", "message"],
        "additionalProperties": False,
        "properties": {
            "code": {
                "type": "string",
                "description": "Why there is no answer, such as batch_expired, "
                "batch_cancelled or request_timeout.",
            },
            "message": {"type": "string"},
        },
    }
    return {
        "$schema": _DIALECT,
        "title": "BatchErrorLine",
        "description": "A line of the error file of a batch: a request that the upstream "
        "refused (`response` holds its answer), or that got no answer (`error` says why).",
        "type": "object",
        "required": ["id", "custom_id", "response", "error"],
        "additionalProperties": False,
        "properties": {"id": _ID, "custom_id": _CUSTOM_ID, "response": {}, "error": {}},
        "oneOf": [
            {"properties": {"response": response, "error": {"type": "null"}}},
            {"properties": {"response": {"type": "null"}, "error": error}},
        ],
    }


LINE_SCHEMAS = {
    schema["title"]: schema
    for schema in (_make_input_line(), _make_output_line(), _make_error_line())
}
"""By title; each stands for itself."""

RESULT_LINE = {
    "anyOf": [
        {"$ref": "#/components/schemas/BatchOutputLine"},
        {"$ref": "#/components/schemas/BatchErrorLine"},
    ]
}
"""A line of results, as the OpenAPI document refers to it."""
