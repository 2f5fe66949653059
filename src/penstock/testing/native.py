"""The promises of `BatchUpstream`, one test each."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

import pytest
from msgspec.structs import replace

from penstock.errors import JobNotTaken, JobRefused, UpstreamDown
from penstock.upstream.base import (
    BatchUpstream,
    Details,
    Lack,
    NativeJob,
    NativeLine,
    NativeResult,
    NativeState,
    NativeStatus,
    Reply,
)

CHAT = "/v1/chat/completions"
KEY = "sk-contract-0123456789"
"""The key that the upstreams under test are to be given."""
PATIENCE_S = 20.0


class FarBatches(Protocol):
    """The provider to which the upstream under test speaks, played by a test."""

    @property
    def native_ids(self) -> Sequence[str]:
        """The jobs that it has taken, and that are paid, in order."""
        ...

    def custom_ids(self, native_id: str) -> Sequence[str]:
        """The names of a job's lines, in order."""
        ...

    def lose_answer(self) -> None:
        """Take the next job, and let the answer to that get lost."""
        ...

    def answer_submissions(self, status: int) -> None:
        """Answer the next call by which a job is taken with this HTTP status, and take none."""
        ...

    def go_down(self) -> None:
        """From now on, answer every call with 503."""
        ...

    def end(
        self,
        native_id: str,
        state: NativeState,
        *,
        texts: Mapping[str, str],
        statuses: Mapping[str, int],
    ) -> None:
        """Let a job end.

        Args:
            texts: What the model says to each line that succeeds, by custom ID.
            statuses: The HTTP status that each line fails with, by custom ID. Lines in
                neither were not run, which the provider says in its own way or not at all.
        """
        ...

    def cut_results(self) -> None:
        """Break off the next answer with results in its middle."""
        ...


def body_of(prompt: str, model: str) -> bytes:
    messages = [{"role": "user", "content": prompt}]
    return json.dumps({"model": model, "messages": messages, "max_tokens": 9}).encode()


async def nobody_notes(details: Details) -> None:
    """A `Note` for tests that do not look at it."""


class BatchUpstreamContract:
    """Inherit, and give two fixtures.

    - `far_side`: a `FarBatches` without a job.
    - `upstream`: the upstream under test, which speaks to `far_side` with `KEY`, and whose
      `find_after_s` is a fraction of a second.

    `model` names a model that it takes, `lines` how many lines a job has.
    """

    model = "m"
    lines = 5

    def job(self, upstream: BatchUpstream, key: str = "nat-0123456789-1") -> NativeJob:
        return NativeJob(
            key=key,
            display_name="Reviews of \u00e9t\u00e9",
            endpoint=CHAT,
            model=self.model,
            requests=self.lines,
            expires_at=time.time() + 86400,
            metadata={"team": "search"},
        )

    def records(self, upstream: BatchUpstream, job: NativeJob) -> list[bytes]:
        records: list[bytes] = []
        for number in range(1, self.lines + 1):
            line = NativeLine(
                custom_id=f"l{number}", body=body_of(f"prompt {number}", self.model)
            )
            record = upstream.encode(job, line)
            assert isinstance(record, bytes)
            records.append(record)
        return records

    async def submit(
        self, upstream: BatchUpstream, job: NativeJob, noted: list[Details] | None = None
    ) -> str:
        records = self.records(upstream, job)
        size = sum(len(record) + 1 for record in records)

        async def stream() -> AsyncIterator[bytes]:
            for record in records:
                yield record

        async def note(details: Details) -> None:
            if noted is not None:
                noted.append(dict(details))

        measured = replace(job, requests=len(records), bytes=size)
        return await upstream.submit(measured, stream(), note)

    async def end(
        self,
        far_side: FarBatches,
        upstream: BatchUpstream,
        *,
        state: NativeState = NativeState.ENDED,
        texts: Mapping[str, str] | None = None,
        statuses: Mapping[str, int] | None = None,
    ) -> tuple[NativeJob, str, NativeStatus]:
        """A job that has ended, and how it stands."""
        job = self.job(upstream)
        native_id = await self.submit(upstream, job)
        everything = {f"l{n}": f"answer {n}" for n in range(1, self.lines + 1)}
        far_side.end(
            native_id,
            state,
            texts=everything if texts is None else texts,
            statuses=statuses or {},
        )
        return job, native_id, await upstream.check(job, native_id)

    @staticmethod
    async def collect(
        upstream: BatchUpstream, job: NativeJob, native_id: str, status: NativeStatus
    ) -> dict[str, NativeResult]:
        found: dict[str, NativeResult] = {}
        async for result in upstream.results(job, native_id, status):
            assert (result.reply is None) != (result.lack is None)
            found[result.custom_id] = result
        return found

    async def test_encoding_a_line_twice_gives_the_same(self, upstream: BatchUpstream) -> None:
        job = self.job(upstream)

        assert self.records(upstream, job) == self.records(upstream, job)
        assert all(b"\n" not in record for record in self.records(upstream, job))

    async def test_a_job_is_taken_with_all_its_lines(
        self, far_side: FarBatches, upstream: BatchUpstream
    ) -> None:
        native_id = await self.submit(upstream, self.job(upstream))

        assert list(far_side.native_ids) == [native_id]
        names = [f"l{n}" for n in range(1, self.lines + 1)]
        assert sorted(far_side.custom_ids(native_id)) == sorted(names)

    async def test_a_job_is_found_by_its_key_and_by_no_other(
        self, far_side: FarBatches, upstream: BatchUpstream
    ) -> None:
        began = time.time()
        first, second = (self.job(upstream, f"nat-0123456789-{n}") for n in (1, 2))
        noted: list[Details] = []
        first_id = await self.submit(upstream, first, noted)
        after_first = dict(noted[-1]) if noted else {}
        second_id = await self.submit(upstream, second, noted)
        after_second = dict(noted[-1]) if noted else {}

        assert await upstream.find(first, after_first, since=began) == first_id
        assert await upstream.find(second, after_second, since=began) == second_id
        third = self.job(upstream, "nat-0123456789-3")
        assert await upstream.find(third, {}, since=began) is None
        assert len(far_side.native_ids) == 2

    async def test_a_job_whose_answer_was_lost_is_found(
        self, far_side: FarBatches, upstream: BatchUpstream
    ) -> None:
        began, job, noted = time.time(), self.job(upstream), list[Details]()
        far_side.lose_answer()

        with pytest.raises(UpstreamDown):
            await self.submit(upstream, job, noted)

        await asyncio.sleep(upstream.find_after_s)
        found = await upstream.find(job, noted[-1] if noted else {}, since=began)
        assert [found] == list(far_side.native_ids)

    async def test_what_finds_a_job_is_noted_before_it_is_taken(
        self, far_side: FarBatches, upstream: BatchUpstream
    ) -> None:
        job = self.job(upstream)
        records = self.records(upstream, job)

        async def stream() -> AsyncIterator[bytes]:
            for record in records:
                yield record

        async def note(details: Details) -> None:
            assert not far_side.native_ids
            raise ZeroDivisionError

        size = sum(len(record) + 1 for record in records)
        measured = replace(job, requests=len(records), bytes=size)
        try:
            await upstream.submit(measured, stream(), note)
        except ZeroDivisionError:
            assert not far_side.native_ids  # what a note raises comes out, and ends it

    @pytest.mark.parametrize(
        ("status", "error"), [(429, JobNotTaken), (400, JobRefused), (403, JobRefused)]
    )
    async def test_a_job_that_was_not_taken_can_be_told_from_one_that_may_be(
        self,
        status: int,
        error: type[Exception],
        far_side: FarBatches,
        upstream: BatchUpstream,
    ) -> None:
        far_side.answer_submissions(status)

        with pytest.raises(error):
            await self.submit(upstream, self.job(upstream))

        assert not far_side.native_ids
        await self.submit(upstream, self.job(upstream))
        assert len(far_side.native_ids) == 1

    async def test_a_server_error_leaves_open_whether_a_job_was_taken(
        self, far_side: FarBatches, upstream: BatchUpstream
    ) -> None:
        began, job, noted = time.time(), self.job(upstream), list[Details]()
        far_side.answer_submissions(500)

        with pytest.raises((UpstreamDown, JobNotTaken)):
            await self.submit(upstream, job, noted)

        await asyncio.sleep(upstream.find_after_s)
        assert await upstream.find(job, noted[-1] if noted else {}, since=began) is None

    async def test_a_job_is_not_final_until_it_has_ended(
        self, far_side: FarBatches, upstream: BatchUpstream
    ) -> None:
        job = self.job(upstream)
        native_id = await self.submit(upstream, job)

        before = await upstream.check(job, native_id)
        far_side.end(native_id, NativeState.ENDED, texts={"l1": "Yes."}, statuses={})

        assert not before.is_final
        assert (await upstream.check(job, native_id)).state is NativeState.ENDED

    async def test_each_answer_comes_in_openais_form(
        self, far_side: FarBatches, upstream: BatchUpstream
    ) -> None:
        job, native_id, status = await self.end(far_side, upstream)

        found = await self.collect(upstream, job, native_id, status)

        assert sorted(found) == sorted(f"l{n}" for n in range(1, self.lines + 1))
        for number in range(1, self.lines + 1):
            reply = found[f"l{number}"].reply
            assert reply is not None
            assert reply.is_success
            message = json.loads(reply.body)["choices"][0]["message"]
            assert message["content"] == f"answer {number}"
            assert reply.total_tokens > 0

    async def test_a_line_that_failed_has_its_status(
        self, far_side: FarBatches, upstream: BatchUpstream
    ) -> None:
        job, native_id, status = await self.end(
            far_side, upstream, texts={"l1": "Yes."}, statuses={"l2": 400}
        )

        found = await self.collect(upstream, job, native_id, status)

        assert found["l1"].reply is not None
        assert found["l1"].reply.is_success
        failed = found["l2"].reply
        assert isinstance(failed, Reply)
        assert not failed.is_success

    @pytest.mark.parametrize("state", [NativeState.EXPIRED, NativeState.CANCELLED])
    async def test_lines_that_were_run_have_results_when_others_were_not(
        self, state: NativeState, far_side: FarBatches, upstream: BatchUpstream
    ) -> None:
        job, native_id, status = await self.end(
            far_side, upstream, state=state, texts={"l1": "Yes."}
        )

        found = await self.collect(upstream, job, native_id, status)

        assert status.is_final
        assert found["l1"].reply is not None
        for name, result in found.items():
            if name != "l1":
                assert result.lack in (Lack.EXPIRED, Lack.CANCELLED, Lack.LOST)

    async def test_results_that_were_cut_off_are_not_taken_for_all(
        self, far_side: FarBatches, upstream: BatchUpstream
    ) -> None:
        job, native_id, status = await self.end(far_side, upstream)
        far_side.cut_results()

        with pytest.raises(UpstreamDown):
            await self.collect(upstream, job, native_id, status)

        found = await self.collect(upstream, job, native_id, status)
        assert len(found) == self.lines

    async def test_a_cancelled_job_comes_to_an_end(
        self, far_side: FarBatches, upstream: BatchUpstream
    ) -> None:
        job = self.job(upstream)
        native_id = await self.submit(upstream, job)

        await upstream.cancel(job, native_id)

        async with asyncio.timeout(PATIENCE_S):
            status = await upstream.check(job, native_id)
            while not status.is_final:
                await asyncio.sleep(0.02)
                status = await upstream.check(job, native_id)
        assert status.state in (NativeState.CANCELLED, NativeState.ENDED)

    async def test_cancelling_a_job_that_has_ended_does_nothing(
        self, far_side: FarBatches, upstream: BatchUpstream
    ) -> None:
        job, native_id, _ = await self.end(far_side, upstream)

        await upstream.cancel(job, native_id)

        assert (await upstream.check(job, native_id)).state is NativeState.ENDED

    async def test_a_job_that_the_provider_does_not_know_is_refused(
        self, far_side: FarBatches, upstream: BatchUpstream
    ) -> None:
        job = self.job(upstream)
        native_id = await self.submit(upstream, job)

        with pytest.raises(JobRefused):
            await upstream.check(job, native_id[:-4] + "0000")

    async def test_a_provider_that_is_down_says_nothing_of_a_job(
        self, far_side: FarBatches, upstream: BatchUpstream
    ) -> None:
        began, job, noted = time.time(), self.job(upstream), list[Details]()
        native_id = await self.submit(upstream, job, noted)
        far_side.go_down()

        with pytest.raises(UpstreamDown):
            await upstream.check(job, native_id)
        with pytest.raises(UpstreamDown):
            await upstream.find(job, noted[-1] if noted else {}, since=began)
        with pytest.raises(UpstreamDown):
            await upstream.cancel(job, native_id)

    async def test_cleaning_up_twice_is_no_error(
        self, far_side: FarBatches, upstream: BatchUpstream
    ) -> None:
        noted: list[Details] = []
        job = self.job(upstream)
        native_id = await self.submit(upstream, job, noted)
        far_side.end(native_id, NativeState.ENDED, texts={"l1": "Yes."}, statuses={})
        status = await upstream.check(job, native_id)
        details = {**(noted[-1] if noted else {}), **status.details}

        await upstream.clean_up(job, details)
        await upstream.clean_up(job, details)

    async def test_no_message_holds_the_key(
        self, far_side: FarBatches, upstream: BatchUpstream
    ) -> None:
        far_side.answer_submissions(401)

        with pytest.raises((JobRefused, JobNotTaken)) as caught:
            await self.submit(upstream, self.job(upstream))

        assert KEY not in str(caught.value)

    async def test_closing_twice_does_nothing_more(self, upstream: BatchUpstream) -> None:
        await upstream.close()
        await upstream.close()
