"""How fast a file goes in, is checked, and how fast results come together.

    python -m benchmarks.stages            files of 200 MB
    python -m benchmarks.stages --smoke    files of 8 MB

Validation is the check of a whole file in this process, against a bare loop that decodes the
same lines with msgspec. Upload is `POST /files` to a served Penstock, against `cat` to a new
file with a sync at its end. Finalization is what turns the segments of a batch into its result
file, in this process, against `cat` of as many bytes with a sync.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from benchmarks import harness
from penstock.blobs.folder import FolderBlobs
from penstock.blobs.local_segments import LocalSegments
from penstock.blobs.segments import Kind
from penstock.executor.lifecycle import Lifecycle, LifecycleOptions
from penstock.executor.native_plan import NativePlanner
from penstock.executor.replies import reply_line
from penstock.jsonl import InputChecker, InputRules
from penstock.model import (
    Batch,
    BatchId,
    BatchStatus,
    Counts,
    File,
    FileId,
    Job,
    Purpose,
    Slice,
    Usage,
    find_endpoint,
)
from penstock.store.base import BatchChange, SliceReport
from penstock.store.sql import SqlStore
from penstock.telemetry import WorkStats
from penstock.upstream.base import Reply
from penstock.upstream.routes import Routes

_MB = 1_000_000
_PIECE = 1 << 20
_REPEATS = 3
_SLICE = 256


class _Line(msgspec.Struct):
    custom_id: str
    body: msgspec.Raw


def rate(size: int, seconds: list[float]) -> float:
    return size / _MB / statistics.median(seconds)


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def cat(source: Path, target: Path) -> float:
    """Seconds to copy a file as plainly as can be, and to sync it."""
    began = time.perf_counter()
    with target.open("wb") as file:
        subprocess.run(["cat", str(source)], stdout=file, check=True)
        os.fsync(file.fileno())
    taken = time.perf_counter() - began
    target.unlink()
    return taken


def warm(space: Path, size: int) -> None:
    """Write as many bytes and delete them, so that what is measured next finds memory for its
    pages: in a virtual machine a page that was never used costs several times as much."""
    ballast = space / "ballast"
    with ballast.open("wb") as file:
        for _ in range(size // _PIECE + 1):
            file.write(bytes(_PIECE))
        os.fsync(file.fileno())
    ballast.unlink()


def check(source: Path) -> None:
    checker = InputChecker(
        InputRules(
            endpoint=find_endpoint("/v1/chat/completions"),
            max_requests=10_000_000,
            max_line_bytes=16 << 20,
            max_embedding_inputs=50_000,
            max_faults=100,
            one_model=False,
            slice_requests=_SLICE,
            slice_bytes=2 << 20,
            accepts_model=lambda _: True,
        )
    )
    with source.open("rb") as file:
        while piece := file.read(_PIECE):
            checker.feed(piece)
    checked = checker.finish()
    assert checked is not None
    assert not checked.faults


def decode(source: Path) -> None:
    """What a bare loop does: decode each line, keep nothing."""
    read = msgspec.json.Decoder(_Line).decode
    with source.open("rb") as file:
        for line in file:
            read(line)


def validation(space: Path, size: int, line_bytes: int) -> dict[str, object]:
    source = space / "in.jsonl"
    harness.write_input(source, size // line_bytes, line_bytes)
    size = source.stat().st_size
    ours = [timed(lambda: check(source)) for _ in range(_REPEATS)]
    bare = [timed(lambda: decode(source)) for _ in range(_REPEATS)]
    return {
        "stage": f"validation, lines of {line_bytes} bytes",
        "mb_per_s": round(rate(size, ours)),
        "beside": "bare msgspec loop",
        "beside_mb_per_s": round(rate(size, bare)),
        "ratio": round(statistics.median(bare) / statistics.median(ours), 2),
    }


def upload(space: Path, size: int) -> dict[str, object]:
    source = space / "in.jsonl"
    harness.write_input(source, size // 1024, 1024)
    size = source.stat().st_size
    with harness.server(space / "data", "http://127.0.0.1:1") as server:
        client = harness.Client(server)
        client.upload(source)  # which warms up both
        ours: list[float] = []
        for _ in range(_REPEATS):
            warm(space, size)
            ours.append(timed(lambda: client.upload(source)))
        peak_mb = server.memory_mb()
    plain = [cat(source, space / "copy") for _ in range(_REPEATS)]
    return {
        "stage": "upload",
        "mb_per_s": round(rate(size, ours)),
        "beside": "cat and fsync",
        "beside_mb_per_s": round(rate(size, plain)),
        "ratio": round(statistics.median(plain) / statistics.median(ours), 2),
        "server_peak_mb": round(peak_mb, 1),
    }


class _NoEngine:
    """Takes jobs and does none of them."""

    async def enqueue(self, jobs: list[Job], *, connection: object | None = None) -> None:
        pass

    async def cancel(self, jobs: list[Job]) -> None:
        pass


class _Stats(WorkStats):
    """Knows when the batch was completed, as a client sees it; tidying up comes after it."""

    ended_at = 0.0

    def count_batch(self, status: BatchStatus) -> None:
        super().count_batch(status)
        self.ended_at = time.perf_counter()


async def finalize(space: Path, size: int) -> dict[str, object]:
    """Prepare a batch of which all slices have ended, and settle it."""
    reply = Reply(status_code=200, body=b'{"text":"%b"}' % (b"x" * 1400), request_id="req_1")
    payload = reply_line("request-0000000", reply)[1]
    slices = size // (len(payload) * _SLICE)
    data_dir = space / "data"
    store = SqlStore(f"sqlite:///{data_dir}/penstock.db", jobs=None)
    data_dir.mkdir()
    await store.open()
    blobs, segments = FolderBlobs(data_dir / "blobs"), LocalSegments(data_dir / "segments")
    project = await store.ensure_project("default")
    taken: list[float] = []
    written = 0
    for number in range(_REPEATS):
        batch_id = BatchId(f"batch_{number}")
        await _prepare_batch(store, segments, batch_id, slices=slices, payload=payload)
        stats = _Stats()
        lifecycle = Lifecycle(
            store=store,
            blobs=blobs,
            segments=segments,
            engine=_NoEngine(),
            accepts_model=lambda _model, _upstream: True,
            options=_lifecycle_options(),
            feed=lambda: None,
            stats=stats,
            natives=NativePlanner(Routes([])),
        )
        warm(space, size)
        began = time.perf_counter()
        await lifecycle.settle(batch_id, asyncio.Event())
        taken.append(stats.ended_at - began)
        batch = await store.get_batch(batch_id)
        assert batch.status is BatchStatus.COMPLETED, batch.status
        assert batch.output_file_id
        file = await store.get_file(project.id, batch.output_file_id)
        written = file.bytes
    output = data_dir / "blobs" / file.blob_key
    warm(space, size)
    plain = [cat(output, space / "copy") for _ in range(_REPEATS)]
    await store.close()
    return {
        "stage": f"finalization of {slices * _SLICE} lines",
        "mb_per_s": round(rate(written, taken)),
        "beside": "cat and fsync",
        "beside_mb_per_s": round(rate(written, plain)),
        "ratio": round(statistics.median(plain) / statistics.median(taken), 2),
    }


async def _prepare_batch(
    store: SqlStore, segments: LocalSegments, batch_id: BatchId, *, slices: int, payload: bytes
) -> None:
    project_id = (await store.ensure_project("default")).id
    now = int(time.time())
    file = File(
        id=FileId(f"file-{batch_id}"),
        project_id=project_id,
        purpose=Purpose.BATCH,
        filename="in.jsonl",
        bytes=1,
        sha256="",
        blob_key=f"in/{batch_id}",
        created_at=now,
    )
    await store.add_file(file)
    batch = Batch(
        id=batch_id,
        project_id=file.project_id,
        status=BatchStatus.VALIDATING,
        endpoint="/v1/chat/completions",
        input_file_id=file.id,
        input_blob_key=file.blob_key,
        completion_window="24h",
        created_at=now,
        expires_at=now + 86_400,
    )
    await store.add_batch(batch)
    pieces = [
        Slice(
            batch_id=batch_id,
            index=index,
            start=index,
            end=index + 1,
            first_line=index * _SLICE + 1,
            requests=_SLICE,
            models=("m",),
        )
        for index in range(slices)
    ]
    change = BatchChange(counts=Counts(total=slices * _SLICE), slices=pieces)
    await store.move_batch(batch_id, BatchStatus.IN_PROGRESS, now=now, change=change)
    for start in range(0, slices, 128):
        ids = [piece.id for piece in pieces[start : start + 128]]
        await store.claim_slices(ids, worker_id="w", lease_s=60, now=time.time())
        for piece in pieces[start : start + 128]:
            writer = segments.open(batch_id, piece.index, 1, requests=_SLICE)
            for line in range(piece.first_line, piece.first_line + _SLICE):
                writer.append(line, Kind.OUTPUT, payload, (1, 0, 1, 0, 2))
            writer.prepare()
            writer.flush()
            writer.close()
        usage = Usage(input_tokens=_SLICE, output_tokens=_SLICE, total_tokens=2 * _SLICE)
        reports = [
            SliceReport(id=name, attempt=1, completed=_SLICE, failed=0, usage=usage, ends=True)
            for name in ids
        ]
        await store.report_slices(reports, lease_s=60, now=time.time())


def _lifecycle_options() -> LifecycleOptions:
    return LifecycleOptions(
        max_requests=10_000_000,
        max_line_bytes=16 << 20,
        max_embedding_inputs=50_000,
        max_faults=100,
        one_model=False,
        slice_requests=_SLICE,
        slice_bytes=2 << 20,
        file_retention_s=86_400,
        served_models=("*",),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    size = (8 if options.smoke else 200) * _MB
    os.sched_setaffinity(0, harness.OTHER_CORE)
    stages: list[Callable[[Path], dict[str, object]]] = [
        lambda space: validation(space, size, 1024),
        lambda space: validation(space, size, 4096),
        lambda space: upload(space, size),
        lambda space: asyncio.run(finalize(space, size)),
    ]
    for stage in stages:
        with harness.workspace() as space:
            print(json.dumps(stage(space)), flush=True)


if __name__ == "__main__":
    main()
