"""Providers that are nearly OpenAI, each as its public reference says.

Sources, 25 November 2026: https://learn.microsoft.com/azure/foundry/openai/how-to/batch and
https://learn.microsoft.com/azure/foundry/reference/rest/batches-create-batch for Azure, and
the answers that `batch-python.md` and `batch-rest.md` of github.com/MicrosoftDocs/azure-ai-docs
show;
https://console.groq.com/docs/batch and the client groq 1.7.0 for Groq;
https://docs.together.ai/reference/batch-create and the client together 3.1.1 for Together.
"""

from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tests.providers import openai_server
from tests.providers.openai_server import ENDPOINTS, OpenAIProvider


class AzureProvider(OpenAIProvider):
    """As it is since its API has a `/v1`: no version needs to be named, and a key may also go
    where OpenAI's does. It knows its endpoints by both names, and shows none."""

    prefix = "/openai/v1"
    endpoints = tuple(name for each in ENDPOINTS for name in (each, each.removeprefix("/v1")))

    def is_let_in(self, request: Request) -> bool:
        key = request.headers.get("api-key")
        return key == openai_server.KEY or (key is None and super().is_let_in(request))

    def show(self, batch: dict[str, Any]) -> Any:
        shown = {**batch, "endpoint": None}
        if batch["status"] == "validating":
            shown["request_counts"] = {"total": None, "completed": None, "failed": None}
        return shown

    def show_page(self, page: list[dict[str, Any]], *, has_more: bool) -> Any:
        return super().show_page([self.show(batch) for batch in page], has_more=has_more)


class ClassicAzureProvider(AzureProvider):
    """As it was: each call names a version, endpoints have no `/v1`, a line that is sent alone
    names its deployment in the address, and times are written out."""

    prefix = "/openai"
    chat_path = "/deployments/{deployment}/chat/completions"
    endpoints = ("/chat/completions", "/embeddings")
    version = "2024-10-21"

    def is_let_in(self, request: Request) -> bool:
        return request.headers.get("api-key") == openai_server.KEY

    def refuse(self, request: Request) -> Response | None:
        if request.query_params.get("api-version") != self.version:
            return openai_server.error(404, "Resource not found")
        return super().refuse(request)

    def model_of(self, request: Request, body: dict[str, Any]) -> str:
        return request.path_params["deployment"]

    def show(self, batch: dict[str, Any]) -> Any:
        created = datetime.fromtimestamp(batch["created_at"], UTC).isoformat()
        status = batch["status"].replace("validating", "Validating")
        return {**super().show(batch), "created_at": created, "status": status}


class GroqProvider(OpenAIProvider):
    prefix = "/openai/v1"
    endpoints = ("/v1/chat/completions",)
    windows = ("24h", "2d", "3d", "4d", "5d", "6d", "7d")

    def is_let_in(self, request: Request) -> bool:
        return "api-version" not in request.query_params and super().is_let_in(request)


class TogetherProvider(OpenAIProvider):
    """Shows batches in a form of its own, without metadata, and lists all at once."""

    upload_path = "/files/upload"
    purpose = "batch-api"
    endpoints = ("/v1/chat/completions",)

    def show(self, batch: dict[str, Any]) -> Any:
        created = datetime.fromtimestamp(batch["created_at"], UTC)
        faults = batch["errors"]["data"] if batch["errors"] else []
        status = batch["status"].upper()
        return {
            "id": batch["id"],
            "user_id": "user_1",
            "input_file_id": batch["input_file_id"],
            "file_size_bytes": 1,
            "status": "CANCELLED" if status == "CANCELLING" else status,
            "created_at": created.isoformat().replace("+00:00", "Z"),
            "endpoint": batch["endpoint"],
            "progress": 100.0 if batch["output_file_id"] else 0.0,
            "output_file_id": batch["output_file_id"],
            "error_file_id": batch["error_file_id"],
            "error": faults[0]["message"] if faults else None,
        }

    def show_created(self, batch: dict[str, Any]) -> Any:
        return {"job": self.show(batch)}

    def show_page(self, page: list[dict[str, Any]], *, has_more: bool) -> Any:
        return [self.show(batch) for batch in self.batches.values()]
