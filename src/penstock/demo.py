"""`penstock demo`: a simulator, a server and one real batch, end to end.

Everything runs as a person would start it: two processes of this same program, and the client
commands. What is printed is what was done.
"""

import json
from pathlib import Path

from rich.console import Console

from penstock.client import BatchObject, Client
from penstock.errors import InvalidRequest
from penstock.places import KEY_FILE
from penstock.processes import free_port, running
from penstock.terminal import clean, summary, watch

_UNREADABLE = "(unreadable)"
"""The one review of the example that the simulator refuses, to show what failing looks like."""
_SETTINGS = "demo.toml"
"""An empty settings file, in place of one that may lie in the working directory."""
_ALONE = {"PENSTOCK_DATABASE_URL": "", "PENSTOCK_STORAGE_URL": ""}
"""Keeps the demo, whose upstream makes its answers up, out of a cluster."""


def find_examples() -> Path:
    """Where the example files lie: in the package, or beside it in a checkout.

    Raises:
        InvalidRequest: They are in neither place.
    """
    here = Path(__file__).parent
    for folder in (here / "examples", here.parent.parent / "examples"):
        if folder.is_dir():
            return folder
    raise InvalidRequest("The example files are missing from this installation.")


def run_demo(data_dir: Path, console: Console) -> BatchObject:
    """Run the demo and leave its results in `data_dir`.

    Returns:
        The batch at its end.

    Raises:
        DemoFailed: A process did not start; the message says what it printed.
    """
    example = find_examples() / "reviews.jsonl"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        (data_dir / "simulator.log").touch()
        (data_dir / _SETTINGS).touch()
    except OSError as error:
        raise InvalidRequest(
            f"{data_dir} cannot be used: {error.strerror}. Choose another with --data-dir."
        ) from error
    simulator_port, port = free_port(), free_port()
    upstream = f"http://127.0.0.1:{simulator_port}/v1"
    with (
        running(
            console,
            "An upstream without a model",
            [
                *("simulate", "--port", str(simulator_port), "--latency-ms", "20"),
                *("--tokens", "5", "--fail-match", _UNREADABLE, "--error-status", "400"),
            ],
            log=data_dir / "simulator.log",
            ready_url=f"http://127.0.0.1:{simulator_port}/health",
        ),
        running(
            console,
            "Penstock in front of it",
            ["serve", "--port", str(port), "--data-dir", str(data_dir), "--upstream", upstream],
            log=data_dir / "server.log",
            ready_url=f"http://127.0.0.1:{port}/readyz",
            environment=_ALONE | {"PENSTOCK_CONFIG": str(data_dir / _SETTINGS)},
        ),
    ):
        key = (data_dir / KEY_FILE).read_text().strip()
        with Client(f"http://127.0.0.1:{port}", key) as client:
            return _run_batch(client, example, data_dir / "results", console)


def _run_batch(client: Client, example: Path, results: Path, console: Console) -> BatchObject:
    file_id = client.upload(example)
    console.print(f"[bold]Uploaded[/] {example.name} as {file_id}.")
    created = client.create_batch(
        input_file_id=file_id, endpoint="/v1/chat/completions", job_name="demo"
    )
    console.print(f"[bold]Created[/] {created.id}.")
    batch = watch(client, created.id, console)
    console.print(f"[bold]Ended.[/] {summary(batch)}", soft_wrap=True)
    results.mkdir(exist_ok=True)
    for name, result_id in (("output", batch.output_file_id), ("error", batch.error_file_id)):
        if result_id is not None:
            target = results / f"{batch.id}_{name}.jsonl"
            client.download(result_id, target)
            console.print(f"\n[bold]The {name} file:[/] {target}", soft_wrap=True)
            console.print(_first_line(target), style="dim", markup=False, highlight=False)
    return batch


def _first_line(path: Path) -> str:
    with path.open() as file:
        line = json.loads(file.readline())
    body = line["response"]["body"]
    said = body.get("error", {}).get("message") or body["choices"][0]["message"]["content"]
    return clean(f"{line['custom_id']}: {line['response']['status_code']}, {said}")
