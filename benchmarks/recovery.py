"""What is lost, doubled and sent again when things go wrong, and how soon the work goes on.

    python -m benchmarks.recovery                         20 kills
    python -m benchmarks.recovery --smoke                 3 kills, half a minute
    python -m benchmarks.recovery --kills 200             about ten minutes
    python -m benchmarks.recovery --scenario eio          one of those below, or `all`

Two batches run, one created while the other is under way, and meanwhile:

    kills      SIGKILL at random moments, some of them before the server is ready again
    stops      SIGSTOP for three times as long as a lease
    disk       the disk with database and results is full (needs root)
    disk-kill  SIGKILL while that disk is full, and a start before there is room (needs root)
    eio        reading, writing and syncing fail with EIO (needs a C compiler)
    eio-some   so does a fifth of the calls, by chance (needs a C compiler)
    clock      the wall clock leaps, an hour forward and two back (needs a C compiler)
    upstream   cuts, stalls, wrong lengths, 10 MB replies, NULs, broken UTF-8, HTML, 4xx, 5xx

The upstream counts every request it gets, by line, and names the line in its reply. At the end
every line is looked for in the result files of its own batch, in the order of the input, with
the reply that was given for it. Sent again may be, for each kill, what was in flight plus one
flush, which is 256 KiB of replies; without a kill nothing but what failed, up to `max_attempts`
times.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import time
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
_EIO_PERCENT = 20
_FAULT_COUNT, _SMOKE_FAULT_COUNT = 8, 2
_SMOKE_KILLS, _SMOKE_LINES = 3, 6_000
_FAULTS = Path(__file__).parent / "faults.c"


class Skipped(Exception):
    """This machine cannot do it."""


@dataclass(slots=True)
class Found:
    """What the result files hold."""

    lines: set[int] = field(default_factory=set[int])
    results: int = 0
    misplaced: int = 0
    """Results that are another line's, of another batch, or not in the order of the input."""
    never_run: int = 0
    """Lines whose batch was cancelled or expired before they had a reply."""
    reply_bytes: int = 0
    is_true: bool = True
    """Whether counts and usage are those of the files."""
    statuses: set[str] = field(default_factory=set[str])

    def take(
        self, client: harness.Client, batch: dict[str, Any], numbers: range, space: Path
    ) -> None:
        """Take in the result files of a batch that has ended.

        Args:
            numbers: Its lines.
            space: Where the files are put for a moment.
        """
        self.statuses.add(batch["status"])
        tokens, counts, never_run = 0, {"output": 0, "error": 0}, self.never_run
        for kind in counts:
            if (file_id := batch[f"{kind}_file_id"]) is None:
                continue
            target = space / f"{kind}.jsonl"
            self.reply_bytes += client.download(file_id, target)
            before = self.results
            tokens += self.read(target, numbers)
            counts[kind] = self.results - before
        self.is_true &= batch["request_counts"] == {
            "total": sum(counts.values()),
            "completed": counts["output"],
            "failed": counts["error"] - (self.never_run - never_run),
        }
        self.is_true &= batch["usage"]["total_tokens"] == tokens

    def read(self, path: Path, numbers: range) -> int:
        """Take in a result file; the tokens it tells of.

        Args:
            numbers: The lines of its batch.
        """
        tokens, last = 0, -1
        with path.open("rb") as file:
            for text in file:
                result = json.loads(text)
                number = int(result["custom_id"].removeprefix("request-"))
                body = (result["response"] or {}).get("body")
                of_line = body.get("id") if isinstance(body, dict) else None
                code = (result["error"] or {}).get("code")
                self.never_run += code in ("batch_cancelled", "batch_expired")
                is_own = of_line in (None, f"chatcmpl-{number:09}")
                if result["error"] is None and result["response"]["status_code"] == 200:
                    is_own &= of_line is not None
                    tokens += body["usage"]["total_tokens"]
                self.misplaced += not (is_own and number in numbers and number > last)
                last = number
                self.results += 1
                self.lines.add(number)
        return tokens


@dataclass(slots=True)
class Load:
    """Two batches on a server that may be hurt."""

    space: Path
    upstream: harness.Process
    lines: int
    chance: random.Random
    faults: int = _FAULT_COUNT
    settings: dict[str, str] = field(
        default_factory=lambda: {"PENSTOCK_LIMITS__REQUESTS_PER_BATCH": "1000000"}
    )
    data_dir: Path = Path()
    batches: list[str] = field(default_factory=list[str])
    created_lines: int = 0
    server: harness.Process = None

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

    def revive(self) -> bool:
        """Wait for a server that was started; start it again if it has ended.

        Returns:
            Whether it had.
        """
        if harness.becomes_ready(self.server):
            return False
        self.server.kill()
        self.restart()
        return True

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
        found = Found()
        for place, name in enumerate(self.batches):
            half = self.lines // 2
            numbers = range(place * half, (place + 1) * half)
            found.take(client, client.wait(name), numbers, self.space)
        stats = harness.stats(self.upstream)
        metrics = harness.get(f"{self.server.url}/metrics").decode()
        free = re.search(r"^penstock_upstream_free_requests_total\{.*\} (\S+)", metrics, re.M)
        self.server.popen.terminate()
        self.server.popen.wait()
        return {
            "lines": self.lines,
            "statuses": sorted(found.statuses),
            "lost": self.lines - len(found.lines),
            "doubled": found.results - len(found.lines),
            "misplaced": found.misplaced,
            "counts_equal_files": found.is_true,
            "sent_again": stats["again"],
            "most_attempts_at_a_line": stats["most"],
            "sent_beyond_max_attempts": stats["beyond_five"],
            "free_attempts": int(float(free[1])) if free else 0,
            "flush_in_lines": _FLUSH_BYTES * found.results // max(found.reply_bytes, 1),
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
    load: Load,
    begin: Callable[[], None],
    end: Callable[[], None],
    seconds: float,
    *,
    kills: int = 0,
) -> dict[str, Any]:
    """Let something begin and end a few times while the work goes on.

    Args:
        kills: How many of the times it kills the server, whose disk takes nothing then: what
            the disk did not take is sent again, and what came until that was known.
    """
    load.start()
    per_fault = load.lines / (load.faults + 3)
    amid_work = 0
    for _ in range(load.faults):
        load.wait_for_requests(per_fault * load.chance.uniform(0.3, 1.0))
        begin()
        amid_work += harness.stats(load.upstream)["lines"] < load.created_lines
        time.sleep(seconds)
        end()
        load.create_second_when_due()
    found = load.account()
    allowed = kills * (_CONCURRENCY + 2 * found.pop("flush_in_lines"))
    return {
        "faults": load.faults,
        "amid_work": amid_work,
        **found,
        "allowed": allowed,
        "is_as_promised": found["sent_again"] <= allowed,
    }


def stop(load: Load) -> dict[str, Any]:
    load.settings["PENSTOCK_WORKER__LEASE_S"] = "1"
    return hurt(
        load,
        lambda: load.server.popen.send_signal(signal.SIGSTOP),
        lambda: load.server.popen.send_signal(signal.SIGCONT),
        3.0,
    )


@contextlib.contextmanager
def small_disk(load: Load) -> Generator[Path]:
    """Put the data directory on a disk of its own; a file there that can take all its room."""
    disk = load.space / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MB}m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        raise Skipped("Only root can mount a small disk.")
    load.data_dir = disk / "data"
    try:
        yield disk / "ballast"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(ballast: Path) -> None:
    with ballast.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            piece = bytes(size)
            with contextlib.suppress(OSError):
                while file.write(piece) == size:
                    pass


def fill_disk(load: Load) -> dict[str, Any]:
    with small_disk(load) as ballast:
        return hurt(load, lambda: fill(ballast), ballast.unlink, 2.0)


def kill_on_full_disk(load: Load) -> dict[str, Any]:
    ended = 0

    def kill_and_make_room() -> None:
        nonlocal ended
        load.server.kill()
        load.restart(wait=False)
        time.sleep(load.chance.uniform(0.5, 5.0))
        ballast.unlink()
        ended += load.revive()

    with small_disk(load) as ballast:
        found = hurt(load, lambda: fill(ballast), kill_and_make_room, 1.0, kills=load.faults)
    return {**found, "starts_that_ended": ended}


def fail_io(load: Load, percent: int = 100) -> dict[str, Any]:
    load.settings |= preload(load.space)
    flag = load.space / "eio"
    load.settings["FAULTS_DIR"] = str(load.space / "data")
    load.settings["FAULTS_EIO"] = str(flag)
    return hurt(load, lambda: flag.write_text(str(percent)), flag.unlink, 2.0)


def fail_some_io(load: Load) -> dict[str, Any]:
    return fail_io(load, _EIO_PERCENT)


def leap(load: Load) -> dict[str, Any]:
    load.settings |= preload(load.space)
    clock = load.space / "clock"
    clock.write_text("0")
    load.settings["FAULTS_CLOCK"] = str(clock)
    leaps = itertools.cycle([3600, -7200, 0, -60, 86_000, 0, 7200, -3600])

    def set_wrong() -> None:
        clock.write_text(str(next(leaps)))

    return hurt(load, set_wrong, lambda: None, 0.5)


def preload(space: Path) -> dict[str, str]:
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
    "disk-kill": kill_on_full_disk,
    "eio": fail_io,
    "eio-some": fail_some_io,
    "clock": leap,
    "upstream": bear_upstream,
}


@contextlib.contextmanager
def prepared(name: str, lines: int, faults: int, seed: int) -> Generator[Load]:
    wild = seed if name == "upstream" else None
    with (
        harness.workspace() as space,
        harness.upstream(_LATENCY_MS, wild=wild) as upstream,
    ):
        load = Load(space, upstream, lines, random.Random(seed), faults)
        try:
            yield load
        finally:
            if load.server is not None:  # pyright: ignore[reportUnnecessaryComparison]
                load.server.kill()


def run(name: str, *, kills: int, faults: int, lines: int, seed: int) -> bool:
    """Run a scenario and print its row; whether all promises were kept."""
    row: dict[str, Any] = {"scenario": name, "seed": seed}
    try:
        with prepared(name, lines, faults, seed) as load:
            row |= kill(load, kills) if name == "kills" else _SCENARIOS[name](load)
    except Skipped as reason:
        print(json.dumps({**row, "skipped": str(reason)}), flush=True)
        return True
    print(json.dumps(row), flush=True)
    return (
        not row["lost"]
        and not row["doubled"]
        and not row["misplaced"]
        and row["counts_equal_files"]
        and row["is_as_promised"]
        and row["statuses"] == ["completed"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenario", choices=["kills", *_SCENARIOS, "all"], default="kills")
    parser.add_argument("--kills", type=int)
    parser.add_argument("--lines", type=int, help="2,000 for each kill, else 20,000")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2)))
    parser.add_argument("--smoke", action="store_true", help="few kills or faults, few lines")
    options = parser.parse_args()
    kills = options.kills or (_SMOKE_KILLS if options.smoke else 20)
    faults = _SMOKE_FAULT_COUNT if options.smoke else _FAULT_COUNT
    names = ["kills", *_SCENARIOS] if options.scenario == "all" else [options.scenario]
    kept: list[bool] = []
    for name in names:
        usual = _SMOKE_LINES if options.smoke else 2_000 * kills if name == "kills" else 20_000
        lines = options.lines or usual
        kept.append(run(name, kills=kills, faults=faults, lines=lines, seed=options.seed))
    if not all(kept):
        raise SystemExit("A promise was broken.")


if __name__ == "__main__":
    main()
