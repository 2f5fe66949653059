"""What the runners share: the input, the clock and the report. Standard library only."""

import json
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

    def report(self) -> None:
        """Say how long it took, once the results are written."""
        seconds = time.perf_counter() - self._began
        who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        report = {
            "seconds": seconds,
            "cpu_s": _cpu_s() - self._began_cpu_s,
            "peak_mb": max(resource.getrusage(each).ru_maxrss for each in who) / 1024,
        }
        print("REPORT " + json.dumps(report), flush=True)


def _cpu_s() -> float:
    used = [resource.getrusage(r) for r in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
