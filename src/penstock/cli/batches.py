"""The commands that talk to a running server."""

# ruff: noqa: PLC0415  (imports inside commands keep the start short)

import json
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.options import (
    FAILED,
    INTERRUPTED,
    AsJson,
    BatchArgument,
    DataDir,
    EndpointName,
    check_file_exists,
    console,
    print_json,
    print_view,
    read_endpoint,
)
from penstock.errors import Conflict, InvalidRequest, PenstockError
from penstock.model import ENDPOINTS, BatchStatus, find_endpoint, parse_window

if TYPE_CHECKING:
    from penstock.client import BatchObject, Client

_LOOKED_AT_BYTES = 4 << 20
"""How much of an error file is read to tell why lines failed."""


@contextmanager
def _open_client(data_dir: Path | None) -> Generator["Client"]:
    from penstock.client import Client
    from penstock.places import find_key, find_url

    with Client(find_url(), find_key(data_dir)) as client:
        yield client


def submit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The input file, JSONL.")],
    *,
    endpoint: EndpointName = None,
    job_name: Annotated[
        str | None, typer.Option("--job-name", metavar="N", help="A name for people.")
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option("--metadata", metavar="K=V", help="A pair to keep with it; repeatable."),
    ] = None,
    completion_window: Annotated[
        str | None,
        typer.Option("--completion-window", metavar="W", help="Such as 90s, 1h, 24h or 7d."),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Watch it until it has ended, as `watch` does.")
    ] = False,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Upload FILE and create a batch from it."""
    # All that can be known to be wrong is told before the upload.
    pairs = _read_pairs(metadata or [])
    if completion_window is not None and parse_window(completion_window) is None:
        raise InvalidRequest(
            f'--completion-window is "{completion_window}"; it must be a whole number from 1 '
            "followed by s, m, h or d, such as 24h."
        )
    check_file_exists(file)
    path = read_endpoint(endpoint).path if endpoint else _infer_endpoint(file)
    with _open_client(data_dir) as client:
        batch = _submit(
            client,
            file,
            endpoint=path,
            completion_window=completion_window,
            job_name=job_name,
            metadata=pairs or None,
        )
        if not as_json:
            typer.echo(f"Batch {batch.id} was created from {file}.")
        if wait:
            _watch(client, batch.id, as_json=as_json)
        elif as_json:
            print_json(batch.document)
        else:
            typer.echo(f"Watch it with: penstock watch {batch.id}")


def _submit(client: "Client", file: Path, **batch: Any) -> "BatchObject":
    from penstock.terminal import transfer_bar

    bar, task = transfer_bar(console(stderr=True), "uploading", file.stat().st_size)
    with bar:
        file_id = client.upload(file, on_progress=lambda sent: bar.advance(task, sent))
    try:
        return client.create_batch(input_file_id=file_id, **batch)
    except PenstockError:
        with suppress(PenstockError):
            client.delete_file(file_id)
        raise


def list_batches(
    *,
    limit: Annotated[
        int, typer.Option("--limit", min=1, metavar="N", help="How many to show at most.")
    ] = 20,
    status: Annotated[
        BatchStatus | None, typer.Option("--status", help="Only those with this status.")
    ] = None,
    job_name: Annotated[
        str | None, typer.Option("--job-name", metavar="N", help="Only those of this name.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show all of them.")] = False,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List batches, newest first."""
    with _open_client(data_dir) as client:
        batches = list(
            client.iter_batches(
                limit=None if everything else limit,
                status=None if status is None else status.value,
                job_name=job_name,
            )
        )
    if as_json:
        print_json({"object": "list", "data": [batch.document for batch in batches]})
    elif batches:
        from penstock.terminal import batches_table

        print_view(batches_table(batches, now=time.time()))
    else:
        typer.echo(
            "There is no such batch." if status or job_name else "There is no batch yet."
        )


def status(batch_id: BatchArgument, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show how a batch stands."""
    from penstock.terminal import batch_view

    with _open_client(data_dir) as client:
        batch = client.get_batch(batch_id)
        is_running = batch.status == BatchStatus.IN_PROGRESS
        upstreams = client.list_upstreams() if is_running and not as_json else []
        costs = client.get_costs(batch.id)
        reasons = [] if as_json else _why_failed(client, batch)
    if as_json:
        print_json(batch.document | ({"costs": costs.document} if costs else {}))
    else:
        items = costs.data if costs else ()
        print_view(
            batch_view(
                batch, now=time.time(), upstreams=upstreams, costs=items, reasons=reasons
            )
        )


def _why_failed(client: "Client", batch: "BatchObject") -> list[str]:
    """Why lines failed, as far as the beginning of the error file says."""
    from penstock.terminal import failure_reasons

    if not batch.error_file_id:
        return []
    try:
        lines, is_whole = client.read_lines(batch.error_file_id, most_bytes=_LOOKED_AT_BYTES)
    except PenstockError:  # it was deleted, for example
        return []
    reasons = failure_reasons(lines)
    if reasons and not is_whole:
        reasons.append(f"in the first {len(lines):,} lines of the error file")
    return reasons


def watch(batch_id: BatchArgument, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Watch a batch until it has ended.

    Exit 0 if it completed and no line failed, else 1.
    """
    with _open_client(data_dir) as client:
        _watch(client, batch_id, as_json=as_json)


def _watch(client: "Client", batch_id: str, *, as_json: bool) -> None:
    from penstock import terminal

    try:
        batch = terminal.watch(client, batch_id, console(stderr=as_json))
    except KeyboardInterrupt:
        typer.echo(
            f"The batch goes on; watch it again with: penstock watch {batch_id}", err=True
        )
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json(batch.document)
    else:
        typer.echo(terminal.summary(batch))
        for reason in _why_failed(client, batch):
            typer.echo(f"  {reason}")
        if batch.output_file_id or batch.error_file_id:
            typer.echo(f"Fetch its results with: penstock download {batch.id}")
    if not terminal.succeeded(batch):
        raise typer.Exit(FAILED)


def download(
    batch_id: BatchArgument,
    directory: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the files go.")
    ] = Path(),
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Fetch the results of a batch that has ended.

    They are written as ID_output.jsonl and ID_error.jsonl.
    """
    from penstock.terminal import is_final, transfer_bar

    with _open_client(data_dir) as client:
        batch = client.get_batch(batch_id)
        if not is_final(batch):
            raise Conflict(
                f"Batch {batch.id} is {batch.status}, and its files are there once it has "
                f"ended; wait with `penstock watch {batch.id}`."
            )
        _make_directory(directory)
        written: dict[str, dict[str, Any] | None] = {}
        bar, task = transfer_bar(console(stderr=True), "downloading", None)
        with bar:
            for kind, file_id in (
                ("output", batch.output_file_id),
                ("error", batch.error_file_id),
            ):
                written[kind] = None
                if file_id:
                    target = directory / f"{batch.id}_{kind}.jsonl"
                    size = client.download(
                        file_id, target, on_progress=lambda size: bar.advance(task, size)
                    )
                    written[kind] = {"path": str(target), "bytes": size}
    if as_json:
        print_json({"batch_id": batch.id, "status": batch.status, **written})
    else:
        _tell_files(batch, written)
    if batch.status == BatchStatus.FAILED:
        raise typer.Exit(FAILED)


def _tell_files(batch: "BatchObject", written: dict[str, dict[str, Any] | None]) -> None:
    if batch.status == BatchStatus.FAILED:
        typer.echo(
            f"Batch {batch.id} has no files: its input file has faults and nothing was sent; "
            f"see `penstock status {batch.id}`."
        )
        return
    for kind, how in (("output", "succeeded"), ("error", "failed")):
        file = written[kind]
        if file is None:
            typer.echo(f"There is no {kind} file, because no line {how}.")
        else:
            typer.echo(f"{kind.capitalize()} file: {file['path']} ({file['bytes']:,} bytes)")


def cancel(batch_id: BatchArgument, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Cancel a batch; what has ended already is kept."""
    with _open_client(data_dir) as client:
        batch = client.cancel_batch(batch_id)
    if as_json:
        print_json(batch.document)
    elif batch.status == BatchStatus.CANCELLING:
        typer.echo(f"Batch {batch.id} is cancelling: lines in flight may still end.")
    else:
        typer.echo(f"Batch {batch.id} is {batch.status}.")


# Input


def _read_pairs(pairs: list[str]) -> dict[str, str]:
    metadata: dict[str, str] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise InvalidRequest(f'--metadata is "{pair}"; it must be of the form KEY=VALUE.')
        if name in metadata:
            raise InvalidRequest(
                f'--metadata names the key "{name}" twice; each key may stand once.'
            )
        metadata[name] = value
    return metadata


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be made: {error.strerror}.") from error


def _infer_endpoint(path: Path) -> str:
    """The `url` of the first request of a file."""
    try:
        with path.open("rb") as file:
            line, text = 1, file.readline(16 * 2**20)
            while text and not text.strip(b"\xef\xbb\xbf \t\r\n"):
                line, text = line + 1, file.readline(16 * 2**20)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}.") from error
    if not text:
        raise InvalidRequest(f"{path} is empty; it must hold a request on each line.")
    try:
        url = json.loads(text.decode("utf-8-sig"))["url"]
    except (ValueError, TypeError, KeyError, RecursionError):
        url = None
    if not isinstance(url, str) or find_endpoint(url) is None:
        raise InvalidRequest(
            f"Line {line} of {path} has no `url` that names an endpoint; name it with "
            f"--endpoint, one of {', '.join(ENDPOINTS)}."
        )
    return url
