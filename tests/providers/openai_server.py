"""A provider that follows OpenAI's public reference of files and batches, and misbehaves.

    async with OpenAIProvider() as provider:
        ...  # upload, create and poll at provider.base_url
        provider.end(native_id)

It runs no model. A batch goes on only when the test says so, or by itself with `is_quick`. What
a line gets is decided by `behave`; what goes wrong on the way by `troubles`: each answers, or
spoils, one request to its route.
"""

import json
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.providers.loopback import LoopbackServer
from tests.upstreams import chat_completion

KEY = "sk-provider-0123456789"
UPLOAD, CREATE, LIST, GET, CANCEL = (
    "POST /files",
    "POST /batches",
    "GET /batches",
    "GET /batches/{id}",
    "POST /batches/{id}/cancel",
)
CONTENT = "GET /files/{id}/content"
ENDPOINTS = ("/v1/chat/completions", "/v1/embeddings", "/v1/responses", "/v1/completions")
FINAL = ("completed", "failed", "expired", "cancelled")

Behave = Callable[[str, dict[str, Any]], tuple[int, Any] | None]
"""Status and body for a line, by custom ID and request; None: it gets neither."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What goes wrong with one request."""

    status: int = 0
    """Answered instead; 0: the request is carried out."""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    is_lost: bool = False
    """The request is carried out, and the connection cut before the answer."""
    is_cut: bool = False
    """Only the first half of the answer comes."""


def echo(custom_id: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Each prompt is its own answer."""
    prompt = body["messages"][0]["content"] if "messages" in body else custom_id
    return 200, chat_completion(prompt)


class OpenAIProvider(LoopbackServer):
    """The server, on a free port of loopback.

    What compatible providers do otherwise, a subclass says (`tests.providers.dialects`).
    """

    prefix = "/v1"
    upload_path = "/files"
    chat_path = "/chat/completions"
    purpose = "batch"
    endpoints: tuple[str, ...] = ENDPOINTS
    windows: tuple[str, ...] = ("24h",)

    def __init__(self, *, is_quick: bool = False, behave: Behave = echo) -> None:
        super().__init__()
        self.behave = behave
        self.is_quick = is_quick
        """Whether a batch is completed when it is first looked at."""
        self.files: dict[str, dict[str, Any]] = {}
        self.contents: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        """In the order of their creation: what was paid."""
        self.troubles: dict[str, list[Trouble]] = {}
        self.calls: list[str] = []
        """The routes that were asked, in order."""
        self.models_by_line: list[str] = []
        """What was named by lines that were sent one by one, in order."""
        self.extra_lines: list[bytes] = []
        """Added to the output file of each batch that ends."""
        self.lists_until: int | None = None
        """How many batches the list shows; None: all."""
        self.cancels_at_once = True
        self.is_down = False
        self.on_call: Callable[[str], None] | None = None
        """Called with `before` or `after` and the route, as each is carried out; after it, but
        before the answer."""
        self.base_url = f"{self.root_url}{self.prefix}"

    def make_routes(self) -> list[Route]:
        at = self.prefix
        return [
            Route(f"{at}{self.upload_path}", self._upload, methods=["POST"]),
            Route(f"{at}/files", self._list_files, methods=["GET"]),
            Route(f"{at}/files/{{id}}", self._get_file, methods=["GET"]),
            Route(f"{at}/files/{{id}}", self._delete_file, methods=["DELETE"]),
            Route(f"{at}/files/{{id}}/content", self._content, methods=["GET"]),
            Route(f"{at}/batches", self._create, methods=["POST"]),
            Route(f"{at}/batches", self._list, methods=["GET"]),
            Route(f"{at}/batches/{{id}}", self._get, methods=["GET"]),
            Route(f"{at}/batches/{{id}}/cancel", self._cancel, methods=["POST"]),
            Route(f"{at}{self.chat_path}", self._chat, methods=["POST"]),
            Route(f"{at}/models", self._models, methods=["GET"]),
        ]

    # What a compatible provider may do otherwise

    def is_let_in(self, request: Request) -> bool:
        """Whether a request has the key."""
        return request.headers.get("authorization") == f"Bearer {KEY}"

    def refuse(self, request: Request) -> Response | None:
        """What is answered to a request that has not even that."""
        if self.is_let_in(request):
            return None
        return error(401, f"Incorrect API key: {request.headers.get('authorization')}.")

    def model_of(self, request: Request, body: dict[str, Any]) -> str:
        """Which model answers a line that is sent alone."""
        return body["model"]

    def show(self, batch: dict[str, Any]) -> Any:
        """A batch as it is shown."""
        return batch

    def show_created(self, batch: dict[str, Any]) -> Any:
        return self.show(batch)

    def show_page(self, page: list[dict[str, Any]], *, has_more: bool) -> Any:
        """A page of the list of batches."""
        return {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": has_more,
        }

    # What tests do

    def spoil(self, route: str, *troubles: Trouble) -> None:
        """Let the next requests to a route go wrong, one by one."""
        self.troubles.setdefault(route, []).extend(troubles)

    @property
    def native_ids(self) -> list[str]:
        return list(self.batches)

    def lines_of(self, native_id: str) -> list[dict[str, Any]]:
        """The requests of a batch."""
        data = self.contents[self.batches[native_id]["input_file_id"]]
        return [json.loads(text) for text in data.splitlines()]

    def end(
        self,
        native_id: str,
        status: str = "completed",
        *,
        only: int | None = None,
        faults: list[dict[str, Any]] | None = None,
    ) -> None:
        """Let a batch end.

        Args:
            only: How many of its lines were run; the others have an entry in the error file.
            faults: The batch's `errors`, if it failed: then nothing was run.
        """
        batch = self.batches[native_id]
        batch["status"] = status
        batch[f"{status}_at"] = int(time.time())
        if faults is not None:
            batch["errors"] = {"object": "list", "data": faults}
            return
        output: list[bytes] = []
        errors: list[bytes] = []
        for number, line in enumerate(self.lines_of(native_id)):
            if only is not None and number >= only:
                code = "batch_cancelled" if status == "cancelled" else "batch_expired"
                error = {"code": code, "message": "This request could not be executed."}
                errors.append(_result(line["custom_id"], error=error))
                continue
            got = self.behave(line["custom_id"], line["body"])
            if got is None:
                continue
            response = {"status_code": got[0], "request_id": "req_1", "body": got[1]}
            made = _result(line["custom_id"], response=response)
            (output if got[0] < 300 else errors).append(made)
        output += self.extra_lines
        output.reverse()  # the order is not the input's
        batch["request_counts"] |= {"completed": len(output), "failed": len(errors)}
        for name, lines in (("output_file_id", output), ("error_file_id", errors)):
            if lines:
                batch[name] = self._add_file(b"".join(lines), "batch_output", "out.jsonl")

    # The routes

    async def _serve(
        self, route: str, request: Request, work: Callable[[], Awaitable[Response]]
    ) -> Response:
        self.calls.append(route)
        if self.on_call is not None:
            self.on_call(f"before {route}")
        waiting = self.troubles.get(route)
        trouble = waiting.pop(0) if waiting else Trouble()
        if (refusal := self.refuse(request)) is not None:
            return refusal
        if self.is_down:
            return error(503, "The service is down.")
        if trouble.status:
            await _drain(request)
            return error(trouble.status, "Not now.", headers=trouble.headers)
        response = await work()
        if self.on_call is not None:
            self.on_call(f"after {route}")
        if trouble.is_lost:
            return StreamingResponse(_cut(b""), headers={"Content-Length": "100"})
        if trouble.is_cut:
            half = bytes(response.body)[: len(response.body) // 2]
            return StreamingResponse(
                _cut(half), headers={"Content-Length": str(len(response.body))}
            )
        return response

    async def _upload(self, request: Request) -> Response:
        async def work() -> Response:
            async with request.form() as form:
                file, purpose = form["file"], str(form["purpose"])
                assert not isinstance(file, str)
                data = await file.read()
            if purpose != self.purpose or not data:
                return error(400, "Invalid file format for Batch API. Must be .jsonl")
            file_id = self._add_file(data, purpose, str(file.filename))
            return JSONResponse(self.files[file_id])

        return await self._serve(UPLOAD, request, work)

    async def _create(self, request: Request) -> Response:
        async def work() -> Response:
            body = await request.json()
            if body["completion_window"] not in self.windows:
                return error(400, "Invalid value: 'completion_window'. Supported: '24h'.")
            if body["endpoint"] not in self.endpoints:
                return error(400, f"Invalid value: '{body['endpoint']}'.")
            if body["input_file_id"] not in self.files:
                return error(400, f"No such File object: {body['input_file_id']}")
            native_id = f"batch_{secrets.token_hex(16)}"
            now = int(time.time())
            self.batches[native_id] = {
                "id": native_id,
                "object": "batch",
                "endpoint": body["endpoint"],
                "errors": None,
                "input_file_id": body["input_file_id"],
                "completion_window": body["completion_window"],
                "status": "validating",
                "output_file_id": None,
                "error_file_id": None,
                "created_at": now,
                "in_progress_at": None,
                "expires_at": now + 86400,
                "request_counts": {"total": 0, "completed": 0, "failed": 0},
                "metadata": body.get("metadata"),
            }
            return JSONResponse(self.show_created(self.batches[native_id]))

        return await self._serve(CREATE, request, work)

    async def _list(self, request: Request) -> Response:
        async def work() -> Response:
            limit = int(request.query_params.get("limit", "20"))
            newest = list(reversed(self.batches.values()))
            if self.lists_until is not None:
                newest = newest[len(newest) - self.lists_until :]
            after = request.query_params.get("after")
            if after is not None:
                ids = [batch["id"] for batch in newest]
                newest = newest[ids.index(after) + 1 :]
            page = newest[:limit]
            return JSONResponse(self.show_page(page, has_more=len(newest) > limit))

        return await self._serve(LIST, request, work)

    async def _get(self, request: Request) -> Response:
        async def work() -> Response:
            batch = self.batches.get(request.path_params["id"])
            if batch is None:
                return error(404, "No batch found with that ID.")
            if self.is_quick and batch["status"] not in FINAL:
                self.end(batch["id"])
            return JSONResponse(self.show(batch))

        return await self._serve(GET, request, work)

    async def _cancel(self, request: Request) -> Response:
        async def work() -> Response:
            batch = self.batches.get(request.path_params["id"])
            if batch is None:
                return error(404, "No batch found with that ID.")
            if batch["status"] in FINAL:
                return error(409, f"Cannot cancel a batch with status '{batch['status']}'.")
            batch["status"] = "cancelling"
            if self.cancels_at_once:
                self.end(batch["id"], "cancelled", only=1)
            return JSONResponse(self.show(batch))

        return await self._serve(CANCEL, request, work)

    async def _list_files(self, request: Request) -> Response:
        async def work() -> Response:
            page = list(reversed(self.files.values()))
            return JSONResponse({"object": "list", "data": page, "has_more": False})

        return await self._serve("GET /files", request, work)

    async def _get_file(self, request: Request) -> Response:
        async def work() -> Response:
            file = self.files.get(request.path_params["id"])
            return JSONResponse(file) if file else error(404, "No such File object.")

        return await self._serve("GET /files/{id}", request, work)

    async def _content(self, request: Request) -> Response:
        async def work() -> Response:
            data = self.contents.get(request.path_params["id"])
            if data is None:
                return error(404, "No such File object.")
            return Response(data, media_type="application/octet-stream")

        return await self._serve(CONTENT, request, work)

    async def _delete_file(self, request: Request) -> Response:
        async def work() -> Response:
            file_id = request.path_params["id"]
            if self.files.pop(file_id, None) is None:
                return error(404, "No such File object.")
            return JSONResponse({"id": file_id, "object": "file", "deleted": True})

        return await self._serve("DELETE /files/{id}", request, work)

    async def _chat(self, request: Request) -> Response:
        async def work() -> Response:
            body = await request.json()
            self.models_by_line.append(self.model_of(request, body))
            prompt = body["messages"][0]["content"] if body["messages"] else "nothing"
            return JSONResponse(chat_completion(f"by line: {prompt}"))

        return await self._serve("POST /chat/completions", request, work)

    async def _models(self, request: Request) -> Response:
        async def work() -> Response:
            return JSONResponse({"object": "list", "data": [{"id": "m", "object": "model"}]})

        return await self._serve("GET /models", request, work)

    def _add_file(self, data: bytes, purpose: str, name: str) -> str:
        file_id = f"file-{secrets.token_hex(12)}"
        self.contents[file_id] = data
        self.files[file_id] = {
            "id": file_id,
            "object": "file",
            "bytes": len(data),
            "created_at": int(time.time()),
            "filename": name,
            "purpose": purpose,
            "status": "processed",
        }
        return file_id


def _result(custom_id: str, *, response: Any = None, error: Any = None) -> bytes:
    fields = {
        "id": f"batch_req_{secrets.token_hex(16)}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(fields).encode() + b"\n"


def error(status: int, message: str, *, headers: Mapping[str, str] | None = None) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


async def _drain(request: Request) -> None:
    async for _ in request.stream():
        pass


async def _cut(data: bytes):
    if data:
        yield data
    raise ConnectionResetError
