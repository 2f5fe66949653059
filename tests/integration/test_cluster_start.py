"""The API of a cluster: its first key, and what `check` asks of it."""

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from penstock.app import open_app
from penstock.checkup import Verdict, check_all
from penstock.errors import InvalidSettings
from penstock.places import KEY_FILE
from penstock.settings import Settings
from penstock.store.sql import SqlStore


@pytest.fixture(autouse=True)
def nobody_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Object storage that answers at once, with a no."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")


def settings(url: str, data_dir: Path) -> Settings:
    return Settings(database_url=url, storage_url="s3://bucket", data_dir=data_dir)


async def find_keys(url: str) -> int:
    store = SqlStore(url)
    await store.open()
    try:
        return len(await store.list_keys())
    finally:
        await store.close()


async def test_the_first_start_keeps_its_key_where_there_is_no_data_directory_yet(
    migrated_url: str, tmp_path: Path
) -> None:
    folder = tmp_path / "not" / "there"

    async with open_app(settings(migrated_url, folder), works=False) as app:
        assert app.first_key is not None
        owner = await app.service.authenticate(app.first_key)
        assert owner.project_id == app.project_id

    assert (folder / KEY_FILE).read_text() == f"{app.first_key}\n"
    assert (folder / KEY_FILE).stat().st_mode & 0o777 == 0o600


def make_a_file(place: Path) -> None:
    place.touch()


def make_a_way_through_a_file(place: Path) -> None:
    place.parent.touch()


def make_a_folder_with_a_file_in_the_way(place: Path) -> None:
    place.mkdir()
    (place / "segments").touch()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_a_file, "(Not a directory|File exists)"),
        (make_a_way_through_a_file, "Not a directory"),
        (make_a_folder_with_a_file_in_the_way, "File exists"),
    ],
)
@pytest.mark.parametrize("works", [False, True])
async def test_files_without_a_place_are_refused_in_the_words_of_the_settings(
    migrated_url: str,
    tmp_path: Path,
    make: Callable[[Path], None],
    reason: str,
    works: bool,
) -> None:
    place = tmp_path / "folder" / "data"
    if make is not make_a_way_through_a_file:
        place.parent.mkdir()
    make(place)

    with pytest.raises(InvalidSettings) as refused:
        async with open_app(Settings(database_url=migrated_url, data_dir=place), works=works):
            pass

    assert re.fullmatch(
        rf"data_dir is {place}, where files are kept as storage_url is not set, and it cannot "
        rf"be used \({reason}\); it must be a directory that this user can write to, or that "
        r"can be made\. Or set storage_url\.",
        str(refused.value),
    )


async def test_a_data_directory_that_takes_no_writes_is_refused(
    migrated_url: str, tmp_path: Path
) -> None:
    place = tmp_path / "data"
    for name in ("blobs", "segments"):
        (place / name).mkdir(parents=True)

    with (
        read_only(place),
        pytest.raises(InvalidSettings, match=f"data_dir is {place}, .* cannot be written to"),
    ):
        async with open_app(Settings(database_url=migrated_url, data_dir=place)):
            pass


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Let nobody write below a folder, not even root; skips the test where that is not
    allowed."""
    bind = ["mount", "--bind", str(folder), str(folder)]
    if subprocess.run(bind, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not allow to mount a folder")
    try:
        subprocess.run(
            ["mount", "-o", "remount,bind,ro", str(folder)], capture_output=True, check=True
        )
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=True)


async def test_a_first_key_that_cannot_be_kept_is_not_made(
    migrated_url: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(InvalidSettings, match=r"`penstock keys create --project default`"):
        async with open_app(settings(migrated_url, tmp_path / "file"), works=False):
            pass

    assert await find_keys(migrated_url) == 0


async def test_a_cluster_is_not_checked_for_a_data_directory_that_it_does_not_have(
    migrated_url: str, tmp_path: Path
) -> None:
    with_folder = await check_all(Settings(database_url=migrated_url, data_dir=tmp_path))
    without = await check_all(settings(migrated_url, tmp_path))

    assert [finding.what for finding in without] == ["database", "storage", "upstreams"]
    assert [finding.what for finding in with_folder] == [
        "data directory",
        "database",
        "storage",
        "upstreams",
    ]
    assert with_folder[2].verdict is Verdict.NOTE
    assert "set storage_url" in with_folder[2].message
