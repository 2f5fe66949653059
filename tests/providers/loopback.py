"""A server on a free port of loopback: what all that stand for providers are."""

import asyncio
import contextlib
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route


class LoopbackServer(ABC):
    """Answers while its `async with` block runs."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.root_url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    @abstractmethod
    def make_routes(self) -> Sequence[Route]:
        """What it answers."""

    async def __aenter__(self) -> Self:
        config = uvicorn.Config(
            Starlette(routes=list(self.make_routes())),
            log_level="critical",
            lifespan="off",
            access_log=False,
        )
        self._server = uvicorn.Server(config)
        # Signals are for the tests.
        self._server.capture_signals = contextlib.nullcontext
        self._task = asyncio.create_task(self._server.serve([self._socket]))
        while not self._server.started:
            await asyncio.sleep(0.005)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        await self._task
        self._socket.close()
