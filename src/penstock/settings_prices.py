"""What the settings say of prices."""

from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated

from pydantic import BeforeValidator, Field

from penstock.prices import Rates
from penstock.settings_sources import Table


def _not_a_bool(value: object) -> object:
    # pydantic would read true as 1.
    if isinstance(value, bool):
        raise ValueError
    return value


Price = Annotated[Decimal, Field(ge=0), BeforeValidator(_not_a_bool)]
Share = Annotated[Decimal, Field(ge=0, le=1), BeforeValidator(_not_a_bool)]


class ModelPrices(Table):
    """What a model costs, in US dollars for a million tokens."""

    input: Price
    output: Price
    cached_input: Price | None = None
    """None: cached tokens cost what others do."""


def rates_of(prices: Mapping[str, ModelPrices]) -> tuple[tuple[str, Rates], ...]:
    """Prices by pattern, in their order."""
    return tuple(
        (
            pattern,
            Rates(
                input=each.input,
                output=each.output,
                cached_input=each.input if each.cached_input is None else each.cached_input,
            ),
        )
        for pattern, each in prices.items()
    )
