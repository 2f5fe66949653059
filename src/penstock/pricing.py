"""What the upstreams of the settings cost."""

from collections.abc import Callable, Mapping, Sequence

from penstock.model import Spent
from penstock.price_table import GenaiPrices, find_table
from penstock.prices import PriceBook, Terms
from penstock.settings import Settings, Upstream
from penstock.settings_prices import rates_of
from penstock.telemetry import NativeFigures


def terms_of(upstream: Upstream) -> Terms:
    """How an upstream is paid, as far as its settings say."""
    return Terms(
        kind=upstream.kind,
        base_url=upstream.base_url,
        prices=rates_of(upstream.prices),
        batch_discount=upstream.batch_discount,
    )


def open_prices(
    settings: Settings, find_upstream: Callable[[str, str | None], str | None]
) -> PriceBook:
    """What all upstreams cost. List prices are asked only where one has a batch API: they take
    memory, and what single lines cost is told in passing.

    Args:
        find_upstream: As in `PriceBook`.
    """
    is_native = any(upstream.mode != "lines" for upstream in settings.upstreams)
    return PriceBook(
        terms={upstream.name: terms_of(upstream) for upstream in settings.upstreams},
        table=find_table() if is_native else None,
        find_upstream=find_upstream,
    )


def tell_prices(upstream: Upstream, table: GenaiPrices | None) -> tuple[str, bool]:
    """Where the prices of an upstream's batches come from, for a person.

    Returns:
        A sentence, and whether all is known that there is to know.
    """
    terms = terms_of(upstream)
    has_list = table is not None and table.covers(kind=terms.kind, base_url=terms.base_url)
    sources: list[str] = []
    if terms.prices:
        sources.append(f"the settings for {', '.join(pattern for pattern, _ in terms.prices)}")
    if table is not None and has_list:
        sources.append(f"{table.name} for {'others' if sources else 'the models it has'}")
    if not sources:
        hint = ""
        if table is None:
            hint = ", or install the extra prices of Penstock, which knows list prices"
        return f"Prices are not known; name them in its setting prices{hint}.", False
    told = f"Prices come from {' and '.join(sources)}"
    if terms.discount is None:
        return (
            f"{told}, but not what batches cost less; name it in its setting batch_discount.",
            False,
        )
    return f"{told}.", True


def sum_up(
    book: PriceBook, spent: Mapping[str, Sequence[Spent]], *, now: float
) -> dict[str, NativeFigures]:
    """What all jobs of each upstream took and cost, at the prices of now. It may take long the
    first time."""
    return {name: _figures(book, name, each, now) for name, each in spent.items()}


def _figures(book: PriceBook, name: str, spent: Sequence[Spent], now: float) -> NativeFigures:
    # Jobs without an answer cost nothing, but that is not to be taken for what others cost.
    answered = [each for each in spent if each.answered]
    figures = NativeFigures() if answered else NativeFigures(cost_usd=0.0, by_line_usd=0.0)
    for each in answered:
        figures.input_tokens += each.usage.input_tokens
        figures.cached_tokens += each.usage.cached_tokens
        figures.output_tokens += each.usage.output_tokens
        cost = book.price(name, each, is_native=True, at=now)
        if cost.usd is None:
            figures.unpriced_tokens += each.usage.total_tokens
        else:
            figures.cost_usd = (figures.cost_usd or 0.0) + float(cost.usd)
        if cost.by_line_usd is not None:
            figures.by_line_usd = (figures.by_line_usd or 0.0) + float(cost.by_line_usd)
    return figures
