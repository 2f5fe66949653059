"""Meta Llama's form at InvokeModel: one text, with the turns marked in it."""

import re
from typing import Any, NamedTuple

import msgspec

from penstock.upstream.translation import answers
from penstock.upstream.translation.base import Answer, Choice, Finish, Request, Usage
from penstock.upstream.translation.decoding import find
from penstock.upstream.translation.prompts import check_plain, join_texts, refuse_marks

_NAME = "Meta Llama on Bedrock"
_DEFAULT_MAX_TOKENS = 2048
"""As many as Bedrock documents; without a bound it writes 512."""
_LLAMA_4 = re.compile(r"meta\.llama4")


class _Marks(NamedTuple):
    start: str
    end: str
    stop: str


_BEGIN = "<|begin_of_text|>"
_MARKS_3 = _Marks("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_MARKS_4 = _Marks("<|header_start|>", "<|header_end|>", "<|eot|>")


def build(request: Request, model: str) -> dict[str, Any]:
    """The body for Llama 3 or 4."""
    check_plain(request, _NAME)
    request.refuse_unknown(_NAME, "stop", "top_k")
    marks = _MARKS_4 if _LLAMA_4.search(model) else _MARKS_3
    all_marks = (_BEGIN, *marks)
    said: list[tuple[str, str]] = []
    if request.system:
        for text in request.system:
            refuse_marks(text, all_marks)
        said.append(("system", "\n\n".join(text.text for text in request.system)))
    said += [
        ("assistant" if turn.is_model else "user", join_texts(turn, all_marks))
        for turn in request.turns
    ]
    turns = [f"{_head(role, marks)}{text}{marks.stop}" for role, text in said]
    body: dict[str, Any] = {
        "prompt": f"{_BEGIN}{''.join(turns)}{_head('assistant', marks)}",
        "max_gen_len": request.max_tokens or _DEFAULT_MAX_TOKENS,
    }
    for field in ("temperature", "top_p"):
        if (value := getattr(request, field)) is not None:
            body[field] = value
    return body


def _head(role: str, marks: _Marks) -> str:
    return f"{marks.start}{role}{marks.end}\n\n"


class _Answer(msgspec.Struct):
    generation: str
    prompt_token_count: int | None = None
    generation_token_count: int | None = None
    stop_reason: str | None = None


_decoder = msgspec.json.Decoder(_Answer)


def read(body: bytes, model: str, created_at: int) -> Answer | None:
    """An answer; None if it is something else."""
    found = find(_decoder, body)
    if found is None:
        return None
    finish = Finish.LENGTH if found.stop_reason == "length" else Finish.STOP
    return Answer(
        id=answers.make_id(body),
        model=model,
        choices=[Choice(finish=finish, text=found.generation)],
        usage=Usage(
            input=found.prompt_token_count or 0, output=found.generation_token_count or 0
        ),
        created_at=created_at,
    )
