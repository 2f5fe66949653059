"""What is lost, doubled and sent again when things go wrong, and how soon the work goes on.

    python -m benchmarks.recovery                         20 kills
    python -m benchmarks.recovery --kills 200             about ten minutes
    python -m benchmarks.recovery --scenario eio          one of those below, or `all`

Two batches run, one created while the other is under way, and meanwhile:

    kills      SIGKILL at random moments, some of them before the server is ready again
    stops      SIGSTOP for three times as long as a lease
    disk       the disk with database and results is full (needs root)
    eio        reading, writing and syncing fail with EIO (needs a C compiler)
    clock      the wall clock leaps, an hour forward and two back (needs a C compiler)
    upstream   cuts, stalls, wrong lengths, 10 MB replies, NULs, broken UTF-8, HTML, 4xx, 5xx

The upstream counts every request it gets, by line. At the end every line is looked for in the
result files. Sent again may be, for each kill, what was in flight plus one flush, which is
256 KiB of replies; without a kill nothing but what failed, up to `max_attempts` times.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import harness

_LATENCY_MS = 20.0
_CONCURRENCY = 256
_FLUSH_BYTES = 256 << 10
_MAX_ATTEMPTS = 5
_DISK_MB = 96
_FAULTS = Path(__file__).parent / "faults.c"


class Skipped(Exception):
    """This machine cannot do it."""


@dataclass(slots=True)
class Load:
    """Two batches on a server that may be hurt."""

    space: Path
    upstream: harness.Process
    lines: int
    chance: random.Random
    settings: dict[str, str] = field(
        default_factory=lambda: {"PENSTOCK_LIMITS__REQUESTS_PER_BATCH": "1000000"}
    )
    data_dir: Path = Path()
    batches: list[str] = field(default_factory=list[str])
    created_lines: int = 0
    server: harness.Process = None  # type: ignore[assignment]

    def start(self) -> None:
        """Start the server and the first batch."""
        self.data_dir = self.data_dir if self.data_dir.name else self.space / "data"
        self.server = self._start(wait=True)
        self.create()

    def _start(self, *, wait: bool, port: int = 0) -> harness.Process:
        return harness.start_server(
            self.data_dir, self.upstream.url, port=port, settings=self.settings, wait=wait
        )

    def restart(self, *, wait: bool = True) -> None:
        self.server = self._start(wait=wait, port=self.server.port)

    def create(self) -> None:
        """Upload half of the lines and create a batch."""
        source = self.space / f"in{len(self.batches)}.jsonl"
        count = self.lines // 2
        harness.write_input(source, count, 256, first=self.created_lines)
        client = harness.Client(self.server)
        self.batches.append(client.create(client.upload(source)))
        self.created_lines += count

    def requests(self) -> int:
        return harness.stats(self.upstream)["requests"]

    def wait_for_requests(self, more: float) -> None:
        """Wait until the upstream has got some more, or is done with all lines."""
        goal = self.requests() + more
        deadline = time.monotonic() + 120
        while self.requests() < goal and harness.stats(self.upstream)["lines"] < self.lines:
            if time.monotonic() > deadline:
                log = (self.data_dir / "server.log").read_text()[-4000:]
                raise SystemExit(f"Nothing went on for two minutes: {log}")
            time.sleep(0.002)

    def create_second_when_due(self) -> None:
        """Create the second batch once a quarter of all lines was sent."""
        if len(self.batches) == 1 and harness.stats(self.upstream)["lines"] * 4 > self.lines:
            self.create()

    def account(self) -> dict[str, Any]:
        """Wait for the ends, and count."""
        client = harness.Client(self.server)
        while len(self.batches) < 2:
            self.create_second_when_due()
            time.sleep(0.02)
        ids: Counter[str] = Counter()
        is_true, statuses, reply_bytes, replies = True, set[str](), 0, 0
        for name in self.batches:
            batch = client.wait(name)
            statuses.add(batch["status"])
            tokens, counts = 0, {"output": 0, "error": 0}
            for kind in counts:
                if (file_id := batch[f"{kind}_file_id"]) is None:
                    continue
                target = self.space / f"{kind}.jsonl"
                reply_bytes += client.download(file_id, target)
                with target.open("rb") as file:
                    for line in file:
                        found = json.loads(line)
                        ids[found["custom_id"]] += 1
                        counts[kind] += 1
                        if kind == "output":
                            tokens += found["response"]["body"]["usage"]["total_tokens"]
            replies += sum(counts.values())
            is_true &= batch["request_counts"] == {
                "total": sum(counts.values()),
                "completed": counts["output"],
                "failed": counts["error"],
            }
            is_true &= batch["usage"]["total_tokens"] == tokens
        stats = harness.stats(self.upstream)
        metrics = harness.get(f"{self.server.url}/metrics").decode()
        free = re.search(r"^penstock_upstream_free_requests_total\{.*\} (\S+)", metrics, re.M)
        self.server.popen.terminate()
        self.server.popen.wait()
        return {
            "lines": self.lines,
            "statuses": sorted(statuses),
            "lost": self.lines - len(ids),
            "doubled": sum(ids.values()) - len(ids),
            "counts_equal_files": is_true,
            "sent_again": stats["again"],
            "most_attempts_at_a_line": stats["most"],
            "sent_beyond_max_attempts": stats["beyond_five"],
            "free_attempts": int(float(free[1])) if free else 0,
            "flush_in_lines": _FLUSH_BYTES * replies // max(reply_bytes, 1),
        }


def kill(load: Load, times: int) -> dict[str, Any]:
    per_kill = load.lines / (times + 2)
    resumed_s: list[float] = []
    early = 0
    load.start()
    for _ in range(times):
        load.wait_for_requests(per_kill * load.chance.uniform(0.2, 1.2))
        load.create_second_when_due()
        time.sleep(load.chance.uniform(0, 0.1))
        load.server.kill()
        killed = time.perf_counter()
        while load.chance.random() < 0.2:  # before it is ready, perhaps again and again
            load.restart(wait=False)
            time.sleep(load.chance.uniform(0.1, 2.5))
            load.server.kill()
            early += 1
        if harness.stats(load.upstream)["lines"] >= load.lines:
            raise SystemExit("The batches ended before the last kill: more lines, please.")
        before = load.requests()
        load.restart()
        if harness.stats(load.upstream)["lines"] < load.created_lines:
            while load.requests() == before:
                time.sleep(0.001)
            resumed_s.append(time.perf_counter() - killed)
    found = load.account()
    allowed = (times + early) * (_CONCURRENCY + found.pop("flush_in_lines"))
    return {
        "kills": times + early,
        **found,
        "allowed": allowed,
        "is_as_promised": found["sent_again"] <= allowed,
        "resumed_s_median": round(statistics.median(resumed_s), 2),
        "resumed_s_max": round(max(resumed_s), 2),
    }


def hurt(
    load: Load, times: int, begin: Callable[[], None], end: Callable[[], None], seconds: float
) -> dict[str, Any]:
    """Let something begin and end a few times while the work goes on."""
    load.start()
    per_fault = load.lines / (times + 3)
    for _ in range(times):
        load.wait_for_requests(per_fault * load.chance.uniform(0.3, 1.0))
        begin()
        time.sleep(seconds)
        end()
        load.create_second_when_due()
    found = load.account()
    del found["flush_in_lines"]
    return {"faults": times, **found, "is_as_promised": found["sent_again"] == 0}


def stop(load: Load) -> dict[str, Any]:
    load.settings["PENSTOCK_WORKER__LEASE_S"] = "1"
    return hurt(
        load,
        8,
        lambda: load.server.popen.send_signal(signal.SIGSTOP),
        lambda: load.server.popen.send_signal(signal.SIGCONT),
        3.0,
    )


def fill_disk(load: Load) -> dict[str, Any]:
    disk = load.space / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MB}m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        raise Skipped("Only root can mount a small disk.")
    load.data_dir = disk / "data"
    ballast = disk / "ballast"

    def fill() -> None:
        with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass

    try:
        return hurt(load, 8, fill, ballast.unlink, 2.0)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fail_io(load: Load) -> dict[str, Any]:
    load.settings |= _preload(load.space)
    flag = load.space / "eio"
    load.settings["FAULTS_DIR"] = str(load.space / "data")
    load.settings["FAULTS_EIO"] = str(flag)
    return hurt(load, 8, flag.touch, flag.unlink, 2.0)


def leap(load: Load) -> dict[str, Any]:
    load.settings |= _preload(load.space)
    clock = load.space / "clock"
    clock.write_text("0")
    load.settings["FAULTS_CLOCK"] = str(clock)
    leaps = iter([3600, -7200, 0, -60, 86_000, 0, 7200, -3600])

    def set_wrong() -> None:
        clock.write_text(str(next(leaps)))

    return hurt(load, 8, set_wrong, lambda: None, 0.5)


def _preload(space: Path) -> dict[str, str]:
    """What makes a process start with `faults.c`."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise Skipped("There is no C compiler, cc.")
    library = space / "faults.so"
    command = [compiler, "-shared", "-fPIC", "-O2", "-o", str(library), str(_FAULTS), "-ldl"]
    subprocess.run(command, check=True)
    return {"LD_PRELOAD": str(library)}


def bear_upstream(load: Load) -> dict[str, Any]:
    load.settings |= {
        "PENSTOCK_UPSTREAMS__0__REQUEST_TIMEOUT_S": "1",
        "PENSTOCK_UPSTREAMS__0__MAX_ATTEMPTS": str(_MAX_ATTEMPTS),
    }
    load.start()
    load.wait_for_requests(load.lines / 4)
    found = load.account()
    del found["flush_in_lines"]
    # Beyond `max_attempts` only what was sent to see whether the upstream is back, and lines
    # of slices that were given back meanwhile, whose attempts are counted anew.
    beyond = found["sent_beyond_max_attempts"] - found["free_attempts"]
    is_as_promised = beyond <= load.lines // 1000
    return {**found, "is_as_promised": is_as_promised}


_SCENARIOS: dict[str, Callable[[Load], dict[str, Any]]] = {
    "stops": stop,
    "disk": fill_disk,
    "eio": fail_io,
    "clock": leap,
    "upstream": bear_upstream,
}


@contextlib.contextmanager
def prepared(name: str, lines: int, seed: int) -> Generator[Load]:
    wild = seed if name == "upstream" else None
    with (
        harness.workspace() as space,
        harness.upstream(_LATENCY_MS, wild=wild) as upstream,
    ):
        load = Load(space, upstream, lines, random.Random(seed))
        try:
            yield load
        finally:
            if load.server is not None:  # pyright: ignore[reportUnnecessaryComparison]
                load.server.kill()


def run(name: str, *, kills: int, lines: int, seed: int) -> bool:
    """Run a scenario and print its row; whether all promises were kept."""
    row: dict[str, Any] = {"scenario": name, "seed": seed}
    try:
        with prepared(name, lines, seed) as load:
            row |= kill(load, kills) if name == "kills" else _SCENARIOS[name](load)
    except Skipped as reason:
        print(json.dumps({**row, "skipped": str(reason)}), flush=True)
        return True
    print(json.dumps(row), flush=True)
    return (
        not row["lost"]
        and not row["doubled"]
        and row["counts_equal_files"]
        and row["is_as_promised"]
        and row["statuses"] == ["completed"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenario", choices=["kills", *_SCENARIOS, "all"], default="kills")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--lines", type=int, help="2,000 for each kill, else 20,000")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2)))
    options = parser.parse_args()
    names = ["kills", *_SCENARIOS] if options.scenario == "all" else [options.scenario]
    kept: list[bool] = []
    for name in names:
        lines = options.lines or (2_000 * options.kills if name == "kills" else 20_000)
        kept.append(run(name, kills=options.kills, lines=lines, seed=options.seed))
    if not all(kept):
        raise SystemExit("A promise was broken.")


if __name__ == "__main__":
    main()
