"""`docs/settings.md` holds every setting, as the program has it."""

import re
import tomllib
from pathlib import Path

import pytest

from penstock.settings import Entry, Settings, list_settings

MANUAL = (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8")
ROWS = {
    name: (default.strip("`"), variable, meaning)
    for name, default, variable, meaning in re.findall(
        r"^\| `(.+?)` \| (.+?) \| `(.+?)` \| (.+) \|$", MANUAL, re.M
    )
}


@pytest.mark.parametrize("entry", list_settings(), ids=lambda entry: entry.name)
def test_the_manual_has_the_setting_as_it_is(entry: Entry) -> None:
    assert ROWS.get(entry.name) == (entry.default, entry.variable, entry.description)


def test_the_manual_has_no_setting_that_is_not_there() -> None:
    assert list(ROWS) == [entry.name for entry in list_settings()]


def test_the_file_in_the_manual_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_KEY", "sk-local")
    [example] = re.findall(r"^```toml\n(.+?)^```$", MANUAL, re.M | re.S)

    Settings.model_validate(tomllib.loads(example))


@pytest.mark.parametrize("entry", list_settings(), ids=lambda entry: entry.name)
def test_a_setting_is_described_in_one_sentence(entry: Entry) -> None:
    assert entry.description[:1].isupper()
    assert entry.description.endswith(".")
    assert ". " not in entry.description


@pytest.mark.parametrize("entry", list_settings(), ids=lambda entry: entry.name)
def test_a_setting_with_a_unit_in_its_name_says_the_unit(entry: Entry) -> None:
    if entry.name.endswith("_s"):
        assert "in seconds" in entry.description
    if entry.name.endswith("_bytes"):
        assert "bytes" in entry.description
