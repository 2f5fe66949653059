"""What a reviewer found: each of these failed when it was written."""

import asyncio
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from penstock.blobs.folder import FolderBlobs
from penstock.errors import StorageUnavailable
from penstock.model import BatchStatus
from penstock.store.sql import SqlStore
from tests.integration.bench import CHAT, Bench, Upload, line, prompt_of, script
from tests.upstreams import Action, ScriptedUpstream, answer, chat_completion, fail, stall


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream(script({})) as upstream:
        yield upstream


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


def count_claims(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    claims = [0]
    claim = SqlStore.claim_slices

    async def counted(self: SqlStore, ids: Any, **rest: Any) -> Any:
        claims[0] += len(ids)
        await asyncio.sleep(0.01)  # so that a slice is always on its way to the worker
        return await claim(self, ids, **rest)

    monkeypatch.setattr(SqlStore, "claim_slices", counted)
    return claims


async def test_a_line_that_names_a_key_twice_does_not_hang_its_batch(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    odd = (
        b'{"custom_id":"x","method":"POST","url":"%b",'
        b'"body":{"model":5,"model":"m","messages":[]}}\n' % CHAT.encode()
    )
    async with Bench(data_dir, upstream) as bench:
        batch = await bench.create_from(line("a") + odd, window="2s")
        async with asyncio.timeout(6):
            await bench.wait_until_ended(batch)


async def test_a_cancelled_batch_does_not_starve_the_others(
    data_dir: Path, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def behave(path: str, headers: dict[str, str], body: bytes, nth: int) -> Action:
        prompt = prompt_of(body)
        return stall() if prompt in ("a0", "a1") else answer(chat_completion(prompt))

    upstream.behave = behave
    claims = count_claims(monkeypatch)
    worker = {"slice_requests": 20, "flush_interval_s": 0.05}
    async with Bench(
        data_dir, upstream, worker=worker, upstream={"max_concurrency": 8}
    ) as bench:
        first = await bench.create(*[f"a{n}" for n in range(20_000)], window="1h")
        others = [
            await bench.create(*[f"b{m}-{n}" for n in range(400)], window=f"{m + 2}h")
            for m in range(2)
        ]
        for batch in others:
            while (await bench.get(batch)).status is BatchStatus.VALIDATING:
                await asyncio.sleep(0.01)
        await bench.wait_until_counted(first, 1500)
        await bench.cancel(first)
        await asyncio.sleep(1.5)
        before = claims[0]
        await asyncio.sleep(2)
        assert claims[0] - before < 200
        for batch in others:
            await bench.wait_until_counted(batch, 400)


async def test_a_slow_upstream_does_not_starve_a_fast_one(data_dir: Path) -> None:
    async with (
        ScriptedUpstream(lambda *_: stall()) as slow,
        ScriptedUpstream(script({})) as fast,
    ):
        upstreams = [
            {"name": "slow", "base_url": slow.base_url, "models": ["slow"]},
            {"name": "fast", "base_url": fast.base_url},
        ]
        upstreams[0]["max_concurrency"] = 4
        async with Bench(data_dir, slow, upstreams=upstreams) as bench:
            pad = "x" * 20_000
            await bench.create_from(
                b"".join(line(f"s{n}", model="slow", pad=pad) for n in range(1500))
            )
            await slow.wait_for_requests(4)
            await asyncio.sleep(1)
            batch = await bench.create("a", "b")
            async with asyncio.timeout(5):
                await bench.wait_until_ended(batch)


async def test_a_fault_between_two_reads_of_the_feeder_loses_no_slice(
    data_dir: Path, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = count(1)
    read = SqlStore.list_pending

    async def fails_once(self: SqlStore, *args: Any, **rest: Any) -> Any:
        if next(numbers) == 2:
            raise StorageUnavailable("Once.")
        return await read(self, *args, **rest)

    monkeypatch.setattr(SqlStore, "list_pending", fails_once)
    async with Bench(data_dir, upstream, worker={"slice_requests": 2}) as bench:
        batch = await bench.create(*[f"a{n}" for n in range(300)])
        async with asyncio.timeout(8):
            await bench.wait_until_ended(batch)


async def test_nothing_of_an_expired_batch_is_handed_out_while_it_is_finalized(
    data_dir: Path, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.behave = lambda *_: stall()
    claims = count_claims(monkeypatch)
    async with Bench(
        data_dir,
        upstream,
        worker={"slice_requests": 5},
        upstream={"max_concurrency": 4},
    ) as bench:
        batch = await bench.create(*[f"a{n}" for n in range(4000)], window="2s")
        await asyncio.sleep(1)
        before = claims[0]
        async with asyncio.timeout(15):
            await bench.wait_until_ended(batch)
        assert claims[0] - before < 100


async def test_bodies_that_wait_are_bounded_whether_they_are_new_or_turned_away(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    upstream.behave = lambda *_: fail(429, headers={"Retry-After": "60"})
    pad = "x" * 20_000
    options = {"max_concurrency": 64, "initial_concurrency": 64}
    async with Bench(data_dir, upstream, upstream=options) as bench:
        batch = await bench.create_from(b"".join(line(f"s{n}", pad=pad) for n in range(3000)))
        await upstream.wait_for_requests(64)
        await asyncio.sleep(2)
        # 8 MiB and some, of a file of 60 MB: the rest of it is not in memory.
        claimed = sum(piece.requests for piece in await bench.slices(batch) if piece.attempt)
        assert claimed < 1000
        assert len(upstream.requests) == 64  # it has asked for a minute


async def test_large_slices_are_not_all_read_at_once(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    upstream.behave = lambda *_: stall()
    pad = "x" * 2_000_000
    async with Bench(data_dir, upstream, upstream={"max_concurrency": 4}) as bench:
        batch = await bench.create_from(b"".join(line(f"s{n}", pad=pad) for n in range(60)))
        await upstream.wait_for_requests(4)
        await asyncio.sleep(1.5)
        slices = await bench.slices(batch)
        assert sum(each.attempt for each in slices) < 25  # 16 MiB and those in flight


async def test_input_files_that_cannot_be_read_do_not_stop_the_others(
    data_dir: Path, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: set[str] = set()
    size = FolderBlobs.size

    async def fails(self: FolderBlobs, key: str) -> int:
        if key in broken:
            raise StorageUnavailable("The storage did not answer: input/output error.")
        return await size(self, key)

    monkeypatch.setattr(FolderBlobs, "size", fails)
    async with Bench(data_dir, upstream) as bench:
        service, project_id = bench.app.service, bench.app.project_id
        for name in ("a", "b"):
            file = await service.create_file(project_id, Upload(line(name)))
            broken.add(file.blob_key)
            await service.create_batch(project_id, input_file_id=file.id, endpoint=CHAT)
        await asyncio.sleep(0.2)
        good = await bench.create("good")
        async with asyncio.timeout(5):
            await bench.wait_until_ended(good)
