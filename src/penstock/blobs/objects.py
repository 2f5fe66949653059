"""Blobs in a folder, through obstore, which speaks to object stores alike.

A blob is written under a temporary name and renamed when it is whole; obstore removes the
temporary file when the writing fails or is cancelled. What a killed process leaves behind is
deleted by `delete_leftovers`.
"""

import asyncio
import os
import secrets
import threading
from collections.abc import AsyncIterable, AsyncIterator, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore

from penstock.errors import NotFound, StorageUnavailable

if TYPE_CHECKING:
    from obstore import ObjectMeta

PIECE_BYTES = 1 << 20
"""How much is read or written at once."""
_PARTS_IN_FLIGHT = 2


class ObjectBlobs:
    """Keeps blobs as files below `root`, which is made if it is not there."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._root = root
        self._store = LocalStore(root, mkdir=True)

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

    async def put_made(self, key: str, pieces: Iterator[bytes]) -> int:
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

    def _put_made(self, key: str, pieces: Iterator[bytes], is_given_up: threading.Event) -> int:
        path = self._root / key
        part = path.with_name(f"{path.name}#{secrets.token_hex(4)}")
        size = 0
        try:
            with _writing():
                path.parent.mkdir(parents=True, exist_ok=True)
                file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                for piece in pieces:
                    if is_given_up.is_set():
                        raise StorageUnavailable("The writing was given up.")
                    with _writing():
                        view = memoryview(piece)
                        while view:
                            view = view[os.write(file, view) :]
                    size += len(piece)
                with _writing():
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

    async def iter_keys(self, prefix: str) -> AsyncIterator[str]:
        pages: AsyncIterable[Sequence[ObjectMeta]] = obstore.list(self._store, prefix)  # pyright: ignore[reportUnknownMemberType]
        walk = aiter(pages)
        while True:
            with _reading(prefix):
                page = await anext(walk, None)
            if page is None:
                return
            for entry in page:
                yield entry["path"]

    def delete_leftovers(self) -> None:
        """Delete the temporary files of writes that a dead process did not end.

        Only for a folder that this process has to itself, and before its first `put`.
        """
        for path in self._root.rglob("*#*"):
            path.unlink(missing_ok=True)

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
