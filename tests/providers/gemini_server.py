"""A provider that follows the public reference of Google's Gemini API, and misbehaves.

    async with GeminiProvider() as provider:
        ...  # upload, create and poll at provider.base_url
        provider.end(native_id)

It runs no model. A batch goes on only when the test says so. What a line gets is decided by
`behave`. That it is like the real one is shown by Google's own client in
`tests/clients/test_provider_servers.py`.

Source: https://ai.google.dev/api/batch-api, https://ai.google.dev/api/files and
https://ai.google.dev/gemini-api/docs/batch-api, 25 November 2026.
"""

import base64
import json
import secrets
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.providers.server import Handle, ProviderServer

KEY = "AIza-0123456789"
UPLOAD = "POST /upload/v1beta/files"
FILE, DELETE_FILE = "GET /v1beta/files/{id}", "DELETE /v1beta/files/{id}"
CONTENT = "GET /v1beta/files/{id}:download"
CREATE = "POST /v1beta/models/{model}:batchGenerateContent"
CREATE_EMBEDDINGS = "POST /v1beta/models/{model}:asyncBatchEmbedContent"
LIST, GET = "GET /v1beta/batches", "GET /v1beta/batches/{id}"
CANCEL, DELETE = "POST /v1beta/batches/{id}:cancel", "DELETE /v1beta/batches/{id}"
GENERATE = "POST /v1beta/models/{model}:generateContent"
EMBED = "POST /v1beta/models/{model}:embedContent"
MODELS = "GET /v1beta/models"
FINAL = ("SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED")
NAMES = ("gemini-3.8-flash", "gemini-2.5-flash", "gemini-embedding-001")
_STATUSES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
}

Behave = Callable[[str, dict[str, Any]], dict[str, Any] | None]
"""What a line's results hold beside its key, `response` or `error`; None: it has none."""


def content(text: str) -> dict[str, Any]:
    """The result of a line that succeeded."""
    parts = {"parts": [{"text": text}], "role": "model"}
    usage = {"promptTokenCount": 3, "candidatesTokenCount": 2, "totalTokenCount": 5}
    return {
        "response": {
            "candidates": [{"content": parts, "finishReason": "STOP", "index": 0}],
            "usageMetadata": usage,
            "modelVersion": NAMES[0],
            "responseId": secrets.token_hex(8),
        }
    }


def fault(status: int, told: str) -> dict[str, Any]:
    """The result of a line that failed, and the body of an error."""
    name = _STATUSES.get(status, "UNKNOWN")
    return {"error": {"code": status, "message": told, "status": name}}


def echo(key: str, request: dict[str, Any]) -> dict[str, Any]:
    """Each prompt is its own answer."""
    if "contents" in request:
        return content(request["contents"][-1]["parts"][-1]["text"])
    return {"response": {"embedding": {"values": [0.5, 0.25]}}}


class GeminiProvider(ProviderServer):
    base_path = "/v1beta"

    def __init__(self, *, behave: Behave = echo) -> None:
        super().__init__()
        self.behave = behave
        self.files: dict[str, dict[str, Any]] = {}
        self.contents: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        """In the order of their creation: what was paid."""
        self.extra_lines: list[bytes] = []
        """Added to the results of each batch that ends."""
        self.upload_host: str | None = None
        """Which host is said to take files; None: this one."""
        self._uploads: dict[str, dict[str, Any]] = {}

    def routes(self) -> Mapping[str, Handle]:
        return {
            UPLOAD: self._upload,
            CONTENT: self._content,
            FILE: self._get_file,
            DELETE_FILE: self._delete_file,
            CREATE: self._create,
            CREATE_EMBEDDINGS: self._create,
            LIST: self._list,
            CANCEL: self._cancel,
            GET: self._get,
            DELETE: self._delete,
            GENERATE: self._answer,
            EMBED: self._answer,
            MODELS: self._models,
        }

    def is_let_in(self, request: Request) -> bool:
        # Whoever knows an upload may send it; Google's own client sends no key with it.
        is_upload = request.query_params.get("upload_id") in self._uploads
        return is_upload or request.headers.get("x-goog-api-key") == KEY

    def error(
        self, status: int, told: str, headers: Mapping[str, str] | None = None
    ) -> Response:
        return JSONResponse(fault(status, told), status_code=status, headers=headers)

    # What tests do

    def lines_of(self, native_id: str) -> list[dict[str, Any]]:
        """The requests of a batch."""
        name = self.batches[native_id]["metadata"]["inputConfig"]["fileName"]
        return [json.loads(text) for text in self.contents[name].splitlines()]

    def end(self, native_id: str, state: str = "SUCCEEDED", *, only: int | None = None) -> None:
        """Let a batch end.

        Args:
            only: How many of its lines were run; of the others nothing is told. None: all.
        """
        operation = self.batches[native_id]
        metadata = operation["metadata"]
        lines: list[bytes] = []
        counts = {"response": 0, "error": 0}
        for line in self.lines_of(native_id)[:only]:
            got = self.behave(line["key"], line["request"])
            if got is not None:
                counts["response" if "response" in got else "error"] += 1
                lines.append(json.dumps({"key": line["key"], **got}).encode())
        lines += self.extra_lines
        lines.reverse()  # the order is not the input's
        name = f"files/batch-{native_id.partition('/')[2]}"
        self.contents[name] = b"".join(line + b"\n" for line in lines)
        metadata |= {
            "state": f"BATCH_STATE_{state}",
            "endTime": _now(),
            "batchStats": {
                "requestCount": str(len(self.lines_of(native_id))),
                "successfulRequestCount": str(counts["response"]),
                "failedRequestCount": str(counts["error"]),
            },
            "output": {"responsesFile": name},
        }
        operation["done"] = True
        if state == "SUCCEEDED":
            operation["response"] = {"responsesFile": name}

    # The routes

    async def _upload(self, request: Request) -> Response:
        command = request.headers["x-goog-upload-command"]
        if command == "start":
            assert request.headers["x-goog-upload-protocol"] == "resumable"
            upload_id = secrets.token_hex(8)
            self._uploads[upload_id] = (await request.json())["file"] | {
                "mimeType": request.headers["x-goog-upload-header-content-type"],
                "sizeBytes": request.headers["x-goog-upload-header-content-length"],
            }
            host = self.upload_host or self.root_url
            where = f"{host}/upload/v1beta/files?upload_id={upload_id}"
            headers = {"X-Goog-Upload-URL": where, "X-Goog-Upload-Status": "active"}
            return Response(headers=headers)
        about = self._uploads.pop(request.query_params["upload_id"])
        data = await request.body()
        if command != "upload, finalize" or len(data) != int(about["sizeBytes"]):
            return self.error(400, "The upload is not what was announced.")
        name = f"files/{secrets.token_hex(6)}"
        self.contents[name] = data
        self.files[name] = {
            "name": name,
            "displayName": about.get("displayName") or about.get("display_name", ""),
            "mimeType": about["mimeType"],
            "sizeBytes": about["sizeBytes"],
            "createTime": _now(),
            "updateTime": _now(),
            "sha256Hash": base64.b64encode(b"x" * 32).decode(),
            "uri": f"{self.base_url}/{name}",
            "state": "ACTIVE",
            "source": "UPLOADED",
        }
        headers = {"X-Goog-Upload-Status": "final"}
        return JSONResponse({"file": self.files[name]}, headers=headers)

    async def _get_file(self, request: Request) -> Response:
        file = self.files.get(f"files/{request.path_params['id']}")
        return JSONResponse(file) if file else self._forbidden()

    async def _content(self, request: Request) -> Response:
        name = f"files/{request.path_params['id']}"
        data = self.contents.get(name)
        if data is None or name in self.files or request.query_params.get("alt") != "media":
            return self._forbidden()  # what was uploaded cannot be downloaded
        return Response(data, media_type="application/octet-stream")

    async def _delete_file(self, request: Request) -> Response:
        gone = self.files.pop(f"files/{request.path_params['id']}", None)
        return JSONResponse({}) if gone else self._forbidden()

    async def _create(self, request: Request) -> Response:
        batch = (await request.json())["batch"]
        source = batch["inputConfig"]
        file_name = source.get("fileName") or source.get("file_name")
        if file_name not in self.files or not batch.get("displayName"):
            return self.error(400, "Request contains an invalid argument.")
        if request.path_params["model"] not in NAMES:
            return self.error(404, "The model is not found.")
        native_id = f"batches/{secrets.token_hex(10)}"
        kind = "Generate" if request.url.path.endswith("GenerateContent") else "Embed"
        count = str(self.contents[file_name].count(b"\n"))
        self.batches[native_id] = {
            "name": native_id,
            "metadata": {
                "@type": f"type.googleapis.com/google.ai.generativelanguage.v1main.{kind}"
                "ContentBatch",
                "name": native_id,
                "model": f"models/{request.path_params['model']}",
                "displayName": batch["displayName"],
                "inputConfig": {"fileName": file_name},
                "createTime": _now(),
                "updateTime": _now(),
                "batchStats": {"requestCount": count, "pendingRequestCount": count},
                "state": "BATCH_STATE_PENDING",
            },
        }
        return JSONResponse(self.batches[native_id])

    async def _list(self, request: Request) -> Response:
        size = int(request.query_params.get("pageSize", "20"))
        begin = int(request.query_params.get("pageToken") or "0")
        found = list(reversed(self.batches.values()))
        told: dict[str, Any] = {"operations": found[begin : begin + size]} if found else {}
        if begin + size < len(found):
            told["nextPageToken"] = str(begin + size)
        return JSONResponse(told)

    async def _get(self, request: Request) -> Response:
        operation = self.batches.get(f"batches/{request.path_params['id']}")
        return JSONResponse(operation) if operation else self._unknown()

    async def _cancel(self, request: Request) -> Response:
        native_id = f"batches/{request.path_params['id']}"
        if native_id not in self.batches:
            return self._unknown()
        if self.batches[native_id]["metadata"]["state"].endswith(FINAL):
            return self.error(400, "The batch has ended.")
        self.end(native_id, "CANCELLED", only=1)
        return JSONResponse({})

    async def _delete(self, request: Request) -> Response:
        gone = self.batches.pop(f"batches/{request.path_params['id']}", None)
        return JSONResponse({}) if gone else self._unknown()

    async def _answer(self, request: Request) -> Response:
        got = self.behave("", await request.json()) or fault(500, "Nothing.")
        if "response" in got:
            return JSONResponse(got["response"])
        return JSONResponse(got, status_code=got["error"]["code"])

    async def _models(self, request: Request) -> Response:
        begin = int(request.query_params.get("pageToken") or "0")
        told: dict[str, Any] = {"models": [{"name": f"models/{NAMES[begin]}"}]}
        if begin + 1 < len(NAMES):
            told["nextPageToken"] = str(begin + 1)
        return JSONResponse(told)

    def _unknown(self) -> Response:
        return self.error(404, "Requested entity was not found.")

    def _forbidden(self) -> Response:
        return self.error(403, "You do not have permission, or it may not exist.")


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
