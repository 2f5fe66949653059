"""What a person types.

Commands stand in the modules of this folder and are named here. What is heavy is imported
inside the commands, so that `penstock --help` is there at once.

Standard output holds the result, with `--json` one document and nothing else. An error is one
sentence on standard error. Exit codes: 0 it worked; 1 the work failed, in part or in whole;
2 nothing was done, since the input, a setting or a name is wrong or no server answers.
"""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from penstock import __version__
from penstock.cli import batches, cluster, local, webhooks, work
from penstock.cli.options import FAILED, INTERRUPTED, REFUSED
from penstock.errors import PenstockError, StorageUnavailable, UpstreamDown


class _Commands(TyperGroup):
    """Turns our errors into a sentence and an exit code, whatever the command."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PenstockError as error:
            typer.echo(f"Error: {error}", err=True)
            has_failed = isinstance(error, (StorageUnavailable, UpstreamDown))
            raise typer.Exit(FAILED if has_failed else REFUSED) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    name="penstock",
    help="The batch layer for any LLM endpoint: the OpenAI Batch API, self-hosted.",
    cls=_Commands,
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.")
    ] = False,
) -> None:
    if version:
        typer.echo(f"penstock {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


# In the order of the help.
app.command()(work.serve)
app.command()(cluster.work)
app.command()(cluster.migrate)
app.command("cluster-demo")(cluster.cluster_demo)
app.command()(work.run)
app.command()(work.demo)
app.command()(local.validate)
app.command()(local.simulate)
app.command()(batches.submit)
app.command("list")(batches.list_batches)
app.command()(batches.status)
app.command()(batches.watch)
app.command()(batches.download)
app.command()(batches.cancel)
app.add_typer(local.keys, name="keys")
app.add_typer(webhooks.webhooks, name="webhooks")
app.command()(local.check)


def main() -> None:
    """The entry point of `penstock`."""
    app()
