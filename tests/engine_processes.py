"""Processes of `tests.engine_process`, and what they say."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 60.0


@dataclass
class EngineProcess:
    """One process, and what it has said so far."""

    process: asyncio.subprocess.Process
    said: list[tuple[str, str, float]] = field(default_factory=list)
    """Word, job and time."""
    errors: bytes = b""

    def jobs(self, word: str) -> list[str]:
        return [job for said, job, _ in self.said if said == word]

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    async def stop(self) -> int:
        """End in good order.

        Returns:
            The exit code.
        """
        self._signal(signal.SIGTERM)
        async with asyncio.timeout(TIMEOUT_S):
            return await self.process.wait()

    async def read(self) -> None:
        """Take down what it says until it ends."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        errors = asyncio.create_task(self.process.stderr.read())
        async for line in self.process.stdout:
            word, job, at = line.decode().split()
            self.said.append((word, job, float(at)))
        self.errors = await errors

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)


@asynccontextmanager
async def engine_process(
    url: str, *, heartbeat_timeout_s: float = 20.0
) -> AsyncGenerator[EngineProcess]:
    """Run one; it is killed at the end if it has not ended."""
    arguments = [sys.executable, "-m", "tests.engine_process", url, str(heartbeat_timeout_s)]
    process = await asyncio.create_subprocess_exec(
        *arguments,
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    engine = EngineProcess(process)
    reading = asyncio.create_task(engine.read())
    try:
        yield engine
    finally:
        engine.kill()
        await reading
        await process.wait()


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not is_so():
            await asyncio.sleep(0.01)
