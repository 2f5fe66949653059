"""How a provider's result file is cut into lines."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import JobRefused
from penstock.upstream.result_lines import ResultLines


@given(
    pieces=st.lists(
        st.lists(st.sampled_from([b"a", b"\n", b" ", b"\r", b"bc"]), max_size=6).map(b"".join)
    )
)
def test_any_cut_gives_the_same_lines_without_blank_ones(pieces: list[bytes]) -> None:
    lines = ResultLines("It")

    found = [line for piece in pieces for line in lines.feed(piece)] + lines.finish()

    whole = b"".join(pieces)
    assert found == [line for line in whole.split(b"\n") if line.strip()]
    assert lines.size == len(whole)


def test_a_line_that_does_not_end_is_held_up_to_a_bound() -> None:
    lines = ResultLines("The upstream one", max_line_bytes=10)
    assert list(lines.feed(b"one\n" + b"x" * 10)) == [b"one"]

    with pytest.raises(
        JobRefused, match=r"^The upstream one sent a line of results of more than 10 bytes\.$"
    ):
        list(lines.feed(b"x"))
