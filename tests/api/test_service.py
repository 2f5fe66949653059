"""What happens between two steps of a call: each race is made, on a real store."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from penstock.blobs.folder import FolderBlobs
from penstock.errors import Conflict, InvalidRequest, NotFound, StorageUnavailable
from penstock.intake import Intake
from penstock.model import (
    Batch,
    BatchId,
    BatchStatus,
    File,
    FileId,
    Once,
    ProjectId,
    Purpose,
)
from penstock.service import Service, ServiceLimits
from penstock.store.base import BatchChange
from penstock.store.sql import SqlStore
from penstock.upstream.routes import Routes
from tests.api.conftest import LINE

NOW = 1_750_000_000
Meanwhile = Callable[[], Awaitable[Any]]


class RacedStore(SqlStore):
    """A store in which something else happens right after a read."""

    after_get_batch: Meanwhile | None = None
    after_get_file: Meanwhile | None = None
    does_add_file_fail = False

    async def get_batch(
        self, batch_id: BatchId, *, project_id: ProjectId | None = None
    ) -> Batch:
        batch = await super().get_batch(batch_id, project_id=project_id)
        meanwhile, self.after_get_batch = self.after_get_batch, None
        if meanwhile is not None:
            await meanwhile()
        return batch

    async def get_file(self, project_id: ProjectId, file_id: FileId) -> File:
        file = await super().get_file(project_id, file_id)
        meanwhile, self.after_get_file = self.after_get_file, None
        if meanwhile is not None:
            await meanwhile()
        return file

    async def add_file(self, file: File, *, once: Once | None = None) -> File:
        if self.does_add_file_fail:
            raise StorageUnavailable("The database is full.")
        return await super().add_file(file, once=once)


class NoResultsYet:
    """A batch of which nothing has ended."""

    async def stream(self, batch: Batch) -> AsyncIterator[bytes]:
        for piece in ():
            yield piece


@dataclass
class Form:
    """A form that has arrived."""

    pieces: list[bytes]
    fields: dict[str, str] = field(default_factory=lambda: {"purpose": "batch"})
    filename: str = "in.jsonl"
    declared_bytes: int | None = None
    taken: int = 0

    async def content(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            self.taken += 1
            yield piece


@dataclass
class World:
    service: Service
    store: RacedStore
    blobs: FolderBlobs
    project_id: ProjectId

    async def add_input(self) -> File:
        return await self.service.create_file(self.project_id, Form([LINE]))

    async def add_batch(self) -> Batch:
        file = await self.add_input()
        return await self.service.create_batch(
            self.project_id, input_file_id=file.id, endpoint="/v1/embeddings"
        )

    async def read_output(self, batch_id: str) -> bytes:
        pieces = await self.service.open_output(self.project_id, batch_id)
        return b"".join([piece async for piece in pieces])

    async def stored_keys(self) -> list[str]:
        return [key async for key in self.blobs.iter_keys("files")]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    store = RacedStore(f"sqlite:///{tmp_path / 'penstock.db'}")
    await store.open()
    blobs = FolderBlobs(tmp_path / "blobs")
    service = Service(
        store=store,
        blobs=blobs,
        partial=NoResultsYet(),
        upstreams=Routes([]),
        limits=ServiceLimits(),
        clock=lambda: NOW + 0.9,
    )
    project = await store.ensure_project("default")
    yield World(service, store, blobs, project.id)
    await store.close()


async def test_times_are_whole_seconds_of_the_given_clock(world: World) -> None:
    batch = await world.add_batch()

    assert (batch.created_at, batch.expires_at) == (NOW, NOW + 86400)
    file = await world.service.get_file(world.project_id, batch.input_file_id)
    assert (file.created_at, file.expires_at) == (NOW, NOW + 30 * 86400)


@pytest.mark.parametrize(
    ("first", "now_is"),
    [
        ([BatchStatus.IN_PROGRESS], BatchStatus.CANCELLING),
        ([BatchStatus.CANCELLING], BatchStatus.CANCELLING),
        ([BatchStatus.CANCELLING, BatchStatus.CANCELLED], BatchStatus.CANCELLED),
    ],
)
async def test_a_cancel_goes_by_what_the_batch_has_become_meanwhile(
    world: World, first: list[BatchStatus], now_is: BatchStatus
) -> None:
    batch = await world.add_batch()

    async def meanwhile() -> None:
        for status in first:
            await world.store.move_batch(batch.id, status, now=NOW)

    world.store.after_get_batch = meanwhile

    assert (await world.service.cancel_batch(world.project_id, batch.id)).status is now_is


async def test_a_cancel_loses_against_an_end_that_comes_first(world: World) -> None:
    batch = await world.add_batch()
    world.store.after_get_batch = lambda: world.store.move_batch(
        batch.id, BatchStatus.FAILED, now=NOW
    )

    with pytest.raises(Conflict, match="Cannot cancel a batch with status 'failed'"):
        await world.service.cancel_batch(world.project_id, batch.id)


async def test_the_output_of_a_batch_that_ends_meanwhile_is_its_final_one(
    world: World,
) -> None:
    batch = await world.add_batch()
    output = await world.add_input()
    result = File(
        id=FileId("file-result"),
        project_id=world.project_id,
        purpose=Purpose.BATCH_OUTPUT,
        filename="output.jsonl",
        bytes=output.bytes,
        sha256=output.sha256,
        blob_key=output.blob_key,
        created_at=NOW,
    )

    async def meanwhile() -> None:
        for status in (BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING):
            await world.store.move_batch(batch.id, status, now=NOW)
        change = BatchChange(output=result)
        await world.store.move_batch(batch.id, BatchStatus.COMPLETED, now=NOW, change=change)

    world.store.after_get_batch = meanwhile

    assert await world.read_output(batch.id) == LINE


async def test_a_batch_is_not_created_from_a_file_that_is_deleted_meanwhile(
    world: World,
) -> None:
    file = await world.add_input()
    world.store.after_get_file = lambda: world.store.delete_file(
        world.project_id, file.id, now=1
    )

    with pytest.raises(NotFound) as caught:
        await world.service.create_batch(
            world.project_id, input_file_id=file.id, endpoint="/v1/embeddings"
        )
    assert caught.value.param == "input_file_id"


async def test_of_two_deletes_one_finds_the_file_gone(world: World) -> None:
    file = await world.add_input()
    world.store.after_get_file = lambda: world.store.delete_file(
        world.project_id, file.id, now=1
    )

    with pytest.raises(NotFound, match=f"No such File object: {file.id}"):
        await world.service.delete_file(world.project_id, file.id)


async def test_a_file_that_cannot_be_published_leaves_no_bytes(world: World) -> None:
    world.store.does_add_file_fail = True

    with pytest.raises(StorageUnavailable):
        await world.add_input()
    assert await world.stored_keys() == []


async def test_the_input_of_a_running_batch_is_kept_when_its_file_is_deleted(
    world: World,
) -> None:
    batch = await world.add_batch()

    await world.service.delete_file(world.project_id, batch.input_file_id)

    assert await world.stored_keys() == [batch.input_blob_key]


@pytest.mark.parametrize(
    ("fields", "pieces", "declared_bytes"),
    [
        ({"purpose": "batch"}, [LINE] * 50, None),
        ({"purpose": "user_data"}, [LINE] * 50, None),
        ({}, [LINE] * 50, None),
        ({"purpose": "batch"}, [LINE] * 50, 1 << 30),
        ({"purpose": "cats"}, [LINE] * 50, None),
        ({"purpose": "batch"}, [b"no json\n"] * 50, None),
    ],
)
async def test_a_file_is_refused_before_all_of_it_has_come(
    fields: dict[str, str], pieces: list[bytes], declared_bytes: int | None
) -> None:
    form = Form(pieces, fields=fields, declared_bytes=declared_bytes)
    limit = 10 * len(LINE)
    intake = Intake(form, input_file_bytes=limit, upload_file_bytes=limit)

    passed = 0
    with pytest.raises(InvalidRequest):
        async for _ in intake.chunks():
            passed += 1

    is_counted = declared_bytes is None and pieces[0] == LINE and "cats" not in fields.values()
    assert passed == (10 if is_counted else 0)
    assert form.taken == passed + 1
