"""A provider that follows Anthropic's public reference of Message Batches, and misbehaves.

    async with AnthropicProvider() as provider:
        ...  # create and poll at provider.base_url
        provider.end(native_id)

It runs no model. A batch goes on only when the test says so. What a request gets is decided by
`behave`; what goes wrong on the way by `spoil`, as at `openai_server`. That it is like the real
one is shown by Anthropic's own client in `tests/clients/test_provider_servers.py`.

Source: https://platform.claude.com/docs/en/api/messages/batches, 25 November 2026.
"""

import json
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.providers.loopback import LoopbackServer
from tests.providers.openai_server import Trouble

KEY = "sk-ant-0123456789"
CREATE, LIST, GET = "POST /batches", "GET /batches", "GET /batches/{id}"
CANCEL, RESULTS = "POST /batches/{id}/cancel", "GET /batches/{id}/results"
DELETE = "DELETE /batches/{id}"
MESSAGE = "POST /messages"
VERSIONS = ("2023-06-01", "2026-10-21")
"""Of the API, <https://platform.claude.com/docs/en/api/versioning>."""
_CUSTOM_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_PARAMS = {"model", "max_tokens", "messages"}

Behave = Callable[[str, dict[str, Any]], dict[str, Any] | None]
"""The `result` of a request, by custom ID and params; None: it gets none."""


def message(text: str, **fields: Any) -> dict[str, Any]:
    """The result of a request that succeeded."""
    told = {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-4-5-20250929",
        "content": [{"type": "text", "text": text}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 3, "output_tokens": 2},
    }
    return {"type": "succeeded", "message": {**told, **fields}}


def errored(kind: str, told: str) -> dict[str, Any]:
    """The result of a request that failed."""
    error = {"type": kind, "message": told}
    return {"type": "errored", "error": {"type": "error", "error": error, "request_id": "r1"}}


def echo(custom_id: str, params: dict[str, Any]) -> dict[str, Any]:
    """Each last word of the user is its own answer."""
    content = params["messages"][-1]["content"]
    return message(content if isinstance(content, str) else content[-1]["text"])


class AnthropicProvider(LoopbackServer):
    """The server, on a free port of loopback."""

    def __init__(self, *, behave: Behave = echo) -> None:
        super().__init__()
        self.behave = behave
        self.batches: dict[str, dict[str, Any]] = {}
        """In the order of their creation: what was paid."""
        self.requests: dict[str, list[dict[str, Any]]] = {}
        self.calls: list[str] = []
        """The routes that were asked, in order."""
        self.extra_lines: list[bytes] = []
        """Added to the results of each batch that ends."""
        self._results: dict[str, bytes] = {}
        self._troubles: dict[str, list[Trouble]] = {}
        self.base_url = f"{self.root_url}/v1"

    def make_routes(self) -> list[Route]:
        root = "/v1/messages/batches"
        return [
            Route(root, self._create, methods=["POST"]),
            Route(root, self._list, methods=["GET"]),
            Route(f"{root}/{{id}}", self._get, methods=["GET"]),
            Route(f"{root}/{{id}}", self._delete, methods=["DELETE"]),
            Route(f"{root}/{{id}}/cancel", self._cancel, methods=["POST"]),
            Route(f"{root}/{{id}}/results", self._give_results, methods=["GET"]),
            Route("/v1/messages", self._message, methods=["POST"]),
            Route("/v1/models", self._models, methods=["GET"]),
        ]

    # What tests do

    def spoil(self, route: str, *troubles: Trouble) -> None:
        """Let the next requests to a route go wrong, one by one."""
        self._troubles.setdefault(route, []).extend(troubles)

    def end(self, native_id: str, *, only: int | None = None, rest: str = "expired") -> None:
        """Let a batch end.

        Args:
            only: How many of its requests were run; None: all.
            rest: What became of the others, `expired` or `canceled`.
        """
        batch, lines = self.batches[native_id], []
        counts = {"succeeded": 0, "errored": 0, "canceled": 0, "expired": 0, "processing": 0}
        for number, request in enumerate(self.requests[native_id]):
            is_run = only is None or number < only
            custom_id = request["custom_id"]
            got = self.behave(custom_id, request["params"]) if is_run else {"type": rest}
            if got is not None:
                counts[got["type"]] += 1
                lines.append(json.dumps({"custom_id": custom_id, "result": got}).encode())
        lines.reverse()  # the order is not the requests'
        self._results[native_id] = b"".join(line + b"\n" for line in lines + self.extra_lines)
        batch["processing_status"] = "ended"
        batch["ended_at"] = _now()
        batch["request_counts"] = counts
        batch["results_url"] = f"{self.base_url}/messages/batches/{native_id}/results"

    # The routes

    async def _serve(
        self, route: str, request: Request, work: Callable[[], Awaitable[Response]]
    ) -> Response:
        self.calls.append(route)
        waiting = self._troubles.get(route)
        trouble = waiting.pop(0) if waiting else Trouble()
        # The reference names the first, the official client sends the second since version 2.
        named = request.headers.get("x-api-key"), request.headers.get("authorization")
        if named[0] != KEY and f"Bearer {KEY}" != named[1]:
            return _error(401, "authentication_error", "invalid x-api-key")
        if request.headers.get("anthropic-version") not in VERSIONS:
            return _error(400, "invalid_request_error", "anthropic-version: header is required")
        if trouble.status:
            async for _ in request.stream():
                pass
            kind = "rate_limit_error" if trouble.status == 429 else "api_error"
            return _error(trouble.status, kind, "Not now.", trouble.headers)
        response = await work()
        if trouble.is_lost or trouble.is_cut:
            whole = bytes(response.body)
            half = b"" if trouble.is_lost else whole[: len(whole) // 2]
            return StreamingResponse(_cut(half), headers={"Content-Length": str(len(whole))})
        return response

    async def _create(self, request: Request) -> Response:
        async def work() -> Response:
            requests = (await request.json())["requests"]
            if fault := _fault(requests):
                return _error(400, "invalid_request_error", fault)
            native_id = f"msgbatch_{secrets.token_hex(12)}"
            now = datetime.now(UTC)
            counts = {"succeeded": 0, "errored": 0, "canceled": 0, "expired": 0}
            self.requests[native_id] = requests
            self.batches[native_id] = {
                "id": native_id,
                "type": "message_batch",
                "processing_status": "in_progress",
                "request_counts": {"processing": len(requests), **counts},
                "created_at": now.isoformat(),
                "expires_at": (now + timedelta(hours=24)).isoformat(),
                "ended_at": None,
                "archived_at": None,
                "cancel_initiated_at": None,
                "results_url": None,
            }
            return JSONResponse(self.batches[native_id])

        return await self._serve(CREATE, request, work)

    async def _list(self, request: Request) -> Response:
        async def work() -> Response:
            limit = int(request.query_params.get("limit", "20"))
            newest = list(reversed(self.batches.values()))
            if after := request.query_params.get("after_id"):
                ids = [batch["id"] for batch in newest]
                newest = newest[ids.index(after) + 1 :]
            page = newest[:limit]
            return JSONResponse(
                {
                    "data": page,
                    "has_more": len(newest) > limit,
                    "first_id": page[0]["id"] if page else None,
                    "last_id": page[-1]["id"] if page else None,
                }
            )

        return await self._serve(LIST, request, work)

    async def _get(self, request: Request) -> Response:
        async def work() -> Response:
            batch = self.batches.get(request.path_params["id"])
            return JSONResponse(batch) if batch else _not_found()

        return await self._serve(GET, request, work)

    async def _cancel(self, request: Request) -> Response:
        async def work() -> Response:
            batch = self.batches.get(request.path_params["id"])
            if batch is None:
                return _not_found()
            if batch["processing_status"] == "ended":
                return _error(400, "invalid_request_error", "It has ended.")
            batch["processing_status"] = "canceling"
            batch["cancel_initiated_at"] = _now()
            return JSONResponse(batch)

        return await self._serve(CANCEL, request, work)

    async def _delete(self, request: Request) -> Response:
        async def work() -> Response:
            native_id = request.path_params["id"]
            if native_id not in self.batches:
                return _not_found()
            if self.batches[native_id]["processing_status"] != "ended":
                return _error(400, "invalid_request_error", "It has not ended.")
            del self.batches[native_id]
            return JSONResponse({"id": native_id, "type": "message_batch_deleted"})

        return await self._serve(DELETE, request, work)

    async def _give_results(self, request: Request) -> Response:
        async def work() -> Response:
            data = self._results.get(request.path_params["id"])
            if data is None:
                return _not_found()
            return Response(data, media_type="application/x-jsonl")

        return await self._serve(RESULTS, request, work)

    async def _message(self, request: Request) -> Response:
        async def work() -> Response:
            got = self.behave("", await request.json()) or errored("api_error", "Nothing.")
            if got["type"] == "succeeded":
                return JSONResponse(got["message"])
            error = got["error"]["error"]
            return _error(400, error["type"], error["message"])

        return await self._serve(MESSAGE, request, work)

    async def _models(self, request: Request) -> Response:
        async def work() -> Response:
            model = {"type": "model", "id": "claude-sonnet-4-5", "display_name": "Claude"}
            return JSONResponse({"data": [model], "has_more": False})

        return await self._serve("GET /models", request, work)


def _fault(requests: list[dict[str, Any]]) -> str | None:
    """What is wrong with the requests of a batch; of their params only what all need."""
    ids = [request["custom_id"] for request in requests]
    if not requests or len(set(ids)) != len(ids):
        return "requests: custom_id must be unique"
    for number, request in enumerate(requests):
        if not _CUSTOM_ID.fullmatch(request["custom_id"]):
            return f"requests.{number}.custom_id: String should match pattern"
        if missing := _PARAMS - request["params"].keys():
            return f"requests.{number}.params.{min(missing)}: Field required"
    return None


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _error(
    status: int, kind: str, told: str, headers: Mapping[str, str] | None = None
) -> Response:
    body = {"type": "error", "error": {"type": kind, "message": told}, "request_id": "req_1"}
    return JSONResponse(body, status_code=status, headers=headers)


def _not_found() -> Response:
    return _error(404, "not_found_error", "Not found.")


async def _cut(data: bytes) -> AsyncIterator[bytes]:
    if data:
        yield data
    raise ConnectionResetError
