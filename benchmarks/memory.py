"""How much memory the server needs for a file of 20 MB and for one of 200 MB, or for few lines
and for very many.

    python -m benchmarks.memory [--upstream-latency-ms 0]
    python -m benchmarks.memory --many    1,000 to 1,000,000 lines of 256 bytes

For each size a fresh server, one upload, its batch, one download. The peak is that of the
whole process, as the kernel counts it. Small lines are the harder case, so that is measured
too: the same 200 MB as 200,000 lines of 1 KB, with the limit of requests raised.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass

from benchmarks import harness

_MB = 1_000_000
_MANY = {
    "PENSTOCK_LIMITS__REQUESTS_PER_BATCH": "1000000",
    "PENSTOCK_LIMITS__INPUT_FILE_BYTES": "1000000000",
}
_SHORT = 256


@dataclass(slots=True)
class Row:
    line_bytes: int
    lines: int
    seconds: float
    start_mb: float
    peak_mb: float


def measure(lines: int, line_bytes: int, upstream: harness.Process) -> Row:
    with harness.workspace() as space:
        source, target = space / "in.jsonl", space / "out.jsonl"
        harness.write_input(source, lines, line_bytes)
        with harness.server(space / "data", upstream.url, settings=_MANY) as process:
            start_mb = process.memory_mb()
            client = harness.Client(process)
            began = time.perf_counter()
            batch = client.wait(client.create(client.upload(source)), every_s=0.1)
            client.download(batch["output_file_id"], target)
            seconds = time.perf_counter() - began
            assert batch["request_counts"]["completed"] == lines, batch
            assert harness.count_results(target) == (lines, lines)
            peak_mb = process.memory_mb()
    return Row(line_bytes, lines, round(seconds, 1), round(start_mb, 1), round(peak_mb, 1))


def compare_sizes(upstream: harness.Process) -> None:
    for line_bytes in (4096, 1024):
        rows: list[Row] = []
        for file_mb in (20, 200):
            rows.append(measure(file_mb * _MB // line_bytes, line_bytes, upstream))
            print(json.dumps(asdict(rows[-1])), flush=True)
        grown = rows[1].peak_mb - rows[0].peak_mb
        print(json.dumps({"line_bytes": line_bytes, "grown_mb": round(grown, 1)}))


def compare_counts(upstream: harness.Process) -> None:
    for lines in (1_000, 10_000, 100_000, 1_000_000):
        print(json.dumps(asdict(measure(lines, _SHORT, upstream))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upstream-latency-ms", type=float, default=0.0)
    parser.add_argument("--many", action="store_true")
    options = parser.parse_args()
    with harness.upstream(options.upstream_latency_ms) as upstream:
        (compare_counts if options.many else compare_sizes)(upstream)


if __name__ == "__main__":
    main()
