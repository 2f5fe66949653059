"""The contract of whoever hands out work.

Jobs carry an ID and nothing else: what is to be done stands in the store. A job is handed to
one worker at a time and may be handed out again after a crash, so handlers are idempotent.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from penstock.model import Job, JobKind

Handler = Callable[[str, asyncio.Event], Awaitable[None]]
"""Does a job. Gets the job's ID and an event that is set when the job was cancelled, or when
another worker has taken it over; a handler may answer by ending early. An exception is logged,
and the job is taken as done: what is left undone is found in the store by whoever looks
next."""


class Engine(Protocol):
    """Hands jobs to handlers."""

    def handle(self, kind: JobKind, handler: Handler) -> None:
        """Say who does jobs of `kind`. Only before `run`."""
        ...

    async def enqueue(self, jobs: Sequence[Job], *, connection: object | None = None) -> None:
        """Take over jobs.

        A job of the same kind and ID that waits already is not taken twice; it becomes due
        when the first of the two is. One that is being done is: the new one, of several the
        one due first, is handed out after it.

        Args:
            connection: The database connection whose open transaction the jobs belong to;
                None, or an engine without transactions: they are taken at once.
        """
        ...

    async def cancel(self, jobs: Sequence[Job]) -> None:
        """Take back jobs that wait, and set the event of those that are being done, whoever
        does them."""
        ...

    async def run(self) -> None:
        """Hand out jobs until `stop` is called."""
        ...

    async def stop(self) -> None:
        """Hand out nothing more, and wait until all that is being done has ended."""
        ...
