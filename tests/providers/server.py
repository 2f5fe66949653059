"""What the servers that stand for providers have in common: a port, and what goes wrong.

A subclass names its routes, its key and how it says an error. What goes wrong on the way is
decided by `spoil`: each trouble answers, or spoils, one request to its route.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tests.providers.loopback import LoopbackServer
from tests.providers.openai_server import Trouble

Handle = Callable[[Request], Awaitable[Response]]


class ProviderServer(LoopbackServer):
    """The server, on a free port of loopback, while its `async with` block runs."""

    base_path = "/v1"

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        """The routes that were asked, in order."""
        self.is_down = False
        """Whether every call is answered with 503."""
        self._troubles: dict[str, list[Trouble]] = {}
        self.base_url = self.root_url + self.base_path

    # What a subclass says

    def routes(self) -> Mapping[str, Handle]:
        """What answers each route, such as `GET /v1/files/{id}`."""
        raise NotImplementedError

    def is_let_in(self, request: Request) -> bool:
        """Whether a request has the key."""
        raise NotImplementedError

    def error(
        self, status: int, told: str, headers: Mapping[str, str] | None = None
    ) -> Response:
        raise NotImplementedError

    # What tests do

    def spoil(self, route: str, *troubles: Trouble) -> None:
        """Let the next requests to a route go wrong, one by one."""
        self._troubles.setdefault(route, []).extend(troubles)

    def make_routes(self) -> list[Route]:
        return [
            Route(path, self._guard(name, handle), methods=[method])
            for name, handle in self.routes().items()
            for method, _, path in [name.partition(" ")]
        ]

    def _guard(self, name: str, handle: Handle) -> Handle:
        async def guarded(request: Request) -> Response:
            self.calls.append(name)
            waiting = self._troubles.get(name)
            trouble = waiting.pop(0) if waiting else Trouble()
            if not self.is_let_in(request):
                return self.error(401, f"Wrong key: {dict(request.headers)}.")
            if self.is_down or trouble.status:
                async for _ in request.stream():
                    pass
                return self.error(trouble.status or 503, "Not now.", trouble.headers)
            response = await handle(request)
            if not (trouble.is_lost or trouble.is_cut):
                return response
            whole = bytes(response.body)
            half = b"" if trouble.is_lost else whole[: len(whole) // 2]
            length = str(max(len(whole), 1))
            return StreamingResponse(_cut(half), headers={"Content-Length": length})

        return guarded


async def read_form(request: Request) -> tuple[dict[str, str], str, bytes]:
    """The fields of a form, and the name and content of its one file."""
    async with request.form() as form:
        file = form["file"]
        assert not isinstance(file, str)
        fields = {name: value for name, value in form.items() if isinstance(value, str)}
        return fields, str(file.filename), await file.read()


def prompt_of(body: Mapping[str, Any]) -> str:
    """The last thing that the user says, whether it is a text or comes in parts."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


async def _cut(data: bytes) -> AsyncIterator[bytes]:
    if data:
        yield data
    raise ConnectionResetError
