"""What several commands share: their options, exit codes and output."""

# ruff: noqa: PLC0415  (an import inside a function keeps the start short)

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.errors import InvalidRequest
from penstock.model import ENDPOINTS, Endpoint, find_endpoint

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

FAILED = 1
"""Exit code: the work failed, in part or in whole."""
REFUSED = 2
"""Exit code: nothing was done, since the input, a setting or a name is wrong."""
INTERRUPTED = 130
"""Exit code: stopped with Ctrl-C."""

AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on standard output.")
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        help="The server's data directory, which may hold the key; else PENSTOCK_DATA_DIR.",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="The settings file; else PENSTOCK_CONFIG or here."
    ),
]
EndpointName = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        metavar="E",
        help="What all lines call, such as /v1/embeddings; else what the first line calls.",
    ),
]
BatchArgument = Annotated[str, typer.Argument(metavar="ID", help="The batch's ID.")]


def read_endpoint(name: str) -> Endpoint:
    """The endpoint that `--endpoint` names."""
    endpoint = find_endpoint(name)
    if endpoint is None:
        raise InvalidRequest(
            f'--endpoint is "{name}"; it must be one of {", ".join(ENDPOINTS)}.'
        )
    return endpoint


def check_file_exists(path: Path) -> None:
    """Refuse what is not a file."""
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise InvalidRequest(f"{path} {what}; name a JSONL file with a request on each line.")


# Output


def print_json(document: object) -> None:
    """Print the one document of a command that was asked for JSON."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


def console(*, stderr: bool = False) -> "Console":
    """Where a person reads. What is not a terminal is as wide as what is printed."""
    from rich.console import Console

    width = None if (sys.stderr if stderr else sys.stdout).isatty() else 10_000
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def print_view(view: "RenderableType") -> None:
    """Print a table without the blanks that fill its last column."""
    where = console()
    with where.capture() as capture:
        where.print(view)
    typer.echo("\n".join(line.rstrip() for line in capture.get().rstrip("\n").split("\n")))
