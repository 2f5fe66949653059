"""A real inference engine with a tiny model: `transformers serve` on a free port.

It runs in an environment of its own, which `./dev test-real-model` makes.
"""

import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from benchmarks.harness import free_port
from openai import OpenAI

from .make_model import make_model

PROGRAM = Path(__file__).parents[2] / ".venv-tools/real-model/bin/transformers"
START_S = 120.0
STOP_S = 15.0
MODEL = "tiny"
"""The only model that the engine knows; it refuses others with 400."""


@dataclass(slots=True)
class Engine:
    url: str
    """Without `/v1`."""
    log: Path

    def requests(self) -> int:
        """How many requests it began to work on; those it refused do not count."""
        return self.log.read_text().count("[Request received]")


@pytest.fixture(scope="module", autouse=True)
def no_settings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("PENSTOCK_"):
                patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if not PROGRAM.exists():
        pytest.fail("The engine is not installed; run ./dev test-real-model.", pytrace=False)
    directory = tmp_path_factory.mktemp("engine")
    make_model(directory / MODEL)
    with run_engine(directory) as engine:
        yield engine


@pytest.fixture(scope="session")
def model(engine: Engine) -> Iterator[OpenAI]:
    """The engine without anything in between."""
    with OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@contextmanager
def run_engine(directory: Path) -> Iterator[Engine]:
    """Serve the model of `directory` until the end of the block."""
    (directory / "hub/hub").mkdir(parents=True)  # /v1/models answers 500 without it
    port = free_port()
    engine = Engine(f"http://127.0.0.1:{port}", directory / "engine.log")
    with engine.log.open("w") as log:
        process = subprocess.Popen(
            # The model's name is also its path, hence the working directory.
            [PROGRAM, "serve", MODEL, "--host", "127.0.0.1", "--port", str(port)],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={
                **os.environ,
                "HF_HOME": str(directory / "hub"),
                "HF_HUB_OFFLINE": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "CUDA_VISIBLE_DEVICES": "",  # the same on every machine
            },
        )
    try:
        wait_until_up(engine, process)
        yield engine
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_up(engine: Engine, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{engine.url}/v1/models", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"The engine did not start:\n{engine.log.read_text()[-4000:]}", pytrace=False)
