"""A cluster of real processes, of which each part is hurt while a batch runs.

PostgreSQL, an S3 server behind a proxy, an API and three workers stay for all tests; what one
has killed is started again before the next.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from benchmarks import cluster as parts
from benchmarks import harness
from benchmarks.cluster import Cluster, until
from benchmarks.recovery import Found

import penstock as penstock_package
from penstock import __version__
from penstock.store import migrations
from tests.disks import small_disk
from tests.object_stores import Proxy, Rule, S3Bucket, moto
from tests.postgres import Database, PostgresServer, Unavailable, give_up

LEASE_S = 2.0
WORKERS = 3
IN_FLIGHT = 24
"""Of each worker at most."""
LATENCY_S = 0.2
LINES = 600
SLICE = 20
ONE_FLUSH = int(2 * IN_FLIGHT / LATENCY_S)
"""Replies of one worker that may wait for a flush of a second, or for one that is under way."""
SETTINGS = {
    "PENSTOCK_WORKER__LEASE_S": str(LEASE_S),
    "PENSTOCK_WORKER__SLICE_REQUESTS": str(SLICE),
    "PENSTOCK_WORKER__CANCEL_GRACE_S": "1",
    "PENSTOCK_SERVER__SHUTDOWN_GRACE_S": "5",
    "PENSTOCK_UPSTREAMS__0__MAX_CONCURRENCY": str(IN_FLIGHT),
    "PENSTOCK_UPSTREAMS__0__INITIAL_CONCURRENCY": str(IN_FLIGHT),
}


def pass_on(method: str, path: str) -> None:
    """How the proxy behaves in good times."""


def fail_in_turns(method: str, path: str) -> int:
    return 503 if method == "PUT" else 500


def be_slow(method: str, path: str) -> None:
    time.sleep(2.0)


@dataclass
class Ground:
    """A cluster, and what it stands on."""

    cluster: Cluster
    upstream: harness.Process
    postgres: PostgresServer
    space: Path
    lines: int = 0
    """How many were given out to batches so far."""

    def start_batch(self, lines: int = LINES, **rest: Any) -> "Run":
        """Upload some lines that no other batch has, and create a batch."""
        numbers = range(self.lines, self.lines + lines)
        self.lines += lines
        source = self.space / "in.jsonl"
        harness.write_input(source, lines, 300, first=numbers.start)
        before = harness.stats(self.upstream)
        client = self.cluster.client
        body = {
            "input_file_id": client.upload(source),
            "endpoint": "/v1/chat/completions",
            **rest,
        }
        batch_id = client.call("POST", "/batches", body)["id"]
        return Run(self, batch_id, numbers, before)


@dataclass
class Run:
    """A batch under way."""

    ground: Ground
    id: str
    numbers: range
    before: dict[str, Any]
    found: Found = field(default_factory=Found)

    def sent(self) -> int:
        """How many of its lines the upstream has seen."""
        return harness.stats(self.ground.upstream)["lines"] - self.before["lines"]

    def sent_again(self) -> int:
        return harness.stats(self.ground.upstream)["again"] - self.before["again"]

    def wait_for_lines(self, share: float) -> None:
        goal = share * len(self.numbers)
        until(lambda: self.sent() >= goal, f"{goal:.0f} lines are sent")

    def blobs(self, batch: dict[str, Any]) -> set[str]:
        """All that is kept of it at its end."""
        ids = [batch[f"{kind}_file_id"] for kind in ("input", "output", "error")]
        return {f"files/{id_}" for id_ in ids if id_}

    def end(self) -> dict[str, Any]:
        """Wait for its end; the books balance: each line once in one file, counts as the
        files say."""
        batch = self.ground.cluster.wait(self.id)
        self.found.take(self.ground.cluster.client, batch, self.numbers, self.ground.space)
        assert self.found.lines == set(self.numbers)
        assert self.found.results == len(self.numbers)
        assert self.found.misplaced == 0
        assert self.found.is_true, batch
        return batch


@pytest.fixture(scope="module")
def upstream() -> Iterator[harness.Process]:
    with harness.upstream(latency_ms=LATENCY_S * 1000) as process:
        yield process


@pytest.fixture(scope="module")
def bucket() -> Iterator[S3Bucket]:
    with moto() as server:
        yield S3Bucket(server)


@pytest.fixture(scope="module")
def proxy(bucket: S3Bucket) -> Iterator[Proxy]:
    """Through which the cluster reaches the storage."""
    with Proxy(bucket.server.url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def database() -> Iterator[PostgresServer]:
    try:
        server = PostgresServer()
    except Unavailable as error:
        give_up(error)
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
    upstream: harness.Process,
    bucket: S3Bucket,
    proxy: Proxy,
    database: PostgresServer,
) -> Iterator[Ground]:
    space = tmp_path_factory.mktemp("cluster")
    storage = {
        "PENSTOCK_STORAGE_URL": bucket.url,
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": bucket.server.access_key_id,
        "AWS_SECRET_ACCESS_KEY": bucket.server.secret_access_key,
        "AWS_REGION": "us-east-1",
    }
    url = database.make_database()
    with Cluster(
        space, upstream.url, url, storage, settings=SETTINGS, workers=WORKERS
    ) as cluster:
        yield Ground(cluster, upstream, database, space)


@pytest.fixture
def ground(whole: Ground, proxy: Proxy) -> Iterator[Ground]:
    """The cluster, healthy at the start."""
    whole.cluster.heal()
    proxy.rule = pass_on
    yield whole
    print(whole.cluster.logs())  # which is shown if the test has failed


def test_a_worker_that_is_killed_costs_its_flight_and_a_flush(ground: Ground) -> None:
    run = ground.start_batch()
    run.wait_for_lines(0.3)

    ground.cluster.busy_worker().kill()

    assert run.end()["status"] == "completed"
    assert run.sent_again() <= IN_FLIGHT + ONE_FLUSH


def test_a_worker_that_is_stopped_longer_than_its_lease_writes_into_the_void(
    ground: Ground,
) -> None:
    run = ground.start_batch()
    run.wait_for_lines(0.3)

    worker = ground.cluster.busy_worker()
    parts.stop(worker)
    time.sleep(LEASE_S + 1)
    parts.resume(worker)

    assert run.end()["status"] == "completed"
    assert run.sent_again() <= 2 * IN_FLIGHT + ONE_FLUSH


def test_a_worker_that_is_told_to_stop_gives_all_back_and_nothing_is_sent_twice(
    ground: Ground,
) -> None:
    run = ground.start_batch()
    run.wait_for_lines(0.3)

    begun = time.monotonic()
    worker = ground.cluster.busy_worker().popen
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0

    assert time.monotonic() - begun < 5 + 5
    assert run.end()["status"] == "completed"
    assert run.sent_again() == 0


def test_an_api_that_is_killed_stops_no_line(ground: Ground) -> None:
    run = ground.start_batch()
    run.wait_for_lines(0.2)

    ground.cluster.api.kill()
    run.wait_for_lines(0.6)
    ground.cluster.restart_api()

    assert run.end()["status"] == "completed"
    assert run.sent_again() == 0


def test_a_database_that_is_away_for_longer_than_a_lease_costs_nothing(
    ground: Ground,
) -> None:
    """When it is back, the workers that live extend their leases before others look."""
    run = ground.start_batch()
    run.wait_for_lines(0.3)

    ground.postgres.stop(immediate=True)
    time.sleep(LEASE_S + 1)
    ground.postgres.start()

    assert run.end()["status"] == "completed"
    assert run.sent_again() == 0


@pytest.mark.parametrize("trouble", [fail_in_turns, be_slow])
def test_a_storage_that_fails_for_a_while_costs_nothing(
    ground: Ground, proxy: Proxy, trouble: Rule
) -> None:
    run = ground.start_batch()
    run.wait_for_lines(0.3)

    proxy.rule = trouble
    time.sleep(2.0)
    proxy.rule = pass_on

    assert run.end()["status"] == "completed"
    assert run.sent_again() == 0


def test_a_cancel_reaches_all_workers(ground: Ground) -> None:
    run = ground.start_batch(4 * LINES)
    until(lambda: senders(ground) >= 2, "two workers send")

    ground.cluster.client.call("POST", f"/batches/{run.id}/cancel")

    assert run.end()["status"] == "cancelled"
    sent = run.sent()
    assert run.found.never_run == 4 * LINES - sent
    time.sleep(2 * LATENCY_S)
    assert run.sent() == sent < 4 * LINES
    assert run.sent_again() == 0


def test_a_window_that_closes_ends_the_batch_with_what_there_is(ground: Ground) -> None:
    run = ground.start_batch(4 * LINES, completion_window="5s")

    assert run.end()["status"] == "expired"

    assert 0 < run.found.never_run < 4 * LINES
    sent = run.sent()
    time.sleep(2 * LATENCY_S)
    assert run.sent() == sent
    assert run.sent_again() == 0


@pytest.mark.parametrize(
    ("doing", "what"), [("GET", "/segments/"), ("PUT", "/files/")], ids=["reads", "writes"]
)
def test_a_finalizer_that_is_stopped_is_replaced_and_leaves_nothing(
    ground: Ground, proxy: Proxy, bucket: S3Bucket, doing: str, what: str
) -> None:
    first, *others = ground.cluster.workers
    for other in others:
        other.kill()
    url = ground.cluster.environment["PENSTOCK_DATABASE_URL"]
    before = set(bucket.everything())
    run = ground.start_batch(LINES // 3)
    is_stopped, may_go_on = threading.Event(), threading.Event()

    def stop_it(method: str, path: str) -> None:
        if method == doing and what in path and not is_stopped.is_set():
            status = f"SELECT status FROM batches WHERE id = '{run.id}'"
            if fetch(url, status) == ["finalizing"]:
                parts.stop(first)
                is_stopped.set()
                may_go_on.wait(60)

    proxy.rule = stop_it
    assert is_stopped.wait(60)
    ground.cluster.workers[1] = ground.cluster.start_worker(1)
    batch = run.end()
    may_go_on.set()
    parts.resume(first)

    assert batch["status"] == "completed"
    assert run.sent_again() == 0
    until(lambda: parts.readiness(first)[0] == 200, "the first is well")
    named = run.blobs(batch)
    until(lambda: set(bucket.everything()) - before == named, "its file is gone")
    time.sleep(1)
    assert set(bucket.everything()) - before == named
    assert "damaged" not in (ground.space / "worker-0.log").read_text()


def test_replies_for_a_batch_that_has_ended_meanwhile_leave_nothing(
    ground: Ground, bucket: S3Bucket
) -> None:
    before = set(bucket.everything())
    run = ground.start_batch()
    run.wait_for_lines(0.3)
    worker = ground.cluster.busy_worker()
    parts.stop(worker)
    ground.cluster.client.call("POST", f"/batches/{run.id}/cancel")
    batch = run.end()
    parts.resume(worker)

    assert batch["status"] == "cancelled"
    until(lambda: parts.lines_in_flight(worker) == 0, "it has heard of the end")
    until(lambda: set(bucket.everything()) - before == run.blobs(batch), "nothing is left")
    time.sleep(2)  # for a flush
    assert set(bucket.everything()) - before == run.blobs(batch)
    assert run.sent_again() == 0


def test_one_sweep_waits_for_its_hour_however_many_workers_ask_for_it(
    ground: Ground,
) -> None:
    url = ground.cluster.environment["PENSTOCK_DATABASE_URL"]
    in_hours = (
        "SELECT round(extract(epoch FROM execute_after - now()) / 3600)::int "
        "FROM penstock_jobs.pgqueuer WHERE entrypoint = 'sweep'"
    )

    until(lambda: fetch(url, in_hours), "a sweep is to come")

    assert fetch(url, in_hours) == [1]


def senders(ground: Ground) -> int:
    """How many workers have lines in flight."""
    return sum(map(bool, map(parts.lines_in_flight, ground.cluster.workers)))


# A deploy


def test_old_and_new_workers_run_side_by_side_while_the_old_are_replaced(
    ground: Ground, tmp_path: Path
) -> None:
    cluster = ground.cluster
    new = {"PYTHONPATH": str(make_next_version(tmp_path))}
    run = ground.start_batch(2 * LINES)
    run.wait_for_lines(0.1)

    migrated = cluster.run("migrate", more=new)
    assert migrated.returncode == 0, migrated.stderr
    for number in range(2):
        cluster.of_worker[number] = new
        old = cluster.workers[number].popen
        old.send_signal(signal.SIGTERM)
        assert old.wait(30) == 0
        cluster.workers[number] = cluster.start_worker(number)
        cluster.heal()
    versions = fetch(
        cluster.environment["PENSTOCK_DATABASE_URL"], "SELECT version FROM workers"
    )
    batch = run.end()
    for number in range(2):
        cluster.of_worker[number] = {}
        cluster.workers[number].kill()

    assert {NEXT_VERSION, __version__} <= set(versions)
    assert batch["status"] == "completed"
    assert run.sent_again() == 0


NEXT_VERSION = "99.0.0"
_NEXT_MIGRATION = """
import sqlalchemy as sa
from alembic import op

revision = "9999"
down_revision = "{head}"


def upgrade() -> None:
    op.add_column("batches", sa.Column("of_the_future", sa.Text))
"""


def make_next_version(folder: Path) -> Path:
    """The package as it may be one day: with another migration, which the code of today
    bears; where Python finds it."""
    package = folder / "penstock"
    shutil.copytree(Path(penstock_package.__file__).parent, package)
    (package / "__init__.py").write_text(f'__version__ = "{NEXT_VERSION}"\n')
    migrations_folder = package / "store" / "migrations"
    (migrations_folder / "versions" / "9999_next.py").write_text(
        _NEXT_MIGRATION.format(head=migrations.HEAD)
    )
    code = (migrations_folder / "__init__.py").read_text()
    code = code.replace(f'HEAD = "{migrations.HEAD}"', 'HEAD = "9999"')
    (migrations_folder / "__init__.py").write_text(code)
    return folder


def fetch(url: str, statement: str) -> list[Any]:
    """The first column of what a statement finds."""

    async def work() -> list[Any]:
        connection = await asyncpg.connect(url)
        try:
            return [row[0] for row in await connection.fetch(statement)]
        finally:
            await connection.close()

    return asyncio.run(work())


# Migrations


def penstock(*arguments: str, url: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "penstock", *arguments],
        env={**os.environ, "PENSTOCK_DATABASE_URL": url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_hosts_migrate_at_once(postgres_url: str) -> None:
    both = [penstock("migrate", "--json", url=postgres_url) for _ in range(2)]
    told = [process.communicate(timeout=60) for process in both]

    assert [process.returncode for process in both] == [0, 0], told
    after = {json.loads(said)["after"] for said, _ in told}
    assert None in [json.loads(said)["before"] for said, _ in told]  # both may have found it so
    assert len(after) == 1


def test_a_worker_does_not_start_on_a_database_without_tables(postgres_url: str) -> None:
    worker = penstock("work", url=postgres_url)
    _, errors = worker.communicate(timeout=60)

    assert worker.returncode == 2
    assert "penstock migrate" in errors
    assert "Traceback" not in errors


def test_a_worker_does_not_start_on_a_database_that_is_too_new_for_it(
    postgres: Database, migrated_url: str
) -> None:
    postgres.execute(
        "UPDATE alembic_version SET version_num = '9999'",
        "UPDATE schema_floor SET version = '9999'",
        database=urlsplit(migrated_url).path.lstrip("/"),
    )

    worker = penstock("work", url=migrated_url)
    _, errors = worker.communicate(timeout=60)

    assert worker.returncode == 2
    assert "use the newer Penstock" in errors


# A folder that all processes share


def test_a_shared_folder_serves_as_well_and_tells_when_it_is_full(
    tmp_path: Path, upstream: harness.Process, database: PostgresServer
) -> None:
    with small_disk(tmp_path, bytes=32 << 20) as disk:
        storage = {"PENSTOCK_DATA_DIR": str(disk.path / "shared")}
        url = database.make_database()
        with Cluster(tmp_path, upstream.url, url, storage, settings=SETTINGS, workers=2) as it:
            ground = Ground(it, upstream, database, tmp_path, lines=1_000_000)
            run = ground.start_batch()
            run.wait_for_lines(0.2)

            worker = it.busy_worker()
            disk.fill()
            until(lambda: "full" in parts.readiness(worker)[1].get("storage", ""), "it tells")
            disk.make_room()
            run.wait_for_lines(0.6)
            it.busy_worker().kill()

            assert run.end()["status"] == "completed"
            assert run.sent_again() <= IN_FLIGHT + ONE_FLUSH
