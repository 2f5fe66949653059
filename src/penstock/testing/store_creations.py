"""The contract kit of creations that happen once.

Inherit from `CreationContract` beside `StoreContract`, whose fixtures it uses.
"""

import asyncio
from dataclasses import replace

import pytest

from penstock.errors import Conflict, NotFound
from penstock.model import KEY_LIFE_S, RETRY_LIFE_S, Once, Project
from penstock.store.base import Store
from penstock.testing.store import NOON, RecordedJobs, names_of_files, new_batch, new_file

FIRST = Once(fingerprint="f" * 64, began_at=NOON)
AGAIN = replace(FIRST, is_retry=True, began_at=NOON + 2)
KEYED = replace(FIRST, key="my-key")


async def made(store: Store, project: Project, name: str, once: Once | None) -> str:
    """Ask for a file of this name; the name of the file that came of it."""
    return (await store.add_file(new_file(project, name), once=once)).id


class CreationContract:
    """Inherit, beside `StoreContract`."""

    async def test_a_request_that_is_sent_again_gets_what_the_first_one_made(
        self, store: Store, red: Project
    ) -> None:
        assert await made(store, red, "file-1", FIRST) == "file-1"
        assert await made(store, red, "file-2", AGAIN) == "file-1"
        assert await made(store, red, "file-3", replace(AGAIN, began_at=NOON + 9)) == "file-1"
        assert await names_of_files(store, red.id) == ["file-1"]

    async def test_a_request_that_is_equal_but_not_sent_again_makes_another(
        self, store: Store, red: Project
    ) -> None:
        await made(store, red, "file-1", FIRST)

        assert await made(store, red, "file-2", replace(FIRST, began_at=NOON + 1)) == "file-2"
        # What is sent again after that is the last one.
        assert await made(store, red, "file-3", AGAIN) == "file-2"

    async def test_a_request_that_was_given_up_while_at_work_gets_what_its_retry_made(
        self, store: Store, red: Project
    ) -> None:
        await made(store, red, "file-2", AGAIN)

        assert await made(store, red, "file-1", FIRST) == "file-2"
        later = replace(FIRST, began_at=AGAIN.began_at + 1)
        assert await made(store, red, "file-3", later) == "file-3"

    async def test_a_retry_of_what_never_arrived_makes_it(
        self, store: Store, red: Project
    ) -> None:
        assert await made(store, red, "file-1", AGAIN) == "file-1"

    async def test_another_request_or_project_has_nothing_to_do_with_it(
        self, store: Store, red: Project, blue: Project
    ) -> None:
        await made(store, red, "file-1", FIRST)

        other = replace(AGAIN, fingerprint="e" * 64)
        assert await made(store, red, "file-2", other) == "file-2"
        assert await made(store, blue, "file-3", AGAIN) == "file-3"

    async def test_a_creation_answers_retries_for_a_while_only(
        self, store: Store, red: Project
    ) -> None:
        await made(store, red, "file-1", FIRST)

        late = replace(AGAIN, began_at=NOON + RETRY_LIFE_S)
        assert await made(store, red, "file-2", late) == "file-2"

    async def test_an_object_that_is_gone_is_made_anew(
        self, store: Store, red: Project
    ) -> None:
        await made(store, red, "file-1", KEYED)
        await store.delete_file(red.id, new_file(red, "file-1").id, now=NOON)

        assert await made(store, red, "file-2", KEYED) == "file-2"
        assert await made(store, red, "file-3", KEYED) == "file-2"

    async def test_a_key_makes_one_object(self, store: Store, red: Project) -> None:
        await made(store, red, "file-1", KEYED)

        for name, began_at in (("file-2", NOON), ("file-3", NOON + KEY_LIFE_S - 1)):
            assert await made(store, red, name, replace(KEYED, began_at=began_at)) == "file-1"
        late = replace(KEYED, began_at=NOON + KEY_LIFE_S)
        assert await made(store, red, "file-4", late) == "file-4"

    async def test_a_key_belongs_to_one_request(
        self, store: Store, red: Project, blue: Project
    ) -> None:
        await made(store, red, "file-1", KEYED)
        other = replace(KEYED, fingerprint="e" * 64)

        with pytest.raises(Conflict, match="my-key"):
            await made(store, red, "file-2", other)

        assert await names_of_files(store, red.id) == ["file-1"]
        assert await made(store, blue, "file-3", other) == "file-3"
        assert await made(store, red, "file-4", replace(other, key="other")) == "file-4"

    async def test_a_request_with_a_key_and_one_without_are_two(
        self, store: Store, red: Project
    ) -> None:
        await made(store, red, "file-1", KEYED)
        assert await made(store, red, "file-2", AGAIN) == "file-2"

    async def test_of_requests_that_race_one_makes_it(self, store: Store, red: Project) -> None:
        names = [f"file-{n}" for n in range(8)]

        results = await asyncio.gather(*(made(store, red, name, KEYED) for name in names))

        assert len(set(results)) == 1
        assert await names_of_files(store, red.id) == results[:1]

    async def test_a_batch_is_made_and_queued_once(
        self, store: Store, red: Project, jobs: RecordedJobs
    ) -> None:
        file = new_file(red)
        await store.add_file(file)
        batch = await store.add_batch(new_batch(file), once=FIRST)
        assert len(jobs.take()) == 2
        await store.delete_file(red.id, file.id, now=NOON)

        again = await store.add_batch(new_batch(file, "batch-2"), once=AGAIN)

        assert again == batch
        assert jobs.take() == []
        with pytest.raises(NotFound):
            await store.add_batch(new_batch(file, "batch-3"), once=None)

    async def test_what_could_not_be_made_is_not_remembered(
        self, store: Store, red: Project
    ) -> None:
        file = new_file(red)
        with pytest.raises(NotFound):
            await store.add_batch(new_batch(file), once=KEYED)
        await store.add_file(file)

        assert (await store.add_batch(new_batch(file), once=KEYED)).id == "batch-1"

    async def test_a_batch_may_need_no_file(self, store: Store, red: Project) -> None:
        batch = replace(new_batch(new_file(red)), input_blob_key="")

        assert await store.add_batch(batch, needs_file=False) == batch

    async def test_old_creations_are_forgotten(self, store: Store, red: Project) -> None:
        await made(store, red, "file-1", FIRST)

        await store.forget_ended(ended_before=0, begun_before=NOON)
        assert await made(store, red, "file-2", AGAIN) == "file-1"

        await store.forget_ended(ended_before=0, begun_before=NOON + 1)
        assert await made(store, red, "file-3", AGAIN) == "file-3"
