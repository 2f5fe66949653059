"""The checking of input files: what is refused, in which words, and that nothing depends on
how the bytes arrive."""

import json
import re
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock import jsonl
from penstock.jsonl import (
    BOM,
    MAX_CUSTOM_ID_CHARS,
    MAX_NESTING,
    CheckedInput,
    InputChecker,
    InputRules,
    check_file,
    slice_size,
)
from penstock.model import ENDPOINTS, Fault
from penstock.request_lines import RequestLine, iter_requests

CHAT = ENDPOINTS["/v1/chat/completions"]
EMBEDDINGS = ENDPOINTS["/v1/embeddings"]
NOT_JSON = "This line is not parseable as valid JSON."
BODY = {"model": "m", "messages": [{"role": "user", "content": "Hello."}]}


def rules(**changed: Any) -> InputRules:
    usual = {
        "endpoint": CHAT,
        "max_requests": 1000,
        "max_line_bytes": 1000,
        "max_embedding_inputs": 1000,
        "max_faults": 100,
        "one_model": False,
        "slice_requests": 100,
        "slice_bytes": 100_000,
    }
    return InputRules(**(usual | changed))


def request(custom_id: object = "a", **changed: object) -> bytes:
    """A good line, with its line end, in which some fields are changed; None takes one away."""
    fields: dict[str, object] = {
        "custom_id": custom_id,
        "method": "POST",
        "url": CHAT.path,
        "body": BODY,
    }
    fields |= changed
    kept = {name: value for name, value in fields.items() if value is not None}
    return json.dumps(kept).encode() + b"\n"


def body(**changed: object) -> dict[str, object]:
    """A good body in which some fields are changed; None takes one away."""
    return {name: value for name, value in {**BODY, **changed}.items() if value is not None}


def check(data: bytes, *pieces: int, **changed: Any) -> CheckedInput:
    """Check `data`, fed in pieces that end at the offsets `pieces`."""
    checker = InputChecker(rules(**changed))
    while True:
        for start, end in pairwise([0, *pieces, len(data)]):
            checker.feed(data[start:end])
        if (checked := checker.finish()) is not None:
            return checked


def faults_of(data: bytes, **changed: Any) -> list[tuple[str, str | None, int | None]]:
    """Code, param and line of each fault."""
    return [(f.code, f.param, f.line) for f in check(data, **changed).faults]


def requests_of(data: bytes, checked: CheckedInput) -> list[RequestLine]:
    """Every request, read slice by slice as a worker does."""
    return [
        found
        for plan in checked.slices
        for found in iter_requests(data[plan.start : plan.end], first_line=plan.first_line)
    ]


# Good files


def test_a_good_file_has_no_faults() -> None:
    checked = check(request("a") + request("b"))

    assert checked.faults == []
    assert checked.total == 2
    assert checked.models == ["m"]
    assert checked.endpoint == CHAT


@pytest.mark.parametrize("endpoint", ENDPOINTS.values(), ids=ENDPOINTS)
def test_every_endpoint_takes_a_body_that_has_what_it_requires(endpoint: Any) -> None:
    line = request(url=endpoint.path, body=dict.fromkeys(endpoint.required, "x"))

    assert check(line, endpoint=endpoint).faults == []
    for name in endpoint.required:
        lacking = {other: "x" for other in endpoint.required if other != name}
        line = request(url=endpoint.path, body={"more": 1, **lacking})
        assert faults_of(line, endpoint=endpoint) == [("invalid_request", f"body.{name}", 1)]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(BOM + request("a") + request("b"), id="byte order mark"),
        pytest.param(
            request("a").replace(b"\n", b"\r\n") + request("b").replace(b"\n", b"\r\n"),
            id="CRLF",
        ),
        pytest.param(
            request("a").replace(b", ", b",\r") + request("b"), id="carriage return as space"
        ),
        pytest.param(request("a") + request("b")[:-1], id="no final line end"),
        pytest.param(
            b"\n \n" + request("a") + b"\t\r\n\n" + request("b") + b"\n\n", id="blank"
        ),
        pytest.param(b"  " + request("a") + b"\t" + request("b"), id="leading spaces"),
    ],
)
def test_a_file_may_be_written_in_the_ways_of_other_systems(data: bytes) -> None:
    checked = check(data)

    assert checked.faults == []
    assert checked.total == 2
    assert [found.custom_id for found in requests_of(data, checked)] == ["a", "b"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c"])
def test_only_a_line_feed_ends_a_line(separator: str) -> None:
    text = (
        separator
        if separator.isprintable() or separator > "\x7f"
        else f"\\u{ord(separator):04x}"
    )
    content = f'"before{text}after"'.encode()
    line = request(body=body(messages="MESSAGES")).replace(b'"MESSAGES"', content)

    checked = check(line + request("b"))

    assert checked.faults == []
    assert checked.total == 2
    [first, _] = requests_of(line + request("b"), checked)
    assert content in first.body


def test_line_numbers_are_those_of_the_file() -> None:
    data = BOM + b"\n\r\n" + request("a") + b"\n{}\n" + request("b")

    assert {line for _, _, line in faults_of(data)} == {5}


def test_a_url_counts_with_and_without_v1() -> None:
    data = request("a", url="/chat/completions") + request("b", url="/v1/chat/completions")

    assert check(data).faults == []


def test_a_null_in_place_of_stream_and_false_are_no_streaming() -> None:
    null = request("a").replace(b'"model"', b'"stream":null,"model"')

    assert check(null + request("b", body=body(stream=False))).faults == []


def test_a_required_parameter_may_be_of_any_type_but_the_model() -> None:
    assert check(request(body=body(messages=0))).faults == []


def test_models_are_told_in_the_order_of_their_first_appearance() -> None:
    names = ["z", "a", "z", "m", "a"]
    data = b"".join(request(f"r{n}", body=body(model=m)) for n, m in enumerate(names))

    assert check(data).models == ["z", "a", "m"]


# Faults of a line


@pytest.mark.parametrize(
    ("line", "code", "param", "message"),
    [
        (b"{\n", "invalid_json_line", None, NOT_JSON),
        (b"nonsense\n", "invalid_json_line", None, NOT_JSON),
        (request()[:-2] + b",}\n", "invalid_json_line", None, NOT_JSON),
        (request()[:-1] + b"x\n", "invalid_json_line", None, NOT_JSON),
        (
            b'{"custom_id":"\xff"}\n',
            "invalid_json_line",
            None,
            f"{NOT_JSON} It is not valid UTF-8 at byte 15 ",
        ),
        (b'{"custom_id":"\\ud800"}\n', "invalid_json_line", None, NOT_JSON),
        (b"[]\n", "invalid_json_line", None, f"{NOT_JSON} It holds an array "),
        (b"null\n", "invalid_json_line", None, f"{NOT_JSON} It holds null "),
        (b"true\n", "invalid_json_line", None, f"{NOT_JSON} It holds a boolean "),
        (b"1\n", "invalid_json_line", None, f"{NOT_JSON} It holds a number "),
        (b'"a"\n', "invalid_json_line", None, f"{NOT_JSON} It holds a string "),
        (
            request(None),
            "missing_required_parameter",
            "custom_id",
            "Missing required parameter: 'custom_id'.",
        ),
        (
            request(method=None),
            "missing_required_parameter",
            "method",
            "Missing required parameter: 'method'.",
        ),
        (
            request(url=None),
            "missing_required_parameter",
            "url",
            "Missing required parameter: 'url'.",
        ),
        (
            request(body=None),
            "missing_required_parameter",
            "body",
            "Missing required parameter: 'body'.",
        ),
        (request(""), "invalid_custom_id", "custom_id", "Invalid 'custom_id': "),
        (request(7), "invalid_custom_id", "custom_id", "Invalid 'custom_id': "),
        (
            request("x" * (MAX_CUSTOM_ID_CHARS + 1)),
            "invalid_custom_id",
            "custom_id",
            "Invalid 'custom_id': expected a string of 1 to 512 characters, but got 513 ",
        ),
        (request(method="GET"), "invalid_method", "method", "Invalid method: 'GET'."),
        (request(method="post"), "invalid_method", "method", "Invalid method: 'post'."),
        (
            request(url="/v1/embeddings"),
            "invalid_url",
            "url",
            "The URL provided for this request does not match the batch endpoint.",
        ),
        (request(url="/v1/chat/completions/"), "invalid_url", "url", "The URL provided "),
        (request(url=["/v1/chat/completions"]), "invalid_url", "url", "The URL provided "),
        (
            request(url="/v1/nowhere"),
            "invalid_url",
            "url",
            "The URL provided for this request does not match the batch endpoint. It is "
            "'/v1/nowhere'; it must be '/v1/chat/completions'.",
        ),
        (request(body="{}"), "invalid_type", "body", "Invalid type for 'body': "),
        (
            request(body=body(model=None)),
            "invalid_request",
            "body.model",
            "Model parameter is required.",
        ),
        (
            request(body=body(model="")),
            "invalid_request",
            "body.model",
            "Model parameter is required. It must be a name, but is an empty string.",
        ),
        (
            request(body=body(model=1)),
            "invalid_request",
            "body.model",
            "Model parameter is required. It must be a name, but is a number.",
        ),
        (
            request(body=body(messages=None)),
            "invalid_request",
            "body.messages",
            "Messages parameter is required.",
        ),
        (
            request(body=body(stream=True)),
            "streaming_unsupported",
            "body.stream",
            "Chat Completions: Streaming is not supported in the Batch API.",
        ),
        (request(body=body(stream="yes")), "streaming_unsupported", "body.stream", "Chat "),
        (request(body=body(stream=1)), "streaming_unsupported", "body.stream", "Chat "),
    ],
)
def test_a_fault_has_the_code_the_param_and_the_words_that_clients_look_for(
    line: bytes, code: str, param: str | None, message: str
) -> None:
    data = request("good-1") + line + request("good-2")

    checked = check(data)

    assert [(f.code, f.param, f.line) for f in checked.faults] == [(code, param, 2)]
    assert checked.faults[0].message.startswith(message)
    assert checked.total == 3


def test_null_in_place_of_a_field_is_a_wrong_value_and_not_a_missing_one() -> None:
    null = b'{"custom_id":null,"method":null,"url":null,"body":null}\n'

    codes = ["invalid_custom_id", "invalid_method", "invalid_url", "invalid_type"]
    assert [fault.code for fault in check(null).faults] == codes


def test_a_custom_id_of_the_longest_length_counts_characters_and_not_bytes() -> None:
    assert check(request("é" * MAX_CUSTOM_ID_CHARS), max_line_bytes=10_000).faults == []


def test_all_that_is_wrong_with_a_line_is_told() -> None:
    line = request("", method="PUT", url="/nowhere", body={"stream": True})

    assert faults_of(line) == [
        ("invalid_custom_id", "custom_id", 1),
        ("invalid_method", "method", 1),
        ("invalid_url", "url", 1),
        ("invalid_request", "body.model", 1),
        ("invalid_request", "body.messages", 1),
        ("streaming_unsupported", "body.stream", 1),
    ]


def test_invalid_utf8_is_found_also_where_nobody_looks() -> None:
    bad = request("b", body=body(user="X")).replace(b'"X"', b'"\xc3("')

    assert faults_of(request("a") + bad + request("c")) == [("invalid_json_line", None, 2)]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/completions", "Completions: Streaming is not supported in the Batch API."),
        ("/v1/responses", "Responses: Streaming is not supported in the Batch API."),
        ("/v1/images/edits", "Images Edits: Streaming is not supported in the Batch API."),
    ],
)
def test_the_endpoint_stands_before_the_words_about_streaming(path: str, words: str) -> None:
    fields = {**dict.fromkeys(ENDPOINTS[path].required, "x"), "stream": True}
    checked = check(request(url=path, body=fields), endpoint=ENDPOINTS[path])

    [fault] = checked.faults
    assert fault.message.startswith(words)


@pytest.mark.parametrize(
    ("path", "param", "words"),
    [
        ("/v1/completions", "prompt", "Prompt parameter is required."),
        ("/v1/embeddings", "input", "Input parameter is required."),
        ("/v1/rerank", "documents", "Documents parameter is required."),
        ("/v1/images/edits", "prompt", "Prompt parameter is required."),
        ("/v1/videos", "prompt", "Prompt parameter is required."),
    ],
)
def test_a_missing_parameter_is_named(path: str, param: str, words: str) -> None:
    endpoint = ENDPOINTS[path]
    fields = {name: "x" for name in endpoint.required if name != param}

    checked = check(request(url=path, body=fields), endpoint=endpoint)

    assert checked.faults == [
        Fault(code="invalid_request", message=words, param=f"body.{param}", line=1)
    ]


def nested(levels: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    """A line of so many levels, two of which are its own object and its body."""
    inner = opening * (levels - 2) + b"1" + closing * (levels - 2)
    return request("deep", body=body(messages="X")).replace(b'"X"', inner)


@pytest.mark.parametrize("depth", [1000, 100_000, 2_000_000])
@pytest.mark.parametrize("is_whole", [True, False])
def test_a_line_that_is_nested_too_deeply_is_a_fault_and_no_crash(
    depth: int, is_whole: bool
) -> None:
    line = nested(depth) if is_whole else b"[" * depth + b"\n"

    checked = check(request("a") + line, max_line_bytes=10_000_000)

    assert [(f.code, f.line) for f in checked.faults] == [("invalid_json_line", 2)]
    assert checked.faults[0].message == (
        f"{NOT_JSON} It is nested too deeply; 500 levels are allowed."
    )


def below(calls: int, work: Callable[[], Any]) -> Any:
    return below(calls - 1, work) if calls else work()


@pytest.mark.parametrize(
    ("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":"]}","b":', b"}]")]
)
def test_a_line_may_have_as_many_levels_as_a_worker_can_read_in_any_place(
    opening: bytes, closing: bytes
) -> None:
    at_once = len(closing)
    levels = 2 + (MAX_NESTING - 2) // at_once
    good, bad = nested(levels, opening, closing), nested(levels + 1, opening, closing)

    checked = check(good, max_line_bytes=100_000)

    assert checked.faults == []
    assert faults_of(bad, max_line_bytes=100_000) == [("invalid_json_line", None, 1)]
    # Far more calls than a worker reads from, and far fewer than a decoder allows.
    assert len(below(350, lambda: requests_of(good, checked))) == 1


@pytest.mark.parametrize(
    "content",
    [
        pytest.param([[1]] * 2000, id="beside each other"),
        pytest.param("[{" * 2000, id="in a text"),
        pytest.param('\\"[[[' * 2000 + "\\", id="in a text with quotes"),
        pytest.param("]}" * 2000, id="only closed"),
    ],
)
def test_brackets_that_do_not_nest_are_no_levels(content: object) -> None:
    line = request(body=body(messages=content))

    assert check(line, max_line_bytes=100_000).faults == []
    assert [fault.code for fault in check(json.dumps(content).encode()).faults] in (
        ["line_too_long"],
        ["invalid_json_line"],
    )


def test_a_message_shows_long_values_short_and_on_one_line() -> None:
    checked = check(request(url="/v1/" + "x" * 500 + "\n"))

    assert len(checked.faults[0].message) < 300
    assert "\n" not in checked.faults[0].message


# Models


def test_a_model_that_no_upstream_serves_is_refused() -> None:
    data = request("a") + request("b", body=body(model="gpt")) + request("c")

    checked = check(data, accepts_model=lambda model: model == "m")

    assert [(f.code, f.param, f.line) for f in checked.faults] == [
        ("model_not_found", "body.model", 2)
    ]
    assert checked.faults[0].message == (
        "The provided model 'gpt' is not supported by the Batch API. No upstream serves it."
    )
    assert checked.models == ["m"]


@pytest.mark.parametrize(
    ("served", "told"),
    [
        (("m",), "The upstreams serve 'm'."),
        (("m", "llama-*"), "The upstreams serve 'm', 'llama-*'."),
        (
            tuple(f"m{n}" for n in range(23)),
            "The upstreams serve " + ", ".join(f"'m{n}'" for n in range(20)) + " and 3 more.",
        ),
    ],
)
def test_who_names_a_wrong_model_is_told_the_right_ones(
    served: tuple[str, ...], told: str
) -> None:
    line = request(body=body(model="gpt"))

    [fault] = check(line, accepts_model=lambda model: False, served_models=served).faults

    assert fault.message == (
        f"The provided model 'gpt' is not supported by the Batch API. {told}"
    )


def test_a_file_may_have_many_models_unless_it_may_have_one_only() -> None:
    models = ["z", "a", "z", "b"]
    data = b"".join(request(f"r{n}", body=body(model=m)) for n, m in enumerate(models))

    assert check(data).faults == []
    checked = check(data, one_model=True)

    assert [(f.code, f.param, f.line) for f in checked.faults] == [
        ("mismatched_model", "body.model", 2),
        ("mismatched_model", "body.model", 4),
    ]
    assert checked.faults[1].message == (
        "The model 'b' of this line is not 'z', which line 1 names; all lines of a batch must "
        "name the same one."
    )
    assert checked.models == ["z", "a", "b"]


def test_the_first_good_line_says_which_model_is_the_one() -> None:
    data = (
        request("0", body=body(model="unserved"))
        + request("1", body=body(model="a", stream=True))
        + request("2", body=body(model="b"))
        + request("3", body=body(model="a"))
        + request("4", body=body(model="a", stream=True))
        + request("5", body=body(model="b"))
    )
    rules: dict[str, Any] = {"one_model": True, "accepts_model": lambda m: m != "unserved"}

    for endpoint in (CHAT, None):
        checked = check(data, endpoint=endpoint, **rules)

        assert [(f.code, f.line) for f in checked.faults] == [
            ("model_not_found", 1),
            ("streaming_unsupported", 2),
            ("mismatched_model", 4),
            ("mismatched_model", 5),
            ("streaming_unsupported", 5),
        ]
        assert "'b', which line 3 names" in checked.faults[2].message


def test_without_an_endpoint_the_first_line_says_which_model_is_the_one() -> None:
    data = request("1", body=body(model="a")) + request("2", body=body(model="b"))

    assert faults_of(data, endpoint=None, one_model=True) == [
        ("mismatched_model", "body.model", 2)
    ]


# Embeddings


def embed(given: object, custom_id: str = "a") -> bytes:
    return request(custom_id, url=EMBEDDINGS.path, body={"model": "m", "input": given})


@pytest.mark.parametrize("endpoint", [EMBEDDINGS, None])
@pytest.mark.parametrize(
    ("given", "count"),
    [
        pytest.param("a text, of [1, 2]", 1, id="a text"),
        pytest.param([1, 2, 3], 1, id="tokens"),
        pytest.param([-1, 2, 3], 1, id="negative tokens"),
        pytest.param(["a", "b, c", "]"], 3, id="texts"),
        pytest.param([[1, 2], [3], [4, 5]], 3, id="lists of tokens"),
        pytest.param([{"type": "text"}, {"type": "text"}], 2, id="parts"),
        pytest.param([], 0, id="nothing"),
        pytest.param({"text": ["a", "b"]}, 1, id="an object"),
        pytest.param(None, 1, id="null"),
    ],
)
def test_the_inputs_of_a_line_are_counted(given: object, count: int, endpoint: Any) -> None:
    line = embed("GIVEN").replace(b'"GIVEN"', json.dumps(given, indent=0).encode())
    line = line.replace(b"\n", b" ").strip() + b"\n"
    data = line + embed(["one", "two"], "b")

    assert check(data, endpoint=endpoint, max_embedding_inputs=count + 2).faults == []
    [fault] = check(data, endpoint=endpoint, max_embedding_inputs=count + 1).faults

    assert fault == Fault(
        code="too_many_embedding_inputs",
        message=f"The requests of the input file hold {count + 2} inputs together; "
        f"at most {count + 1} are allowed.",
        param="body.input",
    )


def test_the_inputs_of_faulty_lines_count_too() -> None:
    faulty = embed(["x", "y"], "").replace(b"POST", b"PUT")

    checked = check(embed("a") + faulty, endpoint=EMBEDDINGS, max_embedding_inputs=2)

    assert [(f.code, f.line) for f in checked.faults] == [
        ("too_many_embedding_inputs", None),
        ("invalid_custom_id", 2),
        ("invalid_method", 2),
    ]
    assert "hold 3 inputs" in checked.faults[0].message


def test_a_file_that_is_read_twice_has_its_inputs_counted_once() -> None:
    data = embed(["x", "y"]) * 2

    assert faults_of(data, endpoint=EMBEDDINGS, max_embedding_inputs=4) == [
        ("duplicate_custom_id", "custom_id", 2)
    ]


def test_inputs_of_other_endpoints_do_not_count() -> None:
    line = request(body=body(input=["x"] * 10))

    assert check(line, max_embedding_inputs=1).faults == []


# Endpoint


def test_without_an_endpoint_that_of_the_first_line_counts() -> None:
    embeddings = ENDPOINTS["/v1/embeddings"]
    first = request("a", url="/v1/embeddings", body={"model": "m", "input": "x"})
    second = request("b", url="/embeddings", body={"model": "m", "input": "x"})

    checked = check(first + second + request("c"), endpoint=None)

    assert checked.endpoint == embeddings
    assert [(f.code, f.line) for f in checked.faults] == [
        ("invalid_url", 3),
        ("invalid_request", 3),
    ]
    assert checked.total == 3


def test_without_an_endpoint_a_good_file_is_good() -> None:
    data = request("a") + request("b")

    checked = check(data, endpoint=None)

    assert checked.faults == []
    assert [found.custom_id for found in requests_of(data, checked)] == ["a", "b"]


def test_where_no_line_names_an_endpoint_there_is_none() -> None:
    checked = check(request(url="/nowhere"), endpoint=None)

    assert checked.endpoint is None
    assert "'/v1/chat/completions'" in checked.faults[0].message


# Long lines


def test_the_longest_line_is_as_long_as_the_limit() -> None:
    line = request("a")

    assert check(line, max_line_bytes=len(line) - 1).faults == []
    assert check(BOM + line, max_line_bytes=len(line) - 1).faults == []
    assert faults_of(line, max_line_bytes=len(line) - 2) == [("line_too_long", None, 1)]


@pytest.mark.parametrize("step", [1, 7, 50, 10_000])
def test_a_long_line_is_one_fault_and_the_lines_around_it_are_read(step: int) -> None:
    long = request("long", body=body(user="x" * 500))
    data = request("a") + long + b"[]\n" + long[:-1] + b"\n" + request("b")

    checked = check(data, *range(step, len(data), step), max_line_bytes=400)

    assert [(f.code, f.line) for f in checked.faults] == [
        ("line_too_long", 2),
        ("invalid_json_line", 3),
        ("line_too_long", 4),
    ]
    assert {fault.message for fault in (checked.faults[0], checked.faults[2])} == {
        f"This line is longer than 400 bytes: it has {len(long) - 1}."
    }
    assert checked.total == 5


@pytest.mark.parametrize("step", [1, 100, 10_000])
def test_a_long_line_takes_no_part_in_the_search_for_duplicates(step: int) -> None:
    long = request("a", body=body(user="x" * 500))
    data = long + request("a") + request("a") + long

    checked = check(data, *range(step, len(data), step), max_line_bytes=400)

    assert [(f.code, f.line) for f in checked.faults] == [
        ("line_too_long", 1),
        ("duplicate_custom_id", 3),
        ("line_too_long", 4),
    ]


def test_a_long_line_at_the_end_of_a_file_is_found() -> None:
    assert faults_of(request("a") + b"x" * 2000) == [("line_too_long", None, 2)]


# Duplicates


def test_a_repeated_custom_id_is_told_with_the_line_that_has_it_first() -> None:
    data = BOM + request("a") + b"\n" + request("b") + request("a") + request("b") * 2

    checked = check(data)

    assert [(f.code, f.param, f.line) for f in checked.faults] == [
        ("duplicate_custom_id", "custom_id", line) for line in (4, 5, 6)
    ]
    assert checked.faults[0].message == (
        "The custom_id 'a' of line 4 is already used by line 1."
    )
    assert checked.faults[2].message == (
        "The custom_id 'b' of line 6 is already used by line 3."
    )


def test_faults_come_in_line_order_duplicates_too() -> None:
    data = request("a") + request("a") + b"[]\n" + request("a")

    assert [line for _, _, line in faults_of(data)] == [2, 3, 4]


def test_the_custom_id_of_a_faulty_line_counts() -> None:
    faulty = request("a", body=body(stream=True))

    assert faults_of(faulty + request("a")) == [
        ("streaming_unsupported", "body.stream", 1),
        ("duplicate_custom_id", "custom_id", 2),
    ]


def test_custom_ids_are_equal_as_text_and_not_as_bytes() -> None:
    escaped = request("X").replace(b'"X"', b'"\\u0061"')

    assert faults_of(request("a") + escaped) == [("duplicate_custom_id", "custom_id", 2)]


@given(ids=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=30))
def test_different_custom_ids_with_equal_hashes_are_no_duplicates(ids: list[str]) -> None:
    data = b"".join(request(custom_id) for custom_id in ids)
    expected = check(data)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jsonl, "hash", len, raising=False)
        checked = check(data)

    assert checked == expected
    assert len(checked.faults) == len(ids) - len(set(ids))


# The whole file


@pytest.mark.parametrize("data", [b"", b"\n", BOM, b" \r\n\n\t"])
def test_a_file_without_a_request_is_refused(data: bytes) -> None:
    checked = check(data)

    assert [(f.code, f.param, f.line) for f in checked.faults] == [("empty_file", None, None)]
    assert checked.total == 0


def test_a_file_with_too_many_requests_is_refused() -> None:
    data = b"".join(request(f"r{n}") for n in range(4))

    assert check(data, max_requests=4).faults == []
    assert faults_of(data + b"{\n", max_requests=4) == [
        ("too_many_tasks", None, None),
        ("invalid_json_line", None, 5),
    ]
    assert check(data, max_requests=3).faults[0].message == (
        "The input file holds 4 requests; at most 3 are allowed."
    )


def test_faults_are_told_up_to_a_limit_and_then_counted() -> None:
    data = b"[]\n" * 5 + request("a") * 3

    checked = check(data, max_faults=4)

    assert [fault.line for fault in checked.faults] == [1, 2, 3, 4, None]
    assert checked.faults[-1] == Fault(
        code="too_many_faults",
        message="The input file has 7 faults; only the first 4 are listed.",
    )
    assert len(check(data, max_faults=7).faults) == 7


def test_a_fault_of_the_whole_file_is_one_of_those_that_are_told() -> None:
    checked = check(b"[]\n" * 5, max_faults=3, max_requests=4)

    assert [(fault.code, fault.line) for fault in checked.faults] == [
        ("too_many_tasks", None),
        ("invalid_json_line", 1),
        ("invalid_json_line", 2),
        ("too_many_faults", None),
    ]
    assert "has 6 faults; only the first 3 are" in checked.faults[-1].message


def test_a_duplicate_is_told_before_the_faults_of_later_lines() -> None:
    data = request("a") * 2 + b"[]\n" * 5

    assert [fault.line for fault in check(data, max_faults=3).faults] == [2, 3, 4, None]


def test_a_file_on_disk_is_checked_in_the_same_way(tmp_path: Path) -> None:
    data = b"".join(request(f"r{n % 9000}", body=body(user="x" * 100)) for n in range(9001))
    path = tmp_path / "input.jsonl"
    path.write_bytes(data)

    checked = check_file(path, rules(max_requests=10_000))

    assert checked == check(data, max_requests=10_000)
    assert [fault.line for fault in checked.faults] == [9001]


def test_a_file_that_cannot_be_read_is_the_callers_matter(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        check_file(tmp_path / "nothing.jsonl", rules())


# Slices


def test_a_slice_holds_no_more_requests_than_allowed() -> None:
    data = b"".join(request(f"r{n}") for n in range(7))

    plans = check(data, slice_requests=3).slices

    assert [plan.requests for plan in plans] == [3, 3, 1]
    assert [plan.first_line for plan in plans] == [1, 4, 7]


def test_a_slice_holds_no_more_bytes_than_allowed_unless_one_line_does() -> None:
    short, long = request("s"), request("l", body=body(user="x" * 400))
    lines = [request("1"), request("2"), long, request("3"), request("4"), request("5")]
    limit = 2 * len(short)

    plans = check(b"".join(lines), slice_bytes=limit).slices

    assert [plan.requests for plan in plans] == [2, 1, 2, 1]
    assert [plan.end - plan.start <= limit for plan in plans] == [True, False, True, True]


def test_a_slice_knows_its_models() -> None:
    names = ["a", "b", "a", "c"]
    data = b"".join(request(f"r{n}", body=body(model=m)) for n, m in enumerate(names))

    assert [plan.models for plan in check(data, slice_requests=3).slices] == [
        ("a", "b"),
        ("c",),
    ]


def test_slices_grow_with_the_file() -> None:
    data = b"".join(request(f"r{n}") for n in range(30_000))

    slices = check(data, slice_requests=1024, slice_bytes=1 << 20).slices

    sizes = [plan.requests for plan in slices]
    assert sizes[:17] == [256] * 17
    before = list(accumulate(sizes, initial=0))
    assert sizes[17:-1] == [min(n // 16, 1024) for n in before[17:-2]]
    assert sizes[-2] == 1024
    assert sum(sizes) == 30_000


@given(before=st.integers(0, 10**7), most=st.integers(1, 10**5))
def test_a_slice_is_a_small_part_of_its_file_or_small(before: int, most: int) -> None:
    size = slice_size(before, most)

    assert 1 <= size <= most
    assert size <= max(256, before // 16)


def test_the_last_slice_ends_where_the_file_ends() -> None:
    data = request("a") + request("b")[:-1]

    assert check(data, slice_requests=1).slices[-1].end == len(data)
    assert check(data, len(data) - 3, slice_requests=1).slices[-1].end == len(data)


# Properties

raw_bodies = st.sampled_from(
    [
        b'{"model":"m","messages":[]}',
        b'{ "messages" : [ "\xe2\x80\xa8\\u2028" ] , "model" : "n" }',
        b'{"model":"m","messages":1.0e2,"n":01e0}'.replace(b"01e0", b"1E5"),
        b'{"model":"m","model":"n","messages":null}',
        b'{"model":"\xf0\x9f\xa6\x86","messages":[[[]]],"seed":12345678901234567890123}',
    ]
)


@st.composite
def good_lines(draw: st.DrawFn) -> tuple[bytes, list[tuple[str, bytes]]]:
    """A good file, and the custom ID and body of each of its requests."""
    expected: list[tuple[str, bytes]] = []
    lines: list[bytes] = []
    for raw in draw(st.lists(raw_bodies, min_size=1, max_size=25)):
        lines += draw(st.lists(st.sampled_from([b"", b" ", b"\r"]), max_size=2))
        custom_id = f"é-{len(expected)}"
        head = f'{{"custom_id":"{custom_id}","method":"POST","url":"{CHAT.path}",'.encode()
        lines.append(head + b'"body":' + raw + draw(st.sampled_from([b"}", b" }\r", b"\t}  "])))
        expected.append((custom_id, raw))
    mark = draw(st.sampled_from([b"", BOM]))
    return mark + b"\n".join(lines) + draw(st.sampled_from([b"", b"\n", b"\n\n"])), expected


@given(
    file=good_lines(),
    slice_requests=st.integers(1, 8),
    slice_bytes=st.integers(1, 1500),
)
def test_slices_hold_every_request_once_in_order_and_byte_for_byte(
    file: tuple[bytes, list[tuple[str, bytes]]], slice_requests: int, slice_bytes: int
) -> None:
    data, expected = file

    checked = check(data, slice_requests=slice_requests, slice_bytes=slice_bytes)

    assert checked.faults == []
    assert checked.total == len(expected)
    found = requests_of(data, checked)
    assert [(each.custom_id, each.body) for each in found] == expected
    lines = data.split(b"\n")
    assert all(each.body in lines[each.line - 1] for each in found)
    assert [each.line for each in found] == sorted({each.line for each in found})
    assert {each.model for each in found} == set(checked.models)
    for plan in checked.slices:
        assert 0 <= plan.start < plan.end <= len(data)
        assert 1 <= plan.requests <= slice_requests
        assert plan.end - plan.start <= slice_bytes or plan.requests == 1
        mine = list(iter_requests(data[plan.start : plan.end], first_line=plan.first_line))
        assert len(mine) == plan.requests
        assert mine[0].line == plan.first_line
        assert {each.model for each in mine} == set(plan.models)
    assert all(one.end <= other.start for one, other in pairwise(checked.slices))


any_line = st.one_of(
    st.sampled_from(
        [
            b"",
            b"\r",
            b"{",
            b"[]",
            b"\xff\xfe",
            BOM,
            b" " * 300,
            b"x" * 151,
            b'{"custom_id":"a","x":"\xff"}',
            request("a")[:-1],
            request("a")[:-1],
            request("b")[:-1] + b"\r",
            request("é", body=body(user="é"))[:-1],
            request("a", body=body(user="é" * 100))[:-1],
            request("c", body=body(stream=True))[:-1],
            request(None)[:-1],
        ]
    ),
    st.binary(max_size=12),
)


@settings(max_examples=300)
@given(
    lines=st.lists(any_line, max_size=12),
    mark=st.sampled_from([b"", BOM]),
    cuts=st.lists(st.integers(0, 3000), max_size=12),
    max_line_bytes=st.sampled_from([150, 151, 200, 1000]),
)
@example(
    lines=[request("a")[:-1]] * 2 + [request("a", body=body(user="x" * 100))[:-1]],
    mark=b"",
    cuts=list(range(1, 3000)),
    max_line_bytes=150,
)
def test_however_the_bytes_arrive_the_file_is_the_same(
    lines: list[bytes], mark: bytes, cuts: list[int], max_line_bytes: int
) -> None:
    data = mark + b"\n".join(lines)
    pieces = sorted(min(cut, len(data)) for cut in cuts)

    whole = check(data, max_line_bytes=max_line_bytes)

    assert check(data, *pieces, max_line_bytes=max_line_bytes) == whole
    assert check(data, *range(1, len(data)), max_line_bytes=max_line_bytes) == whole


@given(data=st.binary(max_size=200), endpoint=st.sampled_from([CHAT, None]))
def test_any_bytes_at_all_are_checked_without_a_crash(data: bytes, endpoint: Any) -> None:
    checked = check(data, endpoint=endpoint)

    assert checked.faults
    assert all(re.fullmatch(r"[a-z_]+", fault.code) for fault in checked.faults)


@pytest.mark.parametrize(
    ("good", "twice"),
    [
        (b'"model": "m"', b'"model": 5, "model": "m"'),
        (b'"custom_id": "a"', b'"custom_id": 1, "custom_id": "a"'),
    ],
)
def test_a_key_that_is_named_twice_in_different_ways_is_a_fault(
    good: bytes, twice: bytes
) -> None:
    # A worker could not read it back, whichever of the two counts.
    line = request("a").replace(good, twice)
    assert twice in line

    assert faults_of(line) == [("invalid_json_line", None, 1)]


# Ways


def by_first_letter(model: str) -> str:
    return model[0]


@given(
    models=st.lists(st.sampled_from(["a1", "a2", "b1", "c1"]), min_size=1, max_size=30),
    slice_requests=st.integers(1, 9),
)
def test_lines_of_different_ways_share_no_slice_and_none_is_lost(
    models: list[str], slice_requests: int
) -> None:
    lines = [request(f"line-{n}", body=body(model=model)) for n, model in enumerate(models, 1)]
    data = b"\n".join(lines)  # with blank lines between

    checked = check(data, slice_requests=slice_requests, way_of=by_first_letter)

    found: dict[int, str] = {}
    for plan in checked.slices:
        its = list(
            iter_requests(
                data[plan.start : plan.end], first_line=plan.first_line, models=plan.models
            )
        )
        assert len(its) == plan.requests <= slice_requests
        assert {each.model for each in its} == set(plan.models)
        assert len({by_first_letter(each.model) for each in its}) == 1
        assert not found.keys() & {each.line for each in its}
        found |= {each.line: each.model for each in its}
    assert [found[line] for line in sorted(found)] == models
    assert sum(plan.bytes for plan in checked.slices) == sum(map(len, lines))


def test_models_that_alternate_make_two_slices_of_each_block() -> None:
    data = b"".join(request(f"{n}", body=body(model="ab"[n % 2])) for n in range(40))

    checked = check(data, slice_requests=10, way_of=by_first_letter)

    assert [plan.models for plan in checked.slices] == [("a",), ("b",)] * 4
    assert [plan.requests for plan in checked.slices] == [5] * 8
    assert [plan.first_line for plan in checked.slices] == [1, 1, 11, 11, 21, 21, 31, 31]
    spans = [(plan.start, plan.end) for plan in checked.slices]
    assert spans[::2] == spans[1::2]
