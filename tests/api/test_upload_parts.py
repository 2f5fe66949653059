"""Uploads in parts, through the official client and through raw requests."""

import asyncio
import hashlib
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI

from penstock.api import wire
from penstock.errors import InvalidRequest, StorageUnavailable
from penstock.executor.upkeep import keep_up, recover
from penstock.model import UploadId
from penstock.uploads import MAX_PART_BYTES, MAX_UPLOAD_BYTES, UPLOAD_LIFE_S, Uploads
from tests.api.conftest import LIMITS, LINE, Server, Tenant

CONTENT = LINE * 100


@pytest.fixture
def late(server: Server) -> Iterator[Uploads]:
    """The uploads of the server, as they are seen an hour later."""
    yield Uploads(
        store=server.store,
        blobs=server.blobs,
        limits=LIMITS,
        clock=lambda: time.time() + UPLOAD_LIFE_S,
    )


def start(http: httpx2.Client, content: bytes = CONTENT, **more: Any) -> str:
    body = {
        "bytes": len(content),
        "filename": "in.jsonl",
        "mime_type": "text/jsonl",
        "purpose": "batch",
    }
    return http.post("/uploads", json=body | more).raise_for_status().json()["id"]


def add(http: httpx2.Client, upload_id: str, data: bytes, **headers: str) -> httpx2.Response:
    files = {"data": ("upload", data)}
    return http.post(f"/uploads/{upload_id}/parts", files=files, headers=headers)


def id_of(answer: httpx2.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def complete(
    http: httpx2.Client, upload_id: str, part_ids: list[str], **more: Any
) -> httpx2.Response:
    return http.post(f"/uploads/{upload_id}/complete", json={"part_ids": part_ids} | more)


def refused(answer: httpx2.Response, text: str, *, param: str | None = None) -> None:
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert text in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_a_new_upload_has_every_key_and_no_other(http: httpx2.Client) -> None:
    body = {
        "bytes": 5,
        "filename": "../in.jsonl",
        "mime_type": "text/jsonl",
        "purpose": "batch",
        "expires_after": {"anchor": "created_at", "seconds": 3600},
    }

    upload = http.post("/uploads", json=body).json()

    wire.UploadShape.model_validate(upload)
    assert upload == {
        "id": upload["id"],
        "object": "upload",
        "bytes": 5,
        "created_at": upload["created_at"],
        "expires_at": upload["created_at"] + 3600,
        "filename": "in.jsonl",
        "purpose": "batch",
        "status": "pending",
        "file": None,
    }
    assert upload["id"].startswith("upload_")
    assert abs(upload["created_at"] - time.time()) < 5


def test_parts_become_a_file_in_the_order_that_is_asked_for(
    http: httpx2.Client, client: OpenAI, server: Server
) -> None:
    content = b'{"custom_id":1}\n{"custom_id":2}\n{"custom_id":3}'
    pieces = [content[:7], content[7:20], content[20:]]
    upload = client.uploads.create(
        bytes=len(content), filename="a.jsonl", mime_type="text/jsonl", purpose="batch"
    )
    before = server.stored_keys()
    parts = {n: client.uploads.parts.create(upload.id, data=pieces[n]) for n in (2, 0, 1)}
    client.uploads.parts.create(upload.id, data=b"sent again, and not named at the end")

    done = client.uploads.complete(
        upload.id,
        part_ids=[parts[n].id for n in range(3)],
        md5=hashlib.md5(content).hexdigest().upper(),
    )

    assert {(part.object, part.upload_id) for part in parts.values()} == {
        ("upload.part", upload.id)
    }
    assert (done.status, done.id, done.bytes) == ("completed", upload.id, len(content))
    assert done.file is not None
    assert (done.file.filename, done.file.purpose) == ("a.jsonl", "batch")
    assert done.file.bytes == len(content)
    assert done.file.expires_at == done.file.created_at + 30 * 86400
    assert client.files.retrieve(done.file.id) == done.file
    assert client.files.content(done.file.id).read() == content
    etag = http.get(f"/files/{done.file.id}/content").headers["etag"]
    assert etag == f'"{hashlib.sha256(content).hexdigest()}"'
    assert server.stored_keys() - before == {f"files/{done.file.id}"}


def test_the_helper_of_the_client_works(client: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(CONTENT)

    upload = client.uploads.upload_file_chunked(
        file=path, mime_type="text/jsonl", purpose="batch", part_size=1000
    )

    assert upload.file is not None
    assert client.files.content(upload.file.id).read() == CONTENT
    batch = client.batches.create(
        input_file_id=upload.file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    assert batch.status == "validating"


def test_parts_may_come_at_the_same_time(http: httpx2.Client, tenant: Tenant) -> None:
    content = random.Random(1).randbytes(900_000)
    upload_id = start(http, content, purpose="user_data")
    pieces = [content[n : n + 100_000] for n in range(0, len(content), 100_000)]

    with ThreadPoolExecutor(9) as threads:
        sent = threads.map(lambda piece: id_of(add(tenant.http(), upload_id, piece)), pieces)
        done = complete(http, upload_id, list(sent)).json()

    assert done["status"] == "completed"
    blob = f"files/{done['file']['id']}"
    assert (tenant.server.blob_folder / blob).read_bytes() == content


def test_the_file_lives_as_long_as_was_asked_for(http: httpx2.Client) -> None:
    expiry = {"anchor": "created_at", "seconds": 7200}
    upload_id = start(http, expires_after=expiry)

    file = complete(http, upload_id, [id_of(add(http, upload_id, CONTENT))]).json()["file"]

    assert file["expires_at"] == file["created_at"] + 7200


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"bytes": ...}, "bytes", "missing_required_parameter"),
        ({"filename": ...}, "filename", "missing_required_parameter"),
        ({"mime_type": ...}, "mime_type", "missing_required_parameter"),
        ({"purpose": ...}, "purpose", "missing_required_parameter"),
        ({"bytes": "5"}, "bytes", "invalid_type"),
        ({"bytes": 0}, "bytes", "integer_below_min_value"),
        ({"bytes": LIMITS.input_file_bytes + 1}, "bytes", "integer_above_max_value"),
        (
            {"bytes": MAX_UPLOAD_BYTES + 1, "purpose": "user_data"},
            "bytes",
            "integer_above_max_value",
        ),
        ({"bytes": 10**40}, "bytes", "integer_above_max_value"),
        ({"purpose": "batch_output"}, "purpose", "invalid_value"),
        ({"purpose": "none"}, "purpose", "invalid_value"),
        ({"mime_type": "x" * 256}, "mime_type", "string_above_max_length"),
        ({"mime_type": "a\x00"}, "mime_type", "invalid_value"),
        ({"expires_after": {"anchor": "created_at"}}, "expires_after.seconds", None),
        ({"colour": "red"}, "colour", "unknown_parameter"),
    ],
)
def test_a_wrong_upload_is_refused(
    http: httpx2.Client, change: dict[str, Any], param: str, code: str | None
) -> None:
    body = {"bytes": 5, "filename": "a", "mime_type": "b", "purpose": "batch"} | change

    answer = http.post("/uploads", json={k: v for k, v in body.items() if v is not ...})

    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert code in (None, error["code"])


def test_what_is_too_large_says_how_large_it_may_be(http: httpx2.Client) -> None:
    body = {"bytes": 1 << 30, "filename": "a", "mime_type": "b", "purpose": "batch"}

    message = http.post("/uploads", json=body).json()["error"]["message"]

    assert str(1 << 30) in message
    assert str(LIMITS.input_file_bytes) in message


@pytest.mark.parametrize("action", ["parts", "complete", "cancel"])
def test_an_unknown_upload_is_not_found(
    http: httpx2.Client, server: Server, action: str
) -> None:
    other = server.add_project()
    for upload_id in ("upload_none", start(other.http())):
        path = f"/uploads/{upload_id}/{action}"
        body: dict[str, Any] = (
            {"files": {"data": b"x"}} if action == "parts" else {"json": {"part_ids": []}}
        )
        answer = http.post(path, **body)
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == f"No such Upload object: {upload_id}"
    other.close()


def test_a_part_that_is_too_large_is_refused_while_it_comes(
    http: httpx2.Client, server: Server, tenant: Tenant
) -> None:
    upload_id = start(http)
    before = server.stored_keys()

    def chunks() -> Iterator[bytes]:
        yield b'--x\r\ncontent-disposition: form-data; name="data"; filename="upload"\r\n\r\n'
        for _ in range(MAX_PART_BYTES // (1 << 20)):
            yield bytes(1 << 20)
        yield b"one more"
        yield b"\r\n--x--\r\n"

    answer = http.post(
        f"/uploads/{upload_id}/parts",
        content=chunks(),
        headers={"content-type": "multipart/form-data; boundary=x"},
    )

    refused(answer, str(MAX_PART_BYTES), param="data")
    assert server.stored_keys() == before


def test_a_part_that_is_announced_too_large_is_refused_at_once(
    http: httpx2.Client, server: Server
) -> None:
    import socket

    upload_id = start(http)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(
            f"POST /v1/uploads/{upload_id}/parts HTTP/1.1\r\nhost: x\r\n"
            f"authorization: {http.headers['authorization']}\r\n"
            "content-type: multipart/form-data; boundary=x\r\n"
            f"content-length: {MAX_PART_BYTES * 2}\r\n\r\n".encode()
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")


def test_a_form_without_a_part_is_refused(http: httpx2.Client) -> None:
    upload_id = start(http)
    path = f"/uploads/{upload_id}/parts"

    refused(http.post(path, files={"file": b"x"}), "'data'", param="data")
    refused(http.post(path, json={}), "multipart/form-data")
    refused(add(http, upload_id, b""), "empty", param="data")


def test_a_disk_is_not_filled_by_parts_that_nobody_names(http: httpx2.Client) -> None:
    upload_id = start(http, b"{}", purpose="user_data")
    big = bytes(MAX_PART_BYTES)
    id_of(add(http, upload_id, big))
    id_of(add(http, upload_id, b"1234"))

    refused(add(http, upload_id, b"5"), "takes no more parts", param="data")


@pytest.mark.parametrize(
    ("part_ids", "text"),
    [
        (["{0}"], "has 8300 bytes, but its 1 parts have 8200"),
        ([], "its 0 parts have 0 bytes"),
        (["{0}", "{1}", "{0}"], "is named twice"),
        (["{0}", "part_none"], "'part_none' is no part of this upload"),
    ],
)
def test_parts_that_do_not_make_the_file_leave_the_upload_as_it_was(
    http: httpx2.Client, server: Server, part_ids: list[str], text: str
) -> None:
    upload_id = start(http)
    ids = [id_of(add(http, upload_id, part)) for part in (CONTENT[:-100], CONTENT[-100:])]
    before = server.stored_keys()
    text = text.replace("8300", str(len(CONTENT))).replace("8200", str(len(CONTENT) - 100))
    text = text.replace("has", "is to have", 1) if "bytes, but" in text else text

    answer = complete(http, upload_id, [each.format(*ids) for each in part_ids])

    refused(answer, text, param="part_ids")
    assert server.stored_keys() == before
    assert complete(http, upload_id, ids).json()["status"] == "completed"


def test_a_wrong_md5_leaves_the_upload_as_it_was(http: httpx2.Client, server: Server) -> None:
    upload_id = start(http)
    part_id = id_of(add(http, upload_id, CONTENT))
    before = server.stored_keys()

    for md5 in ("0" * 32, "none"):
        answer = complete(http, upload_id, [part_id], md5=md5)
        refused(answer, hashlib.md5(CONTENT).hexdigest(), param="md5")

    assert server.stored_keys() == before
    assert complete(http, upload_id, [part_id]).status_code == 200


def test_what_is_no_batch_file_leaves_the_upload_as_it_was(
    http: httpx2.Client, server: Server
) -> None:
    upload_id = start(http, b"no JSON\n")
    part_id = id_of(add(http, upload_id, b"no JSON\n"))
    before = server.stored_keys()

    refused(complete(http, upload_id, [part_id]), "Must be .jsonl")

    assert server.stored_keys() == before
    assert http.post(f"/uploads/{upload_id}/cancel").json()["status"] == "cancelled"
    assert server.stored_keys() < before


def test_the_same_complete_again_gets_the_same_answer(http: httpx2.Client) -> None:
    upload_id = start(http)
    part_id = id_of(add(http, upload_id, CONTENT))
    first = complete(http, upload_id, [part_id]).json()

    assert complete(http, upload_id, [part_id]).json() == first
    refused(complete(http, upload_id, []), "is completed")
    refused(add(http, upload_id, b"x"), "is completed")
    refused(http.post(f"/uploads/{upload_id}/cancel"), "is completed")
    http.delete(f"/files/{first['file']['id']}")
    assert complete(http, upload_id, [part_id]).json() == first | {"file": None}


def test_of_completes_at_the_same_time_one_makes_the_file(
    http: httpx2.Client, server: Server, tenant: Tenant
) -> None:
    content = LINE * 10_000
    upload_id = start(http, content)
    half = len(content) // 2
    ids = [id_of(add(http, upload_id, part)) for part in (content[:half], content[half:])]
    answers: list[Any] = []

    def send() -> None:
        answers.append(complete(tenant.http(), upload_id, ids))

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [each.status_code for each in answers] == [200] * 6, [e.text for e in answers]
    files = {each.json()["file"]["id"] for each in answers}
    assert len(files) == 1
    assert [file["id"] for file in http.get("/files").json()["data"]] == list(files)
    assert not any(upload_id in key for key in server.stored_keys())


def test_a_cancelled_upload_is_over(http: httpx2.Client, server: Server) -> None:
    upload_id = start(http)
    part_id = id_of(add(http, upload_id, CONTENT))

    cancelled = http.post(f"/uploads/{upload_id}/cancel").json()

    assert cancelled["status"] == "cancelled"
    assert http.post(f"/uploads/{upload_id}/cancel").json() == cancelled
    assert not any(upload_id in key for key in server.stored_keys())
    refused(complete(http, upload_id, [part_id]), "is cancelled")
    refused(add(http, upload_id, b"x"), "is cancelled")


def test_a_client_sees_why_its_part_was_refused(client: OpenAI) -> None:
    upload = client.uploads.create(
        bytes=5, filename="a", mime_type="text/plain", purpose="user_data"
    )
    client.uploads.cancel(upload.id)

    with pytest.raises(openai.BadRequestError, match="is cancelled"):
        client.uploads.parts.create(upload.id, data=b"x")


class _Form:
    """A part as it comes."""

    declared_bytes = None
    fields: dict[str, str] = {}  # noqa: RUF012

    async def content(self) -> AsyncIterator[bytes]:
        yield CONTENT


def test_after_an_hour_an_upload_is_expired(
    http: httpx2.Client, server: Server, tenant: Tenant, late: Uploads
) -> None:
    upload_id = start(http)
    part_id = id_of(add(http, upload_id, CONTENT))
    project = tenant.project_id
    for call in (
        lambda: late.add_part(project, upload_id, _Form()),
        lambda: late.complete(project, upload_id, part_ids=[part_id]),
        lambda: late.cancel(project, upload_id),
    ):
        with pytest.raises(InvalidRequest, match="is expired"):
            server.call(call())
    assert complete(http, upload_id, [part_id]).status_code == 200


def test_upkeep_ends_what_was_not_completed_in_time(
    http: httpx2.Client, server: Server, tenant: Tenant
) -> None:
    body = {"bytes": 8, "filename": "a", "mime_type": "b", "purpose": "batch"}
    upload_id = http.post("/uploads", json=body).json()["id"]
    id_of(add(http, upload_id, b"{}"))

    async def end() -> None:
        import sqlite3
        from contextlib import closing

        with closing(sqlite3.connect(server.blob_folder.parent / "penstock.db")) as raw:
            raw.execute("UPDATE uploads SET expires_at = 1 WHERE id = ?", (upload_id,))
            raw.commit()
        upkeep = asyncio.create_task(keep_up(store=server.store, blobs=server.blobs))
        while await server.store.list_parts(UploadId(upload_id)):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        upkeep.cancel()

    server.call(end())

    refused(add(http, upload_id, b"x"), "is expired")
    assert not any(upload_id in key for key in server.stored_keys())


def test_a_key_makes_one_upload_and_one_part(http: httpx2.Client) -> None:
    key = {"idempotency-key": "a"}
    body = {"bytes": 8, "filename": "a", "mime_type": "b", "purpose": "batch"}
    first = http.post("/uploads", json=body, headers=key).json()
    assert http.post("/uploads", json=body, headers=key).json() == first
    assert http.post("/uploads", json=body | {"bytes": 9}, headers=key).status_code == 409
    retry = {"x-stainless-retry-count": "1"}
    second = http.post("/uploads", json=body).json()
    assert http.post("/uploads", json=body, headers=retry).json() == second

    part = add(http, first["id"], b"x", **{"idempotency-key": "p"}).json()
    assert add(http, first["id"], b"x", **{"idempotency-key": "p"}).json() == part
    assert add(http, first["id"], b"y", **{"idempotency-key": "p"}).status_code == 409
    # Two parts may be equal and both be meant.
    assert add(http, first["id"], b"x", **retry).json()["id"] != part["id"]


def test_what_a_dead_process_left_of_an_upload_is_swept_away(
    http: httpx2.Client, server: Server, tenant: Tenant
) -> None:
    upload_id = start(http)
    part_id = id_of(add(http, upload_id, CONTENT))

    async def leave_and_recover() -> None:
        async def bytes_() -> AsyncIterator[bytes]:
            yield b"x"

        from penstock.engine.memory import MemoryEngine

        await server.blobs.put(f"parts/{upload_id}/part_lost", bytes_())
        await server.blobs.put("files/file-lost", bytes_())
        await recover(
            store=server.store,
            blobs=server.blobs,
            segments=server.segments,
            engine=MemoryEngine(),
        )

    server.call(leave_and_recover())

    assert not {f"parts/{upload_id}/part_lost", "files/file-lost"} & server.stored_keys()
    assert complete(http, upload_id, [part_id]).json()["status"] == "completed"


def test_an_upload_that_cannot_be_published_can_be_completed_later(
    http: httpx2.Client, server: Server, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_id = start(http)
    part_id = id_of(add(http, upload_id, CONTENT))
    before = server.stored_keys()

    async def fail(*_: object, **__: object) -> None:
        raise StorageUnavailable("The database is full.")

    with monkeypatch.context() as patch:
        patch.setattr(server.store, "end_upload", fail)
        assert complete(http, upload_id, [part_id]).status_code == 503

    assert server.stored_keys() == before
    assert complete(http, upload_id, [part_id]).status_code == 200
