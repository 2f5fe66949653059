"""Where bytes are kept, by the URL that the settings give."""

import asyncio
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from obstore.exceptions import BaseError, UnknownConfigurationKeyError
from obstore.store import AzureStore, GCSStore, S3Store

from penstock.blobs.folder import FolderBlobs
from penstock.blobs.objects import ObjectBlobs
from penstock.errors import InvalidSettings, NotFound

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

_ALLOWED = "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, or a folder"
_STORES = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
_ENDPOINTS = ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long an object store is waited for. One request takes at most `retry_s` and
    `request_timeout_s` together."""

    connect_timeout_s: float = 5
    request_timeout_s: float = 30
    """From the connection to the last byte of the answer."""
    retries: int = 4
    """How often a request is sent again after a failure that may pass."""
    retry_s: float = 45
    """How long after its first attempt a request may be sent again."""


def open_blobs(
    url: str, options: Mapping[str, str], *, patience: Patience | None = None
) -> FolderBlobs | ObjectBlobs:
    """Open the place where bytes are kept. Nothing is asked of it yet, but that a folder is
    made if it is not there.

    Args:
        url: `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix` or a folder.
        options: What obstore should know of an object store beside its environment variables,
            under their names without `AWS_` and the like: `region`, `endpoint`, ... A folder
            has none.

    Raises:
        InvalidSettings: `url` is none of these, or an option is unknown or wrong.
    """
    scheme, mark, rest = url.partition("://")
    if not mark or scheme == "file":
        if options:
            raise InvalidSettings(f"The storage {url} is a folder, which has no options.")
        return FolderBlobs(Path(rest if mark else url).expanduser())
    bucket, prefix = _parse(url)
    patience = patience or Patience()
    client: ClientConfig = {
        "connect_timeout": timedelta(seconds=patience.connect_timeout_s),
        "timeout": timedelta(seconds=patience.request_timeout_s),
        "allow_http": _names_plain_http(options),
    }
    retry: RetryConfig = {
        "max_retries": patience.retries,
        "retry_timeout": timedelta(seconds=patience.retry_s),
        "backoff": {"max_backoff": timedelta(seconds=5)},
    }
    # Their names are checked by obstore, which has a type of its own for each store's.
    config = cast("Any", dict(options))
    try:
        store = _STORES[scheme](
            bucket,
            prefix=prefix,
            config=config,
            client_options=client,
            retry_config=retry,
        )
    except UnknownConfigurationKeyError as error:
        raise InvalidSettings(f"The storage {url}: {_first_line(error)}") from error
    except (BaseError, ValueError) as error:
        raise InvalidSettings(
            f"The storage {url} cannot be used: {_first_line(error)}."
        ) from error
    return ObjectBlobs(store, url=url, takes_many_deletes=scheme == "s3")


async def look_at(blobs: FolderBlobs | ObjectBlobs, *, key: str, wants_room: bool) -> None:
    """See whether a storage can be reached, at as little cost as can be.

    Args:
        key: A small object to look for; whether it is there does not matter.
        wants_room: Whether a folder must have room.

    Raises:
        StorageUnavailable: It cannot be reached, or a folder lacks the room that is wanted.
    """
    if isinstance(blobs, FolderBlobs):
        await asyncio.to_thread(blobs.look, wants_room=wants_room)
    else:
        with suppress(NotFound):  # which is an answer
            await blobs.get_range(key, 0, 1)


def _parse(url: str) -> tuple[str, str | None]:
    parts = urlsplit(url)
    if parts.scheme not in _STORES or not parts.hostname:
        raise InvalidSettings(f"The storage URL {_shown(url)} is none of: {_ALLOWED}.")
    if "@" in parts.netloc or parts.port is not None or parts.query or parts.fragment:
        raise InvalidSettings(
            f"The storage URL {_shown(url)} has more than a bucket and a prefix; endpoint and "
            "credentials are given in the environment or as options."
        )
    return parts.netloc, parts.path.strip("/") or None


def _shown(url: str) -> str:
    """The URL without what may be a secret."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('?')[0].partition('#')[0].rpartition('@')[2]}"


def _names_plain_http(options: Mapping[str, str]) -> bool:
    """Whether an endpoint without TLS was named, which is then meant."""
    named = [value for name, value in options.items() if "endpoint" in name.lower()]
    named += [os.environ.get(name, "") for name in _ENDPOINTS]
    return any(value.startswith("http://") for value in named)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
