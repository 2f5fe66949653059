"""What reading chat completions and responses have in common."""

from collections.abc import Mapping
from typing import Any, Literal

from penstock.upstream.translation.base import (
    Image,
    Part,
    Request,
    Schema,
    Text,
    Tool,
    ToolCall,
    ToolChoice,
    ToolMode,
    ToolResult,
    Turn,
    Untranslatable,
)

Harmless = Any
"""The type of a field that is ignored, whatever it holds."""
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
MAX_STOPS = 4
"""As OpenAI allows."""


class TurnsBuilder:
    """Puts messages together into turns, in which user and model alternate.

    The results of tools stand before what else the user says in the same turn, as the calls
    that they belong to came before it.
    """

    def __init__(self) -> None:
        self.system: list[Text] = []
        self._turns: list[Turn] = []
        self._calls: dict[str, str] = {}
        self._open: dict[str, str] = {}

    def add_system(self, texts: list[Text], field: str) -> None:
        if self._turns:
            raise Untranslatable(
                f"{field}.role",
                "Instructions must come before the first message of user or assistant.",
            )
        self.system += [text for text in texts if text.text]

    def add_user(self, parts: list[Part], field: str) -> None:
        self._add(False, parts, field)

    def add_model(self, parts: list[Part], field: str) -> None:
        if not self._turns:
            raise Untranslatable(
                f"{field}.role", "The first message after the instructions must be the user's."
            )
        self._add(True, parts, field)
        for part in parts:
            if isinstance(part, ToolCall):
                if part.id in self._calls:
                    raise Untranslatable(
                        f"{part.field}.id", f"Two calls have the ID {_shown(part.id)}."
                    )
                self._calls[part.id] = part.name
                self._open[part.id] = part.field

    def add_result(self, call_id: str, id_field: str, parts: list[Part], field: str) -> None:
        if call_id not in self._open:
            what = "has a result already" if call_id in self._calls else "is no call before it"
            raise Untranslatable(
                id_field, f"{_shown(call_id)} {what}; it must be a call without one."
            )
        del self._open[call_id]
        kept = [part for part in parts if isinstance(part, Text | Image)]
        result = ToolResult(call_id, self._calls[call_id], kept, field)
        turn = self._turn(False, field)
        if any(not isinstance(part, ToolResult) for part in turn.parts):
            raise Untranslatable(
                f"{field}", "The results of tools must follow the calls at once."
            )
        turn.parts.append(result)

    def finish(self, field: str) -> list[Turn]:
        if not self._turns:
            raise Untranslatable(field, "There must be a message of the user.")
        if self._open:
            call_id, where = next(iter(self._open.items()))
            raise Untranslatable(where, f"The call {_shown(call_id)} has no result.")
        return self._turns

    def _add(self, is_model: bool, parts: list[Part], field: str) -> None:
        kept = [part for part in parts if not (isinstance(part, Text) and not part.text)]
        if not kept:
            raise Untranslatable(f"{field}.content", "A message must not be empty.")
        turn = self._turn(is_model, field)
        if self._open and not (is_model and self._is_calling(turn)):
            call_id, where = next(iter(self._open.items()))
            raise Untranslatable(where, f"The call {_shown(call_id)} has no result.")
        turn.parts.extend(kept)

    def _turn(self, is_model: bool, field: str) -> Turn:
        if not self._turns or self._turns[-1].is_model != is_model:
            self._turns.append(Turn(is_model, [], field))
        return self._turns[-1]

    def _is_calling(self, turn: Turn) -> bool:
        return any(isinstance(part, ToolCall) for part in turn.parts)


def choose_tools(
    tools: list[Tool], choice: ToolChoice | None, allowed: list[str] | None, field: str
) -> tuple[list[Tool], ToolChoice | None]:
    """Leave those tools that may be called.

    Args:
        allowed: The names of these; None allows all.
        field: Where the choice stands.
    """
    names = [tool.name for tool in tools]
    for index, tool in enumerate(tools):
        if tool.name in names[:index]:
            raise Untranslatable(
                f"{tool.field}.name", f"Two tools have the name {_shown(tool.name)}."
            )
    wanted = [choice.name] if choice and choice.name is not None else allowed or []
    for name in wanted:
        if name not in names:
            told = ", ".join(map(_shown, names)) or "none are given"
            raise Untranslatable(field, f"There is no tool {_shown(name)}; tools: {told}.")
    if choice and choice.mode is ToolMode.REQUIRED and not tools:
        raise Untranslatable(field, "A tool is required, but `tools` gives none.")
    if allowed is not None:
        tools = [tool for tool in tools if tool.name in allowed]
        if not tools:
            raise Untranslatable(field, "One tool at least must be allowed.")
    return tools, choice if tools else None


def check_common(request: Request) -> None:
    """Refuse what OpenAI refuses, so that no provider has to."""
    request.check_range("temperature", 0, 2, "OpenAI")
    request.check_range("top_p", 0, 1, "OpenAI")
    request.check_range("presence_penalty", -2, 2, "OpenAI")
    request.check_range("frequency_penalty", -2, 2, "OpenAI")
    request.check_range("top_logprobs", 0, 20, "OpenAI")
    request.check_range("choices", 1, 128, "OpenAI")
    request.check_range("max_tokens", 1, 1 << 31, "OpenAI")
    request.check_range("top_k", 1, 1 << 31, "a provider")
    request.check_range("seed", -(1 << 63), (1 << 63) - 1, "OpenAI")
    if len(request.stop) > MAX_STOPS:
        request.refuse("stop", f"There are {len(request.stop)}; {MAX_STOPS} are allowed.")
    if any(not stop for stop in request.stop):
        request.refuse("stop", "A stop sequence must not be empty.")


def refuse_given(body: object, refused: Mapping[str, str]) -> None:
    for field, message in refused.items():
        if getattr(body, field) not in (None, [], {}):
            raise Untranslatable(field, message)


def join_description(schema: Schema, description: str | None) -> Schema:
    """A schema with what was said about it beside it, where no provider has a place."""
    if description is None or "description" in schema:
        return schema
    return {**schema, "description": description}


def _shown(text: str) -> str:
    return repr(text if len(text) <= 64 else f"{text[:63]}…")
