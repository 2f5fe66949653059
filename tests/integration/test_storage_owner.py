"""A storage belongs to one database: another's processes leave it alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.app import open_app
from penstock.errors import InvalidSettings
from penstock.settings import Settings
from tests.object_stores import S3Bucket, moto


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Bucket]:
    with moto() as server:
        raw = S3Bucket(server)
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.access_key_id)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret_access_key)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        yield raw


def settings(bucket: S3Bucket, data_dir: Path) -> Settings:
    return Settings(data_dir=data_dir, storage_url=bucket.url)


async def test_a_second_database_does_not_start_on_it_and_deletes_nothing(
    bucket: S3Bucket, tmp_path: Path
) -> None:
    async with open_app(settings(bucket, tmp_path / "first")) as app:
        owner = app.project_id
    bucket.set("files/some", b"of the first")
    before = bucket.everything()

    with pytest.raises(InvalidSettings, match="belongs to another Penstock database"):
        async with open_app(settings(bucket, tmp_path / "second")):
            pass

    assert bucket.everything() == before
    assert bucket.get("owner") == owner.encode()


async def test_the_first_database_finds_it_again(bucket: S3Bucket, tmp_path: Path) -> None:
    for _ in range(2):
        async with open_app(settings(bucket, tmp_path / "first")):
            pass

    assert [key.rpartition("/")[2] for key in bucket.everything()] == ["owner"]
