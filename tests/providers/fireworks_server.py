"""A provider that follows Fireworks' public reference of datasets and batch inference jobs.

    async with FireworksProvider() as provider:
        ...  # make and fill a dataset, create a job and poll it at provider.base_url
        provider.end(native_id)

It runs no model, and misbehaves when it is told to. A job goes on only when the test says so.
What a line gets is decided by `behave`. That it is like the real one is shown by Fireworks' own
client in `tests/clients/test_provider_servers.py`; what an error of a line looks like is
nowhere said.

Source: https://docs.fireworks.ai/guides/batch-inference and
https://docs.fireworks.ai/api-reference, 25 November 2026.
"""

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.providers.server import Handle, ProviderServer, prompt_of, read_form
from tests.upstreams import chat_completion

KEY = "fw-0123456789"
ACCOUNT = "team"
_ROOT = "/v1/accounts/{account}"
MAKE, UPLOAD = f"POST {_ROOT}/datasets", f"POST {_ROOT}/datasets/{{id}}:upload"
DATASET, DROP = f"GET {_ROOT}/datasets/{{id}}", f"DELETE {_ROOT}/datasets/{{id}}"
ADDRESSES = f"GET {_ROOT}/datasets/{{id}}:getDownloadEndpoint"
CREATE, LIST = f"POST {_ROOT}/batchInferenceJobs", f"GET {_ROOT}/batchInferenceJobs"
GET, DELETE = (
    f"GET {_ROOT}/batchInferenceJobs/{{id}}",
    f"DELETE {_ROOT}/batchInferenceJobs/{{id}}",
)
CONTENT = "GET /storage/{dataset}/{name}"
CHAT = "POST /inference/v1/chat/completions"

Behave = Callable[[str, dict[str, Any]], tuple[int, Any] | None]
"""Status and body for a line, by custom ID and request; None: it gets neither."""


def echo(custom_id: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Each prompt is its own answer."""
    return 200, chat_completion(prompt_of(body))


class FireworksProvider(ProviderServer):
    base_path = "/inference/v1"

    def __init__(self, *, behave: Behave = echo) -> None:
        super().__init__()
        self.behave = behave
        self.datasets: dict[str, dict[str, Any]] = {}
        self.contents: dict[str, dict[str, bytes]] = {}
        """The files of each dataset."""
        self.jobs: dict[str, dict[str, Any]] = {}
        """In the order of their creation: what was paid."""
        self.looks_until_ready = 1
        """How often a dataset that was filled is still shown as uploading."""
        self.keys_at_storage: list[str | None] = []
        """The key that came with each download."""

    def routes(self) -> Mapping[str, Handle]:
        return {
            MAKE: self._make,
            UPLOAD: self._upload,
            ADDRESSES: self._give_addresses,
            DATASET: self._get_dataset,
            DROP: self._drop,
            CREATE: self._create,
            LIST: self._list,
            GET: self._get,
            DELETE: self._delete,
            CONTENT: self._content,
            CHAT: self._answer,
            "GET /inference/v1/models": self._models,
        }

    def is_let_in(self, request: Request) -> bool:
        is_signed = request.query_params.get("signature") == "s"
        return is_signed or request.headers.get("authorization") == f"Bearer {KEY}"

    def error(
        self, status: int, told: str, headers: Mapping[str, str] | None = None
    ) -> Response:
        return JSONResponse(
            {"code": 3, "message": told, "details": []}, status_code=status, headers=headers
        )

    # What tests do

    def lines_of(self, native_id: str) -> list[dict[str, Any]]:
        """The requests of a job."""
        dataset = self.jobs[native_id]["inputDatasetId"].rpartition("/")[2]
        [data] = self.contents[dataset].values()
        return [json.loads(text) for text in data.splitlines()]

    def end(self, native_id: str, state: str = "COMPLETED", *, only: int | None = None) -> None:
        """Let a job end.

        Args:
            only: How many of its lines were run; of the others nothing is told. None: all.
        """
        job = self.jobs[native_id]
        output: list[bytes] = []
        errors: list[bytes] = []
        for line in self.lines_of(native_id)[:only]:
            got = self.behave(line["custom_id"], line["body"])
            if got is None:
                continue
            name = "response" if got[0] < 300 else "error"
            made = json.dumps({"custom_id": line["custom_id"], name: got[1]}).encode()
            (output if name == "response" else errors).append(made)
        output.reverse()  # the order is not the input's
        dataset = job["outputDatasetId"].rpartition("/")[2]
        self.datasets[dataset] = {"name": job["outputDatasetId"], "state": "READY"}
        self.contents[dataset] = {
            "BIJOutputSet.jsonl": b"".join(line + b"\n" for line in output),
            "error-data": b"".join(line + b"\n" for line in errors),
        }
        job["state"] = f"JOB_STATE_{state}"
        job["jobProgress"] = {
            "percent": 100,
            "totalInputRequests": len(self.lines_of(native_id)),
            "successfullyProcessedRequests": len(output),
            "failedRequests": len(errors),
        }

    # The routes

    async def _make(self, request: Request) -> Response:
        body = await request.json()
        name, dataset = body["datasetId"], body["dataset"]
        if not dataset.get("exampleCount"):
            return self.error(400, "example_count is required for uploaded datasets")
        if name in self.datasets:
            return self.error(409, "The dataset exists already.")
        self.datasets[name] = {
            "name": f"accounts/{ACCOUNT}/datasets/{name}",
            "createTime": _now(),
            "state": "UPLOADING",
            "exampleCount": dataset["exampleCount"],
            "userUploaded": {},
        }
        return JSONResponse(self.datasets[name])

    async def _upload(self, request: Request) -> Response:
        name = request.path_params["id"]
        if name not in self.datasets:
            return self._unknown()
        _, file_name, data = await read_form(request)
        self.contents[name] = {file_name: data}
        self.datasets[name]["looks"] = self.looks_until_ready
        return JSONResponse({"filename": file_name, "bytes": len(data), "object": "file"})

    async def _get_dataset(self, request: Request) -> Response:
        dataset = self.datasets.get(request.path_params["id"])
        if dataset is None:
            return self._unknown()
        told = {name: value for name, value in dataset.items() if name != "looks"}
        if "looks" in dataset:
            dataset["looks"] -= 1
            dataset["state"] = "READY" if dataset["looks"] < 1 else "UPLOADING"
        return JSONResponse(told)

    async def _drop(self, request: Request) -> Response:
        gone = self.datasets.pop(request.path_params["id"], None)
        return JSONResponse({}) if gone else self._unknown()

    async def _give_addresses(self, request: Request) -> Response:
        name = request.path_params["id"]
        if name not in self.datasets:
            return self._unknown()
        urls = {
            f"dataset/{name}/{file}": f"{self.root_url}/storage/{name}/{file}?signature=s"
            for file in self.contents[name]
        }
        return JSONResponse({"filenameToSignedUrls": urls})

    async def _content(self, request: Request) -> Response:
        self.keys_at_storage.append(request.headers.get("authorization"))
        data = self.contents[request.path_params["dataset"]][request.path_params["name"]]
        return Response(data, media_type="application/octet-stream")

    async def _create(self, request: Request) -> Response:
        body, native_id = await request.json(), request.query_params["batchInferenceJobId"]
        dataset = self.datasets.get(body["inputDatasetId"].rpartition("/")[2])
        if native_id in self.jobs:
            return self.error(409, "The job exists already.")
        if dataset is None or dataset["state"] != "READY" or not body.get("model"):
            return self.error(400, "The dataset is not ready.")
        self.jobs[native_id] = {
            "name": f"accounts/{ACCOUNT}/batchInferenceJobs/{native_id}",
            "displayName": body.get("displayName", ""),
            "createTime": _now(),
            "createdBy": "someone@example.org",
            "state": "JOB_STATE_VALIDATING",
            "status": {"code": "OK", "message": ""},
            "model": body["model"],
            "inputDatasetId": body["inputDatasetId"],
            "outputDatasetId": body["outputDatasetId"],
            "inferenceParameters": {"extraBody": "{}"},
            "updateTime": _now(),
        }
        return JSONResponse(self.jobs[native_id])

    async def _list(self, request: Request) -> Response:
        return JSONResponse(
            {"batchInferenceJobs": list(self.jobs.values()), "totalSize": len(self.jobs)}
        )

    async def _get(self, request: Request) -> Response:
        job = self.jobs.get(request.path_params["id"])
        return JSONResponse(job) if job else self._unknown()

    async def _delete(self, request: Request) -> Response:
        job = self.jobs.get(request.path_params["id"])
        if job is None:
            return self._unknown()
        job["state"] = "JOB_STATE_DELETING_CLEANING_UP"
        return JSONResponse({})

    async def _answer(self, request: Request) -> Response:
        status, told = self.behave("", await request.json()) or (500, {})
        return JSONResponse(told, status_code=status)

    async def _models(self, request: Request) -> Response:
        data = [{"id": "accounts/fireworks/models/m", "object": "model"}]
        return JSONResponse({"object": "list", "data": data})

    def _unknown(self) -> Response:
        return self.error(404, "resource not found")


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
