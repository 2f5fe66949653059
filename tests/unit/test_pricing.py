"""What the upstreams of the settings cost, and what is told of it."""

from decimal import Decimal
from typing import Any

import pytest

from penstock.checkup import Verdict, check_prices
from penstock.model import Spent, Usage
from penstock.price_table import GenaiPrices, find_table
from penstock.pricing import open_prices, sum_up
from penstock.settings import Settings
from penstock.telemetry import NativeFigures

PRICES = {"m": {"input": 2, "output": 8}}


def settings(**upstream: Any) -> Settings:
    one = {"name": "far", "base_url": "http://127.0.0.1:9000/v1", **upstream}
    return Settings.model_validate({"upstreams": [one]})


def told(table: GenaiPrices | None, **upstream: Any) -> tuple[Verdict, str]:
    [one] = settings(**upstream).upstreams
    finding = check_prices(one, table)
    assert finding.what == "prices of far"
    return finding.verdict, finding.message


def test_prices_of_the_settings_are_exact_and_cached_tokens_cost_what_others_do() -> None:
    prices = {"a*": {"input": 0.15, "output": 0.6}, "b": PRICES["m"] | {"cached_input": 0}}
    book = open_prices(settings(prices=prices), lambda *_: None)

    (_, first), (_, second) = book.terms["far"].prices
    assert (first.input, first.cached_input) == (Decimal("0.15"), Decimal("0.15"))
    assert (second.cached_input, second.output) == (0, 8)


def test_list_prices_are_asked_only_where_there_is_a_batch_api() -> None:
    assert open_prices(settings(mode="lines"), lambda *_: None).table is None
    for mode in ("native", "auto"):
        assert open_prices(settings(mode=mode), lambda *_: None).table is not None


@pytest.mark.parametrize(
    ("upstream", "verdict", "parts"),
    [
        ({"kind": "groq"}, "ok", ["come from genai-prices 0.", "for the models it has."]),
        (
            {"kind": "groq", "prices": PRICES},
            "ok",
            ["come from the settings for m and genai-prices 0.", "for others."],
        ),
        ({"kind": "together"}, "note", ["genai-prices", "batch_discount"]),
        ({"kind": "together", "batch_discount": 0.5}, "ok", ["genai-prices"]),
        ({"kind": "penstock"}, "note", ["not known; name them in its setting prices."]),
        ({"kind": "openai"}, "note", ["not known"]),
        ({"base_url": "https://api.openai.com/v1"}, "ok", ["genai-prices"]),
    ],
)
def test_the_check_says_where_prices_come_from(
    upstream: dict[str, Any], verdict: str, parts: list[str]
) -> None:
    found, message = told(find_table(), **upstream)

    assert found == verdict
    for part in parts:
        assert part in message


def test_without_the_table_the_check_says_how_to_have_it() -> None:
    assert told(None, kind="groq") == (
        Verdict.NOTE,
        "Prices are not known; name them in its setting prices, or install the extra prices of "
        "Penstock, which knows list prices.",
    )
    assert told(None, kind="groq", prices=PRICES)[0] is Verdict.OK


USAGE = Usage(
    input_tokens=500_000, cached_tokens=9, output_tokens=250_000, total_tokens=750_000
)


def figures(*spent: tuple[str | None, Usage], **upstream: Any) -> NativeFigures:
    """What the metrics say of jobs, by the models and tokens of their answers."""
    book = open_prices(settings(**upstream), lambda *_: None)
    jobs = [
        Spent(answered=int(usage != Usage()), usage=usage, model=model, longest_input=None)
        for model, usage in spent
    ]
    return sum_up(book, {"far": jobs}, now=0.0)["far"]


def test_what_has_no_price_is_summed_apart() -> None:
    jobs = [(model, USAGE) for model in ("m", "m", "other", None)]

    assert figures(*jobs, prices=PRICES, batch_discount=0.5) == NativeFigures(
        input_tokens=2_000_000,
        cached_tokens=36,
        output_tokens=1_000_000,
        cost_usd=3.0,
        by_line_usd=6.0,
        unpriced_tokens=1_500_000,
    )


@pytest.mark.parametrize(
    ("upstream", "by_line_usd"),
    [({}, None), ({"batch_discount": 0.5}, None), ({"prices": PRICES}, 3.0)],
)
def test_a_sum_of_which_nothing_is_known_is_not_0(
    upstream: dict[str, Any], by_line_usd: float | None
) -> None:
    told = figures(("m", Usage()), ("m", USAGE), **upstream)

    assert (told.cost_usd, told.by_line_usd) == (None, by_line_usd)
    assert told.unpriced_tokens == 750_000


def test_a_price_that_is_known_of_jobs_without_answers_alone_says_nothing_of_others() -> None:
    told = figures(("m", Usage()), ("other", USAGE), prices=PRICES, batch_discount=0.5)

    assert (told.cost_usd, told.by_line_usd) == (None, None)


def test_where_no_line_was_answered_all_jobs_cost_0() -> None:
    told = figures(("m", Usage()), (None, Usage()))

    assert told == NativeFigures(cost_usd=0.0, by_line_usd=0.0)
