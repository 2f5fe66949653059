"""How much memory the server needs for a file of 20 MB and for one of 200 MB.

    python -m benchmarks.memory [--upstream-latency-ms 0]

For each size a fresh server, one upload, its batch, one download. The peak is that of the
whole process, as the kernel counts it. Small lines are the harder case, so that is measured
too: the same 200 MB as 200,000 lines of 1 KB, with the limit of requests raised.
"""

import argparse
import json
from dataclasses import asdict, dataclass

from benchmarks import harness

_MB = 1_000_000
_MANY = {"PENSTOCK_LIMITS__REQUESTS_PER_BATCH": "1000000"}


@dataclass(slots=True)
class Row:
    file_mb: int
    line_bytes: int
    lines: int
    start_mb: float
    peak_mb: float


def measure(file_mb: int, line_bytes: int, upstream: harness.Process) -> Row:
    lines = file_mb * _MB // line_bytes
    with harness.workspace() as space:
        source, target = space / "in.jsonl", space / "out.jsonl"
        harness.write_input(source, lines, line_bytes)
        with harness.server(space / "data", upstream.url, settings=_MANY) as process:
            start_mb = process.memory_mb()
            client = harness.Client(process)
            batch = client.wait(client.create(client.upload(source)), every_s=0.1)
            client.download(batch["output_file_id"], target)
            assert batch["request_counts"]["completed"] == lines, batch
            assert harness.count_results(target) == (lines, lines)
            return Row(
                file_mb, line_bytes, lines, round(start_mb, 1), round(process.memory_mb(), 1)
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upstream-latency-ms", type=float, default=0.0)
    options = parser.parse_args()
    rows: dict[tuple[int, int], Row] = {}
    with harness.upstream(options.upstream_latency_ms) as upstream:
        for line_bytes in (4096, 1024):
            for file_mb in (20, 200):
                row = rows[file_mb, line_bytes] = measure(file_mb, line_bytes, upstream)
                print(json.dumps(asdict(row)), flush=True)
    for line_bytes in (4096, 1024):
        grown = rows[200, line_bytes].peak_mb - rows[20, line_bytes].peak_mb
        print(json.dumps({"line_bytes": line_bytes, "grown_mb": round(grown, 1)}))


if __name__ == "__main__":
    main()
