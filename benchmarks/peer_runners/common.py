"""What the runners share: the input, the clock and the report. Standard library only."""

import json
import os
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CONCURRENCY = 256


class Run:
    """One run: `RUNNER URL SOURCE TARGET`. The clock starts when it is made, so after the
    imports, and stops when the results are written."""

    def __init__(self) -> None:
        self.url, source, target = sys.argv[1:4]
        self.source, self.target = Path(source), Path(target)
        self._began = time.perf_counter()
        self._began_cpu_s = _cpu_s()

    def read(self) -> list[dict[str, Any]]:
        """The input's lines."""
        with self.source.open() as file:
            return [json.loads(line) for line in file]

    def write(self, results: Iterable[dict[str, Any]]) -> None:
        """Write the results, one to a line, and report."""
        with self.target.open("w") as file:
            for result in results:
                file.write(json.dumps(result) + "\n")
        self.report()

    def report(self, *, cpu_s: float | None = None, peak_mb: float | None = None) -> None:
        """Say how long it took, once the results are written.

        Args:
            cpu_s: Processor time, where processes did the work that this one does not wait for.
            peak_mb: Their peak memory.
        """
        seconds = time.perf_counter() - self._began
        who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        report = {
            "seconds": seconds,
            "cpu_s": _cpu_s() - self._began_cpu_s if cpu_s is None else cpu_s,
            "peak_mb": peak_mb
            or max(resource.getrusage(each).ru_maxrss for each in who) / 1024,
        }
        print("REPORT " + json.dumps(report), flush=True)


def cpu_s_of(process: int) -> float:
    """Processor time so far of a process and all below it, those that ended included."""
    ticks = 0
    for each in _family(process):
        fields = _stat(each)
        ticks += sum(int(field) for field in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def peak_mb_of(process: int) -> float:
    """Peak memory of a process and all below it, in MiB."""
    peaks_kb = 0
    for each in _family(process):
        text = Path(f"/proc/{each}/status").read_text()
        line = next(line for line in text.splitlines() if line.startswith("VmHWM"))
        peaks_kb += int(line.split()[1])
    return peaks_kb / 1024


def _family(process: int) -> list[int]:
    """A process and all below it."""
    found = [process]
    for each in found:
        for thread in Path(f"/proc/{each}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    return found


def _stat(process: int) -> list[str]:
    """The fields of `/proc/PID/stat` from the state on."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def _cpu_s() -> float:
    used = [resource.getrusage(r) for r in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
