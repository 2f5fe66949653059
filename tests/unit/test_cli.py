"""The commands, as a person types them."""

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner, Result

from penstock.cli import app

from .stub_server import KEY, NOON, Stub, a_batch, run_stub

LINE = json.dumps(
    {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "qwen", "messages": [{"role": "user", "content": "hi"}]},
    }
)


@pytest.fixture(autouse=True)
def bare_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith("PENSTOCK_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    yield
    structlog.reset_defaults()  # a command that ran here has logged to what is closed now


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    with run_stub() as stub:
        monkeypatch.setenv("PENSTOCK_URL", stub.url)
        monkeypatch.setenv("PENSTOCK_API_KEY", KEY)
        yield stub


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def document(*arguments: object, exit_code: int = 0) -> Any:
    """What a command prints with --json, which must be one document."""
    result = run(*arguments, "--json")
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


def refusal(*arguments: object) -> str:
    """The sentence with which a command refuses, and nothing else is printed."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("Error: ").rstrip("\n")


def input_file(*lines: str) -> Path:
    path = Path("in.jsonl")
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def counts(total: int, completed: int, failed: int) -> dict[str, int]:
    return {"total": total, "completed": completed, "failed": failed}


def ended(completed: int = 2, failed: int = 0, **fields: Any) -> dict[str, Any]:
    return {
        "status": "completed",
        "completed_at": NOON + 90,
        "request_counts": counts(completed + failed, completed, failed),
        **fields,
    }


# The program


def test_the_version_is_printed() -> None:
    assert run("--version").stdout == "penstock 0.1.0\n"


def test_help_names_every_command_without_loading_what_they_need() -> None:
    code = (
        "import sys; from penstock.cli import app; app(['--help'], standalone_mode=False); "
        "print(*(set(sys.modules) & {'pydantic', 'sqlalchemy', 'fastapi', 'rich.console', "
        "'pyreqwest', 'msgspec', 'asyncio'}), file=sys.stderr)"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert done.stderr.strip() == ""
    for command in ("submit", "list", "status", "watch", "download", "cancel", "validate",
                    "simulate", "check", "keys", "webhooks", "work", "migrate"):  # fmt: skip
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize("command", ["retry", "pause", "resume"])
def test_a_command_of_a_later_release_is_unknown(command: str) -> None:
    result = run(command)

    assert result.exit_code == 2
    assert f"No such command '{command}'" in result.stderr


def test_without_a_server_the_error_says_how_to_start_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PENSTOCK_URL", "http://127.0.0.1:9/v1/")

    assert refusal("list") == (
        "No Penstock server answers at http://127.0.0.1:9; start one with `penstock serve`, or "
        "set PENSTOCK_URL."
    )


def test_the_key_is_found_in_the_data_directory(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PENSTOCK_API_KEY")
    for directory in ("penstock-data", "named", "in-file", "in-variable"):
        Path(directory).mkdir()
        Path(directory, "api-key").write_text("sk-other\n")

    def works_with(directory: str, *flags: str) -> bool:
        Path(directory, "api-key").write_text(f"{KEY}\n")
        result = run("list", *flags)
        Path(directory, "api-key").write_text("sk-other\n")
        return result.exit_code == 0

    assert works_with("penstock-data")
    assert works_with("named", "--data-dir", "named")
    Path("penstock.toml").write_text('data_dir = "in-file"')
    assert works_with("in-file")
    monkeypatch.setenv("PENSTOCK_DATA_DIR", "in-variable")
    assert works_with("in-variable")
    assert run("list").exit_code == 2


def test_a_failing_server_is_failed_work(stub: Stub) -> None:
    stub.failures = 1

    result = run("list")

    assert result.exit_code == 1
    assert result.stderr == f"Error: The server at {stub.url} failed: Try again later.\n"


# submit


def test_submit_uploads_the_file_and_creates_a_batch(stub: Stub) -> None:
    path = input_file("", LINE)

    result = run("submit", path)

    assert result.exit_code == 0
    batch_id = stub.batches[0]["id"]
    assert result.stdout == (
        f"Batch {batch_id} was created from in.jsonl.\n"
        f"Watch it with: penstock watch {batch_id}\n"
    )
    assert stub.files["file-in"] == path.read_bytes()
    assert json.loads(stub.bodies[-1]) == {
        "input_file_id": "file-in",
        "endpoint": "/v1/chat/completions",
    }


def test_submit_sends_what_it_was_given(stub: Stub) -> None:
    batch = document(
        "submit", input_file("{}"), "--endpoint", "/v1/embeddings", "--job-name", "night",
        "--metadata", "team=a", "--metadata", "note=x=y", "--completion-window", "90s",
    )  # fmt: skip

    assert json.loads(stub.bodies[-1]) == {
        "input_file_id": "file-in",
        "endpoint": "/v1/embeddings",
        "completion_window": "90s",
        "job_name": "night",
        "metadata": {"team": "a", "note": "x=y"},
    }
    assert batch == stub.batches[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.jsonl"], "gone.jsonl does not exist; name a JSONL file with a request on each "
         "line."),
        (["."], ". is not a file; name a JSONL file with a request on each line."),
        (["in.jsonl", "--metadata", "team"], '--metadata is "team"; it must be of the form '
         "KEY=VALUE."),
        (["in.jsonl", "--metadata", "a=1", "--metadata", "a=2"], '--metadata names the key "a" '
         "twice; each key may stand once."),
        (["in.jsonl", "--completion-window", "1w"], '--completion-window is "1w"; it must be a '
         "whole number from 1 followed by s, m, h or d, such as 24h."),
    ],
)  # fmt: skip
def test_submit_refuses_what_is_wrong_before_it_sends_anything(
    arguments: list[str], message: str, stub: Stub
) -> None:
    input_file(LINE)

    assert refusal("submit", *arguments) == message
    assert stub.asked == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "in.jsonl is empty; it must hold a request on each line."),
        ("\n{}\n", "Line 2 of in.jsonl has no `url` that names an endpoint; name it with "),
        ("[1]\n", "Line 1 of in.jsonl has no `url` that names an endpoint; name it with "),
        ("not json\n", "Line 1 of in.jsonl has no `url` that names an endpoint; name it with "),
    ],
)
def test_submit_must_know_the_endpoint(content: str, message: str, stub: Stub) -> None:
    Path("in.jsonl").write_text(content)

    assert refusal("submit", "in.jsonl").startswith(message)
    assert stub.asked == []


def test_submit_takes_back_the_file_of_a_batch_that_was_refused(stub: Stub) -> None:
    error = {"message": "Bad window.", "type": "invalid_request_error"}
    stub.refusal = (400, {"error": error})

    assert refusal("submit", input_file(LINE)) == "Bad window."
    assert stub.files == {}


def test_submit_can_wait(stub: Stub) -> None:
    stub.stages = [{"status": "in_progress"}, ended()]

    result = run("submit", input_file(LINE), "--wait")

    assert result.exit_code == 0
    assert "completed in 1m 30s: 2 of 2 lines succeeded, 0 failed." in result.stdout


# list, status, cancel


def test_list_shows_the_newest_first(stub: Stub) -> None:
    stub.batches = [a_batch(2, job_name="night"), a_batch(1)]

    lines = run("list").stdout.splitlines()

    assert lines[0].split()[0] == "ID"
    assert [line.split()[0] for line in lines[1:]] == [b["id"] for b in stub.batches]
    assert "night" in lines[1]


def test_list_narrows_down(stub: Stub) -> None:
    stub.batches = [
        a_batch(3, status="completed", job_name="night"),
        a_batch(2, status="completed"),
        a_batch(1, job_name="night"),
    ]

    def numbers(*flags: object) -> list[int]:
        return [int(batch["id"][6:], 16) for batch in document("list", *flags)["data"]]

    assert numbers() == [3, 2, 1]
    assert numbers("--status", "completed") == [3, 2]
    assert numbers("--job-name", "night") == [3, 1]
    assert numbers("--limit", 1) == [3]


def test_list_can_show_all(stub: Stub) -> None:
    stub.batches = [a_batch(number) for number in range(130)]

    assert len(document("list")["data"]) == 20
    assert len(document("list", "--all")["data"]) == 130


def test_an_empty_list_says_so(stub: Stub) -> None:
    assert run("list").stdout == "There is no batch yet.\n"
    assert run("list", "--status", "failed").stdout == "There is no such batch.\n"
    assert document("list") == {"object": "list", "data": []}


def test_status_shows_a_batch(stub: Stub) -> None:
    stub.batches = [a_batch(status="in_progress", request_counts=counts(10, 6, 1))]
    batch_id = stub.batches[0]["id"]

    assert "6 completed, 1 failed, 10 in all" in run("status", batch_id).stdout
    assert document("status", batch_id) == stub.batches[0]


def test_status_says_what_a_batch_cost(stub: Stub) -> None:
    stub.batches = [a_batch(status="completed", completed_at=NOON + 9)]
    usage = {"input_tokens": 2_000_000, "output_tokens": 100_000, "total_tokens": 2_100_000}
    native = {"mode": "native", "upstream": "openai", "model": "gpt-5", "jobs": 2}
    stub.costs = {
        "object": "batch.costs",
        "data": [
            native
            | {"requests": 1000, "usage": usage, "cost": "1.23", "line_cost": "2.46"}
            | {"source": "settings"},
        ],
    }
    batch_id = stub.batches[0]["id"]

    shown = " ".join(run("status", batch_id).stdout.split())
    assert (
        "At openai 1,000 lines of gpt-5, 2.1 M tokens, "
        "US$ 1.23 (line by line: 2.46; by settings)" in shown
    )
    assert document("status", batch_id) == stub.batches[0] | {"costs": stub.costs}


def test_status_says_what_keeps_lines_waiting(stub: Stub) -> None:
    stub.batches = [a_batch(status="in_progress", request_counts=counts(10, 6, 1))]
    stub.metrics = """# TYPE penstock_upstream_in_flight_requests gauge
penstock_upstream_in_flight_requests{upstream="gpu"} 12.0
# TYPE penstock_upstream_concurrency_limit gauge
penstock_upstream_concurrency_limit{upstream="gpu"} 12.0
# TYPE penstock_upstream_max_concurrency gauge
penstock_upstream_max_concurrency{upstream="gpu"} 256.0
# TYPE penstock_upstream_limited gauge
penstock_upstream_limited{upstream="gpu",reason="engine_queue"} 1.0
"""
    shown = " ".join(run("status", stub.batches[0]["id"]).stdout.split())

    assert (
        "Upstream gpu 12 lines in flight, 12 allowed now, 256 at most: "
        "requests wait in the engine's queue" in shown
    )


def error_lines(count: int, message: str) -> bytes:
    error = {"code": "upstream_batch_failed", "message": message}
    line = {"id": "b", "custom_id": "c", "response": None, "error": error}
    return f"{json.dumps(line)}\n".encode() * count


@pytest.mark.parametrize("command", ["status", "watch"])
def test_why_lines_failed_is_told_once(command: str, stub: Stub) -> None:
    stub.batches = [a_batch(**ended(0, 200, error_file_id="file-err"))]
    stub.files["file-err"] = error_lines(200, "The key is wrong.")

    shown = " ".join(run(command, stub.batches[0]["id"]).stdout.split())

    assert "200 × upstream_batch_failed: The key is wrong." in shown
    assert shown.count("wrong") == 1


def test_of_a_large_error_file_the_beginning_is_read(stub: Stub) -> None:
    stub.batches = [a_batch(**ended(0, 200, error_file_id="file-err"))]
    stub.files["file-err"] = error_lines(5, "x" * (1 << 20)) + error_lines(1, "Last.")

    shown = " ".join(run("status", stub.batches[0]["id"]).stdout.split())

    assert "3 × upstream_batch_failed: xxx" in shown
    assert "in the first 3 lines of the error file" in shown
    assert "Last." not in shown


def test_a_batch_is_shown_whose_error_file_was_deleted(stub: Stub) -> None:
    stub.batches = [a_batch(**ended(0, 200, error_file_id="file-gone"))]

    assert "200 failed" in run("status", stub.batches[0]["id"]).stdout


@pytest.mark.parametrize("command", ["status", "watch", "download", "cancel"])
def test_a_batch_that_is_not_there_is_told(command: str, stub: Stub) -> None:
    assert refusal(command, "batch_x") == "No batch found with id 'batch_x'."


def test_cancel_says_what_happens(stub: Stub) -> None:
    stub.batches = [a_batch(status="in_progress")]
    batch_id = stub.batches[0]["id"]

    assert run("cancel", batch_id).stdout == (
        f"Batch {batch_id} is cancelling: lines in flight may still end.\n"
    )
    assert document("cancel", batch_id)["status"] == "cancelling"


def test_a_batch_that_has_ended_cannot_be_cancelled(stub: Stub) -> None:
    stub.batches = [a_batch(**ended())]

    assert refusal("cancel", stub.batches[0]["id"]) == (
        "Cannot cancel a batch with status 'completed'."
    )


# watch


@pytest.mark.parametrize(
    ("end", "exit_code"),
    [
        (ended(), 0),
        (ended(failed=1), 1),
        ({"status": "failed", "failed_at": NOON}, 1),
        ({"status": "expired", "expired_at": NOON}, 1),
        ({"status": "cancelled", "cancelled_at": NOON}, 1),
    ],
)
def test_watch_tells_by_its_exit_code_how_the_batch_ended(
    end: dict[str, Any], exit_code: int, stub: Stub
) -> None:
    stub.batches = [a_batch()]
    stub.stages = [{"status": "in_progress"}, end]

    assert run("watch", stub.batches[0]["id"]).exit_code == exit_code


def test_watch_prints_one_document_and_its_lines_elsewhere(stub: Stub) -> None:
    stub.batches = [a_batch()]
    stub.stages = [{"status": "in_progress"}, ended()]

    result = run("watch", stub.batches[0]["id"], "--json")

    assert json.loads(result.stdout)["status"] == "completed"
    assert "in_progress: 0 of 0 lines ended" in result.stderr


def test_an_interrupted_watch_says_that_the_batch_goes_on(stub: Stub) -> None:
    stub.batches = [a_batch(status="in_progress")]
    batch_id = stub.batches[0]["id"]
    code = "from penstock.cli import main; main()"

    with subprocess.Popen(
        [sys.executable, "-u", "-c", code, "watch", batch_id],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
        _, errors = watching.communicate(timeout=20)

    assert watching.returncode == 130
    assert errors == f"The batch goes on; watch it again with: penstock watch {batch_id}\n"


# download


def test_download_writes_both_files(stub: Stub) -> None:
    end = ended(failed=1, output_file_id="file-out", error_file_id="file-err")
    stub.batches = [a_batch(**end)]
    stub.files = {"file-out": b"1\n2\n", "file-err": b"3\n"}
    batch_id = stub.batches[0]["id"]

    result = run("download", batch_id, "-o", "results/today")

    assert result.exit_code == 0
    assert Path(f"results/today/{batch_id}_output.jsonl").read_bytes() == b"1\n2\n"
    assert Path(f"results/today/{batch_id}_error.jsonl").read_bytes() == b"3\n"
    assert result.stdout == (
        f"Output file: results/today/{batch_id}_output.jsonl (4 bytes)\n"
        f"Error file: results/today/{batch_id}_error.jsonl (2 bytes)\n"
    )


def test_download_says_which_file_there_is_not(stub: Stub) -> None:
    stub.batches = [a_batch(**ended(output_file_id="file-out"))]
    stub.files = {"file-out": b"1\n"}
    batch_id = stub.batches[0]["id"]

    assert run("download", batch_id).stdout.endswith(
        "There is no error file, because no line failed.\n"
    )
    assert document("download", batch_id) == {
        "batch_id": batch_id,
        "status": "completed",
        "output": {"path": f"{batch_id}_output.jsonl", "bytes": 2},
        "error": None,
    }


def test_download_of_a_batch_that_goes_on_is_refused(stub: Stub) -> None:
    stub.batches = [a_batch(status="in_progress")]

    assert "wait with `penstock watch" in refusal("download", stub.batches[0]["id"])


def test_download_of_a_failed_batch_says_why_there_is_nothing(stub: Stub) -> None:
    stub.batches = [a_batch(status="failed")]

    result = run("download", stub.batches[0]["id"])

    assert result.exit_code == 1
    assert "its input file has faults and nothing was sent" in result.stdout


# validate


def test_a_valid_file_is_told() -> None:
    result = run("validate", input_file(LINE, "", LINE.replace('"a"', '"b"')))

    assert result.exit_code == 0
    assert result.stdout == (
        "in.jsonl is valid: 2 requests to /v1/chat/completions, model qwen.\n"
    )


def test_every_fault_is_told_with_its_line() -> None:
    result = run("validate", input_file(LINE, "", LINE, "{x"))

    assert result.exit_code == 2
    duplicate, broken = result.stdout.splitlines()
    assert duplicate.startswith("in.jsonl:3: duplicate_custom_id (custom_id): ")
    assert broken.startswith("in.jsonl:4: invalid_json_line: ")
    assert result.stderr == (
        "Error: in.jsonl has 2 faults; a batch of it would fail and nothing would be sent.\n"
    )


def test_validate_holds_the_file_to_the_endpoint_it_is_given() -> None:
    found = document("validate", input_file(LINE), "--endpoint", "/v1/embeddings", exit_code=2)

    assert found["valid"] is False
    assert (1, "invalid_url") in [(fault["line"], fault["code"]) for fault in found["faults"]]


def test_validate_prints_what_it_found() -> None:
    assert document("validate", input_file(LINE)) == {
        "file": "in.jsonl",
        "valid": True,
        "requests": 1,
        "endpoint": "/v1/chat/completions",
        "models": ["qwen"],
        "faults": [],
    }


def test_validate_holds_the_file_to_the_limits_of_the_settings() -> None:
    Path("penstock.toml").write_text("[limits]\ninput_file_bytes = 10\n")

    [fault] = document("validate", input_file(LINE), exit_code=2)["faults"]

    assert fault["code"] == "file_too_large"
    assert fault["message"].endswith("; it must have at most 10.")


def test_validate_holds_the_file_to_what_openai_allows_if_the_settings_say_so() -> None:
    Path("penstock.toml").write_text("[limits]\nembedding_inputs = 3\nstrict_openai = true\n")
    line = (
        '{"custom_id": "%s", "method": "POST", "url": "/v1/embeddings", '
        '"body": {"model": "%s", "input": ["x", "y"]}}'
    )
    file = input_file(line % ("a", "m"), line % ("b", "n"))

    faults = document("validate", file, exit_code=2)["faults"]

    assert [(fault["code"], fault["line"]) for fault in faults] == [
        ("too_many_embedding_inputs", None),
        ("mismatched_model", 2),
    ]


def test_run_is_not_held_to_the_limits_of_a_server() -> None:
    Path("penstock.toml").write_text(
        "[limits]\nrequests_per_batch = 1\nembedding_inputs = 1\nstrict_openai = true\n"
    )
    line = LINE.replace("/v1/chat/completions", "/v1/embeddings").replace(
        '"messages"', '"input"'
    )
    file = input_file(line, line.replace('"a"', '"b"').replace("qwen", "llama"), "{")

    result = run("run", file, "--upstream", "http://127.0.0.1:9/v1")

    assert result.exit_code == 2
    assert "faults (1)" in result.stderr
    assert "in.jsonl:3: invalid_json_line" in result.stdout


def test_an_unknown_endpoint_is_told_with_those_there_are() -> None:
    assert refusal("validate", input_file(LINE), "--endpoint", "/v1/x").startswith(
        '--endpoint is "/v1/x"; it must be one of /v1/chat/completions, '
    )


# simulate


def test_simulate_refuses_what_is_wrong() -> None:
    assert (
        refusal("simulate", "--error-rate", 2) == "error_rate is 2.0; it must be from 0 to 1."
    )


def test_simulate_says_where_it_cannot_listen(stub: Stub) -> None:
    port = stub.url.rpartition(":")[2]

    assert refusal("simulate", "--port", port).startswith(
        f"Nothing can listen on 127.0.0.1:{port}: "
    )


# keys


def test_a_key_is_shown_once_and_kept_as_a_hash() -> None:
    made = document("keys", "create", "--project", "alpha", "--data-dir", "data")

    [listed] = document("keys", "list", "--data-dir", "data")["data"]
    assert "key" not in listed
    assert listed["id"] == made["id"]
    assert listed["hint"] == f"{made['key'][:15]}…{made['key'][-4:]}"
    with closing(sqlite3.connect("data/penstock.db")) as database:
        dump = "\n".join(database.iterdump())
    assert made["key"] not in dump
    assert hashlib.sha256(made["key"].encode()).hexdigest() in dump


def test_a_key_can_be_revoked() -> None:
    made = document("keys", "create", "--project", "alpha")

    assert document("keys", "revoke", made["id"])["revoked_at"] >= int(time.time()) - 60
    assert run("keys", "revoke", made["id"]).exit_code == 0


def test_keys_are_listed_for_a_person() -> None:
    run("keys", "create", "--project", "alpha")

    head, row = run("keys", "list").stdout.splitlines()

    assert head.split() == ["ID", "PROJECT", "KEY", "CREATED", "REVOKED"]
    assert row.split()[1] == "alpha"


def test_a_key_that_is_not_there_is_told() -> None:
    run("keys", "create", "--project", "alpha")

    assert "key_x" in refusal("keys", "revoke", "key_x")


def test_keys_of_a_directory_without_a_database_are_not_listed() -> None:
    assert refusal("keys", "list", "--data-dir", "gone").startswith(
        "There is no Penstock database in gone; "
    )
    assert not Path("gone").exists()


def test_a_project_needs_a_name() -> None:
    assert refusal("keys", "create", "--project", "a b").startswith('--project is "a b"; ')


# check


def test_check_refuses_wrong_settings() -> None:
    Path("other.toml").write_text("[server]\nprot = 1\n")

    assert refusal("check", "--config", "other.toml") == (
        "There is no setting server.prot (file other.toml); did you mean server.port?"
    )


def test_check_shows_the_settings_in_force_without_secrets() -> None:
    Path("penstock.toml").write_text('api_key = "sk-secret"\n[server]\nport = 9000\n')

    result = run("check")

    rows = [line.split(maxsplit=2) for line in result.stdout.splitlines()]
    assert ["server.port", "9000", "file penstock.toml"] in rows
    assert ["api_key", "***", "file penstock.toml"] in rows
    assert "secret" not in result.output


def test_check_makes_nothing() -> None:
    found = document("check")

    assert found["ok"] is True
    assert not Path("penstock-data").exists()


def test_check_tries_what_the_settings_name(stub: Stub) -> None:
    stub.key = "sk-up"
    run("keys", "create", "--project", "alpha")
    Path("penstock.toml").write_text(
        f'[[upstreams]]\nname = "local"\nbase_url = "{stub.url}/v1"\napi_key = "sk-up"\n'
        'models = ["*-7b"]\n'
    )

    found = document("check")

    assert [(one["what"], one["verdict"]) for one in found["checks"]] == [
        ("data directory", "ok"),
        ("database", "ok"),
        ("upstream local", "ok"),
    ]
    assert found["checks"][2]["message"] == "It answers and serves qwen-7b."


def test_check_notes_an_upstream_whose_models_do_not_match(stub: Stub) -> None:
    stub.key = None
    Path("penstock.toml").write_text(
        f'[[upstreams]]\nname = "local"\nbase_url = "{stub.url}/v1"\nmodels = ["gpt-*"]\n'
    )

    found = document("check")

    assert found["checks"][2]["verdict"] == "note"
    assert "none of its 2 models matches" in found["checks"][2]["message"]


def test_check_asks_the_batch_api_of_a_native_upstream(stub: Stub) -> None:
    stub.key = None
    Path("penstock.toml").write_text(
        f'[[upstreams]]\nname = "half"\nbase_url = "{stub.url}/v1"\nmode = "auto"\n'
    )

    found = document("check")

    assert found["checks"][3] == {
        "what": "batches of half",
        "verdict": "ok",
        "message": "Its batch API answers.",
    }
    assert ("GET", "/v1/batches?limit=100") in stub.asked


def test_check_fails_where_a_native_upstream_has_no_batch_api(stub: Stub) -> None:
    stub.key = None
    Path("penstock.toml").write_text(
        f'[[upstreams]]\nname = "half"\nbase_url = "{stub.url}/v1"\nmode = "native"\n'
        'kind = "anthropic"\n'
    )

    result = run("check")

    assert result.exit_code == 1
    [row] = [line for line in result.stdout.splitlines() if line.startswith("batches of half")]
    assert "problem" in row
    assert "did not list its batches (HTTP 404)" in row
    assert row.endswith("correct its settings, or set its mode to lines.")


def test_check_fails_where_an_upstream_does_not_answer() -> None:
    Path("penstock.toml").write_text(
        '[[upstreams]]\nname = "local"\nbase_url = "http://127.0.0.1:9/v1"\n'
    )

    result = run("check")

    assert result.exit_code == 1
    [row] = [line for line in result.stdout.splitlines() if line.startswith("upstream local")]
    assert "problem" in row
    assert row.endswith("start it, or correct its base_url and api_key.")


def test_check_fails_where_the_data_directory_cannot_be_written() -> None:
    Path("file").touch()

    found = document("check", "--data-dir", "file/data", exit_code=1)

    assert found["ok"] is False
    assert "cannot be written" in found["checks"][0]["message"]
