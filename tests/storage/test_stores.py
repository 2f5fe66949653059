"""The contracts of blobs and segments on stores that are not ours to configure away."""

import base64
import hashlib
import hmac
import secrets
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import obstore
import pytest
from obstore.store import AzureStore

from penstock.blobs.objects import ObjectBlobs
from penstock.blobs.storage import open_blobs
from penstock.errors import StorageUnavailable
from penstock.store.sql import SqlStore
from penstock.testing.blobs import BlobContract, RawBlobs, chunks_of
from penstock.testing.segments import SegmentsContract
from tests.object_stores import PREFIX, S3Bucket, S3Server
from tests.segment_grounds import ObjectGround, running
from tests.storage.conftest import ACCOUNT, ACCOUNT_KEY

pytestmark = pytest.mark.slow_storage


def made(blobs: object) -> ObjectBlobs:
    assert isinstance(blobs, ObjectBlobs)
    return blobs


@pytest.fixture
def swift_bucket(swift: S3Server) -> S3Bucket:
    return S3Bucket(swift)


@pytest.fixture
def swift_blobs(swift_bucket: S3Bucket) -> ObjectBlobs:
    return made(open_blobs(swift_bucket.url, swift_bucket.server.options()))


class AzureContainer:
    """A new container of Azurite, and what really lies in it."""

    def __init__(self, endpoint: str) -> None:
        self.name = f"container-{secrets.token_hex(6)}"
        self.url = f"az://{self.name}/{PREFIX}"
        self.options = {
            "account_name": ACCOUNT,
            "account_key": ACCOUNT_KEY,
            "endpoint": endpoint,
        }
        self._store = AzureStore(
            self.name,
            config=self.options,
            client_options={"allow_http": True},
        )

    def get(self, key: str) -> bytes | None:
        try:
            return obstore.get(self._store, f"{PREFIX}/{key}").bytes().to_bytes()
        except FileNotFoundError:
            return None

    def set(self, key: str, data: bytes) -> None:
        obstore.put(self._store, f"{PREFIX}/{key}", data)

    def everything(self) -> list[str]:
        pages = obstore.list(self._store)
        return sorted(
            each["path"].removeprefix(f"{PREFIX}/") for page in pages for each in page
        )


def create_container(endpoint: str, name: str) -> None:
    """By Azure's shared key, for obstore makes none."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    told = "".join(f"{key}:{value}\n" for key, value in headers.items())
    resource = f"/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    text = "PUT" + "\n" * 12 + told + resource
    digest = hmac.new(base64.b64decode(ACCOUNT_KEY), text.encode(), hashlib.sha256).digest()
    signature = base64.b64encode(digest).decode()
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{signature}"
    url = f"{endpoint}/{name}?restype=container"
    asked = urllib.request.Request(url, method="PUT", headers=headers, data=None)
    urllib.request.urlopen(asked, timeout=30).close()


@pytest.fixture
def azure_container(azurite: str) -> AzureContainer:
    container = AzureContainer(azurite)
    create_container(azurite, container.name)
    return container


@pytest.fixture
def azure_blobs(azure_container: AzureContainer) -> ObjectBlobs:
    return made(open_blobs(azure_container.url, azure_container.options))


class TestBlobsOnSwift(BlobContract):
    @pytest.fixture
    def raw(self, swift_bucket: S3Bucket) -> RawBlobs:
        return swift_bucket

    @pytest.fixture
    def blobs(self, swift_blobs: ObjectBlobs) -> ObjectBlobs:
        return swift_blobs


class TestBlobsOnAzurite(BlobContract):
    @pytest.fixture
    def raw(self, azure_container: AzureContainer) -> RawBlobs:
        return azure_container

    @pytest.fixture
    def blobs(self, azure_blobs: ObjectBlobs) -> ObjectBlobs:
        return azure_blobs


class TestSegmentsOnSwift(SegmentsContract):
    @pytest.fixture
    def ground(
        self, tmp_path: Path, swift_blobs: ObjectBlobs, swift_bucket: S3Bucket
    ) -> Iterator[ObjectGround]:
        store = SqlStore(f"sqlite:///{tmp_path}/penstock.db")
        with running(ObjectGround, swift_blobs, store, swift_bucket) as ground:
            yield ground


class TestSegmentsOnAzurite(SegmentsContract):
    @pytest.fixture
    def ground(
        self, tmp_path: Path, azure_blobs: ObjectBlobs, azure_container: AzureContainer
    ) -> Iterator[ObjectGround]:
        store = SqlStore(f"sqlite:///{tmp_path}/penstock.db")
        with running(ObjectGround, azure_blobs, store, azure_container) as ground:
            yield ground


async def test_swift_tells_what_is_wrong(swift: S3Server, swift_bucket: S3Bucket) -> None:
    wrong_key = {**swift.options(), "secret_access_key": "wrong"}
    with pytest.raises(StorageUnavailable, match="refuses the credentials"):
        await open_blobs(swift_bucket.url, wrong_key).check()
    with pytest.raises(StorageUnavailable, match="no such bucket"):
        await open_blobs("s3://nothing-here", swift.options()).check()


async def test_azurite_tells_what_is_wrong(azure_container: AzureContainer) -> None:
    wrong_key = {**azure_container.options, "account_key": "d3Jvbmc="}
    with pytest.raises(StorageUnavailable, match="refuses the credentials"):
        await open_blobs(azure_container.url, wrong_key).check()
    with pytest.raises(StorageUnavailable, match="no such bucket"):
        await open_blobs("az://nothing-here", azure_container.options).check()


@pytest.mark.parametrize("where", ["swift", "azurite"])
async def test_a_blob_that_was_put_in_parts_is_read_in_pieces(
    where: str, request: pytest.FixtureRequest
) -> None:
    name = "swift_blobs" if where == "swift" else "azure_blobs"
    blobs: ObjectBlobs = request.getfixturevalue(name)
    data = secrets.token_bytes(1 << 20) * 40

    assert await blobs.put("files/a", chunks_of(data)) == len(data)

    assert b"".join([piece async for piece in blobs.stream("files/a")]) == data
