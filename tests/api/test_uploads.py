"""How a form is read: any order, any cut, nothing held and nothing left behind."""

import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass

import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI

from penstock.api.forms import UploadForm
from penstock.errors import InvalidRequest
from tests.api.conftest import LIMITS, LINE, Server, Tenant

TYPE = "multipart/form-data; boundary=cut"
PURPOSE = (b'form-data; name="purpose"', b"batch")
FILE = (b'form-data; name="file"; filename="in.jsonl"', LINE)


def form_of(*parts: tuple[bytes, bytes]) -> bytes:
    pieces = [
        b"--cut\r\nContent-Disposition: %s\r\n\r\n%s\r\n" % (disposition, content)
        for disposition, content in parts
    ]
    return b"".join(pieces) + b"--cut--\r\n"


def field(name: str, value: str) -> tuple[bytes, bytes]:
    return b'form-data; name="%s"' % name.encode(), value.encode()


def upload(http: httpx2.Client, body: bytes, content_type: str = TYPE) -> httpx2.Response:
    return http.post("/files", content=body, headers={"content-type": content_type})


def error_of(answer: httpx2.Response, status: int = 400) -> dict[str, str | None]:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


@pytest.mark.parametrize("parts", [[PURPOSE, FILE], [FILE, PURPOSE]])
def test_the_file_may_come_first_or_last(
    http: httpx2.Client, parts: Sequence[tuple[bytes, bytes]]
) -> None:
    answer = upload(http, form_of(*parts))

    assert (answer.status_code, answer.json()["bytes"]) == (200, len(LINE))
    assert http.get(f"/files/{answer.json()['id']}/content").content == LINE


def test_a_form_may_come_in_chunks_without_a_length(http: httpx2.Client) -> None:
    body = form_of(FILE, PURPOSE)

    def drops() -> Iterator[bytes]:
        for start in range(0, len(body), 7):
            yield body[start : start + 7]

    answer = http.post("/files", content=drops(), headers={"content-type": TYPE})

    assert http.get(f"/files/{answer.json()['id']}/content").content == LINE


@pytest.mark.parametrize(
    ("anchor", "seconds"),
    [
        ("expires_after[anchor]", "expires_after[seconds]"),
        ("expires_after.anchor", "expires_after.seconds"),
    ],
)
def test_nested_fields_have_brackets_or_dots(
    http: httpx2.Client, anchor: str, seconds: str
) -> None:
    body = form_of(PURPOSE, field(anchor, "created_at"), field(seconds, "7200"), FILE)

    file = upload(http, body).json()

    assert file["expires_at"] == file["created_at"] + 7200


@pytest.mark.parametrize(
    ("parts", "param", "code"),
    [
        ([FILE], "purpose", "missing_required_parameter"),
        ([PURPOSE], "file", "missing_required_parameter"),
        ([], "file", "missing_required_parameter"),
        ([FILE, field("purpose", "cats")], "purpose", "invalid_value"),
        ([field("purpose", "cats"), FILE], "purpose", "invalid_value"),
        ([field("purpose", "batch_output"), FILE], "purpose", "invalid_value"),
        ([field("purpose", "\x00"), FILE], "purpose", "invalid_value"),
        ([PURPOSE, FILE, field("colour", "red")], "colour", "unknown_parameter"),
        ([PURPOSE, FILE, FILE], "file", None),
        ([PURPOSE, PURPOSE, FILE], "purpose", None),
        ([field("other", "x" * 70_000), PURPOSE, FILE], "other", None),
        ([(b"form-data", b"x"), PURPOSE, FILE], None, None),
        ([field(f"n{i}", "") for i in range(40)], None, None),
    ],
)
def test_a_form_with_wrong_parts_is_refused(
    http: httpx2.Client,
    parts: Sequence[tuple[bytes, bytes]],
    param: str | None,
    code: str | None,
) -> None:
    error = error_of(upload(http, form_of(*parts)))

    assert (error["param"], error["code"]) == (param, code)
    assert http.get("/files").json()["data"] == []


@pytest.mark.parametrize(
    ("anchor", "seconds", "param", "code"),
    [
        ("created_at", None, "expires_after.seconds", "missing_required_parameter"),
        (None, "3600", "expires_after.anchor", "missing_required_parameter"),
        ("now", "3600", "expires_after.anchor", "invalid_value"),
        ("created_at", "soon", "expires_after.seconds", "invalid_type"),
        ("created_at", "", "expires_after.seconds", "invalid_type"),
        ("created_at", "٣٦٠٠", "expires_after.seconds", "invalid_type"),
        ("created_at", "3599", "expires_after.seconds", "integer_below_min_value"),
        ("created_at", "-1", "expires_after.seconds", "integer_below_min_value"),
        ("created_at", "2592001", "expires_after.seconds", "integer_above_max_value"),
        ("created_at", "9" * 6000, "expires_after.seconds", "integer_above_max_value"),
    ],
)
def test_a_wrong_expiry_is_refused(
    http: httpx2.Client, anchor: str | None, seconds: str | None, param: str, code: str
) -> None:
    given_fields = {"expires_after[anchor]": anchor, "expires_after[seconds]": seconds}
    fields = [field(name, value) for name, value in given_fields.items() if value is not None]

    error = error_of(upload(http, form_of(FILE, PURPOSE, *fields)))

    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize("content", [b"", b"\n\r\n \n", b"\xef\xbb\xbf"])
def test_an_empty_input_file_is_refused(http: httpx2.Client, content: bytes) -> None:
    error = error_of(upload(http, form_of((FILE[0], content), PURPOSE)))

    assert error["message"] == (
        "Invalid file format for Batch API. Must be .jsonl: the file is empty."
    )
    assert (error["param"], error["code"]) == (None, None)


@pytest.mark.parametrize(
    "content",
    [
        b"custom_id,method\n",
        b"[1]\n",
        b'"text"',
        b'{"a":1',
        b'{"a":1} {"b":2}\n',
        b"\x00\x01\xff",
        b"[" * 2_000,
        b"x" * (1 << 19) + b"x" * (1 << 19),
    ],
)
@pytest.mark.parametrize("is_purpose_first", [True, False])
def test_an_input_file_begins_with_a_json_object(
    http: httpx2.Client, content: bytes, is_purpose_first: bool
) -> None:
    parts = [PURPOSE, (FILE[0], content)]

    error = error_of(upload(http, form_of(*(parts if is_purpose_first else parts[::-1]))))

    assert error["message"] == (
        "Invalid file format for Batch API. Must be .jsonl: "
        "its first line is not a JSON object."
    )


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + LINE,
        b"\r\n\n" + LINE,
        LINE.rstrip(),
        LINE + b"not json, which is told by the batch\n",
        b'{"body":{}}\n',
        b'{"pad":"' + b"x" * 900_000 + b'"}\n',
    ],
)
def test_an_input_file_is_judged_by_its_first_line_and_kept_as_it_is(
    http: httpx2.Client, content: bytes
) -> None:
    answer = upload(http, form_of((FILE[0], content), PURPOSE))

    assert http.get(f"/files/{answer.json()['id']}/content").content == content


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("/abs/olute.jsonl", "olute.jsonl"),
        ("C:\\temp\\in.jsonl", "in.jsonl"),
        ("a\x00b\x07.jsonl", "ab.jsonl"),
        ("..", "upload"),
        ("", "upload"),
        ("dir/", "upload"),
        ("x" * 400, "x" * 255),
        ("日本語.jsonl", "日本語.jsonl"),
    ],
)
def test_a_path_like_name_is_cut_to_a_plain_one(
    http: httpx2.Client, sent: str, kept: str
) -> None:
    disposition = b'form-data; name="file"; filename="%s"' % sent.encode()

    answer = upload(http, form_of((disposition, LINE), PURPOSE))

    assert answer.json()["filename"] == kept


def test_a_file_without_a_name_is_called_upload(http: httpx2.Client, client: OpenAI) -> None:
    nameless = upload(http, form_of((b'form-data; name="file"', LINE), PURPOSE))

    assert nameless.json()["filename"] == "upload"
    assert client.files.create(file=LINE, purpose="batch").filename == "upload"


@pytest.mark.parametrize("purpose", ["batch", "user_data"])
@pytest.mark.parametrize("is_purpose_first", [True, False])
def test_a_file_that_is_too_large_is_refused_and_not_kept(
    http: httpx2.Client, server: Server, purpose: str, is_purpose_first: bool
) -> None:
    is_input = purpose == "batch"
    limit = LIMITS.input_file_bytes if is_input else LIMITS.upload_file_bytes
    before = server.stored_keys()
    content = LINE * (limit // len(LINE) + 1)
    parts = [field("purpose", purpose), (FILE[0], content)]

    error = error_of(upload(http, form_of(*(parts if is_purpose_first else parts[::-1]))))

    assert str(error["message"]).startswith("File is too large.")
    assert f"up to {limit} bytes" in str(error["message"])
    assert http.get("/files").json()["data"] == []
    assert server.stored_keys() == before


def test_a_file_of_exactly_the_largest_size_is_kept(http: httpx2.Client) -> None:
    content = b'{"pad":"' + b"x" * (LIMITS.input_file_bytes - 10) + b'"}'

    answer = upload(http, form_of(PURPOSE, (FILE[0], content)))

    assert answer.json()["bytes"] == LIMITS.input_file_bytes


def test_the_official_client_is_told_that_its_file_is_too_large(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="File is too large"):
        client.files.create(file=LINE * 100_000, purpose="batch")


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "application/json",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/mixed; boundary=cut",
        "multipart/form-data; boundary=" + "x" * 400,
        "multipart/form-data; boundary=other",
    ],
)
def test_a_form_must_be_announced_as_one(http: httpx2.Client, content_type: str) -> None:
    error_of(upload(http, form_of(PURPOSE, FILE), content_type))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--",
        b"no form at all",
        b"--cut\r\n",
        b'--cut\r\nContent-Disposition: form-data; name="file"\r\n\r\n{}',
        b"--cut\r\n\x00\x01: x\r\n\r\n",
        b"--cut\r\n" + b"x: y\r\n" * 100 + b"\r\n",
        b"--cut\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
        form_of(PURPOSE, FILE)[:-6],
        b"\r\n" * 1000,
    ],
)
def test_a_form_that_is_not_well_made_is_refused(http: httpx2.Client, body: bytes) -> None:
    error_of(upload(http, body))


def test_what_follows_the_last_boundary_is_ignored(http: httpx2.Client) -> None:
    answer = upload(http, form_of(PURPOSE, FILE) + b"epilogue" * 10_000)

    assert answer.json()["bytes"] == len(LINE)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("is_chunked", [True, False])
def test_a_client_that_goes_away_leaves_nothing(
    server: Server, tenant: Tenant, is_chunked: bool
) -> None:
    before = server.stored_keys()
    part = form_of(PURPOSE, (FILE[0], LINE * 8000))[:600_000]
    head = (
        f"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {tenant.key}\r\n"
        f"content-type: {TYPE}\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        if is_chunked:
            connection.sendall(head.encode() + b"transfer-encoding: chunked\r\n\r\n")
            connection.sendall(b"%x\r\n%s\r\n" % (len(part), part))
        else:
            connection.sendall(head.encode() + b"content-length: 900000\r\n\r\n" + part)
        wait_until(lambda: server.stored_keys() != before)

    wait_until(lambda: server.stored_keys() == before)
    assert tenant.http().get("/files").json()["data"] == []


@dataclass
class Cut:
    """A body in chunks of given sizes, over and over."""

    body: bytes
    sizes: list[int]

    async def chunks(self) -> AsyncIterator[bytes]:
        start = turn = 0
        while start < len(self.body):
            size = self.sizes[turn % len(self.sizes)]
            yield self.body[start : start + size]
            start, turn = start + size, turn + 1


async def read_all(cut: Cut) -> tuple[bytes, dict[str, str], str]:
    form = UploadForm(cut.chunks(), content="file", content_type=TYPE, content_length=None)
    content = b"".join([piece async for piece in form.content()])
    return content, dict(form.fields), form.filename


# Bytes that resemble the boundary are what a parser stumbles over.
tricky = st.lists(
    st.sampled_from(
        [
            *(b"\r", b"\n", b"-", b"--", b"\r\n--cu", b"\r\n--cut", b"--cut--", b"x"),
            *(b"\xff\x00", b"y" * 60, b"\r\n--c" + b"y" * 60),
        ]
    ),
    max_size=40,
).map(b"".join)
sizes = st.lists(st.integers(1, 50), min_size=1, max_size=10)


def is_part_of_the_form(content: bytes) -> bool:
    """Whether a boundary stands in it, so that it is no content of a single part."""
    return b"\r\n--cut" in b"\r\n" + content


@given(tricky, sizes, st.booleans())
async def test_any_cut_gives_the_same_file(
    content: bytes, sizes: list[int], is_file_first: bool
) -> None:
    content = content.replace(b"\r\n--cut", b"\r\n--cu")
    if is_part_of_the_form(content):
        content = b"x" + content
    parts = [(b'form-data; name="file"; filename="a b.jsonl"', content), PURPOSE]
    body = form_of(*(parts if is_file_first else parts[::-1]))

    read = await read_all(Cut(body, sizes))

    assert read == (content, {"purpose": "batch"}, "a b.jsonl")


@given(st.binary(max_size=300), sizes)
async def test_any_rubbish_is_refused_and_nothing_else(body: bytes, sizes: list[int]) -> None:
    with pytest.raises(InvalidRequest):
        await read_all(Cut(body, sizes))


@given(st.integers(1, len(form_of(PURPOSE, FILE)) - 5), sizes)
async def test_a_form_that_is_cut_anywhere_is_refused(end: int, sizes: list[int]) -> None:
    with pytest.raises(InvalidRequest):
        await read_all(Cut(form_of(PURPOSE, FILE)[:end], sizes))


async def test_what_is_held_of_a_form_is_one_piece_of_its_file() -> None:
    body = form_of(PURPOSE, (FILE[0], b"x" * 5_000_000))
    form = UploadForm(
        Cut(body, [65536]).chunks(),
        content="file",
        content_type=TYPE,
        content_length=str(len(body)),
    )

    pieces = [len(piece) async for piece in form.content()]

    assert sum(pieces) == 5_000_000
    assert max(pieces) <= (256 << 10) + 65536
    assert form.declared_bytes == len(body)
