"""Batches from creation to their result files: the whole service over real files, a real
database and an upstream that misbehaves."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from penstock.blobs.folder import FolderBlobs
from penstock.blobs.local_segments import LocalWriter
from penstock.blobs.segments import Kind
from penstock.errors import DataDirInUse, NotFound
from penstock.model import BatchStatus, Counts, File, FileId, Purpose, SliceStatus, Usage
from penstock.service import Service, ServiceLimits
from penstock.store.base import BatchFilter
from penstock.upstream.routes import Routes
from tests.disks import small_disk
from tests.integration.bench import (
    CHAT,
    Bench,
    Upload,
    codes,
    ids,
    line,
    prompt_of,
    prompts,
    read_lines,
    script,
    until,
)
from tests.upstreams import (
    Action,
    Behave,
    ScriptedUpstream,
    answer,
    chat_completion,
    cut,
    cut_between_chunks,
    cut_in_body,
    fail,
    hold,
    html,
    stall,
    stall_in_body,
)


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream(script({})) as upstream:
        yield upstream


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


def held_back(prompt: str, *, until: asyncio.Event) -> Action:
    return hold(answer(chat_completion(prompt)), until=until)


def by_arrival(actions: Mapping[int, Action], *, later: Action) -> Behave:
    """Answer the first request that comes with action 1, and so on, and others with `later`."""
    numbers = count(1)

    def behave(path: str, headers: dict[str, str], body: bytes, nth: int) -> Action:
        return actions.get(next(numbers), later)

    return behave


# A batch completes


async def test_results_come_in_input_order_however_the_answers_came(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    names = [f"line-{n}" for n in range(40)]
    go = asyncio.Event()
    upstream.behave = script({name: held_back(name, until=go) for name in names[::3]})
    async with Bench(data_dir, upstream, worker={"slice_requests": 7}) as bench:
        batch = await bench.create(*names)
        await bench.wait_until_counted(batch, 26)
        go.set()

        ended = await bench.wait_until_ended(batch)

        output, errors = await bench.results(batch)
    assert ended.status is BatchStatus.COMPLETED
    assert ended.counts == Counts(total=40, completed=40, failed=0)
    assert ended.usage == Usage(input_tokens=120, output_tokens=80, total_tokens=200)
    assert ended.model == "m"
    assert ended.error_file_id is None
    assert errors == []
    assert ids(output) == names
    answers = [each["response"]["body"]["choices"][0]["message"]["content"] for each in output]
    assert answers == names
    assert all(each["error"] is None for each in output)
    assert len({each["id"] for each in output}) == 40


async def test_every_line_is_sent_once_and_byte_for_byte(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    raw = b'{ "model" : "m","messages":[{"content":"caf\xc3\xa9 \\u2028"}],"n":1.0, "n":2 }'
    odd = b'{"custom_id":"odd","method":"POST","url":"%b","body":%b}\r\n' % (CHAT.encode(), raw)
    async with Bench(data_dir, upstream) as bench:
        batch = await bench.create_from(b"\xef\xbb\xbf\n" + odd + line("even")[:-1])
        await bench.wait_until_ended(batch)
        output, _ = await bench.results(batch)

    assert ids(output) == ["odd", "even"]
    assert Counter(upstream.bodies) == {
        raw: 1,
        upstream.bodies[1 - upstream.bodies.index(raw)]: 1,
    }
    assert {request.path for request in upstream.requests} == {CHAT}


async def test_an_answer_stands_in_the_output_as_it_came_on_one_line(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    body = b'{ "choices" : [ ] ,\r\n\t"n":1.0e2, "u":"\\u00e9\xe2\x80\xa8",\n"n":2 }'
    headers = {"x-request-id": "from-upstream-7"}
    upstream.behave = script({"a": answer(body, headers=headers)})
    async with Bench(data_dir, upstream) as bench:
        batch = await bench.create("a", "b")
        ended = await bench.wait_until_ended(batch)
        assert ended.output_file_id is not None
        data = await bench.content(ended.output_file_id)

    first, second = data[:-1].split(b"\n")
    assert body.replace(b"\r", b" ").replace(b"\n", b" ") in first
    assert json.loads(first)["response"]["request_id"] == "from-upstream-7"
    assert json.loads(second)["response"]["request_id"].startswith("req_")


async def test_a_file_with_faults_fails_its_batch_and_nothing_is_sent(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    async with Bench(data_dir, upstream, upstream={"models": ["m*"]}) as bench:
        data = line("a") + b"[]\n" + line("a") + line("d", model="gpt")
        batch = await bench.create_from(data)

        ended = await bench.wait_until_ended(batch)

    assert ended.status is BatchStatus.FAILED
    assert [(fault.code, fault.line) for fault in ended.faults] == [
        ("invalid_json_line", 2),
        ("duplicate_custom_id", 3),
        ("model_not_found", 4),
    ]
    assert (ended.output_file_id, ended.error_file_id) == (None, None)
    assert upstream.requests == []


async def test_each_line_goes_to_the_upstream_of_its_model(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    async with ScriptedUpstream(script({})) as other:
        upstreams = [
            {"name": "small", "base_url": upstream.base_url, "models": ["small-*"]},
            {"name": "rest", "base_url": other.base_url},
        ]
        async with Bench(data_dir, upstream, upstreams=upstreams) as bench:
            data = line("a", model="small-1") + line("b", model="large") + line("c", model="x")
            batch = await bench.create_from(data)
            ended = await bench.wait_until_ended(batch)
            output, _ = await bench.results(batch)

    assert ids(output) == ["a", "b", "c"]
    assert ended.model is None
    assert prompts(upstream) == ["a"]
    assert sorted(prompts(other)) == ["b", "c"]


async def test_a_batch_ends_with_its_results_and_without_its_segments_and_slices(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    async with Bench(data_dir, upstream) as bench:
        batch = await bench.create("a", "b")
        await bench.wait_until_ended(batch)

        async def is_tidy() -> bool:
            return not await bench.slices(batch) and not list((data_dir / "segments").iterdir())

        await until(is_tidy)


# What an upstream does to a line is that line's matter


async def test_a_line_fails_alone_whatever_the_upstream_does_to_it(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    upstream.behave = script(
        {
            "html": html(502),
            "html-as-200": html(200),
            "cut": cut(),
            "cut-in-body": cut_in_body(),
            "cut-between-chunks": cut_between_chunks(),
            "array": answer(b"[]"),
            "empty": answer(b""),
            "bad-utf8": answer(b'{"choices":"\xff"}'),
            "stall": stall(),
            "stall-in-body": stall_in_body(),
            "deep": answer(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        }
    )
    bad = [
        "html",
        "html-as-200",
        "cut",
        "cut-in-body",
        "cut-between-chunks",
        "array",
        "empty",
        "bad-utf8",
        "stall",
        "stall-in-body",
        "deep",
    ]
    good = [f"good-{n}" for n in range(30)]
    names = [*good[:15], *bad, *good[15:]]
    options = {"max_attempts": 1, "request_timeout_s": 1}
    async with Bench(data_dir, upstream, upstream=options) as bench:
        batch = await bench.create(*names)
        ended = await bench.wait_until_ended(batch)
        output, errors = await bench.results(batch)

    assert ended.status is BatchStatus.COMPLETED
    assert ended.counts == Counts(total=41, completed=30, failed=11)
    assert ids(output) == good
    assert ids(errors) == bad
    assert codes(errors) == {
        "html": 502,
        "html-as-200": "invalid_upstream_response",
        "cut": "upstream_disconnected",
        "cut-in-body": "upstream_disconnected",
        "cut-between-chunks": "upstream_disconnected",
        "array": "invalid_upstream_response",
        "empty": "invalid_upstream_response",
        "bad-utf8": "invalid_upstream_response",
        "stall": "request_timeout",
        "stall-in-body": "request_timeout",
        "deep": "invalid_upstream_response",
    }
    assert "<html>" in errors[0]["response"]["body"]["error"]["message"]


async def test_an_upstream_that_is_not_there_fails_the_line(data_dir: Path) -> None:
    async with ScriptedUpstream() as gone:
        pass
    async with Bench(data_dir, gone, upstream={"max_attempts": 1}) as bench:
        batch = await bench.create("a")
        ended = await bench.wait_until_ended(batch)
        output, errors = await bench.results(batch)

    assert ended.status is BatchStatus.COMPLETED
    assert ended.output_file_id is None
    assert output == []
    assert codes(errors) == {"a": "upstream_unreachable"}


async def test_an_answer_that_is_not_2xx_goes_to_the_error_file_with_its_body(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    upstream.behave = script({"b": fail(400, "Too long."), "c": fail(404), "d": fail(401)})
    async with Bench(data_dir, upstream) as bench:
        batch = await bench.create("a", "b", "c", "d", "e")
        ended = await bench.wait_until_ended(batch)
        output, errors = await bench.results(batch)

    assert ids(output) == ["a", "e"]
    assert codes(errors) == {"b": 400, "c": 404, "d": 401}
    assert all(each["error"] is None for each in errors)
    assert errors[0]["response"]["body"]["error"]["message"] == "Too long."
    assert ended.counts == Counts(total=5, completed=2, failed=3)
    assert Counter(prompts(upstream)) == Counter("abcde")


async def test_a_line_is_tried_again_after_a_failure_that_passes(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    upstream.behave = script(
        {
            "a": lambda nth: fail(503) if nth == 1 else answer(),
            "b": lambda nth: cut() if nth == 1 else answer(),
            "c": lambda nth: fail(500, f"Attempt {nth}."),
        }
    )
    async with Bench(data_dir, upstream, upstream={"max_attempts": 2}) as bench:
        batch = await bench.create("a", "b", "c", "d")
        await bench.wait_until_ended(batch)
        output, errors = await bench.results(batch)

    assert ids(output) == ["a", "b", "d"]
    assert ids(errors) == ["c"]
    assert errors[0]["response"]["body"]["error"]["message"] == "Attempt 2."
    assert Counter(prompts(upstream)) == {"a": 2, "b": 2, "c": 2, "d": 1}


async def test_an_upstream_that_asks_to_wait_is_left_alone(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    busy = fail(429, headers={"Retry-After": "60", "retry-after-ms": "900"})
    upstream.behave = script({"a": lambda nth: busy if nth == 1 else answer()})
    async with Bench(data_dir, upstream, upstream={"max_concurrency": 1}) as bench:
        batch = await bench.create_from(
            b"".join((line("a"), line("b"), line("c", model="other")))
        )
        ended = await bench.wait_until_ended(batch)

    assert ended.counts == Counts(total=3, completed=3, failed=0)
    assert prompts(upstream)[0] == "a"
    assert sorted(prompts(upstream)) == ["a", "a", "b", "c"]
    first, second = (request.at for request in upstream.requests[:2])
    assert second - first >= 0.9


async def test_a_slow_line_delays_nothing_but_its_own_batch(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    go = asyncio.Event()
    upstream.behave = script({"slow": held_back("slow", until=go)})
    options = {"upstream": {"max_concurrency": 2}, "worker": {"slice_requests": 2}}
    async with Bench(data_dir, upstream, **options) as bench:
        delayed = await bench.create("slow", *(f"s{n}" for n in range(9)))
        await upstream.wait_for_requests(1)
        others = [await bench.create(*(f"{b}{n}" for n in range(5))) for b in "xyz"]

        for other in others:
            await bench.wait_until_ended(other)

        await bench.wait_until_counted(delayed, 9)
        go.set()
        assert (await bench.wait_until_ended(delayed)).counts.completed == 10


async def test_no_more_lines_are_in_flight_than_the_upstream_takes(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    def behave(path: str, headers: dict[str, str], body: bytes, nth: int) -> Action:
        is_unlucky = nth == 1 and prompt_of(body).endswith("7")
        return (
            fail(500)
            if is_unlucky
            else Action(pieces=answer(chat_completion("x")).pieces, pause_s=0.002)
        )

    upstream.behave = behave
    options = {"upstream": {"max_concurrency": 5}, "worker": {"slice_requests": 3}}
    async with Bench(data_dir, upstream, **options) as bench:
        batches = [await bench.create(*(f"{b}{n}" for n in range(40))) for b in "abc"]
        for batch in batches:
            assert (await bench.wait_until_ended(batch)).counts.completed == 40

    assert upstream.max_in_flight == 5
    assert Counter(Counter(prompts(upstream)).values()) == {1: 108, 2: 12}


# Results while a batch runs


async def test_results_can_be_read_while_the_batch_runs_in_their_final_words(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    go = asyncio.Event()
    upstream.behave = script({"c": held_back("c", until=go), "b": fail(400)})
    async with Bench(data_dir, upstream, worker={"slice_requests": 2}) as bench:
        batch = await bench.create("a", "b", "c", "d", "e")
        await bench.wait_until_counted(batch, 4)

        so_far = await bench.so_far(batch)

        assert ids(read_lines(so_far)) == ["a", "b", "d", "e"]
        go.set()
        ended = await bench.wait_until_ended(batch)
        assert ended.output_file_id and ended.error_file_id
        final = await bench.content(ended.output_file_id)
        final += await bench.content(ended.error_file_id)
        assert set(so_far.splitlines()) < set(final.splitlines())
        assert await bench.so_far(batch) == final


# Cancel and expire


async def test_a_cancelled_batch_keeps_what_is_in_flight_and_names_the_rest(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    go = asyncio.Event()
    upstream.behave = by_arrival({1: fail(400), 2: answer()}, later=hold(answer(), until=go))
    options = {"upstream": {"max_concurrency": 2}, "worker": {"slice_requests": 3}}
    async with Bench(data_dir, upstream, **options) as bench:
        batch = await bench.create(*"abcdefghi")
        await bench.wait_until_counted(batch, 2)
        await upstream.wait_for_requests(4)

        async def all_are_held() -> bool:
            statuses = {each.status for each in await bench.slices(batch)}
            return statuses == {SliceStatus.RUNNING}

        await until(all_are_held)
        await bench.cancel(batch)
        await bench.cancel(batch)

        async def is_told() -> bool:
            # Four lines are of two slices at most, so the worker lets go of the third one.
            return not await all_are_held()

        await until(is_told)
        go.set()
        ended = await bench.wait_until_ended(batch)
        output, errors = await bench.results(batch)
    refused, *answered = prompts(upstream)
    assert ended.status is BatchStatus.CANCELLED
    assert ended.counts == Counts(total=9, completed=3, failed=1)
    assert len(answered) == 3
    assert ids(output) == sorted(answered)
    assert ids(errors) == sorted({*"abcdefghi"} - {*answered})
    assert {**codes(errors), refused: 400} == codes(errors)
    assert Counter(codes(errors).values()) == {400: 1, "batch_cancelled": 5}


async def test_lines_that_outlive_the_grace_time_of_a_cancel_are_dropped(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    upstream.behave = script({"b": stall(), "d": lambda nth: fail(503)})
    options = {"worker": {"slice_requests": 3, "cancel_grace_s": 0}}
    async with Bench(data_dir, upstream, **options) as bench:
        batch = await bench.create("a", "b", "c", "d", "e")
        await bench.wait_until_counted(batch, 3)

        await bench.cancel(batch)

        ended = await bench.wait_until_ended(batch)
        output, errors = await bench.results(batch)
    assert ended.status is BatchStatus.CANCELLED
    assert ids(output) == ["a", "c", "e"]
    assert codes(errors) == {"b": "batch_cancelled", "d": "batch_cancelled"}


async def test_a_line_that_fails_after_the_cancel_is_not_tried_again(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    go = asyncio.Event()
    busy = fail(503, headers={"Retry-After": "60"})
    upstream.behave = script({"a": hold(busy, until=go)})
    async with Bench(data_dir, upstream, worker={"slice_requests": 1}) as bench:
        batch = await bench.create("a", "b")
        await bench.wait_until_slices_ended(batch, 1)
        await bench.cancel(batch)
        other = await bench.create("c")
        await bench.wait_until_ended(other)
        await bench.cancel(batch)
        go.set()

        ended = await bench.wait_until_ended(batch)

        output, errors = await bench.results(batch)
    assert ended.status is BatchStatus.CANCELLED
    assert ids(output) == ["b"]
    assert codes(errors) == {"a": "batch_cancelled"}
    assert prompts(upstream).count("a") == 1


async def test_a_batch_that_is_cancelled_before_anything_was_sent_has_an_error_file_only(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    go = asyncio.Event()
    upstream.behave = script({"busy": held_back("busy", until=go)})
    async with Bench(data_dir, upstream, upstream={"max_concurrency": 1}) as bench:
        busy = await bench.create("busy")
        await upstream.wait_for_requests(1)
        batch = await bench.create("a", "b")

        async def has_begun() -> bool:
            return (await bench.get(batch)).status is BatchStatus.IN_PROGRESS

        await until(has_begun)
        await bench.cancel(batch)

        ended = await bench.wait_until_ended(batch)
        output, errors = await bench.results(batch)
        assert ended.output_file_id is None
        assert output == []
        assert codes(errors) == {"a": "batch_cancelled", "b": "batch_cancelled"}
        go.set()
        await bench.wait_until_ended(busy)
        after = await bench.create("c")
        await bench.wait_until_ended(after)


async def test_a_batch_whose_window_closes_keeps_what_it_has_and_names_the_rest(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    upstream.behave = by_arrival({1: fail(400), 2: answer()}, later=stall())
    options = {"upstream": {"max_concurrency": 2}, "worker": {"slice_requests": 3}}
    async with Bench(data_dir, upstream, **options) as bench:
        batch = await bench.create(*"abcdefgh", window="2s")

        ended = await bench.wait_until_ended(batch)

        output, errors = await bench.results(batch)
    refused, answered, *stalled = prompts(upstream)
    assert ended.status is BatchStatus.EXPIRED
    assert ended.expired_at is not None
    assert 0 <= ended.expired_at - ended.expires_at <= 2
    assert ended.counts == Counts(total=8, completed=1, failed=1)
    assert len(stalled) == 2
    assert ids(output) == [answered]
    assert ids(errors) == sorted({*"abcdefgh"} - {answered})
    assert codes(errors) == dict.fromkeys(ids(errors), "batch_expired") | {refused: 400}
    messages = {each["error"]["message"] for each in errors if each["error"]}
    assert messages == {
        "This request could not be executed before the completion window expired."
    }


# Damage


def flip_a_byte(path: Path, after: bytes) -> list[str]:
    """Damage the group that holds `after`; the custom IDs from its start to the file's end."""
    data = bytearray(path.read_bytes())
    place = data.index(after)
    data[place + len(after) + 20] ^= 1
    path.write_bytes(data)
    group = data.rindex(b"\x54\x50\x00", 0, place)  # as little-endian numbers: magic, type
    return [found.decode() for found in re.findall(rb'"custom_id":"(\w+)"', data[group:])]


async def test_damage_is_noticed_and_only_what_was_kept_with_it_is_sent_again(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    go = asyncio.Event()
    upstream.behave = script({"f": held_back("f", until=go), "c": fail(400)})
    async with Bench(data_dir, upstream, worker={"slice_requests": 3}) as bench:
        batch = await bench.create("a", "b", "c", "d", "e", "f")
        await bench.wait_until_slices_ended(batch, 0)
        # What was flushed together shares a checksum; what follows it cannot be told from it.
        lost = flip_a_byte(bench.segment(batch, 0), after=b'"custom_id":"b"')
        go.set()

        ended = await bench.wait_until_ended(batch)

        output, errors = await bench.results(batch)
    assert ended.status is BatchStatus.COMPLETED
    assert ended.counts == Counts(total=6, completed=5, failed=1)
    assert ids(output) == ["a", "b", "d", "e", "f"]
    assert ids(errors) == ["c"]
    assert "b" in lost
    assert Counter(prompts(upstream)) == Counter("abcdef") + Counter(lost)
    assert ended.usage.total_tokens == 25


async def test_a_segment_that_is_gone_is_made_anew(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    go = asyncio.Event()
    upstream.behave = script({"d": held_back("d", until=go)})
    async with Bench(data_dir, upstream, worker={"slice_requests": 2}) as bench:
        batch = await bench.create("a", "b", "c", "d")
        await bench.wait_until_slices_ended(batch, 0)
        bench.segment(batch, 0).unlink()
        go.set()

        ended = await bench.wait_until_ended(batch)

        output, _ = await bench.results(batch)
        files = await bench.app.service.list_files(
            bench.app.project_id, after=None, limit=10, purpose=None, newest_first=True
        )
        blobs = [path for path in (data_dir / "blobs" / "files").iterdir() if path.is_file()]
    assert ended.status is BatchStatus.COMPLETED
    assert ids(output) == ["a", "b", "c", "d"]
    assert Counter(prompts(upstream)) == {"a": 2, "b": 2, "c": 1, "d": 1}
    assert [file.purpose for file in files.items] == [Purpose.BATCH_OUTPUT, Purpose.BATCH]
    assert len(blobs) == 2


async def test_a_cancelled_batch_whose_replies_are_damaged_still_ends(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    upstream.behave = script({"d": stall()})
    options = {"worker": {"slice_requests": 2, "cancel_grace_s": 0}}
    async with Bench(data_dir, upstream, **options) as bench:
        batch = await bench.create("a", "b", "c", "d")
        await bench.wait_until_slices_ended(batch, 0)
        await bench.wait_until_counted(batch, 3)
        lost = flip_a_byte(bench.segment(batch, 0), after=b'"custom_id":"b"')
        await bench.cancel(batch)

        async def has_ended() -> bool:
            return (await bench.get(batch)).status is BatchStatus.CANCELLED

        await until(has_ended)
        output, errors = await bench.results(batch)
    assert ids(output) == sorted({*"abc"} - {*lost})
    assert codes(errors) == dict.fromkeys(sorted([*lost, "d"]), "batch_cancelled")


async def test_what_a_late_writer_left_beside_an_ended_slice_is_ignored(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    go = asyncio.Event()
    upstream.behave = script({"d": held_back("d", until=go)})
    async with Bench(data_dir, upstream, worker={"slice_requests": 2}) as bench:
        batch = await bench.create("a", "b", "c", "d")
        await bench.wait_until_slices_ended(batch, 0)
        late = LocalWriter(bench.segment(batch, 0).with_suffix(".000000"))
        for number in (1, 3):
            late.append(number, Kind.OUTPUT, b'{"custom_id":"late"}\n', (0, 0, 0, 0, 0))
        late.prepare()
        late.flush()
        late.close()
        go.set()

        await bench.wait_until_ended(batch)

        output, _ = await bench.results(batch)
    assert ids(output) == ["a", "b", "c", "d"]
    assert Counter(prompts(upstream)) == Counter("abcd")


async def test_result_files_that_cannot_be_finished_are_not_left_behind(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    go = asyncio.Event()
    upstream.behave = script({"b": fail(400), "c": held_back("c", until=go)})
    async with Bench(data_dir, upstream, worker={"slice_requests": 1}) as bench:
        batch = await bench.create("a", "b", "c")
        await bench.wait_until_slices_ended(batch, 0, 1)
        segment = bench.segment(batch, 1)
        kept = segment.read_bytes()
        segment.unlink()
        segment.mkdir()  # a segment that the disk does not give back
        go.set()

        seen: set[str] = set()

        async def was_tried_twice() -> bool:
            blobs = {path.name for path in (data_dir / "blobs" / "files").iterdir()}
            assert len(blobs) <= 3, "result files pile up"
            seen.update(blobs)
            return len(seen) >= 3

        await until(was_tried_twice)
        segment.rmdir()
        segment.write_bytes(kept)
        ended = await bench.wait_until_ended(batch)
        blobs = [path for path in (data_dir / "blobs" / "files").iterdir() if path.is_file()]

    assert ended.counts == Counts(total=3, completed=2, failed=1)
    assert len(blobs) == 3
    assert Counter(prompts(upstream)) == Counter("abc")


# Restart


async def stop(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait([task])


async def test_a_restart_goes_on_and_sends_only_what_is_missing(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    names = [f"line-{n}" for n in range(12)]
    upstream.behave = by_arrival({2: stall(), 7: stall()}, later=answer())
    options = {"upstream": {"max_concurrency": 2}, "worker": {"slice_requests": 4}}
    created = asyncio.get_running_loop().create_future()

    async def work() -> None:
        async with Bench(data_dir, upstream, **options) as bench:
            batch = await bench.create(*names)
            await bench.wait_until_counted(batch, 5)
            await upstream.wait_for_requests(7)
            created.set_result(batch)
            await asyncio.Event().wait()

    working = asyncio.create_task(work())
    batch = await created
    await stop(working)
    sent_before = prompts(upstream)
    upstream.behave = script({})
    async with Bench(data_dir, upstream, **options) as bench:
        assert (await bench.get(batch)).counts.completed >= 5
        ended = await bench.wait_until_ended(batch)
        output, _ = await bench.results(batch)

    assert len(sent_before) == 7
    stalled = {sent_before[1], sent_before[6]}
    assert ended.counts == Counts(total=12, completed=12, failed=0)
    assert ids(output) == names
    sent = Counter(prompts(upstream))
    assert {name for name, times in sent.items() if times > 1} == stalled
    assert set(sent.values()) == {1, 2}


async def test_a_batch_that_was_never_read_is_read_after_a_restart(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    bench = Bench(data_dir, upstream)
    async with bench:
        project_id = bench.app.project_id
        store = bench.store
        service = Service(
            store=store,  # whose jobs go nowhere, as if the process had died
            blobs=FolderBlobs(data_dir / "blobs"),
            partial=None,  # pyright: ignore[reportArgumentType]
            upstreams=Routes([]),
            limits=ServiceLimits(),
        )
        file = await service.create_file(project_id, Upload(line("a")))
        batch = await service.create_batch(project_id, input_file_id=file.id, endpoint=CHAT)
        assert (await bench.get(batch)).status is BatchStatus.VALIDATING

    async with Bench(data_dir, upstream) as bench:
        ended = await bench.wait_until_ended(batch)

    assert ended.status is BatchStatus.COMPLETED


async def test_a_batch_whose_window_closed_while_nobody_worked_expires_at_the_start(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    upstream.behave = script({"b": stall()})
    async with Bench(data_dir, upstream) as bench:
        batch = await bench.create("a", "b", window="1s")
        await bench.wait_until_counted(batch, 1)

    async def is_late() -> bool:
        return asyncio.get_running_loop().time() >= late_at

    late_at = asyncio.get_running_loop().time() + 1.1
    await until(is_late)
    async with Bench(data_dir, upstream) as bench:
        ended = await bench.wait_until_ended(batch)
        output, errors = await bench.results(batch)

    assert ended.status is BatchStatus.EXPIRED
    assert ids(output) == ["a"]
    assert codes(errors) == {"b": "batch_expired"}
    assert prompts(upstream).count("b") == 1


async def test_a_cancel_that_was_cut_off_is_ended_at_the_start(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    upstream.behave = script({"b": stall()})
    async with Bench(data_dir, upstream, worker={"cancel_grace_s": 600}) as bench:
        batch = await bench.create("a", "b")
        await bench.wait_until_counted(batch, 1)
        await bench.cancel(batch)

    async with Bench(data_dir, upstream) as bench:
        ended = await bench.wait_until_ended(batch)
        output, errors = await bench.results(batch)

    assert ended.status is BatchStatus.CANCELLED
    assert ids(output) == ["a"]
    assert codes(errors) == {"b": "batch_cancelled"}


async def test_bytes_that_nothing_names_are_gone_after_a_restart(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    async with Bench(data_dir, upstream) as bench:
        batch = await bench.create("a")
        await bench.wait_until_ended(batch)
    blobs = data_dir / "blobs" / "files"
    named = {path.name for path in blobs.iterdir()}
    (blobs / "file-cut-off").write_bytes(b"{")
    (blobs / "file-cut-off#1").write_bytes(b"{")
    (data_dir / "segments" / "batch-gone").mkdir()

    async with Bench(data_dir, upstream) as bench:
        await bench.results(batch)

    assert {path.name for path in blobs.iterdir()} == named
    assert list((data_dir / "segments").iterdir()) == []


async def test_a_line_whose_model_lost_its_upstream_fails_and_the_batch_goes_on(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    upstream.behave = script({"a": stall(), "b": stall()})
    async with Bench(data_dir, upstream) as bench:
        batch = await bench.create_from(line("a", model="old") + line("b", model="new"))
        await upstream.wait_for_requests(2)

    upstream.behave = script({})
    async with Bench(data_dir, upstream, upstream={"models": ["new"]}) as bench:
        await bench.wait_until_ended(batch)
        output, errors = await bench.results(batch)

    assert ids(output) == ["b"]
    assert codes(errors) == {"a": "upstream_unreachable"}


async def test_a_data_directory_belongs_to_one_process(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    async with Bench(data_dir, upstream):
        with pytest.raises(DataDirInUse):
            async with Bench(data_dir, upstream):
                pass


# Files


async def test_a_batch_outlives_its_input_file(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    go = asyncio.Event()
    upstream.behave = script({"a": held_back("a", until=go)})
    options = {"upstream": {"max_concurrency": 1}, "worker": {"slice_requests": 1}}
    async with Bench(data_dir, upstream, **options) as bench:
        batch = await bench.create("a", "b", "c")
        await upstream.wait_for_requests(1)
        await bench.app.service.delete_file(bench.app.project_id, batch.input_file_id)
        with pytest.raises(NotFound):
            await bench.app.service.get_file(bench.app.project_id, batch.input_file_id)
        go.set()

        ended = await bench.wait_until_ended(batch)

        output, _ = await bench.results(batch)

        async def only_the_output_is_left() -> bool:
            left = [path.name for path in (data_dir / "blobs" / "files").iterdir()]
            return left == [ended.output_file_id]

        await until(only_the_output_is_left)
    assert ids(output) == ["a", "b", "c"]


async def test_files_whose_time_is_over_are_deleted(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    async with Bench(data_dir, upstream) as bench:
        project_id = bench.app.project_id
        kept = await bench.app.service.create_file(project_id, Upload(line("a")))
        gone = File(
            id=FileId("file-old"),
            project_id=project_id,
            purpose=Purpose.BATCH,
            filename="old.jsonl",
            bytes=1,
            sha256="",
            blob_key="files/file-old",
            created_at=1,
            expires_at=2,
        )
        await bench.store.add_file(gone)
        (data_dir / "blobs" / "files" / "file-old").write_bytes(b"x")

    async with Bench(data_dir, upstream):

        async def is_gone() -> bool:
            left = [path.name for path in (data_dir / "blobs" / "files").iterdir()]
            return left == [kept.id]

        await until(is_gone)


# A full disk


async def test_a_full_disk_stops_the_sending_and_room_lets_it_go_on(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    names = [f"line-{n}" for n in range(60)]
    go = asyncio.Event()
    slow = Action(pieces=answer(chat_completion("x" * 2000)).pieces, pause_s=0.05, until=go)
    upstream.behave = script(dict.fromkeys(names, slow))
    options = {
        "upstream": {"max_concurrency": 2},
        "worker": {"slice_requests": 60, "flush_bytes": 1},
    }
    with small_disk(tmp_path, bytes=8 << 20) as disk:
        async with Bench(disk.path / "data", upstream, **options) as bench:
            batch = await bench.create(*names)
            await upstream.wait_for_requests(2)
            disk.fill()
            go.set()

            async def is_noticed() -> bool:
                return "storage" in bench.app.health.faults()

            async def is_still() -> bool:
                return upstream.in_flight == 0

            await until(is_noticed)
            await until(is_still)
            sent = len(upstream.requests)
            assert sent < 30
            assert "full" in bench.app.health.faults()["storage"]
            assert (await bench.get(batch)).counts.completed < 5

            disk.make_room()
            ended = await bench.wait_until_ended(batch)

            output, errors = await bench.results(batch)
            assert bench.app.health.faults() == {}
    assert ended.counts == Counts(total=60, completed=60, failed=0)
    assert ids(output) == names
    assert errors == []
    assert Counter(prompts(upstream)) == Counter(names)


async def test_a_batch_does_not_end_before_its_replies_are_on_the_disk(
    tmp_path: Path, data_dir: Path, upstream: ScriptedUpstream
) -> None:
    with small_disk(tmp_path, bytes=1 << 20) as disk:
        data_dir.mkdir()
        (disk.path / "segments").mkdir()
        (data_dir / "segments").symlink_to(disk.path / "segments")
        disk.fill()
        async with Bench(data_dir, upstream) as bench:
            batch = await bench.create("a", "b")

            async def is_noticed() -> bool:
                return "storage" in bench.app.health.faults()

            await until(is_noticed)
            disk.make_room()
            ended = await bench.wait_until_ended(batch)

            output, _ = await bench.results(batch)
            assert bench.app.health.faults() == {}
    assert ended.status is BatchStatus.COMPLETED
    assert ids(output) == ["a", "b"]
    assert Counter(prompts(upstream)) == Counter("ab")


async def test_result_files_wait_for_room_on_a_full_disk(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    go = asyncio.Event()
    upstream.behave = script({"b": held_back("b", until=go)})
    with small_disk(tmp_path, bytes=8 << 20) as disk:
        async with Bench(disk.path / "data", upstream) as bench:
            big = answer(chat_completion("x" * 100_000))
            upstream.behave = script({"a": big, "b": held_back("b", until=go)})
            batch = await bench.create("a", "b")
            await bench.wait_until_counted(batch, 1)
            disk.fill(leave=60_000)
            go.set()

            async def is_tried() -> bool:
                return (await bench.get(batch)).status is BatchStatus.FINALIZING

            await until(is_tried)
            disk.make_room()
            ended = await bench.wait_until_ended(batch)
            output, _ = await bench.results(batch)
            listed = await bench.app.service.list_batches(
                bench.app.project_id, after=None, limit=10, where=BatchFilter()
            )
            left = list((disk.path / "data" / "blobs" / "files").iterdir())

    assert ended.status is BatchStatus.COMPLETED
    assert [each.id for each in listed.items] == [batch.id]
    assert ids(output) == ["a", "b"]
    assert len(left) == 2
    assert Counter(prompts(upstream)) == Counter("ab")


async def test_slices_are_numbered_once_and_run_once(
    data_dir: Path, upstream: ScriptedUpstream
) -> None:
    go = asyncio.Event()
    upstream.behave = script({"f": held_back("f", until=go)})
    async with Bench(data_dir, upstream, worker={"slice_requests": 2}) as bench:
        batch = await bench.create("a", "b", "c", "d", "e", "f")
        await bench.wait_until_slices_ended(batch, 0, 1)

        slices = await bench.slices(batch)

        assert [each.index for each in slices] == [0, 1, 2]
        assert [each.attempt for each in slices] == [1, 1, 1]
        assert slices[2].status is SliceStatus.RUNNING
        go.set()
        await bench.wait_until_ended(batch)
