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
POSTGRES = "tests/integration/test_store_postgres.py"
RACES = "tests/integration/test_store_races.py"
STORE_OUTAGE = "tests/integration/test_store_outage.py"
MIGRATIONS = "tests/integration/test_store_migrations.py"
FEEDER = "tests/unit/test_feeder.py"
RETRY = "tests/unit/test_retry.py"
REPLIES = "tests/unit/test_replies.py"
RULES = "tests/unit/test_lifecycle_rules.py"
GROUP = "tests/unit/test_group.py"
BLOBS = "tests/unit/test_blobs.py"
OBJECT_BLOBS = "tests/integration/test_object_blobs.py"
OBJECT_SEGMENTS = "tests/unit/test_object_segments.py"
STORAGE = "tests/unit/test_storage.py"
ENGINE = "tests/unit/test_engine.py"
SHARED_ENGINE = "tests/integration/test_engine_postgres.py"
SWEEP = "tests/unit/test_sweep.py"
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
SHARES = "tests/unit/test_shares.py"
WAITING = "tests/unit/test_waiting.py"
ASKED_MODEL = "tests/integration/test_asked_model.py"
NATIVE = "tests/integration/test_native.py"
NATIVE_CRASH = "tests/integration/test_native_crash.py"
NATIVE_PLAN = "tests/unit/test_native_plan.py"
PRICES = "tests/unit/test_prices.py"


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
        "== SliceStatus.RUNNING).values(_GIVEN_BACK)",
        "== SliceStatus.ENDED).values(_GIVEN_BACK)",
        STORE,
        "dead",
    ),
    Fault(
        "store: late slices are released while their lease runs",
        "store/sql.py",
        '.where(slices.c.lease_expires_at <= bindparam("now"))',
        '.where(slices.c.lease_expires_at <= bindparam("now") + 30)',
        STORE,
        "release",
    ),
    Fault(
        "store: two that stop the last slices at once miss it",
        "store/sql.py",
        "lock_rows(db, _LOCK_STOPPED,",
        "(lambda *_: None)(db, _LOCK_STOPPED,",
        RACES,
        "last",
    ),
    Fault(
        "store: a slice is claimed behind a cancel",
        "store/sql.py",
        "lock_rows(db, _KEEP_BATCHES_OF,",
        "(lambda *_: None)(db, _KEEP_BATCHES_OF,",
        RACES,
        "cancel",
    ),
    Fault(
        "store: a file goes while a batch takes it",
        "store/sql.py",
        "if needs_file and db.execute(_KEEP_FILE, key).first() is None:",
        "if needs_file and db.execute(_GET_FILE, key).first() is None:",
        RACES,
        "file",
    ),
    Fault(
        "store: two files with the same bytes both keep them",
        "store/sql.py",
        'lock_name(db, "blob", file.blob_key)',
        "pass",
        RACES,
        "same_bytes",
    ),
    Fault(
        "store: a request that reaches two hosts makes two objects",
        "store/creations.py",
        "lock_name(db,",
        "(lambda *_: None)(db,",
        RACES,
        "request",
    ),
    Fault(
        "store: two hosts put all their webhooks in force",
        "store/sql_webhooks.py",
        'lock_name(db, "webhooks")',
        "pass",
        RACES,
        "webhooks",
    ),
    Fault(
        "store: jobs of an attempt that came to nothing are kept",
        "store/transactions.py",
        "del jobs[given:]",
        "pass",
        STORE_OUTAGE,
        "run_again",
    ),
    Fault(
        "store: jobs are enqueued after the commit",
        "store/postgres.py",
        "                await finish(raw)\n                return result\n",
        "            await finish(raw)\n            return result\n",
        POSTGRES,
        "enqueued",
    ),
    Fault(
        "store: a connection to a server that has gone is used",
        "store/postgres.py",
        "if raw.is_closed() or",
        "if",
        STORE_OUTAGE,
        "restarts",
    ),
    Fault(
        "store: a call waits for ever for a server that stands still",
        "store/postgres.py",
        "timer = loop.call_later(_TRANSACTION_S, self._cut, raw)",
        "timer = loop.call_later(12, self._cut, raw)",
        STORE_OUTAGE,
        "stands_still",
    ),
    Fault(
        "store: two hosts migrate at once",
        "store/postgres.py",
        "        if is_mine:\n",
        "        if True:\n",
        MIGRATIONS,
        "migrate_at_once or waits_for_one",
    ),
    Fault(
        "store: a schema that is too new is worked with",
        "store/migrations/__init__.py",
        "if floor > HEAD:",
        "if False:",
        STORE,
        "newer",
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
        "no_more_than_its_limit",
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
        "(p, strides.get(p, least))",
        "(p, strides.get(p, 0.0))",
        FEEDER,
        "late",
    ),
    Fault(
        "shares: more than the others leave",
        "shares.py",
        "max(whole.concurrency - sum(each.concurrency for each in held), 0)",
        "whole.concurrency",
        SHARES,
    ),
    Fault(
        "shares: what is in flight is given away",
        "shares.py",
        "max(part.concurrency, min(in_flight, mine.holds.concurrency))",
        "part.concurrency",
        SHARES,
    ),
    Fault(
        "budgets: a lease that has ended comes back",
        "store/sql_budgets.py",
        ' if row["expires_at"] > now',
        "",
        STORE,
        "dead_worker_s_part",
    ),
    Fault(
        "admission: lines are sent after the lease",
        "executor/admission.py",
        "            or now >= self._leased_until\n",
        "",
        ADMISSION,
    ),
    Fault(
        "admission: more is sent while a part is asked for",
        "executor/admission.py",
        "self._most = min(self._most, self.in_flight)",
        "pass",
        ADMISSION,
    ),
    Fault(
        "waiting: a fast lane is kept no fuller than a slow one",
        "executor/waiting.py",
        "self._low_water = max(self._least, int(pace * _AHEAD_S))",
        "pass",
        "tests/unit/test_waiting.py",
    ),
    Fault(
        "waiting: background lines take the last places",
        "executor/waiting.py",
        "places - max(places // _KEPT_FREE, 1) if places > 1 else places",
        "places",
        WAITING,
    ),
    Fault(
        "waiting: a newcomer waits behind all others",
        "executor/waiting.py",
        " or not normal.ahead_of(flow)",
        "",
        WAITING,
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
        "known = aside | self._handed.keys()",
        "known = aside",
        FEEDER,
        "once",
    ),
    Fault(
        "feeder: workers reach for what others have taken",
        "executor/feeder.py",
        "self._next.pop(handed.batch_id, None)",
        "pass",
        FEEDER,
        "faster",
    ),
    Fault(
        "feeder: another part is not read anew",
        "executor/feeder.py",
        "            self._next.clear()\n",
        "",
        FEEDER,
        "workers_change",
    ),
    Fault(
        "members: many workers look as often as few",
        "executor/members.py",
        "return max(least_s, workers / most_per_s)",
        "return least_s",
        "tests/unit/test_members.py",
    ),
    # Lifecycle
    Fault(
        "lifecycle: damaged replies pass",
        "executor/lifecycle.py",
        "if (tally.completed, tally.failed) == (found.completed, found.failed):",
        "if True:",
        RUNNING,
        "damage_is_noticed",
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
        "kind, body = (_OUTPUT, reply.body) if status < 300 else (_ERROR, _error_body(reply))",
        "kind, body = _OUTPUT, reply.body",
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
    Fault(
        "sweep: what is young is deleted",
        "executor/sweep.py",
        "await self.delete_unnamed(written_before=before, stop=stop)",
        "await self.delete_unnamed(stop=stop)",
        SWEEP,
        "spared",
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
        "            return crc32c(memoryview(self._whole)[start:end])\n",
        "            return _HEADER.unpack_from(self._whole, offset)[0]\n",
        SEGMENTS,
        "flipped",
    ),
    Fault(
        "segments: a checksum of a large segment is not looked at",
        "blobs/segments.py",
        "        crc = 0\n        while start < end:",
        "        return _HEADER.unpack(self.read(offset, _HEADER.size))[0]\n        while 0:",
        SEGMENTS,
        "large_segment",
    ),
    Fault(
        "segments: a seal is believed whatever stands before it",
        "blobs/segments.py",
        "            size = self._check(place, offset)\n",
        "            size = offset\n",
        SEGMENTS,
        "hide_damage",
    ),
    Fault(
        "segments: a damaged seal is believed",
        "blobs/segments.py",
        "if not block or _checksum(block) != _HEADER.unpack_from(block)[0]:",
        "if not block:",
        SEGMENTS,
        "torn_or_damaged",
    ),
    Fault(
        "uploads: the rest of a boundary is taken for content",
        "api/forms.py",
        "            and not parser.index\n",
        "",
        "tests/api/test_uploads.py",
        "any_cut",
    ),
    Fault(
        "segments: a seal comes too soon",
        "blobs/segments.py",
        "if len(self._places) + len(self._fresh) == self._requests:",
        "if self._requests:",
        SEGMENTS,
        "lacks_a_reply",
    ),
    Fault(
        "segments: a seal knows no order",
        "blobs/segments.py",
        "for _, kind, start, length in sorted(places):",
        "for _, kind, start, length in places:",
        SEGMENTS,
        "reads_the_same",
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
        "        self.size += size\n",
        "",
        SEGMENTS,
        "not_flushed",
    ),
    Fault(
        "segments: nothing is taken over",
        "blobs/local_segments.py",
        "        if earlier:\n",
        "        if False:\n",
        SEGMENTS,
        "next_attempt",
    ),
    Fault(
        "segments: an attempt cannot be read alone",
        "blobs/local_segments.py",
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
        "self.encoded = self.durable.copy()",
        "self.encoded = self.durable",
        SEGMENTS,
        "tally",
    ),
    Fault(
        "blobs: a full disk is some error",
        "blobs/folder.py",
        "        except (BaseError, OSError) as error:\n            if source_error",
        "        except ZeroDivisionError as error:\n            if source_error",
        BLOBS,
        "full_disk",
    ),
    # Objects
    Fault(
        "objects: a cancelled put leaves its parts",
        "blobs/objects.py",
        "            handing.give_up()\n            await self._take_back(key, writing)",
        "            writing.cancel()",
        OBJECT_BLOBS,
        "taken_back",
    ),
    Fault(
        "objects: a write whose answer was lost stays",
        "blobs/objects.py",
        "                await obstore.delete_async(self._store, key)\n\n    async def size",
        "                pass\n\n    async def size",
        OBJECT_BLOBS,
        "answer_is_lost",
    ),
    Fault(
        "objects: an upload that ended is given up",
        "blobs/objects.py",
        "if parts_bytes and names_no_upload(error)",
        "if not parts_bytes and names_no_upload(error)",
        OBJECT_BLOBS,
        "told_twice",
    ),
    Fault(
        "objects: every blob goes up in parts",
        "blobs/objects.py",
        "if size > PART_BYTES:",
        "if size >= 0:",
        OBJECT_BLOBS,
        "takes_one_request",
    ),
    Fault(
        "objects: a bucket that is not there is a missing blob",
        "blobs/objects.py",
        "isinstance(error, FileNotFoundError) and not names_no_bucket(error)",
        "isinstance(error, FileNotFoundError)",
        OBJECT_BLOBS,
        "bucket_that",
    ),
    Fault(
        "storage: a secret of a URL is told",
        "blobs/storage.py",
        ".partition('#')[0].rpartition('@')[2]",
        ".partition('#')[0]",
        STORAGE,
        "secrets",
    ),
    Fault(
        "storage: a signed address is told",
        "blobs/storage_errors.py",
        '_ADDRESS.sub("…", line)',
        "line",
        STORAGE,
        "trouble",
    ),
    Fault(
        "object segments: who lost its slice is not told",
        "blobs/object_segments.py",
        "                lost.add(writer)\n                writer.give_up()",
        "                lost.add(writer)",
        OBJECT_SEGMENTS,
        "is_told",
    ),
    Fault(
        "object segments: a name is given twice",
        "blobs/object_segments.py",
        "                writer.renumber()",
        "                pass",
        OBJECT_SEGMENTS,
        "answer_was_lost",
    ),
    Fault(
        "object segments: what lacks replies is taken for whole",
        "blobs/object_segments.py",
        "!= writer.requests:",
        "> writer.requests:",
        OBJECT_SEGMENTS,
        "not_taken_for_whole",
    ),
    Fault(
        "object segments: replaced objects stay",
        "blobs/object_segments.py",
        "                unused += stored.replaces or ()\n",
        "",
        OBJECT_SEGMENTS,
        "sealed_object",
    ),
    Fault(
        "object segments: replaced objects count as lost",
        "blobs/object_segments.py",
        "if None not in sources or rows == before:",
        "if True:",
        OBJECT_SEGMENTS,
        "becomes_whole",
    ),
    Fault(
        "object segments: what was fetched ahead is not used",
        "blobs/object_segments.py",
        "getting = self._ahead.take(row.key) or",
        "getting = None or",
        OBJECT_SEGMENTS,
        "fetched_ahead",
    ),
    Fault(
        "object segments: one that fails holds up the others",
        "blobs/object_segments.py",
        "            if (stored := writer.stored) is not None:",
        "            if (stored := writer.stored) is not None and not any(failures):",
        OBJECT_SEGMENTS,
        "could_be_stored",
    ),
    Fault(
        "object segments: what no row names stays",
        "blobs/object_segments.py",
        "            keys.add(key)",
        "            pass",
        OBJECT_SEGMENTS,
        "no_row_names",
    ),
    Fault(
        "store: an object is named whoever holds its slice",
        "store/sql_segments.py",
        "if attempts.get(id_) == each.attempt:",
        "if id_ in attempts:",
        STORE,
        "lost_its_slice",
    ),
    Fault(
        "store: who lost the slice replaces its objects",
        "store/sql_segments.py",
        "if _lock(db, [id_]).get(id_) != whole.attempt:",
        "if not _lock(db, [id_]):",
        STORE,
        "replaces_nothing",
    ),
    # Engine
    Fault(
        "engine: what comes during a job is forgotten",
        "engine/memory.py",
        "                self._again[key] = _sooner(job, self._again.get(key))\n",
        "                pass\n",
        ENGINE,
        "again_after_it",
    ),
    Fault(
        "engine: a cancelled job comes again",
        "engine/memory.py",
        "            self._again.pop(key, None)\n            if (waiting",
        "            if (waiting",
        ENGINE,
        "cancel",
    ),
    Fault(
        "shared engine: what comes during a job is forgotten",
        "engine/postgres_queue.py",
        "again_at = CASE job.status WHEN 'picked' THEN excluded.execute_after END\n",
        "again_at = job.again_at\n",
        SHARED_ENGINE,
        "again_after_it",
    ),
    Fault(
        "shared engine: a job that waits does not become due sooner",
        "engine/postgres_queue.py",
        "WHEN 'queued' THEN excluded.execute_after ELSE job.execute_after END",
        "WHEN 'queued' THEN job.execute_after ELSE job.execute_after END",
        SHARED_ENGINE,
        "first_of_two",
    ),
    Fault(
        "shared engine: who wakes up ends a job of another",
        "engine/postgres_queue.py",
        '_MINE = "id = ANY($1::bigint[]) AND queue_manager_id = $2"',
        '_MINE = "id = ANY($1::bigint[]) AND $2::uuid IS NOT NULL"',
        SHARED_ENGINE,
        "wakes_up",
    ),
    Fault(
        "shared engine: jobs are enqueued beside the transaction",
        "engine/postgres.py",
        "await put_jobs(_in_transaction(connection), shared)",
        "await self._with_connection(lambda own: put_jobs(own, shared))",
        SHARED_ENGINE,
        "rolled_back",
    ),
    Fault(
        "shared engine: a cancel is not heard",
        "engine/postgres.py",
        "            self._tell(row)\n            self._cancelled.append(row)\n",
        "            self._cancelled.append(row)\n",
        SHARED_ENGINE,
        "another_does",
    ),
    Fault(
        "shared engine: a cancel that was not heard is forgotten",
        "engine/postgres_queue.py",
        "                self._on_cancel(job_id)\n",
        "                pass\n",
        SHARED_ENGINE,
        "nobody_heard",
    ),
    Fault(
        "shared engine: a cancelled job comes again after a death",
        "engine/postgres_queue.py",
        "DO UPDATE SET again_at = NULL, headers = '{{\"{CANCELLED}\": true}}'\n",
        "DO UPDATE SET again_at = NULL\n",
        SHARED_ENGINE,
        "dies_with",
    ),
    Fault(
        "shared engine: a cancel of slices stays where it was made",
        "engine/postgres.py",
        "if notice.local and notice.by != str(self._queue.owner):",
        "if False:",
        SHARED_ENGINE,
        "every_process",
    ),
    Fault(
        "shared engine: it ends with the server",
        "engine/postgres_link.py",
        "                    self._lose(connection, error)\n",
        "                    raise\n",
        SHARED_ENGINE,
        "cut_off_and_is_back",
    ),
    Fault(
        "shared engine: what was not begun is lost when it stops",
        "engine/postgres.py",
        "            context.cancellation.cancel()  # it goes back to the queue\n",
        "",
        SHARED_ENGINE,
        "one_that_stops",
    ),
    Fault(
        "shared engine: what was cut off is lost",
        "engine/postgres_queue.py",
        "        if back:\n",
        "        if not back:\n",
        SHARED_ENGINE,
        "engine_is_cancelled",
    ),
    Fault(
        "shared engine: a held row holds up a process",
        "engine/postgres_queue.py",
        'WHERE {_MINE} FOR UPDATE SKIP LOCKED)"\n',
        'WHERE {_MINE} FOR UPDATE)"\n',
        SHARED_ENGINE,
        "holds_up_nothing",
    ),
    Fault(
        "shared engine: jobs that have ended are logged",
        "engine/postgres_queue.py",
        "BEFORE INSERT ON {SCHEMA}.pgqueuer_log",
        "BEFORE DELETE ON {SCHEMA}.pgqueuer_log",
        SHARED_ENGINE,
        "twenty_thousand",
    ),
    Fault(
        "shared engine: two hosts make the schema at once",
        "engine/postgres_queue.py",
        '        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)\n',
        "",
        SHARED_ENGINE,
        "two_at_once",
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
        "use_up",
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
        "groups.setdefault((line.model, line.beginning), [])",
        "groups.setdefault((line.model, 0), [])",
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
        "if due_at > clock.now():",
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
        "list_due_deliveries(until=None))\n    return len(unfinished)",
        "list_due_deliveries(until=0))\n    return len(unfinished)",
        WEBHOOKS,
        "start_knows",
    ),
    Fault(
        "webhooks: what is due is not looked for",
        "executor/upkeep.py",
        "await engine.enqueue(await store.list_due_deliveries(until=clock.now()))",
        "pass",
        WEBHOOKS,
        "another_process",
    ),
    Fault(
        "engine: a job that waits does not become due sooner",
        "engine/memory.py",
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
        "run, status=NativeRunStatus.SUBMITTING, begun_at=",
        "run, status=NativeRunStatus.WAITING, begun_at=",
        NATIVE_CRASH,
        "paid_once or pays_once",
    ),
    Fault(
        "a job whose submitter is gone is looked for before the provider shows it",
        "executor/native.py",
        "self._lease_s + self._wait_s)",
        "1.0)",
        NATIVE_CRASH,
        "takes_over_soon",
    ),
    Fault(
        "the hold on a native run that is submitted is not extended",
        "executor/native.py",
        "        extending = asyncio.create_task(self._extend())",
        "        extending = asyncio.create_task(asyncio.sleep(0))",
        NATIVE_CRASH,
        "not_taken_for_a_dead_one",
    ),
    Fault(
        "a submission goes on whose hold has ended",
        "executor/native.py",
        "reschedule(min(self._ends_at, self._held_until))",
        "reschedule(self._ends_at)",
        NATIVE_CRASH,
        "before_others_look",
    ),
    Fault(
        "a submission is not handed over by a worker that stops",
        "executor/native.py",
        "            submission.end_by(over_at)\n",
        "            pass\n",
        NATIVE_CRASH,
        "outlasts_the_grace",
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
        "slices of a batch whose input is gone are handed out all the same",
        "executor/absent.py",
        "return absence is None or now >= absence.try_at",
        "return True",
        "tests/unit/test_absent.py",
    ),
    Fault(
        "a batch whose input is gone takes the room of others",
        "executor/feeder.py",
        "            if self._absences.may_try(batch_id, now)\n",
        "",
        "tests/integration/test_lost_input.py",
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
    Fault(
        "slices of a native run are forgotten before it is counted",
        "store/sql_upkeep.py",
        "    slices.c.native_run.is_(None),\n",
        "",
        STORE,
        "outlive",
    ),
    Fault(
        "a native job whose results were not to be had took nothing",
        "executor/native.py",
        " and run.outcome in set(NativeState):\n            # Kept",
        ":\n            # Kept",
        NATIVE,
        "not_to_be_had",
    ),
    Fault(
        "what a native job took is lost with its end",
        "store/rows.py",
        '        "answered": spent.answered,\n',
        '        "answered": None,\n',
        STORE,
        "took",
    ),
    Fault(
        "answers that tell of no tokens cost nothing",
        "prices.py",
        "if spent.answered and not spent.usage.total_tokens:",
        "if False:",
        PRICES,
    ),
    Fault(
        "a price that is not known counts as 0",
        "prices.py",
        "usd=sum(usd, Decimal(0)) if len(usd) == len(costs) else None,",
        "usd=sum(usd, Decimal(0)),",
        PRICES,
    ),
    Fault(
        "a batch without an answer cost 0",
        "prices.py",
        "if not items or any(",
        "if any(",
        PRICES,
    ),
    Fault(
        "a sum of costs of which none is known is 0",
        "pricing.py",
        "NativeFigures() if answered else NativeFigures(cost_usd=0.0, by_line_usd=0.0)",
        "NativeFigures(cost_usd=0.0, by_line_usd=0.0)",
        "tests/unit/test_pricing.py",
    ),
    Fault(
        "cached tokens are paid twice",
        "prices.py",
        "total = (usage.input_tokens - cached) * rates.input",
        "total = usage.input_tokens * rates.input",
        PRICES,
    ),
    Fault(
        "any server that speaks as OpenAI does has OpenAI's discount",
        "prices.py",
        "None if is_other else KIND_DISCOUNTS",
        "KIND_DISCOUNTS",
        PRICES,
    ),
    Fault(
        "lines that are sent one by one forget the model that is asked for",
        "executor/worker.py",
        "                held.asked_model,\n",
        "                None,\n",
        ASKED_MODEL,
        "one_by_one",
    ),
    Fault(
        "lines of a native job forget the model that is asked for",
        "executor/native_lines.py",
        "rename(lines, batch.asked_model)",
        "rename(lines, None)",
        ASKED_MODEL,
        "job_is_run",
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
