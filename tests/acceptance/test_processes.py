"""The program as a person runs it: real processes, ended in every way there is."""

import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks import harness

from tests.disks import small_disk
from tests.object_stores import S3Bucket, moto

PATIENCE_S = 60.0


def until(is_so: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.02)


def wait_for_lines(upstream: harness.Process, count: int) -> None:
    until(lambda: harness.stats(upstream)["lines"] >= count, f"{count} lines were sent")


def penstock(
    *arguments: str | Path, cwd: Path | None = None, **environment: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "penstock", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
    )


def readiness(process: harness.Process) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"{process.url}/readyz", timeout=5) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.fixture
def slow_upstream() -> Iterator[harness.Process]:
    with harness.upstream(latency_ms=50) as process:
        yield process


@pytest.fixture
def input_file(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    harness.write_input(path, 3000, 400)
    return path


def test_a_server_that_is_killed_again_and_again_loses_no_line_and_doubles_none(
    tmp_path: Path, slow_upstream: harness.Process, input_file: Path
) -> None:
    chance = random.Random(11)
    data_dir = tmp_path / "data"
    process = harness.start_server(data_dir, slow_upstream.url)
    client = harness.Client(process)
    batch_id = client.create(client.upload(input_file))
    kills = 3
    for kill in range(kills):
        goal = 3000 // (kills + 2) * (kill + 1)
        wait_for_lines(slow_upstream, goal)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process = harness.start_server(data_dir, slow_upstream.url, port=process.port)

    batch = client.wait(batch_id)
    client.download(batch["output_file_id"], tmp_path / "out.jsonl")
    process.popen.terminate()
    process.popen.wait()

    assert batch["request_counts"] == {"total": 3000, "completed": 3000, "failed": 0}
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == [f"request-{n}" for n in range(3000)]
    again = harness.stats(slow_upstream)["again"]
    in_flight, one_flush = 256, 256
    assert again <= kills * (in_flight + one_flush)


def test_a_full_disk_stops_the_sending_until_there_is_room(
    tmp_path: Path, slow_upstream: harness.Process, input_file: Path
) -> None:
    with small_disk(tmp_path, bytes=24 << 20) as disk:
        process = harness.start_server(disk.path / "data", slow_upstream.url)
        client = harness.Client(process)
        file_id = client.upload(input_file)
        batch_id = client.create(file_id)
        wait_for_lines(slow_upstream, 300)

        disk.fill()
        until(lambda: readiness(process)[0] == 503, "/readyz tells of it")
        faults = readiness(process)[1]["faults"]
        time.sleep(0.3)
        sent = harness.stats(slow_upstream)["requests"]
        time.sleep(1.0)
        assert harness.stats(slow_upstream)["requests"] == sent
        assert any("full" in fault for fault in faults.values())
        assert sent < 3000

        disk.make_room()
        batch = client.wait(batch_id)
        assert readiness(process)[0] == 200
        client.download(batch["output_file_id"], tmp_path / "out.jsonl")
        process.popen.terminate()
        process.popen.wait()

    assert harness.count_results(tmp_path / "out.jsonl") == (3000, 3000)
    assert harness.stats(slow_upstream)["again"] == 0


def test_sigterm_ends_the_server_in_good_order_and_a_restart_goes_on(
    tmp_path: Path, slow_upstream: harness.Process, input_file: Path
) -> None:
    data_dir = tmp_path / "data"
    process = harness.start_server(data_dir, slow_upstream.url)
    client = harness.Client(process)
    batch_id = client.create(client.upload(input_file))
    wait_for_lines(slow_upstream, 300)

    process.popen.send_signal(signal.SIGTERM)
    assert process.popen.wait(PATIENCE_S) == 0

    with harness.server(data_dir, slow_upstream.url, port=process.port):
        batch = client.wait(batch_id)
        client.download(batch["output_file_id"], tmp_path / "out.jsonl")
    assert harness.count_results(tmp_path / "out.jsonl") == (3000, 3000)
    # Lines in flight were let to their end, so nothing was sent twice.
    assert harness.stats(slow_upstream)["again"] == 0


def test_a_data_directory_has_one_server(
    tmp_path: Path, slow_upstream: harness.Process
) -> None:
    with harness.server(tmp_path / "data", slow_upstream.url):
        second = penstock("serve", "--data-dir", tmp_path / "data", "--port", "0")
        _, errors = second.communicate(timeout=PATIENCE_S)

    assert second.returncode == 2
    assert errors.startswith("Error: Another Penstock process works in")


def test_the_first_start_makes_a_key_shows_it_once_and_keeps_it(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    shown: list[str] = []
    for _ in range(2):
        process = penstock("serve", "--data-dir", data_dir, "--port", "0")
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        shown.append(first + process.stdout.read())
        process.communicate(timeout=PATIENCE_S)
    key = (data_dir / "api-key").read_text().strip()

    assert key.startswith("sk-penstock-")
    assert shown[0].count(key) == 1
    assert key not in shown[1]
    assert stat.S_IMODE((data_dir / "api-key").stat().st_mode) == 0o600


def test_an_upload_that_is_cut_leaves_no_file_and_no_bytes(
    tmp_path: Path, slow_upstream: harness.Process
) -> None:
    with harness.server(tmp_path / "data", slow_upstream.url) as process:
        with socket.create_connection(("127.0.0.1", process.port)) as connection:
            head = (
                "POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 90000000\r\n"
                f"authorization: Bearer {harness.KEY}\r\n"
                "content-type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
                'content-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{}\n'
            )
            connection.sendall(head.encode() + b" " * 5_000_000)
            files = tmp_path / "data" / "blobs" / "files"
            until(lambda: files.is_dir() and any(files.iterdir()), "bytes arrive")

        until(lambda: not any(files.iterdir()), "they are gone")
        assert harness.Client(process).call("GET", "/files")["data"] == []


def test_run_goes_on_where_it_was_killed(
    tmp_path: Path, slow_upstream: harness.Process, input_file: Path
) -> None:
    command = ("run", input_file, "-o", tmp_path / "out.jsonl")
    command = (*command, "--upstream", f"{slow_upstream.url}/v1", "--max-concurrency", "64")
    first = penstock(*command)
    wait_for_lines(slow_upstream, 500)
    first.kill()
    first.communicate()

    second = penstock(*command, "--json")
    told, errors = second.communicate(timeout=PATIENCE_S)

    assert second.returncode == 0, errors
    assert json.loads(told)["completed"] == 3000
    assert harness.count_results(tmp_path / "out.jsonl") == (3000, 3000)
    assert harness.stats(slow_upstream)["again"] <= 64 + 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("error_rate", [0, 1])
def test_run_tells_by_its_exit_code_whether_lines_failed(
    tmp_path: Path, error_rate: int
) -> None:
    harness.write_input(tmp_path / "in.jsonl", 5, 300)
    port = harness.free_port()
    options = ("--port", str(port), "--error-rate", str(error_rate), "--error-status", "400")
    simulator = penstock("simulate", *options)
    until(lambda: _listens(port), "the simulator answers")

    run = penstock("run", "in.jsonl", "--upstream", f"http://127.0.0.1:{port}/v1", cwd=tmp_path)
    _, errors = run.communicate(timeout=PATIENCE_S)
    simulator.terminate()
    simulator.communicate()

    assert run.returncode == error_rate, errors
    written = Counter(path.name for path in tmp_path.glob("in.output*"))
    assert set(written) == {"in.output.errors.jsonl" if error_rate else "in.output.jsonl"}


def test_run_sends_nothing_of_a_file_with_faults(
    tmp_path: Path, slow_upstream: harness.Process
) -> None:
    harness.write_input(tmp_path / "in.jsonl", 5, 300)
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write("{}\n")

    run = penstock("run", "in.jsonl", "--upstream", f"{slow_upstream.url}/v1", cwd=tmp_path)
    told, errors = run.communicate(timeout=PATIENCE_S)

    assert run.returncode == 2
    assert "in.jsonl:6: missing_required_parameter (custom_id)" in told + errors
    assert harness.stats(slow_upstream)["requests"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_run_leaves_the_cluster_of_its_settings_alone(
    tmp_path: Path, slow_upstream: harness.Process
) -> None:
    harness.write_input(tmp_path / "in.jsonl", 5, 300)
    with moto() as server:
        bucket = S3Bucket(server)
        kept = ["files/file-1", "parts/upload-1/part-1", "segments/batch-1/00000000.000001.a"]
        for key in kept:
            bucket.set(key, b"of a cluster")
        run = penstock(
            *("run", "in.jsonl", "--upstream", f"{slow_upstream.url}/v1"),
            cwd=tmp_path,
            # Nothing listens there: to ask it would fail.
            PENSTOCK_DATABASE_URL=f"postgresql://penstock@127.0.0.1:{harness.free_port()}/x",
            PENSTOCK_STORAGE_URL=bucket.url,
            AWS_ENDPOINT_URL=server.url,
            AWS_REGION="us-east-1",
            AWS_ACCESS_KEY_ID=server.access_key_id,
            AWS_SECRET_ACCESS_KEY=server.secret_access_key,
        )
        _, errors = run.communicate(timeout=PATIENCE_S)

        assert run.returncode == 0, errors
        assert bucket.everything() == kept
    assert harness.count_results(tmp_path / "in.output.jsonl") == (5, 5)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
