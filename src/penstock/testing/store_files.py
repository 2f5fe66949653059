"""The contract kit of files.

Inherit from `FileContract` beside `StoreContract`, whose fixtures it uses.
"""

from dataclasses import replace

import pytest

from penstock.errors import NotFound
from penstock.model import BatchStatus, FileId, Project, Purpose
from penstock.store.base import Page, Store
from penstock.testing.store import NOON, move, names_of_files, new_file, start


class FileContract:
    """Inherit, beside `StoreContract`."""

    async def test_a_file_comes_back_as_it_was_added(self, store: Store, red: Project) -> None:
        file = replace(new_file(red), expires_at=NOON + 60, bytes=2**40)
        await store.add_file(file)

        assert await store.get_file(red.id, file.id) == file

    async def test_another_projects_file_is_not_found(
        self, store: Store, red: Project, blue: Project
    ) -> None:
        await store.add_file(new_file(red))

        with pytest.raises(NotFound, match=r"^No such File object: file-1$"):
            await store.get_file(blue.id, FileId("file-1"))
        assert await names_of_files(store, blue.id) == []

    async def test_files_are_listed_by_creation_both_ways(
        self, store: Store, red: Project
    ) -> None:
        names = ["file-b", "file-c", "file-a"]
        for name in names:
            await store.add_file(new_file(red, name))

        for newest_first in (True, False):
            files = await store.list_files(
                red.id, Page(limit=9), purpose=None, newest_first=newest_first
            )
            assert [file.id for file in files] == (names[::-1] if newest_first else names)

    async def test_files_are_listed_by_purpose(self, store: Store, red: Project) -> None:
        await store.add_file(new_file(red, "file-1"))
        await store.add_file(replace(new_file(red, "file-2"), purpose=Purpose.BATCH_OUTPUT))

        files = await store.list_files(
            red.id, Page(limit=9), purpose=Purpose.BATCH_OUTPUT, newest_first=True
        )

        assert [file.id for file in files] == ["file-2"]

    @pytest.mark.parametrize("newest_first", [True, False])
    async def test_a_page_of_files_begins_after_the_last_one(
        self, store: Store, red: Project, newest_first: bool
    ) -> None:
        names = [f"file-{number}" for number in range(5)]
        for name in names:
            await store.add_file(new_file(red, name))

        pages: list[list[str]] = []
        after = None
        while True:
            page = Page(limit=2, after=after)
            files = await store.list_files(
                red.id, page, purpose=None, newest_first=newest_first
            )
            if not files:
                break
            pages.append([file.id for file in files])
            after = files[-1].id

        listed = names[::-1] if newest_first else names
        assert pages == [listed[0:2], listed[2:4], listed[4:5]]

    async def test_a_new_file_moves_no_page(self, store: Store, red: Project) -> None:
        for name in ("file-1", "file-2", "file-3"):
            await store.add_file(new_file(red, name))
        first = await names_of_files(store, red.id, limit=2)

        await store.add_file(new_file(red, "file-4"))

        assert first == ["file-3", "file-2"]
        assert await names_of_files(store, red.id, limit=2, after="file-2") == ["file-1"]

    async def test_no_file_comes_after_one_that_is_not_there(
        self, store: Store, red: Project, blue: Project
    ) -> None:
        await store.add_file(new_file(red, "file-1"))
        await store.add_file(new_file(blue, "file-2"))

        assert await names_of_files(store, red.id, after="file-9") == []
        assert await names_of_files(store, red.id, after="file-2") == []

    async def test_a_list_goes_on_behind_a_file_that_was_deleted(
        self, store: Store, red: Project, blue: Project
    ) -> None:
        for number in range(1, 6):
            await store.add_file(new_file(red, f"file-{number}"))
        for number in (3, 5):
            await store.delete_file(red.id, FileId(f"file-{number}"), now=NOON)

        names = ["file-4", "file-2", "file-1"]
        assert await names_of_files(store, red.id, after="file-5") == names
        assert await names_of_files(store, red.id, after="file-3") == ["file-2", "file-1"]
        assert await names_of_files(store, blue.id, after="file-3") == []
        await store.forget_ended(ended_before=NOON, begun_before=0)
        assert len(await names_of_files(store, red.id, after="file-5")) == 3
        await store.forget_ended(ended_before=NOON + 1, begun_before=0)
        assert await names_of_files(store, red.id, after="file-5") == []

    async def test_a_deleted_file_is_gone(self, store: Store, red: Project) -> None:
        await store.add_file(new_file(red))

        assert await store.delete_file(red.id, FileId("file-1"), now=NOON) == new_file(red)

        assert await names_of_files(store, red.id) == []
        with pytest.raises(NotFound):
            await store.get_file(red.id, FileId("file-1"))
        with pytest.raises(NotFound):
            await store.delete_file(red.id, FileId("file-1"), now=NOON)

    async def test_another_projects_file_cannot_be_deleted(
        self, store: Store, red: Project, blue: Project
    ) -> None:
        await store.add_file(new_file(red))

        with pytest.raises(NotFound):
            await store.delete_file(blue.id, FileId("file-1"), now=NOON)
        assert await names_of_files(store, red.id) == ["file-1"]

    async def test_bytes_that_a_batch_still_reads_are_kept(self, store: Store) -> None:
        batch = await start(store)

        assert await store.delete_file(batch.project_id, batch.input_file_id, now=NOON) is None
        assert await store.unused_blobs({batch.input_blob_key}) == set()
        with pytest.raises(NotFound):
            await store.get_file(batch.project_id, batch.input_file_id)

    async def test_bytes_that_only_a_final_batch_has_read_may_go(self, store: Store) -> None:
        batch = await start(store)
        await move(store, BatchStatus.CANCELLING, BatchStatus.CANCELLED)

        assert (
            await store.delete_file(batch.project_id, batch.input_file_id, now=NOON) is not None
        )

    async def test_bytes_of_a_deleted_file_are_unused_when_its_batch_has_ended(
        self, store: Store
    ) -> None:
        batch = await start(store)
        await store.delete_file(batch.project_id, batch.input_file_id, now=NOON)

        await move(store, BatchStatus.FINALIZING, BatchStatus.COMPLETED)

        assert await store.unused_blobs({batch.input_blob_key}) == {batch.input_blob_key}

    async def test_bytes_that_another_file_names_are_kept(
        self, store: Store, red: Project, blue: Project
    ) -> None:
        await store.add_file(new_file(red))
        await store.add_file(replace(new_file(blue, "file-2"), blob_key="blobs/file-1"))

        assert await store.delete_file(red.id, FileId("file-1"), now=NOON) is None
        assert await store.unused_blobs(["blobs/file-1"]) == set()
        assert await store.delete_file(blue.id, FileId("file-2"), now=NOON) is not None

    async def test_blobs_that_nothing_names_are_unused(
        self, store: Store, red: Project
    ) -> None:
        await store.add_file(new_file(red))
        others = {f"blobs/other-{number}" for number in range(3000)}

        assert await store.unused_blobs({"blobs/file-1", *others}) == others
        assert await store.unused_blobs([]) == set()

    async def test_files_expire_at_their_time(self, store: Store, red: Project) -> None:
        for name, expires_at in (("file-1", NOON + 1), ("file-2", NOON), ("file-3", None)):
            await store.add_file(replace(new_file(red, name), expires_at=expires_at))

        assert await store.list_expired_files(now=NOON - 1, limit=9) == []
        expired = await store.list_expired_files(now=NOON, limit=9)
        assert [file.id for file in expired] == ["file-2"]
        assert len(await store.list_expired_files(now=NOON + 1, limit=9)) == 2
        assert len(await store.list_expired_files(now=NOON + 1, limit=1)) == 1
