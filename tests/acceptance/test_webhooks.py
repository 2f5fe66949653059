"""Webhooks as their owner meets them: the program as processes, OpenAI's client as receiver."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks import harness

from tests.receiver import PATIENCE_S, Receiver, run_receiver

LATENCY_MS = 1500


@pytest.fixture
def upstream() -> Iterator[harness.Process]:
    with harness.upstream() as process:
        yield process


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with run_receiver() as receiver:
        yield receiver


class Site:
    """A data directory, its settings file and whoever works with them."""

    def __init__(self, folder: Path, receiver: Receiver, upstream: harness.Process) -> None:
        self.data_dir = folder / "data"
        self.config = folder / "penstock.toml"
        self.config.write_text(receiver.table())
        self.input = folder / "in.jsonl"
        harness.write_input(self.input, 3, 300)
        self._upstream = upstream
        self._port = 0

    def start(self) -> harness.Process:
        settings = {"PENSTOCK_CONFIG": str(self.config)}
        process = harness.start_server(
            self.data_dir, self._upstream.url, port=self._port, settings=settings
        )
        self._port = process.port
        return process

    def webhooks(self, *arguments: str, exit_code: int = 0) -> Any:
        """What `penstock webhooks … --json` prints."""
        command = [sys.executable, "-m", "penstock", "webhooks", *arguments, "--json"]
        command += ["--config", str(self.config), "--data-dir", str(self.data_dir)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert done.returncode == exit_code, done.stderr
        return json.loads(done.stdout)

    def deliveries(self) -> list[Any]:
        return self.webhooks("list")["data"]


def until(is_so: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.05)


def stop(process: harness.Process) -> None:
    process.popen.terminate()
    assert process.popen.wait(PATIENCE_S) == 0


def test_every_end_of_a_batch_is_told(tmp_path: Path, receiver: Receiver) -> None:
    with harness.upstream(latency_ms=LATENCY_MS) as slow:
        site = Site(tmp_path, receiver, slow)
        process = site.start()
        client = harness.Client(process)
        good = client.upload(site.input)
        twice = tmp_path / "twice.jsonl"
        twice.write_text(site.input.read_text() * 2)

        completed = client.create(good)
        failed = client.create(client.upload(twice))
        body = {"input_file_id": good, "endpoint": "/v1/chat/completions"}
        expired = client.call("POST", "/batches", body | {"completion_window": "1s"})["id"]
        cancelled = client.create(good)
        client.call("POST", f"/batches/{cancelled}/cancel")
        came = receiver.wait_for(4)
        stop(process)

    events = {event.unwrap(receiver.secret).type: event for event in came}
    assert {name: event.unwrap(receiver.secret).data.id for name, event in events.items()} == {
        "batch.completed": completed,
        "batch.failed": failed,
        "batch.expired": expired,
        "batch.cancelled": cancelled,
    }
    data = json.loads(events["batch.completed"].body)["data"]
    assert data["status"] == "completed"
    assert data["request_counts"] == {"total": 3, "completed": 3, "failed": 0}
    assert data["output_file_id"].startswith("file-")


def test_an_event_outlives_a_kill_between_the_end_and_its_delivery(
    tmp_path: Path, receiver: Receiver, upstream: harness.Process
) -> None:
    receiver.answers = [None]
    site = Site(tmp_path, receiver, upstream)
    process = site.start()
    client = harness.Client(process)
    batch_id = client.create(client.upload(site.input))
    receiver.wait_for(1)

    process.kill()
    process = site.start()
    first, second = receiver.wait_for(2)
    until(lambda: site.deliveries()[0]["status"] == "delivered", "it is known as delivered")
    stop(process)

    assert second.delivery_id == first.delivery_id
    assert second.body == first.body
    assert second.unwrap(receiver.secret).data.id == batch_id
    assert len(receiver.events) == 2


def test_an_event_that_was_refused_is_not_forgotten_by_a_kill_and_can_be_replayed(
    tmp_path: Path, receiver: Receiver, upstream: harness.Process
) -> None:
    receiver.answers = [500, 500]
    site = Site(tmp_path, receiver, upstream)
    process = site.start()
    client = harness.Client(process)
    client.create(client.upload(site.input))
    until(lambda: site.deliveries() and site.deliveries()[0]["attempts"], "it was tried")
    process.kill()

    [waiting] = site.deliveries()
    assert waiting["status"] == "pending"
    assert waiting["last_error"] == "It answered with HTTP status 500."
    assert waiting["next_attempt_at"] > waiting["queued_at"]

    process = site.start()
    receiver.wait_for(2)  # in its own time
    until(lambda: site.deliveries()[0]["attempts"] == 2, "it was tried again")
    [again] = site.webhooks("replay", waiting["id"])["data"]
    assert again["attempts"] == 0
    receiver.wait_for(3)
    until(lambda: site.deliveries()[0]["status"] == "delivered", "it is known as delivered")
    stop(process)

    events = receiver.events
    assert {event.delivery_id for event in events} == {waiting["id"]}
    assert len({event.headers["webhook-timestamp"] for event in events}) == 3
    assert len({event.unwrap(receiver.secret).id for event in events}) == 1


def test_a_webhook_can_be_tried_beside_the_server(
    tmp_path: Path, receiver: Receiver, upstream: harness.Process
) -> None:
    site = Site(tmp_path, receiver, upstream)
    process = site.start()

    [tried] = site.webhooks("test")["data"]
    receiver.answers = [500]
    [failed] = site.webhooks("test", exit_code=1)["data"]
    stop(process)

    assert (tried["ok"], failed["ok"]) == (True, False)
    assert receiver.events[0].unwrap(receiver.secret).type == "webhook.test"
    assert site.deliveries() == []


def test_run_neither_needs_nor_tells_the_webhooks_of_the_settings(
    tmp_path: Path, receiver: Receiver, upstream: harness.Process
) -> None:
    site = Site(tmp_path, receiver, upstream)
    site.config.write_text(receiver.table(secret='{ env = "NOT_SET_HERE" }'))
    arguments = [site.input, "--config", site.config, "--upstream", upstream.url]

    done = subprocess.run(
        [sys.executable, "-m", "penstock", "run", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={name: value for name, value in os.environ.items() if name != "NOT_SET_HERE"},
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert receiver.events == []
