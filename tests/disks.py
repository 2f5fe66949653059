"""Disks that are too small, for tests of what happens when one is full.

with small_disk(tmp_path, bytes=64 << 10) as disk:
    disk.fill()
    ...  # nothing can be written below disk.path
    disk.make_room()
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class SmallDisk:
    """A file system of its own, in memory."""

    path: Path

    @property
    def _ballast(self) -> Path:
        return self.path / "ballast"

    def fill(self, *, leave: int = 0) -> None:
        """Take all room, but for about `leave` bytes."""
        with self._ballast.open("ab", buffering=0) as file:
            with contextlib.suppress(OSError):
                while file.write(b"\0" * 4096):
                    pass
            if leave:
                file.truncate(max(file.tell() - leave, 0))

    def make_room(self) -> None:
        """Give the room back that `fill` took."""
        self._ballast.unlink()


@contextlib.contextmanager
def small_disk(folder: Path, *, bytes: int) -> Iterator[SmallDisk]:
    """Mount a small disk below `folder`; skips the test where that is not allowed."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a small disk")
    path = folder / "small-disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={bytes}", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not allow to mount a small disk")
    try:
        yield SmallDisk(path)
    finally:
        # Lazily, for a test that failed may still have a file open there.
        subprocess.run(["umount", "-l", str(path)], capture_output=True, check=True)
