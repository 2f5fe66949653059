"""Lines of the result files: OpenAI's four keys, and the upstream's own words."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.blobs.segments import Kind
from penstock.executor.replies import (
    BATCH_CANCELLED,
    BATCH_EXPIRED,
    error_line,
    reply_line,
)
from penstock.upstream.base import Failure, Reply


def read(line: bytes) -> Any:
    """The object of a line that is one line."""
    assert line.endswith(b"\n")
    assert b"\n" not in line[:-1]
    assert b"\r" not in line
    return json.loads(line)


def ok(body: bytes, **more: Any) -> Reply:
    return Reply(status_code=200, body=body, **more)


def test_a_good_answer_becomes_an_output_line() -> None:
    kind, line = reply_line("my-1", ok(b'{"choices":[]}', request_id="req-9"))

    found = read(line)
    assert kind is Kind.OUTPUT
    assert list(found) == ["id", "custom_id", "response", "error"]
    assert found["id"].startswith("batch_req_")
    assert len(found["id"]) == len("batch_req_") + 32
    assert found["custom_id"] == "my-1"
    assert found["response"] == {
        "status_code": 200,
        "request_id": "req-9",
        "body": {"choices": []},
    }
    assert found["error"] is None


def test_every_line_has_an_id_of_its_own() -> None:
    lines = [read(reply_line("a", ok(b"{}"))[1]) for _ in range(100)]

    assert len({each["id"] for each in lines}) == 100
    assert len({each["response"]["request_id"] for each in lines}) == 100


def test_the_body_stands_in_the_line_byte_for_byte() -> None:
    body = b'{ "a" : 1.0e2,"a":2, "u":"\\u00e9\xe2\x80\xa8\xc2\x85", "n":12345678901234567890}'

    _, line = reply_line("a", ok(body))

    assert b'"body":' + body + b"}" in line
    read(line)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_a_body_of_many_lines_becomes_one(end: bytes) -> None:
    body = b"{" + end + b'"a": "x\\ny",' + end + b'"b": [1,' + end + b"2]}" + end

    _, line = reply_line("a", ok(body))

    assert read(line)["response"]["body"] == {"a": "x\ny", "b": [1, 2]}


def test_a_body_may_look_like_a_format() -> None:
    body = b'{"text":"100 %s %(a)b %d {0}"}'

    assert read(reply_line("%b {}", ok(body))[1])["response"]["body"] == json.loads(body)


@pytest.mark.parametrize("code", [201, 202, 299])
def test_any_2xx_answer_goes_to_the_output_file(code: int) -> None:
    kind, line = reply_line("a", Reply(status_code=code, body=b"{}"))

    assert kind is Kind.OUTPUT
    assert read(line)["response"]["status_code"] == code


@pytest.mark.parametrize("code", [302, 400, 401, 404, 429, 500, 503])
def test_any_other_answer_goes_to_the_error_file_with_its_body_and_no_error(code: int) -> None:
    body = b'{"error" : {"message":"Too long.","code":"context_length_exceeded"},\n"x":1}'

    kind, line = reply_line("a", Reply(status_code=code, body=body, request_id="r"))

    found = read(line)
    assert kind is Kind.ERROR
    assert found["error"] is None
    assert found["response"]["status_code"] == code
    assert found["response"]["request_id"] == "r"
    assert found["response"]["body"] == json.loads(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>\r\n<b>Bad Gateway</b></html>\r\n", "<html>\r\n<b>Bad Gateway</b></html>"),
        (b"  upstream busy\n", "upstream busy"),
        (b'["an","array"]', '["an","array"]'),
        (b"null", "null"),
        (b"", "The upstream answered 502 without a body."),
        (b" \n", "The upstream answered 502 without a body."),
        (b'{"cut":', '{"cut":'),
        (b"caf\xe9", "caf\ufffd"),
        (b'{"bad":"\xff"}', '{"bad":"\ufffd"}'),
        (b"x" * 5000, "x" * 1000),
        ("é".encode() * 5000, "é" * 1000),
    ],
)
def test_a_body_that_is_no_object_is_wrapped(body: bytes, message: str) -> None:
    kind, line = reply_line("a", Reply(status_code=502, body=body))

    assert kind is Kind.ERROR
    assert read(line)["response"]["body"] == {
        "error": {"message": message, "type": "server_error", "param": None, "code": None}
    }


def test_an_error_body_that_is_nested_too_deeply_is_wrapped() -> None:
    _, line = reply_line("a", Reply(status_code=500, body=b'{"a":' * 50_000 + b"}" * 50_000))

    assert read(line)["response"]["body"]["error"]["type"] == "server_error"


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (Failure.TIMEOUT, "request_timeout"),
        (Failure.UNREACHABLE, "upstream_unreachable"),
        (Failure.DISCONNECTED, "upstream_disconnected"),
        (Failure.INVALID, "invalid_upstream_response"),
    ],
)
@pytest.mark.parametrize("status", [None, 200, 500])
def test_what_is_no_answer_goes_to_the_error_file_without_a_response(
    failure: Failure, code: str, status: int | None
) -> None:
    reply = Reply(failure=failure, status_code=status, body=b"<half", message="It went wrong.")

    kind, line = reply_line("a", reply)

    found = read(line)
    assert kind is Kind.ERROR
    assert list(found) == ["id", "custom_id", "response", "error"]
    assert found["response"] is None
    assert found["error"] == {"code": code, "message": "It went wrong."}


def test_every_failure_has_a_code() -> None:
    for failure in Failure:
        reply_line("a", Reply(failure=failure))


def test_lines_that_never_ran_have_the_codes_and_words_of_openai() -> None:
    expired = read(error_line("a", *BATCH_EXPIRED))
    cancelled = read(error_line("a", *BATCH_CANCELLED))

    assert expired["error"] == {
        "code": "batch_expired",
        "message": "This request could not be executed before the completion window expired.",
    }
    assert cancelled["error"]["code"] == "batch_cancelled"
    assert expired["response"] is cancelled["response"] is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(
    custom_id=st.text(min_size=1),
    body=st.dictionaries(st.text(), json_values),
    indent=st.none() | st.integers(0, 3),
    is_ascii=st.booleans(),
    request_id=st.none() | st.text(),
    code=st.sampled_from([200, 400]),
)
def test_any_line_can_be_read_back(
    *,
    custom_id: str,
    body: dict[str, Any],
    indent: int | None,
    is_ascii: bool,
    request_id: str | None,
    code: int,
) -> None:
    text = json.dumps(body, indent=indent, ensure_ascii=is_ascii).encode()

    _, line = reply_line(custom_id, Reply(status_code=code, body=text, request_id=request_id))

    found = read(line)
    assert found["custom_id"] == custom_id
    assert found["response"]["body"] == body
    assert found["response"]["request_id"] == request_id or not request_id
    assert found["response"]["request_id"]


@given(custom_id=st.text(min_size=1), body=st.binary(max_size=300))
def test_any_bytes_at_all_make_a_readable_error_line(custom_id: str, body: bytes) -> None:
    kind, line = reply_line(custom_id, Reply(status_code=500, body=body))

    assert kind is Kind.ERROR
    assert isinstance(read(line)["response"]["body"], dict)
