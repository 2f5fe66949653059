"""The table of routes and the application that answers them."""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from pydantic import BaseModel

from penstock import __version__
from penstock.api import batches, files, models, wire
from penstock.api import health as _health
from penstock.api.errors import handle_errors
from penstock.api.health import Health
from penstock.api.middleware import RequestContext
from penstock.model import UPLOAD_PURPOSES, ProjectId
from penstock.service import Service

PREFIXES = ("/v1", "/api/llm", "/openai/v1", "/openai", "/openai/deployments/{deployment}")
"""Where the routes are found. Clients follow no redirects, so each is served as it stands."""

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Body:
    """A request's body, for the reader of the documentation: it is read by hand."""

    media_type: str
    schema: dict[str, Any]  # JSON Schema


_BATCH_BODY = _Body(media_type="application/json", schema=wire.BatchRequest.model_json_schema())
_FILE_BODY = _Body(
    media_type="multipart/form-data",
    schema={
        "type": "object",
        "required": ["file", "purpose"],
        "properties": {
            "file": {"type": "string", "format": "binary"},
            "purpose": {"type": "string", "enum": list(UPLOAD_PURPOSES)},
            "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
            "expires_after[seconds]": {"type": "integer"},
        },
    },
)


@dataclass(frozen=True, slots=True)
class _Route:
    method: str
    path: str
    call: Callable[..., Awaitable[Response]]
    shape: type[BaseModel] | None = None
    """What it answers; None if that is not one JSON object."""
    body: _Body | None = None
    """What it reads; None if nothing."""


_ROUTES = (
    _Route("POST", "/batches", batches.create_batch, wire.BatchShape, _BATCH_BODY),
    _Route("GET", "/batches", batches.list_batches, wire.BatchListShape),
    _Route("GET", "/batches/{batch_id}", batches.get_batch, wire.BatchShape),
    _Route("POST", "/batches/{batch_id}/cancel", batches.cancel_batch, wire.BatchShape),
    _Route("GET", "/batches/{batch_id}/output", batches.get_output),
    _Route("POST", "/files", files.create_file, wire.FileShape, _FILE_BODY),
    _Route("GET", "/files", files.list_files, wire.FileListShape),
    _Route("GET", "/files/{file_id}", files.get_file, wire.FileShape),
    _Route("GET", "/files/{file_id}/content", files.get_content),
    _Route("DELETE", "/files/{file_id}", files.delete_file, wire.DeletedFileShape),
    _Route("GET", "/models", models.list_models, wire.ModelListShape),
)


def create_api(
    service: Service,
    health: Health,
    *,
    open_project: ProjectId | None = None,
    lifespan: Lifespan | None = None,
) -> FastAPI:
    """Make the application.

    Args:
        open_project: The project that every request belongs to, without a key; None asks
            each request for its key.
        lifespan: What is to be started with it and stopped after it.
    """
    app = FastAPI(
        title="Penstock", version=__version__, redirect_slashes=False, lifespan=lifespan
    )
    app.state.service = service
    app.state.health = health
    app.state.open_project = open_project
    app.add_middleware(RequestContext)
    handle_errors(app)
    router = _make_router()
    for prefix in PREFIXES:
        app.include_router(router, prefix=prefix, include_in_schema=prefix == PREFIXES[0])
    app.add_api_route("/healthz", _health.is_alive, methods=["GET"], tags=["health"])
    app.add_api_route("/readyz", _health.is_ready, methods=["GET"], tags=["health"])
    return app


def _make_router() -> APIRouter:
    router = APIRouter(responses={"4XX": {"model": wire.ErrorShape}})
    for route in _ROUTES:
        router.add_api_route(
            route.path,
            route.call,
            methods=[route.method],
            response_model=None,
            responses={200: {"model": route.shape}} if route.shape else None,
            openapi_extra=_describe(route.body) if route.body else None,
            tags=[route.path.split("/")[1]],
        )
    return router


def _describe(body: _Body) -> dict[str, Any]:
    content = {body.media_type: {"schema": body.schema}}
    return {"requestBody": {"required": True, "content": content}}
