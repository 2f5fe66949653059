"""The commands that do the work: serve, run, demo."""

# ruff: noqa: PLC0415  (imports inside commands keep the start short)

import logging
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.options import (
    FAILED,
    INTERRUPTED,
    Config,
    check_file_exists,
    console,
    print_json,
)
from penstock.errors import InvalidRequest, InvalidSettings

if TYPE_CHECKING:
    from penstock.model import Batch, Counts

_NO_LIMIT = 2**53
"""In place of the limits that protect a server from its clients."""

UpstreamUrl = Annotated[
    str | None,
    typer.Option(
        "--upstream",
        metavar="URL",
        help="An OpenAI-compatible server, such as http://127.0.0.1:8000/v1; "
        "its key is taken from PENSTOCK_UPSTREAM_API_KEY.",
    ),
]


def serve(
    *,
    config: Config = None,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", metavar="DIR", help="Where all is kept; ./penstock-data."),
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", metavar="H", help="The address; 127.0.0.1.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", metavar="P", help="The port; 8080. 0 takes a free one."),
    ] = None,
    upstream: UpstreamUrl = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", metavar="KEY", help="The key of the project `default`."),
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Ask for no key; on a loopback address only.")
    ] = False,
    no_workers: Annotated[
        bool,
        typer.Option("--no-workers", help="The API alone, of a cluster whose workers run."),
    ] = False,
) -> None:
    """Run the API and the workers in one process.

    Ready when GET /readyz answers 200. Stop it with Ctrl-C or SIGTERM; after a crash the next
    start goes on where it stopped.
    """
    from penstock.serving import run_server
    from penstock.settings import load_settings, upstream_from_flag
    from penstock.telemetry import configure_logging

    settings = load_settings(
        config=config,
        overrides={
            "data_dir": data_dir,
            "server.host": host,
            "server.port": port,
            "server.auth": False if no_auth else None,
            "api_key": api_key,
            "upstreams": upstream_from_flag(upstream) if upstream else None,
        },
    )
    configure_logging()
    run_server(settings, works=not no_workers)


def run(
    *,
    file: Annotated[Path, typer.Argument(metavar="INPUT", help="The input file, JSONL.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUTPUT", help="Else INPUT.output.jsonl."),
    ] = None,
    errors: Annotated[
        Path | None,
        typer.Option("--errors", metavar="ERRORS", help="Else OUTPUT.errors.jsonl."),
    ] = None,
    upstream: UpstreamUrl = None,
    max_concurrency: Annotated[
        int | None,
        typer.Option("--max-concurrency", metavar="N", help="The most lines in flight; 256."),
    ] = None,
    config: Config = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document at the end.")
    ] = False,
) -> None:
    """Run a file without a server.

    Killed or stopped, the same command goes on where it was. Exit 0: every line succeeded;
    1: some failed; 2: the input or a setting is wrong, and nothing was sent.
    """
    from penstock.cli.local import check_input, describe_faults, tell_faults
    from penstock.runner import run_file as _run_file
    from penstock.settings import load_settings, upstream_from_flag
    from penstock.telemetry import configure_logging

    check_file_exists(file)
    paths = _paths(file, output, errors)
    if max_concurrency is not None and not upstream:
        raise InvalidRequest(
            "--max-concurrency goes with --upstream; upstreams of the settings have their own."
        )
    chosen = upstream_from_flag(upstream, max_concurrency=max_concurrency) if upstream else None
    settings = load_settings(
        config=config,
        overrides={
            "data_dir": paths.state,
            "server.auth": False,
            "server.host": "127.0.0.1",
            "limits.requests_per_batch": _NO_LIMIT,
            "limits.input_file_bytes": _NO_LIMIT,
            "limits.embedding_inputs": _NO_LIMIT,
            "limits.strict_openai": False,
            "limits.max_completion_window": "3650d",
            "upstreams": chosen,
            "webhooks": [],  # they are told what a server does
        },
    )
    if not settings.upstreams:
        raise InvalidSettings(
            "There is no upstream to send to: name one with --upstream URL or in the settings."
        )
    configure_logging(level=logging.ERROR)

    def accepts_model(model: str) -> bool:
        return any(fnmatchcase(model, pattern) for pattern in settings.served_models)

    checked = check_input(file, settings, None, accepts_model=accepts_model)
    if checked.faults:
        if as_json:
            print_json(describe_faults(checked.faults))
        else:
            tell_faults(file, checked.faults)
        raise InvalidRequest(f"{file} has faults ({len(checked.faults):,}); nothing was sent.")

    import uvloop

    started = time.monotonic()
    with _Progress(paths.state.name, is_quiet=as_json) as progress:
        batch = uvloop.run(
            _run_file(
                paths,
                settings,
                checked,
                on_start=progress.start,
                on_progress=progress.show,
            )
        )
    if batch is None:
        typer.echo("Stopped. The same command goes on where it was.", err=True)
        raise typer.Exit(INTERRUPTED)
    _tell_end(batch, paths.output, paths.errors, time.monotonic() - started, as_json=as_json)
    if batch.counts.completed < batch.counts.total:
        raise typer.Exit(FAILED)


def _paths(file: Path, output: Path | None, errors: Path | None) -> Any:
    from penstock.runner import Paths

    output = output or file.with_name(f"{file.stem}.output.jsonl")
    errors = errors or output.with_name(f"{output.stem}.errors.jsonl")
    paths = {"INPUT": file, "OUTPUT": output, "ERRORS": errors}
    if len({path.absolute() for path in paths.values()}) < len(paths):
        raise InvalidRequest(
            f"INPUT {file}, OUTPUT {output} and ERRORS {errors} must be three different files."
        )
    for name in (output, errors):
        if not name.parent.is_dir():
            raise InvalidRequest(f"{name} cannot be written: there is no {name.parent}.")
        if name.exists() and not name.is_file():
            raise InvalidRequest(f"{name} cannot be written: it is not a regular file.")
    return Paths(input=file, output=output, errors=errors)


class _Local:
    """A batch of `run` as a progress display reads it."""

    def __init__(self, batch: "Batch") -> None:
        self.id: str = batch.id
        self.status: str = batch.status
        self.request_counts: Counts = batch.counts


class _Progress:
    """Shows how a run gets on, on standard error."""

    def __init__(self, state: str, *, is_quiet: bool) -> None:
        from penstock.terminal import Pace, display

        where = console(stderr=True)
        where.quiet = is_quiet
        self._console = where
        self._state = state
        self._display = display(where)
        self._pace = Pace()

    def __enter__(self) -> "_Progress":
        self._display.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._display.__exit__(*error)

    def start(self, is_resumed: bool) -> None:
        if is_resumed:
            self._console.print(f"Going on with the run in {self._state}.")

    def show(self, batch: "Batch") -> None:
        now = time.monotonic()
        shown = _Local(batch)
        if batch.status == "in_progress":
            self._pace.add(now, batch.counts.completed + batch.counts.failed)
        self._display.show(shown, self._pace, now)


def _tell_end(
    batch: "Batch", output: Path, errors: Path, taken_s: float, *, as_json: bool
) -> None:
    from penstock.terminal import failure_reasons, span

    counts = batch.counts
    files = {
        "output": str(output) if batch.output_file_id else None,
        "errors": str(errors) if batch.error_file_id else None,
    }
    if as_json:
        usage = {
            "input_tokens": batch.usage.input_tokens,
            "output_tokens": batch.usage.output_tokens,
            "total_tokens": batch.usage.total_tokens,
        }
        figures = {
            "total": counts.total,
            "completed": counts.completed,
            "failed": counts.total - counts.completed,
        }
        print_json({**figures, **files, "usage": usage, "seconds": round(taken_s, 3)})
        return
    typer.echo(f"{counts.completed:,} of {counts.total:,} succeeded in {span(taken_s)}.")
    if files["output"]:
        typer.echo(f"Results: {output}")
    if files["errors"]:
        typer.echo(f"{counts.total - counts.completed:,} failed: {errors}")
        with errors.open("rb") as file:
            for reason in failure_reasons(file):
                typer.echo(f"  {reason}")


def demo(
    data_dir: Annotated[
        Path,
        typer.Option("--data-dir", metavar="DIR", help="Where the demo keeps all it makes."),
    ] = Path("penstock-demo"),
) -> None:
    """Run a simulator, a server and one real batch, end to end."""
    from rich.console import Console

    from penstock.demo import run_demo

    batch = run_demo(data_dir, Console(highlight=False, emoji=False))
    if batch.status != "completed":
        raise typer.Exit(FAILED)
    typer.echo("\nNext: penstock serve --upstream http://YOUR-SERVER/v1")
    typer.echo("In a checkout, `./dev run` stands for `penstock`.")
