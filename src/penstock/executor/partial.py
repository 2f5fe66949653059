"""The results that a batch has so far, read from its segments while it runs."""

import asyncio
from collections.abc import AsyncIterator, Iterator

from penstock.blobs.segments import Kind, Segments
from penstock.errors import StorageUnavailable
from penstock.model import FINAL, Batch
from penstock.store.base import Store


async def in_thread(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Iterate in a thread, one piece ahead of the caller."""

    def take() -> bytes | None:
        return next(pieces, None)

    ahead = asyncio.ensure_future(asyncio.to_thread(take))
    try:
        while (piece := await ahead) is not None:
            ahead = asyncio.ensure_future(asyncio.to_thread(take))
            yield piece
    finally:
        if not ahead.done():  # what it reads from must not be closed under it
            await asyncio.wait({ahead})
        if not ahead.cancelled():
            ahead.exception()


class PartialResults:
    """Reads what workers have written."""

    def __init__(self, *, store: Store, segments: Segments) -> None:
        self._store = store
        self._segments = segments

    async def stream(self, batch: Batch) -> AsyncIterator[bytes]:
        """The result lines of a batch that is not final, good and bad, in input order.

        Pieces of whole lines, in bounded memory. Each line is one that will stand in the
        output or error file in the same words. Nothing at all if the batch ended meanwhile.

        Raises:
            StorageUnavailable: The batch ended after the first piece.
        """
        after, has_begun = -1, False
        while page := await self._store.get_slices(batch.id, after=after):
            for piece in page:
                replies = await asyncio.to_thread(self._segments.read, batch.id, piece.index)
                with replies:
                    walk = replies.iter_pieces(Kind.OUTPUT, Kind.ERROR)
                    async for lines in in_thread(walk):
                        has_begun = True
                        yield lines
            after = page[-1].index
        if has_begun and (await self._store.get_batch(batch.id)).status in FINAL:
            # Segments go when a batch ends, so this may lack lines that it should have.
            raise StorageUnavailable("The batch ended while its results were read; ask again.")
