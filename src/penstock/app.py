"""The composition root: with `adapters`, the only place that names implementations.

`open_app` puts the parts together and runs the work; `serving` puts the API before it.

    settings ─► store, blobs, segments ─► service ─► api
                     └─► engine ─► feeder, worker, lifecycle, upkeep

Alone, a process has a data directory to itself. In a cluster, processes share a database, and
each serves the API, works, or does both.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import os
import resource
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from penstock import __version__, clock
from penstock.adapters import open_routes
from penstock.blobs.folder import FolderBlobs
from penstock.blobs.local_segments import LocalSegments
from penstock.blobs.object_segments import ObjectSegments
from penstock.blobs.objects import ObjectBlobs
from penstock.blobs.segments import Segments
from penstock.blobs.storage import look_at, open_blobs
from penstock.engine.memory import MemoryEngine
from penstock.errors import DataDirInUse, InvalidSettings, NotFound, StorageUnavailable
from penstock.executor.admission import AdmissionPolicy
from penstock.executor.budgets import Budgets
from penstock.executor.circuit import CircuitPolicy
from penstock.executor.feeder import Feeder
from penstock.executor.lifecycle import Lifecycle, LifecycleOptions
from penstock.executor.limits import ConcurrencyPolicy
from penstock.executor.members import Members
from penstock.executor.native import NativePolicy, NativeRunner
from penstock.executor.native_lines import Collector
from penstock.executor.native_plan import NativePlanner
from penstock.executor.partial import PartialResults
from penstock.executor.retry import RetryPolicy
from penstock.executor.sweep import Sweeper
from penstock.executor.upkeep import (
    find_lost_work,
    keep_up,
    recover,
    watch_database,
    watch_deliveries,
    watch_native_runs,
    watch_storage,
)
from penstock.executor.webhooks import Deliverer, DeliveryPolicy
from penstock.executor.worker import Worker, WorkerOptions
from penstock.keys import key_digest, key_hint, new_key
from penstock.model import ApiKey, JobKind, KeyId, ProjectId, Webhook, WebhookId
from penstock.places import KEY_FILE, must_keep_files, store_url
from penstock.prices import PriceBook
from penstock.pricing import open_prices, sum_up
from penstock.service import Service, ServiceLimits, UpstreamChoice, UpstreamChoices
from penstock.settings import DEFAULT_PROJECT, Settings, Upstream
from penstock.store.sql import SqlStore
from penstock.telemetry import Health, Metrics
from penstock.uploads import Uploads
from penstock.upstream.kinds import KINDS
from penstock.upstream.routes import Routes
from penstock.upstream.webhook import WebhookTarget
from penstock.upstream.webhook_http import HttpWebhookSender

if TYPE_CHECKING:
    from penstock.engine.postgres import PostgresEngine

_log = structlog.get_logger()

_DELIVERIES = DeliveryPolicy()
_CIRCUITS = CircuitPolicy()
_NATIVES = NativePolicy()
_FILE_LIFE_S = 30 * 86400
"""How long input and result files are kept, as OpenAI keeps them."""
_COUNT_S = 5.0
"""How often the lines that wait are counted."""
_OWNER = "owner"
"""The object that names the database to which a storage belongs."""
_CLOCK_S = 10.0
"""How often the database is asked for its time."""
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


@dataclass(frozen=True, slots=True)
class _Ground:
    """What API and work stand on."""

    engine: "MemoryEngine | PostgresEngine"
    store: SqlStore
    blobs: FolderBlobs | ObjectBlobs
    segments: Segments
    routes: Routes
    health: Health
    metrics: Metrics


@contextlib.asynccontextmanager
async def open_app(
    settings: Settings,
    *,
    serves: bool = True,
    works: bool = True,
    deliveries: DeliveryPolicy = _DELIVERIES,
    circuits: CircuitPolicy = _CIRCUITS,
    natives: NativePolicy = _NATIVES,
) -> AsyncGenerator[App]:
    """Take up the work of a data directory or a cluster, and leave it in good order at the end.

    Args:
        serves: Whether the API will be before it.
        works: Whether it runs lines and all else that batches need; others of its cluster do
            if not.
        deliveries: How patient to be with webhooks.
        circuits: When to leave an upstream alone that fails.
        natives: How patient to be with providers' batch APIs.

    Raises:
        DataDirInUse: Another process works in the directory.
        InvalidSettings: The directory, the database or the storage cannot be used.
    """
    if not works and settings.database_url is None:
        raise InvalidSettings(
            "An API without workers needs a database that it shares with them: set "
            "database_url to a PostgreSQL URL."
        )
    async with contextlib.AsyncExitStack() as stack:
        if settings.database_url is None:
            stack.enter_context(_owned(settings.data_dir))
        ground = await _open_ground(settings, stack)
        store = ground.store
        project_id, choices = await _ensure_projects(settings, store)
        may_sweep = settings.storage_url is None
        if settings.storage_url is not None:
            try:
                await _claim_storage(ground.blobs, settings.storage_url, project_id)
                may_sweep = True
            except StorageUnavailable as error:
                if settings.database_url is None:
                    raise
                _log.warning("It is not known yet whose the storage is.", error=str(error))
        targets = await _ensure_webhooks(settings, store)
        first_key = await _ensure_key(settings, store, project_id) if serves else None
        if works:
            work = _work(
                settings,
                ground,
                targets,
                deliveries=deliveries,
                circuits=circuits,
                natives=natives,
                may_sweep=may_sweep,
            )
            await stack.enter_async_context(work)
        prices = open_prices(settings, ground.routes.find_one)
        if serves:
            counting = asyncio.create_task(_count(store, ground.metrics, prices))
            stack.callback(counting.cancel)
        if not works:
            watching = asyncio.create_task(watch_database(store=store, health=ground.health))
            stack.callback(watching.cancel)
        looking = watch_storage(
            # Of room, workers tell themselves.
            look=lambda: look_at(ground.blobs, key=_OWNER, wants_room=not works),
            name=settings.storage_url or str(settings.data_dir),
            health=ground.health,
        )
        stack.callback(asyncio.create_task(looking).cancel)
        limits = _service_limits(settings)
        yield App(
            service=Service(
                store=store,
                blobs=ground.blobs,
                partial=PartialResults(store=store, segments=ground.segments),
                upstreams=ground.routes,
                limits=limits,
                choices=choices,
                prices=prices,
                clock=clock.now,
            ),
            uploads=Uploads(store=store, blobs=ground.blobs, limits=limits, clock=clock.now),
            health=ground.health,
            metrics=ground.metrics,
            project_id=project_id,
            first_key=first_key,
        )


async def _open_ground(settings: Settings, stack: contextlib.AsyncExitStack) -> _Ground:
    """Open what is kept, and see to it that `stack` closes it."""
    health = Health()
    data_dir, url = settings.data_dir, settings.database_url
    if url is None:
        engine = MemoryEngine()
    else:
        # What a cluster needs is loaded by a cluster alone.
        from penstock.engine.postgres import PostgresEngine  # noqa: PLC0415

        engine = PostgresEngine(url, heartbeat_timeout_s=settings.worker.lease_s)
        stack.push_async_callback(engine.close)
    store = SqlStore(url or store_url(data_dir), jobs=engine)
    stack.push_async_callback(store.close)
    await store.open()
    if url is not None:
        await _set_clock(store)
        following = asyncio.create_task(_follow_clock(store))
        stack.callback(clock.follow_machine)
        stack.callback(following.cancel)
    if settings.storage_url is None:
        with must_keep_files(data_dir):
            blobs = open_storage(settings)
            segments: Segments = LocalSegments(data_dir / "segments")
            await look_at(blobs, key=_OWNER, wants_room=False)
    else:
        blobs = open_storage(settings)
        segments = ObjectSegments(blobs=blobs, store=store, loop=asyncio.get_running_loop())
    routes = open_routes(settings)
    stack.push_async_callback(routes.close)
    return _Ground(engine, store, blobs, segments, routes, health, Metrics(health))


async def _count(store: SqlStore, metrics: Metrics, prices: PriceBook) -> None:
    """Keep count of the lines that wait, here or at providers, and of what jobs there took,
    for `/metrics`, until cancelled."""
    while True:
        with contextlib.suppress(StorageUnavailable):
            metrics.pending_lines = await store.count_pending_lines(now=int(clock.now()))
            natives = await store.count_native_lines()
            metrics.native_lines = {(name, str(at)): n for (name, at), n in natives.items()}
            if spent := await store.sum_native_spent():
                metrics.native_figures = await asyncio.to_thread(
                    sum_up, prices, spent, now=clock.now()
                )
        await asyncio.sleep(_COUNT_S)


def open_storage(settings: Settings) -> FolderBlobs | ObjectBlobs:
    """Where files are kept."""
    return open_blobs(settings.storage_url or str(settings.data_dir / "blobs"), {})


async def _claim_storage(
    blobs: FolderBlobs | ObjectBlobs, url: str, project_id: ProjectId
) -> None:
    """Make sure that a storage belongs to this database: to another, what it keeps would look
    as if nothing named it, and be deleted.

    Args:
        project_id: Of the project `default`, by which the database is known.

    Raises:
        InvalidSettings: It belongs to another.
        StorageUnavailable: It does not answer.
    """
    try:
        owner = await blobs.get_range(_OWNER, 0, await blobs.size(_OWNER))
    except NotFound:

        async def name() -> AsyncIterator[bytes]:
            yield project_id.encode()

        await blobs.put(_OWNER, name())
        return
    if owner.decode(errors="replace") != project_id:
        raise InvalidSettings(
            f"The storage {url} belongs to another Penstock database. Take another prefix, "
            f"such as {url}/{project_id}, or the database_url that it belongs to; if that "
            f"database is gone for good, delete what is there, or only the object '{_OWNER}' "
            "to take it over."
        )


async def _set_clock(store: SqlStore) -> None:
    """Follow the database's clock from now on."""
    asked_at = time.monotonic()
    said = await store.read_clock()
    clock.follow(said, asked_at=asked_at, heard_at=time.monotonic())


async def _follow_clock(store: SqlStore) -> None:
    while True:
        await asyncio.sleep(_CLOCK_S)
        with contextlib.suppress(StorageUnavailable):  # the last answer counts on
            await _set_clock(store)


@contextlib.asynccontextmanager
async def _work(
    settings: Settings,
    ground: _Ground,
    targets: dict[WebhookId, WebhookTarget],
    *,
    deliveries: DeliveryPolicy,
    circuits: CircuitPolicy,
    natives: NativePolicy,
    may_sweep: bool,
) -> AsyncGenerator[None]:
    """Run what batches need, until the context ends.

    Args:
        may_sweep: Whether the storage is surely that of this database.
    """
    store, blobs, segments = ground.store, ground.blobs, ground.segments
    engine, routes, metrics = ground.engine, ground.routes, ground.metrics
    options = _worker_options(settings, circuits, segments)
    members = Members(store=store, worker_id=options.worker_id, version=__version__)
    is_alone = settings.database_url is None
    feeder = Feeder(store=store, engine=engine, share=members.share, pace=members.pace)
    worker = Worker(
        store=store,
        blobs=blobs,
        segments=segments,
        routes=routes,
        policies={
            upstream.name: _admission_policy(upstream, circuits, is_shared=not is_alone)
            for upstream in settings.upstreams
        },
        health=ground.health,
        metrics=metrics,
        options=options,
        wants_more=feeder.has_room,
        took=feeder.hold,
        lacks=feeder.lacks,
        pace=members.pace,
    )
    feeder.serve(worker)
    budgets = Budgets(
        store=store,
        lanes=lambda: worker.lanes,
        worker_id=options.worker_id,
        health=ground.health,
        clock=clock.now,
        pace=members.pace,
    )
    runner = NativeRunner(
        store=store,
        engine=engine,
        blobs=blobs,
        routes=routes,
        collector=Collector(
            store=store,
            blobs=blobs,
            segments=segments,
            health=ground.health,
            stats=metrics.work,
            worker_id=options.worker_id,
            lease_s=options.lease_s,
        ),
        policy=replace(natives, cancel_grace_s=options.cancel_grace_s, lease_s=options.lease_s),
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
    sweeper = Sweeper(
        store=store,
        blobs=blobs,
        segments=segments,
        delete_leftovers=blobs.delete_leftovers if isinstance(blobs, FolderBlobs) else None,
    )
    sender = HttpWebhookSender()
    deliverer = Deliverer(
        store=store,
        engine=engine,
        sender=sender,
        targets=targets,
        policy=deliveries,
        stop_grace_s=settings.server.shutdown_grace_s,
        is_alone=is_alone,
    )
    engine.handle(JobKind.VALIDATE, lifecycle.validate)
    engine.handle(JobKind.SLICE, worker.run_slice)
    engine.handle(JobKind.FINALIZE, lifecycle.settle)
    engine.handle(JobKind.EXPIRE, lifecycle.expire)
    engine.handle(JobKind.WEBHOOK, deliverer.deliver)
    engine.handle(JobKind.NATIVE, runner.advance)
    if may_sweep:  # else others do
        engine.handle(JobKind.SWEEP, sweeper.sweep)
    loops = [
        feeder.run(),
        keep_up(store=store, blobs=blobs),
        watch_deliveries(store=store, engine=engine, pace=members.pace),
        watch_native_runs(store=store, engine=engine),
    ]
    if is_alone:
        if isinstance(blobs, FolderBlobs):
            await asyncio.to_thread(blobs.delete_leftovers)
        await recover(
            store=store,
            blobs=blobs,
            segments=segments,
            engine=engine,
            find_after_s=routes.find_after_s,
        )
    else:
        await members.join()
        loops += [
            members.run(),
            find_lost_work(
                store=store,
                engine=engine,
                lease_s=settings.worker.lease_s,
                is_first=lambda: members.share()[0] == 0,
            ),
        ]
    try:
        async with _plain_errors(), asyncio.TaskGroup() as tasks:
            working = tasks.create_task(worker.run())
            handing = tasks.create_task(engine.run())
            sharing = None if is_alone else tasks.create_task(budgets.run())
            others = [tasks.create_task(loop) for loop in loops]
            try:
                yield
            finally:
                for other in others:
                    other.cancel()
                worker.stop()
                deliverer.stop()
                runner.stop()
                sweeper.stop()
                await _end(engine, settings.server.shutdown_grace_s + _DRAIN_S)
                handing.cancel()
                if sharing is not None:
                    sharing.cancel()  # only now, for lines that were in flight took their part
                worker.close()
                working.cancel()
    finally:
        await sender.close()
        if not is_alone:
            await members.leave()


@contextlib.asynccontextmanager
async def _plain_errors() -> AsyncGenerator[None]:
    """Let the one error of a group of tasks out as itself."""
    try:
        yield
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from None
        raise


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
    offered = {each.name: _choice(each) for each in settings.upstreams}
    choices: dict[ProjectId, UpstreamChoices] = {}
    for project in settings.projects:
        owner = await store.ensure_project(
            project.name,
            weight=project.weight,
            is_background=project.tier == "background",
        )
        choices[owner.id] = {name: offered[name] for name in project.allow_upstreams}
        for key in project.api_keys:
            await _add_key(store, owner.id, project.name, key.get_secret_value())
    return (await store.ensure_project(DEFAULT_PROJECT)).id, choices


def _choice(upstream: Upstream) -> UpstreamChoice:
    headers = KINDS[upstream.kind].client_headers(has_jobs=upstream.mode != "lines")
    return UpstreamChoice(headers=headers, models=upstream.models)


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
    """Make the key of the project `default`, as the settings say or in an empty database."""
    if settings.api_key is not None:
        await _add_key(store, project_id, DEFAULT_PROJECT, settings.api_key.get_secret_value())
        return None
    if settings.projects or not settings.server.auth or await store.list_keys():
        return None
    key = new_key()
    # The file first: a key that is in force and could not be kept would be known to nobody.
    _keep_key(settings.data_dir / KEY_FILE, key)
    await _add_key(store, project_id, DEFAULT_PROJECT, key)
    return key


def _keep_key(path: Path, key: str) -> None:
    try:
        _write_private(path, f"{key}\n")
    except OSError as error:
        raise InvalidSettings(
            f"There is no API key yet, and a first one cannot be kept in {path} "
            f"({error.strerror}); make one with `penstock keys create --project "
            f"{DEFAULT_PROJECT}`, or set api_key."
        ) from error


def _write_private(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
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


async def _end(engine: "MemoryEngine | PostgresEngine", patience_s: float) -> None:
    try:
        async with asyncio.timeout(patience_s):
            await engine.stop()
    except TimeoutError:
        _log.warning("Some work did not end in time; the next start takes it up.")


def _admission_policy(
    upstream: Upstream, circuits: CircuitPolicy, *, is_shared: bool
) -> AdmissionPolicy:
    return AdmissionPolicy(
        is_shared=is_shared,
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


def _worker_options(
    settings: Settings, circuits: CircuitPolicy, segments: Segments
) -> WorkerOptions:
    worker = settings.worker
    return WorkerOptions(
        parked_patience_s=circuits.patience_s,
        worker_id=f"{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(3)}",
        lease_s=worker.lease_s,
        flush_interval_s=max(worker.flush_interval_s, segments.flush_interval_s),
        flush_bytes=max(worker.flush_bytes, segments.flush_bytes),
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
