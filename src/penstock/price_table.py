"""The list prices of genai-prices, which come with it as data.

The package is an extra, and is imported when the first price is asked for: with what it brings
it takes some 5 MiB of a server, and a tenth of a second.
"""

import importlib.util
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from importlib.metadata import version
from typing import TYPE_CHECKING

from penstock.prices import Listed, Rates

if TYPE_CHECKING:
    from genai_prices.types import ModelInfo, ModelPrice, TieredPrices

_PACKAGE = "genai_prices"
_PROVIDERS = {
    "anthropic": "anthropic",
    "azure": "azure",
    "bedrock": "aws",
    "fireworks": "fireworks",
    "gemini": "google",
    "groq": "groq",
    "mistral": "mistral",
    "together": "together",
    "vertex": "google",
}
"""What the table calls the providers, by kind. Kind `openai` is known by its address."""
_BATCH = {"processing": "batch"}
_NOT_TEXT = (
    "input_image_mtok",
    "output_image_mtok",
    "input_video_mtok",
    "output_video_mtok",
    "output_audio_mtok",
)
"""Prices of tokens that are counted together with those of text: of a model that has them, it
cannot be said what its tokens cost."""


class GenaiPrices:
    """List prices, as genai-prices keeps them."""

    def __init__(self) -> None:
        self.name = f"genai-prices {version(_PACKAGE)}"

    def covers(self, *, kind: str, base_url: str) -> bool:
        """Whether the table has prices of an upstream's provider."""
        if kind != "openai":
            return kind in _PROVIDERS
        from genai_prices.data_snapshot import get_snapshot  # noqa: PLC0415  (see above)

        try:
            get_snapshot().find_provider(None, None, base_url)
        except LookupError:
            return False
        return True

    def find(self, *, kind: str, base_url: str, model: str, at: float) -> Listed | None:
        """What a model costs at an upstream at a time; None if the table does not have it."""
        if kind not in _PROVIDERS and kind != "openai":
            return None
        from genai_prices.data_snapshot import get_snapshot  # noqa: PLC0415  (see above)

        provider_id = _PROVIDERS.get(kind)
        url = None if provider_id else base_url
        try:
            provider, found = get_snapshot().find_provider_model(
                _known_as(kind, model), None, provider_id, url
            )
        except LookupError:
            return None
        then = datetime.fromtimestamp(at, UTC)
        by_line = _rates(found.get_prices(then))
        if by_line is None:
            return None
        # What another provider's batches cost says nothing of this one's.
        is_own = any(each is found for each in provider.models)
        in_batch = _in_batch(found, then) if is_own else None
        return Listed(by_line=by_line, in_batch=in_batch)


def find_table() -> GenaiPrices | None:
    """The table, if the package is installed."""
    return GenaiPrices() if importlib.util.find_spec(_PACKAGE) else None


def _known_as(kind: str, model: str) -> str:
    """A model's name without what stands before it at Google."""
    return model.rpartition("/")[2] if kind in ("gemini", "vertex") else model


def _in_batch(model: "ModelInfo", then: datetime) -> Rates | None:
    has_own = any(
        variant.when == _BATCH
        and (variant.constraint is None or variant.constraint.active(then))
        for variant in model.price_variants or ()
    )
    return _rates(model.get_prices(then, _BATCH)) if has_own else None


def _rates(prices: "ModelPrice") -> Rates | None:
    if any(getattr(prices, name) is not None for name in _NOT_TEXT):
        return None
    into, out, cached = prices.input_mtok, prices.output_mtok, prices.cache_read_mtok
    if into is None:
        return None
    return Rates(
        input=_base(into),
        cached_input=_base(into if cached is None else cached),
        output=Decimal(0) if out is None else _base(out),
        long_from=_long_from([each for each in (into, out, cached) if each is not None]),
    )


def _base(price: "Decimal | TieredPrices") -> Decimal:
    return price if isinstance(price, Decimal) else price.base


def _long_from(prices: "Sequence[Decimal | TieredPrices]") -> int | None:
    starts = [
        tier.start for price in prices if not isinstance(price, Decimal) for tier in price.tiers
    ]
    return min(starts, default=None)
