"""What lines cost: by the settings, by a table, or unknown and never 0."""

import subprocess
import sys
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import pytest

from penstock.model import (
    Batch,
    BatchId,
    BatchStatus,
    Counts,
    FileId,
    NativeRun,
    NativeRunId,
    NativeRunStatus,
    ProjectId,
    Spent,
    Usage,
)
from penstock.price_table import GenaiPrices, find_table
from penstock.prices import (
    KIND_DISCOUNTS,
    SETTINGS,
    UNKNOWN,
    Cost,
    CostItem,
    Listed,
    PriceBook,
    Rates,
    Terms,
    cost_of,
    find_quote,
    total,
)
from penstock.upstream.kinds import KINDS

NOVEMBER = 1_795_600_000.0
"""In November 2026."""


def rates(
    into: str, out: str, cached: str | None = None, *, long_from: int | None = None
) -> Rates:
    return Rates(
        input=Decimal(into),
        cached_input=Decimal(cached or into),
        output=Decimal(out),
        long_from=long_from,
    )


def terms(kind: str = "groq", **more: Any) -> Terms:
    return Terms(kind=kind, base_url="http://127.0.0.1:9000/v1", **more)


@dataclass
class Table:
    """A table of one model."""

    listed: Listed
    name: str = "a table"

    def find(self, *, kind: str, base_url: str, model: str, at: float) -> Listed | None:
        return self.listed if model == "listed" else None


USAGE = Usage(
    input_tokens=1_000_000,
    cached_tokens=400_000,
    output_tokens=200_000,
    reasoning_tokens=150_000,
    total_tokens=1_200_000,
)


# What a token costs


def test_cached_tokens_are_among_the_input_and_reasoning_ones_among_the_output() -> None:
    # 0.6 of 2, 0.4 of 0.5 and 0.2 of 8.
    assert cost_of(USAGE, rates("2", "8", "0.5")) == Decimal("3.0")


def test_a_price_is_exact() -> None:
    usage = Usage(input_tokens=3, output_tokens=7, total_tokens=10)

    assert cost_of(usage, rates("0.1", "0.7")) == Decimal("0.0000052")


@pytest.mark.parametrize(
    ("kind", "cached"),
    [
        ("anthropic", "0.05"),  # the discount goes for them, too
        ("vertex", "0.1"),  # their own comes in its place
        ("gemini", "0.1"),
        ("openai", None),
        ("together", None),
        ("penstock", None),
    ],
)
def test_a_batch_costs_what_its_kind_publishes(kind: str, cached: str | None) -> None:
    quote = find_quote(
        terms(kind, prices=(("*", rates("1", "4", "0.1")),)), "m", table=None, at=0
    )

    assert quote is not None
    assert quote.by_line == rates("1", "4", "0.1")
    assert quote.in_batch == (cached and rates("0.5", "2.0", cached))


def test_no_token_costs_more_in_a_batch_for_having_been_cached() -> None:
    quote = find_quote(terms("azure", prices=(("*", rates("1", "4")),)), "m", table=None, at=0)

    assert quote is not None
    assert quote.in_batch == rates("0.5", "2.0", "0.5")


def test_openais_discount_is_that_of_openais_own_address() -> None:
    own = Terms(kind="openai", base_url="https://api.openai.com/v1")
    other = replace(own, base_url="https://api.openai.com.example.org/v1")

    assert own.discount == KIND_DISCOUNTS["openai"]
    assert other.discount is None


def test_every_discount_is_of_a_kind_that_has_batches() -> None:
    assert all(KINDS[name].batches for name in KIND_DISCOUNTS)


def test_the_settings_win_and_their_longest_pattern_counts() -> None:
    table = Table(Listed(by_line=rates("9", "9"), in_batch=rates("8", "8")))
    prices = (("*", rates("3", "4")), ("list*", rates("1", "2")), ("l*", rates("5", "6")))

    quote = find_quote(
        terms(prices=prices, batch_discount=Decimal("0.25")), "listed", table=table, at=0
    )

    assert quote is not None
    assert quote.source == SETTINGS
    assert quote.by_line == rates("1", "2")
    assert quote.in_batch == rates("0.75", "1.5")


def test_a_table_that_knows_what_batches_cost_is_believed() -> None:
    table = Table(Listed(by_line=rates("9", "9"), in_batch=rates("5", "6")))

    quote = find_quote(terms(), "listed", table=table, at=0)

    assert quote is not None
    assert (quote.source, quote.in_batch) == ("a table", rates("5", "6"))


def test_a_discount_of_the_settings_takes_the_place_of_the_tables() -> None:
    table = Table(Listed(by_line=rates("10", "20"), in_batch=rates("5", "6")))

    quote = find_quote(
        terms("together", batch_discount=Decimal("0.1")), "listed", table=table, at=0
    )

    assert quote is not None
    assert quote.in_batch == rates("9.0", "18.0")


def test_a_model_that_is_nowhere_has_no_price() -> None:
    table = Table(Listed(by_line=rates("9", "9")))

    assert find_quote(terms(prices=(("a*", rates("1", "2")),)), "b", table=table, at=0) is None
    assert find_quote(terms(), "listed", table=None, at=0) is None


# The table of genai-prices


def found(kind: str, model: str, base_url: str = "http://127.0.0.1/v1") -> Listed | None:
    return GenaiPrices().find(kind=kind, base_url=base_url, model=model, at=NOVEMBER)


def test_the_table_knows_models_by_kind_and_what_their_batches_cost() -> None:
    listed = found("anthropic", "claude-sonnet-4-5")

    assert listed is not None
    assert listed.in_batch is not None
    assert listed.in_batch.input == listed.by_line.input / 2 > 0
    assert listed.in_batch.output == listed.by_line.output / 2 > 0
    assert listed.in_batch.cached_input == listed.by_line.cached_input / 2
    assert listed.by_line.long_from == 200_000


@pytest.mark.parametrize("kind", ["gemini", "vertex"])
def test_googles_models_are_known_by_any_of_their_names(kind: str) -> None:
    listed = found(kind, "gemini-2.5-flash")

    assert listed is not None
    assert listed.in_batch is not None
    assert listed.in_batch.input == listed.by_line.input / 2
    # A discount for cached tokens comes in place of that for batches.
    assert listed.in_batch.cached_input == listed.by_line.cached_input < listed.in_batch.input
    for before in ("models/", "google/", "publishers/google/models/"):
        assert found(kind, f"{before}gemini-2.5-flash") == listed


def test_kind_openai_is_known_by_its_address() -> None:
    assert found("openai", "gpt-4o") is None
    listed = found("openai", "gpt-4o", "https://api.openai.com/v1")
    assert listed is not None
    assert listed.by_line.long_from is None


def test_a_price_of_another_providers_batches_is_not_taken() -> None:
    listed = found("azure", "gpt-4o")

    assert listed is not None
    assert listed.in_batch is None


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("openai", "no-such-model"),
        ("openai", "gpt-image-1"),  # of its tokens, some are of images
        ("penstock", "gpt-4o"),
        ("azure", "our-deployment"),
    ],
)
def test_what_the_table_cannot_say_is_unknown(kind: str, model: str) -> None:
    assert found(kind, model, "https://api.openai.com/v1") is None


def test_embeddings_cost_no_output() -> None:
    listed = found("openai", "text-embedding-3-small", "https://api.openai.com/v1")

    assert listed is not None
    assert listed.by_line.output == 0 < listed.by_line.input


def test_the_table_is_named_with_its_version() -> None:
    table = find_table()

    assert table is not None
    assert table.name.startswith("genai-prices 0.")


def test_the_table_is_loaded_when_a_price_is_asked_for_and_not_before() -> None:
    program = (
        "import sys\n"
        "import penstock.app\n"
        "from penstock.price_table import find_table\n"
        "table = find_table()\n"
        "table.name\n"
        "table.find(kind='penstock', base_url='http://a', model='m', at=0)\n"
        "before = 'genai_prices' in sys.modules\n"
        "table.find(kind='groq', base_url='http://a', model='m', at=0)\n"
        "sys.exit(0 if not before and 'genai_prices' in sys.modules else 1)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# What jobs and batches cost


def spent(
    usage: Usage = USAGE,
    *,
    model: str | None = "m",
    answered: int = 10,
    longest_input: int | None = None,
) -> Spent:
    return Spent(answered=answered, usage=usage, model=model, longest_input=longest_input)


def run(
    name: str, took: Spent | None, *, native_id: str | None = "n", is_open: bool = False
) -> NativeRun:
    return NativeRun(
        id=NativeRunId(name),
        batch_id=BatchId("batch-1"),
        upstream="fast",
        model="m",
        requests=12,
        status=NativeRunStatus.SUBMITTED if is_open else NativeRunStatus.ENDED,
        native_id=native_id,
        due_at=0.0 if is_open else None,
        submitted_at=NOVEMBER,
        spent=took,
    )


def batch(
    usage: Usage = USAGE, completed: int = 10, *, model: str | None = "m", **more: Any
) -> Batch:
    return Batch(
        id=BatchId("batch-1"),
        project_id=ProjectId("p"),
        status=BatchStatus.COMPLETED,
        endpoint="/v1/chat/completions",
        input_file_id=FileId("file-1"),
        input_blob_key="files/1",
        completion_window="24h",
        created_at=int(NOVEMBER),
        expires_at=int(NOVEMBER) + 86400,
        counts=Counts(total=100, completed=completed),
        usage=usage,
        model=model,
        **more,
    )


BOOK = PriceBook(
    terms={"fast": terms(prices=(("m", rates("2", "8", "0.5", long_from=1000)),))},
    find_upstream=lambda model, chosen: chosen or "fast",
)
WHOLE = Cost(usd=Decimal("1.6"), by_line_usd=Decimal("3.0"), is_least=True, source=SETTINGS)
"""Of `USAGE`: 0.6 of 1, 0.4 of 0.5 and 0.2 of 4."""


def price(took: Spent, *, upstream: str = "fast", is_native: bool = True) -> Cost:
    return BOOK.price(upstream, took, is_native=is_native, at=NOVEMBER)


def test_what_a_job_cost_is_told_beside_what_its_lines_would_have() -> None:
    assert price(spent()) == WHOLE
    assert price(spent(), is_native=False) == replace(WHOLE, usd=Decimal("3.0"))


def test_what_may_have_been_long_lines_may_have_cost_more() -> None:
    assert price(spent(longest_input=1001)).is_least
    assert not price(spent(longest_input=1000)).is_least
    few = Usage(input_tokens=1000, output_tokens=1, total_tokens=1001)
    assert not price(spent(few)).is_least


@pytest.mark.parametrize(
    ("upstream", "took"),
    [
        ("fast", spent(model="other")),
        ("fast", spent(model=None)),
        ("gone", spent()),
        ("fast", spent(Usage())),  # answers, and nothing said of tokens
    ],
)
def test_what_is_not_known_is_not_0(upstream: str, took: Spent) -> None:
    assert price(took, upstream=upstream) == UNKNOWN
    assert UNKNOWN.usd is None


def test_a_job_without_answers_cost_nothing() -> None:
    cost = price(spent(Usage(), answered=0, longest_input=0))

    assert (cost.usd, cost.by_line_usd) == (0, 0)


def test_jobs_of_a_model_are_told_as_one_and_lines_beside_them() -> None:
    runs = [run("1", spent()), run("2", spent(answered=5)), run("3", None, native_id=None)]
    whole = USAGE + USAGE + Usage(input_tokens=500_000, output_tokens=0, total_tokens=500_000)

    items = BOOK.price_batch(batch(whole, 18), runs)

    assert items[0] == CostItem(
        upstream="fast",
        model="m",
        is_native=True,
        jobs=2,
        requests=24,
        answered=15,
        usage=USAGE + USAGE,
        cost=replace(WHOLE, usd=Decimal("3.2"), by_line_usd=Decimal("6.0")),
    )
    assert (items[1].is_native, items[1].answered, len(items)) == (False, 3, 2)
    assert items[1].cost.usd == items[1].cost.by_line_usd == Decimal("1.0")
    assert total(items).usd == Decimal("4.2")
    assert total(items).by_line_usd == Decimal("7.0")


def test_what_is_unknown_of_one_is_unknown_of_all() -> None:
    items = BOOK.price_batch(batch(USAGE + USAGE, 20), [run("1", spent()), run("2", None)])

    assert [(item.cost.usd, item.answered) for item in items] == [
        (Decimal("1.6"), 10),
        (None, None),
    ]
    assert total(items).usd is None


def test_lines_that_took_less_than_nothing_took_what_nobody_knows() -> None:
    items = BOOK.price_batch(batch(Usage(), 12), [run("1", spent())])

    assert [(item.is_native, item.usage is None) for item in items] == [
        (True, False),
        (False, True),
    ]
    assert total(items).usd is None


def test_while_a_job_is_at_the_provider_nobody_knows_the_whole() -> None:
    items = BOOK.price_batch(
        batch(USAGE + USAGE, 15), [run("1", spent()), run("2", None, is_open=True)]
    )

    assert [item.is_over for item in items] == [True, False]
    assert total(items) == UNKNOWN


def test_a_batch_without_jobs_is_priced_where_upstream_and_model_are_known() -> None:
    [item] = BOOK.price_batch(batch(), [])
    assert (item.upstream, item.model, item.cost.usd) == ("fast", "m", Decimal("3.0"))

    asked = batch(model="m", parameters={"x-tfy-provider-model": "m"})
    assert BOOK.price_batch(asked, []) == [item]
    for unclear in (batch(model=None), batch(upstream="gone")):
        [item] = BOOK.price_batch(unclear, [])
        assert item.cost == UNKNOWN
    assert replace(BOOK, find_upstream=lambda *_: None).price_batch(batch(), [])[0].cost == (
        UNKNOWN
    )


def test_a_batch_without_an_answer_has_no_costs() -> None:
    assert BOOK.price_batch(batch(Usage(), 0), []) == []
    assert total([]) == UNKNOWN


@pytest.mark.parametrize("status", [BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING])
def test_of_a_batch_that_is_sent_line_by_line_it_is_told_what_it_cost_so_far(
    status: BatchStatus,
) -> None:
    [item] = BOOK.price_batch(replace(batch(), status=status), [])

    assert (item.is_over, item.requests) == (False, 10)
    assert total([item]).usd == Decimal("3.0")
    [item] = BOOK.price_batch(batch(), [])
    assert item.is_over
