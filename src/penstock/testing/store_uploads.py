"""The contract kit of what a store keeps of uploads.

Inherit from `UploadContract` beside `StoreContract`, whose fixtures it uses.
"""

import asyncio
from dataclasses import replace

import pytest

from penstock.errors import Conflict, NotFound
from penstock.model import (
    Once,
    Part,
    PartId,
    Project,
    Purpose,
    Upload,
    UploadId,
    UploadStatus,
)
from penstock.store.base import Store
from penstock.testing.store import NOON, new_file

HOUR_S = 3600
ENDS = [status for status in UploadStatus if status is not UploadStatus.PENDING]


def new_upload(project: Project, name: str = "upload_1") -> Upload:
    return Upload(
        id=UploadId(name),
        project_id=project.id,
        purpose=Purpose.BATCH,
        filename="questions.jsonl",
        mime_type="text/jsonl",
        bytes=1200,
        file_life_s=7200,
        created_at=NOON,
        expires_at=NOON + HOUR_S,
    )


def new_part(name: str = "part_1", upload: str = "upload_1") -> Part:
    return Part(
        id=PartId(name),
        upload_id=UploadId(upload),
        bytes=600,
        blob_key=f"parts/{name}",
        created_at=NOON,
    )


async def start(store: Store, project: Project, *parts: str) -> Upload:
    """Add an upload with these parts."""
    upload = await store.add_upload(new_upload(project))
    for name in parts:
        await store.add_part(project.id, new_part(name), now=NOON)
    return upload


async def end(
    store: Store, project: Project, status: UploadStatus, *, now: int = NOON
) -> Upload:
    is_whole = status is UploadStatus.COMPLETED
    return await store.end_upload(
        UploadId("upload_1"),
        status,
        now=now,
        part_ids=[PartId("part_2"), PartId("part_1")] if is_whole else (),
        file=new_file(project) if is_whole else None,
    )


class UploadContract:
    """Inherit, beside `StoreContract`."""

    async def test_an_upload_comes_back_as_it_was_added(
        self, store: Store, red: Project
    ) -> None:
        upload = new_upload(red)

        assert await store.add_upload(upload) == upload
        assert await store.get_upload(red.id, upload.id) == upload
        assert await store.list_parts(upload.id) == []

    async def test_another_projects_upload_is_not_found(
        self, store: Store, red: Project, blue: Project
    ) -> None:
        upload = await start(store, red)

        for project, name in ((blue, "upload_1"), (red, "upload_2")):
            with pytest.raises(NotFound, match=f"^No such Upload object: {name}$"):
                await store.get_upload(project.id, UploadId(name))
            with pytest.raises(NotFound):
                await store.add_part(project.id, new_part(upload=name), now=NOON)
        assert await store.list_parts(upload.id) == []

    async def test_parts_are_listed_as_they_came(self, store: Store, red: Project) -> None:
        upload = await start(store, red, "part_2", "part_1")

        assert await store.list_parts(upload.id) == [new_part("part_2"), new_part("part_1")]

    async def test_the_bytes_of_parts_are_used_until_the_upload_ends(
        self, store: Store, red: Project
    ) -> None:
        await start(store, red, "part_1")
        assert await store.unused_blobs(["parts/part_1", "parts/other"]) == {"parts/other"}

        await end(store, red, UploadStatus.CANCELLED)

        assert await store.unused_blobs(["parts/part_1"]) == {"parts/part_1"}

    async def test_a_completed_upload_has_its_file(self, store: Store, red: Project) -> None:
        upload = await start(store, red, "part_1", "part_2", "part_3")

        ended = await end(store, red, UploadStatus.COMPLETED)

        assert ended == replace(
            upload,
            status=UploadStatus.COMPLETED,
            part_ids=(PartId("part_2"), PartId("part_1")),
            file=new_file(red),
        )
        assert await store.get_upload(red.id, upload.id) == ended
        assert await store.get_file(red.id, new_file(red).id) == new_file(red)
        assert await store.list_parts(upload.id) == []
        await store.delete_file(red.id, new_file(red).id, now=NOON)
        assert (await store.get_upload(red.id, upload.id)).file is None

    @pytest.mark.parametrize("status", ENDS)
    async def test_an_upload_that_has_ended_stays_as_it_is(
        self, store: Store, red: Project, status: UploadStatus
    ) -> None:
        await start(store, red, "part_1", "part_2")
        before = await end(store, red, status)
        assert before.status is status

        for other in ENDS:
            with pytest.raises(Conflict):
                await end(store, red, other)
        with pytest.raises(Conflict):
            await store.add_part(red.id, new_part("part_4"), now=NOON)

        assert await store.get_upload(red.id, before.id) == before
        assert await store.list_parts(before.id) == []

    async def test_an_upload_whose_time_is_over_can_only_be_given_up(
        self, store: Store, red: Project
    ) -> None:
        upload = await start(store, red, "part_1", "part_2")
        late = upload.expires_at

        with pytest.raises(Conflict):
            await store.add_part(red.id, new_part("part_3"), now=late)
        with pytest.raises(Conflict):
            await end(store, red, UploadStatus.COMPLETED, now=late)
        with pytest.raises(NotFound):
            await store.get_file(red.id, new_file(red).id)

        await store.add_part(red.id, new_part("part_3"), now=late - 1)
        assert (await end(store, red, UploadStatus.EXPIRED, now=late)).file is None

    async def test_of_ends_that_race_one_wins(self, store: Store, red: Project) -> None:
        await start(store, red, "part_1", "part_2")

        ends = await asyncio.gather(
            *(end(store, red, status) for status in ENDS), return_exceptions=True
        )

        assert [type(each) for each in ends].count(Conflict) == len(ENDS) - 1

    async def test_an_upload_that_is_not_there_cannot_be_ended(self, store: Store) -> None:
        with pytest.raises(NotFound):
            await store.end_upload(UploadId("upload_9"), UploadStatus.CANCELLED, now=NOON)

    async def test_pending_uploads_are_late_from_their_time_on(
        self, store: Store, red: Project, blue: Project
    ) -> None:
        uploads = [
            await store.add_upload(new_upload(project, f"upload_{number}"))
            for number, project in enumerate((red, blue, red), 1)
        ]
        await end(store, red, UploadStatus.CANCELLED)
        late = NOON + HOUR_S

        assert await store.list_late_uploads(now=late - 1, limit=9) == []
        assert await store.list_late_uploads(now=late, limit=9) == uploads[1:]
        assert len(await store.list_late_uploads(now=late, limit=1)) == 1

    async def test_uploads_and_parts_are_made_once(self, store: Store, red: Project) -> None:
        once = Once(fingerprint="f" * 64, key="k", began_at=NOON)
        upload = await store.add_upload(new_upload(red), once=once)

        assert await store.add_upload(new_upload(red, "upload_2"), once=once) == upload

        other = replace(once, key="part", fingerprint="e" * 64)
        part = await store.add_part(red.id, new_part(), now=NOON, once=other)
        again = await store.add_part(red.id, new_part("part_2"), now=NOON, once=other)
        assert again == part
        assert await store.list_parts(upload.id) == [part]

    async def test_uploads_that_ended_long_ago_are_forgotten(
        self, store: Store, red: Project
    ) -> None:
        upload = await start(store, red, "part_1", "part_2")
        await store.forget_ended(ended_before=NOON + 9, begun_before=0)
        await end(store, red, UploadStatus.COMPLETED, now=NOON + 1)

        await store.forget_ended(ended_before=NOON + 1, begun_before=0)
        assert (await store.get_upload(red.id, upload.id)).status is UploadStatus.COMPLETED

        await store.forget_ended(ended_before=NOON + 2, begun_before=0)
        with pytest.raises(NotFound):
            await store.get_upload(red.id, upload.id)
        assert await store.get_file(red.id, new_file(red).id) == new_file(red)
