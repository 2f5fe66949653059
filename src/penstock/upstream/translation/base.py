"""What a request asks for and what an answer holds, in no provider's form.

A `Request` is what is left of a chat completion or a response once all that only OpenAI knows
is gone or refused. Each part remembers the field that it came from, so that a provider which
cannot take it names that field.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NoReturn, Protocol

import msgspec

from penstock.upstream.base import Reply

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
EMBEDDINGS = "/v1/embeddings"

Schema = dict[str, Any]
"""A JSON schema; never looked into beyond its first level."""


class Untranslatable(Exception):
    """A request that the provider has no form for; nothing was sent.

    Args:
        field: The field at fault, such as `messages[2].content[0].type`; empty if it is the
            body as a whole, `url` if it is the endpoint.
        message: What is wrong and what is allowed, a sentence for a person.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field
        self.message = message


class Translation(Protocol):
    """What the module of a provider offers."""

    def translate_request(self, endpoint: str, model: str, body: bytes) -> bytes:
        """The provider's body for a line.

        Args:
            endpoint: What the line calls, with `/v1`.
            model: The provider's name of the model; the line's own is not looked at.
            body: The line's body, as it stands in the input file.

        Raises:
            Untranslatable: Something in it has no counterpart at this provider.
        """
        ...

    def translate_reply(
        self,
        endpoint: str,
        model: str,
        body: bytes,
        *,
        created_at: int,
        status_code: int | None = None,
        request_id: str | None = None,
    ) -> Reply:
        """What the provider answered, as OpenAI would have. Raises for nothing.

        Args:
            endpoint: What the line calls, with `/v1`.
            model: As for `translate_request`; an answer that names its model is believed.
            body: The provider's answer or error, or anything else that came.
            created_at: When it was made, in Unix seconds, where the provider does not say.
            status_code: The HTTP status; None where there is none, as in the results of a
                batch: then the body tells.
            request_id: The provider's own, as a header named it.
        """
        ...


# Requests


class Text(msgspec.Struct, frozen=True):
    text: str
    field: str


class Image(msgspec.Struct, frozen=True):
    """An image, by address or by value: either `url` or both others."""

    field: str
    url: str = ""
    media_type: str = ""
    """Such as `image/png`, in small letters."""
    data: str = ""
    """Base64."""


class ToolCall(msgspec.Struct, frozen=True):
    id: str
    name: str
    arguments: Schema
    field: str


class ToolResult(msgspec.Struct, frozen=True):
    id: str
    """Of the call, which stands in an earlier turn."""
    name: str
    """Of the tool that was called."""
    parts: "list[Text | Image]"
    field: str


Part = Text | Image | ToolCall | ToolResult


class Turn(msgspec.Struct, frozen=True):
    """What one side said. Neighbouring turns are of different sides, and none is empty."""

    is_model: bool
    parts: list[Part]
    field: str
    """Of the first message in it."""


class Tool(msgspec.Struct, frozen=True):
    name: str
    description: str | None
    parameters: Schema
    is_strict: bool
    field: str


class ToolMode(StrEnum):
    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"  # one at least; which one, if `ToolChoice.name` says so


class ToolChoice(msgspec.Struct, frozen=True):
    mode: ToolMode
    name: str | None = None


class OutputFormat(msgspec.Struct, frozen=True):
    """JSON is asked for; without a schema any object."""

    field: str
    schema: Schema | None = None


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for. None, False or an empty list: not said."""

    system: list[Text]
    """In the order given; all of them come before the first turn."""
    turns: list[Turn]
    """At least one, the first by the user."""
    tools: list[Tool]
    """Those that may be called: a choice of allowed ones was applied."""
    tool_choice: ToolChoice | None
    one_call: bool
    """Whether at most one tool may be called at once."""
    output: OutputFormat | None
    stop: list[str]
    temperature: float | None
    top_p: float | None
    top_k: int | None
    max_tokens: int | None
    """With reasoning, as OpenAI counts."""
    seed: int | None
    choices: int
    """How many answers, from 1."""
    presence_penalty: float | None
    frequency_penalty: float | None
    effort: str | None
    """`none`, `minimal`, `low`, `medium`, `high`, `xhigh` or `max`."""
    reasoning_summary: bool
    """Whether the reasoning is to be told."""
    top_logprobs: int | None
    """How many alternatives of each token are asked for, from 0; None for no probabilities."""
    names: Mapping[str, str]
    """What the endpoint calls a field that another endpoint calls otherwise, by our name."""

    def refuse(self, field: str, message: str) -> NoReturn:
        raise Untranslatable(self.names.get(field, field), message)

    def refuse_unknown(self, provider: str, *fields: str) -> None:
        """Refuse each of these fields if it was given: the provider has none like it."""
        for field in fields:
            value = getattr(self, field)
            if value is not None and value is not False and value != []:
                self.refuse(field, f"{provider} has no counterpart; leave it out.")

    def check_range(self, field: str, least: float, most: float, who: str) -> None:
        value = getattr(self, field)
        if value is not None and not least <= value <= most:
            self.refuse(field, f"{value} is out of range; {who} takes {least:g} to {most:g}.")


# Answers


class Finish(StrEnum):
    """Why an answer ended, in the words of chat completions."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    CONTENT_FILTER = "content_filter"


class Alternative(msgspec.Struct, frozen=True):
    token: str
    logprob: float


class Token(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    alternatives: list[Alternative]


class MadeCall(msgspec.Struct, frozen=True):
    """A call that the model made."""

    id: str
    name: str
    arguments: str
    """JSON, as the model wrote it or as its provider read it."""


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    finish: Finish
    text: str | None = None
    refusal: str | None = None
    reasoning: list[str] = []
    """What the model told of its thoughts."""
    calls: list[MadeCall] = []
    tokens: list[Token] | None = None


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token figures as OpenAI counts: the first three of each include what follows them."""

    input: int = 0
    """With what was read from a cache and written to it."""
    cached: int = 0
    output: int = 0
    """With reasoning."""
    reasoning: int = 0
    cache_written: int = 0


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    model: str
    choices: list[Choice]
    """At least one."""
    usage: Usage
    created_at: int


class Vectors(msgspec.Struct, frozen=True, kw_only=True):
    """Embeddings, in the order of the inputs."""

    model: str
    vectors: list[list[float]]
    input_tokens: int
    """0 if the provider does not tell."""
