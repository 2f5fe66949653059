"""What a line costs in each part of the way, measured apart, each in a loop of its own.

    python -m benchmarks.parts            20 rounds; the fastest of each part counts
    python -m benchmarks.parts --smoke    2 rounds

Lines of 1 KB in slices of 1,000, 256 at a time. On the whole way each part costs more than
here: what it needs is not in the processor's caches then.
"""

import argparse
import asyncio
import json
import os
import time
import urllib.request

import uvloop

from benchmarks import harness
from penstock.blobs.local_segments import LocalSegments
from penstock.blobs.segments import SegmentWriter
from penstock.executor.admission import Admission, AdmissionPolicy
from penstock.executor.keeper import Keeper
from penstock.executor.lanes import Lane, Queued
from penstock.executor.limits import ConcurrencyPolicy
from penstock.executor.order import by_prefix
from penstock.executor.waiting import Waiting
from penstock.executor.worker import HeldSlice
from penstock.model import BatchId, ProjectId, Slice
from penstock.request_lines import iter_requests
from penstock.store.base import ClaimedSlice
from penstock.telemetry import Health, Metrics, UpstreamStats
from penstock.upstream.base import EngineLoad, Reply
from penstock.upstream.http1 import Http1Transport
from penstock.upstream.openai_http import read_success
from penstock.upstream.transport import TransportOptions

_LINES = 1000
_IN_FLIGHT = 256
_PATH = "/v1/chat/completions"


class _AtOnce:
    """An upstream that has answered before it is asked: reading the answer is all it costs."""

    name = "at-once"
    max_concurrency = _IN_FLIGHT

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    async def send(self, endpoint: str, body: bytes) -> Reply:
        del endpoint, body
        reply = read_success(200, self._answer, "req-1")
        assert reply is not None
        return reply

    async def list_models(self) -> list[str]:
        return []

    async def read_load(self) -> EngineLoad | None:
        return None

    async def close(self) -> None:
        pass


class _Bench:
    """One round after another over the same lines; the fastest counts.

    Args:
        data: The bytes of a slice.
        upstream: Answers for real, on the other core.
        answer: What it answers.
        segments: Where replies would be kept; none is written.
    """

    def __init__(
        self, data: bytes, upstream: harness.Process, answer: bytes, segments: LocalSegments
    ) -> None:
        self._data = data
        gate = asyncio.Event()
        gate.set()
        health = Health()
        self._metrics = Metrics(health)
        self._keeper = Keeper(
            segments=segments,
            gate=gate,
            health=health,
            stats=self._metrics.work,
            flush_interval_s=1,
            flush_bytes=1 << 30,
        )
        policy = AdmissionPolicy(
            concurrency=ConcurrencyPolicy(most=_IN_FLIGHT, initial=_IN_FLIGHT)
        )
        self._tasks = asyncio.TaskGroup()
        self._lane = Lane(
            [Admission(_AtOnce(answer), policy)],
            [UpstreamStats()],
            gate=gate,
            spawn=self._tasks.create_task,
            wants_more=lambda: None,
            waiting=Waiting[Queued](low_water=512, held_bytes=8 << 20),
        )
        self._transport = Http1Transport(
            host="127.0.0.1",
            port=upstream.port,
            options=TransportOptions(
                headers={"Content-Type": "application/json"},
                timeout_s=60,
                connect_timeout_s=10,
                max_body_bytes=1 << 20,
                max_idle=_IN_FLIGHT,
            ),
        )
        self._best_s: dict[str, float] = {}

    async def run(self, rounds: int) -> dict[str, float]:
        """Microseconds a line, by part."""
        async with self._tasks:
            for _ in range(rounds):
                await self._take_round()
        await self._transport.close()
        return {part: round(s / _LINES * 1e6, 2) for part, s in self._best_s.items()}

    async def _take_round(self) -> None:
        began = time.perf_counter()
        lines = list(iter_requests(self._data, first_line=1))
        began = self._note("reading a slice's lines again", began)
        lines = by_prefix(lines)
        began = self._note("bringing the same prompts together", began)
        await self._exchange([line.body for line in lines])
        self._note("the HTTP exchange, with its system calls", began)
        held = self._hold()
        began = time.perf_counter()
        self._lane.put(held, lines)
        await held.done.wait()
        began = self._note("lanes, admission, limits, usage, the reply's line", began)
        held.writer.prepare()
        held.writer.keep(len(held.writer.encode()))
        self._note("packing a segment", began)

    def _note(self, part: str, began: float) -> float:
        now = time.perf_counter()
        self._best_s[part] = min(self._best_s.get(part, float("inf")), now - began)
        return now

    def _hold(self) -> HeldSlice:
        claimed = ClaimedSlice(
            slice=Slice(
                batch_id=BatchId("batch_1"),
                index=0,
                start=0,
                end=len(self._data),
                first_line=1,
                requests=_LINES,
                models=("sim",),
            ),
            endpoint=_PATH,
            expires_at=int(time.time()) + 86_400,
            project_id=ProjectId("project"),
            weight=1,
            is_background=False,
            input_blob_key="input",
        )
        held = HeldSlice(claimed, self._keeper, self._metrics)
        held.writer = SegmentWriter(_LINES)
        held.begin(_LINES)
        return held

    async def _exchange(self, bodies: list[bytes]) -> None:
        rest = iter(bodies)

        async def send() -> None:
            for body in rest:
                await self._transport.post(_PATH, body)

        await asyncio.gather(*(send() for _ in range(_IN_FLIGHT)))


async def measure(rounds: int) -> dict[str, float]:
    with harness.workspace() as space, harness.upstream() as upstream:
        source = space / "in.jsonl"
        harness.write_input(source, _LINES, 1024)
        data = source.read_bytes()
        request = urllib.request.Request(
            f"{upstream.url}{_PATH}", next(iter_requests(data, first_line=1)).body
        )
        with urllib.request.urlopen(request) as response:
            answer = response.read()
        segments = LocalSegments(space / "segments")
        return await _Bench(data, upstream, answer, segments).run(rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    os.sched_setaffinity(0, harness.WORK_CORE)
    found = uvloop.run(measure(2 if options.smoke else 20))
    for part, microseconds in found.items():
        print(json.dumps({"part": part, "us_a_line": microseconds}))


if __name__ == "__main__":
    main()
