"""Processes that a demonstration starts, as a person would start them."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from penstock.errors import PenstockError

_PATIENCE_S = 60.0


class DemoFailed(PenstockError):
    """A part of a demonstration did not start."""


class Running:
    """A process that was started, until it is ended."""

    def __init__(self, popen: "subprocess.Popen[bytes]") -> None:
        self._popen = popen

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def has_ended(self) -> bool:
        return self._popen.poll() is not None

    def kill(self) -> None:
        """End it at once, as a loss of power would."""
        self._popen.send_signal(signal.SIGKILL)
        self._popen.wait()

    def end(self) -> None:
        """Ask it to end, and wait until it has."""
        self._popen.terminate()
        try:
            self._popen.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.kill()


@contextlib.contextmanager
def running(
    console: Console,
    what: str,
    arguments: list[str],
    *,
    log: Path,
    ready_url: str,
    module: str = "penstock",
    environment: Mapping[str, str] | None = None,
) -> Generator[Running]:
    """Run a command of this program, or of another Python module, until the block ends.

    Args:
        what: What it is, for the reader.
        log: Where what it prints is kept.
        ready_url: Answers once it is ready.
        environment: Variables beside those of this process.

    Raises:
        DemoFailed: It did not start; the message says what it printed.
    """
    shown = escape(shlex.join([module, *arguments]))
    console.print(f"[bold]{what}:[/] {shown}", soft_wrap=True)
    with log.open("w") as output:
        process = Running(
            subprocess.Popen(  # noqa: S603  (this very program)
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **(environment or {})},
            )
        )
    try:
        _wait_until_ready(process, f"{module} {arguments[0]}", ready_url, log)
        yield process
    finally:
        process.end()


def _wait_until_ready(process: Running, name: str, url: str, log: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not _answers(url):
        if process.has_ended or time.monotonic() > deadline:
            raise DemoFailed(f"`{name}` did not start: {_tail(log)}")
        time.sleep(0.05)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):  # noqa: S310  (http on loopback)
            return True
    except (urllib.error.URLError, OSError):
        return False


def _tail(log: Path) -> str:
    return log.read_text().strip()[-500:] or "it printed nothing."


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
