"""The SQL store on PostgreSQL: the contract, and what is PostgreSQL's own."""

from collections.abc import AsyncIterator

import pytest

from penstock.store.sql import SqlStore
from penstock.testing.store import RecordedJobs, StoreContract
from penstock.testing.store_creations import CreationContract
from penstock.testing.store_files import FileContract
from penstock.testing.store_slices import SliceContract
from penstock.testing.store_uploads import UploadContract
from penstock.testing.store_webhooks import WebhookContract


@pytest.fixture
def jobs() -> RecordedJobs:
    return RecordedJobs()


@pytest.fixture
async def store(migrated_url: str, jobs: RecordedJobs) -> AsyncIterator[SqlStore]:
    store = SqlStore(migrated_url, jobs=jobs)
    await store.open()
    yield store
    await store.close()


class TestSqlStore(
    StoreContract,
    FileContract,
    SliceContract,
    CreationContract,
    UploadContract,
    WebhookContract,
):
    @pytest.fixture
    async def store(self, migrated_url: str, jobs: RecordedJobs) -> AsyncIterator[SqlStore]:
        store = SqlStore(migrated_url, jobs=jobs)
        await store.open()
        yield store
        await store.close()
