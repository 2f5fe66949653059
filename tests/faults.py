"""Deliberate faults: the code is broken on purpose, and a test must notice.

    python -m tests.faults                 # all of them; minutes
    python -m tests.faults --only fence    # those with this in their name

For each fault, `src` is copied, one text in it is replaced, and the tests that should notice
run against the copy. A fault that no test notices, or whose text is not there any more, makes
the run fail: then a test is missing, or the list is out of date.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
_TIMEOUT_S = 120
JSONL = "tests/unit/test_jsonl.py"
SEGMENTS = "tests/unit/test_segments.py"
STORE = "tests/unit/test_store_sql.py"
FEEDER = "tests/unit/test_feeder.py"
RETRY = "tests/unit/test_retry.py"
REPLIES = "tests/unit/test_replies.py"
RULES = "tests/unit/test_lifecycle_rules.py"
GROUP = "tests/unit/test_group.py"
BLOBS = "tests/unit/test_blobs.py"
ENGINE = "tests/unit/test_engine.py"
RUNNING = "tests/integration/test_running.py"
WEBHOOKS = "tests/integration/test_webhooks.py"
WEBHOOK_HTTP = "tests/unit/test_webhook_http.py"
SCHEDULE = "tests/unit/test_webhook_schedule.py"
ADDRESSES = "tests/unit/test_addresses.py"
SIGNING = "tests/unit/test_signing.py"
ADMISSION = "tests/unit/test_admission.py"
CIRCUIT = "tests/unit/test_circuit.py"
LIMITS = "tests/unit/test_limits.py"
OUTAGE = "tests/integration/test_outage.py"
NATIVE = "tests/integration/test_native.py"
NATIVE_CRASH = "tests/integration/test_native_crash.py"
NATIVE_PLAN = "tests/unit/test_native_plan.py"


@dataclass(frozen=True)
class Fault:
    """One way to break the code."""

    name: str
    file: str
    """Below `src/penstock`."""
    old: str
    """Stands there exactly once."""
    new: str
    tests: str
    """The file of the tests that must notice."""
    only: str = ""
    """Which of them, as pytest's `-k` understands it; empty means all."""


FAULTS = [
    # Store
    Fault(
        "store: a report is not fenced by its attempt",
        "store/sql.py",
        'if row is None or row["attempt"] != report.attempt:',
        "if row is None:",
        STORE,
        "late",
    ),
    Fault(
        "store: a held slice can be claimed",
        "store/sql.py",
        'slices.c.lease_expires_at <= bindparam("now"),',
        'slices.c.lease_expires_at > bindparam("now") - 1e9,',
        STORE,
        "held or lease",
    ),
    Fault(
        "store: any move is allowed",
        "store/sql.py",
        "if to not in TRANSITIONS[BatchStatus(status)]:",
        "if False:",
        STORE,
        "moves",
    ),
    Fault(
        "store: counts may go back",
        "store/sql.py",
        'if report.completed + report.failed >= row["completed"] + row["failed"]:',
        "if True:",
        STORE,
        "go_back",
    ),
    Fault(
        "store: the window's end lets nobody look",
        "store/sql.py",
        'return not batch["has_pending"] or batch["expires_at"] <= now',
        'return not batch["has_pending"]',
        STORE,
        "window",
    ),
    Fault(
        "store: bytes go although a batch reads them",
        "store/sql.py",
        "return None if is_used else file",
        "return file",
        STORE,
        "bytes",
    ),
    Fault(
        "store: slices of a dead process stay with it",
        "store/sql.py",
        "== SliceStatus.RUNNING)\n    .values(status=SliceStatus.PENDING,",
        "== SliceStatus.ENDED)\n    .values(status=SliceStatus.PENDING,",
        STORE,
        "dead",
    ),
    # Worker, lanes, keeper
    Fault(
        "worker: lines that have a reply are sent again",
        "executor/worker.py",
        "if line.line not in held.writer.lines",
        "if line.line",
        RUNNING,
        "restart_goes_on",
    ),
    Fault(
        "worker: a slice ends although lines are missing",
        "executor/worker.py",
        "ends = len(held.writer.lines) == held.slice.requests",
        "ends = True",
        RUNNING,
        "restart_goes_on",
    ),
    Fault(
        "worker: a slice ends before its replies are durable",
        "executor/worker.py",
        "while held.writer.is_dirty:",
        "while False:",
        RUNNING,
        "on_the_disk",
    ),
    Fault(
        "worker: a stop is not passed on",
        "executor/worker.py",
        "ends = (held.done, stop, self._stopping)",
        "ends = (held.done, self._stopping)",
        RUNNING,
        "grace_time",
    ),
    Fault(
        "feeder: slices are lost with a failing database",
        "executor/feeder.py",
        "        finally:  # those that were",
        "        except ZeroDivisionError:\n            pass\n        else:  # those that were",
        "tests/integration/test_review.py",
    ),
    Fault(
        "jsonl: a line that names a key twice passes",
        "jsonl.py",
        "next(iter_requests(text, first_line=self._line), None)",
        "pass",
        JSONL,
    ),
    Fault(
        "lanes: lines are sent while none can be kept",
        "executor/lanes.py",
        "if not self._gate.is_set():",
        "if False:",
        RUNNING,
        "stops_the_sending",
    ),
    Fault(
        "lanes: more lines in flight than allowed",
        "executor/admission.py",
        "            self.in_flight >= self.limit.current\n            or ",
        "            ",
        ADMISSION,
        "as_many_as_its_limit",
    ),
    Fault(
        "lanes: a cancelled line is tried again",
        "executor/lanes.py",
        "        if owner.is_stopping:\n            owner.drop(line)\n            return\n",
        "",
        RUNNING,
        "after_the_cancel",
    ),
    Fault(
        "keeper: a full disk closes no gate",
        "executor/keeper.py",
        "        self._gate.clear()\n",
        "",
        RUNNING,
        "stops_the_sending",
    ),
    Fault(
        "keeper: a failed flush is not repeated",
        "executor/keeper.py",
        "                await asyncio.sleep(AGAIN_S)\n",
        "                break\n",
        RUNNING,
        "stops_the_sending",
    ),
    # Feeder
    Fault(
        "feeder: weights do not count",
        "executor/feeder.py",
        "had + piece.requests / batch.weight",
        "had + piece.requests",
        FEEDER,
        "by_weight",
    ),
    Fault(
        "feeder: a newcomer makes up for the past",
        "executor/feeder.py",
        "self._strides.get(p, least)",
        "self._strides.get(p, 0.0)",
        FEEDER,
        "late",
    ),
    Fault(
        "feeder: deadlines do not count",
        "executor/feeder.py",
        "            batch.expires_at,\n            batch.created_at,\n",
        "            batch.created_at,\n",
        FEEDER,
        "deadline",
    ),
    Fault(
        "feeder: slices are handed out twice",
        "executor/feeder.py",
        "if piece.id not in self._handed and piece.id not in aside",
        "if piece.id not in aside",
        FEEDER,
        "once",
    ),
    # Lifecycle
    Fault(
        "lifecycle: damaged replies pass",
        "executor/lifecycle.py",
        "if (tally.completed, tally.failed) == (found.completed, found.failed):",
        "if True:",
        RUNNING,
        "damaged_reply",
    ),
    Fault(
        "lifecycle: a late writer is merged",
        "executor/lifecycle.py",
        "attempt = piece.attempt if piece.status is SliceStatus.ENDED else None",
        "attempt = None",
        RUNNING,
        "late_writer",
    ),
    Fault(
        "lifecycle: an expired batch counts as completed",
        "executor/lifecycle.py",
        "return BatchStatus.COMPLETED if is_whole else BatchStatus.EXPIRED",
        "return BatchStatus.COMPLETED",
        RULES,
    ),
    Fault(
        "lifecycle: a window closes a moment late",
        "executor/lifecycle.py",
        "if now < batch.expires_at:",
        "if now <= batch.expires_at:",
        RULES,
    ),
    Fault(
        "lifecycle: lines that never ran are left out",
        "executor/lifecycle.py",
        "if kind is Kind.ERROR and each.missing:",
        "if False:",
        RUNNING,
        "grace_time",
    ),
    Fault(
        "lifecycle: nothing is tidied up",
        "executor/lifecycle.py",
        "await asyncio.to_thread(self._segments.delete, batch.id)",
        "pass",
        RUNNING,
        "without_its_segments",
    ),
    # Small parts of the executor
    Fault(
        "replies: refusals go to the output file",
        "executor/replies.py",
        "kind = Kind.OUTPUT if reply.is_success else Kind.ERROR",
        "kind = Kind.OUTPUT",
        REPLIES,
    ),
    Fault(
        "replies: a line may be several",
        "executor/replies.py",
        'body = body.replace(b"\\r", b" ").replace(b"\\n", b" ")',
        "pass",
        REPLIES,
    ),
    Fault(
        "retry: a refusal is tried again",
        "executor/retry.py",
        " or not may_pass(reply):",
        ":",
        RETRY,
    ),
    Fault(
        "retry: a line is tried again after its window",
        "executor/retry.py",
        "return wait if wait < time_left_s else None",
        "return wait",
        RETRY,
    ),
    Fault(
        "group: what a failed transaction held is lost",
        "executor/group.py",
        "self._waiting = group + self._waiting",
        "pass",
        GROUP,
        "waited_for",
    ),
    Fault(
        "partial: bad lines are left out",
        "executor/partial.py",
        "replies.iter_pieces(Kind.OUTPUT, Kind.ERROR)",
        "replies.iter_pieces(Kind.OUTPUT)",
        RUNNING,
        "while_the_batch_runs",
    ),
    Fault(
        "upkeep: a batch that was not read yet is forgotten",
        "executor/upkeep.py",
        "if batch.status is BatchStatus.VALIDATING:",
        "if False:",
        RUNNING,
        "never_read",
    ),
    # Input files
    Fault(
        "jsonl: a byte order mark shifts the slices",
        "jsonl.py",
        "self._offset = len(BOM)",
        "self._offset = 0",
        JSONL,
        "ways_of_other_systems",
    ),
    Fault(
        "jsonl: a carriage return ends a line",
        "jsonl.py",
        "BytesIO(block).readlines()",
        "block.splitlines(keepends=True)",
        JSONL,
        "ways_of_other_systems or line_numbers",
    ),
    Fault(
        "jsonl: invalid UTF-8 passes where nobody looks",
        "jsonl.py",
        "                    is_utf8\n                    and request.url",
        "                    request.url",
        JSONL,
        "utf8",
    ),
    Fault(
        "jsonl: streaming passes",
        "jsonl.py",
        "                    and not request.body.stream\n",
        "",
        JSONL,
        "a_fault_has",
    ),
    Fault(
        "jsonl: a slice may have any number of bytes",
        "jsonl.py",
        "or end - opened.start > self._rules.slice_bytes",
        "or False",
        JSONL,
        "bytes_than_allowed",
    ),
    Fault(
        "jsonl: the longest line is one byte shorter",
        "jsonl.py",
        "and _length(text) > max_bytes:",
        "and _length(text) >= max_bytes:",
        JSONL,
        "longest_line",
    ),
    Fault(
        "jsonl: equal hashes are taken for equal IDs",
        "jsonl.py",
        "self._first_seen.setdefault(custom_id, self._line)",
        "self._first_seen.setdefault(str(hash(custom_id)), self._line)",
        JSONL,
        "equal_hashes",
    ),
    Fault(
        "jsonl: the custom ID of a faulty line is free",
        "jsonl.py",
        "        if custom_id is not None:\n            hashed",
        "        if False:\n            hashed",
        JSONL,
        "faulty_line",
    ),
    Fault(
        "jsonl: a line may be nested as deeply as the checker can read",
        "jsonl.py",
        "and (len(text) <= _SURELY_FLAT_BYTES or not _is_too_deep(text))",
        "and True",
        JSONL,
        "levels",
    ),
    Fault(
        "jsonl: the second model of a file is taken where one is allowed",
        "jsonl.py",
        "not self._rules.one_model or model == self._model",
        "True",
        JSONL,
        "model",
    ),
    Fault(
        "jsonl: a list of tokens counts as many inputs",
        "jsonl.py",
        '_SEVERAL = re.compile(rb"\\[\\s*[^\\s0-9-]")',
        '_SEVERAL = re.compile(rb"\\[")',
        JSONL,
        "counted",
    ),
    Fault(
        "jsonl: duplicates come after all other faults when there are many",
        "jsonl.py",
        "self._faults_before, self._faults = self._faults, []",
        "pass",
        JSONL,
        "later_lines",
    ),
    # Segments and blobs
    Fault(
        "segments: a checksum is not looked at",
        "blobs/segments.py",
        "if crc32(whole[offset + _CRC_BYTES : end]) != crc:",
        "if False:",
        SEGMENTS,
        "flipped",
    ),
    Fault(
        "segments: a checksum of a large segment is not looked at",
        "blobs/segments.py",
        "if self._checksum(start, length, zlib.crc32(header[_CRC_BYTES:])) != crc:",
        "if False:",
        SEGMENTS,
        "large_segment",
    ),
    Fault(
        "segments: a torn write stays",
        "blobs/segments.py",
        "            os.ftruncate(self._file, self._offset)\n",
        "",
        SEGMENTS,
        "may_be_repeated",
    ),
    Fault(
        "segments: what was flushed is flushed again",
        "blobs/segments.py",
        "        self._prepared.clear()\n",
        "",
        SEGMENTS,
        "written_again",
    ),
    Fault(
        "segments: a flush overwrites the one before",
        "blobs/segments.py",
        "        self._offset += len(data)\n",
        "",
        SEGMENTS,
        "not_flushed",
    ),
    Fault(
        "segments: nothing is taken over",
        "blobs/segments.py",
        "        if earlier:\n",
        "        if False:\n",
        SEGMENTS,
        "next_attempt",
    ),
    Fault(
        "segments: an attempt cannot be read alone",
        "blobs/segments.py",
        "        if attempt is not None:\n",
        "        if False:\n",
        SEGMENTS,
        "first_time",
    ),
    Fault(
        "segments: replies come in any order",
        "blobs/segments.py",
        "for line in sorted([*self._places, *others]):",
        "for line in [*self._places, *others]:",
        SEGMENTS,
        "line_order",
    ),
    Fault(
        "segments: a tally counts what is not durable",
        "blobs/segments.py",
        "self._prepared_tally = self.tally.copy()",
        "self._prepared_tally = self.tally",
        SEGMENTS,
        "tally",
    ),
    Fault(
        "blobs: a full disk is some error",
        "blobs/objects.py",
        "        except (BaseError, OSError) as error:\n            if source_error",
        "        except ZeroDivisionError as error:\n            if source_error",
        BLOBS,
        "full_disk",
    ),
    # Engine
    Fault(
        "engine: what comes during a job is forgotten",
        "engine/pgqueuer.py",
        "                self._again[key] = _sooner(job, self._again.get(key))\n",
        "                pass\n",
        ENGINE,
        "again_after_it",
    ),
    Fault(
        "engine: a cancelled job comes again",
        "engine/pgqueuer.py",
        "            self._again.pop(key, None)\n            if (waiting",
        "            if (waiting",
        ENGINE,
        "cancel",
    ),
    # Upstreams
    Fault(
        "circuit: it never opens",
        "executor/circuit.py",
        "        self._open(now, jitter)\n        return True\n",
        "        return True\n",
        CIRCUIT,
    ),
    Fault(
        "circuit: two probes at a time",
        "executor/circuit.py",
        "(self._is_probing or now < self._open_until)",
        "(now < self._open_until)",
        CIRCUIT,
    ),
    Fault(
        "circuit: its pauses do not grow",
        "executor/circuit.py",
        "max(2 * self._pause_s, self._policy.first_pause_s)",
        "self._policy.first_pause_s",
        CIRCUIT,
    ),
    Fault(
        "lanes: a probe that fails uses up its line",
        "executor/lanes.py",
        "is_free = outcome.is_free and policy.max_attempts > 1",
        "is_free = False",
        OUTAGE,
    ),
    Fault(
        "worker: slices that only wait are kept",
        "executor/worker.py",
        "            if held.wakes == wakes or any(event.is_set() for event in ends):\n",
        "            if any(event.is_set() for event in ends):\n",
        OUTAGE,
        "given_back",
    ),
    Fault(
        "admission: Retry-After is not kept",
        "executor/admission.py",
        "            or now < self._held_until\n",
        "",
        ADMISSION,
        "left_alone",
    ),
    Fault(
        "admission: weights do not count",
        "executor/admission.py",
        "(admission.in_flight + 1) / admission.policy.weight",
        "(admission.in_flight + 1)",
        ADMISSION,
        "weight",
    ),
    Fault(
        "limits: refusals cut nothing",
        "executor/limits.py",
        "            self._set(self.current // 2, Limiter.REFUSALS)\n",
        "",
        LIMITS,
        "refus",
    ),
    Fault(
        "limits: the engine's queue is not looked at",
        "executor/limits.py",
        "                self._set(in_flight - excess, Limiter.ENGINE_QUEUE)\n",
        "                pass\n",
        LIMITS,
        "queue",
    ),
    Fault(
        "limits: a rate is not kept",
        "executor/limits.py",
        "self._level = min(self._level - amount, self._most)",
        "self._level = min(self._level, self._most)",
        LIMITS,
        "rate",
    ),
    Fault(
        "http1: a call loses its time-out to the one before it",
        "upstream/http1.py",
        "            connection.drop()\n            raise\n",
        "            connection.drop()\n            raise\n"
        "        finally:\n            self._busy.discard(connection)\n",
        "tests/unit/test_http1.py",
        "just_become",
    ),
    Fault(
        "streaming: half an answer is taken for a whole",
        "upstream/streaming.py",
        '                whole.setdefault("choices", [])  # which keeps its place\n'
        "            elif value is not None or name not in whole:\n"
        "                whole[name] = value\n"
        "    raise CutStream\n",
        '                whole.setdefault("choices", [])  # which keeps its place\n'
        "            elif value is not None or name not in whole:\n"
        "                whole[name] = value\n"
        "    return whole\n",
        "tests/unit/test_streaming.py",
    ),
    Fault(
        "order: lines are mixed up",
        "executor/order.py",
        "groups.setdefault((line.model, _prefix(line.body)), [])",
        "groups.setdefault((line.model, b''), [])",
        "tests/unit/test_order.py",
    ),
    Fault(
        "telemetry: a log that cannot be written ends the work",
        "telemetry.py",
        "with suppress(OSError, ValueError):\n            return self",
        "if True:\n            return self",
        "tests/unit/test_telemetry.py",
    ),
    # Webhooks
    Fault(
        "webhooks: a delivery is tried before its time",
        "executor/webhooks.py",
        "if due_at > time.time():",
        "if False:",
        WEBHOOKS,
        "before_its_time",
    ),
    Fault(
        "webhooks: the attempts at one webhook have no limit",
        "executor/webhooks.py",
        "lambda: asyncio.Semaphore(_AT_ONCE)",
        "lambda: asyncio.Semaphore(1000)",
        WEBHOOKS,
        "dead",
    ),
    Fault(
        "webhooks: all webhooks share their places",
        "executor/webhooks.py",
        "self._places[delivery.webhook_id]:",
        'self._places[WebhookId("")]:',
        WEBHOOKS,
        "dead",
    ),
    Fault(
        "webhooks: a stop waits for attempts in flight",
        "executor/webhooks.py",
        "deadline.reschedule(over_at)",
        "pass",
        WEBHOOKS,
        "cut_off",
    ),
    Fault(
        "webhooks: pending deliveries are forgotten at a restart",
        "executor/upkeep.py",
        "await engine.enqueue(await store.list_due_deliveries(until=None))",
        "pass",
        WEBHOOKS,
        "start_knows",
    ),
    Fault(
        "webhooks: what is due is not looked for",
        "executor/upkeep.py",
        "await engine.enqueue(await store.list_due_deliveries(until=time.time()))",
        "pass",
        WEBHOOKS,
        "another_process",
    ),
    Fault(
        "engine: a job that waits does not become due sooner",
        "engine/pgqueuer.py",
        "elif waiting.due_at > max(job.due_at or 0.0, now):",
        "elif False:",
        ENGINE,
        "first_of_two",
    ),
    Fault(
        "webhooks: an attempt is scheduled after the last day",
        "executor/webhooks.py",
        "return at if at <= queued_at + self.life_s else None",
        "return at if now <= queued_at + self.life_s else None",
        SCHEDULE,
    ),
    Fault(
        "webhooks: only the first address of a name is looked at",
        "upstream/webhook_http.py",
        "for address in addresses if is_private(address)]",
        "for address in addresses[:1] if is_private(address)]",
        WEBHOOK_HTTP,
        "any_address",
    ),
    Fault(
        "webhooks: the connection goes where the name leads then",
        "upstream/webhook_http.py",
        "builder = builder.resolve(host, address, url.port_or_known_default or 0)",
        "pass",
        WEBHOOK_HTTP,
        "looked_at",
    ),
    Fault(
        "webhooks: a redirect is followed",
        "upstream/webhook_http.py",
        ".follow_redirects(False)",
        ".follow_redirects(True)",
        WEBHOOK_HTTP,
        "redirect",
    ),
    Fault(
        "webhooks: a proxy of the environment is used",
        "upstream/webhook_http.py",
        ".no_proxy()",
        "",
        WEBHOOK_HTTP,
        "proxy",
    ),
    Fault(
        "webhooks: an IPv4 address in an IPv6 one is not seen",
        "addresses.py",
        "return address.ipv4_mapped or address.sixtofour",
        "return address.ipv4_mapped",
        ADDRESSES,
    ),
    Fault(
        "webhooks: a signature is made with one secret only",
        "signing.py",
        "for key in keys]",
        "for key in keys[:1]]",
        SIGNING,
        "either",
    ),
    Fault(
        "a native run is not kept as submitting before its job is submitted",
        "executor/native.py",
        "            status=NativeRunStatus.SUBMITTING,\n            begun_at",
        "            status=NativeRunStatus.WAITING,\n            begun_at",
        NATIVE_CRASH,
        "paid_once or pays_once",
    ),
    Fault(
        "a provider is not asked whether it has a native job already",
        "executor/native.py",
        "        if native_id is None:\n            return",
        "        if True:\n            return",
        NATIVE_CRASH,
        "paid_once or pays_once",
    ),
    Fault(
        "a native run that may fall back goes on to the end of the window",
        "executor/native_plan.py",
        "_FALLBACK_SHARE * window_s if falls_back",
        "0 * window_s if falls_back",
        NATIVE_PLAN,
        "fall_back",
    ),
    Fault(
        "the version of a native run fences nothing",
        "store/sql_natives.py",
        'if row is None or row["version"] != run.version:',
        "if row is None:",
        STORE,
        "older_version",
    ),
    Fault(
        "a wish to cancel a native run is written over",
        "store/sql_natives.py",
        "    if wanted is not None and run.cancel_wanted_at is None:",
        "    if False:",
        STORE,
        "wish_to_cancel",
    ),
    Fault(
        "slices of a native run are claimed by workers",
        "store/sql.py",
        "    slices.c.native_run.is_(None), batches.c.status.in_(_CLAIMABLE)\n",
        "    batches.c.status.in_(_CLAIMABLE)\n",
        STORE,
        "native or slices_of_a_run or stays_with",
    ),
    Fault(
        "a batch is written while native runs hold slices",
        "executor/lifecycle.py",
        "held = tally.running + tally.native",
        "held = tally.running",
        RULES,
    ),
    Fault(
        "doubled results of a provider count twice",
        "executor/native_lines.py",
        "if taken is None or line is None or line in taken.writer.lines:",
        "if taken is None or line is None:",
        NATIVE,
        "each_line_has_one_result",
    ),
    Fault(
        "slices of one block are written one after the other",
        "executor/lifecycle.py",
        "key=lambda each: each.piece.start",
        "key=lambda each: each.piece.index",
        NATIVE,
        "mixed_file",
    ),
    Fault(
        "lines of a slice's neighbours of the same block are sent along",
        "executor/worker.py",
        ", models=piece.models)",
        ")",
        NATIVE,
        "mixed_file",
    ),
    Fault(
        "failures of a provider that may pass are kept although they are to be sent again",
        "executor/native_lines.py",
        "not (self._verdict.sends_again and may_pass(reply))",
        "True",
        NATIVE,
        "with_fallback",
    ),
    Fault(
        "a native job whose lines were all given out is taken for one that was not taken",
        "executor/native_lines.py",
        "            self.is_whole = given_out >= self.count\n",
        "",
        NATIVE_CRASH,
        "paid_once",
    ),
]


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the code; every fault must be found.")
    parser.add_argument("--only", default="", help="faults with this in their name")
    parser.add_argument("--src", type=Path, default=ROOT / "src", help="the code to break")
    arguments = parser.parse_args()
    faults = [fault for fault in FAULTS if arguments.only in fault.name]
    with tempfile.TemporaryDirectory(prefix="penstock-faults-") as folder:
        verdicts = [_judge(fault, arguments.src, Path(folder)) for fault in faults]
    found = verdicts.count("found")
    print(f"{found} of {len(faults)} faults found.")
    return 0 if faults and found == len(faults) else 1


def _judge(fault: Fault, src: Path, folder: Path) -> str:
    """Try a fault and tell of it."""
    begun = time.monotonic()
    verdict = _try(fault, src, folder)
    print(f"{verdict:<14} {time.monotonic() - begun:5.1f} s  {fault.name}", flush=True)
    return verdict


def _try(fault: Fault, src: Path, folder: Path) -> str:
    copy = folder / "src"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(src, copy, ignore=shutil.ignore_patterns("__pycache__"))
    target = copy / "penstock" / fault.file
    text = target.read_text()
    if text.count(fault.old) != 1:
        return "DOES NOT APPLY"
    if not _are_sound(fault.tests, copy, folder):
        return "FAILS UNBROKEN"
    target.write_text(text.replace(fault.old, fault.new))
    return "NOT FOUND" if _passes(fault.tests, fault.only, copy, folder) else "found"


_sound: dict[str, bool] = {}


def _are_sound(tests: str, src: Path, folder: Path) -> bool:
    """Whether the tests of a file that are named here pass while nothing is broken."""
    if tests not in _sound:
        names = [fault.only for fault in FAULTS if fault.tests == tests]
        only = " or ".join(f"({name})" for name in names) if all(names) else ""
        _sound[tests] = _passes(tests, only, src, folder)
    return _sound[tests]


def _passes(tests: str, only: str, src: Path, folder: Path) -> bool:
    """Whether these tests pass on this source."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(src),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TESTS_PATIENCE_S": "10",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),
    }
    where = "import penstock; print(penstock.__file__)"
    imported = subprocess.run(
        [sys.executable, "-c", where],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(imported.stdout.strip()).is_relative_to(src), imported.stdout
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += [f"--basetemp={folder / 'tmp'}", tests]
    if only:
        command += ["-k", only]
    try:
        ended = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    # 1: tests failed. Anything else is a mistake in this list, such as a test that is gone.
    if ended.returncode not in (0, 1):
        raise SystemExit(f"{tests}, {only}: {ended.stdout.decode()[-2000:]}")
    return ended.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
