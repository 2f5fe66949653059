"""Where bytes are kept, by URL, and what is said when that is wrong."""

import re
from pathlib import Path

import pytest
from obstore.exceptions import GenericError, PermissionDeniedError

from penstock.blobs.folder import FolderBlobs
from penstock.blobs.objects import ObjectBlobs
from penstock.blobs.storage import open_blobs
from penstock.blobs.storage_errors import explain
from penstock.errors import InvalidSettings

AZURE = {"account_name": "account", "account_key": "c2VjcmV0"}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ACCOUNT_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/", "s3://bucket/a/b", "gs://b/c"])
def test_a_url_names_a_bucket_and_a_prefix(url: str) -> None:
    assert isinstance(open_blobs(url, {}), ObjectBlobs)


def test_azure_is_a_container_of_an_account() -> None:
    assert isinstance(open_blobs("az://container/prefix", AZURE), ObjectBlobs)
    with pytest.raises(InvalidSettings, match="Account must be specified"):
        open_blobs("az://container", {})


@pytest.mark.parametrize("form", ["{}", "file://{}"])
async def test_what_has_no_scheme_is_a_folder(tmp_path: Path, form: str) -> None:
    blobs = open_blobs(form.format(tmp_path / "blobs"), {})

    assert isinstance(blobs, FolderBlobs)
    await blobs.check()
    assert (tmp_path / "blobs").is_dir()


@pytest.mark.parametrize("url", ["http://host/b", "s3://", "s3:///prefix", "ftp://b", "x://b"])
def test_another_url_is_refused_with_what_is_allowed(url: str) -> None:
    with pytest.raises(InvalidSettings, match="none of: s3://bucket/prefix, gs://"):
        open_blobs(url, {})


@pytest.mark.parametrize(
    "url",
    ["s3://key:pa55@bucket/a", "s3://bucket/a?sig=pa55", "s3://bucket/a#pa55", "s3://pa:1/a"],
)
def test_secrets_have_no_place_in_a_url_and_are_not_told(url: str) -> None:
    with pytest.raises(InvalidSettings, match="in the environment or as options") as told:
        open_blobs(url, {})

    assert "pa55" not in str(told.value)


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(InvalidSettings, match="s3://bucket: Configuration key: 'zone'"):
        open_blobs("s3://bucket", {"zone": "eu"})


def test_a_folder_has_no_options(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="is a folder, which has no options"):
        open_blobs(str(tmp_path), {"region": "eu"})


def test_what_obstore_lets_be_set_of_its_client_is_an_option() -> None:
    open_blobs("s3://bucket", {"timeout": "5s", "proxy_url": "http://127.0.0.1:1"})


SIGNED = "Generic MicrosoftAzure error: failed for url (https://a.b/c?sig=s3cret), again."
XML = "status code: {}: <Error><Code>{}</Code><Message>no</Message></Error>"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (GenericError(XML.format(507, "InsufficientStorage")), "it is full or over its quota"),
        (PermissionDeniedError(XML.format(403, "QuotaExceeded")), "it is full or over its"),
        (PermissionDeniedError(XML.format(403, "AccessDenied")), r"a right \(AccessDenied\)"),
        (GenericError(XML.format(401, "InvalidToken")), "refuses the credentials"),
        (FileNotFoundError(XML.format(404, "NoSuchBucket")), "there is no such bucket"),
        (GenericError(XML.format(404, "ContainerNotFound")), "there is no such bucket"),
        (GenericError(XML.format(503, "ServerBusy")), r"too much to do \(ServerBusy\)"),
        (GenericError("Server returned status code: 429 Too Many"), r"to do \(429\)"),
        (GenericError("PUT http://169.254.169.254/latest: Timeout"), "no credentials were"),
        (GenericError("HTTP error: kind: Timeout"), "did not answer in time"),
        (GenericError("status code: 502 Bad Gateway"), r"answered with an error \(502\)"),
        (GenericError(SIGNED), r"failed for url … again"),
        (GenericError(""), "GenericError"),
    ],
)
def test_a_trouble_is_one_sentence_that_says_what_to_do(error: Exception, reason: str) -> None:
    told = explain(error, url="s3://bucket/p", is_write=True)

    assert told.startswith("The storage s3://bucket/p did not take a write: ")
    assert told.endswith(".")
    assert "\n" not in told
    assert "s3cret" not in told
    assert re.search(reason, told)
