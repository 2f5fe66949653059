"""Holds JSON documents against the types of the providers' own Python clients.

Runs where those are installed and nothing of ours is. Reads a list of `{"type", "body"}` from
standard input and prints, for each, null or what is wrong with it.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

from anthropic.types import (
    ImageBlockParam,
    Message,
    MessageCreateParams,
    TextBlockParam,
    ToolResultBlockParam,
    ToolUseBlockParam,
)
from google.genai import types
from pydantic import BaseModel, ConfigDict, TypeAdapter

_FORBID = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
_NOT_IN_TYPES = ("temperature", "top_p", "top_k")
"""Older models take them, the client's types have dropped them."""
_message_params = TypeAdapter(MessageCreateParams, config=_FORBID)
# The union of all blocks has blocks of answers too, which take any field.
_BLOCKS: dict[str, TypeAdapter[Any]] = {
    "text": TypeAdapter(TextBlockParam),
    "image": TypeAdapter(ImageBlockParam),
    "tool_use": TypeAdapter(ToolUseBlockParam),
    "tool_result": TypeAdapter(ToolResultBlockParam),
}
_GEMINI_FIELDS: dict[str, TypeAdapter[Any]] = {
    "contents": TypeAdapter(list[types.Content]),
    "systemInstruction": TypeAdapter(types.Content),
    "tools": TypeAdapter(list[types.Tool]),
    "toolConfig": TypeAdapter(types.ToolConfig),
    "generationConfig": TypeAdapter(types.GenerationConfig),
}


def read(value: Any) -> Any:
    """What was validated, as plain JSON; an `Iterable` is validated while it is read."""
    if isinstance(value, BaseModel):
        return read(value.model_dump(exclude_unset=True))
    if isinstance(value, dict):
        return {name: read(each) for name, each in value.items()}
    if isinstance(value, list) or type(value).__name__ == "ValidatorIterator":
        return [read(each) for each in value]
    return value


def check_messages(body: Any) -> None:
    kept = {name: value for name, value in body.items() if name not in _NOT_IN_TYPES}
    check_known(_message_params, kept)
    for message in body["messages"]:
        for block in message["content"]:
            check_known(_BLOCKS[block["type"]], block)


def check_claude_on_bedrock(body: Any) -> None:
    """Its version stands in the body, and its model in the address."""
    assert body["anthropic_version"] == "bedrock-2023-05-31"
    kept = {name: value for name, value in body.items() if name != "anthropic_version"}
    check_messages({"model": "m", **kept})


def check_known(adapter: TypeAdapter[Any], value: Any) -> None:
    """A field that a type does not know is dropped, and so found missing."""
    if (known := read(adapter.validate_python(value))) != value:
        raise ValueError(f"only this is known: {known}")


def check_generate_content(body: Any) -> None:
    for name, value in body.items():
        _GEMINI_FIELDS[name].validate_json(json.dumps(value))


def check_embed_content(body: Any) -> None:
    config = {key: value for key, value in body.items() if key not in ("model", "content")}
    types.EmbedContentConfig.model_validate(config)
    types.Content.model_validate(body["content"])


CHECKS: dict[str, Callable[[Any], object]] = {
    "anthropic": check_messages,
    "anthropic-answer": lambda body: Message.model_validate(body, strict=True),
    "bedrock-claude": check_claude_on_bedrock,
    "gemini": check_generate_content,
    "gemini-embedding": check_embed_content,
    "gemini-answer": lambda body: types.GenerateContentResponse.model_validate_json(
        json.dumps(body)
    ),
}


def main() -> None:
    found: list[str | None] = []
    for document in json.load(sys.stdin):
        try:
            CHECKS[document["type"]](document["body"])
            found.append(None)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
