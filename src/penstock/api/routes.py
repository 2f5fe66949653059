"""The table of routes and the application that answers them."""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import APIRouter, FastAPI

from penstock import __version__
from penstock.api import batches, files, models, wire
from penstock.api import health as _health
from penstock.api import uploads as _uploads
from penstock.api.errors import handle_errors
from penstock.api.health import Health, Metrics
from penstock.api.middleware import RequestContext
from penstock.api.openapi import make_document
from penstock.api.operations import Answer, Route, form_body, json_body, object_answer
from penstock.model import ProjectId
from penstock.service import Service
from penstock.telemetry import METRICS_TYPE
from penstock.uploads import Uploads

PREFIXES = ("/v1", "/api/llm", "/openai/v1", "/openai", "/openai/deployments/{deployment}")
"""Where the routes are found. Clients follow no redirects, so each is served as it stands."""

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


ROUTES = (
    Route(
        "POST",
        "/batches",
        batches.create_batch,
        wire.BatchShape,
        errors=(400, 404, 409),
        reads=json_body(wire.BatchRequest),
        parameters=(batches.METADATA_PARAMETER,),
    ),
    Route(
        "GET",
        "/batches",
        batches.list_batches,
        wire.BatchListShape,
        errors=(400,),
        parameters=(batches.METADATA_FILTER,),
    ),
    Route("GET", "/batches/{batch_id}", batches.get_batch, wire.BatchShape, errors=(404,)),
    Route(
        "POST",
        "/batches/{batch_id}/cancel",
        batches.cancel_batch,
        wire.BatchShape,
        errors=(404, 409),
    ),
    Route(
        "GET",
        "/batches/{batch_id}/costs",
        batches.get_batch_costs,
        wire.BatchCostsShape,
        errors=(404,),
    ),
    Route(
        "GET",
        "/batches/{batch_id}/output",
        batches.get_batch_output,
        (batches.OUTPUT_ANSWER,),
        errors=(404,),
    ),
    Route(
        "POST",
        "/files",
        files.create_file,
        wire.FileShape,
        errors=(400, 409),
        reads=form_body(wire.FILE_FORM),
    ),
    Route("GET", "/files", files.list_files, wire.FileListShape, errors=(400,)),
    Route("GET", "/files/{file_id}", files.get_file, wire.FileShape, errors=(404,)),
    Route(
        "DELETE", "/files/{file_id}", files.delete_file, wire.DeletedFileShape, errors=(404,)
    ),
    Route(
        "GET",
        "/files/{file_id}/content",
        files.get_file_content,
        files.CONTENT_ANSWERS,
        errors=(400, 404, 416),
    ),
    Route(
        "HEAD",
        "/files/{file_id}/content",
        files.head_file_content,
        files.HEAD_ANSWERS,
        errors=(400, 404),
    ),
    Route(
        "POST",
        "/uploads",
        _uploads.create_upload,
        wire.UploadShape,
        errors=(400, 409),
        reads=json_body(wire.UploadRequest),
    ),
    Route(
        "POST",
        "/uploads/{upload_id}/parts",
        _uploads.add_upload_part,
        wire.UploadPartShape,
        errors=(400, 404, 409),
        reads=form_body(wire.PART_FORM),
    ),
    Route(
        "POST",
        "/uploads/{upload_id}/complete",
        _uploads.complete_upload,
        wire.UploadShape,
        errors=(400, 404),
        reads=json_body(wire.CompleteUploadRequest),
    ),
    Route(
        "POST",
        "/uploads/{upload_id}/cancel",
        _uploads.cancel_upload,
        wire.UploadShape,
        errors=(400, 404),
    ),
    Route("GET", "/models", models.list_models, wire.ModelListShape),
)
"""What is found under every prefix. To add a route, add a row."""

HEALTH = (
    Route("GET", "/healthz", _health.is_alive, wire.AliveShape, asks_for_key=False),
    Route(
        "GET",
        "/readyz",
        _health.is_ready,
        (
            object_answer(wire.ReadyShape),
            object_answer(wire.UnreadyShape, status=503),
        ),
        asks_for_key=False,
    ),
    Route(
        "GET",
        "/metrics",
        _health.get_metrics,
        (
            Answer(
                description="Prometheus' text format.",
                content={METRICS_TYPE: {"type": "string"}},
            ),
        ),
        asks_for_key=False,
    ),
)
"""What is found under no prefix."""


class _Api(FastAPI):
    """The application, with a document of our own."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            draft = super().openapi()
            routes = [(PREFIXES[0], route) for route in ROUTES]
            routes += [("", route) for route in HEALTH]
            needs_key = self.state.open_project is None
            self.openapi_schema = make_document(draft, routes, needs_key=needs_key)
        return self.openapi_schema


def create_api(
    service: Service,
    uploads: Uploads,
    health: Health,
    metrics: Metrics,
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
    app = _make_app(open_project, lifespan)
    app.state.service = service
    app.state.uploads = uploads
    app.state.health = health
    app.state.metrics = metrics
    return app


def create_health_api(health: Health, metrics: Metrics) -> FastAPI:
    """Make the application of a process that only works: it tells how it is."""
    app = _Api(title="Penstock", version=__version__, openapi_url=None, redirect_slashes=False)
    handle_errors(app)
    app.include_router(_make_router(HEALTH))
    app.state.health = health
    app.state.metrics = metrics
    return app


def describe(*, needs_key: bool = True) -> dict[str, Any]:
    """The OpenAPI document of a server that asks for keys, or of one that does not."""
    return _make_app(None if needs_key else ProjectId(""), None).openapi()


def _make_app(open_project: ProjectId | None, lifespan: Lifespan | None) -> FastAPI:
    app = _Api(title="Penstock", version=__version__, redirect_slashes=False, lifespan=lifespan)
    app.state.open_project = open_project
    app.add_middleware(RequestContext)
    handle_errors(app)
    router = _make_router(ROUTES)
    for prefix in PREFIXES:
        app.include_router(router, prefix=prefix, include_in_schema=prefix == PREFIXES[0])
    app.include_router(_make_router(HEALTH))
    return app


def _make_router(routes: Sequence[Route]) -> APIRouter:
    router = APIRouter()
    for route in routes:
        router.add_api_route(
            route.path,
            route.call,
            methods=[route.method],
            operation_id=route.operation_id,
            response_model=None,
        )
    return router
