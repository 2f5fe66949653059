"""Buckets that a cloud's batch API reads from and writes to, through obstore.

What goes wrong is told in the words of the contract (`upstream.base`). A failed call of the
storage has never taken a job, so whoever submits may try again.
"""

import re
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Sequence,
)
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError
from obstore.store import GCSStore, S3Store

from penstock import __version__
from penstock.errors import (
    InvalidSettings,
    JobNotTaken,
    JobRefused,
    PenstockError,
    UpstreamDown,
)
from penstock.upstream.base import NativeJob
from penstock.upstream.result_lines import ResultLines

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import (
        ClientConfig,
        GCSConfig,
        GCSCredentialProvider,
        RetryConfig,
        S3Config,
        S3CredentialProvider,
    )

INPUT = "input.jsonl"
"""What the lines of a job are called in its folder."""
_PIECE_BYTES = 1 << 20
_PART_BYTES = 16 << 20
"""Of an upload in parts; 10,000 of them make 160 GB."""
_TRANSFER_S = 1800.0
_QUOTE_CHARACTERS = 300
_FAILED = (BaseError, OSError)
"""What obstore raises; that something is not there is Python's own error."""
_REFUSED = (PermissionDeniedError, FileNotFoundError)
"""Not `UnauthenticatedError`, which also means that we have no credentials just now."""
_BUCKET = re.compile(r"[a-z0-9][-._a-z0-9]{1,61}[a-z0-9]")
_PREFIX = re.compile(r"[-!_*'().A-Za-z0-9]+(?:/[-!_*'().A-Za-z0-9]+)*")
_CODE = re.compile(r"<Code>([^<]{1,100})</Code>")


class Place(NamedTuple):
    """A bucket and a path in it."""

    bucket: str
    path: str
    """Without a slash at either end; empty for the bucket as a whole."""

    def url(self, scheme: str) -> str:
        return f"{scheme}://{self.bucket}/{self.path}"

    def inside(self, *names: str) -> "Place":
        return Place(self.bucket, "/".join(part for part in (self.path, *names) if part))


class StoredFile(NamedTuple):
    path: str
    """In its bucket."""
    bytes: int


def parse_place(name: str, scheme: str, url: str) -> Place:
    """The place that a setting names.

    Args:
        name: The upstream's, for messages.
        scheme: `s3` or `gs`.

    Raises:
        InvalidSettings: It is not one.
    """
    start, _, rest = url.partition("://")
    bucket, _, path = rest.partition("/")
    path = path.strip("/")
    if start != scheme or not is_bucket(bucket) or not (not path or _PREFIX.fullmatch(path)):
        raise InvalidSettings(
            f"The batch_storage of upstream {name} is {url!r}; it must be a bucket, and a "
            f"folder in it if you like, such as {scheme}://bucket/folder."
        )
    return Place(bucket, path)


def is_bucket(name: str) -> bool:
    """Whether a bucket may be called that."""
    return _BUCKET.fullmatch(name) is not None


def job_place(job: NativeJob, place: Place, *, header: str) -> Place:
    """The folder of a job.

    Args:
        place: Where files lie unless the client asks for a bucket.
        header: With which it does.

    Raises:
        JobRefused: What it asks for cannot be a bucket.
    """
    bucket = job.parameters.get(header)
    if bucket is not None and not is_bucket(bucket):
        raise JobRefused(f"The header {header} is {bucket!r}; it must be a bucket's name.")
    return Place(bucket or place.bucket, place.path).inside(job.key)


class CloudStorage:
    """The buckets of one cloud that an upstream may use; each is opened when it is needed.

    Args:
        name: The upstream's, for messages.
        open_bucket: Makes a bucket's store, without asking anybody.
    """

    def __init__(self, name: str, open_bucket: "Callable[[str], S3Store | GCSStore]") -> None:
        self._name = name
        self._open = open_bucket
        self._stores: dict[str, S3Store | GCSStore] = {}

    async def hand_in(
        self,
        place: Place,
        records: AsyncIterator[bytes],
        create: Callable[[], Awaitable[str]],
    ) -> str:
        """Keep the lines of a job in its folder and have it created; of one that is not taken
        nothing is left there.

        Args:
            place: The job's folder.
            create: Asks the provider to take the job, whose lines are in `INPUT` there.

        Returns:
            What `create` does.

        Raises:
            JobNotTaken: The lines cannot be kept now.
            JobRefused: They never can be.
        """
        try:
            await self.write_lines(place.inside(INPUT), records)
        except UpstreamDown as error:  # a file alone is no job
            raise JobNotTaken(str(error), retry_after_s=error.retry_after_s) from error
        try:
            return await create()
        except (JobNotTaken, JobRefused):
            with suppress(PenstockError):
                await self.delete_all(place)
            raise

    async def write_lines(self, place: Place, records: AsyncIterator[bytes]) -> None:
        """Keep records as a file of lines, in place of one that is there.

        Raises:
            JobRefused: There is no such bucket, or it may not be written to.
            UpstreamDown: It cannot be written to now.
        """
        source_error: Exception | None = None

        async def pieces() -> AsyncGenerator[bytes]:
            nonlocal source_error
            try:
                async for piece in _join_lines(records):
                    yield piece
            except Exception as error:  # goes through obstore, and out of it as another
                source_error = error
                raise

        try:
            await obstore.put_async(
                self._store(place.bucket),
                place.path,
                pieces(),
                use_multipart=True,
                chunk_size=_PART_BYTES,
                max_concurrency=2,
            )
        except _FAILED as error:
            if source_error is not None:
                raise source_error from None
            message = self._told(error, "take a file of requests", place)
            if isinstance(error, _REFUSED):
                raise JobRefused(message) from None
            raise UpstreamDown(message) from None

    async def list_files(self, place: Place) -> list[StoredFile]:
        """What lies below a place, by path.

        Raises:
            UpstreamDown: It cannot be told now.
        """
        found: list[StoredFile] = []
        try:
            store = self._store(place.bucket)
            pages: AsyncIterable[Sequence[ObjectMeta]] = obstore.list(store, place.path or None)  # pyright: ignore[reportUnknownMemberType]
            async for page in pages:
                found += [StoredFile(meta["path"], meta["size"]) for meta in page]
        except _FAILED as error:
            raise UpstreamDown(self._told(error, "list files", place)) from None
        return sorted(found)

    async def read_lines(self, bucket: str, file: StoredFile) -> AsyncGenerator[bytes]:
        """The lines of a file, without their ends; one is held at a time.

        Raises:
            JobRefused: It is gone, or has a line that is too long.
            UpstreamDown: It did not come, or not all of it.
        """
        place = Place(bucket, file.path)
        lines = ResultLines(f"The upstream {self._name}")
        try:
            answer = await obstore.get_async(self._store(bucket), file.path)
            async for chunk in answer.stream(min_chunk_size=_PIECE_BYTES):
                for line in lines.feed(bytes(chunk)):
                    yield line
        except FileNotFoundError as error:
            raise JobRefused(self._told(error, "give its results", place)) from None
        except _FAILED as error:
            raise UpstreamDown(self._told(error, "give its results", place)) from None
        if lines.size < file.bytes:
            raise UpstreamDown(
                f"The upstream {self._name} sent {lines.size} of {file.bytes} bytes of the "
                "results."
            )
        for line in lines.finish():
            yield line

    async def delete_all(self, place: Place) -> None:
        """Delete what lies below a place.

        Raises:
            UpstreamDown: It cannot be deleted now.
        """
        paths = [file.path for file in await self.list_files(place)]
        if not paths:
            return
        try:
            await obstore.delete_async(self._store(place.bucket), paths)
        except FileNotFoundError:
            return
        except _FAILED as error:
            raise UpstreamDown(self._told(error, "delete files", place)) from None

    def _store(self, bucket: str) -> S3Store | GCSStore:
        if bucket not in self._stores:
            self._stores[bucket] = self._open(bucket)
        return self._stores[bucket]

    def _told(self, error: BaseException, what: str, place: Place) -> str:
        """What went wrong, without the headers that a storage likes to send back."""
        text = str(error).strip() or type(error).__name__
        code = _CODE.search(text)
        cause = code[1] if code else text.splitlines()[0].rstrip(".")[:_QUOTE_CHARACTERS]
        return (
            f"The storage of upstream {self._name} did not {what} at "
            f"{place.bucket}/{place.path}: {cause}."
        )


def open_s3(
    bucket: str,
    *,
    region: str,
    credential_provider: "S3CredentialProvider",
    endpoint: str | None = None,
    connect_timeout_s: float = 10.0,
) -> S3Store:
    """A bucket of Amazon S3, or of a server that speaks the same.

    Args:
        endpoint: Where the server is; None: where Amazon's is for the region.
    """
    config: S3Config = {"region": region}
    if endpoint:
        config["endpoint"] = endpoint
    return S3Store(
        bucket,
        config=config,
        credential_provider=credential_provider,
        client_options=_client_options(endpoint, connect_timeout_s),
        retry_config=_retry_config(),
    )


def open_gcs(
    bucket: str,
    *,
    credential_provider: "GCSCredentialProvider",
    endpoint: str | None = None,
    connect_timeout_s: float = 10.0,
) -> GCSStore:
    """A bucket of Google Cloud Storage, or of a server that speaks the same.

    Args:
        endpoint: Where the server is; None: where Google's is.
    """
    config: GCSConfig = {"base_url": endpoint} if endpoint else {}
    return GCSStore(
        bucket,
        config=config,
        credential_provider=credential_provider,
        client_options=_client_options(endpoint, connect_timeout_s),
        retry_config=_retry_config(),
    )


def _client_options(endpoint: str | None, connect_timeout_s: float) -> "ClientConfig":
    return {
        "user_agent": f"penstock/{__version__}",
        "allow_http": endpoint is not None and endpoint.startswith("http://"),
        "connect_timeout": timedelta(seconds=connect_timeout_s),
        "timeout": timedelta(seconds=_TRANSFER_S),
    }


def _retry_config() -> "RetryConfig":
    return {
        "max_retries": 2,
        "retry_timeout": timedelta(seconds=60),
        "backoff": {
            "init_backoff": timedelta(milliseconds=100),
            "max_backoff": timedelta(seconds=2),
            "base": 2,
        },
    }


async def _join_lines(records: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """Records as lines, joined to pieces that are worth handing over."""
    waiting: list[bytes] = []
    size = 0
    async for record in records:
        waiting += (record, b"\n")
        size += len(record) + 1
        if size >= _PIECE_BYTES:
            yield b"".join(waiting)
            waiting, size = [], 0
    if waiting:
        yield b"".join(waiting)
