"""How well one worker keeps thousands of slow lines in flight.

    python -m benchmarks.inflight            200,000 lines, 5,000 in flight, 2 s latency
    python -m benchmarks.inflight --smoke    2,000 lines, 200 in flight, 0.5 s latency

Ideal is the number in flight divided by the latency. The rate is that of the whole time in
which lines were sent, as the upstream saw them, without those that were in flight first;
`steady` leaves out the first and last tenth of the lines.
"""

import argparse
import json

from benchmarks import harness


def measure(lines: int, in_flight: int, latency_s: float) -> dict[str, object]:
    settings = {
        "PENSTOCK_LIMITS__REQUESTS_PER_BATCH": "1000000",
        "PENSTOCK_UPSTREAMS__0__MAX_CONCURRENCY": str(in_flight),
        "PENSTOCK_UPSTREAMS__0__INITIAL_CONCURRENCY": str(in_flight),
    }
    with harness.workspace() as space, harness.upstream(1000 * latency_s) as upstream:
        source = space / "in.jsonl"
        harness.write_input(source, lines, 1024)
        with harness.server(space / "data", upstream.url, settings=settings) as server:
            client = harness.Client(server)
            batch = client.wait(client.create(client.upload(source)), every_s=0.25)
            assert batch["request_counts"]["completed"] == lines, batch
            stats = harness.stats(upstream)
            peak_mb, cpu_s = server.memory_mb(), server.cpu_s()
    ideal = in_flight / latency_s
    whole = (lines - in_flight) / (stats["last_at"] - stats["first_at"])
    marks = stats["marks"]
    first, last = len(marks) // 10, 9 * len(marks) // 10
    steady = 100 * (last - first) / (marks[last] - marks[first])
    return {
        "lines": lines,
        "in_flight": stats["max_in_flight"],
        "latency_s": latency_s,
        "ideal_lines_per_s": ideal,
        "whole": round(whole / ideal, 3),
        "steady": round(steady / ideal, 3),
        "server_peak_mb": round(peak_mb, 1),
        "server_cpu_s_per_1000_lines": round(1000 * cpu_s / lines, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    row = measure(2000, 200, 0.5) if options.smoke else measure(200_000, 5_000, 2.0)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
