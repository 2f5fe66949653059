"""Two hosts on one PostgreSQL: what they do at once comes out as if one had gone first.

`first_commit_held` makes the moment: the first of two transactions has done all but its
commit, the second begins, and only then the first one ends.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import pytest
from sqlalchemy import Connection, Engine, event
from sqlalchemy.util import await_only

from penstock.errors import Conflict, NotFound
from penstock.model import (
    ApiKey,
    BatchId,
    BatchStatus,
    DeliveryStatus,
    FileId,
    KeyId,
    Once,
    Part,
    PartId,
    Project,
    Purpose,
    Upload,
    UploadId,
    UploadStatus,
    Webhook,
    WebhookId,
)
from penstock.store.base import DeliveryReport, Page, SliceTally
from penstock.store.sql import SqlStore
from penstock.testing.store import (
    ALICE,
    BOB,
    NOON,
    RecordedJobs,
    add_batch,
    claim,
    ended,
    finalize,
    ids_of,
    move,
    names_of_files,
    new_batch,
    new_file,
    report,
    so_far,
    start,
)

T = TypeVar("T")
U = TypeVar("U")


@dataclass
class Held:
    """A transaction that waits before its commit."""

    is_reached: asyncio.Event = field(default_factory=asyncio.Event)
    may_go: asyncio.Event = field(default_factory=asyncio.Event)


@contextmanager
def first_commit_held() -> Iterator[Held]:
    held = Held()

    def wait(_: Connection) -> None:
        if not held.is_reached.is_set():
            held.is_reached.set()
            await_only(held.may_go.wait())

    event.listen(Engine, "commit", wait)
    try:
        yield held
    finally:
        event.remove(Engine, "commit", wait)


async def at_once(first: Awaitable[T], second: Awaitable[U]) -> tuple[T, U]:
    """The second begins before the first has committed, and has time to go wrong."""
    with first_commit_held() as held:
        mine = asyncio.ensure_future(first)
        await held.is_reached.wait()
        theirs = asyncio.ensure_future(second)
        await asyncio.wait([theirs], timeout=0.2)
        held.may_go.set()
        return await mine, await theirs


async def outcome(work: Awaitable[T]) -> T | type[Exception]:
    try:
        return await work
    except (Conflict, NotFound) as error:
        return type(error)


@pytest.fixture
def jobs() -> RecordedJobs:
    return RecordedJobs()


@pytest.fixture
async def mine(migrated_url: str, jobs: RecordedJobs) -> AsyncIterator[SqlStore]:
    store = SqlStore(migrated_url, jobs=jobs)
    await store.open()
    yield store
    await store.close()


@pytest.fixture
async def theirs(migrated_url: str, jobs: RecordedJobs) -> AsyncIterator[SqlStore]:
    store = SqlStore(migrated_url, jobs=jobs)
    await store.open()
    yield store
    await store.close()


@pytest.fixture
async def red(mine: SqlStore) -> Project:
    return await mine.ensure_project("red")


# Making


@pytest.mark.parametrize(
    ("first", "again"),
    [
        (Once(fingerprint="f", began_at=NOON, key="key"),) * 2,
        (
            Once(fingerprint="f", began_at=NOON),
            Once(fingerprint="f", began_at=NOON + 1, is_retry=True),
        ),
    ],
    ids=["key", "retry"],
)
async def test_a_request_that_reaches_two_hosts_makes_one_object(
    mine: SqlStore, theirs: SqlStore, red: Project, first: Once, again: Once
) -> None:
    one, other = await at_once(
        mine.add_file(new_file(red, "file-1"), once=first),
        theirs.add_file(new_file(red, "file-2"), once=again),
    )

    assert one == other
    assert await names_of_files(mine, red.id) == ["file-1"]


async def test_a_key_that_reaches_two_hosts_for_two_things_is_a_conflict(
    mine: SqlStore, theirs: SqlStore, red: Project
) -> None:
    _, other = await at_once(
        mine.add_file(new_file(red, "file-1"), once=Once(fingerprint="f", began_at=1, key="k")),
        outcome(
            theirs.add_file(
                new_file(red, "file-2"), once=Once(fingerprint="g", began_at=1, key="k")
            )
        ),
    )

    assert other is Conflict


async def test_requests_with_two_keys_do_not_wait_for_each_other(
    mine: SqlStore, theirs: SqlStore, red: Project
) -> None:
    with first_commit_held() as held:
        waiting = asyncio.create_task(
            mine.add_file(
                new_file(red, "file-1"), once=Once(fingerprint="f", began_at=1, key="k")
            )
        )
        await held.is_reached.wait()
        await theirs.add_file(
            new_file(red, "file-2"), once=Once(fingerprint="f", began_at=1, key="l")
        )
        assert not waiting.done()
        held.may_go.set()
        await waiting


async def test_a_project_is_made_by_one_of_two_hosts(mine: SqlStore, theirs: SqlStore) -> None:
    one, other = await at_once(
        mine.ensure_project("red"), theirs.ensure_project("red", weight=3)
    )

    assert other == replace(one, weight=3)


async def test_a_key_is_added_by_one_of_two_hosts(
    mine: SqlStore, theirs: SqlStore, red: Project
) -> None:
    keys = [
        ApiKey(id=KeyId(name), project_id=red.id, project="red", hint="h", created_at=NOON)
        for name in ("key-1", "key-2")
    ]

    await at_once(mine.add_key(keys[0], digest="d"), theirs.add_key(keys[1], digest="d"))

    assert await mine.list_keys() == keys[:1]


async def test_webhooks_are_those_of_one_host(
    mine: SqlStore, theirs: SqlStore, red: Project
) -> None:
    one, other = (
        Webhook(id=WebhookId(name), project_id=red.id, url=f"https://{name}.example")
        for name in ("we_1", "we_2")
    )

    await at_once(mine.set_webhooks([one]), theirs.set_webhooks([other]))

    assert await mine.list_webhooks() == [other]


# Files and uploads


async def test_a_file_that_a_batch_is_just_taking_keeps_its_bytes(
    mine: SqlStore, theirs: SqlStore, red: Project
) -> None:
    file = await mine.add_file(new_file(red))

    _, unused = await at_once(
        mine.add_batch(new_batch(file)), theirs.delete_file(red.id, file.id, now=NOON)
    )

    assert unused is None


async def test_a_file_that_is_just_being_deleted_takes_no_batch(
    mine: SqlStore, theirs: SqlStore, red: Project
) -> None:
    file = await mine.add_file(new_file(red))

    unused, added = await at_once(
        mine.delete_file(red.id, file.id, now=NOON), outcome(theirs.add_batch(new_batch(file)))
    )

    assert (unused, added) == (file, NotFound)


async def test_one_batch_does_not_wait_for_another_with_the_same_file(
    mine: SqlStore, theirs: SqlStore, red: Project
) -> None:
    file = await mine.add_file(new_file(red))

    with first_commit_held() as held:
        waiting = asyncio.create_task(mine.add_batch(new_batch(file, "batch-1")))
        await held.is_reached.wait()
        await theirs.add_batch(new_batch(file, "batch-2"))
        held.may_go.set()
        await waiting


async def test_a_file_is_deleted_once(mine: SqlStore, theirs: SqlStore, red: Project) -> None:
    file = await mine.add_file(new_file(red))

    results = await at_once(
        mine.delete_file(red.id, file.id, now=NOON),
        outcome(theirs.delete_file(red.id, file.id, now=NOON)),
    )

    assert results == (file, NotFound)


async def test_of_two_files_with_the_same_bytes_one_is_the_last(
    mine: SqlStore, theirs: SqlStore, red: Project
) -> None:
    for name in ("file-1", "file-2"):
        await mine.add_file(replace(new_file(red, name), blob_key="blobs/both"))

    first, second = await at_once(
        mine.delete_file(red.id, FileId("file-1"), now=NOON),
        theirs.delete_file(red.id, FileId("file-2"), now=NOON),
    )

    assert first is None
    assert second is not None


def new_upload(project: Project) -> Upload:
    return Upload(
        id=UploadId("upload-1"),
        project_id=project.id,
        status=UploadStatus.PENDING,
        purpose=Purpose.BATCH,
        filename="questions.jsonl",
        mime_type="application/jsonl",
        bytes=1200,
        created_at=NOON,
        expires_at=NOON + 3600,
    )


PART = Part(
    id=PartId("part-1"),
    upload_id=UploadId("upload-1"),
    bytes=1200,
    blob_key="blobs/part-1",
    created_at=NOON,
)


async def test_an_upload_ends_once(mine: SqlStore, theirs: SqlStore, red: Project) -> None:
    upload = await mine.add_upload(new_upload(red))

    one, other = await at_once(
        mine.end_upload(upload.id, UploadStatus.COMPLETED, now=NOON, file=new_file(red)),
        outcome(theirs.end_upload(upload.id, UploadStatus.CANCELLED, now=NOON)),
    )

    assert (one.status, other) == (UploadStatus.COMPLETED, Conflict)


async def test_an_upload_that_is_just_ending_takes_no_part(
    mine: SqlStore, theirs: SqlStore, red: Project
) -> None:
    upload = await mine.add_upload(new_upload(red))

    _, added = await at_once(
        mine.end_upload(upload.id, UploadStatus.CANCELLED, now=NOON),
        outcome(theirs.add_part(red.id, PART, now=NOON)),
    )

    assert added is Conflict
    assert await mine.list_parts(upload.id) == []


async def test_a_part_that_just_comes_is_forgotten_with_its_upload(
    mine: SqlStore, theirs: SqlStore, red: Project
) -> None:
    upload = await mine.add_upload(new_upload(red))

    await at_once(
        mine.add_part(red.id, PART, now=NOON),
        theirs.end_upload(upload.id, UploadStatus.CANCELLED, now=NOON),
    )

    assert await mine.list_parts(upload.id) == []


# Batches and slices


async def test_a_batch_moves_one_way(
    mine: SqlStore, theirs: SqlStore, jobs: RecordedJobs
) -> None:
    await start(mine)
    jobs.take()

    cancelled, moved = await at_once(
        mine.move_batch(BatchId("batch-1"), BatchStatus.CANCELLING, now=NOON),
        outcome(theirs.move_batch(BatchId("batch-1"), BatchStatus.FINALIZING, now=NOON)),
    )

    assert (cancelled.status, moved) == (BatchStatus.CANCELLING, Conflict)
    assert jobs.take() == [finalize()]


@pytest.mark.parametrize("ends", [True, False])
async def test_the_last_two_slices_let_the_finalizer_look_though_they_stop_at_once(
    mine: SqlStore, theirs: SqlStore, jobs: RecordedJobs, ends: bool
) -> None:
    await start(mine, 2)
    [one] = await claim(mine, ids_of(0), ALICE)
    [other] = await claim(theirs, ids_of(1), BOB)
    if not ends:
        await move(mine, BatchStatus.CANCELLING)
    jobs.take()

    await at_once(
        report(mine, so_far(one, 10, ends=ends)), report(theirs, so_far(other, 10, ends=ends))
    )

    assert jobs.take() == [finalize()]


async def test_two_hosts_that_release_and_end_the_last_slices_let_the_finalizer_look(
    mine: SqlStore, theirs: SqlStore, jobs: RecordedJobs
) -> None:
    await start(mine, 2)
    await claim(mine, ids_of(0), ALICE, now=NOON)
    [other] = await claim(theirs, ids_of(1), BOB, now=NOON + 30)
    await move(mine, BatchStatus.CANCELLING)
    jobs.take()

    released, _ = await at_once(
        mine.release_slices(now=NOON + 60), report(theirs, ended(other), now=NOON + 60)
    )

    assert released == 1
    assert jobs.take() == [finalize()]


async def test_a_slice_is_released_once(mine: SqlStore, theirs: SqlStore) -> None:
    await start(mine)
    await claim(mine, ids_of(0, 1))

    assert await at_once(
        mine.release_slices(now=NOON + 60), theirs.release_slices(now=NOON + 60)
    ) == (2, 0)


async def test_a_claim_does_not_wait_for_another(mine: SqlStore, theirs: SqlStore) -> None:
    await start(mine, 4)

    with first_commit_held() as held:
        waiting = asyncio.create_task(claim(mine, ids_of(0, 1, 2), ALICE))
        await held.is_reached.wait()
        others = await claim(theirs, ids_of(1, 2, 3), BOB)
        held.may_go.set()
        claimed = await waiting

    assert [one.slice.index for one in claimed] == [0, 1, 2]
    assert [one.slice.index for one in others] == [3]


async def test_no_slice_is_claimed_behind_a_cancel(mine: SqlStore, theirs: SqlStore) -> None:
    await start(mine)

    _, claimed = await at_once(move(mine, BatchStatus.CANCELLING), claim(theirs, ids_of(0)))

    assert claimed == []


async def test_a_cancel_sees_the_slice_that_was_just_claimed(
    mine: SqlStore, theirs: SqlStore
) -> None:
    await start(mine)
    tallies: list[SliceTally] = []

    async def cancel() -> None:
        await move(theirs, BatchStatus.CANCELLING)
        tallies.append(await theirs.tally_slices(BatchId("batch-1")))

    await at_once(claim(mine, ids_of(0)), cancel())

    assert tallies == [SliceTally(running=1, pending=2)]


async def test_a_report_is_lost_to_the_claim_that_came_before(
    mine: SqlStore, theirs: SqlStore
) -> None:
    await start(mine)
    [late] = await claim(mine, ids_of(0), ALICE, now=NOON)

    [fresh], lost = await at_once(
        claim(mine, ids_of(0), BOB, now=NOON + 60),
        report(theirs, ended(late), now=NOON + 60),
    )

    assert (fresh.slice.attempt, lost) == (2, {late.slice.id})


async def test_a_slice_that_is_just_reported_is_not_claimed(
    mine: SqlStore, theirs: SqlStore
) -> None:
    await start(mine)
    [late] = await claim(mine, ids_of(0), ALICE, now=NOON)

    lost, claimed = await at_once(
        report(mine, so_far(late, 4), now=NOON + 60),
        claim(theirs, ids_of(0), BOB, now=NOON + 60),
    )

    assert (lost, claimed) == (set(), [])


async def test_hosts_that_report_the_same_slices_in_any_order_do_not_lock_each_other_out(
    mine: SqlStore, theirs: SqlStore
) -> None:
    await start(mine, 40)
    claims = await claim(mine, ids_of(*range(40)))

    for completed in range(1, 10):
        reports = [so_far(each, completed) for each in claims]
        lost = await asyncio.gather(report(mine, *reports), report(theirs, *reversed(reports)))
        assert lost == [set(), set()]


async def test_workers_of_many_hosts_leave_no_batch_standing(
    migrated_url: str, mine: SqlStore, jobs: RecordedJobs
) -> None:
    hosts = [SqlStore(migrated_url, jobs=jobs) for _ in range(4)]
    await start(mine, 60)
    jobs.take()

    async def work(store: SqlStore, name: str) -> int:
        done = 0
        while pending := await store.list_pending(BatchId("batch-1"), limit=5):
            for each in await claim(store, [one.id for one in pending], name):
                await report(store, ended(each))
                done += 1
        return done

    done = await asyncio.gather(*(work(host, f"w{n}") for n, host in enumerate(hosts)))

    assert sum(done) == 60
    assert jobs.take() == [finalize()]
    for host in hosts:
        await host.close()


# Deliveries


async def test_a_delivery_is_reported_once(
    mine: SqlStore, theirs: SqlStore, red: Project
) -> None:
    await mine.set_webhooks(
        [Webhook(id=WebhookId("we_1"), project_id=red.id, url="https://one.example")]
    )
    await add_batch(mine)
    await move(mine, BatchStatus.FAILED)
    [delivery] = await mine.list_deliveries(Page(limit=9))
    done = DeliveryReport(
        id=delivery.id, attempt=1, at=NOON, status=DeliveryStatus.DELIVERED, status_code=200
    )

    assert await at_once(mine.report_delivery(done), theirs.report_delivery(done)) == (
        True,
        False,
    )
