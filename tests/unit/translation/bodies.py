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


RICH_CHAT = chat(
    {"role": "system", "content": "Be brief."},
    *TOOL_TALK,
    {"role": "assistant", "content": "Rome.", "refusal": None},
    user(
        [
            {"type": "text", "text": "And here?"},
            image(f"data:image/png;base64,{PNG}"),
        ]
    ),
    max_completion_tokens=4000,
    stop=["END"],
    tool_choice="auto",
    tools=[LOOSE_TOOL],
    user="ada",
)
RICH_RESPONSE = response(
    [
        user([{"type": "input_text", "text": "Weather?"}]),
        {
            "type": "function_call",
            "call_id": "call_1",
            "name": "get_weather",
            "arguments": "{}",
        },
        {"type": "function_call_output", "call_id": "call_1", "output": "18"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "18."}]},
        user("Thanks."),
    ],
    instructions="Be brief.",
    max_output_tokens=4000,
    tools=[{"type": "function", **LOOSE_TOOL["function"]}],
)
SAMPLES: list[tuple[str, bytes]] = [
    (CHAT, chat()),
    (CHAT, RICH_CHAT),
    (CHAT, chat(response_format=CITY_FORMAT)),
    (CHAT, chat(response_format={"type": "json_object"})),
    (CHAT, chat(tools=[WEATHER_TOOL], tool_choice="required")),
    (CHAT, chat(tools=[LOOSE_TOOL], parallel_tool_calls=False)),
    (CHAT, chat(tools=[LOOSE_TOOL], tool_choice="none")),
    (
        CHAT,
        chat(
            tools=[LOOSE_TOOL],
            tool_choice={"type": "function", "function": {"name": "get_weather"}},
        ),
    ),
    (CHAT, chat(user([image("https://example.com/cat.png")]))),
    (CHAT, chat(temperature=0.5, top_p=0.5, top_k=5)),
    (CHAT, chat(seed=5, n=2, presence_penalty=1, frequency_penalty=-1)),
    (CHAT, chat(logprobs=True, top_logprobs=2)),
    *[
        (CHAT, chat(reasoning_effort=effort))
        for effort in ("none", "minimal", "low", "medium", "high", "xhigh", "max")
    ],
    (RESPONSES, RICH_RESPONSE),
    (RESPONSES, response(reasoning={"effort": "high", "summary": "auto"})),
    (EMBEDDINGS, embeddings(["Hello."], dimensions=256)),
]
"""Bodies that between them use everything that some provider has a counterpart to."""
