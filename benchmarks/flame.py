"""Where the processor time of a served Penstock goes.

    python -m benchmarks.flame                      200,000 lines of 1 KB
    python -m benchmarks.flame --keep stacks.txt    the stacks as well, for a flame graph

Runs batches of 50,000 lines as `benchmarks.throughput` does while py-spy looks 250 times a
second at what the thread does that holds the interpreter, and adds up what it saw: by part of
the program (the deepest frame of ours or, outside of it, of a library counts), and by function.
py-spy is installed beside, into `.venv-tools`, by the first call.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from benchmarks import harness
from benchmarks.throughput import service_s

_TOOLS = Path(__file__).parent.parent / ".venv-tools"
_PY_SPY = "py-spy==0.4.1"
_LINES = 50_000
_SHOWN = 25


def install() -> Path:
    """py-spy, in an environment of its own."""
    folder = _TOOLS / "py-spy"
    program = folder / "bin" / "py-spy"
    if not program.exists():
        uv = next(str(each) for each in sorted(_TOOLS.glob("uv-*/bin/uv")))
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(folder)], check=True)
        python = str(folder / "bin" / "python")
        subprocess.run([uv, "pip", "install", "-q", "--python", python, _PY_SPY], check=True)
    return program


def record(program: Path, server: harness.Process, target: Path) -> subprocess.Popen[bytes]:
    """Look at a server until it ends."""
    command = [str(program), "record", "--pid", str(server.popen.pid), "--rate", "250"]
    command += ["--gil", "--format", "raw", "--output", str(target)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def stacks(path: Path) -> Counter[tuple[str, ...]]:
    """How often each stack was seen, the outermost frame first."""
    found: Counter[tuple[str, ...]] = Counter()
    for line in path.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        found[tuple(stack.split(";"))] += int(count)
    return found


def part_of(stack: tuple[str, ...]) -> str:
    """Which part of the program, or which library, a stack was seen in."""
    for frame in reversed(stack):
        place = frame.rpartition("(")[2]
        if "penstock/" in place:
            return place.rpartition("penstock/")[2].partition(":")[0]
    for frame in reversed(stack):
        place = frame.rpartition("(")[2]
        if "site-packages/" in place:
            return place.rpartition("site-packages/")[2].partition("/")[0]
    return "threads and loop"


def show(title: str, seen: Counter[str], total: int) -> None:
    print(f"\n{title}")
    for name, count in seen.most_common(_SHOWN):
        print(f"  {100 * count / total:5.1f} %  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=4 * _LINES)
    parser.add_argument("--keep", type=Path, help="where to keep the stacks")
    options = parser.parse_args()
    program = install()
    with harness.workspace() as space, harness.upstream() as upstream:
        source, raw = space / "in.jsonl", space / "stacks.txt"
        harness.write_input(source, _LINES, 1024)
        with harness.server(space / "data", upstream.url) as server:
            service_s(server, source, space / "out.jsonl", _LINES)
            before = server.cpu_s()
            spy = record(program, server, raw)
            runs = max(options.lines // _LINES, 1)
            for _ in range(runs):
                service_s(server, source, space / "out.jsonl", _LINES)
            cpu_s = server.cpu_s() - before
            spy.send_signal(2)
            spy.wait()
        seen = stacks(raw)
        if options.keep:
            options.keep.write_text(raw.read_text())
    total = sum(seen.values())
    by_part: Counter[str] = Counter()
    by_function: Counter[str] = Counter()
    for stack, count in seen.items():
        by_part[part_of(stack)] += count
        by_function[stack[-1]] += count
    print(
        json.dumps(
            {
                "lines": runs * _LINES,
                "cpu_us_per_line": round(cpu_s * 1e6 / runs / _LINES, 1),
                "samples": total,
            }
        )
    )
    show("By part", by_part, total)
    show("By function", by_function, total)


if __name__ == "__main__":
    main()
