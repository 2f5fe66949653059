"""The client side of the HTTP API, as far as the commands need it.

Files go up and come down in pieces, so memory is bounded by a piece, never by the file. A
download is written under another name and renamed when it is whole.

Whatever the server refuses is raised as the same error that the server itself raised, with
its message; the wire's `error` object is read here alone.
"""

import contextlib
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import msgspec
from prometheus_client.parser import text_string_to_metric_families
from pyreqwest.client import SyncClientBuilder
from pyreqwest.exceptions import ConnectError, DetailedPyreqwestError, PyreqwestError
from pyreqwest.multipart import FormBuilder, PartBuilder
from pyreqwest.request import SyncRequestBuilder
from pyreqwest.response import SyncResponse

from penstock import __version__
from penstock.errors import (
    Conflict,
    InvalidRequest,
    InvalidSettings,
    NotFound,
    PenstockError,
    StorageUnavailable,
    Unauthorized,
)

_PIECE_BYTES = 1 << 20
_ANSWER_S = timedelta(seconds=60)
"""How long an answer without a file may take."""
_READ_S = timedelta(seconds=600)
"""How long a transfer may stand still; also the time to make an upload durable."""
_MAX_PAGE = 100
_T = TypeVar("_T")


class NoServer(PenstockError):
    """No server answers at the URL; nothing was sent."""


class ServerFailed(StorageUnavailable):
    """The server answered with a failure of its own, or the connection broke."""


class RequestCounts(msgspec.Struct):
    """How many lines a batch has and how they ended."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class FaultObject(msgspec.Struct):
    """An entry of `errors.data`."""

    code: str | None = None
    message: str = ""
    param: str | None = None
    line: int | None = None


class FaultList(msgspec.Struct):
    """What is wrong with an input file."""

    data: list[FaultObject] = []


class _Details(msgspec.Struct):
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class UsageObject(msgspec.Struct):
    """Tokens, summed over the lines so far."""

    input_tokens: int = 0
    input_tokens_details: _Details = msgspec.field(default_factory=_Details)
    output_tokens: int = 0
    output_tokens_details: _Details = msgspec.field(default_factory=_Details)
    total_tokens: int = 0


class BatchObject(msgspec.Struct, kw_only=True):
    """A `Batch` object of the API, as far as a person is shown it."""

    id: str
    status: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int | None = None
    job_name: str | None = None
    model: str | None = None
    metadata: dict[str, str] | None = None
    errors: FaultList | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = msgspec.field(default_factory=RequestCounts)
    usage: UsageObject | None = None
    document: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    """All that the server said, as it said it."""

    @property
    def ended_at(self) -> int | None:
        """When the batch became final; None if it is not."""
        return self.completed_at or self.failed_at or self.expired_at or self.cancelled_at


@dataclass(slots=True)
class UpstreamState:
    """How an upstream stands, as the server's metrics tell."""

    name: str
    in_flight: int = 0
    limit: int = 0
    """How many lines may be in flight now."""
    most: int = 0
    """How many may ever be."""
    reasons: list[str] = field(default_factory=list[str])
    """What keeps lines waiting now."""
    batches: dict[str, int] = field(default_factory=dict[str, int])
    """How many lines its own batch API has or is to have, by where they stand."""


class CostObject(msgspec.Struct, kw_only=True):
    """Lines of a batch that were run one way, and what that cost in US dollars."""

    mode: str
    """`native` at the provider's batch API, or `lines`."""
    upstream: str | None = None
    model: str | None = None
    status: str = "ended"
    requests: int = 0
    usage: UsageObject | None = None
    cost: Decimal | None = None
    """None if it is not known."""
    line_cost: Decimal | None = None
    at_least: bool = False
    source: str | None = None


class CostsObject(msgspec.Struct, kw_only=True):
    """What a batch cost."""

    data: list[CostObject] = []
    document: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    """All that the server said, as it said it."""


class _FileObject(msgspec.Struct):
    id: str


class _BatchList(msgspec.Struct):
    data: list[dict[str, Any]]
    has_more: bool = False


class _ErrorObject(msgspec.Struct):
    message: str
    param: str | None = None
    code: str | None = None


class _ErrorBody(msgspec.Struct):
    error: _ErrorObject


class Client:
    """Talks to one server.

    Every method raises `NoServer` or `ServerFailed`, and where the server refuses:
    `InvalidRequest`, `NotFound`, `Conflict` or `Unauthorized`.

    Args:
        url: Where the server is, without `/v1`.
        key: The API key; None sends none, which a server without authentication accepts.

    Raises:
        InvalidSettings: The URL or the key cannot be one.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url
        try:
            host = urlsplit(url).hostname if re.match(r"https?://", url) else None
        except ValueError:
            host = None
        if host is None or re.search(r"[\s?#]", url):
            raise InvalidSettings(
                f'PENSTOCK_URL is "{url}"; it must be an http or https URL such as '
                "http://127.0.0.1:8080."
            )
        if key is not None and not re.fullmatch(r"[!-~]+", key):
            raise InvalidSettings(
                "The API key cannot be used; it must be printable ASCII characters without "
                "spaces."
            )
        self._has_key = key is not None
        builder = (
            SyncClientBuilder()
            .user_agent(f"penstock/{__version__}")
            .connect_timeout(timedelta(seconds=10))
            .read_timeout(_READ_S)
            .follow_redirects(False)
        )
        if host in {"localhost", "::1"} or host.startswith("127."):
            builder = builder.no_proxy()
        if key is not None:
            builder = builder.default_headers({"Authorization": f"Bearer {key}"})
        self._http = builder.build()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http.close()

    # Files

    def upload(self, path: Path, *, on_progress: Callable[[int], None] = lambda _: None) -> str:
        """Upload an input file in pieces and return its ID.

        Args:
            on_progress: Told how many bytes were sent, piece by piece.
        """

        def pieces() -> Iterator[bytes]:
            with path.open("rb") as file:
                while piece := file.read(_PIECE_BYTES):
                    yield piece
                    on_progress(len(piece))

        try:
            part = PartBuilder.from_stream_with_length(pieces(), path.stat().st_size)
            part = part.file_name(path.name).mime("application/jsonl")
            form = FormBuilder().text("purpose", "batch").part("file", part)
            response = self._send(self._http.post(f"{self.url}/v1/files").multipart(form))
        except OSError as error:
            raise InvalidRequest(f"{path} cannot be read: {error.strerror}.") from error
        return self._decode(response, _FileObject).id

    def download(
        self, file_id: str, target: Path, *, on_progress: Callable[[int], None] = lambda _: None
    ) -> int:
        """Write a file's bytes to `target`, which appears when all of them are there.

        Args:
            on_progress: Told how many bytes have come, piece by piece.

        Returns:
            How many bytes there are.

        Raises:
            InvalidRequest: `target` cannot be written.
        """
        url = f"{self.url}/v1/files/{_checked(file_id, 'File')}/content"
        part = target.with_name(target.name + ".part")
        total = 0
        try:
            with (
                self._talk(),
                self._http.get(url).build_streamed() as response,
            ):
                self._check(response)
                with part.open("wb") as file:
                    reader = response.body_reader
                    while (piece := reader.read(_PIECE_BYTES)) is not None:
                        total += file.write(piece)
                        on_progress(len(piece))
            part.replace(target)
        except OSError as error:
            raise InvalidRequest(f"{target} cannot be written: {error.strerror}.") from error
        finally:
            part.unlink(missing_ok=True)
        return total

    def read_lines(self, file_id: str, *, most_bytes: int) -> tuple[list[bytes], bool]:
        """The lines of the first bytes of a file, and whether these are all it has."""
        url = f"{self.url}/v1/files/{_checked(file_id, 'File')}/content"
        # A server may send the whole file all the same.
        request = self._http.get(url).header("Range", f"bytes=0-{most_bytes}")
        with self._talk(), request.build_streamed() as response:
            self._check(response)
            pieces: list[bytes] = []
            size = 0
            while size <= most_bytes and (piece := response.body_reader.read(_PIECE_BYTES)):
                pieces.append(piece.to_bytes())
                size += len(piece)
        *lines, rest = b"".join(pieces).split(b"\n")
        is_whole = size <= most_bytes
        return ([*lines, rest] if is_whole and rest else lines), is_whole

    def delete_file(self, file_id: str) -> None:
        """Delete a file."""
        request = self._http.delete(f"{self.url}/v1/files/{_checked(file_id, 'File')}")
        self._send(request.timeout(_ANSWER_S))

    # Batches

    def create_batch(
        self,
        *,
        input_file_id: str,
        endpoint: str,
        completion_window: str | None = None,
        job_name: str | None = None,
        metadata: dict[str, str] | None = None,
    ) -> BatchObject:
        """Create a batch. What is None is left to the server."""
        fields: dict[str, Any] = {
            "input_file_id": input_file_id,
            "endpoint": endpoint,
            "completion_window": completion_window,
            "job_name": job_name,
            "metadata": metadata,
        }
        given = {name: value for name, value in fields.items() if value is not None}
        return self._batch(self._http.post(f"{self.url}/v1/batches").body_json(given))

    def get_batch(self, batch_id: str) -> BatchObject:
        """Get a batch as it now stands."""
        return self._batch(self._http.get(self._batch_url(batch_id)))

    def cancel_batch(self, batch_id: str) -> BatchObject:
        """Cancel a batch; it is `cancelling` until its lines in flight have ended."""
        return self._batch(self._http.post(f"{self._batch_url(batch_id)}/cancel"))

    def get_costs(self, batch_id: str) -> CostsObject | None:
        """Get what a batch that is there cost; None if the server does not tell."""
        request = self._http.get(f"{self._batch_url(batch_id)}/costs").timeout(_ANSWER_S)
        try:
            document = self._decode(self._send(request), dict[str, Any])
            costs = msgspec.convert(document, CostsObject, strict=False)
        except (NotFound, ServerFailed, msgspec.ValidationError):
            return None
        costs.document = document
        return costs

    def iter_batches(
        self, *, limit: int | None, status: str | None = None, job_name: str | None = None
    ) -> Iterator[BatchObject]:
        """The project's batches, newest first, page by page.

        Args:
            limit: How many at most; None means all.
            status: Only those with this status.
            job_name: Only those with this job name.
        """
        query = {"status": status, "job_name": job_name}
        given = {name: value for name, value in query.items() if value is not None}
        after: dict[str, str] = {}
        left = limit
        while left is None or left > 0:
            size = _MAX_PAGE if left is None else min(left, _MAX_PAGE)
            request = self._http.get(f"{self.url}/v1/batches")
            request = request.query({**given, **after, "limit": size}).timeout(_ANSWER_S)
            page = self._decode(self._send(request), _BatchList)
            for document in page.data:
                yield self._read_batch(document)
            if not page.has_more or not page.data:
                return
            after = {"after": str(page.data[-1].get("id"))}
            left = None if left is None else left - len(page.data)

    def list_upstreams(self) -> list[UpstreamState]:
        """How the server's upstreams stand; empty if it does not tell."""
        try:
            request = self._http.get(f"{self.url}/metrics").timeout(_ANSWER_S)
            text = self._send(request).text()
            return _read_upstreams(text)
        except (PenstockError, ValueError):
            return []

    # The wire

    def _batch_url(self, batch_id: str) -> str:
        return f"{self.url}/v1/batches/{_checked(batch_id, 'batch')}"

    def _batch(self, request: SyncRequestBuilder) -> BatchObject:
        response = self._send(request.timeout(_ANSWER_S))
        return self._read_batch(self._decode(response, dict[str, Any]))

    def _read_batch(self, document: dict[str, Any]) -> BatchObject:
        try:
            batch = msgspec.convert(document, BatchObject, strict=False)
        except msgspec.ValidationError as error:
            raise ServerFailed(self._not_ours()) from error
        batch.document = document
        return batch

    def _send(self, request: SyncRequestBuilder) -> SyncResponse:
        with self._talk():
            response = request.build().send()
            self._check(response)
            return response

    @contextlib.contextmanager
    def _talk(self) -> Generator[None]:
        try:
            yield
        except ConnectError as error:
            raise NoServer(
                f"No Penstock server answers at {self.url}; start one with `penstock serve`, "
                "or set PENSTOCK_URL."
            ) from error
        except TimeoutError as error:
            raise ServerFailed(f"The server at {self.url} did not answer in time.") from error
        except PyreqwestError as error:
            raise ServerFailed(
                f"The connection to {self.url} broke: {_cause(error)}."
            ) from error

    def _decode(self, response: SyncResponse, kind: type[_T]) -> _T:
        try:
            return msgspec.json.decode(response.bytes().to_bytes(), type=kind)
        except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ServerFailed(self._not_ours()) from error

    def _check(self, response: SyncResponse) -> None:
        """Raise what the server answered, if it is an error."""
        status = response.status
        if status < 300:
            return
        try:
            error = msgspec.json.decode(response.bytes().to_bytes(), type=_ErrorBody).error
        except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError):
            raise ServerFailed(f"{self._not_ours()} (It answered {status}.)") from None
        message = error.message
        if status in (401, 403):
            if not self._has_key:
                message = (
                    f"The server at {self.url} wants an API key: set PENSTOCK_API_KEY, or name "
                    "the server's data directory with --data-dir."
                )
            raise Unauthorized(message, code=error.code)
        if status == 404:
            raise NotFound(message, param=error.param)
        if status == 409:
            raise Conflict(message)
        if status < 500 and status != 429:
            raise InvalidRequest(message, param=error.param, code=error.code)
        raise ServerFailed(f"The server at {self.url} failed: {message}")

    def _not_ours(self) -> str:
        return (
            f"What answers at {self.url} is not a Penstock server; set PENSTOCK_URL to where "
            "one is."
        )


def _checked(name: str, noun: str) -> str:
    # Anything else might name another route once it stands in a URL.
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise NotFound(
            f"No batch found with id '{name}'."
            if noun == "batch"
            else f"No such File object: {name}"
        )
    return name


def _cause(error: PyreqwestError) -> str:
    causes = error.details["causes"] if isinstance(error, DetailedPyreqwestError) else None
    return causes[-1]["message"] if causes else error.message


def _read_upstreams(text: str) -> list[UpstreamState]:
    found: dict[str, UpstreamState] = {}
    names = {
        "penstock_upstream_in_flight_requests": "in_flight",
        "penstock_upstream_concurrency_limit": "limit",
        "penstock_upstream_max_concurrency": "most",
    }
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.labels.get("upstream")
            if name is None:
                continue
            if sample.name in names:
                state = found.setdefault(name, UpstreamState(name))
                setattr(state, names[sample.name], int(sample.value))
            elif sample.name == "penstock_upstream_limited" and sample.value:
                state = found.setdefault(name, UpstreamState(name))
                state.reasons.append(sample.labels.get("reason", ""))
            elif sample.name == "penstock_native_lines" and sample.value:
                state = found.setdefault(name, UpstreamState(name))
                state.batches[sample.labels.get("status", "")] = int(sample.value)
    return list(found.values())
