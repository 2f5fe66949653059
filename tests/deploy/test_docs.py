"""What is written about deployment agrees with the program."""

import re
from pathlib import Path

import pytest

from penstock.settings import Settings, list_settings
from tests.deploy.facts import (
    CHART,
    HEALTH_PATHS,
    ROOT,
    is_metric,
    is_setting,
    longest_end_s,
)

MANUAL = ROOT / "docs" / "deploy.md"
PAGES = (MANUAL, CHART / "README.md")
TEXT = MANUAL.read_text(encoding="utf-8")
SETTINGS = Settings.model_validate({})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        titles = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.M)
        assert not anchor or anchor in [title.lower().replace(" ", "-") for title in titles]


def test_a_process_has_time_to_end_as_the_examples_start_it() -> None:
    given = re.findall(r"(?:--stop-timeout |TimeoutStopSec=)(\d+)", TEXT)

    assert len(given) == 2
    for seconds in given:
        assert int(seconds) > longest_end_s(SETTINGS.server.shutdown_grace_s)


def test_variables_metrics_and_routes_are_real() -> None:
    settings = {entry.name for entry in list_settings()}
    metrics = re.findall(r"\b(penstock_\w+?)(?:_total)?\b(?!\w)", TEXT)

    assert metrics
    for metric in metrics:
        assert is_metric(metric), metric
    for variable in re.findall(r"\bPENSTOCK_\w+", TEXT):
        assert is_setting(variable), variable
    for name in re.findall(r"`((?:server|limits|worker)\.\w+|database_url|storage_url)`", TEXT):
        assert name in settings, name
    for path in re.findall(r"`(/(?:healthz|readyz|metrics))`", TEXT):
        assert path in HEALTH_PATHS


def test_the_proxy_in_the_example_takes_the_largest_file() -> None:
    [megabytes] = re.findall(r"client_max_body_size (\d+)m", TEXT)

    assert int(megabytes) << 20 >= SETTINGS.limits.input_file_bytes
