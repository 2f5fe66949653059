"""Files through the official client, and their shapes through raw requests."""

import hashlib
import io

import httpx2
import openai
import pytest
from openai import OpenAI

from penstock.api import wire
from tests.api.conftest import LINE, Server, Tenant

MONTH_S = 30 * 86400


def test_an_uploaded_file_can_be_looked_up_listed_and_downloaded(client: OpenAI) -> None:
    file = client.files.create(file=("in.jsonl", LINE), purpose="batch")

    assert (file.bytes, file.filename, file.purpose) == (len(LINE), "in.jsonl", "batch")
    assert client.files.retrieve(file.id) == file
    assert list(client.files.list()) == [file]
    assert client.files.content(file.id).content == LINE


def test_a_file_has_every_key_and_no_other(http: httpx2.Client, tenant: Tenant) -> None:
    answer = http.get(f"/files/{tenant.add_input()}")

    wire.FileShape.model_validate_json(answer.content, strict=True)
    assert list(answer.json()) == list(wire.FileShape.model_fields)


def test_a_file_is_processed_at_once(client: OpenAI, tenant: Tenant) -> None:
    assert client.files.wait_for_processing(tenant.add_input()).status == "processed"


def test_an_input_file_expires_after_a_month_and_others_never(client: OpenAI) -> None:
    batch_input = client.files.create(file=LINE, purpose="batch")
    other = client.files.create(file=b"x", purpose="user_data")

    assert batch_input.expires_at == batch_input.created_at + MONTH_S
    assert other.expires_at is None


def test_an_uploader_may_say_when_a_file_expires(client: OpenAI) -> None:
    file = client.files.create(
        file=LINE, purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )

    assert file.expires_at == file.created_at + 3600


def test_a_deleted_file_is_gone(client: OpenAI, tenant: Tenant) -> None:
    file_id = tenant.add_input()

    deleted = client.files.delete(file_id)

    assert (deleted.id, deleted.deleted, deleted.object) == (file_id, True, "file")
    assert list(client.files.list()) == []
    for call in (client.files.retrieve, client.files.delete, client.files.content):
        with pytest.raises(openai.NotFoundError) as caught:
            call(file_id)
        assert caught.value.body == {
            "message": f"No such File object: {file_id}",
            "type": "invalid_request_error",
            "param": "id",
            "code": None,
        }


def test_the_bytes_of_a_deleted_file_are_deleted(
    client: OpenAI, tenant: Tenant, server: Server
) -> None:
    file_id = tenant.add_input()
    assert f"files/{file_id}" in server.stored_keys()

    client.files.delete(file_id)

    assert f"files/{file_id}" not in server.stored_keys()


def test_another_project_sees_no_file_of_this_one(server: Server, tenant: Tenant) -> None:
    file_id = tenant.add_input()
    other = server.add_project()
    http = other.http()

    assert http.get("/files").json()["data"] == []
    for answer in (
        http.get(f"/files/{file_id}"),
        http.get(f"/files/{file_id}/content"),
        http.delete(f"/files/{file_id}"),
    ):
        assert answer.status_code == 404
    assert tenant.http().get(f"/files/{file_id}").status_code == 200
    other.close()


def test_a_list_pages_newest_first_or_oldest_first(client: OpenAI, tenant: Tenant) -> None:
    ids = [tenant.add_input() for _ in range(5)]

    assert [file.id for file in client.files.list(limit=2)] == ids[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == ids


def test_a_page_says_whether_more_follow(http: httpx2.Client, tenant: Tenant) -> None:
    ids = [tenant.add_input() for _ in range(3)]

    first = http.get("/files", params={"limit": 2}).json()
    last = http.get("/files", params={"limit": 2, "after": first["last_id"]}).json()
    end = http.get("/files", params={"after": ids[0]}).json()

    assert [file["id"] for file in first.pop("data")] == [ids[2], ids[1]]
    assert first == {
        "object": "list",
        "first_id": ids[2],
        "last_id": ids[1],
        "has_more": True,
    }
    assert (last["data"][0]["id"], last["has_more"]) == (ids[0], False)
    assert end == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }


def test_a_list_may_show_one_purpose(client: OpenAI, tenant: Tenant) -> None:
    tenant.add_input()
    other = client.files.create(file=b"x", purpose="evals")

    assert [file.id for file in client.files.list(purpose="evals")] == [other.id]


def test_the_largest_page_that_clients_ask_for_is_given(http: httpx2.Client) -> None:
    assert http.get("/files", params={"limit": 10_000}).status_code == 200


@pytest.mark.parametrize(
    ("query", "param", "code"),
    [
        ("limit=0", "limit", "integer_below_min_value"),
        ("limit=10001", "limit", "integer_above_max_value"),
        ("limit=-99999999999999999999999", "limit", "integer_below_min_value"),
        ("limit=many", "limit", "invalid_type"),
        ("limit=", "limit", "invalid_type"),
        ("limit=1.5", "limit", "invalid_type"),
        ("limit=" + "9" * 5000, "limit", "invalid_type"),
        ("limit=%ff", "limit", "invalid_type"),
        ("order=up", "order", "invalid_value"),
        ("purpose=cats", "purpose", "invalid_value"),
    ],
)
def test_a_wrong_query_is_refused(
    http: httpx2.Client, query: str, param: str, code: str
) -> None:
    answer = http.get(f"/files?{query}")

    assert answer.status_code == 400
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code)


@pytest.mark.parametrize("after", ["file-unknown", "%00", "%ED%A0%80", "x" * 5000])
def test_after_an_unknown_file_there_is_nothing(http: httpx2.Client, after: str) -> None:
    answer = http.get(f"/files?after={after}")

    assert (answer.status_code, answer.json()["data"]) == (200, [])


# Downloads


def test_a_download_has_length_name_type_and_tag(http: httpx2.Client, tenant: Tenant) -> None:
    answer = http.get(f"/files/{tenant.add_input()}/content")

    assert answer.headers["content-length"] == str(len(LINE))
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"] == 'attachment; filename="in.jsonl"'
    assert answer.headers["etag"] == f'"{hashlib.sha256(LINE).hexdigest()}"'
    assert answer.headers["accept-ranges"] == "bytes"


def test_a_large_download_is_whole(client: OpenAI) -> None:
    content = LINE * (700_000 // len(LINE))
    file = client.files.create(file=io.BytesIO(content), purpose="batch")

    assert client.files.content(file.id).content == content
    with client.files.with_streaming_response.content(file.id) as answer:
        assert b"".join(answer.iter_bytes()) == content


def test_an_empty_file_downloads_as_nothing(client: OpenAI, http: httpx2.Client) -> None:
    file = client.files.create(file=b"", purpose="vision")

    answer = http.get(f"/files/{file.id}/content")

    assert (answer.content, answer.headers["content-length"]) == (b"", "0")


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=3-9", 3, 10),
        ("bytes=80-", 80, None),
        ("bytes=-5", -5, None),
        ("bytes=-99999", 0, None),
        ("bytes=10-99999999999", 10, None),
    ],
)
def test_a_range_is_given(
    http: httpx2.Client, tenant: Tenant, asked: str, start: int, end: int | None
) -> None:
    answer = http.get(f"/files/{tenant.add_input()}/content", headers={"range": asked})

    assert (answer.status_code, answer.content) == (206, LINE[start:end])
    assert answer.headers["content-length"] == str(len(LINE[start:end]))
    first = start if start >= 0 else len(LINE) + start
    last = first + len(answer.content) - 1
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{len(LINE)}"


@pytest.mark.parametrize("asked", ["bytes=999-", "bytes=-0", "bytes=84-84"])
def test_a_range_outside_the_file_is_refused(
    http: httpx2.Client, tenant: Tenant, asked: str
) -> None:
    answer = http.get(f"/files/{tenant.add_input()}/content", headers={"range": asked})

    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{len(LINE)}"
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "asked", ["bytes=0-1,3-4", "lines=1-2", "bytes=5-2", "bytes=-", "bytes=" + "9" * 50 + "-"]
)
def test_a_range_that_is_not_understood_is_ignored(
    http: httpx2.Client, tenant: Tenant, asked: str
) -> None:
    answer = http.get(f"/files/{tenant.add_input()}/content", headers={"range": asked})

    assert (answer.status_code, answer.content) == (200, LINE)


def test_a_range_is_given_only_while_the_file_is_the_same(
    http: httpx2.Client, tenant: Tenant
) -> None:
    url = f"/files/{tenant.add_input()}/content"
    tag = http.get(url).headers["etag"]

    same = http.get(url, headers={"range": "bytes=0-1", "if-range": tag})
    other = http.get(url, headers={"range": "bytes=0-1", "if-range": '"other"'})

    assert (same.status_code, other.status_code) == (206, 200)


def test_the_headers_of_a_download_may_be_asked_for_alone(
    http: httpx2.Client, tenant: Tenant
) -> None:
    url = f"/files/{tenant.add_input()}/content"
    whole = http.get(url)

    # A range is a matter of GET alone.
    head = http.head(url, headers={"range": "bytes=0-1"})

    assert (head.status_code, head.content) == (200, b"")
    others = {"date", "x-request-id", "openai-processing-ms"}
    assert {k: v for k, v in head.headers.items() if k not in others} == {
        k: v for k, v in whole.headers.items() if k not in others
    }


def test_the_head_of_a_file_that_is_not_there_is_an_error(http: httpx2.Client) -> None:
    assert http.head("/files/x/content").status_code == 404
    assert http.head("/files/x").status_code == 405


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "asked",
    [
        ["*"],
        ["{}"],
        ["W/{}"],
        ['"other", {}'],
        ['"a,b",W/"c" ,{}'],
        ['"other"', "W/{}"],
    ],
)
def test_a_client_that_has_the_content_is_not_given_it_again(
    http: httpx2.Client, tenant: Tenant, method: str, asked: list[str]
) -> None:
    url = f"/files/{tenant.add_input()}/content"
    tag = http.get(url).headers["etag"]
    headers = [("if-none-match", value.replace("{}", tag)) for value in asked]

    answer = http.request(method, url, headers=[*headers, ("range", "bytes=9999-")])

    assert (answer.status_code, answer.content) == (304, b"")
    assert answer.headers["etag"] == tag
    assert "content-length" not in answer.headers


@pytest.mark.parametrize(
    "asked", ['"other"', "", "{bare}", '"{bare}', "* ,", '"*"', 'w/"{bare}x"']
)
def test_a_client_that_has_other_content_is_given_this(
    http: httpx2.Client, tenant: Tenant, asked: str
) -> None:
    url = f"/files/{tenant.add_input()}/content"
    bare = http.get(url).headers["etag"].strip('"')

    answer = http.get(url, headers={"if-none-match": asked.replace("{bare}", bare)})

    assert (answer.status_code, answer.content) == (200, LINE)


@pytest.mark.parametrize("purpose", ["assistants", "user_data"])
def test_files_of_some_purposes_are_never_given_back(client: OpenAI, purpose: str) -> None:
    file = client.files.create(file=b"x", purpose=purpose)

    with pytest.raises(openai.BadRequestError) as caught:
        client.files.content(file.id)
    assert f"Not allowed to download files of purpose: {purpose}" in caught.value.message


def test_an_unusual_filename_survives_the_download(client: OpenAI, http: httpx2.Client) -> None:
    name = 'zwölf "neue" Läufe;\u2028 %41 文件.jsonl'
    file = client.files.create(file=(name, LINE), purpose="batch")

    disposition = http.get(f"/files/{file.id}/content").headers["content-disposition"]

    assert file.filename == name
    assert disposition.isascii()
    assert disposition.startswith('attachment; filename="zw_lf _neue_ L_ufe;_ _41 __.jsonl"')
    assert "filename*=UTF-8''zw%C3%B6lf%20%22neue%22" in disposition


def test_all_files_can_be_deleted_while_they_are_listed(client: OpenAI, tenant: Tenant) -> None:
    ids = [tenant.add_input() for _ in range(5)]

    deleted = [client.files.delete(file.id).id for file in client.files.list(limit=2)]

    assert deleted == ids[::-1]
    assert client.files.list().data == []
