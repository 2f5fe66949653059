"""What a line leaves in the result files: section 1.7 of the contract, row by row."""

import json
import re
import time
from typing import Any, NamedTuple

import pytest

from tests.contract.conftest import (
    DAY_S,
    STALL,
    Body,
    Server,
    chat,
    new_gate,
    refuse,
    request,
    say,
)
from tests.upstreams import chat_completion

ENVELOPE = {"id", "custom_id", "response", "error"}


class Ended(NamedTuple):
    """A batch that has ended and its result files."""

    batch: Body
    sent: list[str]
    """The custom IDs of its lines."""
    output: bytes | None
    """None if there is no such file."""
    error: bytes | None

    @property
    def lines(self) -> dict[str, Body]:
        return {line["custom_id"]: line for line in self.output_lines + self.error_lines}

    @property
    def output_lines(self) -> list[Body]:
        return [json.loads(line) for line in (self.output or b"").splitlines()]

    @property
    def error_lines(self) -> list[Body]:
        return [json.loads(line) for line in (self.error or b"").splitlines()]


def read(server: Server, batch: Body, lines: list[Body]) -> Ended:
    output, error = batch["output_file_id"], batch["error_file_id"]
    return Ended(
        batch,
        [line["custom_id"] for line in lines],
        output and server.content(output),
        error and server.content(error),
    )


# The table of situations


def narrow(custom_id: str, content: str | None = None) -> Body:
    """A line for the upstream that takes two lines at the same time."""
    return request(custom_id, body=chat(content, model="narrow"))


@pytest.fixture(scope="module")
def situations(server: Server) -> dict[str, Ended]:
    """A batch of each situation, at its end."""
    gate, other_gate = new_gate(), new_gate()
    held = say(until=new_gate())
    lines = {
        "all-good": [request("a"), request("b")],
        "some-fail": [request("a"), request("b", refuse()), request("c")],
        "all-fail": [request("a", refuse()), request("b", refuse(404))],
        "faulty-file": [request("a"), request("b", url="/v1/x")],
        "expired": [
            request("a"),
            request("b", refuse()),
            request("c", held),
            request("d", held),
        ],
        "expired-before-any": [request("a", held), request("b", held)],
        "cancelled": [
            *(narrow("a"), narrow("b", refuse())),
            *(narrow("c", say(until=gate)), narrow("d", refuse(until=gate))),
            *(narrow("e"), narrow("f")),
        ],
        "cancelled-before-any": [
            *(narrow("a", refuse(until=other_gate)), narrow("b", refuse(until=other_gate))),
            *(narrow("c"), narrow("d")),
        ],
    }
    started = {
        name: server.start(
            *lines[name], completion_window="3s" if name.startswith("expired") else "24h"
        )
        for name in lines
        if not name.startswith("cancelled")
    }
    for name, opens in (("cancelled", gate), ("cancelled-before-any", other_gate)):
        batch_id = server.start(*lines[name])["id"]
        # Two lines are in flight; the others must not be sent any more.
        _wait_for_flight(server, opens, 2)
        assert server.cancel(batch_id).json()["status"] == "cancelling"
        # The stop is a job, which is done before those of a batch that comes later.
        server.run(request("later"))
        server.upstream.open(opens)
        started[name] = server.wait(batch_id)
    return {
        name: read(server, server.wait(batch["id"]), lines[name])
        for name, batch in started.items()
    }


def _wait_for_flight(server: Server, gate: str, count: int) -> None:
    deadline = time.monotonic() + 10
    while server.upstream.asked(gate) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Situation(NamedTuple):
    status: str
    output: str | None
    """The custom IDs in the output file, each a letter; None if there is no such file."""
    error: str | None
    codes: dict[str, str] = {}  # noqa: RUF012  (never changed)
    """`error.code` of the lines that got no answer."""


SITUATIONS = {
    "all-good": Situation("completed", "ab", None),
    "some-fail": Situation("completed", "ac", "b"),
    "all-fail": Situation("completed", None, "ab"),
    "faulty-file": Situation("failed", None, None),
    "expired": Situation("expired", "a", "bcd", dict.fromkeys("cd", "batch_expired")),
    "expired-before-any": Situation(
        "expired", None, "ab", dict.fromkeys("ab", "batch_expired")
    ),
    "cancelled": Situation("cancelled", "ac", "bdef", dict.fromkeys("ef", "batch_cancelled")),
    "cancelled-before-any": Situation(
        "cancelled", None, "abcd", dict.fromkeys("cd", "batch_cancelled")
    ),
}


@pytest.fixture(params=SITUATIONS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_each_situation_has_its_files_and_its_status(
    name: str, situations: dict[str, Ended]
) -> None:
    expected, ended = SITUATIONS[name], situations[name]

    assert ended.batch["status"] == expected.status
    for file, lines, file_id in (
        (expected.output, ended.output_lines, ended.batch["output_file_id"]),
        (expected.error, ended.error_lines, ended.batch["error_file_id"]),
    ):
        assert (file_id is None) == (file is None)
        # Clients must not rely on it, but these are in the order of the input.
        assert [line["custom_id"] for line in lines] == list(file or "")


def test_the_counts_are_those_of_the_lines_that_ran(
    name: str, situations: dict[str, Ended]
) -> None:
    expected, ended = SITUATIONS[name], situations[name]

    is_failed = expected.status == "failed"
    assert ended.batch["request_counts"] == {
        "total": 0 if is_failed else len(ended.sent),
        "completed": len(expected.output or ""),
        "failed": len(expected.error or "") - len(expected.codes),
    }


def test_a_line_without_an_answer_says_why(name: str, situations: dict[str, Ended]) -> None:
    expected, ended = SITUATIONS[name], situations[name]
    words = {
        "batch_expired": "This request could not be executed before the completion window "
        "expired.",
        "batch_cancelled": "This request was not executed because the batch was cancelled.",
    }

    for custom_id, line in ended.lines.items():
        code = expected.codes.get(custom_id)
        if code is None:
            assert line["error"] is None
            assert line["response"] is not None
        else:
            assert line["response"] is None
            assert line["error"] == {"code": code, "message": words[code]}


def test_each_line_has_exactly_one_result(name: str, situations: dict[str, Ended]) -> None:
    ended = situations[name]

    found = [line["custom_id"] for line in ended.output_lines + ended.error_lines]
    assert sorted(found) == ([] if ended.batch["status"] == "failed" else sorted(ended.sent))


def test_every_line_has_the_four_keys_and_an_id_of_its_own(
    name: str, situations: dict[str, Ended]
) -> None:
    ended = situations[name]

    lines = ended.output_lines + ended.error_lines
    assert all(line.keys() == ENVELOPE for line in lines)
    ids = [line["id"] for line in lines]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("batch_req_[0-9a-f]{32}", each) for each in ids)
    for line in lines:
        if line["response"] is not None:
            assert line["response"].keys() == {"status_code", "request_id", "body"}


def test_every_line_is_ended_by_a_line_feed_and_none_is_blank(
    name: str, situations: dict[str, Ended]
) -> None:
    for data in (situations[name].output, situations[name].error):
        if data is not None:
            assert data.endswith(b"}\n")
            assert b"\n\n" not in data
            assert b"\r" not in data


# The files themselves


@pytest.mark.parametrize("kind", ["output", "error"])
def test_a_result_file_is_a_file_of_the_api(
    kind: str, server: Server, situations: dict[str, Ended]
) -> None:
    ended = situations["some-fail"]
    file_id = ended.batch[f"{kind}_file_id"]
    data = ended.output if kind == "output" else ended.error

    file = server.http.get(f"/files/{file_id}").json()

    assert file == {
        "id": file_id,
        "object": "file",
        "bytes": len(data or b""),
        "created_at": file["created_at"],
        "expires_at": file["created_at"] + 30 * DAY_S,
        "filename": f"{ended.batch['id']}_{kind}.jsonl",
        "purpose": "batch_output",
        "status": "processed",
        "status_details": None,
    }
    assert 0 <= ended.batch["completed_at"] - file["created_at"] <= 5
    listed = server.http.get("/files", params={"purpose": "batch_output"}).json()["data"]
    assert file in listed


def test_a_result_file_can_be_deleted(server: Server) -> None:
    file_id = server.run(request("a"))["output_file_id"]

    answered = server.http.delete(f"/files/{file_id}")

    assert answered.json() == {"id": file_id, "object": "file", "deleted": True}
    assert server.http.get(f"/files/{file_id}/content").status_code == 404


def test_result_files_are_kept_as_long_as_the_batch_asks_for(server: Server) -> None:
    batch = server.run(
        request("a"),
        request("b", refuse()),
        output_expires_after={"anchor": "created_at", "seconds": 7200},
    )

    assert "output_expires_after" not in batch
    for file_id in (batch["output_file_id"], batch["error_file_id"]):
        file = server.http.get(f"/files/{file_id}").json()
        assert file["expires_at"] == file["created_at"] + 7200


# Answers

VERBATIM = {
    "spaces": b'{ "id" : "x" ,"choices":[ ] }',
    "escapes": b'{"text":"\\u00e9\\ud83e\\udd86 \\/ \\n"}',
    "utf-8": '{"text":"é🦆\u2028"}'.encode(),
    "numbers": b'{"a":1.0,"b":1E5,"c":12345678901234567890123,"d":-0}',
    "order": b'{"z":1,"a":{"y":2,"b":3}}',
    "twice": b'{"a":1,"a":2}',
    "unknown": b'{"object":"something.new","null":null,"deep":[[[[1]]]]}',
}
ERROR = b'{ "error":{"message":"Too long.","type":"invalid_request_error","param":"messages",'
ERROR += b'"code":"context_length_exceeded"} }'
HTML = b"<html>\r\n<body>Bad <b>Gateway</b></body></html>\r\n"


@pytest.fixture(scope="module")
def answers(server: Server) -> Ended:
    """A batch whose lines are answered in every way."""
    lines = [
        *(request(f"verbatim-{name}", say(body)) for name, body in VERBATIM.items()),
        request(
            "lines", say(json.dumps({"a": [1, 2]}, indent=1).replace("\n", "\r\n").encode())
        ),
        request("named", say(headers={"x-request-id": "req_from-upstream"})),
        request("unnamed"),
        request("created", say({"id": "x"}, status=201)),
        *(
            request(f"refused-{n}", say(ERROR, status=n))
            for n in (400, 401, 404, 422, 429, 500)
        ),
        request("html-502", say(HTML, status=502)),
        request("html-403", say(HTML, status=403)),
        request("empty-500", say(b"", status=500)),
        request("array-400", say(b"[1]", status=400)),
        request("html-200", say(HTML)),
        request("timeout", body=chat(STALL, model="impatient")),
    ]
    return read(server, server.run(*lines), lines)


def raw(ended: Ended, custom_id: str) -> bytes:
    """The bytes of a line."""
    start = b'"custom_id":' + json.dumps(custom_id).encode()
    [line] = [
        line
        for line in ((ended.output or b"") + (ended.error or b"")).split(b"\n")
        if start in line
    ]
    return line


@pytest.mark.parametrize("body", VERBATIM.values(), ids=VERBATIM)
def test_a_good_answer_stands_in_the_output_file_as_it_came(
    body: bytes, answers: Ended
) -> None:
    [name] = [name for name, each in VERBATIM.items() if each == body]

    line = raw(answers, f"verbatim-{name}")
    assert line in (answers.output or b"").split(b"\n")
    assert line.endswith(b'"body":' + body + b'},"error":null}')
    assert json.loads(line)["response"]["status_code"] == 200


def test_line_ends_between_tokens_become_spaces(answers: Ended) -> None:
    line = answers.lines["lines"]

    assert line["response"]["body"] == {"a": [1, 2]}


def test_an_answer_keeps_the_id_that_its_upstream_gave_it(answers: Ended) -> None:
    assert answers.lines["named"]["response"]["request_id"] == "req_from-upstream"
    made = answers.lines["unnamed"]["response"]["request_id"]
    assert isinstance(made, str)
    assert made


def test_any_2xx_is_a_good_answer(answers: Ended) -> None:
    assert "created" in [line["custom_id"] for line in answers.output_lines]
    assert answers.lines["created"]["response"]["status_code"] == 201


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429, 500])
def test_an_error_of_the_upstream_stands_in_the_error_file_as_it_came(
    status: int, answers: Ended
) -> None:
    line = raw(answers, f"refused-{status}")

    assert line in (answers.error or b"").split(b"\n")
    assert line.endswith(b'"body":' + ERROR + b'},"error":null}')
    assert json.loads(line)["response"]["status_code"] == status


@pytest.mark.parametrize(
    ("custom_id", "status", "words"),
    [
        ("html-502", 502, HTML.decode().strip()),
        ("html-403", 403, HTML.decode().strip()),
        ("empty-500", 500, "The upstream answered 500 without a body."),
        ("array-400", 400, "[1]"),
    ],
)
def test_what_is_no_json_object_is_wrapped(
    custom_id: str, status: int, words: str, answers: Ended
) -> None:
    line = answers.lines[custom_id]

    assert line in answers.error_lines
    assert line["error"] is None
    assert line["response"]["status_code"] == status
    assert line["response"]["body"] == {
        "error": {"message": words, "type": "server_error", "param": None, "code": None}
    }


@pytest.mark.parametrize(
    ("custom_id", "code"),
    [("timeout", "request_timeout"), ("html-200", "invalid_upstream_response")],
)
def test_what_is_no_answer_has_a_code(custom_id: str, code: str, answers: Ended) -> None:
    line = answers.lines[custom_id]

    assert line in answers.error_lines
    assert line["response"] is None
    assert line["error"].keys() == {"code", "message"}
    assert line["error"]["code"] == code
    assert line["error"]["message"]


def test_the_usage_is_that_of_the_good_lines(server: Server) -> None:
    details: dict[str, Any] = {
        "prompt_tokens": 10,
        "completion_tokens": 7,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 5},
    }
    full = chat_completion("Hello.", usage=details)

    batch = server.run(request("a", say(full)), request("b"), request("c", refuse()))

    assert batch["usage"] == {
        "input_tokens": 13,
        "input_tokens_details": {"cached_tokens": 4},
        "output_tokens": 9,
        "output_tokens_details": {"reasoning_tokens": 5},
        "total_tokens": 22,
    }
