"""What is common to models that take one text, with the turns marked in it."""

from penstock.upstream.translation.base import Image, Request, Text, Turn, Untranslatable


def check_plain(request: Request, who: str) -> None:
    """Refuse all that a text with marks cannot say."""
    request.refuse_unknown(
        who,
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "top_logprobs",
        "effort",
        "reasoning_summary",
        "tools",
    )
    if request.choices != 1:
        request.refuse("choices", f"{who} gives one answer to a request; give 1.")
    if request.output is not None:
        raise Untranslatable(request.output.field, f"{who} writes text; leave it out.")
    request.check_range("temperature", 0, 1, who)
    if request.turns[-1].is_model:
        raise Untranslatable(
            f"{request.turns[-1].field}.role", "The last message must be the user's."
        )


def join_texts(turn: Turn, marks: tuple[str, ...]) -> str:
    """The text of a turn; the turns' own marks may not be in it, for they would end it."""
    for part in turn.parts:
        if isinstance(part, Image):
            raise Untranslatable(part.field, "Only text is taken here.")
        if not isinstance(part, Text):
            raise Untranslatable(part.field, "Calls and results are not taken here.")
        refuse_marks(part, marks)
    return "\n\n".join(part.text for part in turn.parts if isinstance(part, Text))


def refuse_marks(text: Text, marks: tuple[str, ...]) -> None:
    for mark in marks:
        if mark in text.text:
            raise Untranslatable(
                text.field, f"It holds {mark}, which the model takes for the end of a turn."
            )
