"""How fast the whole service is beside a bare loop that keeps nothing.

    python -m benchmarks.throughput            10,000 and 50,000 lines of 1 KB, three rounds
    python -m benchmarks.throughput --smoke    2,000 lines, one round

The bare loop reads the file, sends each body with pyreqwest, 256 at a time, and writes the
answers at its end. The service takes the upload, validates, sends, keeps every reply durably,
finalizes, and gives the output back. Both against the same upstream, in turn.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import harness

_CONCURRENCY = 256


def service_s(process: harness.Process, source: Path, target: Path, lines: int) -> float:
    """Seconds for upload, create, wait and download."""
    client = harness.Client(process)
    started = time.perf_counter()
    batch = client.wait(client.create(client.upload(source)), every_s=0.05)
    client.download(batch["output_file_id"], target)
    taken = time.perf_counter() - started
    assert batch["request_counts"]["completed"] == lines, batch
    return taken


def bare_s(url: str, source: Path, target: Path) -> float:
    """Seconds that the bare loop needs, in a process of its own on the service's core."""
    command = [sys.executable, "-m", "benchmarks.throughput", "--bare", url]
    command += [str(source), str(target)]
    popen = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    os.sched_setaffinity(popen.pid, harness.WORK_CORE)
    out, _ = popen.communicate()
    assert popen.returncode == 0
    return float(out)


async def bare_loop(url: str, source: Path, target: Path) -> float:
    """The loop itself."""
    import msgspec
    from pyreqwest.client import ClientBuilder

    class Line(msgspec.Struct):
        custom_id: str
        body: msgspec.Raw

    decode = msgspec.json.Decoder(Line).decode
    answers: list[bytes] = []
    async with ClientBuilder().build() as client:
        started = time.perf_counter()
        with source.open("rb") as file:

            async def send() -> None:
                for text in file:
                    request = client.post(f"{url}/v1/chat/completions")
                    request = request.header("content-type", "application/json")
                    body = bytes(decode(text).body)
                    response = await request.body_bytes(body).build().send()
                    answers.append(bytes(await response.bytes()))

            await asyncio.gather(*(send() for _ in range(_CONCURRENCY)))
        with target.open("wb") as out:
            out.write(b"\n".join(answers))
        taken = time.perf_counter() - started
        await asyncio.sleep(0.2)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lines", type=int, nargs="*")
    parser.add_argument("--bare", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        import uvloop

        url, source, target = options.bare
        print(uvloop.run(bare_loop(url, Path(source), Path(target))))
        return
    sizes = options.lines or ([2_000] if options.smoke else [10_000, 50_000])
    rounds = 1 if options.smoke else options.rounds
    results: list[dict[str, float]] = []
    with harness.workspace() as space, harness.upstream() as upstream:
        for lines in sizes:
            source, target = space / f"{lines}.jsonl", space / "out.jsonl"
            harness.write_input(source, lines, 1024)
            with harness.server(space / f"data-{lines}", upstream.url) as process:
                service_s(process, source, target, lines)  # a first one, not counted
                bare, ours, cpu = [], [], []
                for _ in range(rounds):
                    bare.append(bare_s(upstream.url, source, target))
                    before = process.cpu_s()
                    ours.append(service_s(process, source, target, lines))
                    cpu.append((process.cpu_s() - before) / lines * 1000)
                    assert harness.count_results(target) == (lines, lines)
                results.append(
                    {
                        "lines": lines,
                        "bare_lines_per_s": round(lines / statistics.median(bare)),
                        "service_lines_per_s": round(lines / statistics.median(ours)),
                        "ratio": round(
                            statistics.median(b / o for b, o in zip(bare, ours, strict=True)), 3
                        ),
                        "service_cpu_s_per_1000_lines": round(statistics.median(cpu), 3),
                        "server_peak_mb": round(process.memory_mb(), 1),
                    }
                )
                print(json.dumps(results[-1]), flush=True)


if __name__ == "__main__":
    main()
