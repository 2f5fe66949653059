"""The composition root: the only place that names implementations.

`open_app` puts the parts together over a data directory and runs the work; `serve` puts the
API before it.

    settings ─► store, blobs, segments ─► service ─► api
                     └─► engine ─► feeder, worker, lifecycle, upkeep
"""

import asyncio
import contextlib
import fcntl
import gc
import hashlib
import math
import os
import resource
import secrets
import signal
import socket
import time
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path

import structlog
import uvicorn

from penstock import __version__
from penstock.api.routes import create_api
from penstock.blobs.objects import ObjectBlobs
from penstock.blobs.segments import LocalSegments
from penstock.engine.pgqueuer import MemoryEngine
from penstock.errors import DataDirInUse, InvalidSettings
from penstock.executor.admission import AdmissionPolicy
from penstock.executor.circuit import CircuitPolicy
from penstock.executor.feeder import Feeder
from penstock.executor.lifecycle import Lifecycle, LifecycleOptions
from penstock.executor.limits import ConcurrencyPolicy
from penstock.executor.native import NativePolicy, NativeRunner
from penstock.executor.native_lines import Collector
from penstock.executor.native_plan import NativePlanner
from penstock.executor.partial import PartialResults
from penstock.executor.retry import RetryPolicy
from penstock.executor.upkeep import (
    keep_up,
    recover,
    watch_deliveries,
    watch_native_runs,
)
from penstock.executor.webhooks import Deliverer, DeliveryPolicy
from penstock.executor.worker import Worker, WorkerOptions
from penstock.keys import key_digest, key_hint, new_key
from penstock.model import ApiKey, JobKind, KeyId, ProjectId, Webhook, WebhookId
from penstock.places import KEY_FILE, store_url
from penstock.service import Service, ServiceLimits, UpstreamChoices
from penstock.settings import DEFAULT_PROJECT, Settings, Upstream
from penstock.store.sql import SqlStore
from penstock.telemetry import Health, Metrics
from penstock.uploads import Uploads
from penstock.upstream.anthropic_batch import AnthropicBatchUpstream
from penstock.upstream.base import BatchUpstream, LineUpstream
from penstock.upstream.bedrock_batch import BedrockBatchUpstream
from penstock.upstream.kinds import KINDS
from penstock.upstream.openai_batch import DIALECTS, OpenAIBatchUpstream
from penstock.upstream.openai_http import OpenAIHttpUpstream
from penstock.upstream.routes import NativeUse, Route, Routes
from penstock.upstream.translated import TranslatedUpstream
from penstock.upstream.translation import anthropic
from penstock.upstream.translation.base import Translation
from penstock.upstream.vertex_batch import VertexBatchUpstream
from penstock.upstream.webhook import WebhookTarget
from penstock.upstream.webhook_http import HttpWebhookSender

_log = structlog.get_logger()

_DELIVERIES = DeliveryPolicy()
_CIRCUITS = CircuitPolicy()
_NATIVES = NativePolicy()
_FILE_LIFE_S = 30 * 86400
"""How long input and result files are kept, as OpenAI keeps them."""
_GARBAGE = 20_000
"""After how many new objects the collector looks for cycles; lines leave none behind."""
_M_ARENA_MAX = -8  # of glibc's malloc.h
_DRAIN_S = 5.0
"""How long the end of a process may take beyond the grace time of its settings."""


@dataclass(frozen=True, slots=True)
class App:
    """A data directory at work."""

    service: Service
    uploads: Uploads
    health: Health
    metrics: Metrics
    project_id: ProjectId
    """The project `default`."""
    first_key: str | None
    """The key that this start made; None if there was one."""


@contextlib.asynccontextmanager
async def open_app(
    settings: Settings,
    *,
    deliveries: DeliveryPolicy = _DELIVERIES,
    circuits: CircuitPolicy = _CIRCUITS,
    natives: NativePolicy = _NATIVES,
) -> AsyncGenerator[App]:
    """Take up the work of a data directory, and leave it in good order at the end.

    Args:
        deliveries: How patient to be with webhooks.
        circuits: When to leave an upstream alone that fails.
        natives: How patient to be with providers' batch APIs.

    Raises:
        DataDirInUse: Another process works in it.
        InvalidSettings: The directory cannot be used.
    """
    data_dir = settings.data_dir
    with _owned(data_dir):
        health = Health()
        metrics = Metrics(health)
        engine = MemoryEngine()
        store = SqlStore(store_url(data_dir), jobs=engine)
        blobs = ObjectBlobs(data_dir / "blobs")
        segments = LocalSegments(data_dir / "segments")
        routes = _make_routes(settings)
        feeder = Feeder(store=store, engine=engine)
        options = _worker_options(settings, circuits)
        worker = Worker(
            store=store,
            blobs=blobs,
            segments=segments,
            routes=routes,
            policies={
                upstream.name: _admission_policy(upstream, circuits)
                for upstream in settings.upstreams
            },
            health=health,
            metrics=metrics,
            options=options,
            wants_more=feeder.has_room,
            took=feeder.hold,
        )
        feeder.serve(worker)
        runner = NativeRunner(
            store=store,
            engine=engine,
            blobs=blobs,
            routes=routes,
            collector=Collector(
                store=store,
                blobs=blobs,
                segments=segments,
                health=health,
                stats=metrics.work,
                worker_id=options.worker_id,
                lease_s=options.lease_s,
            ),
            policy=replace(natives, cancel_grace_s=options.cancel_grace_s),
            feed=feeder.poke,
            stop_grace_s=settings.server.shutdown_grace_s,
        )
        lifecycle = Lifecycle(
            store=store,
            blobs=blobs,
            segments=segments,
            engine=engine,
            accepts_model=lambda model, name: routes.find(model, upstream=name) is not None,
            options=_lifecycle_options(settings),
            feed=feeder.poke,
            stats=metrics.work,
            natives=NativePlanner(routes),
        )
        engine.handle(JobKind.VALIDATE, lifecycle.validate)
        engine.handle(JobKind.SLICE, worker.run_slice)
        engine.handle(JobKind.FINALIZE, lifecycle.settle)
        engine.handle(JobKind.EXPIRE, lifecycle.settle)
        engine.handle(JobKind.NATIVE, runner.advance)
        uploads = Uploads(store=store, blobs=blobs, limits=_service_limits(settings))
        sender = HttpWebhookSender()
        await store.open()
        try:
            project_id, choices = await _ensure_projects(settings, store)
            service = Service(
                store=store,
                blobs=blobs,
                partial=PartialResults(store=store, segments=segments),
                upstreams=routes,
                limits=_service_limits(settings),
                choices=choices,
            )
            deliverer = Deliverer(
                store=store,
                engine=engine,
                sender=sender,
                targets=await _ensure_webhooks(settings, store),
                policy=deliveries,
                stop_grace_s=settings.server.shutdown_grace_s,
            )
            engine.handle(JobKind.WEBHOOK, deliverer.deliver)
            first_key = await _ensure_key(settings, store, project_id)
            await asyncio.to_thread(blobs.delete_leftovers)
            await recover(
                store=store,
                blobs=blobs,
                segments=segments,
                engine=engine,
                find_after_s=routes.find_after_s,
            )
            async with _plain_errors(), asyncio.TaskGroup() as tasks:
                working = tasks.create_task(worker.run())
                handing = tasks.create_task(engine.run())
                others = [
                    tasks.create_task(feeder.run()),
                    tasks.create_task(keep_up(store=store, blobs=blobs)),
                    tasks.create_task(watch_deliveries(store=store, engine=engine)),
                    tasks.create_task(watch_native_runs(store=store, engine=engine)),
                ]
                try:
                    yield App(service, uploads, health, metrics, project_id, first_key)
                finally:
                    for other in others:
                        other.cancel()
                    worker.stop()
                    deliverer.stop()
                    runner.stop()
                    await _end(engine, settings.server.shutdown_grace_s + _DRAIN_S)
                    handing.cancel()
                    worker.close()
                    working.cancel()
        finally:
            await routes.close()
            await sender.close()
            await store.close()


@contextlib.asynccontextmanager
async def _plain_errors() -> AsyncGenerator[None]:
    """Let the one error of a group of tasks out as itself."""
    try:
        yield
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from None
        raise


async def serve(settings: Settings, *, announce: Callable[[str, App], None]) -> None:
    """Serve the API and run the work until SIGTERM or SIGINT.

    Args:
        announce: Called with the API's address once it answers.

    Raises:
        InvalidSettings: The address cannot be listened on; nothing was made.
    """
    raise_file_limit()
    with _listen(settings.server.host, settings.server.port) as listener:
        await _serve(settings, listener, announce=announce)
    _log.info("Stopped.")


async def _serve(
    settings: Settings, listener: socket.socket, *, announce: Callable[[str, App], None]
) -> None:
    async with open_app(settings) as app:
        open_project = None if settings.server.auth else app.project_id
        api = create_api(
            app.service, app.uploads, app.health, app.metrics, open_project=open_project
        )
        server = _Server(
            uvicorn.Config(
                api,
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_graceful_shutdown=math.ceil(settings.server.shutdown_grace_s),
            )
        )
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, server.ask_to_stop)
        serving = asyncio.create_task(server.serve([listener]))
        try:
            while not (server.started or serving.done()):  # noqa: ASYNC110  (no event to await)
                await asyncio.sleep(0.01)
            if server.started:
                # What lives now lives long: the collector need not walk it again and again.
                gc.collect()
                gc.freeze()
                gc.set_threshold(_GARBAGE)
                announce(_address(listener), app)
            await serving
        finally:
            server.should_exit = True
            await serving


class _Server(uvicorn.Server):
    """Uvicorn, without its hold on signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield

    def ask_to_stop(self) -> None:
        """Stop in good order; asked a second time, at once."""
        _log.info("Stopping; what is in flight may end. A second signal stops at once.")
        self.force_exit = self.should_exit
        self.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    try:
        place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(place[0])
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(place[4])
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise InvalidSettings(
            f"The address {host}, port {port}, cannot be listened on: {error.strerror}. "
            "Choose others with --host and --port; port 0 takes a free one."
        ) from error
    return listener


def _address(listener: socket.socket) -> str:
    """Where it listens; the port is the real one also if 0 was asked for."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def raise_file_limit() -> None:
    """Allow as many open files as the system lets us: connections and segments need them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def _owned(data_dir: Path) -> Generator[None]:
    """Hold a data directory for this process alone; the system lets go of it at its end."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InvalidSettings(
            f"The data directory {data_dir} cannot be used: {error.strerror}."
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataDirInUse(
                f"Another Penstock process works in {data_dir}; stop it, or choose another "
                "directory with --data-dir."
            ) from None
        yield
    finally:
        os.close(lock)


async def _ensure_projects(
    settings: Settings, store: SqlStore
) -> tuple[ProjectId, dict[ProjectId, UpstreamChoices]]:
    """Make the projects of the settings.

    Returns:
        The project `default`, and the upstreams that each project may choose.
    """
    headers = {each.name: KINDS[each.kind].client_headers for each in settings.upstreams}
    choices: dict[ProjectId, UpstreamChoices] = {}
    for project in settings.projects:
        owner = await store.ensure_project(project.name, weight=project.weight)
        choices[owner.id] = {name: headers[name] for name in project.allow_upstreams}
        for key in project.api_keys:
            await _add_key(store, owner.id, project.name, key.get_secret_value())
    return (await store.ensure_project(DEFAULT_PROJECT)).id, choices


async def _ensure_webhooks(
    settings: Settings, store: SqlStore
) -> dict[WebhookId, WebhookTarget]:
    """Put the webhooks of the settings in force."""
    targets: dict[WebhookId, WebhookTarget] = {}
    in_force: list[Webhook] = []
    for hook in settings.webhooks:
        project_id = (await store.ensure_project(hook.project)).id
        webhook_id = _webhook_id(project_id, hook.url)
        in_force.append(Webhook(id=webhook_id, project_id=project_id, url=hook.url))
        targets[webhook_id] = WebhookTarget(
            url=hook.url,
            keys=hook.keys,
            allow_private_addresses=hook.allow_private_addresses,
        )
    await store.set_webhooks(in_force)
    return targets


def _webhook_id(project_id: ProjectId, url: str) -> WebhookId:
    """The same at each start, so that what was queued finds its webhook again."""
    digest = hashlib.sha256(f"{project_id} {url}".encode()).hexdigest()
    return WebhookId(f"we_{digest[:24]}")


async def _ensure_key(settings: Settings, store: SqlStore, project_id: ProjectId) -> str | None:
    """Make the key of the project `default`, as the settings say or on an empty directory."""
    if settings.api_key is not None:
        await _add_key(store, project_id, DEFAULT_PROJECT, settings.api_key.get_secret_value())
        return None
    if settings.projects or not settings.server.auth or await store.list_keys():
        return None
    key = new_key()
    await _add_key(store, project_id, DEFAULT_PROJECT, key)
    _write_private(settings.data_dir / KEY_FILE, f"{key}\n")
    return key


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(text)


async def _add_key(store: SqlStore, project_id: ProjectId, project: str, key: str) -> None:
    record = ApiKey(
        id=KeyId(f"key_{secrets.token_hex(8)}"),
        project_id=project_id,
        project=project,
        hint=key_hint(key),
        created_at=int(time.time()),
    )
    await store.add_key(record, digest=key_digest(key))


async def _end(engine: MemoryEngine, patience_s: float) -> None:
    try:
        async with asyncio.timeout(patience_s):
            await engine.stop()
    except TimeoutError:
        _log.warning("Some work did not end in time; the next start takes it up.")


def _make_routes(settings: Settings) -> Routes:
    members: dict[str, list[Upstream]] = {}
    for upstream in settings.upstreams:
        members.setdefault(upstream.group or upstream.name, []).append(upstream)
    return Routes(
        [
            Route(
                name=name,
                upstreams=tuple(map(_make_upstream, group)),
                models=group[0].models,
                native=_make_native(group[0]),
            )
            for name, group in members.items()
        ]
    )


def _make_upstream(upstream: Upstream) -> LineUpstream:
    kind = KINDS[upstream.kind]
    http = OpenAIHttpUpstream(
        name=upstream.name,
        base_url=upstream.base_url,
        api_key=upstream.api_key.get_secret_value() if upstream.api_key else None,
        max_concurrency=upstream.max_concurrency,
        request_timeout_s=upstream.request_timeout_s,
        connect_timeout_s=upstream.connect_timeout_s,
        first_byte_timeout_s=upstream.first_byte_timeout_s,
        silence_timeout_s=upstream.silence_timeout_s,
        streams=upstream.stream,
        headers=kind.headers,
    )
    if kind.form is None:
        return http
    translation, endpoint = _FORMS[kind.form]
    return TranslatedUpstream(http, translation=translation, endpoint=endpoint)


_FORMS: dict[str, tuple[Translation, str]] = {"anthropic": (anthropic, anthropic.MESSAGES)}
"""What translates, and where it is sent, by the name that `upstream.kinds` gives it."""
_BATCH_ADAPTERS: dict[str, Callable[[Upstream], BatchUpstream]] = {
    "openai": lambda upstream: OpenAIBatchUpstream(
        name=upstream.name,
        base_url=upstream.base_url,
        api_key=upstream.api_key.get_secret_value() if upstream.api_key else None,
        dialect=DIALECTS[upstream.kind],
        connect_timeout_s=upstream.connect_timeout_s,
    ),
    "anthropic": lambda upstream: AnthropicBatchUpstream(
        name=upstream.name,
        base_url=upstream.base_url,
        api_key=upstream.api_key.get_secret_value() if upstream.api_key else None,
        connect_timeout_s=upstream.connect_timeout_s,
    ),
    "bedrock": lambda upstream: BedrockBatchUpstream(
        name=upstream.name,
        region=upstream.region or "",
        storage=upstream.batch_storage or "",
        role_arn=upstream.role_arn or "",
        endpoint=upstream.batch_url,
        storage_endpoint=upstream.batch_storage_url,
        connect_timeout_s=upstream.connect_timeout_s,
    ),
    "vertex": lambda upstream: VertexBatchUpstream(
        name=upstream.name,
        project=upstream.google_project or "",
        region=upstream.region or "",
        storage=upstream.batch_storage or "",
        service_account=upstream.service_account,
        endpoint=upstream.batch_url,
        storage_endpoint=upstream.batch_storage_url,
        connect_timeout_s=upstream.connect_timeout_s,
    ),
}
"""What speaks to batch APIs, by the name that `upstream.kinds` gives it."""


def _make_native(upstream: Upstream) -> NativeUse | None:
    batches = KINDS[upstream.kind].batches
    if upstream.mode == "lines" or batches is None:
        return None
    return NativeUse(
        upstream=_BATCH_ADAPTERS[batches](upstream),
        from_requests=upstream.native_from if upstream.mode == "auto" else 1,
        falls_back=upstream.fallback == "lines",
    )


def _admission_policy(upstream: Upstream, circuits: CircuitPolicy) -> AdmissionPolicy:
    return AdmissionPolicy(
        concurrency=ConcurrencyPolicy(
            most=upstream.max_concurrency,
            initial=upstream.initial_concurrency,
            queue_reserve=upstream.queue_reserve,
        ),
        retries=RetryPolicy(max_attempts=upstream.max_attempts),
        circuits=circuits,
        weight=upstream.weight,
        requests_per_minute=upstream.requests_per_minute,
        tokens_per_minute=upstream.tokens_per_minute,
    )


def _worker_options(settings: Settings, circuits: CircuitPolicy) -> WorkerOptions:
    worker = settings.worker
    return WorkerOptions(
        parked_patience_s=circuits.patience_s,
        worker_id=f"{os.uname().nodename}-{os.getpid()}",
        lease_s=worker.lease_s,
        flush_interval_s=worker.flush_interval_s,
        flush_bytes=worker.flush_bytes,
        cancel_grace_s=worker.cancel_grace_s,
        shutdown_grace_s=settings.server.shutdown_grace_s,
    )


def _lifecycle_options(settings: Settings) -> LifecycleOptions:
    limits, worker = settings.limits, settings.worker
    return LifecycleOptions(
        max_requests=limits.requests_per_batch,
        max_line_bytes=limits.line_bytes,
        max_embedding_inputs=limits.embedding_inputs,
        max_faults=limits.reported_faults,
        one_model=limits.strict_openai,
        slice_requests=worker.slice_requests,
        slice_bytes=worker.slice_bytes,
        file_retention_s=_FILE_LIFE_S,
        served_models=settings.served_models,
    )


def _service_limits(settings: Settings) -> ServiceLimits:
    limits = settings.limits
    return ServiceLimits(
        input_file_bytes=limits.input_file_bytes,
        default_completion_window=limits.default_completion_window,
        max_completion_window=limits.max_completion_window,
        input_file_life_s=_FILE_LIFE_S,
        is_strict=limits.strict_openai,
    )


def greeting(address: str, app: App, settings: Settings) -> str:
    """What `serve` prints once it answers."""
    lines = [f"Penstock {__version__} listens on {address} (data in {settings.data_dir})."]
    if not settings.upstreams:
        lines.append(
            "There is no upstream yet, so every batch will fail: add --upstream URL or an "
            "[[upstreams]] table to the settings."
        )
    if app.first_key is not None:
        lines += [
            f"Your API key, shown only this once: {app.first_key}",
            f"It is kept in {settings.data_dir / KEY_FILE} for the commands of this directory.",
        ]
    if not settings.server.auth:
        lines.append("No key is asked for.")
    return "\n".join(lines)


def run_server(settings: Settings) -> None:
    """Serve until the process is told to stop. What `penstock serve` does."""
    import uvloop  # noqa: PLC0415  (not on every platform)

    def announce(address: str, app: App) -> None:
        print(greeting(address, app, settings), flush=True)

    _share_arenas()
    uvloop.run(serve(settings, announce=announce))


def _share_arenas() -> None:
    """Let all threads share two of glibc's memory arenas.

    Each thread would get one of its own, and what one of them once needed stays with it.
    """
    import ctypes  # noqa: PLC0415  (needed here alone)

    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)
