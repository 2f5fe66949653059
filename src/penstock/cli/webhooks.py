"""The commands about webhooks. They need no server, only its settings and data directory."""

# ruff: noqa: PLC0415  (imports inside commands keep the start short)

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.local import run_async, used_database
from penstock.cli.options import FAILED, AsJson, Config, DataDir, print_json, print_view
from penstock.errors import InvalidRequest, InvalidSettings
from penstock.model import Delivery, DeliveryId, DeliveryStatus

if TYPE_CHECKING:
    from penstock.checkup import Tried
    from penstock.model import Webhook
    from penstock.store.base import Store

_NONE = "no webhook is set; add a [[webhooks]] table to the settings"
_PAGE = 100

webhooks = typer.Typer(
    help="List webhooks and what was delivered to them, try them, deliver again.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@webhooks.command("list")
def list_webhooks(
    *,
    status: Annotated[
        DeliveryStatus | None,
        typer.Option("--status", help="Only deliveries with this status."),
    ] = None,
    limit: Annotated[
        int,
        typer.Option("--limit", min=1, metavar="N", help="How many deliveries at most."),
    ] = 20,
    config: Config = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List the webhooks of the last start, and deliveries, newest first."""
    from penstock.checkup import open_store
    from penstock.store.base import Page

    database = used_database(data_dir, config)

    async def read() -> "tuple[list[Webhook], list[Delivery]]":
        async with open_store(database) as store:
            page = Page(limit=limit)
            return await store.list_webhooks(), await store.list_deliveries(page, status=status)

    in_force, deliveries = run_async(read())
    if as_json:
        print_json(
            {
                "object": "list",
                "webhooks": [
                    {"id": hook.id, "project_id": hook.project_id, "url": hook.url}
                    for hook in in_force
                ],
                "data": [_document(delivery) for delivery in deliveries],
            }
        )
        return
    _show_webhooks(in_force)
    typer.echo()
    _show_deliveries(deliveries, any_status=status is None)


def _show_webhooks(in_force: "list[Webhook]") -> None:
    from penstock.terminal import add_row, table

    if not in_force:
        typer.echo(
            "No webhook was in force at the last start of the server; add a [[webhooks]] table "
            "to the settings and start it anew."
        )
        return
    shown = table("WEBHOOK", "URL")
    for hook in in_force:
        add_row(shown, hook.id, hook.url)
    print_view(shown)


def _show_deliveries(deliveries: list[Delivery], *, any_status: bool) -> None:
    from penstock.terminal import add_row, moment, table

    if not deliveries:
        typer.echo("Nothing was to be delivered yet." if any_status else "There is none such.")
        return
    shown = table("DELIVERY", "EVENT", "BATCH", "URL", "STATUS", "ATTEMPTS", "NEXT", "ANSWER")
    for each in deliveries:
        due_at = "" if each.next_attempt_at is None else moment(each.next_attempt_at)
        answer = each.last_error or str(each.last_status_code or "")
        cells = (each.id, each.event, each.batch_id, each.url, each.status.value)
        add_row(shown, *cells, str(each.attempts), due_at, answer)
    print_view(shown)


@webhooks.command("test")
def test_webhooks(
    *,
    project: Annotated[
        str | None, typer.Option("--project", metavar="NAME", help="Only those of a project.")
    ] = None,
    config: Config = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Send a signed `webhook.test` event to each webhook of the settings, once.

    Says what each answered; exit 1 if one did not take it.
    """
    from penstock.checkup import try_webhooks
    from penstock.settings import load_settings

    settings = load_settings(config=config, overrides={"data_dir": data_dir})
    hooks = [hook for hook in settings.webhooks if project in (None, hook.project)]
    if not settings.webhooks:
        raise InvalidSettings(f"There is nothing to try: {_NONE}.")
    if not hooks:
        names = ", ".join(dict.fromkeys(hook.project for hook in settings.webhooks))
        raise InvalidRequest(
            f'--project is "{project}", which has no webhook; it must be one of {names}.'
        )
    tried = run_async(try_webhooks(hooks))
    if as_json:
        print_json({"object": "list", "data": [_tried_document(each) for each in tried]})
    else:
        _show_tried(tried)
    if any(each.reply.error is not None for each in tried):
        raise typer.Exit(FAILED)


def _show_tried(tried: "list[Tried]") -> None:
    from penstock.terminal import add_row, table

    shown = table("URL", "PROJECT", "ANSWER")
    for each in tried:
        error = each.reply.error
        answer = error or f"It took the event (HTTP status {each.reply.status_code})."
        style = "red" if error else None
        add_row(shown, each.hook.url, each.hook.project, answer, style=style)
    print_view(shown)


@webhooks.command("replay")
def replay(
    *,
    delivery_ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ID]...", help="The deliveries' IDs, as listed."),
    ] = None,
    failed: Annotated[bool, typer.Option("--failed", help="All that were given up.")] = False,
    config: Config = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Deliver events again, whatever became of them.

    A running server sends them within seconds, else the next one does when it starts.
    """
    from penstock.checkup import open_store

    if bool(delivery_ids) == failed:
        raise InvalidRequest(
            "Name the deliveries by their IDs, as `penstock webhooks list` shows them, or use "
            "--failed for all that were given up; one of the two."
        )
    database = used_database(data_dir, config)

    async def work() -> list[Delivery]:
        async with open_store(database) as store:
            names = [DeliveryId(name) for name in dict.fromkeys(delivery_ids or [])]
            for name in names:
                await store.get_delivery(name)  # one that is not there: nothing is done
            names = names or await _list_failed(store)
            now = int(time.time())
            return [await store.replay_delivery(name, now=now) for name in names]

    replayed = run_async(work())
    if as_json:
        print_json({"object": "list", "data": [_document(each) for each in replayed]})
    elif not replayed:
        typer.echo("No delivery has failed.")
    else:
        for each in replayed:
            typer.echo(f"{each.id} is delivered again: {each.event} to {each.url}")
        typer.echo("A running server sends within seconds; else the next one when it starts.")


async def _list_failed(store: "Store") -> list[DeliveryId]:
    from penstock.store.base import Page

    found: list[DeliveryId] = []
    page = Page(limit=_PAGE)
    while some := await store.list_deliveries(page, status=DeliveryStatus.FAILED):
        found += [each.id for each in some]
        page = Page(limit=_PAGE, after=some[-1].id)
    return found


@webhooks.command("secret")
def make_secret(as_json: AsJson = False) -> None:
    """Make a secret: `whsec_` and 32 random bytes. Nothing is kept."""
    from penstock.signing import new_secret

    secret = new_secret()
    if as_json:
        print_json({"secret": secret})
        return
    typer.echo(secret)
    typer.echo(
        "Set it as `secret` of a [[webhooks]] table and give it to the receiver, which checks "
        "events with it, such as OpenAI's client: client.webhooks.unwrap(body, headers, "
        "secret=…). To change a secret, keep the old one as `previous_secret` for a while.",
        err=True,
    )


def _document(delivery: Delivery) -> dict[str, Any]:
    return {
        "id": delivery.id,
        "webhook_id": delivery.webhook_id,
        "project_id": delivery.project_id,
        "batch_id": delivery.batch_id,
        "url": delivery.url,
        "event": delivery.event,
        "status": delivery.status,
        "attempts": delivery.attempts,
        "created_at": delivery.created_at,
        "queued_at": delivery.queued_at,
        "next_attempt_at": delivery.next_attempt_at,
        "ended_at": delivery.ended_at,
        "last_attempt_at": delivery.last_attempt_at,
        "last_status_code": delivery.last_status_code,
        "last_error": delivery.last_error,
    }


def _tried_document(tried: "Tried") -> dict[str, Any]:
    return {
        "url": tried.hook.url,
        "project": tried.hook.project,
        "ok": tried.reply.error is None,
        "status_code": tried.reply.status_code,
        "error": tried.reply.error,
    }
