"""A process that runs the engine on PostgreSQL, for tests to stall and kill.

    python -m tests.engine_process URL HEARTBEAT_TIMEOUT_S

It does `validate` jobs: at once, for 20 ms if their ID begins with `brief`, and if it begins
with `slow` for as long as they are not told to stop. Each line that it prints is a word, a
job's ID and the monotonic time of the machine; the words are `begun`, `told` (to stop) and
`ended`. SIGTERM stops it.
"""

import asyncio
import signal
import sys
import time

from penstock.engine.postgres import PostgresEngine
from penstock.model import JobKind
from penstock.telemetry import configure_logging


def say(word: str, job: str) -> None:
    sys.stdout.write(f"{word} {job} {time.monotonic()}\n")


async def do(job: str, stop: asyncio.Event) -> None:
    say("begun", job)
    sys.stdout.flush()
    if job.startswith("slow"):
        await stop.wait()
        say("told", job)
    elif job.startswith("brief"):
        await asyncio.sleep(0.02)
    say("ended", job)
    sys.stdout.flush()


async def main(url: str, heartbeat_timeout_s: float) -> None:
    configure_logging()
    engine = PostgresEngine(url, heartbeat_timeout_s=heartbeat_timeout_s)
    engine.handle(JobKind.VALIDATE, do)
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    running = asyncio.create_task(engine.run())
    await asyncio.wait(
        [running, asyncio.create_task(stopped.wait())], return_when=asyncio.FIRST_COMPLETED
    )
    await engine.stop()
    await running
    await engine.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2])))
