"""Batches that a provider's own batch API runs, over a provider that misbehaves."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.executor import native_plan
from penstock.executor.native import NativePolicy
from penstock.model import Batch, BatchStatus, Counts, NativeRun, NativeRunStatus
from penstock.prices import Cost, CostItem
from penstock.telemetry import NativeFigures
from penstock.upstream.openai_batch import DIALECTS
from tests.integration.bench import (
    Bench,
    Upload,
    codes,
    ids,
    line,
    read_lines,
    until,
)
from tests.providers.openai_server import (
    CANCEL,
    CONTENT,
    CREATE,
    GET,
    KEY,
    LIST,
    UPLOAD,
    OpenAIProvider,
    Trouble,
    echo,
)

HASTY = NativePolicy(
    first_poll_s=0.02, max_poll_s=0.05, first_wait_s=0.02, max_wait_s=0.05, cancel_grace_s=9
)


@pytest.fixture
async def provider() -> AsyncIterator[OpenAIProvider]:
    async with OpenAIProvider() as provider:
        yield provider


@pytest.fixture(autouse=True)
def hasty_dialect(monkeypatch: pytest.MonkeyPatch) -> None:
    hasty = replace(DIALECTS["openai"], find_after_s=0.1)
    monkeypatch.setitem(DIALECTS, "openai", hasty)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


def bench(data_dir: Path, provider: OpenAIProvider, **upstream: Any) -> Bench:
    one = {"mode": "native", "api_key": KEY, **upstream}
    return Bench(data_dir, provider, upstream=one, natives=HASTY, worker={"slice_requests": 4})


async def runs_of(bench: Bench, batch: Batch) -> list[NativeRun]:
    return await bench.store.list_native_runs(batch.id)


async def wait_for_jobs(provider: OpenAIProvider, count: int) -> list[str]:
    async def are_there() -> bool:
        return len(provider.batches) >= count

    await until(are_there)
    return provider.native_ids


async def wait_until_cleaned_up(provider: OpenAIProvider) -> None:
    async def is_clean() -> bool:
        return not provider.files

    await until(is_clean)


async def costs_of(bench: Bench, batch: Batch) -> list[CostItem]:
    """What a batch cost, once its jobs have been counted."""

    async def are_over() -> bool:
        return all(run.status is NativeRunStatus.ENDED for run in await runs_of(bench, batch))

    await until(are_over)
    return await bench.app.service.get_costs(bench.app.project_id, batch.id)


async def wait_for_figures(bench: Bench) -> Mapping[str, NativeFigures]:
    """What the metrics say once the store was asked again."""
    bench.app.metrics.native_figures = {}

    async def are_there() -> bool:
        return bool(bench.app.metrics.native_figures)

    await until(are_there)
    return bench.app.metrics.native_figures


def texts(lines: list[Any]) -> list[str]:
    return [each["response"]["body"]["choices"][0]["message"]["content"] for each in lines]


NAMES = [f"line-{n}" for n in range(10)]


async def test_a_batch_is_run_as_one_job_and_its_results_stand_in_input_order(
    data_dir: Path, provider: OpenAIProvider
) -> None:
    async with bench(data_dir, provider) as it:
        batch = await it.create(*NAMES)
        [native_id] = await wait_for_jobs(provider, 1)
        provider.end(native_id)

        ended = await it.wait_until_ended(batch)

        output, errors = await it.results(batch)
        await wait_until_cleaned_up(provider)
    assert ended.status is BatchStatus.COMPLETED
    assert ended.counts == Counts(total=10, completed=10, failed=0)
    assert ended.usage.total_tokens > 0
    assert ids(output) == texts(output) == NAMES
    assert errors == []
    assert "POST /chat/completions" not in provider.calls


async def test_what_a_job_took_and_cost_is_told(
    data_dir: Path, provider: OpenAIProvider
) -> None:
    provider.is_quick = True
    prices = {"m": {"input": 4, "cached_input": 1, "output": 20}}
    async with bench(data_dir, provider, prices=prices, batch_discount=0.5) as it:
        batch = await it.create(*NAMES)
        ended = await it.wait_until_ended(batch)

        [item] = await costs_of(it, batch)
        [run] = await runs_of(it, batch)
        assert await it.slices(batch) == []
        told = await wait_for_figures(it)

    assert run.spent is not None
    assert (run.spent.answered, run.spent.model) == (10, "m")
    assert run.spent.usage == item.usage == ended.usage
    usage = ended.usage
    assert usage.cached_tokens == 0 < usage.output_tokens
    by_line = Decimal(4 * usage.input_tokens + 20 * usage.output_tokens) / 1_000_000
    assert (item.requests, item.answered, item.jobs) == (10, 10, 1)
    assert item.cost == Cost(
        usd=by_line / 2, by_line_usd=by_line, is_least=False, source="settings"
    )
    assert told["one"] == NativeFigures(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cost_usd=float(by_line / 2),
        by_line_usd=float(by_line),
    )


async def test_what_nobody_knows_of_a_jobs_price_is_not_0(
    data_dir: Path, provider: OpenAIProvider
) -> None:
    provider.is_quick = True
    other = {"other": {"input": 4, "output": 20}}
    async with bench(data_dir, provider, prices=other, batch_discount=0.5) as it:
        batch = await it.create(*NAMES)
        ended = await it.wait_until_ended(batch)

        [item] = await costs_of(it, batch)
        told = await wait_for_figures(it)

    assert item.usage == ended.usage
    assert (item.cost.usd, item.cost.by_line_usd) == (None, None)
    assert told["one"].unpriced_tokens == ended.usage.total_tokens
    assert (told["one"].cost_usd, told["one"].by_line_usd) == (None, None)


async def test_lines_that_a_job_left_over_are_told_apart_from_those_it_ran(
    data_dir: Path, provider: OpenAIProvider
) -> None:
    prices = {"m": {"input": 4, "output": 20}}
    async with bench(
        data_dir, provider, prices=prices, batch_discount=0.5, fallback="lines"
    ) as it:
        batch = await it.create(*NAMES)
        [native_id] = await wait_for_jobs(provider, 1)
        provider.end(native_id, "expired", only=8)
        ended = await it.wait_until_ended(batch)

        job, lines = await costs_of(it, batch)

    assert ended.counts.completed == 10
    assert (job.is_native, job.requests, job.answered) == (True, 10, 8)
    assert (lines.is_native, lines.answered, lines.upstream) == (False, 2, "one")
    assert job.usage is not None
    assert lines.usage is not None
    assert job.usage + lines.usage == ended.usage
    assert lines.cost.usd == lines.cost.by_line_usd
    assert job.cost.by_line_usd == 2 * (job.cost.usd or 0)


async def test_a_job_whose_results_are_not_to_be_had_cost_what_nobody_knows(
    data_dir: Path, provider: OpenAIProvider
) -> None:
    async with bench(data_dir, provider, prices={"*": {"input": 4, "output": 20}}) as it:
        batch = await it.create(*NAMES)
        [native_id] = await wait_for_jobs(provider, 1)
        del provider.batches[native_id]
        ended = await it.wait_until_ended(batch)

        [item] = await costs_of(it, batch)

    assert ended.counts.failed == 10
    assert (item.is_over, item.answered, item.usage, item.cost) == (True, None, None, Cost())


async def test_a_mixed_file_is_fanned_out_and_put_together_again(
    data_dir: Path, provider: OpenAIProvider
) -> None:
    upstreams = [
        {
            "name": "hosted",
            "base_url": provider.base_url,
            "api_key": KEY,
            "models": ["big-*"],
            "mode": "native",
        },
        {"name": "own", "base_url": provider.base_url, "api_key": KEY},
    ]
    models = ["big-1", "own", "big-2"]
    data = b"".join(line(name, model=models[n % 3]) for n, name in enumerate(NAMES))
    async with Bench(
        data_dir, provider, upstreams=upstreams, natives=HASTY, worker={"slice_requests": 4}
    ) as it:
        batch = await it.create_from(data)
        for native_id in await wait_for_jobs(provider, 2):
            provider.end(native_id)

        ended = await it.wait_until_ended(batch)

        output, _ = await it.results(batch)
        runs = await runs_of(it, batch)
    assert ended.counts == Counts(total=10, completed=10, failed=0)
    assert ids(output) == NAMES
    expected = [f"by line: {name}" if n % 3 == 1 else name for n, name in enumerate(NAMES)]
    assert texts(output) == expected
    assert {run.model: run.requests for run in runs} == {"big-1": 4, "big-2": 3}
    for native_id in provider.native_ids:
        assert len({each["body"]["model"] for each in provider.lines_of(native_id)}) == 1


async def test_results_so_far_are_those_of_lines_that_have_ended(
    data_dir: Path, provider: OpenAIProvider
) -> None:
    upstreams = [
        {
            "name": "hosted",
            "base_url": provider.base_url,
            "api_key": KEY,
            "models": ["big"],
            "mode": "native",
        },
        {"name": "own", "base_url": provider.base_url, "api_key": KEY},
    ]
    data = b"".join(line(name, model=["big", "own"][n % 2]) for n, name in enumerate(NAMES))
    async with Bench(data_dir, provider, upstreams=upstreams, natives=HASTY) as it:
        batch = await it.create_from(data)
        await wait_for_jobs(provider, 1)
        await it.wait_until_counted(batch, 5)

        assert (await it.get(batch)).status is BatchStatus.IN_PROGRESS
        assert ids(read_lines(await it.so_far(batch))) == NAMES[1::2]

        provider.end(provider.native_ids[0])
        await it.wait_until_ended(batch)


async def test_the_provider_never_sees_a_custom_id(
    data_dir: Path, provider: OpenAIProvider
) -> None:
    names = ["a" * 512, 'caf\u00e9 \u2028 "quoted"', "l2"]
    async with bench(data_dir, provider) as it:
        batch = await it.create(*names)
        [native_id] = await wait_for_jobs(provider, 1)
        assert [each["custom_id"] for each in provider.lines_of(native_id)] == [
            "l1",
            "l2",
            "l3",
        ]
        provider.end(native_id)
        await it.wait_until_ended(batch)
        output, _ = await it.results(batch)
    assert ids(output) == names


async def test_a_batch_beyond_the_limits_is_split(
    data_dir: Path, provider: OpenAIProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = msgspec.structs.replace(DIALECTS["openai"].limits, max_requests=8)
    monkeypatch.setitem(DIALECTS, "openai", replace(DIALECTS["openai"], limits=limits))
    names = [f"line-{n}" for n in range(30)]
    provider.is_quick = True
    async with bench(data_dir, provider) as it:
        batch = await it.create(*names)
        ended = await it.wait_until_ended(batch)
        output, _ = await it.results(batch)
    assert ended.counts.completed == 30
    assert texts(output) == names
    assert sorted(len(provider.lines_of(each)) for each in provider.native_ids) == [6, 8, 8, 8]


async def test_a_job_that_is_too_large_for_the_provider_is_halved(
    data_dir: Path, provider: OpenAIProvider
) -> None:
    provider.is_quick = True
    provider.spoil(UPLOAD, Trouble(status=413))
    async with bench(data_dir, provider) as it:
        batch = await it.create(*NAMES)
        ended = await it.wait_until_ended(batch)
        output, _ = await it.results(batch)
    assert ended.counts.completed == 10
    assert texts(output) == NAMES
    assert sorted(len(provider.lines_of(each)) for each in provider.native_ids) == [4, 6]


async def test_too_few_lines_are_sent_one_by_one(
    data_dir: Path, provider: OpenAIProvider
) -> None:
    async with bench(data_dir, provider, mode="auto", native_from=11) as it:
        batch = await it.create(*NAMES)
        await it.wait_until_ended(batch)
        output, _ = await it.results(batch)
        assert await runs_of(it, batch) == []
    assert texts(output) == [f"by line: {name}" for name in NAMES]
    assert provider.batches == {}


async def test_enough_lines_make_a_job(data_dir: Path, provider: OpenAIProvider) -> None:
    provider.is_quick = True
    async with bench(data_dir, provider, mode="auto", native_from=10) as it:
        batch = await it.create(*NAMES)
        await it.wait_until_ended(batch)
    assert len(provider.batches) == 1


async def test_an_endpoint_that_the_provider_does_not_batch_goes_line_by_line(
    data_dir: Path, provider: OpenAIProvider
) -> None:
    data = line("a").replace(b"/v1/chat/completions", b"/v1/messages")
    async with bench(data_dir, provider) as it:
        file = await it.app.service.create_file(it.app.project_id, Upload(data))
        batch = await it.app.service.create_batch(
            it.app.project_id,
            input_file_id=file.id,
            endpoint="/v1/messages",
            completion_window="24h",
        )
        await it.wait_until_ended(batch)
        assert await runs_of(it, batch) == []
    assert provider.batches == {}


# What the provider does to lines


async def test_each_line_has_one_result_whatever_the_provider_says_of_it(
    data_dir: Path, provider: OpenAIProvider
) -> None:
    def behave(custom_id: str, body: dict[str, Any]) -> tuple[int, Any] | None:
        match custom_id:
            case "l2":
                return None
            case "l3":
                return 400, {"error": {"message": "Too long.", "code": "too_long"}}
            case _:
                return echo(custom_id, body)

    provider.behave = behave
    doubled = b'{"id":"x","custom_id":"l1","response":{"status_code":200,"body":{"n":2}}}\n'
    unknown = b'{"id":"x","custom_id":"l99","response":{"status_code":200,"body":{}}}\n'
    foreign = b'{"id":"x","custom_id":"line-5","response":{"status_code":200,"body":{}}}\n'
    broken = b'{"id":"x","custom_id":"l4","response":\n{"custom_id":"l7","response":5}\n'
    provider.extra_lines = [doubled, unknown, foreign, broken, b"not json\n"]
    async with bench(data_dir, provider) as it:
        batch = await it.create(*NAMES)
        [native_id] = await wait_for_jobs(provider, 1)
        provider.end(native_id)
        ended = await it.wait_until_ended(batch)
        output, errors = await it.results(batch)
    assert ended.counts == Counts(total=10, completed=8, failed=2)
    assert ids(output) == [NAMES[0], *NAMES[3:]]
    assert codes(errors) == {"line-1": "upstream_result_missing", "line-2": 400}


async def test_what_the_provider_did_not_run_says_so(
    data_dir: Path, provider: OpenAIProvider
) -> None:
    async with bench(data_dir, provider) as it:
        batch = await it.create(*NAMES)
        [native_id] = await wait_for_jobs(provider, 1)
        provider.end(native_id, "expired", only=6)
        ended = await it.wait_until_ended(batch)
        output, errors = await it.results(batch)
    assert ended.status is BatchStatus.COMPLETED
    assert texts(output) == NAMES[:6]
    assert codes(errors) == dict.fromkeys(NAMES[6:], "batch_expired")


async def test_a_job_that_fails_fails_its_lines_with_the_providers_words(
    data_dir: Path, provider: OpenAIProvider
) -> None:
    async with bench(data_dir, provider) as it:
        batch = await it.create(*NAMES)
        [native_id] = await wait_for_jobs(provider, 1)
        fault = {"code": "model_not_found", "message": "There is no model m."}
        provider.end(native_id, "failed", faults=[fault])
        ended = await it.wait_until_ended(batch)
        _, errors = await it.results(batch)
    assert ended.counts == Counts(total=10, completed=0, failed=10)
    assert codes(errors) == dict.fromkeys(NAMES, "upstream_batch_failed")
    assert "There is no model m." in errors[0]["error"]["message"]


async def test_a_job_for_which_there_was_no_room_is_submitted_again(
    data_dir: Path, provider: OpenAIProvider
) -> None:
    async with bench(data_dir, provider) as it:
        batch = await it.create(*NAMES)
        [first] = await wait_for_jobs(provider, 1)
        fault = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached."}
        provider.end(first, "failed", faults=[fault])
        [_, second] = await wait_for_jobs(provider, 2)
        provider.end(second)
        ended = await it.wait_until_ended(batch)
        await wait_until_cleaned_up(provider)
    assert ended.counts.completed == 10
    keys = [provider.batches[each]["metadata"]["penstock_job"] for each in (first, second)]
    assert keys[0] != keys[1]


@pytest.mark.parametrize("status", [400, 401, 404])
async def test_a_job_that_is_refused_fails_its_lines(
    status: int, data_dir: Path, provider: OpenAIProvider
) -> None:
    provider.spoil(CREATE, Trouble(status=status))
    async with bench(data_dir, provider) as it:
        batch = await it.create(*NAMES)
        await it.wait_until_ended(batch)
        _, errors = await it.results(batch)
        await wait_until_cleaned_up(provider)
    assert codes(errors) == dict.fromkeys(NAMES, "upstream_batch_failed")


# What goes wrong on the way


@pytest.mark.parametrize(
    ("route", "trouble"),
    [
        (UPLOAD, Trouble(status=500)),
        (UPLOAD, Trouble(status=429, headers={"Retry-After": "0"})),
        (UPLOAD, Trouble(is_lost=True)),
        (CREATE, Trouble(status=429)),
        (CREATE, Trouble(status=503)),
        (CREATE, Trouble(is_lost=True)),
        (CREATE, Trouble(is_cut=True)),
        (GET, Trouble(status=500)),
        (GET, Trouble(status=401)),
        (GET, Trouble(is_cut=True)),
        (CONTENT, Trouble(status=429)),
        (CONTENT, Trouble(status=502)),
        (CONTENT, Trouble(is_cut=True)),
        (CONTENT, Trouble(is_lost=True)),
    ],
    ids=str,
)
async def test_a_provider_that_stumbles_is_asked_again_and_paid_once(
    route: str, trouble: Trouble, data_dir: Path, provider: OpenAIProvider
) -> None:
    provider.is_quick = True
    provider.spoil(route, trouble)
    provider.spoil(LIST, Trouble(status=503))
    async with bench(data_dir, provider) as it:
        batch = await it.create(*NAMES)
        ended = await it.wait_until_ended(batch)
        output, _ = await it.results(batch)
    assert ended.counts == Counts(total=10, completed=10, failed=0)
    assert texts(output) == NAMES
    assert len(provider.batches) == 1
    assert not provider.troubles[route]


# Fallback


async def test_with_fallback_what_the_provider_leaves_is_sent_line_by_line(
    data_dir: Path, provider: OpenAIProvider
) -> None:
    def behave(custom_id: str, body: dict[str, Any]) -> tuple[int, Any] | None:
        match custom_id:
            case "l1":
                return 500, {"error": {"message": "Oops."}}
            case "l2":
                return None
            case "l3":
                return 400, {"error": {"message": "Too long."}}
            case _:
                return echo(custom_id, body)

    provider.behave = behave
    async with bench(data_dir, provider, fallback="lines") as it:
        batch = await it.create(*NAMES)
        [native_id] = await wait_for_jobs(provider, 1)
        provider.end(native_id, "expired", only=8)
        ended = await it.wait_until_ended(batch)
        output, errors = await it.results(batch)
    assert ended.counts == Counts(total=10, completed=9, failed=1)
    assert codes(errors) == {"line-2": 400}
    again = {"line-0", "line-1", "line-8", "line-9"}
    expected = [f"by line: {name}" if name in again else name for name in NAMES]
    assert texts(output) == [text for text in expected if text != "line-2"]


async def test_with_fallback_lines_of_a_refused_job_are_sent_one_by_one(
    data_dir: Path, provider: OpenAIProvider
) -> None:
    provider.spoil(CREATE, Trouble(status=400))
    async with bench(data_dir, provider, fallback="lines") as it:
        batch = await it.create(*NAMES)
        ended = await it.wait_until_ended(batch)
    assert ended.counts.completed == 10
    assert provider.batches == {}


async def test_with_fallback_a_job_is_stopped_in_time_for_the_rest(
    data_dir: Path, provider: OpenAIProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_plan, "_FALLBACK_SHARE", 0.9)
    async with bench(data_dir, provider, fallback="lines") as it:
        batch = await it.create(*NAMES, window="20s")
        await wait_for_jobs(provider, 1)
        ended = await it.wait_until_ended(batch)
        output, _ = await it.results(batch)
    assert ended.status is BatchStatus.COMPLETED
    assert texts(output) == [NAMES[0], *(f"by line: {name}" for name in NAMES[1:])]


# Cancel and the end of the window


async def test_a_cancel_reaches_the_provider_and_what_was_run_is_kept(
    data_dir: Path, provider: OpenAIProvider
) -> None:
    async with bench(data_dir, provider) as it:
        batch = await it.create(*NAMES)
        await wait_for_jobs(provider, 1)
        await it.cancel(batch)
        ended = await it.wait_until_ended(batch)
        output, errors = await it.results(batch)
    assert ended.status is BatchStatus.CANCELLED
    assert texts(output) == NAMES[:1]
    assert codes(errors) == dict.fromkeys(NAMES[1:], "batch_cancelled")
    assert CANCEL in provider.calls


async def test_a_provider_that_does_not_answer_a_cancel_is_asked_again(
    data_dir: Path, provider: OpenAIProvider
) -> None:
    provider.spoil(CANCEL, Trouble(status=500), Trouble(is_lost=True))
    async with bench(data_dir, provider) as it:
        batch = await it.create(*NAMES)
        await wait_for_jobs(provider, 1)
        await it.cancel(batch)
        ended = await it.wait_until_ended(batch)
        output, _ = await it.results(batch)
    assert ended.status is BatchStatus.CANCELLED
    assert texts(output) == NAMES[:1]


async def test_a_provider_that_does_not_cancel_holds_up_a_batch_for_the_grace_time_only(
    data_dir: Path, provider: OpenAIProvider
) -> None:
    provider.cancels_at_once = False
    one = {"mode": "native", "api_key": KEY}
    async with Bench(
        data_dir, provider, upstream=one, natives=HASTY, worker={"cancel_grace_s": 0.2}
    ) as it:
        batch = await it.create(*NAMES)
        await wait_for_jobs(provider, 1)
        await it.cancel(batch)
        ended = await it.wait_until_ended(batch)
        _, errors = await it.results(batch)
    assert ended.status is BatchStatus.CANCELLED
    assert codes(errors) == dict.fromkeys(NAMES, "batch_cancelled")


async def test_at_the_end_of_the_window_what_was_run_is_kept(
    data_dir: Path, provider: OpenAIProvider
) -> None:
    async with bench(data_dir, provider) as it:
        batch = await it.create(*NAMES, window="2s")
        await wait_for_jobs(provider, 1)
        ended = await it.wait_until_ended(batch)
        output, errors = await it.results(batch)
    assert ended.status is BatchStatus.EXPIRED
    assert texts(output) == NAMES[:1]
    assert codes(errors) == dict.fromkeys(NAMES[1:], "batch_expired")
