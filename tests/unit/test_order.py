"""In which order the lines of a slice are sent."""

import json
import random
from typing import Any

from penstock.executor.order import by_prefix
from penstock.request_lines import iter_requests


def chat(system: str | None, user: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": user}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return {"model": "m", "messages": messages}


def order(*bodies: Any) -> list[int]:
    """The input lines, from 0, in the order in which they are sent."""
    data = b"".join(
        json.dumps(
            {"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": body}
        ).encode()
        + b"\n"
        for n, body in enumerate(bodies)
    )
    return [line.line for line in by_prefix(list(iter_requests(data, first_line=0)))]


def test_the_same_system_prompt_goes_together_in_the_order_it_first_came() -> None:
    bodies = [chat("b", "1"), chat("a", "2"), chat("b", "3"), chat("c", "4"), chat("a", "5")]

    assert order(*bodies) == [0, 2, 1, 4, 3]


def test_lines_of_other_models_are_apart() -> None:
    other = {**chat("a", "2"), "model": "n"}

    assert order(chat("a", "1"), other, chat("a", "3")) == [0, 2, 1]


def test_what_has_nothing_in_common_keeps_its_order() -> None:
    lines = [chat(None, str(n)) for n in range(9)]
    random.Random(1).shuffle(lines)

    assert order(*lines) == list(range(9))
    assert order(*(chat(str(n), "x") for n in range(9))) == list(range(9))


def test_each_api_s_own_place_for_it_is_found() -> None:
    instructions = [{"model": "m", "instructions": i, "input": "x"} for i in "abab"]
    system = [{"model": "m", "system": i, "messages": [{"role": "user"}]} for i in "abab"]

    assert order(*instructions) == [0, 2, 1, 3]
    assert order(*system) == [0, 2, 1, 3]


def test_bodies_of_any_shape_keep_their_order() -> None:
    bodies = [
        {"model": "m", "messages": "none"},
        {"model": "m", "messages": [1, 2]},
        {"model": "m", "messages": []},
        {"model": "m"},
        {"model": "m", "messages": [1, 3]},
    ]

    assert order(*bodies) == [0, 2, 3, 1, 4]
