"""The commands of a cluster: workers, and the database that they share."""

# ruff: noqa: PLC0415  (imports inside commands keep the start short)

import typer

from penstock.cli.local import run_async
from penstock.cli.options import AsJson, Config, DataDir, print_json


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
