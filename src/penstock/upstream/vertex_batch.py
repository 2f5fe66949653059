"""Gemini at Vertex AI: batch prediction jobs, which read from and write to Cloud Storage.

All that belongs to a job lies in a folder of its own, named by our key: the input, and below
`output` what Google writes. The key is also a label of the job, by which a job whose creation
brought no answer is found.

Sources: the pages on batch inference that `docs/providers.md` names, 25 November 2026.
"""

import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, urlencode

import msgspec

from penstock.errors import (
    InvalidSettings,
    JobNotTaken,
    JobRefused,
    UpstreamDown,
)
from penstock.upstream.base import (
    BatchLimits,
    Details,
    NativeJob,
    NativeLine,
    NativeResult,
    NativeState,
    NativeStatus,
    Note,
    Reply,
)
from penstock.upstream.cloud_storage import (
    INPUT,
    CloudStorage,
    Place,
    job_place,
    open_gcs,
    parse_place,
)
from penstock.upstream.google_tokens import GoogleTokens
from penstock.upstream.provider_http import NoConnection, ProviderAnswer, ProviderHttp
from penstock.upstream.translation import vertex_rows
from penstock.upstream.translation.answers import write_untranslatable
from penstock.upstream.translation.base import CHAT, EMBEDDINGS, RESPONSES, Untranslatable

T = TypeVar("T")

LIMITS = BatchLimits(
    endpoints=frozenset({CHAT, RESPONSES, EMBEDDINGS}),
    max_requests=200_000,
    max_bytes=1_000_000_000,
)
BUCKET_HEADER = "x-tfy-vertex-storage-bucket-name"
REGION_HEADER = "x-tfy-vertex-region"
JOB_HEADERS = frozenset({BUCKET_HEADER, REGION_HEADER})
BUCKET, OUTPUT = "bucket", "output"
"""Details: the bucket of a job, and the folder of its results in it."""
JOB_LABEL = "penstock_job"

_PAGE = 100
_NAME_CHARACTERS = 128
_STATES = {
    "JOB_STATE_QUEUED": NativeState.PENDING,
    "JOB_STATE_PENDING": NativeState.PENDING,
    "JOB_STATE_RUNNING": NativeState.RUNNING,
    "JOB_STATE_UPDATING": NativeState.RUNNING,
    "JOB_STATE_PAUSED": NativeState.RUNNING,
    "JOB_STATE_CANCELLING": NativeState.RUNNING,
    "JOB_STATE_SUCCEEDED": NativeState.ENDED,
    "JOB_STATE_PARTIALLY_SUCCEEDED": NativeState.ENDED,
    "JOB_STATE_FAILED": NativeState.FAILED,
    "JOB_STATE_CANCELLED": NativeState.CANCELLED,
    "JOB_STATE_EXPIRED": NativeState.EXPIRED,
}
_PASSING_CODES = frozenset({8, 14})
"""Of google.rpc.Code: RESOURCE_EXHAUSTED and UNAVAILABLE."""
_REGION = re.compile(r"global|[a-z]+(?:-[a-z]+)*[0-9]*")
_PROJECT = re.compile(r"[a-z0-9][a-z0-9:.-]{0,62}")
_MODEL = re.compile(r"[A-Za-z0-9_.@-]+(?:/[A-Za-z0-9_.@-]+)*")
_PUBLISHER = "publishers/google/models/"
_TUNED = re.compile(r"projects/[^/]+/locations/[^/]+/(?:models|endpoints)/[^/]+")
_NATIVE_ID = re.compile(r"projects/[^/]+/locations/[^/]+/batchPredictionJobs/[^/]+")


class VertexBatchUpstream:
    """Speaks to Vertex AI for one project.

    Args:
        name: As the settings call it.
        project: The project's ID or number.
        region: Such as `us-central1`, or `global`.
        storage: Where the files of jobs lie, such as `gs://bucket/folder`.
        service_account: The file of a service account's key; None: Google's own chain.
        endpoint: Where Vertex AI is, without `/v1`; None: where Google's is for a region.
        storage_endpoint: Where Cloud Storage is; None: where Google's is.

    Raises:
        InvalidSettings: One of these is not what it must be, or google-auth is not installed.
    """

    def __init__(
        self,
        *,
        name: str,
        project: str,
        region: str,
        storage: str,
        service_account: Path | None = None,
        endpoint: str | None = None,
        storage_endpoint: str | None = None,
        connect_timeout_s: float = 10.0,
        call_timeout_s: float = 60.0,
        find_after_s: float = 60.0,
    ) -> None:
        if not _PROJECT.fullmatch(project):
            raise InvalidSettings(
                f"The project of upstream {name} is {project!r}; it must be the ID of one of "
                "Google Cloud."
            )
        if not _REGION.fullmatch(region):
            raise InvalidSettings(
                f"The region of upstream {name} is {region!r}; it must be one of Google's, "
                "such as us-central1, or global."
            )
        self.name = name
        self.limits = LIMITS
        self.find_after_s = find_after_s
        self._project = project
        self._region = region
        self._place = parse_place(name, "gs", storage)
        self._endpoint = endpoint.rstrip("/") if endpoint else None
        self._timeouts = {
            "connect_timeout_s": connect_timeout_s,
            "call_timeout_s": call_timeout_s,
        }
        self._tokens = GoogleTokens(name=name, service_account=service_account)
        self._by_region = {region: self._open(region)}
        self._storage = CloudStorage(
            name,
            lambda bucket: open_gcs(
                bucket,
                credential_provider=self._tokens.for_storage,
                endpoint=storage_endpoint,
                connect_timeout_s=connect_timeout_s,
            ),
        )

    def encode(self, job: NativeJob, line: NativeLine) -> bytes | Reply:
        try:
            _, model = _models(job)
            return vertex_rows.write_row(job.endpoint, model, line.custom_id, line.body)
        except Untranslatable as error:
            return write_untranslatable(error.field, error.message)

    async def submit(self, job: NativeJob, records: AsyncIterator[bytes], note: Note) -> str:
        place, region = self._job_place(job), self._job_region(job)
        await note({BUCKET: place.bucket})
        return await self._storage.hand_in(
            place, records, lambda: self._create(job, place, region)
        )

    async def _create(self, job: NativeJob, place: Place, region: str) -> str:
        try:
            path, _ = _models(job)
        except Untranslatable as error:
            raise JobRefused(f"The model of upstream {self.name}: {error.message}") from error
        body = {
            "displayName": job.display_name[:_NAME_CHARACTERS],
            "model": path,
            "labels": {JOB_LABEL: job.key},
            "inputConfig": {
                "instancesFormat": "jsonl",
                "gcsSource": {"uris": [place.inside(INPUT).url("gs")]},
            },
            "outputConfig": {
                "predictionsFormat": "jsonl",
                "gcsDestination": {"outputUriPrefix": place.inside("output").url("gs")},
            },
        }
        try:
            headers = await self._tokens.headers()
        except UpstreamDown as error:
            raise JobNotTaken(str(error)) from error
        http = self._http(region)
        try:
            answer = await http.call("POST", self._jobs(region), json=body, headers=headers)
        except NoConnection as error:
            raise JobNotTaken(str(error)) from error
        http.refuse(answer, "create a job")
        return http.read(answer, _Job, strict=False).name

    async def find(self, job: NativeJob, details: Details, *, since: float) -> str | None:
        del since  # the label is not used again, and told apart by Google
        if BUCKET not in details:
            return None  # it did not come to the creation of a job
        region = self._job_region(job)
        query = {"filter": f'labels.{JOB_LABEL}="{job.key}"', "pageSize": str(_PAGE)}
        while True:
            answer = await self._call(region, "GET", self._jobs(region), query=query)
            self._must_answer(answer, "list its jobs")
            page = self._http(region).read(answer, _Page, strict=False)
            for found in page.batchPredictionJobs:
                if found.labels.get(JOB_LABEL) == job.key:
                    return found.name
            if not page.nextPageToken or page.nextPageToken == query.get("pageToken"):
                return None
            query["pageToken"] = page.nextPageToken

    async def check(self, job: NativeJob, native_id: str) -> NativeStatus:
        region = self._job_region(job)
        answer = await self._call(region, "GET", self._path(native_id))
        self._must_answer(answer, f"know the job {native_id}")
        found = self._http(region).read(answer, _Job, strict=False)
        place = self._job_place(job)
        output = (found.outputInfo or _OutputInfo()).gcsOutputDirectory
        _, _, path = output.removeprefix("gs://").partition("/")
        error = found.error or _Status()
        return NativeStatus(
            state=_STATES.get(found.state, NativeState.RUNNING),
            completed=found.completionStats.successfulCount,
            failed=found.completionStats.failedCount,
            details={BUCKET: place.bucket, OUTPUT: path or place.inside("output").path},
            message=error.message,
            may_pass=error.code in _PASSING_CODES and not found.completionStats.successfulCount,
        )

    async def results(
        self, job: NativeJob, native_id: str, status: NativeStatus
    ) -> AsyncGenerator[NativeResult]:
        bucket, path = status.details[BUCKET], status.details[OUTPUT]
        files = await self._storage.list_files(Place(bucket, path))
        # Shards of the whole, and what was written while the job ran; either may be alone.
        written = [file for file in files if ".jsonl" in file.path.rpartition("/")[2]]
        if not written and status.state is NativeState.ENDED:
            raise JobRefused(
                f"The upstream {self.name} has left no results of the job {native_id} at "
                f"{bucket}/{path}."
            )
        _, model = _models(job)
        for file in written:
            async for text in self._storage.read_lines(bucket, file):
                now = int(time.time())
                result = vertex_rows.read_row(job.endpoint, model, text, created_at=now)
                if result is not None:
                    yield result

    async def cancel(self, job: NativeJob, native_id: str) -> None:
        path = f"{self._path(native_id)}:cancel"
        answer = await self._call(self._job_region(job), "POST", path)
        if answer.status == 400 and (await self.check(job, native_id)).is_final:
            return
        self._must_answer(answer, f"cancel the job {native_id}")

    async def clean_up(self, job: NativeJob, details: Details) -> None:
        if BUCKET in details:
            await self._storage.delete_all(self._job_place(job))

    async def close(self) -> None:
        for http in self._by_region.values():
            await http.close()

    def _job_place(self, job: NativeJob) -> Place:
        return job_place(job, self._place, header=BUCKET_HEADER)

    def _job_region(self, job: NativeJob) -> str:
        """Where a job runs.

        Raises:
            JobRefused: The region that the client asks for cannot be one.
        """
        region = job.parameters.get(REGION_HEADER, self._region)
        if not _REGION.fullmatch(region):
            raise JobRefused(
                f"The header {REGION_HEADER} is {region!r}; it must be one of Google's "
                "regions, such as us-central1, or global."
            )
        return region

    def _http(self, region: str) -> ProviderHttp:
        if region not in self._by_region:
            self._by_region[region] = self._open(region)
        return self._by_region[region]

    def _open(self, region: str) -> ProviderHttp:
        prefix = "" if region == "global" else f"{region}-"
        base = self._endpoint or f"https://{prefix}aiplatform.googleapis.com"
        return ProviderHttp(
            name=f"The upstream {self.name}",
            base_url=f"{base}/v1",
            headers={},
            connect_timeout_s=self._timeouts["connect_timeout_s"],
            call_timeout_s=self._timeouts["call_timeout_s"],
        )

    def _jobs(self, region: str) -> str:
        return f"/projects/{self._project}/locations/{region}/batchPredictionJobs"

    def _path(self, native_id: str) -> str:
        """Where a job is asked for.

        Raises:
            JobRefused: No job of Google's has such an ID.
        """
        if not _NATIVE_ID.fullmatch(native_id):
            raise JobRefused(f"The upstream {self.name} has no job {native_id!r}.")
        return "/" + quote(native_id)

    async def _call(
        self, region: str, method: str, path: str, *, query: Mapping[str, str] | None = None
    ) -> ProviderAnswer:
        if query:
            path = f"{path}?{urlencode(query)}"
        headers = await self._tokens.headers()
        return await self._http(region).call(method, path, headers=headers)

    def _must_answer(self, answer: ProviderAnswer, what: str) -> None:
        """Raise what an answer to a question means that is no answer.

        Raises:
            JobRefused: There is no such thing.
            UpstreamDown: It is another refusal, which may be mended: of a right, for example.
        """
        try:
            self._http(self._region).refuse(answer, what)
        except JobRefused as error:
            if answer.status == 404:
                raise
            raise UpstreamDown(str(error)) from error
        except JobNotTaken as error:
            raise UpstreamDown(str(error), retry_after_s=error.retry_after_s) from error


def _models(job: NativeJob) -> tuple[str, str]:
    """The model of a job as Google's resource and by its short name.

    Raises:
        Untranslatable: It is of another publisher, whose form is not known here, or no name.
    """
    asked = job.model
    named = asked.removeprefix(_PUBLISHER).removeprefix("google/").removeprefix("models/")
    if _TUNED.fullmatch(asked):
        return asked, asked.rpartition("/")[2]
    if "/" in named or not _MODEL.fullmatch(named):
        raise Untranslatable(
            "model",
            f"{asked} is not a model of Google's; known are names such as gemini-2.5-flash, "
            f"{_PUBLISHER}gemini-2.5-flash and tuned models by their resource.",
        )
    return _PUBLISHER + named, named


# The wire, as far as it is read, with Google's names


class _Status(msgspec.Struct):
    code: int = 0
    message: str = ""


class _Stats(msgspec.Struct):
    """Whole numbers of 64 bits, which Google writes as texts."""

    successfulCount: int = 0  # noqa: N815
    failedCount: int = 0  # noqa: N815


class _OutputInfo(msgspec.Struct):
    gcsOutputDirectory: str = ""  # noqa: N815


class _Job(msgspec.Struct):
    name: str
    state: str = ""
    labels: dict[str, str] = {}
    error: _Status | None = None
    outputInfo: _OutputInfo | None = None  # noqa: N815
    completionStats: _Stats = msgspec.field(default_factory=_Stats)  # noqa: N815


class _Page(msgspec.Struct):
    batchPredictionJobs: list[_Job] = []  # noqa: N815
    nextPageToken: str = ""  # noqa: N815
