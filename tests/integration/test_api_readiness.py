"""What a process says of the database and the storage that it cannot do without."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from penstock.app import App, open_app
from penstock.blobs.folder import FolderBlobs
from penstock.checkup import migrate_database
from penstock.errors import StorageUnavailable
from penstock.executor.upkeep import watch_storage
from penstock.settings import Settings
from penstock.telemetry import Health
from tests.disks import small_disk
from tests.integration.bench import until
from tests.object_stores import Proxy, S3Bucket, moto
from tests.postgres import PostgresServer


async def test_a_database_that_is_away_is_told_until_it_is_back(
    own_postgres: PostgresServer, tmp_path: Path
) -> None:
    url = own_postgres.make_database()
    await migrate_database(url)
    settings = Settings(data_dir=tmp_path, database_url=url)

    async with open_app(settings, works=False) as app:

        async def is_told() -> bool:
            return "database" in app.health.faults()

        async def is_well() -> bool:
            return not app.health.faults()

        await until(is_well)
        own_postgres.stop(immediate=True)
        await until(is_told)
        own_postgres.start()
        await until(is_well)


async def until_told(health: Health) -> str:
    """What it says of the storage once it says anything."""

    async def is_told() -> bool:
        return "file_storage" in health.faults()

    await until(is_told)
    return health.faults()["file_storage"]


async def until_well(health: Health) -> None:
    async def is_well() -> bool:
        return not health.faults()

    await until(is_well)


async def test_a_bucket_that_refuses_is_told_until_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with moto() as server, Proxy(server.url) as proxy:
        bucket = S3Bucket(server)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.access_key_id)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret_access_key)
        monkeypatch.setenv("AWS_REGION", "us-east-1")

        async with open_app(Settings(data_dir=tmp_path, storage_url=bucket.url)) as app:
            assert app.health.faults() == {}
            proxy.rule = lambda method, path: 403
            reason = await until_told(app.health)
            proxy.rule = lambda method, path: None
            await until_well(app.health)
    assert reason.startswith(f"The storage {bucket.url} did not answer: it refuses the")


async def test_a_storage_that_does_not_answer_is_told_in_time() -> None:
    health, goes_on = Health(), asyncio.Event()

    async def look() -> None:
        await goes_on.wait()

    watching = watch_storage(
        look=look, name="s3://bucket", health=health, every_s=0.01, patience_s=0.05
    )
    task = asyncio.create_task(watching)
    reason = await until_told(health)
    goes_on.set()
    await until_well(health)
    task.cancel()

    assert reason.startswith("The storage s3://bucket did not answer within 0.05 s;")


@asynccontextmanager
async def api_alone(postgres: PostgresServer, data_dir: Path) -> AsyncIterator[App]:
    url = postgres.make_database()
    await migrate_database(url)
    settings = Settings(data_dir=data_dir, database_url=url)
    async with open_app(settings, works=False) as app:
        yield app


async def test_an_api_alone_tells_of_a_full_disk_below_its_folder(
    own_postgres: PostgresServer, tmp_path: Path
) -> None:
    with small_disk(tmp_path, bytes=1 << 20) as disk:
        async with api_alone(own_postgres, disk.path / "data") as app:
            await until_well(app.health)
            disk.fill()
            reason = await until_told(app.health)
            disk.make_room()
            await until_well(app.health)
    assert reason == (
        f"The disk of {disk.path / 'data' / 'blobs'} is full; make room there, then work "
        "goes on."
    )


def test_a_folder_that_is_gone_cannot_be_reached(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path / "blobs")
    blobs.look(wants_room=True)

    (tmp_path / "blobs").rmdir()

    with pytest.raises(StorageUnavailable, match="cannot be reached: No such file"):
        blobs.look(wants_room=False)


def test_a_full_disk_is_told_by_who_is_asked_for_room(tmp_path: Path) -> None:
    with small_disk(tmp_path, bytes=1 << 20) as disk:
        blobs = FolderBlobs(disk.path / "blobs")
        disk.fill()

        blobs.look(wants_room=False)
        with pytest.raises(StorageUnavailable, match="is full"):
            blobs.look(wants_room=True)
