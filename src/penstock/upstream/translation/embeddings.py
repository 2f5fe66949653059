"""The body of `/v1/embeddings`."""

from typing import Literal, cast

import msgspec

from penstock.upstream.translation.base import Untranslatable
from penstock.upstream.translation.decoding import decode
from penstock.upstream.translation.turns import Harmless

IGNORED = frozenset({"user"})
"""Fields that change nothing of the answer; `docs/translation.md` lists them."""


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    texts: list[str]
    """At least one, and none of them empty."""
    dimensions: int | None
    """How many numbers a vector has; None for the model's own."""
    input_type: str | None
    """What the texts are for; OpenAI has no such field, Cohere's models need one."""

    def one_text(self, who: str) -> str:
        """The text of a request that has only one."""
        if len(self.texts) > 1:
            raise Untranslatable(
                "input", f"{who} takes one text; {len(self.texts)} need as many lines."
            )
        return self.texts[0]

    def refuse_input_type(self, who: str) -> None:
        if self.input_type is not None:
            raise Untranslatable("input_type", f"{who} has no counterpart; leave it out.")


class _Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    input: str | list[str | int | list[int]]
    model: Harmless = None
    dimensions: int | None = None
    encoding_format: Literal["float"] | None = None
    input_type: str | None = None
    user: Harmless = None


_decoder = msgspec.json.Decoder(_Body)


def read(body: bytes) -> EmbeddingRequest:
    """Read the body of a request for embeddings.

    Raises:
        Untranslatable: It is not one, or no provider has a counterpart to a field of it.
    """
    given = decode(_decoder, body)
    texts = [given.input] if isinstance(given.input, str) else given.input
    if not texts:
        raise Untranslatable("input", "There must be a text.")
    for index, text in enumerate(texts):
        field = "input" if isinstance(given.input, str) else f"input[{index}]"
        if not isinstance(text, str):
            raise Untranslatable(field, "Tokens are OpenAI's own; give the text itself.")
        if not text:
            raise Untranslatable(field, "A text must not be empty.")
    if given.dimensions is not None and not 1 <= given.dimensions <= 1 << 20:
        raise Untranslatable("dimensions", f"{given.dimensions} is not a positive number.")
    return EmbeddingRequest(
        texts=cast("list[str]", texts),  # each was looked at above
        dimensions=given.dimensions,
        input_type=given.input_type,
    )
