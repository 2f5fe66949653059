"""Vertex AI's batch prediction jobs, by the public reference, and with misbehaviour.

    with Buckets() as buckets:
        async with VertexProvider(buckets) as provider:
            ...  # create and poll at provider.url, with provider.key_file(folder)
            provider.end(job_name)

It runs no model. A job goes on only when the test says so. What a row gets is decided by
`behave`; what goes wrong on the way by `spoil`, as at `openai_server`. Tokens are had from
`/token`, for a signature that is verified. That it is like the real one is shown by Google's
own client in `tests/clients/test_provider_servers.py`.

Sources: the pages on batch inference and on `batchPredictionJobs` that `docs/providers.md`
names, 25 November 2026.
"""

import base64
import functools
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.providers.buckets import Buckets
from tests.providers.loopback import LoopbackServer
from tests.providers.openai_server import Trouble

PROJECT, REGION = "my-project", "us-central1"
EMAIL = "batch@my-project.iam.gserviceaccount.com"
CREATE, LIST, GET, CANCEL, TOKEN = "create", "list", "get", "cancel", "token"
FINAL = ("SUCCEEDED", "PARTIALLY_SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED")
_KINDS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
}
_AUDIENCE = "https://oauth2.googleapis.com/token"
_NEEDED = ("displayName", "inputConfig", "model", "outputConfig")
_LABEL = re.compile(r"[a-z0-9_-]{1,63}")
_FILTER = re.compile(r'labels\.([a-z_]+)="([^"]*)"')

Behave = Callable[[str, dict[str, Any]], dict[str, Any] | None]
"""What stands in a row beside its request, by the row's name and request; None: no row."""


def gemini(text: str, **fields: Any) -> dict[str, Any]:
    """What stands in a row that succeeded."""
    told = {
        "candidates": [
            {"content": {"role": "model", "parts": [{"text": text}]}, "finishReason": "STOP"}
        ],
        "modelVersion": "gemini-2.5-flash",
        "usageMetadata": {
            "promptTokenCount": 3,
            "candidatesTokenCount": 2,
            "totalTokenCount": 5,
        },
    }
    return {"status": "", "response": {**told, **fields}}


def failed(code: int, told: str, phrase: str = "Bad Request") -> dict[str, Any]:
    """What stands in a row that failed."""
    error = {"error": {"code": code, "message": told, "status": _KINDS.get(code, "INTERNAL")}}
    return {"status": f"{phrase}: {json.dumps(error)}", "response": {}}


def echo(name: str, request: dict[str, Any]) -> dict[str, Any]:
    """Each last word of the user is its own answer."""
    return gemini(request["contents"][-1]["parts"][-1]["text"])


class VertexProvider(LoopbackServer):
    """The server, on a free port of loopback.

    Args:
        buckets: Where it reads from and writes to.
    """

    def __init__(self, buckets: Buckets, *, behave: Behave = echo) -> None:
        super().__init__()
        self.behave = behave
        self.buckets = buckets
        self.jobs: dict[str, dict[str, Any]] = {}
        """By name, in the order of their creation: what was paid."""
        self.calls: list[str] = []
        self.tokens: list[str] = []
        """That were given out."""
        self.extra_lines: list[bytes] = []
        """Added to the output of each job that ends."""
        self.is_down = False
        self.page = 100
        self.file_names = ["predictions.jsonl"]
        """The files that rows are dealt out to."""
        self._troubles: dict[str, list[Trouble]] = {}
        self.url = self.root_url

    def make_routes(self) -> list[Route]:
        jobs = "/v1/projects/{project}/locations/{location}/batchPredictionJobs"
        return [
            Route("/token", self._token, methods=["POST"]),
            Route(jobs, self._create, methods=["POST"]),
            Route(jobs, self._list, methods=["GET"]),
            Route(f"{jobs}/{{id:int}}", self._get, methods=["GET"]),
            Route(f"{jobs}/{{id:int}}:cancel", self._cancel, methods=["POST"]),
        ]

    # What tests do

    def key_file(self, folder: Path) -> Path:
        """The key of a service account that may do all here."""
        key = _key().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        told = {
            "type": "service_account",
            "project_id": PROJECT,
            "private_key_id": "1",
            "private_key": key.decode(),
            "client_email": EMAIL,
            "token_uri": f"{self.url}/token",
        }
        path = folder / "account.json"
        path.write_text(json.dumps(told))
        return path

    def new_token(self) -> str:
        self.tokens.append(f"ya29.{secrets.token_hex(16)}")
        return self.tokens[-1]

    def lets_in(self, authorization: str) -> bool:
        return authorization.removeprefix("Bearer ") in self.tokens

    def spoil(self, call: str, *troubles: Trouble) -> None:
        """Let the next calls of a kind go wrong, one by one."""
        self._troubles.setdefault(call, []).extend(troubles)

    def rows_of(self, name: str) -> list[dict[str, Any]]:
        [place] = self.jobs[name]["inputConfig"]["gcsSource"]["uris"]
        bucket, _, key = place.removeprefix("gs://").partition("/")
        return [json.loads(line) for line in self.buckets.read(bucket, key).splitlines()]

    def move(self, name: str, state: str, **fields: Any) -> None:
        """Let a job be in a state."""
        self.jobs[name].update(state=f"JOB_STATE_{state}", updateTime=_now(), **fields)

    def end(self, name: str, state: str = "SUCCEEDED") -> None:
        """Let a job end, and write its output."""
        lines: list[bytes] = []
        counts = {"successfulCount": 0, "failedCount": 0, "incompleteCount": 0}
        for row in self.rows_of(name):
            got = self.behave(name_of(row), row["request"])
            if got is None:
                counts["incompleteCount"] += 1
                continue
            counts["failedCount" if got.get("status") else "successfulCount"] += 1
            lines.append(json.dumps({**row, "processed_time": _now(), **got}).encode())
        lines.reverse()  # the order is not the rows'
        place = self.jobs[name]["outputConfig"]["gcsDestination"]["outputUriPrefix"]
        directory = f"{place}/prediction-model-{self.jobs[name]['createTime']}"
        bucket, _, prefix = directory.removeprefix("gs://").partition("/")
        lines += self.extra_lines
        for number, file_name in enumerate(self.file_names):
            dealt = lines[number :: len(self.file_names)]
            data = b"".join(line + b"\n" for line in dealt)
            self.buckets.write(bucket, f"{prefix}/{file_name}", data)
        stats = {kind: str(count) for kind, count in counts.items() if count}
        info = {"gcsOutputDirectory": directory}
        self.move(name, state, outputInfo=info, completionStats=stats, endTime=_now())

    # The calls

    async def _token(self, request: Request) -> Response:
        self.calls.append(TOKEN)
        asked = parse_qs((await request.body()).decode())
        waiting = self._troubles.get(TOKEN)
        if waiting:
            return JSONResponse({"error": "no"}, status_code=waiting.pop(0).status)
        if not _is_signed(asked["assertion"][0]):
            return JSONResponse({"error": "invalid_grant"}, status_code=400)
        token = {"access_token": self.new_token(), "expires_in": 3599, "token_type": "Bearer"}
        return JSONResponse(token)

    async def _serve(
        self, call: str, request: Request, work: Callable[[], Awaitable[Response]]
    ) -> Response:
        self.calls.append(call)
        waiting = self._troubles.get(call)
        trouble = waiting.pop(0) if waiting else Trouble()
        if self.is_down:
            return _error(503, "Not now.")
        if not self.lets_in(request.headers.get("authorization", "")):
            return _error(401, "Request had invalid authentication credentials.")
        if trouble.status:
            return _error(trouble.status, "Not now.")
        response = await work()
        if trouble.is_lost or trouble.is_cut:
            whole = bytes(response.body)
            half = b"" if trouble.is_lost else whole[: len(whole) // 2]
            return StreamingResponse(_cut(half), headers={"Content-Length": str(len(whole))})
        return response

    async def _create(self, request: Request) -> Response:
        async def work() -> Response:
            asked = await request.json()
            if fault := _fault(asked):
                return _error(400, fault)
            number = secrets.randbelow(9 * 10**18) + 10**18
            name = f"{_parent(request)}/batchPredictionJobs/{number}"
            times = {"createTime": _now(), "updateTime": _now()}
            made = {**asked, "name": name, "state": "JOB_STATE_PENDING", **times}
            self.jobs[name] = made
            return JSONResponse(made)

        return await self._serve(CREATE, request, work)

    async def _list(self, request: Request) -> Response:
        async def work() -> Response:
            parent, query = _parent(request), request.query_params
            found = [job for name, job in self.jobs.items() if name.startswith(f"{parent}/")]
            if asked := query.get("filter"):
                if not (told := _FILTER.fullmatch(asked)):
                    return _error(400, f"Invalid filter {asked!r}.")
                found = [j for j in found if j.get("labels", {}).get(told[1]) == told[2]]
            start = int(query.get("pageToken") or "0")
            end = start + min(int(query.get("pageSize", "100")), self.page)
            page: dict[str, Any] = {"batchPredictionJobs": found[start:end]} if found else {}
            if end < len(found):
                page["nextPageToken"] = str(end)
            return JSONResponse(page)

        return await self._serve(LIST, request, work)

    async def _get(self, request: Request) -> Response:
        async def work() -> Response:
            job = self._find(request)
            if job is None:
                return _error(404, "The BatchPredictionJob does not exist.")
            answer = JSONResponse(job)
            if job["state"] == "JOB_STATE_CANCELLING":
                error = {"code": 1, "message": "CANCELED"}
                self.move(job["name"], "CANCELLED", error=error)
            return answer

        return await self._serve(GET, request, work)

    async def _cancel(self, request: Request) -> Response:
        async def work() -> Response:
            job = self._find(request)
            if job is None:
                return _error(404, "The BatchPredictionJob does not exist.")
            if job["state"].removeprefix("JOB_STATE_") in FINAL:
                return _error(400, "The job has ended.")
            self.move(job["name"], "CANCELLING")
            return JSONResponse({})

        return await self._serve(CANCEL, request, work)

    def _find(self, request: Request) -> dict[str, Any] | None:
        number = request.path_params["id"]
        return self.jobs.get(f"{_parent(request)}/batchPredictionJobs/{number}")


def name_of(row: dict[str, Any]) -> str:
    """What a row is called, without the letters before it."""
    name = row.get("key") or row["request"]["labels"]["penstock_line"]
    return name.removeprefix("line-")


def _fault(asked: dict[str, Any]) -> str | None:
    if missing := [name for name in _NEEDED if name not in asked]:
        return f"Required field is not set: {missing[0]}"
    if not re.fullmatch(r"publishers/[^/]+/models/[^/]+|projects/.+", asked["model"]):
        return f"Invalid resource name: {asked['model']}"
    if asked["inputConfig"].get("instancesFormat") != "jsonl":
        return "instancesFormat is not supported."
    for label in asked.get("labels", {}).items():
        if not all(map(_LABEL.fullmatch, label)):
            return f"Invalid label {label}."
    return None if len(asked["displayName"]) <= 128 else "displayName is too long."


def _parent(request: Request) -> str:
    return "projects/{project}/locations/{location}".format(**request.path_params)


@functools.cache
def _key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def _is_signed(assertion: str) -> bool:
    """Whether an assertion is by our account and its signature by its key."""
    head, claims, signature = assertion.split(".")
    told = json.loads(_decode(claims))
    try:
        _key().public_key().verify(
            _decode(signature), f"{head}.{claims}".encode(), padding.PKCS1v15(), hashes.SHA256()
        )
    except Exception:
        return False
    is_for_us = told["iss"] == EMAIL and told["aud"] == _AUDIENCE and told["exp"] > time.time()
    return is_for_us and "cloud-platform" in told["scope"]


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _error(status: int, told: str) -> Response:
    error = {"code": status, "message": told, "status": _KINDS.get(status, "INTERNAL")}
    return JSONResponse({"error": error}, status_code=status)


async def _cut(data: bytes) -> AsyncIterator[bytes]:
    if data:
        yield data
    raise ConnectionResetError
