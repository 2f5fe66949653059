"""What a batch does to people who use the same engine, and how much of it the batch gets.

    python -m benchmarks.interactive            about five minutes
    python -m benchmarks.interactive --smoke    one engine, 15 s

The engine is the simulator's: 64 slots, steps of 20 ms and 0.05 ms more for each request, and
replies of 50 to 150 tokens. Interactive requests come by chance, 30 % of what it can do. Their
95th percentile is taken without a batch and with one, beside the tokens that the batch got of
those that were to spare. `fixed` is a batch that keeps as many in flight as the settings allow.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass

import uvloop

from benchmarks import harness
from penstock.upstream.http1 import Http1Transport
from penstock.upstream.transport import TransportOptions

_SLOTS = 64
_STEP_MS, _STEP_MS_PER_REQUEST = 20.0, 0.05
_TOKENS = 100
_SHARE = 0.3
_MAX_CONCURRENCY = 4 * _SLOTS
_CAPACITY = _SLOTS / ((_STEP_MS + _SLOTS * _STEP_MS_PER_REQUEST) / 1000)
"""Tokens a second with all slots taken, without prompts."""


@dataclass(slots=True)
class Heard:
    """What interactive users saw."""

    latencies_s: list[float]
    taken_s: float
    tokens_per_s: float

    @property
    def p95_s(self) -> float:
        return statistics.quantiles(self.latencies_s, n=20)[-1]


@contextlib.contextmanager
def engine(metrics: str) -> Generator[harness.Process]:
    port = harness.free_port()
    command = [sys.executable, "-m", "penstock", "simulate", "--port", str(port)]
    command += ["--engine-slots", str(_SLOTS), "--step-ms", str(_STEP_MS)]
    command += ["--step-ms-per-request", str(_STEP_MS_PER_REQUEST)]
    command += ["--tokens", str(_TOKENS), "--token-spread", "0.5", "--metrics", metrics]
    popen = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        os.sched_setaffinity(popen.pid, harness.OTHER_CORE)
        assert popen.stdout is not None
        popen.stdout.readline()
        yield harness.Process(popen, port)
    finally:
        popen.kill()
        popen.communicate()


async def converse(port: int, seconds: float, *, seed: int = 1) -> Heard:
    """Send requests as they come by chance, and wait for all replies."""
    rate = _SHARE * _CAPACITY / _TOKENS
    chance = random.Random(seed)
    latencies: list[float] = []
    tokens = 0
    transport = _transport(port)

    async def ask(number: int) -> None:
        nonlocal tokens
        body = {"model": "m", "messages": [{"role": "user", "content": f"Question {number}?"}]}
        began = time.perf_counter()
        answer = await transport.post("/v1/chat/completions", json.dumps(body).encode())
        latencies.append(time.perf_counter() - began)
        assert answer.status == 200
        found = re.search(rb'"completion_tokens":([0-9]+)', answer.body)
        assert found
        tokens += int(found[1])

    begins = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        end, number = begins + seconds, 0
        while time.perf_counter() < end:
            tasks.create_task(ask(seed * 1_000_000 + number))
            number += 1
            await asyncio.sleep(chance.expovariate(rate))
    await transport.close()
    taken_s = time.perf_counter() - begins
    return Heard(latencies, taken_s, tokens / taken_s)


async def fixed_load(port: int, seconds: float) -> None:
    """A batch without any control."""
    transport = _transport(port)
    end = time.perf_counter() + seconds

    async def ask_on(number: int) -> None:
        while time.perf_counter() < end:
            content = f"Task {number} {random.random()}"
            body = {"model": "m", "messages": [{"role": "user", "content": content}]}
            await transport.post("/v1/chat/completions", json.dumps(body).encode())

    tasks = [asyncio.create_task(ask_on(number)) for number in range(_MAX_CONCURRENCY)]
    await asyncio.wait(tasks, timeout=seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await transport.close()


def _transport(port: int) -> Http1Transport:
    options = TransportOptions(
        headers={"Content-Type": "application/json"},
        timeout_s=300,
        connect_timeout_s=10,
        max_body_bytes=1 << 20,
        max_idle=1000,
    )
    return Http1Transport(host="127.0.0.1", port=port, options=options)


def row(name: str, alone: Heard, beside: Heard, batch_tokens_per_s: float) -> None:
    spare = _CAPACITY - beside.tokens_per_s
    print(
        json.dumps(
            {
                "batch": name,
                "interactive_p95_alone_s": round(alone.p95_s, 2),
                "interactive_p95_s": round(beside.p95_s, 2),
                "times": round(beside.p95_s / alone.p95_s, 2),
                "spare_tokens_per_s": round(spare),
                "batch_tokens_per_s": round(batch_tokens_per_s),
                "share_of_spare": round(batch_tokens_per_s / spare, 3),
            }
        ),
        flush=True,
    )


def beside_penstock(metrics: str, ramp_s: float, seconds: float) -> tuple[Heard, float]:
    """Interactive users beside a batch of ours."""
    settings = {"PENSTOCK_UPSTREAMS__0__MAX_CONCURRENCY": str(_MAX_CONCURRENCY)}
    with harness.workspace() as space, engine(metrics) as process:
        source = space / "in.jsonl"
        harness.write_input(source, int((ramp_s + seconds) * _CAPACITY / _TOKENS) + 500, 400)
        with harness.server(space / "data", process.url, settings=settings) as server:
            client = harness.Client(server)
            client.create(client.upload(source))
            time.sleep(ramp_s)
            before = _output_tokens(server)
            heard = uvloop.run(converse(process.port, seconds))
            return heard, (_output_tokens(server) - before) / heard.taken_s


def _output_tokens(server: harness.Process) -> float:
    text = harness.get(f"{server.url}/metrics").decode()
    found = re.search(r'upstream_tokens_total\{kind="output",upstream="upstream"\} (\S+)', text)
    return float(found[1]) if found else 0.0


async def _beside_fixed(port: int, ramp_s: float, seconds: float) -> tuple[Heard, float]:
    load = asyncio.create_task(fixed_load(port, ramp_s + seconds))
    await asyncio.sleep(ramp_s)
    heard = await converse(port, seconds)
    await load
    return heard, _CAPACITY - heard.tokens_per_s  # it leaves nothing to spare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    ramp_s, seconds = (3.0, 12.0) if options.smoke else (15.0, 45.0)
    with engine("none") as process:
        alone = uvloop.run(converse(process.port, seconds))
    for metrics in ("vllm",) if options.smoke else ("vllm", "sglang", "none"):
        longer_s = 4 * ramp_s if metrics == "none" else ramp_s
        row(f"penstock, metrics {metrics}", alone, *beside_penstock(metrics, longer_s, seconds))
    if not options.smoke:
        with engine("none") as process:
            row("fixed", alone, *uvloop.run(_beside_fixed(process.port, ramp_s, seconds)))


if __name__ == "__main__":
    main()
