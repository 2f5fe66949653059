"""What is lost, doubled and sent again when the server is killed, and how soon it goes on.

    python -m benchmarks.recovery [--kills 20] [--lines 20000] [--seed 1]

A batch runs; at random moments the server gets SIGKILL and is started again on the same data
directory. The upstream counts every request it gets, by line. At the end the result files are
counted, line by line. Allowed is, for each kill, what was in flight plus one flush, which is
256 KiB of replies.
"""

import argparse
import json
import os
import random
import statistics
import time
from pathlib import Path

from benchmarks import harness

_LATENCY_MS = 20.0
_CONCURRENCY = 256
_FLUSH_BYTES = 256 << 10


def run(space: Path, *, kills: int, lines: int, seed: int) -> dict[str, object]:
    """One batch through `kills` kills."""
    chance = random.Random(seed)
    source = space / "in.jsonl"
    harness.write_input(source, lines, 1024)
    resumed_s: list[float] = []
    with harness.upstream(_LATENCY_MS) as upstream:
        data_dir = space / "data"
        process = harness.start_server(data_dir, upstream.url)
        client = harness.Client(process)
        batch_id = client.create(client.upload(source))
        # About as many lines between two kills as leave work for all of them.
        per_kill = lines / (kills + 2)
        for _ in range(kills):
            seen = harness.stats(upstream)["requests"]
            goal = seen + per_kill * chance.uniform(0.2, 1.2)
            while harness.stats(upstream)["requests"] < goal:
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.1))
            process.kill()
            if harness.stats(upstream)["lines"] >= lines:
                raise SystemExit(
                    "The batch had ended before the last kill: more lines, please."
                )
            before = harness.stats(upstream)["requests"]
            killed = time.perf_counter()
            process = harness.start_server(data_dir, upstream.url, port=process.port)
            while harness.stats(upstream)["requests"] == before:
                time.sleep(0.001)
            resumed_s.append(time.perf_counter() - killed)
        batch = client.wait(batch_id)
        target = space / "out.jsonl"
        client.download(batch["output_file_id"], target)
        seen = harness.stats(upstream)
        process.popen.terminate()
        process.popen.wait()
    results, different = harness.count_results(target)
    flush = _FLUSH_BYTES * results // target.stat().st_size
    return {
        "kills": kills,
        "lines": lines,
        "status": batch["status"],
        "counts": batch["request_counts"],
        "lost": lines - different,
        "doubled": results - different,
        "sent_again": seen["again"],
        "sent_again_per_kill": round(seen["again"] / kills, 1),
        "allowed_per_kill": _CONCURRENCY + flush,
        "resumed_s_median": round(statistics.median(resumed_s), 2),
        "resumed_s_max": round(max(resumed_s), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--lines", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2)))
    options = parser.parse_args()
    with harness.workspace() as space:
        result = run(space, kills=options.kills, lines=options.lines, seed=options.seed)
    print(json.dumps({"seed": options.seed, **result}))
    if result["lost"] or result["doubled"] or result["status"] != "completed":
        raise SystemExit(1)
    if float(str(result["sent_again_per_kill"])) > float(str(result["allowed_per_kill"])):
        raise SystemExit("More lines were sent again than were in flight plus one flush.")


if __name__ == "__main__":
    main()
