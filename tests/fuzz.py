"""Ask a served Penstock all that its OpenAPI document allows, and much that it does not.

    python -m tests.fuzz                 # five minutes
    python -m tests.fuzz --minutes 30

Schemathesis makes requests from `/openapi.json`, good ones and bad ones, alone and in
sequences, and holds every answer against the document. How it is run stands in
`schemathesis.toml`; the findings that are none, with reasons, in `fuzz_hooks.py`.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

ROOT = Path(__file__).parent.parent
KEY = "sk-fuzz-0123456789abcdef"
CHAT = "/v1/chat/completions"
_PATIENCE_S = 60.0
_ALL = ("--phases", "examples,coverage,fuzzing,stateful", "--checks", "all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """IDs of objects that are there, so that not every request meets a 404."""

    inputs: list[str]
    files: list[str]
    batches: list[str]


@contextlib.contextmanager
def served(folder: Path) -> Generator[str]:
    """Run `penstock serve` before a simulated upstream, both on free ports.

    Args:
        folder: Where the data directory and the logs are put.

    Yields:
        The server's address.
    """
    with (
        _running(
            folder, "simulate", ["--model", "sim", "--latency-ms", "200"], "/v1/models"
        ) as upstream,
        _running(
            folder,
            "serve",
            [
                *("--data-dir", str(folder / "data"), "--api-key", KEY),
                *("--upstream", f"{upstream}/v1"),
            ],
            "/readyz",
        ) as server,
    ):
        yield server


@contextlib.contextmanager
def _running(folder: Path, command: str, options: Sequence[str], ready: str) -> Generator[str]:
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    with (folder / f"{command}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "penstock", command, "--port", str(port), *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        _until(lambda: process.poll() is not None or _answers(url + ready), command)
        assert process.poll() is None, (folder / f"{command}.log").read_text()
        yield url
    finally:
        process.terminate()
        process.wait(_PATIENCE_S)


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
        return True
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _until(is_so: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, f"waited in vain for: {what}"
        time.sleep(0.05)


def plant(url: str) -> Known:
    """Make files, and batches that have ended in every way that needs no waiting.

    It shows as well that the server does its work.
    """
    with httpx2.Client(
        base_url=f"{url}/v1", headers={"authorization": f"Bearer {KEY}"}, timeout=30
    ) as http:

        def upload(content: str) -> str:
            files = {"file": ("in.jsonl", content.encode())}
            answer = http.post("/files", data={"purpose": "batch"}, files=files)
            return answer.raise_for_status().json()["id"]

        def run(file_id: str, *, to: str) -> dict[str, Any]:
            body = {"input_file_id": file_id, "endpoint": CHAT}
            batch = http.post("/batches", json=body).raise_for_status().json()
            path = f"/batches/{batch['id']}"
            if to == "cancelled":
                http.post(f"{path}/cancel").raise_for_status()
            _until(lambda: http.get(path).json()["status"] == to, f"{path} to be {to}")
            return http.get(path).json()

        good = upload(_line("a") + _line("b"))
        faulty = upload('{"custom_id": "a"}\n')
        batches = [
            run(good, to="completed"),
            run(faulty, to="failed"),
            run(good, to="cancelled"),
        ]
        return Known(
            inputs=[good, faulty],
            files=[good, batches[0]["output_file_id"]],
            batches=[batch["id"] for batch in batches],
        )


def _line(custom_id: str) -> str:
    body = {"model": "sim", "messages": [{"role": "user", "content": "Hello."}]}
    line = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}
    return json.dumps(line) + "\n"


def run_schemathesis(
    url: str, known: Known, options: Sequence[str], *, is_quiet: bool = True
) -> None:
    """Run Schemathesis against a server, with all phases and checks.

    Args:
        url: The server's address, without a path.
        options: More options of `schemathesis run`.
        is_quiet: Whether to say nothing unless something is found.

    Raises:
        AssertionError: Something was found; the message is what was printed, if anything.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "schemathesis.toml"
        text = (ROOT / "tests" / "schemathesis.toml").read_text()
        for name in ("inputs", "files", "batches"):
            text += f"\n[dictionaries.{name}]\nvalues = {json.dumps(getattr(known, name))}\n"
        config.write_text(text)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config)),
                *("run", f"{url}/openapi.json", *_ALL, *options),
            ],
            cwd=ROOT,
            env={**os.environ, "PENSTOCK_FUZZ_KEY": KEY, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if is_quiet else None,
            stderr=subprocess.STDOUT if is_quiet else None,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", help="Of a run that is to be repeated.")
    asked = parser.parse_args()
    options = ["--max-time", str(round(asked.minutes * 60))]
    if asked.seed:
        options += ["--seed", asked.seed]
    with tempfile.TemporaryDirectory() as name, served(Path(name)) as url:
        try:
            run_schemathesis(url, plant(url), options, is_quiet=False)
        except AssertionError:
            return 1
        plant(url)
        print("The server still does its work.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
