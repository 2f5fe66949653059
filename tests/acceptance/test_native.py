"""Providers' batch APIs, with real processes: killed ones, and a second Penstock."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path

import pytest
from openai import AsyncOpenAI, BadRequestError

from tests.integration.bench import line
from tests.providers.one_batch import NAMES
from tests.providers.openai_server import CONTENT, CREATE, GET, KEY, UPLOAD, OpenAIProvider

PATIENCE_S = 60.0


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@pytest.mark.parametrize(
    "moment",
    [
        f"before {UPLOAD}",
        f"after {UPLOAD}",
        f"before {CREATE}",
        f"after {CREATE}",
        f"after {GET}",
        f"after {CONTENT}",
        "after DELETE /files/{id}",
    ],
)
async def test_a_process_that_is_killed_has_bought_a_job_once(
    tmp_path: Path, moment: str
) -> None:
    async with OpenAIProvider(is_quick=True) as provider:
        arguments = ("-m", "tests.providers.one_batch", str(tmp_path), provider.base_url)
        first = await start(*arguments)

        def kill(now: str) -> None:
            if now == moment:
                provider.on_call = None
                first.send_signal(signal.SIGKILL)

        provider.on_call = kill
        async with asyncio.timeout(PATIENCE_S):
            await first.communicate()
            assert first.returncode == -signal.SIGKILL
            second = await start(*arguments)
            output, errors = await second.communicate()

    assert second.returncode == 0, errors.decode()
    told = json.loads(output.splitlines()[-1])
    assert told == {"status": "completed", "output": NAMES, "errors": []}
    assert len(provider.batches) == 1


SETTINGS = """
data_dir = "{data_dir}"

[server]
port = 0

[[projects]]
name = "search"
api_keys = ["{key}"]
allow_upstreams = ["chosen"]

[[upstreams]]
name = "first"
base_url = "{base_url}"
api_key = "{upstream_key}"
kind = "{kind}"
mode = "{mode}"
models = ["m"]

[[upstreams]]
name = "chosen"
base_url = "{base_url}"
api_key = "{upstream_key}"
models = ["none"]
"""


@asynccontextmanager
async def served(
    folder: Path, *, base_url: str, upstream_key: str, kind: str, mode: str
) -> AsyncIterator[AsyncOpenAI]:
    """`penstock serve`, and a client of it."""
    folder.mkdir()
    key = f"sk-{folder.name}-0123456789abcdef"
    config = folder / "penstock.toml"
    config.write_text(
        SETTINGS.format(
            data_dir=folder / "data",
            key=key,
            base_url=base_url,
            upstream_key=upstream_key,
            kind=kind,
            mode=mode,
        )
    )
    process = await start("-m", "penstock", "serve", "--config", str(config))
    try:
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            greeting = (await process.stdout.readline()).decode()
        url = greeting.split("listens on ")[1].split()[0]
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
        yield client
        await client.close()
    finally:
        process.terminate()
        await process.communicate()


async def test_a_second_penstock_runs_the_batches_of_a_first_one(tmp_path: Path) -> None:
    data = b"".join(line(name) for name in NAMES)
    async with (
        OpenAIProvider() as provider,
        served(
            tmp_path / "second",
            base_url=provider.base_url,
            upstream_key="sk-provider-0123456789",
            kind="openai",
            mode="lines",
        ) as second,
        served(
            tmp_path / "first",
            base_url=str(second.base_url),
            upstream_key=second.api_key,
            kind="penstock",
            mode="native",
        ) as first,
    ):
        file = await first.files.create(file=("in.jsonl", data), purpose="batch")
        batch = await first.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"team": "search"},
        )
        async with asyncio.timeout(PATIENCE_S):
            while (now := await first.batches.retrieve(batch.id)).status != "completed":
                await asyncio.sleep(0.1)

        assert now.output_file_id is not None
        content = await first.files.content(now.output_file_id)
        [theirs] = [each async for each in second.batches.list()]
        assert theirs.metadata is not None
        assert theirs.metadata["team"] == "search"
        async with asyncio.timeout(PATIENCE_S):
            while [each async for each in second.files.list()]:
                await asyncio.sleep(0.1)
    results = [json.loads(text) for text in content.text.splitlines()]
    assert [each["custom_id"] for each in results] == NAMES
    answers = [each["response"]["body"]["choices"][0]["message"]["content"] for each in results]
    assert answers == [f"by line: {name}" for name in NAMES]


async def test_a_wrong_key_at_a_second_penstock_is_told_once_and_as_that_ones(
    tmp_path: Path,
) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"".join(line(name) for name in NAMES))
    async with (
        served(
            tmp_path / "second",
            base_url="http://127.0.0.1:9/v1",
            upstream_key="sk-none",
            kind="openai",
            mode="lines",
        ) as second,
        served(
            tmp_path / "first",
            base_url=str(second.base_url),
            upstream_key="sk-wrong-0123456789",
            kind="penstock",
            mode="native",
        ) as first,
    ):
        config = tmp_path / "first" / "penstock.toml"
        environment = {
            "PENSTOCK_URL": str(first.base_url).removesuffix("/v1/"),
            "PENSTOCK_API_KEY": first.api_key,
        }
        by_server = await tell(
            "submit", str(tmp_path / "in.jsonl"), "--wait", environment=environment
        )
        [batch] = [each async for each in first.batches.list()]
        by_status = await tell("status", batch.id, environment=environment)
        by_run = await tell(
            *("run", str(tmp_path / "in.jsonl"), "--config", str(config)),
            environment={},
        )
    for shown in (by_server, by_status, by_run):
        assert shown.count("HTTP 401") == 1
        assert (
            f"{len(NAMES)} × upstream_batch_failed: The batch at the provider failed: The "
            "other Penstock at upstream first did not take a file of requests (HTTP 401): "
            "Incorrect API key provided: sk-"
        ) in shown
        assert "of the Penstock that answered this, where that one runs." in shown


async def tell(*arguments: str, environment: dict[str, str]) -> str:
    """What a command prints, on one line."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "penstock", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment, "COLUMNS": "200"},
    )
    async with asyncio.timeout(PATIENCE_S):
        output, _ = await process.communicate()
    return " ".join(output.decode().split())


async def test_a_client_chooses_an_upstream_where_its_project_may(tmp_path: Path) -> None:
    async with (
        OpenAIProvider() as provider,
        served(
            tmp_path / "one",
            base_url=provider.base_url,
            upstream_key="sk-provider-0123456789",
            kind="openai",
            mode="native",
        ) as client,
    ):

        async def create(**headers: str) -> str:
            batch = await client.batches.create(
                input_file_id=file.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                extra_headers={name.replace("_", "-"): text for name, text in headers.items()},
            )
            return batch.id

        data = b"".join(line(name, model="elsewhere") for name in NAMES)
        file = await client.files.create(file=("in.jsonl", data), purpose="batch")
        name = await create(x_tfy_provider_name="chosen")
        with pytest.raises(BadRequestError, match="This project may choose chosen"):
            await create(x_tfy_provider_name="first")
        with pytest.raises(BadRequestError, match="The models of the upstream 'chosen'"):
            await create(x_tfy_provider_name="chosen", x_tfy_provider_model="gpt-9")
        with pytest.raises(BadRequestError, match="together with 'x-tfy-provider-name'"):
            await create(x_tfy_provider_model="none")
        async with asyncio.timeout(PATIENCE_S):
            while (now := await client.batches.retrieve(name)).status != "completed":
                await asyncio.sleep(0.05)

        assert now.request_counts is not None
        assert now.request_counts.completed == len(NAMES)
        without = await create()
        async with asyncio.timeout(PATIENCE_S):
            while (now := await client.batches.retrieve(without)).status != "failed":
                await asyncio.sleep(0.05)
    assert provider.batches == {}


async def test_status_says_what_a_provider_was_paid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prices = {"m": {"input": 40, "cached_input": 40, "output": 200}}
    monkeypatch.setenv("PENSTOCK_UPSTREAMS__0__PRICES", json.dumps(prices))
    monkeypatch.setenv("PENSTOCK_UPSTREAMS__0__BATCH_DISCOUNT", "0.5")
    data = b"".join(line(name) for name in NAMES)
    async with (
        OpenAIProvider(is_quick=True) as provider,
        served(
            tmp_path / "one",
            base_url=provider.base_url,
            upstream_key=KEY,
            kind="openai",
            mode="native",
        ) as client,
    ):
        file = await client.files.create(file=("in.jsonl", data), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        monkeypatch.setenv("PENSTOCK_URL", str(client.base_url).removesuffix("/v1/"))
        monkeypatch.setenv("PENSTOCK_API_KEY", client.api_key)

        async def status(*more: str) -> str:
            process = await start("-m", "penstock", "status", batch.id, *more)
            output, errors = await process.communicate()
            assert process.returncode == 0, errors.decode()
            return output.decode()

        told = json.loads(await status("--json"))
        async with asyncio.timeout(PATIENCE_S):
            while told["status"] != "completed" or told["costs"]["cost"] is None:
                await asyncio.sleep(0.1)
                told = json.loads(await status("--json"))
        [item] = told["costs"]["data"]
        shown = " ".join((await status()).split())
        as_it_is = await client.batches.retrieve(batch.id)

    usage = told["usage"]
    by_line = Decimal(40 * usage["input_tokens"] + 200 * usage["output_tokens"]) / 10**6
    assert item["usage"] == usage
    assert (item["mode"], item["upstream"], item["model"]) == ("native", "first", "m")
    assert Decimal(item["line_cost"]) == by_line > 0
    assert Decimal(item["cost"]) == Decimal(told["costs"]["cost"]) == by_line / 2
    assert f"At first {len(NAMES)} lines of m, {usage['total_tokens']:,} tokens, US$" in shown
    assert "costs" not in as_it_is.model_dump()
