"""`docs/translation.md` lists what is ignored."""

from pathlib import Path

import pytest

from penstock.upstream.translation import chat, responses

DOCS = Path(__file__).parents[3] / "docs/translation.md"


@pytest.mark.parametrize(
    ("endpoint", "ignored"),
    [("/v1/chat/completions", chat.IGNORED), ("/v1/responses", responses.IGNORED)],
)
def test_every_ignored_field_is_listed(endpoint: str, ignored: frozenset[str]) -> None:
    row = next(
        line for line in DOCS.read_text().splitlines() if line.startswith(f"| `{endpoint}` |")
    )
    listed = row.partition(";")[0].split("|")[2]

    assert set(listed.replace("`", " ").split()) == ignored
