"""The key that the first start of a cluster's API makes."""

from pathlib import Path

import pytest

from penstock.app import open_app
from penstock.errors import InvalidSettings
from penstock.places import KEY_FILE
from penstock.settings import Settings
from penstock.store.sql import SqlStore


def settings(database_url: str, data_dir: Path) -> Settings:
    return Settings(data_dir=data_dir, database_url=database_url, storage_url="s3://unasked")


async def test_it_is_kept_in_a_data_directory_that_was_not_there(
    migrated_url: str, tmp_path: Path
) -> None:
    data_dir = tmp_path / "not" / "there"

    async with open_app(settings(migrated_url, data_dir), works=False) as app:
        first = app.first_key
        assert (await app.service.authenticate(first)).project_id == app.project_id
    async with open_app(settings(migrated_url, data_dir), works=False) as app:
        second = app.first_key

    assert first is not None and second is None
    assert (data_dir / KEY_FILE).read_text() == f"{first}\n"
    assert (data_dir / KEY_FILE).stat().st_mode & 0o777 == 0o600


async def test_none_is_made_where_it_cannot_be_kept(migrated_url: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    data_dir = tmp_path / "file" / "data"

    with pytest.raises(InvalidSettings, match=r"cannot be used.*api_key"):
        async with open_app(settings(migrated_url, data_dir), works=False):
            pass

    store = SqlStore(migrated_url, jobs=None)
    await store.open()
    assert await store.list_keys() == []
    await store.close()
