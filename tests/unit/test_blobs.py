"""Blobs in a folder: the contract, and what is a disk's own."""

import asyncio
import errno
import os
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import obstore
import pytest
from obstore.exceptions import GenericError

from penstock.blobs.folder import FolderBlobs
from penstock.errors import StorageUnavailable
from penstock.testing.blobs import LARGE, MB, BlobContract, chunks_of
from tests.disks import small_disk


class RawFolder:
    """The files themselves."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def get(self, key: str) -> bytes | None:
        path = self._root / key
        return path.read_bytes() if path.exists() else None

    def set(self, key: str, data: bytes) -> None:
        path = self._root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def everything(self) -> list[str]:
        files = (path for path in self._root.rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self._root)) for path in files)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "blobs"


@pytest.fixture
def blobs(folder: Path) -> FolderBlobs:
    return FolderBlobs(folder)


@pytest.fixture
def raw(folder: Path, blobs: FolderBlobs) -> RawFolder:
    return RawFolder(folder)


class TestContract(BlobContract):
    pass


def test_the_folder_is_made_and_may_be_there_already(folder: Path) -> None:
    FolderBlobs(folder)
    FolderBlobs(folder)

    assert folder.is_dir()


async def test_a_full_disk_is_told_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with small_disk(tmp_path, bytes=2 * MB) as disk:
        blobs = FolderBlobs(disk.path / "blobs")
        raw = RawFolder(disk.path / "blobs")

        with pytest.raises(StorageUnavailable) as told:
            await blobs.put("files/a", chunks_of(LARGE, LARGE))

        assert raw.everything() == []
        assert str(told.value).startswith("The storage did not take a file: ")
        assert "\n" not in str(told.value)
        assert await blobs.put("files/b", chunks_of(b"abc")) == 3
        assert raw.everything() == ["files/b"]


async def test_a_put_cancelled_at_its_last_moment_leaves_nothing(
    blobs: FolderBlobs, raw: RawFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    sync = os.fsync

    def slow_sync(descriptor: int) -> None:
        begun.set()
        assert go_on.wait(10)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow_sync)
    putting = asyncio.create_task(blobs.put("files/a", chunks_of(b"abc")))
    assert await asyncio.to_thread(begun.wait, 10)
    putting.cancel()
    go_on.set()

    with pytest.raises(asyncio.CancelledError):
        await putting
    assert raw.everything() == []


async def test_a_disk_that_fails_at_the_last_moment_leaves_nothing(
    blobs: FolderBlobs, raw: RawFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_sync(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken_sync)

    with pytest.raises(StorageUnavailable, match="Input/output error"):
        await blobs.put("files/a", chunks_of(b"abc"))
    assert raw.everything() == []


async def test_what_a_dead_process_left_is_deleted_and_blobs_are_kept(
    blobs: FolderBlobs, raw: RawFolder
) -> None:
    await blobs.put("files/a", chunks_of(b"abc"))
    raw.set("files/b#1", b"half a bl")

    keys = [key async for key in blobs.iter_keys("files")]
    blobs.delete_leftovers(time.time() - 60)
    assert raw.everything() == ["files/a", "files/b#1"]
    blobs.delete_leftovers()

    assert keys == ["files/a"]
    assert raw.everything() == ["files/a"]


@pytest.mark.parametrize("way", ["put", "put_made"])
async def test_a_name_that_cannot_be_synced_leaves_nothing(
    blobs: FolderBlobs, raw: RawFolder, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    def fail(self: FolderBlobs, key: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(FolderBlobs, "_sync", fail)
    with pytest.raises(StorageUnavailable, match="did not take a file"):
        if way == "put":
            await blobs.put("files/a", chunks_of(b"abc"))
        else:
            await blobs.put_made("files/a", iter([[b"abc"]]))

    assert raw.everything() == []


async def test_keys_that_cannot_be_listed_are_told(
    blobs: FolderBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> AsyncIterator[list[dict[str, str]]]:
        raise GenericError("too many open files")
        yield []

    monkeypatch.setattr(obstore, "list", fail)
    with pytest.raises(StorageUnavailable, match="too many open files"):
        [key async for key in blobs.iter_keys("files")]
