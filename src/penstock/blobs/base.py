"""The contract of bytes under a key.

Keys are slash-separated ASCII, chosen by Penstock and never by a client. A blob is written
once, whole, and never changed; whoever needs other bytes takes another key. So there is no
lock, no version and no create-if-absent, which not every object store has.
"""

import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Protocol

from penstock.errors import StorageUnavailable

Piece = bytes | memoryview


class Blobs(Protocol):
    """Keeps bytes under keys."""

    async def put(self, key: str, chunks: AsyncIterator[bytes]) -> int:
        """Store what `chunks` brings, in bounded memory.

        The blob appears when all of it is durable. If `chunks` raises, or the caller is
        cancelled, nothing is left behind and the error goes on to the caller.

        Returns:
            Its size in bytes.

        Raises:
            StorageUnavailable: The store is full or does not answer; nothing is left behind.
        """
        ...

    async def put_made(self, key: str, pieces: Iterator[Sequence[Piece]]) -> int:
        """Keep a blob whose pieces are made on the way, which happens in a thread. As `put`.

        Args:
            pieces: Some at a time; they are done with when the next are asked for.
        """
        ...

    async def size(self, key: str) -> int:
        """
        Raises:
            NotFound: There is no blob under this key.
        """
        ...

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        """The bytes from offset `start` up to, not including, `end`.

        Raises:
            NotFound: There is no blob under this key.
            StorageUnavailable: The store does not answer.
        """
        ...

    def stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """The bytes from `start` to `end` (None: to the last) in pieces of about 1 MiB.

        Raises:
            NotFound: There is no blob under this key; raised before the first piece.
        """
        ...

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete blobs. One that is not there is passed over."""
        ...

    def iter_keys(
        self, prefix: str, *, written_before: float | None = None
    ) -> AsyncIterator[str]:
        """The keys below `prefix`, in no particular order.

        Args:
            written_before: Only of blobs that appeared before this time, by the clock of
                where they lie.
        """
        ...

    async def check(self) -> None:
        """Write, read and delete a small blob under `check/`.

        Raises:
            StorageUnavailable: One of these does not work; the message says what to do.
        """
        ...


async def check_by_trial(blobs: Blobs) -> None:
    """What `check` does, wherever the blobs lie."""
    key, text = f"check/{secrets.token_hex(16)}", secrets.token_bytes(64)

    async def chunks() -> AsyncIterator[bytes]:
        yield text

    await blobs.put(key, chunks())
    read = await blobs.get_range(key, 0, len(text))
    await blobs.delete([key])
    if read != text:
        raise StorageUnavailable("The storage gave other bytes than it was given.")
