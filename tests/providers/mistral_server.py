"""A provider that follows Mistral's public reference of files and batch jobs, and misbehaves.

    async with MistralProvider() as provider:
        ...  # upload, create and poll at provider.base_url
        provider.end(native_id)

It runs no model. A job goes on only when the test says so. What a line gets is decided by
`behave`. That it is like the real one is shown by Mistral's own client in
`tests/clients/test_provider_servers.py`.

Source: https://docs.mistral.ai/api/endpoint/batch and https://docs.mistral.ai/api/endpoint/files,
25 November 2026.
"""

import json
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.providers.server import Handle, ProviderServer, prompt_of, read_form

KEY = "mistral-key-0123456789"
UPLOAD, FILE = "POST /v1/files", "GET /v1/files/{id}"
CONTENT, DELETE_FILE = "GET /v1/files/{id}/content", "DELETE /v1/files/{id}"
CREATE, LIST = "POST /v1/batch/jobs", "GET /v1/batch/jobs"
GET, CANCEL = "GET /v1/batch/jobs/{id}", "POST /v1/batch/jobs/{id}/cancel"
CHAT, EMBEDDINGS = "POST /v1/chat/completions", "POST /v1/embeddings"
ENDPOINTS = ("/v1/chat/completions", "/v1/embeddings", "/v1/moderations")
FINAL = ("SUCCESS", "FAILED", "TIMEOUT_EXCEEDED", "CANCELLED")
MODELS = ("mistral-small-latest", "mistral-embed")
CHAT_FIELDS = frozenset(
    {
        *("frequency_penalty", "guardrails", "logprobs", "max_tokens", "messages", "metadata"),
        *("min_tokens", "model", "n", "parallel_tool_calls", "prediction", "presence_penalty"),
        *("prompt_cache_key", "prompt_logprobs", "prompt_mode", "random_seed", "stop"),
        *("reasoning_effort", "repetition_penalty", "response_format", "safe_prompt", "tools"),
        *("service_tier", "stream", "temperature", "tool_choice", "top_k", "top_logprobs"),
        *("top_p", "top_prompt_logprobs"),
    }
)
"""All that a chat may have; with another field it is refused as a whole."""

Behave = Callable[[str, dict[str, Any]], tuple[int, Any] | None]
"""Status and body for a line, by custom ID and request; None: it gets neither."""


def completion(content: Any, *, finish: str = "stop", **message: Any) -> dict[str, Any]:
    told = {"role": "assistant", "content": content, "tool_calls": None, **message}
    return {
        "id": uuid.uuid4().hex,
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": MODELS[0],
        "choices": [{"index": 0, "message": told, "finish_reason": finish}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def vectors(count: int) -> dict[str, Any]:
    data = [
        {"object": "embedding", "index": index, "embedding": [0.5, index]}
        for index in range(count)
    ]
    usage = {"prompt_tokens": 4, "completion_tokens": 0, "total_tokens": 4}
    return {
        "id": uuid.uuid4().hex,
        "object": "list",
        "model": "mistral-embed",
        "data": data,
        "usage": usage,
    }


def fault(message: str) -> dict[str, Any]:
    """An error's body."""
    return {
        "object": "error",
        "message": message,
        "type": "invalid_request_error",
        "code": 3051,
    }


def echo(custom_id: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Each prompt is its own answer."""
    if "messages" in body:
        return 200, completion(prompt_of(body))
    return 200, vectors(len(body["input"]))


class MistralProvider(ProviderServer):
    def __init__(self, *, behave: Behave = echo) -> None:
        super().__init__()
        self.behave = behave
        self.files: dict[str, dict[str, Any]] = {}
        self.contents: dict[str, bytes] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        """In the order of their creation: what was paid."""
        self.extra_lines: list[bytes] = []
        """Added to the output file of each job that ends."""

    def routes(self) -> Mapping[str, Handle]:
        return {
            UPLOAD: self._upload,
            FILE: self._get_file,
            CONTENT: self._content,
            DELETE_FILE: self._delete_file,
            CREATE: self._create,
            LIST: self._list,
            GET: self._get,
            CANCEL: self._cancel,
            CHAT: self._answer,
            EMBEDDINGS: self._answer,
            "GET /v1/models": self._models,
        }

    def is_let_in(self, request: Request) -> bool:
        return request.headers.get("authorization") == f"Bearer {KEY}"

    def error(
        self, status: int, told: str, headers: Mapping[str, str] | None = None
    ) -> Response:
        return JSONResponse(fault(told), status_code=status, headers=headers)

    # What tests do

    def lines_of(self, native_id: str) -> list[dict[str, Any]]:
        """The requests of a job."""
        [file_id] = self.jobs[native_id]["input_files"]
        return [json.loads(text) for text in self.contents[file_id].splitlines()]

    def end(self, native_id: str, status: str = "SUCCESS", *, only: int | None = None) -> None:
        """Let a job end.

        Args:
            only: How many of its lines were run; of the others nothing is told. None: all.
        """
        job = self.jobs[native_id]
        output: list[bytes] = []
        errors: list[bytes] = []
        for line in self.lines_of(native_id)[:only]:
            got = self.behave(line["custom_id"], line["body"])
            if got is None:
                continue
            is_good = got[0] < 300
            response = {
                "status_code": got[0],
                "body": got[1] if is_good else json.dumps(got[1]),
            }
            made = {"id": f"batch-{uuid.uuid4()}", "custom_id": line["custom_id"]}
            told = {**made, "response": response, "error": None if is_good else "failed"}
            (output if is_good else errors).append(json.dumps(told).encode())
        output += self.extra_lines
        output.reverse()  # the order is not the input's
        job |= {
            "status": status,
            "completed_at": int(time.time()),
            "completed_requests": len(output) + len(errors),
            "succeeded_requests": len(output),
            "failed_requests": len(errors),
        }
        for name, lines in (("output_file", output), ("error_file", errors)):
            if lines:
                data = b"".join(line + b"\n" for line in lines)
                job[name] = self._add_file(data, f"{name}.jsonl", "batch_api")

    # The routes

    async def _upload(self, request: Request) -> Response:
        fields, name, data = await read_form(request)
        if fields.get("purpose") != "batch" or not data:
            return self.error(422, "Invalid file format.")
        file_id = self._add_file(data, name, "upload")
        return JSONResponse(self.files[file_id])

    async def _get_file(self, request: Request) -> Response:
        file = self.files.get(request.path_params["id"])
        return JSONResponse({**file, "deleted": False}) if file else self._unknown()

    async def _content(self, request: Request) -> Response:
        data = self.contents.get(request.path_params["id"])
        if data is None or request.path_params["id"] not in self.files:
            return self._unknown()
        return Response(data, media_type="application/octet-stream")

    async def _delete_file(self, request: Request) -> Response:
        file_id = request.path_params["id"]
        if self.files.pop(file_id, None) is None:
            return self._unknown()
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    async def _create(self, request: Request) -> Response:
        body = await request.json()
        if body["endpoint"] not in ENDPOINTS or not body.get("model"):
            return self.error(422, "Input should be a supported endpoint.")
        if not 1 <= body.get("timeout_hours", 24) <= 168:
            return self.error(422, "timeout_hours: Input should be at most 168.")
        if any(file_id not in self.files for file_id in body["input_files"]):
            return self.error(404, "No such file.")
        native_id = str(uuid.uuid4())
        self.jobs[native_id] = {
            "id": native_id,
            "object": "batch",
            "input_files": body["input_files"],
            "endpoint": body["endpoint"],
            "model": body["model"],
            "metadata": body.get("metadata"),
            "agent_id": None,
            "timeout_hours": body.get("timeout_hours", 24),
            "status": "QUEUED",
            "errors": [],
            "output_file": None,
            "error_file": None,
            "created_at": int(time.time()),
            "started_at": None,
            "completed_at": None,
            "total_requests": 0,
            "completed_requests": 0,
            "succeeded_requests": 0,
            "failed_requests": 0,
        }
        return JSONResponse(self.jobs[native_id])

    async def _list(self, request: Request) -> Response:
        page = int(request.query_params.get("page", "0"))
        size = int(request.query_params.get("page_size", "100"))
        newest = list(reversed(self.jobs.values()))
        shown = newest[page * size : (page + 1) * size]
        return JSONResponse({"object": "list", "total": len(newest), "data": shown})

    async def _get(self, request: Request) -> Response:
        job = self.jobs.get(request.path_params["id"])
        return JSONResponse(job) if job else self._unknown()

    async def _cancel(self, request: Request) -> Response:
        job = self.jobs.get(request.path_params["id"])
        if job is None:
            return self._unknown()
        if job["status"] in FINAL:
            return self.error(422, "The job has ended.")
        job["status"] = "CANCELLATION_REQUESTED"
        told = dict(job)
        self.end(job["id"], "CANCELLED", only=1)
        return JSONResponse(told)

    async def _answer(self, request: Request) -> Response:
        body = await request.json()
        unknown = body.keys() - CHAT_FIELDS if "messages" in body else ()
        if unknown:
            place = {"type": "extra_forbidden", "loc": ["body", min(unknown)], "msg": "Extra"}
            return JSONResponse(
                {"object": "error", "message": {"detail": [place]}}, status_code=422
            )
        status, told = self.behave("", body) or (500, fault("Nothing."))
        return JSONResponse(told, status_code=status)

    async def _models(self, request: Request) -> Response:
        data = [{"id": model, "object": "model", "capabilities": {}} for model in MODELS]
        return JSONResponse({"object": "list", "data": data})

    def _unknown(self) -> Response:
        return self.error(404, "Not found.")

    def _add_file(self, data: bytes, name: str, source: str) -> str:
        file_id = str(uuid.uuid4())
        self.contents[file_id] = data
        self.files[file_id] = {
            "id": file_id,
            "object": "file",
            "bytes": len(data),
            "created_at": int(time.time()),
            "filename": name,
            "purpose": "batch",
            "sample_type": "batch_request" if source == "upload" else "batch_result",
            "source": "upload" if source == "upload" else "mistral",
            "num_lines": data.count(b"\n"),
        }
        return file_id
