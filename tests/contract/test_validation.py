"""What is wrong with an input file: section 1.5 and 1.6 of the contract, row by row.

Two rows have no case: OpenAI fails a batch for which its queue has no room
(`token_limit_exceeded`, and the limit of queued requests); here such a batch waits.
"""

import json
from typing import Any, NamedTuple

import pytest

from tests.contract.conftest import DAY_S, STRICT, Body, Server, chat, jsonl, request

NOT_JSON = "This line is not parseable as valid JSON."
EMBEDDINGS = "/v1/embeddings"


class Row(NamedTuple):
    """A faulty line and the entry that it must bring."""

    line: Body | bytes
    code: str
    param: str | None
    words: str
    """How the message begins."""
    more: str = ""
    """What it says besides."""


def lacking(name: str) -> Row:
    return Row(
        request(**{name: None}) if name != "custom_id" else request(None),
        "missing_required_parameter",
        name,
        f"Missing required parameter: '{name}'.",
    )


ROWS = {
    "invalid_json_line": Row(b'{"custom_id": "a"', "invalid_json_line", None, NOT_JSON),
    "invalid_json_line-no-object": Row(b"[1]", "invalid_json_line", None, NOT_JSON),
    "invalid_json_line-no-utf8": Row(b'{"x":"\xff"}', "invalid_json_line", None, NOT_JSON),
    "invalid_json_line-too-deep": Row(
        json.dumps(request(body=chat(messages="X")))
        .encode()
        .replace(b'"X"', b"[" * 700 + b"]" * 700),
        "invalid_json_line",
        None,
        NOT_JSON,
        "nested too deeply",
    ),
    "missing_required_parameter-custom_id": lacking("custom_id"),
    "missing_required_parameter-method": lacking("method"),
    "missing_required_parameter-url": lacking("url"),
    "missing_required_parameter-body": lacking("body"),
    "invalid_url": Row(
        request(url="/v1/embeddings"),
        "invalid_url",
        "url",
        "The URL provided for this request does not match the batch endpoint.",
        "It is '/v1/embeddings'; it must be '/v1/chat/completions'.",
    ),
    "invalid_request-model": Row(
        request(body=chat(model=None)),
        "invalid_request",
        "body.model",
        "Model parameter is required.",
    ),
    "invalid_request-messages": Row(
        request(body=chat(messages=None)),
        "invalid_request",
        "body.messages",
        "Messages parameter is required.",
    ),
    "model_not_found": Row(
        request(body=chat(model="gpt-9")),
        "model_not_found",
        "body.model",
        "The provided model 'gpt-9' is not supported by the Batch API.",
        "The upstreams serve 'm', 'n-*', 'narrow', 'impatient'.",
    ),
    "streaming_unsupported": Row(
        request(body=chat(stream=True)),
        "streaming_unsupported",
        "body.stream",
        "Chat Completions: Streaming is not supported in the Batch API.",
    ),
    "duplicate_custom_id": Row(
        request("first"),
        "duplicate_custom_id",
        "custom_id",
        "The custom_id 'first' of line 2 is already used by line 1.",
    ),
    "invalid_method": Row(
        request(method="GET"), "invalid_method", "method", "Invalid method: 'GET'."
    ),
    "invalid_custom_id-number": Row(
        request(7), "invalid_custom_id", "custom_id", "Invalid 'custom_id': ", "a number"
    ),
    "invalid_custom_id-empty": Row(
        request(""), "invalid_custom_id", "custom_id", "Invalid 'custom_id': ", "0 characters"
    ),
    "invalid_custom_id-too-long": Row(
        request("x" * 513),
        "invalid_custom_id",
        "custom_id",
        "Invalid 'custom_id': ",
        "1 to 512 characters, but got 513",
    ),
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_faulty_line_fails_the_batch(row: Row, server: Server) -> None:
    batch = server.run(request("first"), row.line, request("last"))

    assert batch["status"] == "failed"
    [error] = batch["errors"]["data"]
    assert error.keys() == {"code", "line", "param", "message"}
    assert (error["code"], error["line"], error["param"]) == (row.code, 2, row.param)
    assert error["message"].startswith(row.words)
    assert row.more in error["message"]


def embed(custom_id: str, given: object, model: str = "m") -> Body:
    return request(custom_id, url=EMBEDDINGS, body={"model": model, "input": given})


class FileRow(NamedTuple):
    """A file that the strict server refuses, and the one entry that it must bring."""

    lines: list[Body]
    code: str
    line: int | None
    param: str | None
    words: str
    endpoint: str = "/v1/chat/completions"


LONG = request("b", body=chat(user="x" * STRICT["line_bytes"]))
FILE_ROWS = {
    "too_many_tasks": FileRow(
        [request(f"r{n}", url=EMBEDDINGS, body={"model": "m", "input": []}) for n in range(7)],
        "too_many_tasks",
        None,
        None,
        "The input file holds 7 requests; at most 6 are allowed.",
        EMBEDDINGS,
    ),
    "too_many_embedding_inputs": FileRow(
        [embed("a", "text"), embed("b", [1, 2, 3]), embed("c", ["x", "y", "z"])],
        "too_many_embedding_inputs",
        None,
        "body.input",
        "The requests of the input file hold 5 inputs together; at most 4 are allowed.",
        EMBEDDINGS,
    ),
    "mismatched_model": FileRow(
        [request("a"), request("b", body=chat(model="n-1"))],
        "mismatched_model",
        2,
        "body.model",
        "The model 'n-1' of this line is not 'm', which line 1 names;",
    ),
    "line_too_long": FileRow(
        [request("a"), LONG],
        "line_too_long",
        2,
        None,
        f"This line is longer than 2000 bytes: it has {len(json.dumps(LONG))}.",
    ),
}


@pytest.mark.parametrize("row", FILE_ROWS.values(), ids=FILE_ROWS)
def test_a_file_beyond_the_limits_fails_the_batch(row: FileRow, strict: Server) -> None:
    batch = strict.run(*row.lines, endpoint=row.endpoint)

    assert batch["status"] == "failed"
    [error] = batch["errors"]["data"]
    assert (error["code"], error["line"], error["param"]) == (row.code, row.line, row.param)
    assert error["message"].startswith(row.words)


def test_embeddings_up_to_the_limit_are_not_refused(strict: Server) -> None:
    batch = strict.start(
        embed("a", "text"), embed("b", [1, 2, 3]), embed("c", ["x", "y"]), endpoint=EMBEDDINGS
    )

    assert strict.wait(batch["id"])["status"] == "completed"


def test_many_models_are_allowed_unless_strict(server: Server) -> None:
    batch = server.run(request("a"), request("b", body=chat(model="n-1")))

    assert batch["status"] == "completed"
    assert batch["model"] is None


@pytest.mark.parametrize("data", [b"", b"\n\r\n \n"], ids=["no-bytes", "blank-lines"])
def test_an_empty_file_is_refused_when_it_is_uploaded(data: bytes, server: Server) -> None:
    answered = server.try_upload(data)

    error = answered.json()["error"]
    assert answered.status_code == 400
    assert (error["type"], error["param"], error["code"]) == (
        "invalid_request_error",
        None,
        None,
    )
    assert error["message"].startswith("Invalid file format for Batch API. Must be .jsonl")


def test_an_unknown_file_fails_the_batch_if_strict(strict: Server) -> None:
    batch = strict.create("file-unknown")

    assert batch["status"] == "validating"
    batch = strict.wait(batch["id"])
    [error] = batch["errors"]["data"]
    assert (error["code"], error["line"], error["param"]) == (
        "invalid_request",
        None,
        "file_id",
    )
    assert error["message"].startswith("Cannot find file file-unknown, or organization ")
    assert error["message"].endswith(" does not have access to it.")


def test_an_unknown_file_is_404_unless_strict(server: Server) -> None:
    answered = server.try_create("file-unknown")

    assert answered.status_code == 404
    assert answered.json()["error"]["message"] == "No such File object: file-unknown"


@pytest.mark.parametrize("window", ["1h", "48h", ""])
def test_only_24h_is_a_completion_window_if_strict(window: str, strict: Server) -> None:
    file_id = strict.upload(jsonl(request()))["id"]

    answered = strict.try_create(file_id, completion_window=window)

    error = answered.json()["error"]
    assert answered.status_code == 400
    assert (error["code"], error["param"]) == ("invalid_value", "completion_window")
    assert "'24h'" in error["message"]
    batch = strict.create(file_id)
    assert batch["expires_at"] == batch["created_at"] + DAY_S


# All of them


def test_all_faults_are_told_in_the_order_of_their_lines(server: Server) -> None:
    batch = server.run(
        request("a", body=chat(stream=True)),
        b"",
        b"{",
        request("b", method="PUT", url="/v1/x"),
        request("a"),
        request("c"),
    )

    assert batch["errors"]["object"] == "list"
    assert [(error["line"], error["code"]) for error in batch["errors"]["data"]] == [
        (1, "streaming_unsupported"),
        (3, "invalid_json_line"),
        (4, "invalid_method"),
        (4, "invalid_url"),
        (5, "duplicate_custom_id"),
    ]


def test_faults_are_told_up_to_a_limit_and_the_last_entry_says_how_many(strict: Server) -> None:
    batch = strict.run(request(), *[b"{}"] * 3)

    errors: list[Any] = batch["errors"]["data"]
    assert [error["line"] for error in errors] == [2, 2, 2, 2, 3, None]
    assert (errors[-1]["code"], errors[-1]["param"]) == ("too_many_faults", None)
    assert errors[-1]["message"] == (
        "The input file has 12 faults; only the first 5 are listed."
    )


def test_a_batch_with_a_fault_sends_nothing_and_counts_nothing(server: Server) -> None:
    batch = server.run(request("a", body=chat(user="never-sent")), b"{")

    assert server.upstream.asked("never-sent") == 0
    assert batch["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    assert batch["output_file_id"] is batch["error_file_id"] is None
    assert batch["in_progress_at"] is None


# 1.6 and what is accepted beside it

GOOD = json.dumps(request("a")).encode()
ACCEPTED = {
    "url-as-the-endpoint": GOOD + b"\n",
    "url-without-v1": jsonl(request("a", url="/chat/completions")),
    "byte-order-mark": b"\xef\xbb\xbf" + GOOD + b"\n",
    "crlf": GOOD + b"\r\n",
    "blank-lines": b"\n\r\n" + GOOD + b"\n\n",
    "no-last-line-end": GOOD,
    "stream-false": jsonl(request("a", body=chat(stream=False))),
    "longest-custom-id": jsonl(request("é" * 512)),
}


@pytest.mark.parametrize("data", ACCEPTED.values(), ids=ACCEPTED)
def test_a_file_may_be_written_so(data: bytes, server: Server) -> None:
    batch = server.wait(server.create(server.upload(data)["id"])["id"])

    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 1, "completed": 1, "failed": 0}


def test_an_endpoint_may_be_written_without_v1_and_is_echoed_so(server: Server) -> None:
    batch = server.run(request("a"), endpoint="/chat/completions")

    assert batch["status"] == "completed"
    assert batch["endpoint"] == "/chat/completions"
