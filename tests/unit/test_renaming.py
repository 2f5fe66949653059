"""Another model is put into a body, and nothing else of it is touched."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.executor.renaming import put_model, rename
from penstock.request_lines import RequestLine

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("model"), inner),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("body", "renamed"),
    [
        (b'{"model":"a"}', b'{"model":"NEW"}'),
        (b' { "model" :\t"a" , "n": 1.00 } ', b' { "model" :\t"NEW" , "n": 1.00 } '),
        (b'{"n":1e5,"model":"a\\"}b","x":[]}', b'{"n":1e5,"model":"NEW","x":[]}'),
        (b'{"mo\\u0064el":"a"}', b'{"mo\\u0064el":"NEW"}'),
        (b'{"model":"a","model":"b"}', b'{"model":"NEW","model":"NEW"}'),
        (b'{"a":"model","model":"a"}', b'{"a":"model","model":"NEW"}'),
        (b'{"x":{"model":"a"},"model":"b"}', b'{"x":{"model":"a"},"model":"NEW"}'),
        (b'{"x":[{"model":"a"}],"model":""}', b'{"x":[{"model":"a"}],"model":"NEW"}'),
        (b'{"x":"\\"model\\":","model":"b"}', b'{"x":"\\"model\\":","model":"NEW"}'),
        (b'{"\\ud800":1,"model":"b"}', b'{"\\ud800":1,"model":"NEW"}'),
        (b'{"model":"a","y":"model"}', b'{"model":"NEW","y":"model"}'),
    ],
)
def test_only_the_bytes_of_the_name_change(body: bytes, renamed: bytes) -> None:
    assert put_model(body, "NEW") == renamed


@given(st.dictionaries(st.text(), JSON), st.text(), st.text(), st.booleans())
def test_a_body_means_the_same_but_for_its_model(
    fields: dict[str, Any], old: str, new: str, is_ascii: bool
) -> None:
    body = {**fields, "model": old}
    text = json.dumps(body, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass")

    renamed = put_model(text, new.encode("utf-8", "replace").decode())

    told = json.loads(renamed.decode("utf-8", "surrogatepass"))
    assert told == {**body, "model": new.encode("utf-8", "replace").decode()}
    assert list(told) == list(body)


def test_lines_that_name_the_model_already_are_not_touched() -> None:
    lines = [RequestLine(1, "a", b'{"model": "m"}', "m", 7), RequestLine(2, "b", b"{}", "x", 0)]

    assert list(rename(lines, None)) == lines
    assert list(rename(lines[:1], "m")) == lines[:1]
    [renamed] = rename([RequestLine(3, "c", b'{"model": "x"}', "x", 7)], "m")
    assert renamed == RequestLine(3, "c", b'{"model": "m"}', "m", 7)
