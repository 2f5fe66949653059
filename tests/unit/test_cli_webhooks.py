"""`penstock webhooks`, as a person types it."""

import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from penstock.checkup import open_store
from penstock.cli import app
from penstock.model import Batch, BatchId, BatchStatus, DeliveryStatus, Webhook, WebhookId
from penstock.places import store_url
from penstock.signing import read_secret
from penstock.store.base import DeliveryReport, Page
from tests.receiver import Receiver, run_receiver

NOON = 1_795_000_000
DATA = Path("penstock-data")


@pytest.fixture(autouse=True)
def bare_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PENSTOCK_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with run_receiver() as receiver:
        yield receiver


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["webhooks", *map(str, arguments)])


def document(*arguments: object, exit_code: int = 0) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


def refusal(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr.removeprefix("Error: ").rstrip("\n")


def make_deliveries(*fates: str) -> list[str]:
    """Keep a delivery for each of `pending`, `failed` and `delivered`; their IDs."""

    async def work() -> list[str]:
        async with open_store(store_url(DATA)) as store:
            project = await store.ensure_project("default")
            hook = Webhook(
                id=WebhookId("we_1"), project_id=project.id, url="https://a.example/hook"
            )
            await store.set_webhooks([hook])
            for number in range(len(fates)):
                await store.add_batch(a_batch(number, project.id), needs_file=False)
                await store.move_batch(
                    BatchId(f"batch_{number}"), BatchStatus.FAILED, now=NOON + number
                )
            made = list(reversed(await store.list_deliveries(Page(limit=1000))))
            for delivery, fate in zip(made, fates, strict=True):
                status = DeliveryStatus(fate)
                error = "It answered with HTTP status 500."
                report = DeliveryReport(
                    id=delivery.id,
                    attempt=1,
                    at=NOON,
                    status=status,
                    status_code=200 if status is DeliveryStatus.DELIVERED else 500,
                    error=None if status is DeliveryStatus.DELIVERED else error,
                )
                if status is not DeliveryStatus.PENDING:
                    assert await store.report_delivery(report)
        return [delivery.id for delivery in made]

    DATA.mkdir(exist_ok=True)
    return asyncio.run(work())


def a_batch(number: int, project_id: Any) -> Batch:
    return Batch(
        id=BatchId(f"batch_{number}"),
        project_id=project_id,
        status=BatchStatus.VALIDATING,
        endpoint="/v1/embeddings",
        input_file_id="file-1",
        input_blob_key="",
        completion_window="24h",
        created_at=NOON,
        expires_at=NOON + 86400,
    )


# list


def test_webhooks_and_deliveries_are_listed() -> None:
    ids = make_deliveries("failed", "delivered", "pending")

    found = document("list")

    assert [hook["url"] for hook in found["webhooks"]] == ["https://a.example/hook"]
    assert [one["id"] for one in found["data"]] == ids[::-1]
    assert [one["status"] for one in found["data"]] == ["pending", "delivered", "failed"]
    assert found["data"][2] == {
        "id": ids[0],
        "webhook_id": "we_1",
        "project_id": found["webhooks"][0]["project_id"],
        "batch_id": "batch_0",
        "url": "https://a.example/hook",
        "event": "batch.failed",
        "status": "failed",
        "attempts": 1,
        "created_at": NOON,
        "queued_at": NOON,
        "next_attempt_at": None,
        "ended_at": NOON,
        "last_attempt_at": NOON,
        "last_status_code": 500,
        "last_error": "It answered with HTTP status 500.",
    }


def test_deliveries_are_listed_for_a_person() -> None:
    [failed, delivered] = make_deliveries("failed", "delivered")

    lines = [line.split() for line in run("list").stdout.splitlines()]

    assert lines[0] == ["WEBHOOK", "URL"]
    assert lines[1] == ["we_1", "https://a.example/hook"]
    assert lines[3][:4] == ["DELIVERY", "EVENT", "BATCH", "URL"]
    assert lines[4][0] == delivered
    assert lines[4][-2:] == ["1", "200"]
    assert lines[5][:3] == [failed, "batch.failed", "batch_0"]
    assert lines[5][4:] == ["failed", "1", "It", "answered", "with", "HTTP", "status", "500."]


def test_the_list_narrows_down() -> None:
    ids = make_deliveries("failed", "delivered", "failed")

    assert [one["id"] for one in document("list", "--status", "failed")["data"]] == [
        ids[2],
        ids[0],
    ]
    assert [one["id"] for one in document("list", "--limit", 1)["data"]] == [ids[2]]


def test_an_empty_list_says_so() -> None:
    make_deliveries()

    assert "Nothing was to be delivered yet." in run("list").stdout
    assert "There is none such." in run("list", "--status", "failed").stdout


@pytest.mark.parametrize("command", [["list"], ["replay", "wh_1"]])
def test_a_directory_without_a_database_is_told(command: list[str]) -> None:
    assert refusal(*command).startswith("There is no Penstock database in penstock-data; ")
    assert not DATA.exists()


# test


def test_a_webhook_that_takes_the_event_is_told(receiver: Receiver) -> None:
    Path("penstock.toml").write_text(receiver.table())

    result = run("test")

    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1].split() == [
        receiver.url,
        *["default", "It", "took", "the", "event", "(HTTP", "status", "200)."],
    ]
    [event] = receiver.events
    assert event.unwrap(receiver.secret).type == "webhook.test"
    assert event.delivery_id.startswith("wh_")
    assert abs(int(event.headers["webhook-timestamp"]) - time.time()) < 30
    assert not DATA.exists()


def test_a_webhook_that_does_not_take_it_is_told(receiver: Receiver) -> None:
    receiver.answers = [404]
    Path("penstock.toml").write_text(receiver.table())

    found = document("test", exit_code=1)

    assert found["data"] == [
        {
            "url": receiver.url,
            "project": "default",
            "ok": False,
            "status_code": 404,
            "error": "It answered with HTTP status 404.",
        }
    ]


def test_the_webhooks_of_one_project_can_be_tried(receiver: Receiver) -> None:
    projects = '[[projects]]\nname = "alpha"\n'
    tables = receiver.table() + receiver.table(project='"alpha"', url=f'"{receiver.url}/alpha"')
    Path("penstock.toml").write_text(projects + tables)

    assert [one["project"] for one in document("test", "--project", "alpha")["data"]] == [
        "alpha"
    ]
    assert len(receiver.events) == 1
    assert refusal("test", "--project", "beta") == (
        '--project is "beta", which has no webhook; it must be one of default, alpha.'
    )


def test_without_webhooks_there_is_nothing_to_try() -> None:
    assert refusal("test") == (
        "There is nothing to try: no webhook is set; add a [[webhooks]] table to the settings."
    )


# replay


def test_a_delivery_can_be_replayed() -> None:
    [failed, delivered] = make_deliveries("failed", "delivered")

    result = run("replay", failed, delivered, failed)

    assert result.exit_code == 0, result.output
    assert result.stdout.count("is delivered again") == 2
    listed = document("list", "--status", "pending")["data"]
    assert {one["id"] for one in listed} == {failed, delivered}
    assert all(one["attempts"] == 0 for one in listed)
    assert all(abs(one["next_attempt_at"] - time.time()) < 30 for one in listed)


def test_all_that_failed_can_be_replayed() -> None:
    ids = make_deliveries(*["failed"] * 130, "delivered")

    assert {one["id"] for one in document("replay", "--failed")["data"]} == set(ids[:-1])
    assert document("list", "--status", "failed")["data"] == []
    assert run("replay", "--failed").stdout == "No delivery has failed.\n"


def test_nothing_is_replayed_if_one_is_not_there() -> None:
    [failed] = make_deliveries("failed")

    assert refusal("replay", failed, "wh_x") == "No delivery has the ID 'wh_x'."
    assert document("list", "--status", "pending")["data"] == []


@pytest.mark.parametrize("arguments", [[], ["wh_1", "--failed"]])
def test_a_replay_must_know_what(arguments: list[str]) -> None:
    assert refusal("replay", *arguments).startswith("Name the deliveries by their IDs, ")


# secret


def test_a_secret_can_be_made() -> None:
    result = run("secret")

    key = read_secret(result.stdout.rstrip("\n"))
    assert key is not None
    assert len(key) == 32
    assert "previous_secret" in result.stderr
    assert document("secret")["secret"] != result.stdout.rstrip("\n")


# elsewhere


def test_check_lists_webhooks_and_sends_nothing(receiver: Receiver) -> None:
    table = receiver.table(url='"http://hook.invalid/"', allow_private_addresses="false")
    Path("penstock.toml").write_text(receiver.table() + table)

    result = CliRunner().invoke(app, ["check", "--json"])

    found = json.loads(result.stdout)
    assert [(one["what"], one["verdict"]) for one in found["checks"]][-2:] == [
        ("webhook", "ok"),
        ("webhook", "note"),
    ]
    assert receiver.url in found["checks"][-2]["message"]
    assert receiver.secret not in result.output
    assert receiver.events == []
