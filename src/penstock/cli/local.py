"""The commands that need no server."""

# ruff: noqa: PLC0415  (imports inside commands keep the start short)

import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from penstock.cli.options import (
    FAILED,
    REFUSED,
    AsJson,
    Config,
    DataDir,
    EndpointName,
    check_file_exists,
    print_json,
    print_view,
    read_endpoint,
)
from penstock.errors import InvalidRequest, InvalidSettings

if TYPE_CHECKING:
    from penstock.jsonl import CheckedInput
    from penstock.model import ApiKey, Endpoint, Fault
    from penstock.settings import Settings

_T = TypeVar("_T")


def run_async(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end."""
    import asyncio

    return asyncio.run(work)


def validate(
    file: Annotated[Path, typer.Argument(metavar="INPUT", help="The input file, JSONL.")],
    endpoint: EndpointName = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Tell every fault of an input file.

    Each with its line number; nothing is sent. Exit 2 if there is one.
    """
    from penstock.settings import load_settings

    check_file_exists(file)
    settings = load_settings(config=config)
    checked = check_input(file, settings, read_endpoint(endpoint) if endpoint else None)
    faults = checked.faults
    found = None if checked.endpoint is None else checked.endpoint.path
    if as_json:
        print_json(
            {
                "file": str(file),
                "valid": not faults,
                "requests": checked.total,
                "endpoint": found,
                "models": checked.models,
                **describe_faults(faults),
            }
        )
    elif not faults:
        typer.echo(
            f"{file} is valid: {checked.total:,} request{'s' if checked.total != 1 else ''} "
            f"to {found}, model{'s' if len(checked.models) != 1 else ''} "
            f"{', '.join(checked.models)}."
        )
    else:
        tell_faults(file, faults)
    if faults:
        few = len(faults) == 1
        typer.echo(
            f"Error: {file} has {'a fault' if few else f'{len(faults):,} faults'}; "
            "a batch of it would fail and nothing would be sent.",
            err=True,
        )
        raise typer.Exit(REFUSED)


_TOLD_FAULTS = 100_000
"""More than anyone reads, and little enough to hold."""


def check_input(
    file: Path,
    settings: "Settings",
    endpoint: "Endpoint | None",
    *,
    accepts_model: "Callable[[str], bool] | None" = None,
) -> "CheckedInput":
    """Check an input file as a server with these settings would, in bounded memory.

    Args:
        endpoint: Which endpoint every line must name; None takes that of the first line.
        accepts_model: Whether an upstream serves a model; None accepts every model.
    """
    from dataclasses import replace

    from penstock.jsonl import InputRules, check_file

    limits, worker = settings.limits, settings.worker
    rules = InputRules(
        endpoint=endpoint,
        max_requests=limits.requests_per_batch,
        max_line_bytes=limits.line_bytes,
        max_embedding_inputs=limits.embedding_inputs,
        max_faults=_TOLD_FAULTS,
        one_model=limits.strict_openai,
        slice_requests=worker.slice_requests,
        slice_bytes=worker.slice_bytes,
        accepts_model=accepts_model,
        served_models=settings.served_models,
    )
    try:
        checked = check_file(file, rules)
        size_fault = _size_fault(file, limits.input_file_bytes)
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}.") from error
    return replace(checked, faults=[*size_fault, *checked.faults])


def describe_faults(faults: "list[Fault]") -> dict[str, Any]:
    """Faults for a program to read."""
    return {
        "faults": [
            {"line": f.line, "code": f.code, "param": f.param, "message": f.message}
            for f in faults
        ]
    }


def tell_faults(file: Path, faults: "list[Fault]") -> None:
    """Print a line for each fault."""
    for fault in faults:
        typer.echo(_tell_fault(file, fault))


def _size_fault(file: Path, most: int) -> list["Fault"]:
    from penstock.model import Fault

    size = file.stat().st_size
    if size <= most:
        return []
    message = f"The file has {size} bytes; it must have at most {most}."
    return [Fault(code="file_too_large", message=message)]


def _tell_fault(file: Path, fault: "Fault") -> str:
    from penstock.terminal import clean

    place = f"{file}:{fault.line}" if fault.line is not None else f"{file}"
    param = f" ({fault.param})" if fault.param else ""
    return clean(f"{place}: {fault.code}{param}: {fault.message}")


def simulate(
    *,
    host: Annotated[str, typer.Option(metavar="H", help="The address.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="P", min=0, max=65535, help="The port; 0 takes a free one.")
    ] = 9000,
    latency_ms: Annotated[
        float, typer.Option(metavar="MS", help="How long every answer takes at least.")
    ] = 0,
    jitter_ms: Annotated[
        float, typer.Option(metavar="MS", help="How much longer it takes at most.")
    ] = 0,
    error_rate: Annotated[
        float, typer.Option(metavar="R", help="The share of requests that fail, from 0 to 1.")
    ] = 0,
    error_status: Annotated[
        int, typer.Option(metavar="STATUS", help="The HTTP status of those, 400 to 599.")
    ] = 500,
    rate_limit: Annotated[
        float,
        typer.Option(
            metavar="N", help="Requests a second above which it answers 429; 0: none."
        ),
    ] = 0,
    model: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A model to list; repeatable.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(metavar="N", help="How many tokens a written reply has.")
    ] = 16,
    token_spread: Annotated[
        float, typer.Option(metavar="R", help="By what part it has fewer or more, 0 to 1.")
    ] = 0,
    engine_slots: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Take the time of an engine that batches N requests; 0: no engine.",
        ),
    ] = 0,
    step_ms: Annotated[
        float, typer.Option(metavar="MS", help="How long a step of that engine takes.")
    ] = 20,
    step_ms_per_request: Annotated[
        float, typer.Option(metavar="MS", help="How much longer for each request in it.")
    ] = 0.05,
    metrics: Annotated[
        str, typer.Option(metavar="NAME", help="Whose metrics it shows: vllm, sglang or none.")
    ] = "vllm",
    seed: Annotated[int, typer.Option(metavar="N", help="Starts the chance.")] = 0,
    fail_match: Annotated[
        str, typer.Option(metavar="TEXT", help="Requests that hold this text always fail.")
    ] = "",
) -> None:
    """Run an upstream that answers without a model.

    It speaks the OpenAI API, for trials, demos and load.
    """
    from penstock.batching import EngineOptions
    from penstock.simulator import SimulatorOptions, run_simulator

    try:
        engine = (
            EngineOptions(
                slots=engine_slots, step_ms=step_ms, step_ms_per_request=step_ms_per_request
            )
            if engine_slots
            else None
        )
        options = SimulatorOptions(
            latency_ms=latency_ms,
            jitter_ms=jitter_ms,
            error_rate=error_rate,
            error_status=error_status,
            rate_limit=rate_limit,
            models=tuple(model or ["simulated"]),
            tokens=tokens,
            token_spread=token_spread,
            engine=engine,
            metrics=metrics,
            seed=seed,
            fail_match=fail_match,
        )
    except ValueError as error:
        raise InvalidRequest(str(error)) from error

    def tell(real_port: int) -> None:
        shown = f"[{host}]" if ":" in host else host
        typer.echo(f"The simulator answers at http://{shown}:{real_port}/v1")

    try:
        run_simulator(options, host, port, ready=tell)
    except OSError as error:
        raise InvalidRequest(f"Nothing can listen on {host}:{port}: {error}.") from error


def check(config: Config = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show the settings in force and try them.

    Says what is wrong and what to do; exit 1 if something will not work.
    """
    from penstock.checkup import Verdict, check_all
    from penstock.settings import load_settings
    from penstock.terminal import add_row, table

    settings = load_settings(config=config, overrides={"data_dir": data_dir})
    shown = settings.describe()
    if not as_json:
        settings_table = table("SETTING", "VALUE", "FROM")
        for row in shown:
            add_row(settings_table, row.name, row.value, row.source)
        print_view(settings_table)
        typer.echo()
    findings = run_async(check_all(settings))
    is_good = all(finding.verdict is not Verdict.PROBLEM for finding in findings)
    if as_json:
        print_json(
            {
                "ok": is_good,
                "settings": [
                    {"name": row.name, "value": row.value, "source": row.source}
                    for row in shown
                ],
                "checks": [
                    {"what": f.what, "verdict": f.verdict, "message": f.message}
                    for f in findings
                ],
            }
        )
    else:
        findings_table = table("CHECK", "RESULT", "")
        for finding in findings:
            style = "red" if finding.verdict is Verdict.PROBLEM else None
            add_row(findings_table, finding.what, finding.verdict, finding.message, style=style)
        print_view(findings_table)
    if not is_good:
        raise typer.Exit(FAILED)


# Keys

keys = typer.Typer(
    help="Make, list and revoke API keys.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@keys.command("create")
def create_key(
    project: Annotated[
        str, typer.Option("--project", metavar="NAME", help="Whose key it is; made if new.")
    ],
    config: Config = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and show it, once."""
    from penstock.keys import new_key
    from penstock.places import find_data_dir, find_database
    from penstock.settings import is_label

    if not is_label(project):
        raise InvalidRequest(
            f'--project is "{project}"; it must be 1 to 64 letters, digits, dots, dashes or '
            "underscores."
        )
    database = find_database(data_dir, config=config)
    if database.startswith("sqlite:"):
        directory = find_data_dir(data_dir, config=config)
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise InvalidSettings(f"{directory} cannot be made: {error.strerror}.") from error
    key = new_key()
    record = run_async(_add_key(database, project, key))
    if as_json:
        print_json({**_key_document(record), "key": key})
    else:
        typer.echo(f"Key {record.id} of the project {project}, shown only this once:\n{key}")


async def _add_key(database: str, project: str, key: str) -> "ApiKey":
    import secrets

    from penstock.checkup import open_store
    from penstock.keys import key_digest, key_hint
    from penstock.model import ApiKey, KeyId

    async with open_store(database) as store:
        owner = await store.ensure_project(project)
        record = ApiKey(
            id=KeyId(f"key_{secrets.token_hex(8)}"),
            project_id=owner.id,
            project=owner.name,
            hint=key_hint(key),
            created_at=int(time.time()),
        )
        await store.add_key(record, digest=key_digest(key))
    return record


@keys.command("list")
def list_keys(config: Config = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """List all keys, oldest first, by their hints."""
    from penstock.checkup import open_store
    from penstock.terminal import add_row, moment, table

    database = used_database(data_dir, config)

    async def read() -> "list[ApiKey]":
        async with open_store(database) as store:
            return await store.list_keys()

    found = run_async(read())
    if as_json:
        print_json({"object": "list", "data": [_key_document(key) for key in found]})
        return
    shown = table("ID", "PROJECT", "KEY", "CREATED", "REVOKED")
    for key in found:
        revoked = "" if key.revoked_at is None else moment(key.revoked_at)
        add_row(shown, key.id, key.project, key.hint, moment(key.created_at), revoked)
    print_view(shown)


@keys.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's ID, as listed.")],
    config: Config = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make a key invalid from now on."""
    from penstock.checkup import open_store
    from penstock.model import KeyId

    database = used_database(data_dir, config)

    async def revoke() -> "ApiKey":
        async with open_store(database) as store:
            return await store.revoke_key(KeyId(key_id), now=int(time.time()))

    key = run_async(revoke())
    if as_json:
        print_json(_key_document(key))
    else:
        typer.echo(f"Key {key.id} of the project {key.project} is revoked.")


def used_database(flag: Path | None, config: Path | None) -> str:
    """The URL of the database; a data directory must have been used before."""
    from penstock.checkup import has_database
    from penstock.places import find_data_dir, find_database

    database = find_database(flag, config=config)
    if not database.startswith("sqlite:"):
        return database
    directory = find_data_dir(flag, config=config)
    if not has_database(directory):
        raise InvalidSettings(
            f"There is no Penstock database in {directory}; name the server's data directory "
            "with --data-dir."
        )
    return database


def _key_document(key: "ApiKey") -> dict[str, Any]:
    return {
        "id": key.id,
        "project": key.project,
        "hint": key.hint,
        "created_at": key.created_at,
        "revoked_at": key.revoked_at,
    }
