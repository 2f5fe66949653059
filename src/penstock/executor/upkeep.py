"""Upkeep: what a dead process left behind, and what has had its time."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog

from penstock import clock
from penstock.blobs.base import Blobs
from penstock.blobs.segments import Segments
from penstock.engine.base import Engine
from penstock.errors import Conflict, NotFound, StorageUnavailable
from penstock.executor.members import Pace, alone
from penstock.executor.sweep import Sweeper, next_sweep
from penstock.model import (
    KEY_LIFE_S,
    BatchStatus,
    File,
    Job,
    JobKind,
    Upload,
    UploadStatus,
)
from penstock.store.base import Store
from penstock.telemetry import Health

_log = structlog.get_logger()

_EVERY_S = 60.0
_LOOK_EVERY_S = 2.0
_LOOK_AT_RUNS_S = 30.0
_LOOKS_PER_S = 2.0
"""How often all workers together look, at most."""
_REMEMBER_S = 30 * 86400
"""How long deliveries and uploads are listed after they have ended."""
_AT_ONCE = 100
_PING_S = 2.0
"""How often an API without workers asks whether the database takes writes."""
_LOOK_AT_STORAGE_S = 5.0
_STORAGE_PATIENCE_S = 5.0
_STORAGE_FAULT = "file_storage"


async def recover(
    *,
    store: Store,
    blobs: Blobs,
    segments: Segments,
    engine: Engine,
    find_after_s: float = 0.0,
) -> None:
    """Take up the work of a data directory where the last process left it.

    Only for a process that has the directory to itself, before anything is written.

    Args:
        find_after_s: After how long providers can be asked for jobs whose submission the end
            of the last process has cut off.
    """
    running = await store.recover_slices()
    batches = await _enqueue_unfinished(store, engine)
    await engine.enqueue(await store.recover_native_runs(due_at=clock.now() + find_after_s))
    await Sweeper(store=store, blobs=blobs, segments=segments).delete_unnamed()
    if batches:
        _log.info("Going on where it stopped.", batches=batches, slices=running)


async def _enqueue_unfinished(store: Store, engine: Engine) -> int:
    """Enqueue what batches that are not final, and deliveries, are waiting for.

    Returns:
        How many batches there are.
    """
    unfinished = await store.list_unfinished()
    jobs: list[Job] = []
    for batch in unfinished:
        if batch.status is BatchStatus.VALIDATING:
            jobs.append(Job(kind=JobKind.VALIDATE, id=batch.id))
        jobs.append(Job(kind=JobKind.FINALIZE, id=batch.id))
        jobs.append(Job(kind=JobKind.EXPIRE, id=batch.id, due_at=batch.expires_at))
    await engine.enqueue(jobs)
    await engine.enqueue(await store.list_due_deliveries(until=None))
    return len(unfinished)


async def find_lost_work(
    *, store: Store, engine: Engine, lease_s: float, is_first: Callable[[], bool]
) -> None:
    """See to it that no work of a cluster is lost with the process that had it, until
    cancelled.

    Slices whose leases have ended become pending again, if the database has answered for as
    long as a lease. Jobs that batches wait for are
    enqueued anew, should the engine have lost them. One worker of all looks often; the others
    seldom, for the case that it does not.

    Args:
        lease_s: How long a slice stays with a worker that gives no sign of life.
        is_first: Whether this worker is the one that looks often.
    """
    looked_at = float("-inf")
    answers_since = time.monotonic()
    while True:
        try:
            await store.read_clock()
            # When the database was away, those who live extend their leases first.
            if time.monotonic() - answers_since >= lease_s:
                await _hand_on(store)
            if is_first() and time.monotonic() - looked_at >= lease_s:
                await _enqueue_lost(store, engine)
                looked_at = time.monotonic()
        except StorageUnavailable as error:
            _log.warning("Lost work cannot be looked for for now.", error=str(error))
            answers_since = time.monotonic()
        # As often as leases are extended: whatever hinders that is noticed here as well.
        every_s = lease_s / 3
        await asyncio.sleep(min(_LOOK_EVERY_S, every_s) if is_first() else every_s)


async def _hand_on(store: Store) -> None:
    if released := await store.release_slices(now=clock.now()):
        _log.warning("Workers are gone; their slices are handed on.", slices=released)


async def _enqueue_lost(store: Store, engine: Engine) -> None:
    now = clock.now()
    await engine.enqueue(await store.list_lost_jobs(now=now))
    await engine.enqueue(await store.list_due_deliveries(until=None))
    await engine.enqueue([next_sweep(now)])


async def keep_up(*, store: Store, blobs: Blobs) -> None:
    """Delete files whose time is over and forget what ended long ago, every minute, until
    cancelled."""
    while True:
        try:
            now = int(clock.now())
            while over := await store.list_expired_files(now=now, limit=_AT_ONCE):
                for file in over:
                    await _delete_file(store, blobs, file)
            while late := await store.list_late_uploads(now=now, limit=_AT_ONCE):
                for upload in late:
                    await _end_upload(store, blobs, upload)
            await store.forget_ended(
                ended_before=now - _REMEMBER_S, begun_before=now - KEY_LIFE_S
            )
        except StorageUnavailable as error:
            _log.warning("Upkeep cannot go on for now.", error=str(error))
        await asyncio.sleep(_EVERY_S)


async def _pause(pace: Pace) -> None:
    """Wait until the next look, and not in step with other workers."""
    await asyncio.sleep(pace(_LOOK_EVERY_S, _LOOKS_PER_S) * random.uniform(0.75, 1.25))


async def watch_deliveries(*, store: Store, engine: Engine, pace: Pace = alone) -> None:
    """Look every 2 s, or one of several workers does, for events that are due, until
    cancelled.

    The engine knows of those that came about in this process. Others are made due from
    outside, by `penstock webhooks replay`.
    """
    while True:
        await _pause(pace)
        try:
            await engine.enqueue(await store.list_due_deliveries(until=clock.now()))
        except StorageUnavailable as error:
            _log.warning("Deliveries cannot be looked at for now.", error=str(error))


async def watch_native_runs(*, store: Store, engine: Engine) -> None:
    """Look every 30 s for native runs that are due, until cancelled: the engine forgets a job
    whose step has failed."""
    while True:
        await asyncio.sleep(_LOOK_AT_RUNS_S)
        try:
            await engine.enqueue(await store.list_native_jobs(until=clock.now()))
        except StorageUnavailable as error:
            _log.warning("Native runs cannot be looked at for now.", error=str(error))


async def watch_database(*, store: Store, health: Health) -> None:
    """Let an API that is alone in its process tell whether the database takes writes, until
    cancelled. Beside workers, these tell it."""
    while True:
        try:
            await store.ping()
        except StorageUnavailable as error:
            if health.fail("database", str(error)):
                _log.error("The database takes no writes.", error=str(error))
        else:
            if health.recover("database"):
                _log.info("The database takes writes again.")
        await asyncio.sleep(_PING_S)


async def watch_storage(
    *,
    look: Callable[[], Awaitable[None]],
    name: str,
    health: Health,
    every_s: float = _LOOK_AT_STORAGE_S,
    patience_s: float = _STORAGE_PATIENCE_S,
) -> None:
    """Tell whether the storage of files can be reached, until cancelled. A probe of the process
    costs nothing then, and its answer is a few seconds old at most.

    Args:
        look: Asks the storage for as little as there is, or raises `StorageUnavailable`.
        name: The storage, for people.
        every_s: How long to wait between two looks.
        patience_s: After how long without an answer there is none.
    """
    while True:
        try:
            async with asyncio.timeout(patience_s):
                await look()
        except (StorageUnavailable, TimeoutError) as error:
            message = str(error) or (
                f"The storage {name} did not answer within {patience_s:g} s; see whether it "
                "and the network work."
            )
            if health.fail(_STORAGE_FAULT, message):
                _log.error("Files cannot be read or written for now.", error=message)
        else:
            if health.recover(_STORAGE_FAULT):
                _log.info("Files can be read and written again.")
        await asyncio.sleep(every_s)


async def _end_upload(store: Store, blobs: Blobs, upload: Upload) -> None:
    with suppress(Conflict):  # it has ended otherwise
        await store.end_upload(upload.id, UploadStatus.EXPIRED, now=int(clock.now()))
        keys = [key async for key in blobs.iter_keys(f"parts/{upload.id}")]
        if keys:
            await blobs.delete(list(await store.unused_blobs(keys)))


async def _delete_file(store: Store, blobs: Blobs, file: File) -> None:
    try:
        gone = await store.delete_file(file.project_id, file.id, now=int(clock.now()))
    except NotFound:
        return
    if gone is not None:
        await blobs.delete([gone.blob_key])
    _log.info("A file's time is over.", file_id=file.id)
