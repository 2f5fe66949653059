"""Penstock beside what people use instead, in one run.

    python -m benchmarks.peers                       all of them; installs them at the first run
    python -m benchmarks.peers --peers aiohttp,ray   some of them
    python -m benchmarks.peers --smoke               aiohttp and openai, few lines

Each peer is installed in its own environment below `.venv-tools/peers`, in the version that its
file of requirements names, and runs pinned to the same core as Penstock does, with 256 requests
at a time, against the same upstream, which answers at once from the other core. Its time begins
after its imports and ends when its results are written. Penstock's time is that of the whole
service, upload and download included; the median before and after the peers is taken. The slow
ones get fewer lines, which is in their favour. AIBrix's time is that of its whole service too,
from when it is ready, with a Redis server beside it.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks import harness
from benchmarks.throughput import service_s

_HERE = Path(__file__).parent / "peer_runners"
_TOOLS = Path(__file__).parent.parent / ".venv-tools"
_LINES = {
    "aiohttp": 10_000,
    "openai": 2_000,
    "litellm": 2_000,
    "curator": 2_000,
    "ray": 5_000,
    "aibrix": 5_000,
}
_OURS = 50_000
_GOALS = {"aiohttp": 2.5, "openai": 20, "litellm": 40, "curator": 20, "ray": 20, "aibrix": 40}
_ENVIRONMENT = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "RAY_USAGE_STATS_ENABLED": "0",
    "CURATOR_DISABLE_RICH_DISPLAY": "1",
    "TELEMETRY_ENABLED": "false",
}
_PATIENCE_S = 300


class Failed(Exception):
    """A peer could not be installed or run."""


def install(name: str) -> Path:
    """The peer's Python, in an environment made at the first call."""
    folder = _TOOLS / "peers" / name
    python = folder / "bin" / "python"
    wanted = (_HERE / f"requirements-{name}.txt").read_text()
    stamp = folder / "installed.txt"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    uv = next((str(each) for each in sorted(_TOOLS.glob("uv-*/bin/uv"))), shutil.which("uv"))
    if uv is None:
        raise Failed("It could not be installed: there is no uv; `./dev bench peers` gets it.")
    shutil.rmtree(folder, ignore_errors=True)
    requirements = str(_HERE / f"requirements-{name}.txt")
    for command in (
        [uv, "venv", "-q", "--python", sys.executable, str(folder)],
        [uv, "pip", "install", "-q", "--python", str(python), "-r", requirements],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failed(f"It could not be installed: {done.stderr[-300:]}")
    stamp.write_text(wanted)
    return python


def run(name: str, upstream: harness.Process, space: Path, lines: int) -> dict[str, object]:
    """One run of a peer."""
    python = install(name)
    source, target = space / f"in-{lines}.jsonl", space / f"{name}.jsonl"
    if not source.exists():
        harness.write_input(source, lines, 1024)
    command = [
        str(python),
        str(_HERE / f"run_{name}.py"),
        upstream.url,
        str(source),
        str(target),
    ]
    command = ["taskset", "-c", str(min(harness.WORK_CORE)), *command]
    environment = {**os.environ, **_ENVIRONMENT, **_tables(python), "HOME": str(space)}
    code, output, errors = _run_with_all_it_starts(command, environment)
    report = next((x for x in output.splitlines() if x.startswith("REPORT ")), None)
    if report is None:
        raise Failed(f"It ended with {code}: {errors[-500:]}")
    found = json.loads(report.removeprefix("REPORT "))
    count, different = harness.count_results(target)
    if (count, different) != (lines, lines):
        raise Failed(f"It wrote {count} results, {different} different ones, of {lines}.")
    return {
        "lines": lines,
        "lines_per_s": round(lines / found["seconds"], 1),
        "cpu_s_per_1000_lines": round(1000 * found["cpu_s"] / lines, 3),
        "peak_mb": round(found["peak_mb"], 1),
    }


def _run_with_all_it_starts(
    command: list[str], environment: dict[str, str]
) -> tuple[int, str, str]:
    """Its exit code, output and errors; nothing that it has started outlives it."""
    popen = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        output, errors = popen.communicate(timeout=_PATIENCE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(popen.pid, signal.SIGKILL)
        popen.wait()
    return popen.returncode, output, errors


def _tables(python: Path) -> dict[str, str]:
    """Where the tables lie by which some count tokens, which they would else download."""
    pattern = "lib/*/site-packages/litellm/litellm_core_utils/tokenizers"
    found = next(python.parent.parent.glob(pattern), None)
    return {"TIKTOKEN_CACHE_DIR": str(found)} if found else {}


def ours(upstream: harness.Process, space: Path, lines: int) -> tuple[float, float, float]:
    """Lines a second, processor time for 1,000 lines, and peak memory of a Penstock."""
    source = space / f"in-{lines}.jsonl"
    if not source.exists():
        harness.write_input(source, lines, 1024)
    data_dir = space / f"data-{harness.free_port()}"
    with harness.server(data_dir, upstream.url) as server:
        before = server.cpu_s()
        seconds = service_s(server, source, space / "ours.jsonl", lines)
        return lines / seconds, 1000 * (server.cpu_s() - before) / lines, server.memory_mb()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", default=",".join(_LINES))
    parser.add_argument("--lines", type=int, help="for each peer")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    names = ["aiohttp", "openai"] if options.smoke else options.peers.split(",")
    if unknown := set(names) - set(_LINES):
        parser.error(f"--peers knows {', '.join(_LINES)}, and not {', '.join(unknown)}.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what was started as well
    our_lines = 2_000 if options.smoke else _OURS
    rows: dict[str, dict[str, object]] = {}
    with harness.workspace() as space, harness.upstream() as upstream:
        measured = [ours(upstream, space, our_lines)]
        for name in names:
            lines = 500 if options.smoke else options.lines or _LINES[name]
            try:
                rows[name] = run(name, upstream, space, lines)
            except (Failed, subprocess.TimeoutExpired) as reason:
                print(json.dumps({"peer": name, "not_run": str(reason)}), flush=True)
        measured.append(ours(upstream, space, our_lines))
    rate, cpu_s, peak_mb = (statistics.median(values) for values in zip(*measured, strict=True))
    print(
        json.dumps(
            {
                "peer": "penstock",
                "lines": our_lines,
                "lines_per_s": round(rate),
                "cpu_s_per_1000_lines": round(cpu_s, 3),
                "peak_mb": round(peak_mb, 1),
            }
        )
    )
    for name, row in rows.items():
        times = round(rate / float(str(row["lines_per_s"])), 1)
        print(json.dumps({"peer": name, **row, "times": times, "goal": _GOALS[name]}))


if __name__ == "__main__":
    main()
