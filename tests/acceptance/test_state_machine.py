"""Batches in any order of events: created, sent again, cancelled, expired, killed.

Hypothesis chooses what happens and when; the server is a real process that is ended by
SIGKILL. Whatever happened, each batch ends, its status moved only along the table, and each
of its lines is in one of its result files, once.

`TESTS_STATEFUL_EXAMPLES` chooses how many lives of a server are tried.
"""

import asyncio
import http.client
import json
import multiprocessing
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from benchmarks import harness
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from penstock.model import FINAL, TRANSITIONS, BatchStatus
from penstock.serving import run_server
from penstock.settings import Settings
from penstock.telemetry import configure_logging
from tests.integration.bench import CHAT, line, prompt_of
from tests.upstreams import Action, ScriptedUpstream, answer, chat_completion, fail

EXAMPLES = int(os.environ.get("TESTS_STATEFUL_EXAMPLES", "8"))
PATIENCE_S = 30.0
KEY = "sk-stateful-0123456789"
WINDOWS_S = {"24h": 86400, "1s": 1, "2s": 2}
TIMES = (
    "in_progress_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)
MAY_BECOME: dict[str, set[str]] = {}
"""Which statuses a batch may be seen in after another one."""
for _status in reversed(list(BatchStatus)):
    MAY_BECOME[_status] = {_status}
for _ in BatchStatus:
    for _status in BatchStatus:
        for _next in TRANSITIONS[_status]:
            MAY_BECOME[_status] |= MAY_BECOME[_next]

# A child starts with all of Penstock loaded, so that a restart takes no time.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["penstock.app", "penstock.api.routes", "uvloop"])


def behave(path: str, headers: dict[str, str], body: bytes, nth: int) -> Action:
    """Do with a line what its prompt says."""
    prompt = prompt_of(body)
    good = answer(chat_completion(prompt))
    match prompt.partition("-")[0]:
        case "bad":
            return fail(400)
        case "flaky" if nth == 1:
            return fail(503, headers={"Retry-After": "0"})
        case "slow":
            return Action(pieces=(b"", *good.pieces), pause_s=0.2)
        case _:
            return good


def serve(settings_: Settings, log: Path) -> None:
    """What the server's process does."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    configure_logging()
    run_server(settings_)


class Upstream:
    """A `ScriptedUpstream` on a loop of its own."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> "Upstream":
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with ScriptedUpstream(behave) as upstream:
            self.base_url = upstream.base_url
            self._ready.set()
            await self._stop.wait()


@dataclass
class Known:
    """A batch as its client knows it."""

    id: str
    body: dict[str, Any]
    headers: dict[str, str]
    custom_ids: list[str]
    seen: dict[str, Any]
    is_long: bool
    """Whether its window is long enough for all that its lines ask for."""
    was_cancelled: bool = False
    outputs: set[str] = field(default_factory=set[str])


class Life(RuleBasedStateMachine):
    """One server from its first start, through all that happens to it."""

    batches: Bundle[Known] = Bundle("batches")
    upstream: Upstream

    def __init__(self) -> None:
        super().__init__()
        self._folder = TemporaryDirectory(prefix="penstock-stateful-")
        self._log = Path(self._folder.name) / "log"
        self._port = harness.free_port()
        self._names = 0
        self._known: list[Known] = []
        self._process: Any = None
        self._start()

    # The server

    def _start(self) -> None:
        tree = {
            "data_dir": Path(self._folder.name) / "data",
            "api_key": KEY,
            "server": {"port": self._port, "shutdown_grace_s": 0},
            "worker": {"slice_requests": 3, "cancel_grace_s": 1},
            "upstreams": [{"name": "one", "base_url": self.upstream.base_url}],
        }
        arguments = (Settings.model_validate(tree), self._log)
        self._process = FORKS.Process(target=serve, args=arguments)
        self._process.start()
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                if self._ask("GET", "/readyz", prefix="")[0] == 200:
                    return
            except OSError:
                assert self._process.is_alive(), "the server did not start"
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def _kill(self) -> None:
        self._process.kill()
        self._process.join()

    def _ask(
        self,
        method: str,
        path: str,
        body: bytes | dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        prefix: str = "/v1",
    ) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            data = json.dumps(body).encode() if isinstance(body, dict) else body
            every = {"Authorization": f"Bearer {KEY}"} | (headers or {})
            connection.request(method, prefix + path, data, every)
            reply = connection.getresponse()
            content = reply.read()
            is_json = reply.headers["content-type"] == "application/json"
            return reply.status, json.loads(content) if is_json else content
        finally:
            connection.close()

    def _upload(self, custom_ids: list[str]) -> str:
        content = b"".join(map(line, custom_ids))
        form = (
            b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            b'--x\r\ncontent-disposition: form-data; name="file"; filename="in"\r\n\r\n'
            + content
            + b"\r\n--x--\r\n"
        )
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        status, file = self._ask("POST", "/files", form, headers)
        assert status == 200, file
        return file["id"]

    def _create(self, body: dict[str, Any], headers: dict[str, str]) -> dict[str, Any]:
        status, batch = self._ask("POST", "/batches", body, headers)
        assert status == 200, batch
        return batch

    # What happens

    @initialize(target=batches)
    def begin(self) -> Known:
        return self._new(["ok", "slow", "bad", "flaky"], "24h", has_key=False, has_fault=False)

    @rule(
        target=batches,
        kinds=st.lists(st.sampled_from(["ok", "slow", "bad", "flaky"]), min_size=1, max_size=8),
        window=st.sampled_from(["24h", "24h", "24h", "1s", "2s"]),
        has_key=st.booleans(),
        has_fault=st.sampled_from([False, False, False, True]),
    )
    def create(self, kinds: list[str], window: str, has_key: bool, has_fault: bool) -> Known:
        return self._new(kinds, window, has_key=has_key, has_fault=has_fault)

    def _new(self, kinds: list[str], window: str, *, has_key: bool, has_fault: bool) -> Known:
        body, headers, custom_ids = self._request(kinds, window, has_key, has_fault)
        return self._keep(self._create(body, headers), body, headers, custom_ids)

    def _request(
        self, kinds: list[str], window: str, has_key: bool, has_fault: bool
    ) -> tuple[dict[str, Any], dict[str, str], list[str]]:
        custom_ids = [f"{kind}-{self._names + n}" for n, kind in enumerate(kinds)]
        self._names += len(kinds)
        file_id = self._upload(custom_ids + custom_ids[:1] if has_fault else custom_ids)
        body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": window}
        headers = {"Idempotency-Key": f"key-{self._names}"} if has_key else {}
        return body, headers, [] if has_fault else custom_ids

    def _keep(
        self,
        batch: dict[str, Any],
        body: dict[str, Any],
        headers: dict[str, str],
        custom_ids: list[str],
    ) -> Known:
        assert batch["expires_at"] - batch["created_at"] == WINDOWS_S[body["completion_window"]]
        is_long = body["completion_window"] == "24h"
        known = Known(batch["id"], body, headers, custom_ids, batch, is_long)
        self._known.append(known)
        return known

    @rule(known=batches)
    def create_again(self, known: Known) -> None:
        again = known.headers or {"x-stainless-retry-count": "1"}
        self._see(known, self._create(known.body, again))

    @rule(target=batches, after_s=st.floats(0, 0.02))
    def create_while_killed(self, after_s: float) -> Known:
        """The server dies at some moment of a request; its client asks again."""
        body, _, custom_ids = self._request(["ok", "ok"], "24h", False, False)
        sending = threading.Thread(target=self._try_to_create, args=(body,))
        sending.start()
        time.sleep(after_s)
        self._kill()
        sending.join()
        self._start()
        batch = self._create(body, {"x-stainless-retry-count": "1"})
        return self._keep(batch, body, {}, custom_ids)

    def _try_to_create(self, body: dict[str, Any]) -> None:
        try:
            self._ask("POST", "/batches", body)
        except (OSError, http.client.HTTPException):
            return

    @rule(known=batches)
    def cancel(self, known: Known) -> None:
        status, answer_ = self._ask("POST", f"/batches/{known.id}/cancel")
        if status == 409:
            self._look(known)
            assert known.seen["status"] in ("completed", "failed", "expired")
        else:
            assert status == 200
            known.was_cancelled = True
            self._see(known, answer_)
            assert answer_["status"] in ("cancelling", "cancelled")

    @rule(known=batches)
    def look(self, known: Known) -> None:
        self._look(known)

    @rule(known=batches)
    def read_so_far(self, known: Known) -> None:
        accept = {"Accept": "application/jsonl"}
        status, content = self._ask("GET", f"/batches/{known.id}/output", headers=accept)
        assert status == 200
        found = [json.loads(each)["custom_id"] for each in content.splitlines()]
        assert len(set(found)) == len(found)
        assert set(found) <= set(known.custom_ids)
        assert known.outputs <= set(found)
        known.outputs = set(found)

    @rule(known=batches)
    def delete_input(self, known: Known) -> None:
        status, _ = self._ask("DELETE", f"/files/{known.body['input_file_id']}")
        assert status in (200, 404)

    @rule(for_s=st.floats(0, 0.5))
    def wait(self, for_s: float) -> None:
        time.sleep(for_s)

    @rule()
    def kill(self) -> None:
        self._kill()
        self._start()

    # What must hold

    @invariant()
    def the_server_lives(self) -> None:
        assert self._process is None or self._process.is_alive()

    def _look(self, known: Known) -> None:
        status, batch = self._ask("GET", f"/batches/{known.id}")
        assert status == 200
        self._see(known, batch)

    def _see(self, known: Known, batch: dict[str, Any]) -> None:
        before, known.seen = known.seen, batch
        assert batch["id"] == known.id
        assert batch["status"] in MAY_BECOME[before["status"]]
        for name in ("total", "completed", "failed"):
            assert batch["request_counts"][name] >= before["request_counts"][name]
        for name in TIMES:
            assert before[name] in (None, batch[name])
        assert batch["usage"]["total_tokens"] >= before["usage"]["total_tokens"]
        if batch["status"] not in FINAL:
            assert (batch["output_file_id"], batch["error_file_id"]) == (None, None)

    def teardown(self) -> None:
        try:
            for known in self._known:
                self._check_end(known)
            _, listing = self._ask("GET", "/batches?limit=100")
            expected = sorted(known.id for known in self._known)
            assert sorted(batch["id"] for batch in listing["data"]) == expected
            log = self._log.read_text()
            assert "damaged" not in log, log
            assert '"level": "error"' not in log, log
        finally:
            self._kill()
            self._folder.cleanup()

    def _check_end(self, known: Known) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while known.seen["status"] not in FINAL:
            assert time.monotonic() < deadline, known.seen
            time.sleep(0.02)
            self._look(known)
        batch, counts = known.seen, known.seen["request_counts"]
        output = self._result(batch["output_file_id"])
        error = self._result(batch["error_file_id"])
        together = [each["custom_id"] for each in output + error]
        codes = Counter((each["error"] or {}).get("code") for each in error)
        not_run = codes["batch_expired"] + codes["batch_cancelled"]
        assert Counter(together) == (
            Counter() if counts["total"] == 0 else Counter(known.custom_ids)
        )
        assert counts["completed"] == len(output)
        assert counts["failed"] == len(error) - not_run
        match batch["status"]:
            case "completed":
                assert not_run == 0
                # Where the window leaves no time for another attempt, the first one stands.
                may_fail = ("bad",) if known.is_long else ("bad", "flaky")
                assert all(each["custom_id"].startswith(may_fail) for each in error)
                assert not any(each["custom_id"].startswith("bad") for each in output)
            case "failed":
                assert known.custom_ids == []
                assert batch["errors"]["data"][0]["code"] == "duplicate_custom_id"
            case "expired":
                assert codes["batch_expired"] >= 1
                assert batch["expired_at"] >= batch["expires_at"]
            case "cancelled":
                assert known.was_cancelled
                assert codes["batch_expired"] == 0

    def _result(self, file_id: str | None) -> list[Any]:
        if file_id is None:
            return []
        status, content = self._ask("GET", f"/files/{file_id}/content")
        assert status == 200
        return [json.loads(each) for each in content.splitlines()]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_whatever_happens_each_line_ends_once() -> None:
    with Upstream() as Life.upstream:
        case = Life.TestCase
        case.settings = settings(
            max_examples=EXAMPLES,
            stateful_step_count=12,
            deadline=None,
            phases=[Phase.generate],  # to shrink a failure would take many lives of seconds
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        )
        case().runTest()
