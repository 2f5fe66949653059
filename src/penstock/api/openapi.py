"""The document at `/openapi.json`: exactly what each route takes and answers.

FastAPI drafts the parameters, which it reads itself; everything else is written here from the
table of routes. Its own draft of the rest would name a shape of errors that never goes out
(422, `detail`), and say that a query parameter may be null.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from penstock.api.lines import LINE_SCHEMAS
from penstock.api.operations import Answer, Route, Schema
from penstock.api.wire import ErrorShape

_REF = "#/components/schemas/"
_EVERY_ANSWER = ("x-request-id", "openai-processing-ms")

DESCRIPTION = """\
The OpenAI Batch API, self-hosted.

Every path below `/v1` is also found below `/openai/v1`, `/openai`,
`/openai/deployments/{deployment}` and `/api/llm`. Query parameters and headers that are not
named here are ignored; unknown members of a body are refused.

Every error is an `Error` object, also that of a path that there is not (404) and of a method
that a path does not have (405, with `Allow`)."""

TAGS = {
    "batches": "Many requests as one file, run within a completion window.",
    "files": "What batches read, and what they leave.",
    "uploads": "Large files, sent in parts.",
    "models": "What the lines of a batch may name.",
    "health": "Whether the process lives, and whether it can work.",
}

HEADERS: dict[str, Schema] = {
    "x-request-id": {
        "description": "The request's ID, under which the server's log tells of it.",
        "schema": {"type": "string", "pattern": "^req_[0-9a-f]{32}$"},
    },
    "openai-processing-ms": {
        "description": "How long the answer took to begin, in milliseconds.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "www-authenticate": {
        "description": "How to send a key.",
        "schema": {"type": "string", "enum": ["Bearer"]},
    },
    "x-should-retry": {
        "description": "Tells OpenAI's clients not to send the request again.",
        "schema": {"type": "string", "enum": ["false"]},
    },
    "retry-after": {
        "description": "After how many seconds to send the request again.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "etag": {
        "description": "Names the content; it never changes while the file is there.",
        "schema": {"type": "string", "pattern": '^"[0-9a-f]{64}"$'},
    },
    "accept-ranges": {
        "description": "A part of the file may be asked for.",
        "schema": {"type": "string", "enum": ["bytes"]},
    },
    "content-range": {
        "description": "Which bytes of the file these are, or how many it has.",
        "schema": {"type": "string", "pattern": r"^bytes ([0-9]+-[0-9]+|\*)/[0-9]+$"},
    },
    "content-length": {
        "description": "How many bytes the body has.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "content-disposition": {
        "description": "The file's name.",
        "schema": {"type": "string", "pattern": '^attachment; filename="'},
    },
    "x-content-type-options": {
        "description": "The content is not to be guessed at.",
        "schema": {"type": "string", "enum": ["nosniff"]},
    },
}

ERRORS: dict[int, tuple[str, tuple[str, ...]]] = {
    400: ("The request is not allowed; the message says why. Nothing was changed.", ()),
    401: ("No key was sent, or it is not known.", ("www-authenticate",)),
    404: ("There is no such object, or it belongs to another project.", ()),
    409: ("The object's state does not allow this; nothing was changed.", ("x-should-retry",)),
    416: ("The file has no such range.", ("content-range",)),
    502: ("An upstream did not answer.", ()),
    503: ("Storage is unavailable for now. Nothing was half done.", ("retry-after",)),
}
"""What each status of a refusal means, and which headers it has."""

_SECURITY_SCHEMES: Schema = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "A key of this server."},
    "api-key": {
        "type": "apiKey",
        "in": "header",
        "name": "api-key",
        "description": "The same, as Azure's clients send it.",
    },
}


def make_document(
    draft: Schema, routes: Sequence[tuple[str, Route]], *, needs_key: bool
) -> Schema:
    """Write the OpenAPI document.

    Args:
        draft: FastAPI's own document of the same routes.
        routes: Each route after its prefix.
        needs_key: Whether requests are asked for a key; if not, one is still let pass.
    """
    paths: Schema = {}
    for prefix, route in routes:
        path, method = prefix + route.path, route.method.lower()
        drafted = draft["paths"][path][method].get("parameters", [])
        operation = _operation(route, drafted, needs_key=needs_key)
        if links := _links(route, [other for _, other in routes]):
            operation["responses"]["200"]["links"] = links
        paths.setdefault(path, {})[method] = operation
    schemas = _enums(draft, paths) | _schemas(routes)
    used = {route.tag for _, route in routes}
    document = {
        "openapi": draft["openapi"],
        "info": draft["info"] | {"description": _unwrapped(DESCRIPTION), "license": _license()},
        "tags": [{"name": k, "description": text} for k, text in TAGS.items() if k in used],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "responses": {
                _error_name(status): _response(
                    Answer(
                        status=status,
                        description=text,
                        content={"application/json": ErrorShape},
                        headers=headers,
                    )
                )
                for status, (text, headers) in ERRORS.items()
                if any(status in _errors(route, needs_key=True) for _, route in routes)
            },
            "headers": {name: header | {"required": True} for name, header in HEADERS.items()},
            "securitySchemes": _SECURITY_SCHEMES,
        },
    }
    return _without_suffix(document)


def _license() -> Schema:
    return {"name": "Apache-2.0", "identifier": "Apache-2.0"}


def _operation(route: Route, drafted: Iterable[Schema], *, needs_key: bool) -> Schema:
    summary, _, description = inspect.cleandoc(route.call.__doc__ or "").partition("\n")
    operation: Schema = {
        "operationId": route.operation_id,
        "tags": [route.tag],
        "summary": summary.removesuffix("."),
    }
    if text := _unwrapped(description):
        operation["description"] = text
    parameters = [_parameter(one) for one in drafted] + list(route.parameters)
    if parameters:
        operation["parameters"] = parameters
    if route.reads is not None:
        schema = _schema_of(route.reads.shape)
        content = {route.reads.media_type: {"schema": schema}}
        operation["requestBody"] = {"required": True, "content": content}
    responses = {str(a.status): _response(a) for a in route.list_answers()}
    for status in _errors(route, needs_key=needs_key):
        if route.method == "HEAD":
            responses[str(status)] = _response(
                Answer(
                    status=status,
                    description=ERRORS[status][0],
                    content={},
                    headers=ERRORS[status][1],
                )
            )
        else:
            responses[str(status)] = {"$ref": f"#/components/responses/{_error_name(status)}"}
    operation["responses"] = responses
    keys: list[Schema] = [{"bearer": []}, {"api-key": []}]
    operation["security"] = [] if not route.asks_for_key else keys if needs_key else [{}, *keys]
    return operation


def _links(route: Route, routes: Iterable[Route]) -> Schema:
    """What can be done with the object that a route creates: all that is below its path."""
    below = re.compile(re.escape(route.path) + r"/\{(\w+)\}(/.*)?")
    if route.method != "POST" or "{" in route.path:
        return {}
    return {
        other.operation_id: {
            "operationId": other.operation_id,
            "parameters": {found[1]: "$response.body#/id"},
        }
        for other in routes
        if (found := below.fullmatch(other.path))
    }


def _errors(route: Route, *, needs_key: bool) -> list[int]:
    """Each status of a refusal that this route may answer, in order."""
    if not route.asks_for_key:
        return sorted(route.errors)
    return sorted({*route.errors, 503, *([401] if needs_key else [])})


def _error_name(status: int) -> str:
    return {
        400: "BadRequest",
        401: "Unauthorized",
        404: "NotFound",
        409: "Conflict",
        416: "RangeNotSatisfiable",
        502: "BadGateway",
        503: "Unavailable",
    }[status]


def _response(answer: Answer) -> Schema:
    response: Schema = {
        "description": answer.description,
        "headers": {
            name: {"$ref": f"#/components/headers/{name}"}
            for name in (*_EVERY_ANSWER, *answer.headers)
        },
    }
    if answer.content:
        response["content"] = {
            media_type: {"schema": _schema_of(shape)}
            for media_type, shape in answer.content.items()
        }
    return response


def _schema_of(shape: type[BaseModel] | Schema) -> Schema:
    return shape if isinstance(shape, dict) else {"$ref": _REF + shape.__name__}


def _parameter(drafted: Schema) -> Schema:
    """A parameter as FastAPI drafts it, without what cannot be sent: null."""
    schema = _drop_titles(drafted["schema"])
    choices = [one for one in schema.pop("anyOf", []) if one != {"type": "null"}]
    if len(choices) == 1:
        schema |= choices[0]
    # Beside the parameter's own description it says the same again.
    schema.pop("description", None)
    kept = {k: v for k, v in drafted.items() if k in ("name", "in", "required", "description")}
    return kept | {"schema": schema}


def _enums(draft: Schema, paths: Schema) -> Schema:
    """What the parameters refer to; the draft has much more that nobody does."""
    text = json.dumps(paths)
    drafted = draft.get("components", {}).get("schemas", {})
    return {
        name: _drop_titles(schema)
        for name, schema in drafted.items()
        if f'"{_REF}{name}"' in text
    }


def _schemas(routes: Sequence[tuple[str, Route]]) -> Schema:
    shapes: dict[type[BaseModel], None] = {ErrorShape: None}
    for _, route in routes:
        read = [] if route.reads is None else [route.reads.shape]
        answered = [s for a in route.list_answers() for s in a.content.values()]
        shapes |= {shape: None for shape in (*read, *answered) if not isinstance(shape, dict)}
    _, definitions = models_json_schema(
        [(shape, "validation") for shape in shapes], ref_template=_REF + "{model}"
    )
    lines = {
        name: {k: v for k, v in schema.items() if k != "$schema"}
        for name, schema in LINE_SCHEMAS.items()
    }
    return _drop_titles(definitions["$defs"]) | lines


def _drop_titles(document: Any) -> Any:
    """Drop the titles that pydantic makes of names, which say nothing more than those."""
    return _rewrite(
        document,
        lambda found: {
            key: value
            for key, value in found.items()
            if key != "title" or not isinstance(value, str)
        },
    )


def _without_suffix(document: Schema) -> Schema:
    """Name the shapes as the API does: `BatchShape` is `Batch` for everybody outside."""
    components = document["components"]
    components["schemas"] = {
        name.removesuffix("Shape"): schema for name, schema in components["schemas"].items()
    }

    def renamed(found: Schema) -> Schema:
        ref = found.get("$ref")
        return found if ref is None else found | {"$ref": ref.removesuffix("Shape")}

    return _rewrite(document, renamed)


def _rewrite(value: Any, change: Callable[[Schema], Schema]) -> Any:
    """Rewrite every object of a document, the inner ones first."""
    if isinstance(value, list):
        return [_rewrite(one, change) for one in cast(list[Any], value)]
    if isinstance(value, dict):
        inner = cast(Schema, value).items()
        return change({key: _rewrite(one, change) for key, one in inner})
    return value


def _unwrapped(text: str) -> str:
    """Each paragraph on one line: the other line ends are those of the source only."""
    paragraphs = [" ".join(part.split()) for part in text.strip().split("\n\n")]
    return "\n\n".join(part for part in paragraphs if part)
