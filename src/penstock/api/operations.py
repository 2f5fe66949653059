"""What a route says about itself; `openapi` makes the document of it.

A route's query and header parameters stand in the signature of the function that it calls,
with their bounds and descriptions, and its summary and description are that function's
docstring. What FastAPI cannot see there, because it is read and answered by hand, is told
here: bodies, answers and errors.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Response
from pydantic import BaseModel

Schema = dict[str, Any]
"""A JSON Schema (2020-12), or a parameter or header of an OpenAPI document."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """What a request brings."""

    media_type: str
    shape: type[BaseModel] | Schema


def json_body(shape: type[BaseModel]) -> Body:
    """A JSON object."""
    return Body(media_type="application/json", shape=shape)


def form_body(schema: Schema) -> Body:
    """A multipart form, whose parts are the properties of an object."""
    return Body(media_type="multipart/form-data", shape=schema)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One way in which a route may answer."""

    status: int = 200
    description: str
    content: Mapping[str, type[BaseModel] | Schema]
    """Shape or schema by media type; empty if it has no body."""
    headers: tuple[str, ...] = ()
    """Which of `openapi.HEADERS` it has beside those that are on every answer."""


def object_answer(shape: type[BaseModel], *, status: int = 200) -> Answer:
    """A JSON object, described by the docstring of its shape."""
    return Answer(
        status=status,
        description=(shape.__doc__ or "").strip(),
        content={"application/json": shape},
    )


@dataclass(frozen=True, slots=True)
class Route:
    """A row of the table of routes."""

    method: str
    path: str
    call: Callable[..., Awaitable[Response]]
    answers: type[BaseModel] | tuple[Answer, ...]
    """What it answers if all is well; a shape stands for its `object_answer`."""
    errors: tuple[int, ...] = ()
    """The statuses of its refusals, without 401 and 503 of a route that asks for a key."""
    reads: Body | None = None
    """The request's body; None if nothing is read."""
    parameters: tuple[Schema, ...] = ()
    """Parameters that are read by hand, in OpenAPI's form."""
    asks_for_key: bool = True

    @property
    def tag(self) -> str:
        """Under which heading it is found."""
        return self.path.split("/")[1] if self.asks_for_key else "health"

    @property
    def operation_id(self) -> str:
        """The name of its function, as generated clients spell it: `createBatch`."""
        first, *others = self.call.__name__.split("_")
        return first + "".join(word.capitalize() for word in others)

    def list_answers(self) -> tuple[Answer, ...]:
        """What it answers if all is well."""
        if isinstance(self.answers, tuple):
            return self.answers
        return (object_answer(self.answers),)
