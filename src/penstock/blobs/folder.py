"""Blobs in a folder.

A blob is written under a temporary name and renamed when it is whole; obstore removes the
temporary file when the writing fails or is cancelled. What a killed process leaves behind is
deleted by `delete_leftovers`.
"""

import asyncio
import os
import secrets
import threading
from collections.abc import AsyncIterable, AsyncIterator, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore

from penstock.blobs.base import Piece, check_by_trial
from penstock.errors import NotFound, StorageUnavailable

if TYPE_CHECKING:
    from obstore import ObjectMeta

PIECE_BYTES = 1 << 20
"""How much is read or written at once."""
_PARTS_IN_FLIGHT = 2
_SYNC_BYTES = 16 << 20
_MOST_PIECES = 1024
"""How many pieces the system writes at once; IOV_MAX."""


class FolderBlobs:
    """Keeps blobs as files below `root`, which is made if it is not there."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._root = root
        self._store = LocalStore(root, mkdir=True)
        self._looking = threading.Lock()

    def look(self, *, wants_room: bool) -> None:
        """See whether the folder can be used, without writing to it. For a thread: a disk that
        hangs holds it up, and only one of those that ask.

        Args:
            wants_room: Whether it must have room.

        Raises:
            StorageUnavailable: It cannot be used.
        """
        if not self._looking.acquire(blocking=False):
            raise StorageUnavailable(
                f"The folder {self._root} does not answer; see whether its disk is there."
            )
        try:
            self._look(wants_room=wants_room)
        finally:
            self._looking.release()

    def _look(self, *, wants_room: bool) -> None:
        try:
            disk = os.statvfs(self._root)
        except OSError as error:
            raise StorageUnavailable(
                f"The folder {self._root} cannot be reached: {error.strerror}; see whether its "
                "disk is there."
            ) from error
        if not os.access(self._root, os.R_OK | os.W_OK | os.X_OK):
            raise StorageUnavailable(
                f"The folder {self._root} cannot be written to; this process must be allowed "
                "to read and write there, and its disk must take writes."
            )
        free = disk.f_bfree if os.geteuid() == 0 else disk.f_bavail
        if wants_room and disk.f_blocks and not free:
            raise StorageUnavailable(
                f"The disk of {self._root} is full; make room there, then work goes on."
            )

    async def put(self, key: str, chunks: AsyncIterator[bytes]) -> int:
        size = 0
        source_error: Exception | None = None

        async def counted() -> AsyncIterator[bytes]:
            nonlocal size, source_error
            try:
                async for chunk in chunks:
                    size += len(chunk)
                    yield chunk
            except Exception as error:
                source_error = error
                raise

        try:
            await obstore.put_async(
                self._store,
                key,
                counted(),
                chunk_size=PIECE_BYTES,
                max_concurrency=_PARTS_IN_FLIGHT,
                use_multipart=True,
            )
        except (BaseError, OSError) as error:
            if source_error is not None:
                raise source_error from None
            raise StorageUnavailable(
                f"The storage did not take a file: {_cause(error)}."
            ) from error
        try:
            await asyncio.to_thread(self._sync, key)
        except asyncio.CancelledError:
            (self._root / key).unlink(missing_ok=True)
            raise
        except OSError as error:
            (self._root / key).unlink(missing_ok=True)
            raise StorageUnavailable(
                f"The storage did not take a file: {_cause(error)}."
            ) from error
        return size

    async def put_made(self, key: str, pieces: Iterator[Sequence[Piece]]) -> int:
        # Each piece would hop to the loop, to obstore's threads and back; here it stays in one.
        is_given_up = threading.Event()
        work = asyncio.to_thread(self._put_made, key, pieces, is_given_up)
        writing = asyncio.ensure_future(work)
        try:
            return await asyncio.shield(writing)
        except asyncio.CancelledError:
            is_given_up.set()
            await asyncio.wait({writing})
            if not writing.exception():  # it was whole by then
                (self._root / key).unlink(missing_ok=True)
            raise

    def _put_made(
        self, key: str, pieces: Iterator[Sequence[Piece]], is_given_up: threading.Event
    ) -> int:
        path = self._root / key
        part = path.with_name(f"{path.name}#{secrets.token_hex(4)}")
        size = 0
        try:
            with _writing():
                path.parent.mkdir(parents=True, exist_ok=True)
                file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                with _Syncer(file) as syncer:
                    for some in pieces:
                        if is_given_up.is_set():
                            raise StorageUnavailable("The writing was given up.")
                        with _writing():
                            size += _write_all(file, some)
                            syncer.note(size)
                with _writing():
                    syncer.finish()
                    os.fsync(file)
            finally:
                os.close(file)
            with _writing():
                part.rename(path)
                try:
                    self._sync(key)
                except OSError:
                    path.unlink(missing_ok=True)
                    raise
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return size

    async def size(self, key: str) -> int:
        with _reading(key):
            return (await obstore.head_async(self._store, key))["size"]

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        if end <= start:
            return b""
        with _reading(key):
            data = await obstore.get_range_async(self._store, key, start=start, end=end)
        return data.to_bytes()

    async def stream(
        self, key: str, start: int = 0, end: int | None = None
    ) -> AsyncIterator[bytes]:
        stop = await self.size(key) if end is None else end
        ahead = None
        try:
            while start < stop or ahead is not None:
                data = await ahead if ahead is not None else b""
                ahead = None
                if start < stop:
                    # The next piece is read while the caller works on this one.
                    following = min(start + PIECE_BYTES, stop)
                    ahead = asyncio.ensure_future(self.get_range(key, start, following))
                    start = following
                if data:
                    yield data
        finally:
            if ahead is not None:
                ahead.cancel()

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            with _reading(key):
                try:
                    await obstore.delete_async(self._store, key)
                except FileNotFoundError:
                    continue

    async def iter_keys(
        self, prefix: str, *, written_before: float | None = None
    ) -> AsyncIterator[str]:
        before = float("inf") if written_before is None else written_before
        pages: AsyncIterable[Sequence[ObjectMeta]] = obstore.list(self._store, prefix)  # pyright: ignore[reportUnknownMemberType]
        walk = aiter(pages)
        while True:
            with _reading(prefix):
                page = await anext(walk, None)
            if page is None:
                return
            for entry in page:
                if entry["last_modified"].timestamp() < before:
                    yield entry["path"]

    async def check(self) -> None:
        await check_by_trial(self)

    def delete_leftovers(self, untouched_since: float | None = None) -> None:
        """Delete the temporary files of writes that a dead process did not end.

        Args:
            untouched_since: Only those to which nothing was written since this time. None is
                for a folder that this process has to itself, before its first `put`.
        """
        before = float("inf") if untouched_since is None else untouched_since
        for path in self._root.rglob("*#*"):
            with suppress(FileNotFoundError):  # it was renamed or deleted meanwhile
                if path.stat().st_mtime < before:
                    path.unlink()

    def _sync(self, key: str) -> None:
        """Make a renamed file survive a loss of power."""
        path = self._root / key
        # The folder of the first file in it may be new as well.
        for target in (path, path.parent, self._root):
            descriptor = os.open(target, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


class _Syncer:
    """Syncs a file now and then while it is written, in a thread beside it: the disk works
    meanwhile, and the sync at the end finds little to do."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._threads = ThreadPoolExecutor(1, "penstock-sync")
        self._syncs: list[Future[None]] = []
        self._asked = 0

    def note(self, size: int) -> None:
        """Hear how much is written."""
        is_busy = bool(self._syncs) and not self._syncs[-1].done()
        if size - self._asked >= _SYNC_BYTES and not is_busy:
            self._asked = size
            self._syncs.append(self._threads.submit(os.fdatasync, self._file))

    def finish(self) -> None:
        """
        Raises:
            OSError: A sync has failed; the system tells so only once.
        """
        for sync in self._syncs:
            sync.result()

    def __enter__(self) -> "_Syncer":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()


def _write_all(file: int, pieces: Sequence[Piece]) -> int:
    """Write pieces one after another; the number of bytes."""
    size = 0
    for start in range(0, len(pieces), _MOST_PIECES):
        some = [memoryview(piece) for piece in pieces[start : start + _MOST_PIECES]]
        while some:
            written = os.writev(file, some)
            size += written
            while some and written >= len(some[0]):
                written -= len(some.pop(0))
            if some:
                some[0] = some[0][written:]
    return size


@contextmanager
def _writing() -> Generator[None]:
    try:
        yield
    except OSError as error:
        message = f"The storage did not take a file: {_cause(error)}."
        raise StorageUnavailable(message) from error


@contextmanager
def _reading(key: str):
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"There is no blob '{key}'.") from error
    except (BaseError, OSError) as error:
        raise StorageUnavailable(f"The storage did not answer: {_cause(error)}.") from error


def _cause(error: BaseException) -> str:
    """The first line of an error, without the paths that obstore adds below it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
