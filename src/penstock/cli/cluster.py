"""The commands of a cluster: workers, and the database that they share."""

# ruff: noqa: PLC0415  (imports inside commands keep the start short)

from pathlib import Path
from typing import Annotated

import typer

from penstock.cli.local import run_async
from penstock.cli.options import FAILED, AsJson, Config, DataDir, print_json


def work(config: Config = None) -> None:
    """Run the lines of a cluster: any number of these beside `serve --no-workers`.

    Stop it with SIGTERM: it takes nothing new, lets lines in flight end within
    server.shutdown_grace_s, and gives the rest back.
    """
    from penstock.serving import run_worker
    from penstock.settings import load_settings
    from penstock.telemetry import configure_logging

    settings = load_settings(config=config)
    configure_logging()
    run_worker(settings)


def migrate(config: Config = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Bring the database to this version's schema.

    Safe to run twice, and from two hosts at once. Run it before new processes of a cluster
    start; those of the version before may go on meanwhile.
    """
    from penstock.checkup import migrate_database
    from penstock.places import find_data_dir, find_database

    url = find_database(data_dir, config=config)
    if url.startswith("sqlite:"):
        find_data_dir(data_dir, config=config).mkdir(parents=True, exist_ok=True, mode=0o700)
    before, after = run_async(migrate_database(url))
    if as_json:
        print_json({"before": before, "after": after})
    elif before == after:
        typer.echo(f"The database is at schema version {after} already.")
    else:
        typer.echo(
            f"The database is at schema version {after} now; it was {before or 'empty'}."
        )


def cluster_demo(
    data_dir: Annotated[
        Path,
        typer.Option("--data-dir", metavar="DIR", help="Where the demo keeps all it makes."),
    ] = Path("penstock-cluster-demo"),
    lines: Annotated[
        int, typer.Option("--lines", min=100, metavar="N", help="How many lines the batch has.")
    ] = 6000,
) -> None:
    """Run a cluster here, kill one of its workers, and count.

    PostgreSQL, an S3 server, one API and three workers.
    """
    from rich.console import Console

    from penstock.cluster_demo import run_cluster_demo

    books = run_cluster_demo(data_dir, Console(highlight=False, emoji=False), lines=lines)
    typer.echo(
        f"\n{books.lines:,} lines: {books.lost} lost, {books.doubled} doubled. "
        f"{books.sent_again} were sent a second time: those that the dead worker had in flight "
        "or had not kept yet."
    )
    if not books.balance:
        raise typer.Exit(FAILED)
