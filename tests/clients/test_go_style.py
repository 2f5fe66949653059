"""What a strictly typed client takes, such as the one for Go, which the tests do not need.

Its structs take whole numbers only where times and counts are, and a body that does not decode
is an error of its own; a redirect loses what was sent with it.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx2
import msgspec
import pytest

from tests.clients.conftest import Penstock

T = TypeVar("T")
PATIENCE_S = 20
ROOMS = ("/v1", "/api/llm", "/openai/v1", "/openai", "/openai/deployments/sim")
FINAL = ("completed", "failed", "expired", "cancelled")
CHAT = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}


class File(msgspec.Struct):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None


class DeletedFile(msgspec.Struct):
    id: str
    object: Literal["file"]
    deleted: bool


class Fault(msgspec.Struct):
    code: str
    message: str
    param: str | None
    line: int | None


class Faults(msgspec.Struct):
    object: Literal["list"]
    data: list[Fault]


class Counts(msgspec.Struct):
    total: int
    completed: int
    failed: int


class InputDetails(msgspec.Struct):
    cached_tokens: int


class OutputDetails(msgspec.Struct):
    reasoning_tokens: int


class Usage(msgspec.Struct):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Batch(msgspec.Struct):
    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    errors: Faults | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating",
        "failed",
        "in_progress",
        "finalizing",
        "completed",
        "expired",
        "cancelling",
        "cancelled",
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: Counts
    usage: Usage
    metadata: dict[str, str] | None


class Files(msgspec.Struct):
    object: Literal["list"]
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Batches(msgspec.Struct):
    object: Literal["list"]
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Model(msgspec.Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(msgspec.Struct):
    object: Literal["list"]
    data: list[Model]


class Upload(msgspec.Struct):
    id: str
    object: Literal["upload"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: File | None


class Part(msgspec.Struct):
    id: str
    object: Literal["upload.part"]
    created_at: int
    upload_id: str


class Error(msgspec.Struct, forbid_unknown_fields=True):
    message: str
    type: str
    param: str | None
    code: str | None


class Errors(msgspec.Struct, forbid_unknown_fields=True):
    error: Error


class Client:
    """Sends as Go does, and looks at every answer as no client of ours would."""

    def __init__(self, url: str, key: str) -> None:
        headers = {"authorization": f"Bearer {key}", "accept": "application/json"}
        self._http = httpx2.Client(base_url=url, headers=headers, verify=False, trust_env=False)

    def close(self) -> None:
        self._http.close()

    def send(self, method: str, path: str, **what: Any) -> httpx2.Response:
        answer = self._http.request(method, path, **what)
        assert not 300 <= answer.status_code < 400, f"{method} {path} redirects"
        assert len(answer.headers.get_list("x-request-id")) == 1
        assert answer.headers["x-request-id"].startswith("req_")
        assert int(answer.headers.get("retry-after", 0)) <= 60
        return answer

    def decode(self, type_: type[T], method: str, path: str, **what: Any) -> T:
        answer = self.send(method, path, **what)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/json"
        return msgspec.json.decode(answer.content, type=type_)

    def refusal(self, method: str, path: str, **what: Any) -> tuple[int, Error]:
        answer = self.send(method, path, **what)
        assert answer.headers["content-type"] == "application/json"
        error = msgspec.json.decode(answer.content, type=Errors).error
        assert error.message
        assert error.type == (
            "invalid_request_error" if answer.status_code < 500 else "server_error"
        )
        return answer.status_code, error

    def upload(self, path: Path, *, room: str = "/v1") -> File:
        files = {"file": (path.name, path.read_bytes())}
        return self.decode(
            File, "POST", f"{room}/files", data={"purpose": "batch"}, files=files
        )

    def create(self, file: File, **more: Any) -> Batch:
        body = {"input_file_id": file.id, **CHAT, **more}
        return self.decode(Batch, "POST", "/v1/batches", json=body)

    def wait(self, batch: Batch, *until: str) -> Batch:
        deadline = time.monotonic() + PATIENCE_S
        while batch.status not in until:
            assert time.monotonic() < deadline, f"the batch is {batch.status}"
            time.sleep(0.02)
            batch = self.decode(Batch, "GET", f"/v1/batches/{batch.id}")
        return batch


@pytest.fixture(scope="module")
def new_client(penstock: Penstock) -> Iterator[Callable[[], Client]]:
    """Makes a client of a project of its own."""
    clients: list[Client] = []

    def make() -> Client:
        clients.append(Client(penstock.url, penstock.new_key()))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(new_client: Callable[[], Client]) -> Client:
    return new_client()


@pytest.fixture(scope="module")
def lasting_client(new_client: Callable[[], Client]) -> Client:
    """For tests that leave nothing behind, and so may share a project."""
    return new_client()


def test_a_batch_decodes_from_its_creation_to_its_end(client: Client, inputs: Path) -> None:
    file = client.upload(inputs / "requests.jsonl")
    batch = client.wait(client.create(file, metadata={"team": "search"}), *FINAL)

    assert batch.status == "completed"
    stages = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert None not in stages
    assert stages == sorted(stages)
    assert batch.request_counts == Counts(4, 3, 1)
    for file_id in (batch.output_file_id, batch.error_file_id):
        assert client.decode(File, "GET", f"/v1/files/{file_id}").purpose == "batch_output"


def test_a_file_s_content_comes_whole_with_its_length(client: Client, inputs: Path) -> None:
    source = inputs / "requests.jsonl"
    file = client.upload(source)

    answer = client.send(
        "GET", f"/v1/files/{file.id}/content", headers={"accept": "application/binary"}
    )

    assert (answer.status_code, answer.content) == (200, source.read_bytes())
    assert int(answer.headers["content-length"]) == file.bytes
    assert 'filename="requests.jsonl"' in answer.headers["content-disposition"]


def test_a_failed_batch_decodes_with_its_faults(client: Client, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"custom_id": "a"}\n{"custom_id": "a"}\n')

    batch = client.wait(client.create(client.upload(tmp_path / "bad.jsonl")), *FINAL)

    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert batch.errors is not None
    assert {fault.line for fault in batch.errors.data} == {1, 2}


def test_a_cancelled_batch_decodes(client: Client, inputs: Path) -> None:
    batch = client.create(client.upload(inputs / "held.jsonl"))
    client.wait(batch, "in_progress")
    batch = client.decode(
        Batch, "POST", f"/v1/batches/{batch.id}/cancel", headers={"content-length": "0"}
    )

    assert batch.cancelling_at is not None
    batch = client.wait(batch, *FINAL)
    assert batch.status == "cancelled"
    assert batch.cancelled_at is not None


def test_pages_decode_and_the_last_one_says_so(client: Client, inputs: Path) -> None:
    file = client.upload(inputs / "requests.jsonl")
    made = [client.create(file).id for _ in range(3)]

    first = client.decode(Batches, "GET", "/v1/batches", params={"limit": 2})
    params = {"limit": 2, "after": first.data[-1].id}
    last = client.decode(Batches, "GET", "/v1/batches", params=params)
    end = client.decode(Batches, "GET", "/v1/batches", params={"after": last.data[-1].id})

    assert [batch.id for batch in (*first.data, *last.data)] == made[::-1]
    assert (first.has_more, last.has_more, end.has_more) == (True, False, False)
    assert (first.first_id, first.last_id) == (made[2], made[1])
    assert (end.data, end.first_id, end.last_id) == ([], None, None)


def test_files_decode_in_a_list_and_when_they_are_deleted(client: Client, inputs: Path) -> None:
    assert client.decode(Files, "GET", "/v1/files").data == []
    file = client.upload(inputs / "requests.jsonl")

    assert client.decode(Files, "GET", "/v1/files", params={"limit": 10_000}).data == [file]
    deleted = client.decode(DeletedFile, "DELETE", f"/v1/files/{file.id}")
    assert (deleted.id, deleted.deleted) == (file.id, True)
    assert client.refusal("DELETE", f"/v1/files/{file.id}")[0] == 404


def test_models_decode(lasting_client: Client) -> None:
    models = lasting_client.decode(Models, "GET", "/v1/models")

    assert [model.id for model in models.data] == ["sim"]


def test_an_upload_decodes_from_its_creation_to_its_end(client: Client, inputs: Path) -> None:
    data = (inputs / "requests.jsonl").read_bytes()
    body = {
        "bytes": len(data),
        "filename": "in.jsonl",
        "mime_type": "application/jsonl",
        "purpose": "batch",
    }

    upload = client.decode(Upload, "POST", "/v1/uploads", json=body)
    part = client.decode(
        Part,
        "POST",
        f"/v1/uploads/{upload.id}/parts",
        files={"data": ("upload", data, "application/octet-stream")},
    )
    done = client.decode(
        Upload, "POST", f"/v1/uploads/{upload.id}/complete", json={"part_ids": [part.id]}
    )

    assert (upload.status, upload.file) == ("pending", None)
    assert (done.id, done.status) == (upload.id, "completed")
    assert done.file is not None
    assert done.file.bytes == upload.bytes == len(data)
    other = client.decode(Upload, "POST", "/v1/uploads", json=body)
    cancelled = client.decode(Upload, "POST", f"/v1/uploads/{other.id}/cancel")
    assert (cancelled.status, cancelled.file) == ("cancelled", None)


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_answers_directly_also_with_a_slash_at_the_end(
    lasting_client: Client, inputs: Path, room: str
) -> None:
    file = lasting_client.upload(inputs / "requests.jsonl", room=room)

    for path in (
        "",
        "/batches",
        "/batches/batch_1",
        "/batches/batch_1/cancel",
        "/batches/batch_1/output",
        "/files",
        f"/files/{file.id}",
        f"/files/{file.id}/content",
        "/models",
        "/uploads",
        "/uploads/upload_1/parts",
        "/uploads/upload_1/complete",
        "/uploads/upload_1/cancel",
        "/nothing",
    ):
        for method in ("GET", "POST"):
            lasting_client.send(method, room + path)
            status, _ = lasting_client.refusal(method, f"{room}{path}/")
            assert status in (400, 404, 405)


REFUSED = {
    "no such route": (404, None, None, ("GET", "/v1/nothing", {})),
    "no such page": (404, None, None, ("GET", "/", {})),
    "a wrong method": (405, None, None, ("PUT", "/v1/batches", {})),
    "a question for options": (405, None, None, ("OPTIONS", "/v1/files", {})),
    "no such batch": (404, None, None, ("GET", "/v1/batches/batch_1", {})),
    "a cancel of no batch": (404, None, None, ("POST", "/v1/batches/batch_1/cancel", {})),
    "no such file": (404, "id", None, ("GET", "/v1/files/file-1", {})),
    "a body that is no JSON": (400, None, None, ("POST", "/v1/batches", {"content": b"{"})),
    "a body that is no object": (
        400,
        None,
        "invalid_type",
        ("POST", "/v1/batches", {"json": [1]}),
    ),
    "a body that is no text": (400, None, None, ("POST", "/v1/batches", {"content": b"\xff"})),
    "no input file": (
        400,
        "input_file_id",
        "missing_required_parameter",
        ("POST", "/v1/batches", {"json": CHAT}),
    ),
    "an input file that is no string": (
        400,
        "input_file_id",
        "invalid_type",
        ("POST", "/v1/batches", {"json": {**CHAT, "input_file_id": 1}}),
    ),
    "a window that is none": (
        400,
        "completion_window",
        "invalid_value",
        (
            "POST",
            "/v1/batches",
            {"json": {**CHAT, "input_file_id": "file-1", "completion_window": "soon"}},
        ),
    ),
    "metadata that is no string": (
        400,
        "metadata.tags",
        "invalid_type",
        (
            "POST",
            "/v1/batches",
            {"json": {**CHAT, "input_file_id": "file-1", "metadata": {"tags": ["a"]}}},
        ),
    ),
    "a page of none": (
        400,
        "limit",
        "integer_below_min_value",
        ("GET", "/v1/batches", {"params": {"limit": 0}}),
    ),
    "a page that is too long": (
        400,
        "limit",
        "integer_above_max_value",
        ("GET", "/v1/batches", {"params": {"limit": 101}}),
    ),
    "a form that is none": (400, None, None, ("POST", "/v1/files", {"content": b"x"})),
    "a form without a purpose": (
        400,
        "purpose",
        "missing_required_parameter",
        ("POST", "/v1/files", {"files": {"file": ("in.jsonl", b"{}\n")}}),
    ),
    "no key": (401, None, None, ("GET", "/v1/files", {"headers": {"authorization": ""}})),
    "a wrong key": (
        401,
        None,
        "invalid_api_key",
        ("GET", "/v1/files", {"headers": {"authorization": "Bearer sk-wrong-0123456789"}}),
    ),
}
"""Status, `param` and `code`, and the request that gets them."""


@pytest.mark.parametrize("case", REFUSED)
def test_every_error_decodes(lasting_client: Client, case: str) -> None:
    status, param, code, (method, path, what) = REFUSED[case]

    answer, error = lasting_client.refusal(method, path, **what)

    assert (answer, error.param, error.code) == (status, param, code)


def test_a_late_cancel_is_refused_in_a_way_that_decodes(client: Client, inputs: Path) -> None:
    batch = client.wait(client.create(client.upload(inputs / "requests.jsonl")), *FINAL)

    status, error = client.refusal("POST", f"/v1/batches/{batch.id}/cancel")

    assert (status, error.param, error.code) == (409, None, None)


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/openapi.json"])
def test_what_needs_no_key_names_its_request_too(lasting_client: Client, path: str) -> None:
    assert lasting_client.send("GET", path).status_code == 200
