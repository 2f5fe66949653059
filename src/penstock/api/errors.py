"""How errors look on the wire; the only place that knows.

Every error, also an unknown route or a fault of our own, is OpenAI's error object: its clients
show the message only from there. `detail`, FastAPI's own shape, never goes out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from penstock.api.wire import answer
from penstock.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    PenstockError,
    StorageUnavailable,
    Unauthorized,
    UpstreamDown,
)
from penstock.refusals import (
    above_maximum,
    below_minimum,
    missing_parameter,
    quoted,
    unknown_parameter,
    wrong_type,
)

RETRY_AFTER_S = 5
"""When to try again while storage is unavailable. The SDKs honour up to a minute."""
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_EXPECTED = {
    "string_type": "a string",
    "dict_type": "an object",
    "model_type": "an object",
    "list_type": "an array",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_parsing_size": "an integer",
    "int_from_float": "an integer",
}
"""What each of pydantic's errors about a type wanted."""


def error_answer(
    status: int,
    message: str,
    *,
    type_: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An answer that holds OpenAI's error object."""
    # Half a surrogate pair cannot be written as UTF-8.
    message = message.encode("utf-8", "replace").decode()
    param = param and param.encode("utf-8", "replace").decode()
    error = {"message": message, "type": type_, "param": param, "code": code}
    return answer({"error": error}, status=status, headers=headers)


def to_answer(error: PenstockError) -> Response | None:
    """The answer for an error of the tree; None if it should never have come this far."""
    match error:
        case InvalidRequest():
            return error_answer(400, error.message, param=error.param, code=error.code)
        case Unauthorized():
            headers = {"www-authenticate": "Bearer"}
            return error_answer(401, error.message, code=error.code, headers=headers)
        case NotFound():
            return error_answer(404, error.message, param=error.param)
        case Conflict():
            # The SDKs try a 409 again, twice, unless they are told not to.
            return error_answer(409, str(error), headers={"x-should-retry": "false"})
        case UpstreamDown():
            return error_answer(502, str(error), type_="server_error")
        case StorageUnavailable():
            headers = {"retry-after": str(RETRY_AFTER_S)}
            return error_answer(503, str(error), type_="server_error", headers=headers)
        case _:
            return None


def fault_answer(request_id: str) -> Response:
    """The answer for a fault of our own."""
    return error_answer(
        500,
        "The server had an error while processing your request. The server's log tells more "
        f"under the request ID {request_id}.",
        type_="server_error",
    )


def explain(errors: Sequence[Any]) -> InvalidRequest:
    """The first of pydantic's errors, in OpenAI's words.

    Args:
        errors: As pydantic's `errors()` gives them, at least one, each place without its
            `body` or `query`. They are untyped dictionaries there.
    """
    error = errors[0]
    given: object = error["input"]
    context: dict[str, Any] = error.get("ctx") or {}
    param = quoted(".".join(str(part) for part in error["loc"]))
    match error["type"]:
        case "missing":
            return missing_parameter(param)
        case "extra_forbidden":
            return unknown_parameter(param)
        case "greater_than_equal":
            return below_minimum(param, str(given), context["ge"])
        case "less_than_equal":
            return above_maximum(param, str(given), context["le"])
        case "enum" | "literal_error":
            return InvalidRequest(
                f"Invalid value: {_describe(given)}. Supported values are: "
                f"{context['expected']}.",
                param=param,
                code="invalid_value",
            )
        case kind if kind in _EXPECTED:
            return wrong_type(param, expected=_EXPECTED[kind], given=_describe(given))
        case _:
            message = f"Invalid '{param}': {error['msg']}."
            return InvalidRequest(message, param=param or None, code="invalid_value")


def _describe(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int():
            return "an integer"
        case float():
            return "a number"
        case str():
            return f"'{quoted(value)}'"
        case list():
            return "an array"
        case _:
            return "an object"


async def _on_penstock_error(request: Request, error: Exception) -> Response:
    given = to_answer(error) if isinstance(error, PenstockError) else None
    if given is None:
        raise error
    return given


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    faults = [{**fault, "loc": fault["loc"][1:]} for fault in error.errors()]
    return await _on_penstock_error(request, explain(faults))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    place = f"{request.method} {quoted(request.url.path)}"
    headers = error.headers
    match error.status_code:
        case 404:
            message = f"Invalid URL ({place})"
        case 405:
            allowed = ", ".join(_allowed_methods(request))
            headers = {"allow": allowed}
            message = f"Invalid method for URL ({place}). Allowed: {allowed}."
        case _:
            message = str(error.detail)
    return error_answer(error.status_code, message, headers=headers)


def _allowed_methods(request: Request) -> list[str]:
    """All methods of a path: each route knows only its own, so all are asked for each."""
    scope: dict[str, object] = {"type": "http", "path": request.scope["path"], "headers": []}
    return [
        method
        for method in _METHODS
        if any(
            route.matches(scope | {"method": method})[0] is Match.FULL
            for route in request.app.routes
        )
    ]


def handle_errors(app: FastAPI) -> None:
    """Give every error that a route raises its answer."""
    app.add_exception_handler(PenstockError, _on_penstock_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_exception)
