"""What lines cost, in US dollars: by the settings, by a table of list prices, or unknown.

Pure. A price that is not known is None and never 0, and nothing is guessed: no model's price
is taken for another's, and no discount that a provider does not publish.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Protocol

from penstock.model import (
    FINAL,
    Batch,
    NativeRun,
    NativeRunStatus,
    Spent,
    Usage,
)

_MILLION = Decimal(1_000_000)
SETTINGS = "settings"
"""The source of a price that the settings name."""


# What a token costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """US dollars for a million tokens."""

    input: Decimal
    cached_input: Decimal
    output: Decimal
    long_from: int | None = None
    """A line with more input tokens than this costs more; None: there is no such bound."""


@dataclass(frozen=True, slots=True)
class Discount:
    """How much less a provider's batch costs than the same lines one by one."""

    share: Decimal
    """From 0 to 1."""
    is_of_cached: bool = False
    """Whether it is taken from the price of cached tokens, too. Else they keep theirs, but
    never cost more than others."""

    def apply(self, rates: Rates) -> Rates:
        """What a batch costs."""
        left = 1 - self.share
        by_cache = rates.cached_input * left if self.is_of_cached else rates.cached_input
        return Rates(
            input=rates.input * left,
            cached_input=min(by_cache, rates.input * left),
            output=rates.output * left,
            long_from=rates.long_from,
        )


_HALF = Decimal("0.5")
KIND_DISCOUNTS: Mapping[str, Discount] = {
    "anthropic": Discount(_HALF, is_of_cached=True),
    "azure": Discount(_HALF),
    "bedrock": Discount(_HALF),
    "fireworks": Discount(_HALF),
    "gemini": Discount(_HALF),
    "groq": Discount(_HALF),
    "mistral": Discount(_HALF, is_of_cached=True),
    "openai": Discount(_HALF),
    "vertex": Discount(_HALF),
}
"""What providers publish, by kind; the sources stand in docs/providers.md. Those that are not
here have none for all models: `together` up to half for some, `penstock` whatever it asks."""
_OPENAI = "https://api.openai.com/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How an upstream is paid, as far as the settings say."""

    kind: str
    base_url: str
    prices: tuple[tuple[str, Rates], ...] = ()
    """By glob pattern of models; the longest that matches counts, as it says most."""
    batch_discount: Decimal | None = None

    @property
    def discount(self) -> Discount | None:
        """The discount of its batches; None if it is not known."""
        # Kind `openai` is whatever speaks as OpenAI does.
        is_other = self.kind == "openai" and not self.base_url.startswith(_OPENAI)
        known = None if is_other else KIND_DISCOUNTS.get(self.kind)
        if self.batch_discount is None:
            return known
        return Discount(self.batch_discount, is_of_cached=bool(known and known.is_of_cached))


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """What a table of list prices knows of a model."""

    by_line: Rates
    in_batch: Rates | None = None
    """None: it does not know what batches cost."""


class PriceTable(Protocol):
    """List prices of providers."""

    @property
    def name(self) -> str:
        """What it is called, with its version."""
        ...

    def find(self, *, kind: str, base_url: str, model: str, at: float) -> Listed | None:
        """What a model costs at an upstream at a time, Unix seconds; None if it does not know.

        It may take long the first time, and memory from then on.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """What a model costs at an upstream."""

    by_line: Rates
    in_batch: Rates | None
    """None if the discount is not known."""
    source: str


def find_quote(
    terms: Terms, model: str, *, table: PriceTable | None, at: float
) -> Quote | None:
    """What a model costs: by the settings, else by the table; None if nobody knows."""
    discount = terms.discount
    matching = [each for each in terms.prices if fnmatchcase(model, each[0])]
    if matching:
        _, rates = max(matching, key=lambda each: len(each[0]))
        in_batch = discount.apply(rates) if discount else None
        return Quote(by_line=rates, in_batch=in_batch, source=SETTINGS)
    if table is None:
        return None
    listed = table.find(kind=terms.kind, base_url=terms.base_url, model=model, at=at)
    if listed is None:
        return None
    in_batch = listed.in_batch if terms.batch_discount is None else None
    if in_batch is None and discount is not None:
        in_batch = discount.apply(listed.by_line)
    return Quote(by_line=listed.by_line, in_batch=in_batch, source=table.name)


def cost_of(usage: Usage, rates: Rates) -> Decimal:
    """What tokens cost. Reasoning tokens are among those of the output."""
    cached = min(usage.cached_tokens, usage.input_tokens)
    total = (usage.input_tokens - cached) * rates.input
    total += cached * rates.cached_input
    total += usage.output_tokens * rates.output
    return total / _MILLION


# What jobs and batches cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What something cost."""

    usd: Decimal | None = None
    """None if it is not known."""
    by_line_usd: Decimal | None = None
    """What it would have cost, or did, line by line."""
    is_least: bool = False
    """Whether it may have been more, because long lines cost more."""
    source: str | None = None
    """Where the price comes from; None if there is none."""


UNKNOWN = Cost()


@dataclass(frozen=True, slots=True, kw_only=True)
class CostItem:
    """Lines of a batch that were run one way, and what that cost."""

    upstream: str | None
    """None if it is not known, or several."""
    model: str | None
    """None if it is not known, or several."""
    is_native: bool
    jobs: int = 0
    """How many batches of the provider they were."""
    is_over: bool = True
    """Whether jobs have been counted, else they are at the provider or on their way; of lines
    one by one, whether the batch has ended."""
    requests: int
    """How many lines: of jobs all, else those that were answered so far."""
    answered: int | None
    usage: Usage | None
    """None if it is not known."""
    cost: Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceBook:
    """Knows what each upstream costs."""

    terms: Mapping[str, Terms] = field(default_factory=dict[str, Terms])
    """By the upstream's name."""
    table: PriceTable | None = None
    find_upstream: Callable[[str, str | None], str | None] = lambda model, chosen: None
    """The one upstream that takes lines of a model, given the one that the client chose; None
    if there are several, or none."""

    def price(self, upstream: str | None, spent: Spent, *, is_native: bool, at: float) -> Cost:
        """What answers of an upstream cost. It may take long the first time."""
        terms = self.terms.get(upstream or "")
        if terms is None or spent.model is None:
            return UNKNOWN
        if spent.answered and not spent.usage.total_tokens:
            return UNKNOWN  # the upstream does not tell what it used
        quote = find_quote(terms, spent.model, table=self.table, at=at)
        if quote is None:
            return UNKNOWN
        rates = quote.in_batch if is_native else quote.by_line
        return Cost(
            usd=None if rates is None else cost_of(spent.usage, rates),
            by_line_usd=cost_of(spent.usage, quote.by_line),
            is_least=_may_be_long(spent, quote.by_line.long_from),
            source=quote.source,
        )

    def price_batch(self, batch: Batch, runs: Iterable[NativeRun]) -> list[CostItem]:
        """What a batch cost so far: its jobs at providers, and its lines one by one."""
        jobs = [run for run in runs if run.native_id is not None or _is_open(run)]
        items = [self._price_jobs(group) for group in _grouped(jobs)]
        by_line = self._price_lines(batch, [run.spent for run in jobs])
        return items if by_line is None else [*items, by_line]

    def _price_jobs(self, runs: Sequence[NativeRun]) -> CostItem:
        """
        Args:
            runs: Of one upstream and model, all counted or none.
        """
        counted = [(run, run.spent) for run in runs if run.spent is not None]
        spent = _sum_spent([each for _, each in counted])
        costs = [
            self.price(run.upstream, each, is_native=True, at=run.submitted_at or 0.0)
            for run, each in counted
        ]
        return CostItem(
            upstream=runs[0].upstream,
            model=spent and spent.model,
            is_native=True,
            jobs=len(runs),
            is_over=not _is_open(runs[0]),
            requests=sum(run.requests for run in runs),
            answered=spent and spent.answered,
            usage=spent and spent.usage,
            cost=_sum_costs(costs) if costs else UNKNOWN,
        )

    def _price_lines(self, batch: Batch, jobs: Sequence[Spent | None]) -> CostItem | None:
        """The lines that were sent one by one: all that jobs have not answered. None if there
        is none, or nobody knows, or not yet, which answers are those of jobs."""
        counted = [each for each in jobs if each is not None]
        if len(counted) < len(jobs):
            return None
        answered = batch.counts.completed - sum(each.answered for each in counted)
        usage = _without(batch.usage, sum((each.usage for each in counted), Usage()))
        if answered <= 0:
            return None
        model = batch.model
        upstream = model and self.find_upstream(model, batch.upstream)
        cost = UNKNOWN
        if usage is not None:
            spent = Spent(answered=answered, usage=usage, model=model, longest_input=None)
            cost = self.price(upstream, spent, is_native=False, at=batch.created_at)
        return CostItem(
            upstream=upstream,
            model=model,
            is_native=False,
            is_over=batch.status in FINAL,
            requests=answered,
            answered=answered,
            usage=usage,
            cost=cost,
        )


def total(items: Sequence[CostItem]) -> Cost:
    """What all of it cost so far; unknown of nothing, if any of it is, or while there are jobs
    that have not been counted."""
    if not items or any(item.is_native and not item.is_over for item in items):
        return UNKNOWN
    return _sum_costs([item.cost for item in items])


def _is_open(run: NativeRun) -> bool:
    return run.status is not NativeRunStatus.ENDED


def _grouped(runs: Sequence[NativeRun]) -> list[list[NativeRun]]:
    """Runs of one upstream and one model that stand alike, in the order of the first."""
    groups: dict[object, list[NativeRun]] = {}
    for run in runs:
        spent = run.spent
        model = spent.model if spent else None
        groups.setdefault((run.upstream, _is_open(run), spent is None, model), []).append(run)
    return list(groups.values())


def _sum_spent(spents: Sequence[Spent]) -> Spent | None:
    """All together; None of none."""
    if not spents:
        return None
    return Spent(
        answered=sum(each.answered for each in spents),
        usage=sum((each.usage for each in spents), Usage()),
        model=spents[0].model,
        longest_input=None,
    )


def _may_be_long(spent: Spent, long_from: int | None) -> bool:
    if long_from is None:
        return False
    longest = spent.longest_input
    return (spent.usage.input_tokens if longest is None else longest) > long_from


def _sum_costs(costs: Sequence[Cost]) -> Cost:
    """All together; what is unknown of one is unknown of all."""
    usd = [each.usd for each in costs if each.usd is not None]
    by_line = [each.by_line_usd for each in costs if each.by_line_usd is not None]
    sources = {each.source for each in costs if each.source is not None}
    return Cost(
        usd=sum(usd, Decimal(0)) if len(usd) == len(costs) else None,
        by_line_usd=sum(by_line, Decimal(0)) if len(by_line) == len(costs) else None,
        is_least=any(each.is_least for each in costs),
        source=", ".join(sorted(sources)) or None,
    )


def _without(whole: Usage, part: Usage) -> Usage | None:
    """What is left of a usage; None if the part is not within it."""
    left = Usage(
        input_tokens=whole.input_tokens - part.input_tokens,
        cached_tokens=whole.cached_tokens - part.cached_tokens,
        output_tokens=whole.output_tokens - part.output_tokens,
        reasoning_tokens=whole.reasoning_tokens - part.reasoning_tokens,
        total_tokens=whole.total_tokens - part.total_tokens,
    )
    figures = (
        left.input_tokens,
        left.cached_tokens,
        left.output_tokens,
        left.reasoning_tokens,
        left.total_tokens,
    )
    return left if min(figures) >= 0 else None
