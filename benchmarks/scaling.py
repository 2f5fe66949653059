"""What a cluster costs, and how it grows.

    python -m benchmarks.scaling                      all parts
    python -m benchmarks.scaling --part costs         statements, rows, storage, CPU a line
    python -m benchmarks.scaling --part workers       8 workers beside 1, slow upstream
    python -m benchmarks.scaling --part simulated     100 workers on one database
    python -m benchmarks.scaling --smoke              all of it, small

Each part prints one JSON object a line. `docs/scaling.md` says what follows from them.
"""

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import harness, measured_cluster, simulated_workers

_SLICE = 256
"""Lines of a slice: small ones and many, so that what each costs shows."""
_LINE_BYTES = 1024
_BUCKET = "bench"
_LIMITS = {"PENSTOCK_LIMITS__REQUESTS_PER_BATCH": "1000000"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("costs", "workers", "simulated"))
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    for name, measure in (
        ("costs", measure_costs),
        ("workers", measure_workers),
        ("simulated", simulated_workers.measure),
    ):
        if options.part in (None, name):
            for row in measure(smoke=options.smoke):
                print(json.dumps({"part": name, **row}), flush=True)


# Costs


def measure_costs(*, smoke: bool) -> Iterator[dict[str, Any]]:
    lines = 1024 if smoke else 20_480
    yield from _count_asked(lines, in_flight=256, latency_s=0.5)
    if not smoke:
        yield from _count_asked(4096, in_flight=256, latency_s=4.0)
    yield _time_processors(lines)
    yield _count_idle(3 if smoke else 20, workers=2)


def _count_asked(lines: int, *, in_flight: int, latency_s: float) -> list[dict[str, Any]]:
    """What database and storage are asked for a batch, each statement written down."""
    with (
        harness.workspace() as space,
        measured_cluster.postgres(logs=True) as server,
        measured_cluster.storage(_BUCKET) as (storage_url, counts),
        harness.upstream(1000 * latency_s) as upstream,
    ):
        environment = _environment(server, upstream, in_flight) | _storage(storage_url)
        with _Running(space, environment, 1) as (running, client):
            server.begin_statements()
            before = server.tally()
            counts.clear()
            batch_id = client.create(_upload(space, client, lines))
            seconds = -time.monotonic()
            batch = client.wait(batch_id, every_s=1.0)
            seconds += time.monotonic()
            client.download(batch["output_file_id"], space / "out.jsonl")
            assert harness.count_results(space / "out.jsonl") == (lines, lines)
            running.end_workers()  # which have deleted by then what they had to
            time.sleep(1)
            done = server.tally().since(before)
            statements = server.statements()
        out_bytes = (space / "out.jsonl").stat().st_size
    run = {
        "lines": lines,
        "slices": _slices(lines),
        "in_flight": in_flight,
        "latency_s": latency_s,
        "seconds": round(seconds, 1),
    }
    database = {
        "of": "database",
        **run,
        "commits": done.commits,
        "statements": sum(each.calls for each in statements),
        "server_ms": round(sum(each.total_ms for each in statements)),
        "rows_written": dict(done.rows.most_common()),
        "wal_bytes_per_line": round(done.wal_bytes / lines, 1),
        "costliest": _table(statements),
    }
    storage = {
        "of": "storage",
        **run,
        "requests": dict(counts.requests.most_common()),
        "sent_bytes_per_line": round(counts.sent_bytes / lines),
        "received_bytes_per_line": round(counts.received_bytes / lines),
        "output_bytes_per_line": round(out_bytes / lines),
    }
    return [database, storage]


def _time_processors(lines: int) -> dict[str, Any]:
    """Processor time of each process for a batch, from upload to download."""
    with (
        harness.workspace() as space,
        measured_cluster.postgres() as server,
        measured_cluster.storage(_BUCKET) as (storage_url, _),
        harness.upstream(500) as upstream,
    ):
        environment = _environment(server, upstream, 256) | _storage(storage_url)
        with _Running(space, environment, 1) as (running, client):
            before = (running.api.cpu_s(), running.workers[0].cpu_s(), server.cpu_s())
            batch_id = client.create(_upload(space, client, lines))
            batch = client.wait(batch_id, every_s=1.0)
            client.download(batch["output_file_id"], space / "out.jsonl")
            after = (running.api.cpu_s(), running.workers[0].cpu_s(), server.cpu_s())
            peaks = (running.api.memory_mb(), running.workers[0].memory_mb())
    api, worker, database = (
        round(1000 * (late - early) / lines, 4)
        for early, late in zip(before, after, strict=True)
    )
    return {
        "of": "processors",
        "lines": lines,
        "api_cpu_s_per_1000_lines": api,
        "worker_cpu_s_per_1000_lines": worker,
        "database_cpu_s_per_1000_lines": database,
        "api_peak_mb": round(peaks[0]),
        "worker_peak_mb": round(peaks[1]),
    }


def _count_idle(seconds: float, *, workers: int) -> dict[str, Any]:
    """What workers ask while there is nothing to do."""
    with (
        harness.workspace() as space,
        measured_cluster.postgres(logs=True) as server,
        harness.upstream() as upstream,
    ):
        environment = _environment(server, upstream, 256)
        rates: list[float] = []
        with _Running(space, environment, 0) as (running, _):
            for count in (0, workers):
                running.add_workers(count)
                time.sleep(2)
                server.begin_statements()
                ours_s = -sum(worker.cpu_s() for worker in running.workers)
                time.sleep(seconds)
                ours_s += sum(worker.cpu_s() for worker in running.workers)
                statements = server.statements()
                rates.append(sum(each.calls for each in statements) / seconds)
            [row] = server.ask(
                "SELECT count(*) AS open FROM pg_stat_activity "
                "WHERE application_name = 'penstock'"
            )
    return {
        "of": "idle",
        "workers": workers,
        "seconds": seconds,
        "api_statements_per_s": round(rates[0], 2),
        "statements_per_s_per_worker": round((rates[1] - rates[0]) / workers, 2),
        "cores_per_worker": round(ours_s / workers / seconds, 4),
        "connections": row["open"],
        "most_often": [
            [each.label, each.calls] for each in sorted(statements, key=lambda s: -s.calls)[:12]
        ],
    }


# Workers


def measure_workers(*, smoke: bool) -> list[dict[str, Any]]:
    """One worker, then eight, on one database, a folder and a slow upstream."""
    latency_s, in_flight = (0.5, 16) if smoke else (2.0, 128)
    per_worker = in_flight / latency_s
    seconds = 5 if smoke else 60
    many = 8
    rates: dict[int, float] = {}
    rows: list[dict[str, Any]] = []
    # With one latency for all, lines answer in step, and the limit takes the time between two
    # steps for an upstream that does nothing.
    with harness.workspace() as space, measured_cluster.postgres() as server:
        for workers in (1, many):
            folder = space / str(workers)
            folder.mkdir()
            lines = int(per_worker * workers * seconds)
            with harness.upstream(1000 * latency_s, spread=0.5) as upstream:
                environment = _environment(server, upstream, in_flight * workers)
                with _Running(folder, environment, workers) as (running, client):
                    file_id = _upload(folder, client, lines)
                    before = server.tally()
                    cpu_s = -sum(worker.cpu_s() for worker in running.workers)
                    wall_s = _run(client, file_id, lines)
                    done = server.tally().since(before)
                    cpu_s += sum(worker.cpu_s() for worker in running.workers)
                    stats = harness.stats(upstream)
            rates[workers] = _steady(stats["marks"])
            rows.append(
                {
                    "workers": workers,
                    "lines": lines,
                    "in_flight": stats["max_in_flight"],
                    "whole_lines_per_s": round(lines / wall_s, 1),
                    "steady_lines_per_s": round(rates[workers], 1),
                    "ideal_lines_per_s": per_worker * workers,
                    "sent_again": stats["requests"] - lines,
                    "worker_cpu_s_per_1000_lines": round(1000 * cpu_s / lines, 3),
                    "database_cpu_s_per_1000_lines": round(1000 * done.cpu_s / lines, 4),
                }
            )
    ratio = rates[many] / rates[1]
    return [*rows, {"workers": f"{many} against 1", "ratio": round(ratio, 2)}]


def _steady(marks: list[float]) -> float:
    """Lines a second as the upstream saw them, without the first and the last tenth."""
    first, last = len(marks) // 10, 9 * len(marks) // 10
    return 100 * (last - first) / (marks[last] - marks[first])


# Parts of them


class _Running:
    """A cluster and a client of it, until the block ends."""

    def __init__(self, space: Any, environment: dict[str, str], workers: int) -> None:
        self._cluster = measured_cluster.Cluster(space, environment)
        self._workers = workers

    def __enter__(self) -> tuple[measured_cluster.Cluster, harness.Client]:
        self._cluster.add_workers(self._workers)
        return self._cluster, harness.Client(self._cluster.api)

    def __exit__(self, *_: object) -> None:
        self._cluster.close()


def _environment(
    server: measured_cluster.Postgres, upstream: harness.Process, in_flight: int
) -> dict[str, str]:
    return {
        **_LIMITS,
        "PENSTOCK_DATABASE_URL": server.url,
        "PENSTOCK_UPSTREAMS__0__NAME": "upstream",
        "PENSTOCK_UPSTREAMS__0__BASE_URL": upstream.url + "/v1",
        "PENSTOCK_UPSTREAMS__0__MAX_CONCURRENCY": str(in_flight),
        "PENSTOCK_UPSTREAMS__0__INITIAL_CONCURRENCY": str(in_flight),
        "PENSTOCK_WORKER__SLICE_REQUESTS": str(_SLICE),
    }


def _storage(url: str) -> dict[str, str]:
    return {
        "PENSTOCK_STORAGE_URL": f"s3://{_BUCKET}",
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_REGION": "us-east-1",
    }


def _upload(space: Any, client: harness.Client, lines: int) -> str:
    source = space / "in.jsonl"
    harness.write_input(source, lines, _LINE_BYTES)
    return client.upload(source)


def _run(client: harness.Client, file_id: str, lines: int) -> float:
    """Run a batch to its end; how many seconds that took."""
    begun = time.monotonic()
    batch = client.wait(client.create(file_id), every_s=0.5)
    assert batch["request_counts"]["completed"] == lines, batch
    return time.monotonic() - begun


def _slices(lines: int) -> int:
    return -(-lines // _SLICE)


def _table(statements: list[measured_cluster.Statement]) -> list[list[Any]]:
    return [[each.label, each.calls, round(each.total_ms, 1)] for each in statements[:16]]


if __name__ == "__main__":
    main()
