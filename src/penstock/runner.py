"""`penstock run`: a file of requests without a server.

The same parts as the server's, over a data directory of its own beside the output file. It is
deleted when the results are written, and until then the same command goes on where the last
one was stopped or killed.
"""

import asyncio
import contextlib
import hashlib
import os
import shutil
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from penstock.app import App, open_app, raise_file_limit
from penstock.errors import DataDirInUse, InvalidRequest
from penstock.jsonl import CheckedInput
from penstock.model import FINAL, Batch, BatchStatus, Purpose
from penstock.settings import Settings
from penstock.store.base import BatchFilter

_READ_BYTES = 1 << 20
_POLL_S = 0.1
_DIGEST = "input_sha256"


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """What a run reads and writes."""

    input: Path
    output: Path
    errors: Path

    @property
    def state(self) -> Path:
        """The data directory of the run."""
        return self.output.with_name(f"{self.output.name}.penstock")


async def run_file(
    paths: Paths,
    settings: Settings,
    checked: CheckedInput,
    *,
    on_start: Callable[[bool], None],
    on_progress: Callable[[Batch], None],
) -> Batch | None:
    """Run a checked file and write its results.

    Args:
        settings: With `data_dir` being `paths.state`. Of a cluster that they name, nothing is
            read or touched: all is in that directory.
        on_start: Called with whether an earlier run of this file is taken up.
        on_progress: Called with the batch as it stands, several times a second.

    Returns:
        The batch at its end; None if it was interrupted: the same call goes on with it.

    Raises:
        InvalidRequest: The state directory holds the run of another input or endpoint.
        DataDirInUse: The same run is going on in another process.
    """
    raise_file_limit()
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stopped.set)
    async with _open_app(settings, paths) as app:
        batch, is_resumed = await _find_or_create(app, paths, settings, checked)
        on_start(is_resumed)
        while batch.status not in FINAL and not stopped.is_set():
            on_progress(batch)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await stopped.wait()
            batch = await app.service.get_batch(app.project_id, batch.id)
        if batch.status not in FINAL:
            return None
        on_progress(batch)
        if batch.status is not BatchStatus.FAILED:
            await _export(app, batch.output_file_id, paths.output)
            await _export(app, batch.error_file_id, paths.errors)
    shutil.rmtree(paths.state)
    return batch


@contextlib.asynccontextmanager
async def _open_app(settings: Settings, paths: Paths) -> AsyncGenerator[App]:
    # An empty database beside a storage that others use would take their files for leftovers.
    alone = settings.model_copy(update={"database_url": None, "storage_url": None})
    try:
        async with open_app(alone) as app:
            yield app
    except DataDirInUse:
        raise DataDirInUse(
            f"Another process runs into {paths.output} at this moment; wait for its end, or "
            "choose another output with -o."
        ) from None


async def _find_or_create(
    app: App, paths: Paths, settings: Settings, checked: CheckedInput
) -> tuple[Batch, bool]:
    endpoint = checked.endpoint.path if checked.endpoint else ""
    digest = await asyncio.to_thread(_fingerprint, paths.input)
    listed = await app.service.list_batches(
        app.project_id, after=None, limit=1, where=BatchFilter()
    )
    for batch in listed.items:
        if (batch.metadata or {}).get(_DIGEST) != digest or batch.endpoint != endpoint:
            raise InvalidRequest(
                f"{paths.state} holds the unfinished run of another input file. Finish that "
                "one first, choose another output with -o, or delete that directory."
            )
        return batch, True
    file = await app.service.create_file(app.project_id, _LocalForm(paths.input))
    batch = await app.service.create_batch(
        app.project_id,
        input_file_id=file.id,
        endpoint=endpoint,
        completion_window=settings.limits.max_completion_window,
        metadata={_DIGEST: digest},
    )
    return batch, False


async def _export(app: App, file_id: str | None, path: Path) -> None:
    """Write a result file under its own name, whole or not at all. No file: no lines."""
    if file_id is None:
        await asyncio.to_thread(path.unlink, missing_ok=True)
        return
    file = await app.service.get_file(app.project_id, file_id)
    partial = path.with_name(f"{path.name}.part")
    with partial.open("wb") as target:
        async for piece in await app.service.open_content(file):
            await asyncio.to_thread(target.write, piece)
        await asyncio.to_thread(os.fsync, target.fileno())
    partial.replace(path)


class _LocalForm:
    """A file on disk in the form that an upload has."""

    declared_bytes = None

    def __init__(self, path: Path) -> None:
        self._path = path
        self.filename = path.name
        self.fields: Mapping[str, str] = {"purpose": Purpose.BATCH.value}

    async def content(self) -> AsyncIterator[bytes]:
        with self._path.open("rb") as file:
            while piece := await asyncio.to_thread(file.read, _READ_BYTES):
                yield piece


def _fingerprint(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
