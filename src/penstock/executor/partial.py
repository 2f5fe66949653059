"""The results that a batch has so far, read from its segments while it runs."""

import asyncio
from collections.abc import AsyncIterator, Iterator

from penstock.blobs.segments import Kind, Segments, SliceReplies
from penstock.errors import StorageUnavailable
from penstock.model import FINAL, Batch, BatchId, Slice
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


async def iter_slices(store: Store, batch_id: BatchId) -> AsyncIterator[Slice]:
    """All slices of a batch, in input order."""
    after = -1
    while page := await store.get_slices(batch_id, after=after):
        for piece in page:
            yield piece
        after = page[-1].index


async def iter_blocks(store: Store, batch_id: BatchId) -> AsyncIterator[list[Slice]]:
    """The slices of a batch in input order, those of one range of the input together."""
    block: list[Slice] = []
    async for piece in iter_slices(store, batch_id):
        if block and block[0].start != piece.start:
            yield block
            block = []
        block.append(piece)
    if block:
        yield block


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
        has_begun = False
        async for block in iter_blocks(self._store, batch.id):
            parts = [
                await asyncio.to_thread(self._segments.read, batch.id, piece.index)
                for piece in block
            ]
            with SliceReplies.of_all(parts) as replies:
                walk = replies.iter_pieces(Kind.OUTPUT, Kind.ERROR)
                async for lines in in_thread(walk):
                    has_begun = True
                    yield lines
        if has_begun and (await self._store.get_batch(batch.id)).status in FINAL:
            # Segments go when a batch ends, so this may lack lines that it should have.
            raise StorageUnavailable("The batch ended while its results were read; ask again.")
