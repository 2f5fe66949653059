"""Bodies of OpenAI's endpoints that the tests of all providers share."""

import json
from typing import Any

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
EMBEDDINGS = "/v1/embeddings"
PNG = "iVBORw0KGgo="
WEATHER: Json = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER_TOOL: Json = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather.",
        "parameters": WEATHER,
        "strict": True,
    },
}
LOOSE_TOOL: Json = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": WEATHER},
}
CITY: Json = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}
CITY_FORMAT: Json = {
    "type": "json_schema",
    "json_schema": {"name": "city", "schema": CITY, "strict": True},
}


def chat(*messages: Json, **fields: Any) -> bytes:
    said = list(messages) or [{"role": "user", "content": "Hello."}]
    return json.dumps({"model": "as-the-client-says", "messages": said, **fields}).encode()


def response(given: Any = "Hello.", **fields: Any) -> bytes:
    return json.dumps({"model": "as-the-client-says", "input": given, **fields}).encode()


def embeddings(given: Any = "Hello.", **fields: Any) -> bytes:
    return json.dumps({"model": "as-the-client-says", "input": given, **fields}).encode()


def user(content: Any) -> Json:
    return {"role": "user", "content": content}


def call(call_id: str, city: str) -> Json:
    function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
    return {"id": call_id, "type": "function", "function": function}


def image(url: str, **fields: Any) -> Json:
    return {"type": "image_url", "image_url": {"url": url, **fields}}


TOOL_TALK: tuple[Json, ...] = (
    user("Weather in Paris and Rome?"),
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [call("call_1", "Paris"), call("call_2", "Rome")],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "18 degrees"},
    {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "25"}]},
    user("Which is warmer?"),
)
"""Two calls at once, their results, and a question about them."""
