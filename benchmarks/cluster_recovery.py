"""What a cluster loses, doubles and sends again when its parts are hurt.

    ./dev bench cluster_recovery                         20 kills
    ./dev bench cluster_recovery --smoke                 3 kills
    ./dev bench cluster_recovery --kills 200             more of them
    ./dev bench cluster_recovery --scenario cut          one of those below, or `all`

An API and three workers run two batches, with PostgreSQL and an S3 server in memory that stands
behind a proxy. Meanwhile:

    kills      SIGKILL of a worker or, one time in four, of the API, and a new start
    stops      SIGSTOP of a worker for up to three times as long as a lease
    deploys    SIGTERM of a worker under load, and a new start
    database   PostgreSQL is cut off and started again, within a lease or after it
    storage    the S3 server answers 500 or 503, breaks connections or loses answers, for 2 s
    cut        a worker is cut off from all others for longer than a lease (needs root and `ip`)
    clock      of one worker the clock is a minute ahead, of one a minute behind (needs `cc`)

The upstream counts every request by line and names the line in its reply. At the end every line
is looked for in the result files, in the order of the input, with its own reply. Sent again
may be, for each time that a worker loses its slices, what it had in flight and one flush, which
is a second of replies. A worker that was stopped or cut off may, until it hears that its slices
are others', send as much once more. All else costs nothing.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
from tests.object_stores import Proxy, S3Bucket, moto
from tests.postgres import PostgresServer

from benchmarks import cluster as parts
from benchmarks import harness
from benchmarks.cluster import Cluster, until
from benchmarks.recovery import Found, Skipped, preload

_LEASE_S = 2.0
_WORKERS = 3
_IN_FLIGHT = 48
_LATENCY_S = 0.2
_FLUSH_LINES = int(_IN_FLIGHT / _LATENCY_S)
"""Of one worker in the second between two flushes."""
_FAULT_COUNT, _SMOKE_FAULT_COUNT, _SMOKE_KILLS = 5, 2, 3
_LINES_A_FAULT = 2500
_API_KILLS = 0.25
_SKEW_S = 60
_NAMESPACE, _HERE, _THERE = "penstock-cut", "10.203.113.1", "10.203.113.2"


@dataclass(slots=True)
class Load:
    """Two batches on a cluster that is hurt."""

    cluster: Cluster
    upstream: harness.Process
    postgres: PostgresServer
    database_url: str
    proxy: Proxy
    space: Path
    lines: int
    faults: int
    chance: random.Random
    batches: list[str] = field(default_factory=list[str])

    def create(self) -> None:
        """Upload half of the lines and create a batch."""
        half = self.lines // 2
        source = self.space / "in.jsonl"
        harness.write_input(source, half, 256, first=half * len(self.batches))
        client = self.cluster.client
        self.batches.append(client.create(client.upload(source)))

    def create_second_when_due(self) -> None:
        """Create the second batch once a quarter of all lines was sent."""
        if len(self.batches) == 1 and self.sent() * 4 > self.lines:
            self.create()

    def sent(self) -> int:
        return harness.stats(self.upstream)["lines"]

    def wait_for_lines(self, more: float) -> None:
        """Wait until some more lines were sent, or all."""
        half = self.lines // 2
        goal = min(self.sent() + more, half * len(self.batches))
        until(lambda: self.sent() >= goal, "lines are sent")
        self.create_second_when_due()

    def hurt(self, fault: Callable[[], None]) -> int:
        """Let something happen now and then while work goes on; how often it did amid work."""
        self.create()
        amid_work = 0
        for _ in range(self.faults):
            self.wait_for_lines(self.lines / (self.faults + 2) * self.chance.uniform(0.1, 0.5))
            amid_work += self.sent() < self.lines
            fault()
            self.create_second_when_due()
        return amid_work

    def account(self) -> dict[str, Any]:
        """Wait for the ends, and count."""
        self.cluster.heal()
        while len(self.batches) < 2:
            self.create_second_when_due()
            time.sleep(0.02)
        found = Found()
        for place, name in enumerate(self.batches):
            half = self.lines // 2
            numbers = range(place * half, (place + 1) * half)
            found.take(self.cluster.client, self.cluster.wait(name), numbers, self.space)
        return {
            "lines": self.lines,
            "statuses": sorted(found.statuses),
            "lost": self.lines - len(found.lines),
            "doubled": found.results - len(found.lines),
            "misplaced": found.misplaced,
            "counts_equal_files": found.is_true,
            "sent_again": harness.stats(self.upstream)["again"],
        }

    def worker(self) -> int:
        """One of the workers, by chance."""
        return self.chance.randrange(_WORKERS)

    def held_by(self, worker: harness.Process) -> int:
        """How many slices stand in the name of a worker."""

        async def count() -> int:
            connection = await asyncpg.connect(self.database_url)
            try:
                return await connection.fetchval(
                    "SELECT count(*) FROM slices WHERE worker_id LIKE $1",
                    f"%-{worker.popen.pid}-%",
                )
            finally:
                await connection.close()

        return asyncio.run(count())


Row = dict[str, Any]


def kill(load: Load) -> Row:
    recovered_s: list[float] = []
    killed = {"worker": 0, "api": 0}

    def once() -> None:
        if load.chance.random() < _API_KILLS:
            killed["api"] += 1
            load.cluster.api.kill()
            time.sleep(load.chance.uniform(0, 1.0))
            load.cluster.heal()
            return
        killed["worker"] += 1
        number = load.worker()
        worker = load.cluster.workers[number]
        worker.kill()
        at = time.perf_counter()
        load.cluster.workers[number] = load.cluster.start_worker(number)
        until(lambda: not load.held_by(worker), "its slices are taken over")
        recovered_s.append(time.perf_counter() - at)

    amid_work = load.hurt(once)
    return {
        "faults": sum(killed.values()),
        "amid_work": amid_work,
        "of_the_api": killed["api"],
        **load.account(),
        "allowed": killed["worker"] * (_IN_FLIGHT + _FLUSH_LINES),
        "recovered_s_median": round(statistics.median(recovered_s), 2) if recovered_s else None,
        "recovered_s_max": round(max(recovered_s), 2) if recovered_s else None,
    }


def stop(load: Load) -> Row:
    def once() -> None:
        worker = load.cluster.workers[load.worker()]
        parts.stop(worker)
        time.sleep(_LEASE_S * load.chance.uniform(0.5, 3.0))
        parts.resume(worker)

    amid_work = load.hurt(once)
    return _row(load, amid_work, allowed=load.faults * 2 * (_IN_FLIGHT + _FLUSH_LINES))


def deploy(load: Load) -> Row:
    stopped_s: list[float] = []

    def once() -> None:
        number = load.worker()
        worker = load.cluster.workers[number]
        until(lambda: parts.readiness(worker)[0] == 200, "the worker is ready")
        begun = time.perf_counter()
        worker.popen.send_signal(signal.SIGTERM)
        worker.popen.wait(60)
        stopped_s.append(time.perf_counter() - begun)
        load.cluster.workers[number] = load.cluster.start_worker(number)

    amid_work = load.hurt(once)
    return {**_row(load, amid_work, allowed=0), "stopped_s_max": round(max(stopped_s), 2)}


def cut_database(load: Load) -> Row:
    def once() -> None:
        load.postgres.stop(immediate=True)
        time.sleep(_LEASE_S * load.chance.uniform(0.1, 1.5))
        load.postgres.start()

    amid_work = load.hurt(once)
    each = _WORKERS * (_IN_FLIGHT + _FLUSH_LINES)
    return _row(load, amid_work, allowed=load.faults * each)


def fail_storage(load: Load) -> Row:
    def once() -> None:
        ways = (500, 503, "cut", "cut answer", "lose answer")
        load.proxy.rule = lambda method, path: load.chance.choice(ways)
        time.sleep(2.0)
        load.proxy.rule = lambda method, path: None

    amid_work = load.hurt(once)
    return _row(load, amid_work, allowed=0)


def cut_worker(load: Load) -> Row:
    def once() -> None:
        _ip("link", "set", "penstock-cut0", "down")
        time.sleep(_LEASE_S * load.chance.uniform(1.2, 2.5))
        _ip("link", "set", "penstock-cut0", "up")

    amid_work = load.hurt(once)
    return _row(load, amid_work, allowed=load.faults * 2 * (_IN_FLIGHT + _FLUSH_LINES))


def skew(load: Load) -> Row:
    amid_work = load.hurt(lambda: time.sleep(_LEASE_S))
    return _row(load, amid_work, allowed=0)


def _row(load: Load, amid_work: int, *, allowed: int) -> Row:
    found = load.account()
    return {"faults": load.faults, "amid_work": amid_work, **found, "allowed": allowed}


_SCENARIOS: dict[str, Callable[[Load], Row]] = {
    "kills": kill,
    "stops": stop,
    "deploys": deploy,
    "database": cut_database,
    "storage": fail_storage,
    "cut": cut_worker,
    "clock": skew,
}


# The ground


@contextlib.contextmanager
def prepared(name: str, faults: int, lines: int, seed: int) -> Generator[Load]:
    with contextlib.ExitStack() as stack:
        space = stack.enter_context(harness.workspace())
        upstream = stack.enter_context(harness.upstream(_LATENCY_S * 1000))
        postgres = PostgresServer()
        stack.callback(postgres.close)
        bucket = S3Bucket(stack.enter_context(moto()))
        proxy = stack.enter_context(Proxy(bucket.server.url))
        database_url = postgres.make_database()
        cluster = Cluster(
            space,
            upstream.url,
            database_url,
            {
                "PENSTOCK_STORAGE_URL": bucket.url,
                "AWS_ENDPOINT_URL": proxy.url,
                "AWS_ACCESS_KEY_ID": bucket.server.access_key_id,
                "AWS_SECRET_ACCESS_KEY": bucket.server.secret_access_key,
                "AWS_REGION": "us-east-1",
            },
            settings={
                "PENSTOCK_WORKER__LEASE_S": str(_LEASE_S),
                "PENSTOCK_WORKER__SLICE_REQUESTS": "32",
                "PENSTOCK_UPSTREAMS__0__MAX_CONCURRENCY": str(_IN_FLIGHT),
                "PENSTOCK_UPSTREAMS__0__INITIAL_CONCURRENCY": str(_IN_FLIGHT),
            },
            workers=_WORKERS,
        )
        if name == "clock":
            _skew(cluster, space)
        if name == "cut":
            stack.enter_context(_namespace(cluster))
        stack.enter_context(cluster)
        yield Load(
            cluster=cluster,
            upstream=upstream,
            postgres=postgres,
            database_url=database_url,
            proxy=proxy,
            space=space,
            lines=lines,
            faults=faults,
            chance=random.Random(seed),
        )


def _skew(cluster: Cluster, space: Path) -> None:
    """Let the clock of one worker go ahead, and of one behind."""
    library = preload(space)
    for number, seconds in ((0, _SKEW_S), (1, -_SKEW_S)):
        clock = space / f"clock-{number}"
        clock.write_text(str(seconds))
        cluster.of_worker[number] |= {**library, "FAULTS_CLOCK": str(clock)}


@contextlib.contextmanager
def _namespace(cluster: Cluster) -> Generator[None]:
    """Put the first worker into a network of its own, with one link to this one."""
    if os.geteuid() or shutil.which("ip") is None:
        raise Skipped("Only root with `ip` (of iproute2) can make a network namespace.")
    if subprocess.run(["ip", "netns", "add", _NAMESPACE], check=False).returncode:
        raise Skipped("This machine allows no network namespaces.")
    inside = ("netns", "exec", _NAMESPACE, "ip")
    try:
        _ip("link", "add", "penstock-cut0", "type", "veth", "peer", "name", "penstock-cut1")
        _ip("link", "set", "penstock-cut1", "netns", _NAMESPACE)
        _ip("addr", "add", f"{_HERE}/30", "dev", "penstock-cut0")
        _ip("link", "set", "penstock-cut0", "up")
        _ip(*inside, "addr", "add", f"{_THERE}/30", "dev", "penstock-cut1")
        _ip(*inside, "link", "set", "penstock-cut1", "up")
        _ip(*inside, "link", "set", "lo", "up")
        with _forwarding(_find_ports(cluster)):
            cluster.hosts[0] = _THERE
            cluster.before[0] = ["ip", "netns", "exec", _NAMESPACE]
            cluster.of_worker[0] |= {
                name: value.replace("127.0.0.1", _HERE)
                for name, value in cluster.environment.items()
                if "127.0.0.1" in value
            }
            yield
    finally:
        subprocess.run(["ip", "netns", "del", _NAMESPACE], check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _find_ports(cluster: Cluster) -> list[int]:
    """Where the upstream, the database and the storage listen."""
    urls = [value for value in cluster.environment.values() if "127.0.0.1:" in value]
    return [int(url.split("127.0.0.1:")[1].split("/")[0]) for url in urls]


@contextlib.contextmanager
def _forwarding(ports: list[int]) -> Generator[None]:
    """Make ports of the loopback reachable over the link."""
    loop = asyncio.new_event_loop()
    is_up = threading.Event()

    async def listen() -> None:
        for port in ports:
            await asyncio.start_server(_forwarder(port), _HERE, port)
        is_up.set()

    def run() -> None:
        loop.run_until_complete(listen())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    if not is_up.wait(10):
        raise SystemExit("The link cannot be listened on.")
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


def _forwarder(port: int) -> Serve:
    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer))

    return serve


def run(name: str, *, faults: int, lines: int, seed: int) -> bool:
    """Run a scenario and print its row; whether all promises were kept."""
    row: Row = {"scenario": name, "seed": seed}
    begun = time.perf_counter()
    try:
        with prepared(name, faults, lines, seed) as load:
            try:
                row |= _SCENARIOS[name](load)
            except BaseException:
                print(load.cluster.logs(), flush=True)
                raise
    except Skipped as reason:
        print(json.dumps({**row, "skipped": str(reason)}), flush=True)
        return True
    print(json.dumps({**row, "seconds": round(time.perf_counter() - begun)}), flush=True)
    return (
        not row["lost"]
        and not row["doubled"]
        and not row["misplaced"]
        and row["counts_equal_files"]
        and row["sent_again"] <= row["allowed"]
        and row["statuses"] == ["completed"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenario", choices=[*_SCENARIOS, "all"], default="kills")
    parser.add_argument("--kills", type=int)
    parser.add_argument("--faults", type=int, help="how often in the other scenarios")
    parser.add_argument("--lines", type=int, help="2,500 for each fault")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2)))
    parser.add_argument("--smoke", action="store_true", help="few kills or faults")
    options = parser.parse_args()
    kills = options.kills or (_SMOKE_KILLS if options.smoke else 20)
    faults = options.faults or (_SMOKE_FAULT_COUNT if options.smoke else _FAULT_COUNT)
    names = list(_SCENARIOS) if options.scenario == "all" else [options.scenario]
    kept: list[bool] = []
    for name in names:
        times = kills if name == "kills" else faults
        lines = options.lines or _LINES_A_FAULT * (times + 1)
        kept.append(run(name, faults=times, lines=lines, seed=options.seed))
    if not all(kept):
        raise SystemExit("A promise was broken.")


if __name__ == "__main__":
    main()
