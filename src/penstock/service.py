"""What a client may ask for: keys, files, batches and the list of models.

Every method names the project that asks, and somebody else's object is `NotFound`, so that
IDs cannot be probed. Nothing here runs a line: a batch that was created here is found in the
store by the executor.
"""

import asyncio
import hashlib
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Generic, Protocol, TypeVar

import msgspec
import structlog

from penstock.blobs.base import Blobs
from penstock.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    StorageUnavailable,
    Unauthorized,
)
from penstock.intake import FileForm, Intake
from penstock.keys import key_digest, key_hint
from penstock.model import (
    BEDROCK_MODEL,
    ENDPOINTS,
    FINAL,
    PROVIDER_MODEL,
    ApiKey,
    Batch,
    BatchId,
    BatchStatus,
    File,
    FileId,
    Once,
    ProjectId,
    Purpose,
    find_endpoint,
    parse_window,
)
from penstock.prices import CostItem, PriceBook
from penstock.refusals import check_text, quoted, unsupported
from penstock.store.base import BatchFilter, Page, Store
from penstock.upstream import azure

_log = structlog.get_logger()

MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
MAX_JOB_NAME_CHARS = 256
_STRICT_WINDOW = "24h"
NOT_DOWNLOADABLE = frozenset({Purpose.ASSISTANTS, Purpose.USER_DATA})
"""Purposes whose bytes the API never gives back, as OpenAI's does not."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLimits:
    """What is allowed, as far as the settings decide it."""

    input_file_bytes: int = 200 << 20
    """The largest file of purpose `batch`."""
    upload_file_bytes: int = 512 << 20
    """The largest file of another purpose."""
    default_completion_window: str = "24h"
    max_completion_window: str = "30d"
    input_file_life_s: int = 30 * 86400
    """After how long a file of purpose `batch` expires, unless its uploader says otherwise."""
    is_strict: bool = False
    """Whether to refuse what OpenAI refuses, and to take what it takes: a batch lasts 24 hours,
    and one of an unknown input file is created, and fails."""

    def file_life_s(self, purpose: Purpose) -> int | None:
        """How long a file of this purpose is kept unless its uploader says otherwise, in
        seconds; None means until it is deleted."""
        return self.input_file_life_s if purpose is Purpose.BATCH else None


class ModelInfo(Protocol):
    """A model that a line may name."""

    @property
    def id(self) -> str: ...

    @property
    def owned_by(self) -> str:
        """The name of the upstream that takes its lines."""
        ...


class ModelCatalog(Protocol):
    """Knows which models the upstreams serve."""

    async def list_models(self) -> Sequence[ModelInfo]:
        """The models that can be named now."""
        ...


class PartialResults(Protocol):
    """Reads the results of batches that are not final."""

    def stream(self, batch: Batch) -> AsyncIterator[bytes]:
        """The result lines so far, each whole and ended by `\\n`, in pieces of any size.

        None, if it became final meanwhile.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamChoice:
    """An upstream that a project may choose."""

    headers: frozenset[str]
    """Which headers beside its name it understands."""
    models: tuple[str, ...]
    """Glob patterns of the models that a header may name."""


UpstreamChoices = Mapping[str, UpstreamChoice]
"""The upstreams that a project may choose, by name."""
PROVIDER_NAME = "x-tfy-provider-name"
MAX_MODEL_CHARS = 512
"""Of a model in a header; ARNs and names of resources are long."""
_MODEL = re.compile("[!-~]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderHeaders:
    """What the headers of a request say of the upstream that it asks for."""

    name: str | None
    """The value of `x-tfy-provider-name`; None if there is none."""
    parameters: Mapping[str, str]
    """The other headers for providers, by name in lower case."""
    repeated: tuple[str, ...] = ()
    """Which of all these the request has more than once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What tells a request that creates something from the same request sent again."""

    at: float
    """When it arrived."""
    key: str | None = None
    """The client's `Idempotency-Key`."""
    is_retry: bool = False
    """Whether the client says that it asks again."""

    def once(self, *what: object) -> Once:
        """The same with the fingerprint of what is asked for: values that JSON can hold."""
        text = msgspec.json.encode(what, order="deterministic")
        fingerprint = hashlib.sha256(text).hexdigest()
        return Once(
            fingerprint=fingerprint, key=self.key, is_retry=self.is_retry, began_at=self.at
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing(Generic[T]):
    """A page of a list."""

    items: list[T]
    has_more: bool


class Service:
    """Answers what clients ask."""

    def __init__(
        self,
        *,
        store: Store,
        blobs: Blobs,
        partial: PartialResults,
        upstreams: ModelCatalog,
        limits: ServiceLimits,
        choices: Mapping[ProjectId, UpstreamChoices] | None = None,
        prices: PriceBook | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._choices: Mapping[ProjectId, UpstreamChoices] = {} if choices is None else choices
        self._prices = prices or PriceBook()
        self._store = store
        self._blobs = blobs
        self._partial = partial
        self._upstreams = upstreams
        self._limits = limits
        self._clock = clock

    async def authenticate(self, key: str | None) -> ApiKey:
        """Find whose key this is.

        Raises:
            Unauthorized: There is no key, or it is unknown or revoked.
        """
        if not key:
            raise Unauthorized(
                "You didn't provide an API key. Send it in an Authorization header using "
                "Bearer auth (Authorization: Bearer YOUR_KEY) or in an api-key header."
            )
        found = await self._store.find_key(key_digest(key))
        if found is None:
            raise Unauthorized(
                f"Incorrect API key provided: {key_hint(key)}. "
                "`penstock keys list` lists the keys of the Penstock that answered this, where "
                "that one runs.",
                code="invalid_api_key",
            )
        return found

    async def list_models(self) -> Sequence[ModelInfo]:
        """The models that the upstreams serve now."""
        return await self._upstreams.list_models()

    # Files

    async def create_file(
        self, project_id: ProjectId, form: FileForm, *, asked: Asked | None = None
    ) -> File:
        """Store the file of a form that is arriving, in bounded memory.

        Args:
            asked: What tells the request from the same one sent again; None creates a file in
                any case.

        Returns:
            The file, or the one that an earlier request like this one has made.

        Raises:
            InvalidRequest: The form, the file or a field is not allowed; nothing is kept.
            Conflict: The request's key was used for another file; nothing is kept.
        """
        file_id = FileId(f"file-{secrets.token_hex(16)}")
        blob_key = f"files/{file_id}"
        intake = Intake(
            form,
            input_file_bytes=self._limits.input_file_bytes,
            upload_file_bytes=self._limits.upload_file_bytes,
        )
        await self._blobs.put(blob_key, intake.chunks())

        now = int(self._clock())
        life_s = intake.life_s or self._limits.file_life_s(intake.purpose)
        file = File(
            id=file_id,
            project_id=project_id,
            purpose=intake.purpose,
            filename=intake.filename,
            bytes=intake.bytes,
            sha256=intake.sha256,
            blob_key=blob_key,
            created_at=now,
            expires_at=None if life_s is None else now + life_s,
        )
        once = asked and asked.once("file", file.filename, file.purpose, life_s, file.sha256)
        return await self._publish(file, once)

    async def _publish(self, file: File, once: Once | None) -> File:
        try:
            published = await self._store.add_file(file, once=once)
        except (Conflict, StorageUnavailable):
            await self._discard(file)
            raise
        if published.id != file.id:
            await self._discard(file)
        return published

    async def _discard(self, file: File) -> None:
        # A transaction may have been kept although its answer was lost, and then the bytes
        # must stay. What is left behind here is found by upkeep.
        with suppress(StorageUnavailable):
            unused = await self._store.unused_blobs({file.blob_key})
            await self._blobs.delete(list(unused))

    async def get_file(self, project_id: ProjectId, file_id: str) -> File:
        """
        Raises:
            NotFound: No such file in this project.
        """
        return await self._find_file(project_id, file_id, param="id")

    async def _find_file(self, project_id: ProjectId, file_id: str, *, param: str) -> File:
        missing = NotFound(f"No such File object: {quoted(file_id)}", param=param)
        if not may_be_id(file_id):
            raise missing
        try:
            return await self._store.get_file(project_id, FileId(file_id))
        except NotFound:
            raise missing from None

    async def list_files(
        self,
        project_id: ProjectId,
        *,
        after: str | None,
        limit: int,
        purpose: Purpose | None,
        newest_first: bool,
    ) -> Listing[File]:
        """List files by creation. An `after` that is not there gives an empty page."""
        if after and not may_be_id(after):
            return Listing(items=[], has_more=False)
        page = Page(limit=limit + 1, after=after or None)
        files = await self._store.list_files(
            project_id, page, purpose=purpose, newest_first=newest_first
        )
        return Listing(items=files[:limit], has_more=len(files) > limit)

    async def delete_file(self, project_id: ProjectId, file_id: str) -> None:
        """Take a file away. Batches that were created from it go on.

        Raises:
            NotFound: No such file in this project.
        """
        file = await self.get_file(project_id, file_id)
        try:
            unneeded = await self._store.delete_file(
                project_id, file.id, now=int(self._clock())
            )
        except NotFound:  # another call was faster
            raise NotFound(f"No such File object: {file.id}", param="id") from None
        if unneeded is not None:
            # The file is gone for its owner; bytes that stay behind are found by upkeep.
            with suppress(StorageUnavailable):
                await self._blobs.delete([unneeded.blob_key])

    async def get_downloadable(self, project_id: ProjectId, file_id: str) -> File:
        """Get a file whose bytes may be asked for.

        Raises:
            NotFound: No such file in this project.
            InvalidRequest: Files of its purpose are never given back.
        """
        file = await self.get_file(project_id, file_id)
        if file.purpose in NOT_DOWNLOADABLE:
            raise InvalidRequest(f"Not allowed to download files of purpose: {file.purpose}")
        return file

    async def open_content(
        self, file: File, *, start: int = 0, end: int | None = None
    ) -> AsyncIterator[bytes]:
        """Start to read a file's bytes from `start` to `end` (None: to the last).

        Raises:
            NotFound: The file was deleted meanwhile.
            StorageUnavailable: Its bytes are gone from the storage; they may be put back.
        """
        try:
            pieces = self._blobs.stream(file.blob_key, start, end)
            return await _opened(pieces) or _nothing()
        except NotFound as error:
            await self.get_file(file.project_id, file.id)
            _log.error("The bytes of a file are gone from the storage.", file_id=file.id)
            raise StorageUnavailable(
                f"The bytes of {file.id} are gone from this server's storage. Whoever runs the "
                "server may be able to put them back; its log names them."
            ) from error

    # Batches

    async def create_batch(
        self,
        project_id: ProjectId,
        *,
        input_file_id: str,
        endpoint: str,
        completion_window: str | None = None,
        job_name: str | None = None,
        metadata: Mapping[str, str] | None = None,
        default_metadata: Mapping[str, str] | None = None,
        output_life_s: int | None = None,
        provider: ProviderHeaders | None = None,
        asked: Asked | None = None,
    ) -> Batch:
        """Create a batch; whether its file is good is found out later.

        Args:
            completion_window: Such as `24h`; None means the default.
            default_metadata: Pairs for the keys that `metadata` does not have.
            output_life_s: How long its result files are to be kept, from their creation, in
                seconds; None means as long as usual.
            provider: What the client's headers say of the upstream that is to take all lines;
                passed over if the project may choose none.
            asked: What tells the request from the same one sent again; None creates a batch
                in any case.

        Returns:
            The batch, or the one that an earlier request like this one has made.

        Raises:
            InvalidRequest: A value is not allowed.
            NotFound: No such input file in this project; if strict, such a batch fails.
            Conflict: The request's key was used for another batch.
        """
        _check_endpoint(endpoint)
        window, window_s = self._read_window(completion_window)
        merged = merge_metadata(metadata, default_metadata)
        if job_name is not None:
            check_text(job_name, param="job_name", max_chars=MAX_JOB_NAME_CHARS)
        chosen = _choose(provider, self._choices.get(project_id))
        once = asked and asked.once(
            "batch", input_file_id, endpoint, window, job_name, merged, output_life_s, *chosen
        )
        file = await self._find_input(project_id, input_file_id)
        now = int(self._clock())
        batch = Batch(
            id=BatchId(f"batch_{secrets.token_hex(16)}"),
            project_id=project_id,
            status=BatchStatus.VALIDATING,
            endpoint=endpoint,
            input_file_id=FileId(input_file_id),
            input_blob_key="" if file is None else file.blob_key,
            completion_window=window,
            expires_at=now + window_s,
            created_at=now,
            job_name=job_name,
            metadata=merged,
            output_life_s=output_life_s,
            upstream=chosen[0] if chosen else None,
            parameters=chosen[1] if chosen else None,
        )
        try:
            needs_file = not self._limits.is_strict
            return await self._store.add_batch(batch, once=once, needs_file=needs_file)
        except NotFound:
            raise NotFound(
                f"No such File object: {input_file_id}", param="input_file_id"
            ) from None

    async def _find_input(self, project_id: ProjectId, file_id: str) -> File | None:
        """The input file of a new batch; None if it is not there, which the store decides
        about: the batch may have been made by an earlier request."""
        try:
            file = await self._find_file(project_id, file_id, param="input_file_id")
        except NotFound:
            if not may_be_id(file_id):
                raise
            return None
        if file.purpose is not Purpose.BATCH:
            raise InvalidRequest(
                f"Invalid input file '{file.id}': its purpose is '{file.purpose}', "
                "but the input file of a batch needs the purpose 'batch'.",
                param="input_file_id",
                code="invalid_value",
            )
        return file

    def _read_window(self, text: str | None) -> tuple[str, int]:
        window = self._limits.default_completion_window if text is None else text
        if self._limits.is_strict and window != _STRICT_WINDOW:
            raise unsupported(window, [_STRICT_WINDOW], param="completion_window")
        longest = self._limits.max_completion_window
        window_s = parse_window(window)
        if window_s is None or window_s > (parse_window(longest) or 0):
            raise InvalidRequest(
                f"Invalid value: '{quoted(window)}'. Supported values of completion_window "
                "are a whole number from 1 followed by s, m, h or d, such as '24h', up to "
                f"'{longest}'.",
                param="completion_window",
                code="invalid_value",
            )
        return window, window_s

    async def get_batch(self, project_id: ProjectId, batch_id: str) -> Batch:
        """
        Raises:
            NotFound: No such batch in this project.
        """
        missing = NotFound(f"No batch found with id '{quoted(batch_id)}'.")
        if not may_be_id(batch_id):
            raise missing
        try:
            return await self._store.get_batch(BatchId(batch_id), project_id=project_id)
        except NotFound:
            raise missing from None

    async def list_batches(
        self, project_id: ProjectId, *, after: str | None, limit: int, where: BatchFilter
    ) -> Listing[Batch]:
        """List batches, newest first. An `after` that is not there gives an empty page."""
        _check_filter(where)
        if after and not may_be_id(after):
            return Listing(items=[], has_more=False)
        page = Page(limit=limit + 1, after=after or None)
        batches = await self._store.list_batches(project_id, page, where=where)
        return Listing(items=batches[:limit], has_more=len(batches) > limit)

    async def cancel_batch(self, project_id: ProjectId, batch_id: str) -> Batch:
        """Send no more lines of a batch. A second call changes nothing.

        Raises:
            NotFound: No such batch in this project.
            Conflict: It has ended otherwise.
        """
        while True:
            batch = await self.get_batch(project_id, batch_id)
            if batch.status in (BatchStatus.CANCELLING, BatchStatus.CANCELLED):
                return batch
            if batch.status in FINAL:
                raise Conflict(f"Cannot cancel a batch with status '{batch.status}'.")
            # A conflict means that the batch has moved since it was read. It moves only
            # forward, so this ends.
            with suppress(Conflict):
                return await self._store.move_batch(
                    batch.id, BatchStatus.CANCELLING, now=int(self._clock())
                )

    async def get_costs(self, project_id: ProjectId, batch_id: str) -> list[CostItem]:
        """What a batch cost so far: its jobs at providers, and its lines one by one.

        Raises:
            NotFound: No such batch in this project.
        """
        batch = await self.get_batch(project_id, batch_id)
        runs = await self._store.list_native_runs(batch.id)
        # Again, for what these runs took must be among what the batch took.
        batch = await self.get_batch(project_id, batch_id)
        return await asyncio.to_thread(self._prices.price_batch, batch, runs)

    async def open_output(self, project_id: ProjectId, batch_id: str) -> AsyncIterator[bytes]:
        """Start to read the results of a batch, so far or final, good ones first.

        Returns:
            Whole lines ended by `\\n`, in pieces of any size.

        Raises:
            NotFound: No such batch in this project, or a file of its results was deleted.
        """
        batch = await self.get_batch(project_id, batch_id)
        if batch.status not in FINAL:
            lines = await _opened(self._partial.stream(batch))
            if lines is not None:
                return lines
            # It may have become final while it was read.
            batch = await self.get_batch(project_id, batch_id)
        return await self._open_results(batch)

    async def _open_results(self, batch: Batch) -> AsyncIterator[bytes]:
        ids = [id_ for id_ in (batch.output_file_id, batch.error_file_id) if id_ is not None]
        files = [await self.get_file(batch.project_id, id_) for id_ in ids]

        async def pieces() -> AsyncIterator[bytes]:
            for file in files:
                async for piece in await self.open_content(file):
                    yield piece

        return await _opened(pieces()) or _nothing()


def merge_metadata(
    metadata: Mapping[str, str] | None, default: Mapping[str, str] | None
) -> dict[str, str] | None:
    """Put `metadata` over `default`, within the bounds of the API.

    Raises:
        InvalidRequest: A key or a value is too long, or there are too many pairs.
    """
    if metadata is None and not default:
        return None
    merged = {**(default or {}), **(metadata or {})}
    if len(merged) > MAX_METADATA_PAIRS:
        raise InvalidRequest(
            f"Invalid 'metadata': too many properties. Expected an object with at most "
            f"{MAX_METADATA_PAIRS} properties, but got an object with {len(merged)} "
            "properties instead.",
            param="metadata",
            code="object_above_max_properties",
        )
    for key, value in merged.items():
        check_text(key, param="metadata", max_chars=MAX_METADATA_KEY_CHARS, noun="key")
        check_text(value, param=f"metadata.{key}", max_chars=MAX_METADATA_VALUE_CHARS)
    return merged


def _check_endpoint(endpoint: str) -> None:
    if find_endpoint(endpoint) is None:
        raise unsupported(endpoint, ENDPOINTS, param="endpoint")


def _check_filter(where: BatchFilter) -> None:
    merge_metadata(where.metadata, None)
    if where.job_name is not None:
        check_text(where.job_name, param="job_name", max_chars=MAX_JOB_NAME_CHARS)


def may_be_id(text: str) -> bool:
    """Whether the store may be asked for this ID: PostgreSQL takes no NUL, for one."""
    return 0 < len(text) <= 128 and text.isascii() and text.isprintable()


async def _opened(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes] | None:
    """Fetch the first piece at once, so that a fault is told before an answer has begun.

    Returns:
        All the pieces, or None if there are none.
    """
    first = await anext(pieces, None)
    return None if first is None else _joined(first, pieces)


async def _joined(first: bytes, others: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in others:
        yield piece


async def _nothing() -> AsyncIterator[bytes]:
    for piece in ():
        yield piece


def _choose(
    provider: ProviderHeaders | None, choices: UpstreamChoices | None
) -> tuple[str, dict[str, str]] | tuple[()]:
    """The upstream that is asked for and what is to be known of it; empty if none is."""
    if provider is None or not choices:
        return ()
    for name in provider.repeated:
        raise _unfit_header(name, "it is given more than once.")
    if provider.name is None:
        for name in provider.parameters:
            raise _unfit_header(name, f"it is of use only together with '{PROVIDER_NAME}'.")
        return ()
    if not provider.name:
        raise _unfit_header(PROVIDER_NAME, "it is empty.")
    choice = choices.get(provider.name)
    if choice is None:
        allowed = ", ".join(sorted(choices))
        told = f"'{quoted(provider.name)}'. This project may choose {allowed}."
        raise _unfit_header(PROVIDER_NAME, told)
    for name, value in provider.parameters.items():
        _check_header(name, value, provider.name, choice)
    return provider.name, dict(provider.parameters)


def _check_header(name: str, value: str, upstream: str, choice: UpstreamChoice) -> None:
    if name not in choice.headers:
        allowed = ", ".join(sorted(choice.headers))
        raise _unfit_header(name, f"the upstream '{upstream}' understands {allowed}.")
    if not value:
        raise _unfit_header(name, "it is empty.")
    if name in (PROVIDER_MODEL, BEDROCK_MODEL):
        _check_model(name, value, upstream, choice)
    if name == azure.VERSION_HEADER and not azure.is_version(value):
        raise _unfit_header(name, f"'{quoted(value)}'. It must be {azure.VERSION}.")


def _check_model(header: str, model: str, upstream: str, choice: UpstreamChoice) -> None:
    check_text(model, param=header, max_chars=MAX_MODEL_CHARS)
    if not _MODEL.fullmatch(model):
        told = f"'{quoted(model)}'. It must be the name of a model, in ASCII without spaces."
        raise _unfit_header(header, told)
    if not any(fnmatchcase(model, pattern) for pattern in choice.models):
        raise _unfit_header(
            header,
            f"'{quoted(model)}'. The models of the upstream '{upstream}' are "
            f"{', '.join(choice.models)}.",
        )


def _unfit_header(name: str, told: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid header '{name}': {told}", param=name, code="invalid_value")
