"""Tries what the settings name, and says what is wrong and what to do about it.

Nothing is made that is not there: a directory or database that the first start would make is
reported as such.
"""

import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path

from penstock.adapters import open_batches, open_lines
from penstock.app import open_storage
from penstock.engine.postgres import check_queue, install_queue
from penstock.errors import PenstockError, UpstreamDown
from penstock.events import sample_event
from penstock.places import database_path, store_url
from penstock.price_table import GenaiPrices, find_table
from penstock.pricing import tell_prices
from penstock.settings import Settings, Upstream, WebhookSettings
from penstock.store.sql import SqlStore
from penstock.upstream.anthropic_batch import REQUESTS
from penstock.upstream.base import NativeJob
from penstock.upstream.bedrock_batch import BUCKET
from penstock.upstream.kinds import KINDS
from penstock.upstream.openai_batch import INPUT
from penstock.upstream.webhook import WebhookReply, WebhookTarget
from penstock.upstream.webhook_http import HttpWebhookSender

_SHOWN_MODELS = 5
_LIVES_S = 10.0
"""How lately a worker that is at work was seen."""
_ASKS_S = 30.0
_ANY_NOTES = {INPUT: "none", REQUESTS: "0", BUCKET: "none"}
"""What the adapters note of a job before its provider has it, or they would not ask for it."""


class Verdict(StrEnum):
    """How one check came out."""

    OK = "ok"
    NOTE = "note"  # works, but the reader should know
    PROBLEM = "problem"  # something will not work until it is set right


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    what: str
    verdict: Verdict
    message: str
    """A sentence; of a problem it also says what to do."""


async def check_all(settings: Settings) -> list[Finding]:
    """Try the data directory, the database, the storage, every upstream and, if it is used,
    its batch API and what that costs, and list the webhooks, in this order.

    A cluster whose state and files are both elsewhere has no data directory to try.
    """
    is_elsewhere = settings.database_url is not None and settings.storage_url is not None
    findings = [] if is_elsewhere else list(check_data_dir(settings))
    if settings.database_url is None:
        findings.append(await check_database(settings.data_dir))
    else:
        findings.append(await check_shared_database(settings.database_url))
    if settings.storage_url is not None:
        findings.append(await check_storage(settings))
    elif settings.database_url is not None:
        message = (
            f"Files are kept in {settings.data_dir}, which every process of the cluster must "
            "see; set storage_url unless all run on this machine."
        )
        findings.append(Finding("storage", Verdict.NOTE, message))
    if not settings.upstreams:
        message = "None is set; add an [[upstreams]] table, or start with `--upstream URL`."
        findings.append(Finding("upstreams", Verdict.NOTE, message))
    findings += await asyncio.gather(*map(check_upstream, settings.upstreams))
    native = [upstream for upstream in settings.upstreams if upstream.mode != "lines"]
    findings += await asyncio.gather(*map(check_batches, native))
    table = find_table() if native else None
    findings += [check_prices(upstream, table) for upstream in native]
    findings += map(list_webhook, settings.webhooks)
    return findings


def check_data_dir(settings: Settings) -> Iterator[Finding]:
    """Whether files can be made in the data directory, and whether there is room for them."""
    what, path = "data directory", settings.data_dir
    there = path.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        yield Finding(
            what,
            Verdict.PROBLEM,
            f"{there} cannot be written ({error.strerror}); make it writable for this user, or "
            "set data_dir to another directory.",
        )
        return
    free = shutil.disk_usage(there).free
    room = f"{free / 2**30:,.1f} GiB free"
    if free < settings.limits.input_file_bytes:
        yield Finding(
            what,
            Verdict.PROBLEM,
            f"{path} has only {room}, less than one input file of limits.input_file_bytes "
            "may have; make room, or set data_dir to another disk.",
        )
    elif there != path.absolute():
        message = f"{path} is not there yet; the first start makes it ({room})."
        yield Finding(what, Verdict.OK, message)
    else:
        yield Finding(what, Verdict.OK, f"{path} is writable ({room}).")
    if _is_in_use(path):
        yield Finding(what, Verdict.NOTE, f"A Penstock process works in {path} now.")


async def check_database(data_dir: Path) -> Finding:
    """Whether the database takes writes."""
    what, path = "database", database_path(data_dir)
    if not has_database(data_dir):
        return Finding(what, Verdict.OK, f"{path} is not there yet; the first start makes it.")
    try:
        async with open_store(store_url(data_dir)) as store:
            await store.ping()
    except (PenstockError, OSError) as error:
        return Finding(what, Verdict.PROBLEM, str(error))
    return Finding(what, Verdict.OK, f"{path} takes writes.")


async def check_shared_database(url: str) -> Finding:
    """Whether a cluster's database is there, has our tables and takes writes."""
    what = "database"
    try:
        async with open_store(url) as store:
            await store.ping()
            version = await store.find_version()
            workers = await store.list_workers(seen_after=await store.read_clock() - _LIVES_S)
        await check_queue(url)
    except (PenstockError, OSError) as error:
        return Finding(what, Verdict.PROBLEM, str(error))
    count = f"{len(workers)} worker{'' if len(workers) == 1 else 's'}"
    return Finding(
        what, Verdict.OK, f"It takes writes, at schema version {version}; {count} at work."
    )


async def check_storage(settings: Settings) -> Finding:
    """Whether the storage takes, gives and deletes an object."""
    try:
        await open_storage(settings).check()
    except PenstockError as error:
        return Finding("storage", Verdict.PROBLEM, str(error))
    return Finding("storage", Verdict.OK, f"{settings.storage_url} takes and gives objects.")


async def check_upstream(settings: Upstream) -> Finding:
    """Whether an upstream answers, and with a model that its patterns match."""
    what = f"upstream {settings.name}"
    try:
        hasty = {"request_timeout_s": min(settings.request_timeout_s, 30)}
        upstream = open_lines(settings.model_copy(update=hasty))
        try:
            models = await upstream.list_models()
        finally:
            await upstream.close()
    except UpstreamDown as error:
        if _may_do_without_lines(settings):
            return Finding(
                what,
                Verdict.NOTE,
                f"{str(error).rstrip('.')}; it has no api_key, which is for lines that no "
                "batch of the provider takes: set one if such lines are to be sent one by one.",
            )
        hint = "start it, or correct its base_url and api_key."
        return Finding(what, Verdict.PROBLEM, f"{str(error).rstrip('.')}; {hint}")
    except PenstockError as error:
        return Finding(what, Verdict.PROBLEM, str(error))
    served = [name for name in models if any(fnmatchcase(name, p) for p in settings.models)]
    if not served:
        return Finding(
            what,
            Verdict.NOTE,
            f"It answers, but none of its {len(models)} models matches "
            f"upstreams.models ({', '.join(settings.models)}); correct the patterns unless it "
            "serves models that it does not list.",
        )
    more = f" and {len(served) - _SHOWN_MODELS} more" if len(served) > _SHOWN_MODELS else ""
    names = ", ".join(served[:_SHOWN_MODELS])
    return Finding(what, Verdict.OK, f"It answers and serves {names}{more}.")


def _may_do_without_lines(settings: Upstream) -> bool:
    """Whether batches may be all that an upstream is for, as nothing opens its other API."""
    is_cloud = KINDS[settings.kind].has_cloud_credentials
    return is_cloud and settings.mode == "native" and settings.api_key is None


async def check_batches(settings: Upstream) -> Finding:
    """Whether a provider's batch API answers: it is asked for a job that it does not have."""
    what = f"batches of {settings.name}"
    now = time.time()
    job = NativeJob(
        key=f"check-{secrets.token_hex(8)}",
        display_name="check",
        endpoint="/v1/chat/completions",
        model="none",
        requests=1,
        expires_at=now,
    )
    try:
        async with asyncio.timeout(_ASKS_S):
            if (upstream := open_batches(settings)) is None:
                return Finding(what, Verdict.PROBLEM, f"The kind {settings.kind} has none.")
            try:
                await upstream.find(job, _ANY_NOTES, since=now)
            finally:
                await upstream.close()
    except TimeoutError:
        message = f"Its batch API did not answer within {_ASKS_S:.0f} s."
        return Finding(what, Verdict.PROBLEM, message)
    except PenstockError as error:
        hint = "correct its settings, or set its mode to lines."
        return Finding(what, Verdict.PROBLEM, f"{str(error).rstrip('.')}; {hint}")
    return Finding(what, Verdict.OK, "Its batch API answers.")


def check_prices(settings: Upstream, table: GenaiPrices | None) -> Finding:
    """Whether it is known what the batches of an upstream cost."""
    message, is_known = tell_prices(settings, table)
    verdict = Verdict.OK if is_known else Verdict.NOTE
    return Finding(f"prices of {settings.name}", verdict, message)


def list_webhook(hook: WebhookSettings) -> Finding:
    """What a webhook is told. Nothing is sent to it; `try_webhooks` does that."""
    told = f"{hook.url} is told of the batches of {hook.project}"
    if hook.url.startswith("http:") and not hook.allow_private_addresses:
        message = f"{told}, over http, which others can read on its way; use https if it can."
        return Finding("webhook", Verdict.NOTE, message)
    return Finding("webhook", Verdict.OK, f"{told}; `penstock webhooks test` tries it.")


@dataclass(frozen=True, slots=True)
class Tried:
    """What a webhook answered to a test event."""

    hook: WebhookSettings
    reply: WebhookReply


async def try_webhooks(hooks: Sequence[WebhookSettings]) -> list[Tried]:
    """Send a test event to each webhook, from this process and once."""
    sender = HttpWebhookSender()

    async def attempt(hook: WebhookSettings) -> Tried:
        name = secrets.token_hex(16)
        target = WebhookTarget(
            url=hook.url,
            keys=hook.keys,
            allow_private_addresses=hook.allow_private_addresses,
        )
        body = sample_event(event_id=f"evt_{name}", now=int(time.time()))
        return Tried(hook, await sender.send(target, message_id=f"wh_{name}", body=body))

    try:
        return await asyncio.gather(*map(attempt, hooks))
    finally:
        await sender.close()


def has_database(data_dir: Path) -> bool:
    """Whether a data directory was used before."""
    return database_path(data_dir).exists()


@contextlib.asynccontextmanager
async def open_store(url: str) -> AsyncGenerator[SqlStore]:
    """A database; one of a data directory is brought to this version's schema."""
    store = SqlStore(url, jobs=None)
    try:
        await store.open()
        yield store
    finally:
        await store.close()


async def migrate_database(url: str) -> tuple[str | None, str]:
    """Bring a database to this version's schema, and the job queue's with it.

    Returns:
        The schema's version before, None if the database was empty, and now.

    Raises:
        InvalidSettings: The schema is newer than this version of Penstock.
        StorageUnavailable: The database does not answer.
    """
    store = SqlStore(url, jobs=None)
    try:
        before = await store.find_version()
        await store.migrate()
        after = await store.find_version()
    finally:
        await store.close()
    if not url.startswith("sqlite:"):
        await install_queue(url)
    assert after is not None  # noqa: S101
    return before, after


def _is_in_use(data_dir: Path) -> bool:
    """Whether a process holds the directory, as `app` does while it works."""
    try:
        lock = os.open(data_dir / "lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
