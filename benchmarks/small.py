"""What a batch costs beyond its slowest reply, when it is small.

    python -m benchmarks.small            batches of 1, 10 and 100 lines, 20 of each
    python -m benchmarks.small --smoke    3 of each

The upstream takes 200 ms for every line. The overhead is what passes between sending
`POST /batches` and seeing `completed`, asked for every 5 ms, without these 200 ms. So is what
passes between sending `POST /batches` and the upstream's first request.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from benchmarks import harness

_LATENCY_MS = 200
_LINES = (1, 10, 100)


def measure(directory: Path, repeats: int) -> list[dict[str, object]]:
    """One row for each size."""
    rows: list[dict[str, object]] = []
    with (
        harness.upstream(_LATENCY_MS) as upstream,
        harness.server(directory / "data", upstream.url) as server,
    ):
        client = harness.Client(server)
        for lines in _LINES:
            source = directory / f"{lines}.jsonl"
            harness.write_input(source, lines, 1024)
            overheads: list[float] = []
            firsts: list[float] = []
            for _ in range(repeats):
                file_id = client.upload(source)
                seen = harness.stats(upstream)["requests"]
                began = time.perf_counter()
                began_at = time.time()
                batch = client.wait(client.create(file_id), every_s=0.005)
                overheads.append(1000 * (time.perf_counter() - began) - _LATENCY_MS)
                stats = harness.stats(upstream)
                assert batch["request_counts"]["completed"] == lines, batch
                assert stats["requests"] == seen + lines, stats
                firsts.append(1000 * (stats["round_at"] - began_at))
            rows.append(
                {
                    "lines": lines,
                    "overhead_ms_median": round(statistics.median(overheads), 1),
                    "overhead_ms_max": round(max(overheads), 1),
                    "first_request_ms_median": round(statistics.median(firsts), 1),
                    "first_request_ms_max": round(max(firsts), 1),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    with harness.workspace() as directory:
        for row in measure(directory, 3 if options.smoke else 20):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
