"""Files and uploads: section 3 of the contract, row by row."""

import hashlib
import time
from typing import Any

import httpx2
import pytest

from tests.contract.conftest import DAY_S, Body, Server, jsonl, request

LINE = jsonl(request())
MONTH_S = 30 * DAY_S
BOUNDARY = "multipart/form-data; boundary=x"


def part(name: str, value: bytes, filename: str | None = None) -> bytes:
    named = f'; filename="{filename}"' if filename is not None else ""
    head = f'--x\r\ncontent-disposition: form-data; name="{name}"{named}\r\n\r\n'
    return head.encode() + value + b"\r\n"


def send(server: Server, *parts: bytes, chunked: bool = False) -> httpx2.Response:
    """A form of these parts, in this order."""
    body = b"".join(parts) + b"--x--\r\n"
    content: Any = (body[n : n + 10] for n in range(0, len(body), 10)) if chunked else body
    return server.http.post("/files", content=content, headers={"content-type": BOUNDARY})


FILE = part("file", LINE, "in.jsonl")
PURPOSE = part("purpose", b"batch")


def refused(answered: httpx2.Response, words: str, **more: object) -> None:
    assert answered.status_code == 400, answered.text
    error = answered.json()["error"]
    assert error["message"].startswith(words), error
    assert error["type"] == "invalid_request_error"
    assert {name: error[name] for name in more} == more


# 3.1


def test_a_file_is_processed_at_once_and_kept_for_30_days(server: Server) -> None:
    file = server.upload(LINE, name="in.jsonl")

    assert file == {
        "id": file["id"],
        "object": "file",
        "bytes": len(LINE),
        "created_at": file["created_at"],
        "expires_at": file["created_at"] + MONTH_S,
        "filename": "in.jsonl",
        "purpose": "batch",
        "status": "processed",
        "status_details": None,
    }
    assert file["id"].startswith("file-")
    assert abs(file["created_at"] - time.time()) < 5


@pytest.mark.parametrize(
    "purpose", ["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
)
def test_each_purpose_is_taken_and_only_input_files_expire(
    purpose: str, server: Server
) -> None:
    file = send(server, FILE, part("purpose", purpose.encode())).json()

    assert file["purpose"] == purpose
    assert (file["expires_at"] is None) == (purpose != "batch")


# 3.2


@pytest.mark.parametrize(
    "parts",
    [
        (PURPOSE, FILE),
        (FILE, PURPOSE),
        (
            PURPOSE,
            part("expires_after[anchor]", b"created_at"),
            part("expires_after[seconds]", b"3600"),
            FILE,
        ),
        (
            FILE,
            part("expires_after.seconds", b"3600"),
            PURPOSE,
            part("expires_after.anchor", b"created_at"),
        ),
    ],
    ids=["python", "node", "brackets", "dots"],
)
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_form_may_come_so(parts: tuple[bytes, ...], chunked: bool, server: Server) -> None:
    file = send(server, *parts, chunked=chunked).json()

    life_s = 3600 if len(parts) > 2 else MONTH_S
    assert (file["bytes"], file["filename"]) == (len(LINE), "in.jsonl")
    assert file["expires_at"] - file["created_at"] == life_s
    assert server.content(file["id"]) == LINE


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("upload", "upload"),
        ("", "upload"),
        ("../../etc/passwd", "passwd"),
        ("C:\\temp\\in.jsonl", "in.jsonl"),
        ("in.txt", "in.txt"),
    ],
)
def test_a_name_is_made_harmless_and_does_not_decide(
    sent: str, kept: str, server: Server
) -> None:
    assert send(server, part("file", LINE, sent), PURPOSE).json()["filename"] == kept


@pytest.mark.parametrize("content", [b"", b"\n", b"text\n", b"[1]\n"])
def test_what_is_no_jsonl_is_refused_at_once(content: bytes, server: Server) -> None:
    refused(
        send(server, part("file", content, "in.jsonl"), PURPOSE),
        "Invalid file format for Batch API. Must be .jsonl",
        param=None,
        code=None,
    )


def test_a_line_that_lacks_its_method_is_found_by_the_batch(server: Server) -> None:
    assert server.try_upload(jsonl(request(method=None))).status_code == 200


@pytest.mark.parametrize(
    ("fields", "code", "param", "words"),
    [
        ((FILE,), "missing_required_parameter", "purpose", "Missing required parameter"),
        ((PURPOSE,), "missing_required_parameter", "file", "Missing required parameter"),
        ((FILE, part("purpose", b"x")), "invalid_value", "purpose", "Invalid value: 'x'."),
        (
            (FILE, part("purpose", b"batch_output")),
            "invalid_value",
            "purpose",
            "Invalid value: 'batch_output'.",
        ),
        (
            (
                FILE,
                PURPOSE,
                part("expires_after[anchor]", b"created_at"),
                part("expires_after[seconds]", b"3599"),
            ),
            "integer_below_min_value",
            "expires_after.seconds",
            "Invalid 'expires_after.seconds'",
        ),
        (
            (
                FILE,
                PURPOSE,
                part("expires_after[anchor]", b"created_at"),
                part("expires_after[seconds]", b"2592001"),
            ),
            "integer_above_max_value",
            "expires_after.seconds",
            "Invalid 'expires_after.seconds'",
        ),
    ],
    ids=["no purpose", "no file", "purpose", "output", "too short", "too long"],
)
def test_a_wrong_form_is_refused(
    fields: tuple[bytes, ...], code: str, param: str, words: str, server: Server
) -> None:
    refused(send(server, *fields), words, code=code, param=param)


# 3.3


def test_a_list_of_files_has_its_keys_pages_and_orders(server: Server) -> None:
    made = [
        send(server, part("file", LINE, f"{n}.jsonl"), part("purpose", b"evals")).json()["id"]
        for n in range(3)
    ]

    def listed(**query: object) -> Body:
        answered = server.http.get("/files", params={"purpose": "evals", **query})
        assert answered.status_code == 200, answered.text
        return answered.json()

    every = listed()
    assert set(every) == {"object", "data", "first_id", "last_id", "has_more"}
    assert [file["id"] for file in every["data"]][:3] == made[::-1]
    assert [file["id"] for file in listed(order="asc")["data"]][-3:] == made
    assert [file["id"] for file in listed(limit=1, after=made[2])["data"]] == [made[1]]
    assert listed(limit=1)["has_more"] is True
    assert listed(limit=10_000)["has_more"] is False


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("limit=0", "integer_below_min_value"),
        ("limit=10001", "integer_above_max_value"),
        ("order=up", "invalid_value"),
        ("purpose=x", "invalid_value"),
    ],
)
def test_a_wrong_list_is_refused(query: str, code: str, server: Server) -> None:
    refused(server.http.get(f"/files?{query}"), "Invalid", code=code)


# 3.4 and 3.5


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/files/file-x"), ("DELETE", "/files/file-x"), ("GET", "/files/file-x/content")],
)
def test_an_unknown_file_is_404(method: str, path: str, server: Server) -> None:
    answered = server.http.request(method, path)

    assert answered.status_code == 404
    assert answered.json()["error"] == {
        "message": "No such File object: file-x",
        "type": "invalid_request_error",
        "param": "id",
        "code": None,
    }


def test_a_deleted_file_is_gone(server: Server) -> None:
    file_id = server.upload(LINE)["id"]
    headers = {"content-type": "application/json"}

    first = server.http.request("DELETE", f"/files/{file_id}", headers=headers)

    assert first.status_code == 200
    assert first.json() == {"id": file_id, "object": "file", "deleted": True}
    assert server.http.delete(f"/files/{file_id}").status_code == 404
    assert server.http.get(f"/files/{file_id}").status_code == 404
    assert file_id not in server.http.get("/files").text


def test_a_batch_goes_on_when_its_input_is_deleted(server: Server) -> None:
    file_id = server.upload(LINE)["id"]
    batch = server.create(file_id)

    assert server.http.delete(f"/files/{file_id}").status_code == 200

    assert server.wait(batch["id"])["status"] == "completed"


# 3.6


@pytest.mark.parametrize("accept", ["application/binary", "application/json", "image/png"])
def test_content_is_given_whatever_is_accepted(accept: str, server: Server) -> None:
    file_id = server.upload(LINE, name="in.jsonl")["id"]

    answered = server.http.get(f"/files/{file_id}/content", headers={"accept": accept})

    assert (answered.status_code, answered.content) == (200, LINE)
    assert answered.headers["content-type"] == "application/octet-stream"
    assert answered.headers["content-disposition"] == 'attachment; filename="in.jsonl"'
    assert answered.headers["content-length"] == str(len(LINE))
    assert answered.headers["etag"] == f'"{hashlib.sha256(LINE).hexdigest()}"'
    assert answered.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize("purpose", ["assistants", "user_data"])
def test_some_purposes_are_never_given_back(purpose: str, server: Server) -> None:
    file = send(server, FILE, part("purpose", purpose.encode())).json()

    refused(
        server.http.get(f"/files/{file['id']}/content"),
        f"Not allowed to download files of purpose: {purpose}",
    )


@pytest.mark.parametrize("path", ["/files/", "/batches/", "/models/", "/uploads/"])
def test_nothing_is_redirected(path: str, server: Server) -> None:
    for method in ("GET", "POST"):
        answered = server.http.request(method, path, follow_redirects=False)
        assert answered.status_code in (404, 405), path


# 3.7


def start(server: Server, content: bytes, **changed: object) -> Body:
    body: Body = {
        "bytes": len(content),
        "filename": "in.jsonl",
        "mime_type": "text/jsonl",
        "purpose": "batch",
    }
    answered = server.http.post("/uploads", json=body | changed)
    assert answered.status_code == 200, answered.text
    return answered.json()


def add(server: Server, upload: Body, data: bytes) -> str:
    answered = server.http.post(
        f"/uploads/{upload['id']}/parts", files={"data": ("upload", data)}
    )
    assert answered.status_code == 200, answered.text
    made = answered.json()
    assert set(made) == {"id", "object", "created_at", "upload_id"}
    assert (made["object"], made["upload_id"]) == ("upload.part", upload["id"])
    assert made["id"].startswith("part_")
    return made["id"]


def finish(server: Server, upload: Body, *part_ids: str, **more: object) -> httpx2.Response:
    return server.http.post(
        f"/uploads/{upload['id']}/complete", json={"part_ids": part_ids, **more}
    )


def test_an_upload_becomes_a_file(server: Server) -> None:
    upload = start(server, LINE, expires_after={"anchor": "created_at", "seconds": 7200})
    assert (upload["object"], upload["status"], upload["file"]) == ("upload", "pending", None)
    assert upload["expires_at"] == upload["created_at"] + 3600
    second = add(server, upload, LINE[10:])
    first = add(server, upload, LINE[:10])
    add(server, upload, b"sent again by a client")

    done = finish(server, upload, first, second, md5=hashlib.md5(LINE).hexdigest()).json()

    assert done["status"] == "completed"
    file = done["file"]
    assert (file["object"], file["bytes"], file["purpose"]) == ("file", len(LINE), "batch")
    assert file["expires_at"] == file["created_at"] + 7200
    assert server.content(file["id"]) == LINE
    assert server.wait(server.create(file["id"])["id"])["status"] == "completed"


def test_a_cancelled_upload_takes_nothing(server: Server) -> None:
    upload = start(server, LINE)
    part_id = add(server, upload, LINE)

    cancelled = server.http.post(f"/uploads/{upload['id']}/cancel").json()

    assert cancelled == upload | {"status": "cancelled"}
    refused(finish(server, upload, part_id), f"The upload '{upload['id']}' is cancelled")
    path = f"/uploads/{upload['id']}/parts"
    refused(server.http.post(path, files={"data": b"x"}), "The upload '")


def test_only_parts_that_make_the_file_complete_it(server: Server) -> None:
    upload = start(server, LINE)
    part_id = add(server, upload, LINE)

    refused(finish(server, upload), "The upload is to have")
    refused(finish(server, upload, "part_x"), "Invalid 'part_ids'", param="part_ids")
    refused(finish(server, upload, part_id, part_id), "Invalid 'part_ids'")
    refused(finish(server, upload, part_id, md5="0" * 32), "The MD5", param="md5")
    assert finish(server, upload, part_id).status_code == 200


def test_an_upload_of_8_gb_is_taken_and_one_of_more_is_not(server: Server) -> None:
    for size, status in ((8 * 10**9, 200), (8 * 2**30, 200), (8 * 2**30 + 1, 400)):
        body = {"filename": "a", "mime_type": "b", "purpose": "user_data", "bytes": size}
        assert server.http.post("/uploads", json=body).status_code == status


@pytest.mark.parametrize("action", ["parts", "complete", "cancel"])
def test_an_unknown_upload_is_404(action: str, server: Server) -> None:
    body: Any = {"files": {"data": b"x"}} if action == "parts" else {"json": {"part_ids": []}}

    answered = server.http.post(f"/uploads/upload_x/{action}", **body)

    assert answered.status_code == 404
    assert answered.json()["error"]["message"] == "No such Upload object: upload_x"


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/uploads"), ("GET", "/uploads/upload_x")]
)
def test_uploads_are_not_listed(method: str, path: str, server: Server) -> None:
    assert server.http.request(method, path).status_code in (404, 405)
