"""The client side of the API."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.client import Client, NoServer, ServerFailed
from penstock.errors import (
    Conflict,
    InvalidRequest,
    InvalidSettings,
    NotFound,
    Unauthorized,
)

from .stub_server import KEY, Stub, a_batch, run_stub


@pytest.fixture
def stub() -> Iterator[Stub]:
    with run_stub() as stub:
        yield stub


@pytest.fixture
def client(stub: Stub) -> Iterator[Client]:
    with Client(stub.url, KEY) as client:
        yield client


def test_a_file_goes_up_byte_for_byte_and_in_pieces(
    stub: Stub, client: Client, tmp_path: Path
) -> None:
    path = tmp_path / "grüße.jsonl"
    path.write_bytes(b"\r\n--x\0" * 500_000)
    sent: list[int] = []

    assert client.upload(path, on_progress=sent.append) == "file-in"

    assert stub.files["file-in"] == path.read_bytes()
    assert len(sent) == 3
    assert sum(sent) == path.stat().st_size
    assert b'name="purpose"\r\n\r\nbatch' in stub.bodies[0]
    assert 'filename="grüße.jsonl"'.encode() in stub.bodies[0]


def test_a_file_that_cannot_be_read_is_told(client: Client, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read: No such file"):
        client.upload(tmp_path / "gone.jsonl")


def test_a_download_appears_when_it_is_whole(
    stub: Stub, client: Client, tmp_path: Path
) -> None:
    stub.files["file-out"] = b"x" * 3_000_000
    target = tmp_path / "out.jsonl"

    assert client.download("file-out", target) == 3_000_000
    assert target.read_bytes() == stub.files["file-out"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_broken_download_leaves_nothing_new_and_the_old_file(
    stub: Stub, client: Client, tmp_path: Path
) -> None:
    stub.files["file-out"] = b"x" * 3_000_000
    stub.broken_files.add("file-out")
    target = tmp_path / "out.jsonl"
    target.write_text("old")

    with pytest.raises(ServerFailed, match=r"The connection to http.* broke: "):
        client.download("file-out", target)

    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_download_that_cannot_be_written_is_told(
    stub: Stub, client: Client, tmp_path: Path
) -> None:
    stub.files["file-out"] = b"x"

    with pytest.raises(InvalidRequest, match="cannot be written: No such file or directory"):
        client.download("file-out", tmp_path / "gone" / "out.jsonl")


def test_what_is_not_given_is_left_to_the_server(stub: Stub, client: Client) -> None:
    batch = client.create_batch(input_file_id="file-in", endpoint="/v1/embeddings")

    assert json.loads(stub.bodies[-1]) == {
        "input_file_id": "file-in",
        "endpoint": "/v1/embeddings",
    }
    assert batch.document == stub.batches[0]


def test_lists_are_read_page_by_page(stub: Stub, client: Client) -> None:
    stub.batches = [a_batch(number) for number in range(250)]

    batches = list(client.iter_batches(limit=None))

    assert [batch.id for batch in batches] == [batch["id"] for batch in stub.batches]
    assert len(stub.asked) == 3


def test_a_list_ends_at_its_limit(stub: Stub, client: Client) -> None:
    stub.batches = [a_batch(number) for number in range(250)]

    assert len(list(client.iter_batches(limit=120))) == 120
    assert [query for _, query in stub.asked] == [
        "/v1/batches?limit=100",
        f"/v1/batches?after={stub.batches[99]['id']}&limit=20",
    ]


def test_a_missing_batch_is_not_found(client: Client) -> None:
    with pytest.raises(NotFound, match="No batch found with id 'batch_x'"):
        client.get_batch("batch_x")


@pytest.mark.parametrize("batch_id", ["", "..", "a/b", "a?b", "ä", "a b"])
def test_an_id_that_would_name_another_route_is_not_sent(
    batch_id: str, stub: Stub, client: Client
) -> None:
    with pytest.raises(NotFound):
        client.get_batch(batch_id)

    assert stub.asked == []


def test_a_conflict_is_one(stub: Stub, client: Client) -> None:
    stub.batches = [a_batch(1, status="completed")]

    with pytest.raises(Conflict, match="Cannot cancel a batch with status 'completed'"):
        client.cancel_batch(stub.batches[0]["id"])


def test_a_refused_request_keeps_the_servers_words(stub: Stub, client: Client) -> None:
    error = {"message": "Bad window.", "type": "x", "param": "completion_window", "code": "c"}
    stub.refusal = (400, {"error": error})

    with pytest.raises(InvalidRequest) as caught:
        client.create_batch(input_file_id="file-in", endpoint="/v1/embeddings")

    told = caught.value
    assert (told.message, told.param, told.code) == ("Bad window.", "completion_window", "c")


def test_a_wrong_key_is_told_in_the_servers_words(stub: Stub) -> None:
    with (
        Client(stub.url, "sk-wrong") as client,
        pytest.raises(Unauthorized, match="Incorrect API key"),
    ):
        client.get_batch("batch_x")


def test_without_a_key_the_error_says_where_one_comes_from(stub: Stub) -> None:
    with (
        Client(stub.url, None) as client,
        pytest.raises(Unauthorized, match=r"set PENSTOCK_API_KEY, or .* --data-dir"),
    ):
        client.get_batch("batch_x")


def test_a_failing_server_is_told(stub: Stub, client: Client) -> None:
    stub.failures = 1

    with pytest.raises(ServerFailed, match=r"The server at .* failed: Try again later"):
        client.get_batch("batch_x")


def test_no_server_at_all_is_told() -> None:
    with Client("http://127.0.0.1:9", None) as client, pytest.raises(NoServer) as caught:
        client.get_batch("batch_x")

    assert str(caught.value) == (
        "No Penstock server answers at http://127.0.0.1:9; start one with `penstock serve`, or "
        "set PENSTOCK_URL."
    )


@pytest.mark.parametrize("refusal", [(200, None), (200, {"x": 1}), (500, None), (302, None)])
def test_another_server_is_told(
    refusal: tuple[int, dict[str, object] | None], stub: Stub, client: Client
) -> None:
    stub.refusal = refusal

    with pytest.raises(ServerFailed, match="is not a Penstock server"):
        client.create_batch(input_file_id="file-in", endpoint="/v1/embeddings")


@pytest.mark.parametrize("url", ["", "localhost:8080", "ftp://a", "http://", "http://a?x"])
def test_a_url_must_be_one(url: str) -> None:
    with pytest.raises(InvalidSettings, match="PENSTOCK_URL is "):
        Client(url, None)


def test_a_key_must_fit_into_a_header() -> None:
    with pytest.raises(InvalidSettings) as caught:
        Client("http://a", "sk-secret\nx")

    assert "secret" not in str(caught.value)
