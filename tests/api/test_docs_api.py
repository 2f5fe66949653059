"""`docs/api.md` names every call, parameter, member and status of the API, and no other."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.api.routes import describe
from penstock.model import ENDPOINTS, BatchStatus

MANUAL = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
DOCUMENT = describe()
OPERATIONS: dict[str, dict[str, Any]] = {
    f"{method.upper()} {path}": operation
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
}
_CALL = re.compile(r"^### ([A-Z]+ /.*)\n(?s:(.*?))(?=^###? |\Z)", re.M)
SECTIONS = dict(_CALL.findall(MANUAL))


def table(section: str, head: str) -> list[list[str]]:
    """The rows of the table whose first heading starts so, as cells; empty without one."""
    found = re.search(rf"^\| {re.escape(head)}.*\n\|[-|]+\|\n((?:\|.*\n)+)", section, re.M)
    lines = found[1].splitlines() if found else []
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    for choice in (schema, *schema.get("anyOf", ())):
        if "$ref" in choice:
            return DOCUMENT["components"]["schemas"][choice["$ref"].rpartition("/")[2]]
    return schema


def members(schema: dict[str, Any]) -> Iterator[str]:
    for name, inner in resolved(schema)["properties"].items():
        yield name
        if "properties" in (found := resolved(inner)):
            yield from (f"{name}.{below}" for below in members(found))


def test_every_call_has_its_section() -> None:
    assert set(SECTIONS) == set(OPERATIONS)


@pytest.mark.parametrize("call", OPERATIONS)
def test_a_section_has_the_parameters_of_its_call(call: str) -> None:
    rows = table(SECTIONS[call], "parameter")

    described = {(p["name"], p["in"]) for p in OPERATIONS[call].get("parameters", [])}
    assert {(name.strip("`"), place) for name, place, *_ in rows} == described
    assert len(rows) == len(described)


@pytest.mark.parametrize("call", OPERATIONS)
def test_a_section_has_the_members_of_its_body(call: str) -> None:
    rows = table(SECTIONS[call], "body")

    described: set[str] = set()
    required: set[str] = set()
    for content in OPERATIONS[call].get("requestBody", {}).get("content", {}).values():
        described |= set(members(content["schema"]))
        required |= set(resolved(content["schema"])["required"])
    assert {name.strip("`") for name, *_ in rows} == described
    assert {name.strip("`") for name, text in rows if text.startswith("Required. ")} == required


@pytest.mark.parametrize("call", OPERATIONS)
def test_a_section_has_the_statuses_of_its_call(call: str) -> None:
    rows = table(SECTIONS[call], "status")

    assert [status for status, *_ in rows] == sorted(OPERATIONS[call]["responses"])


def test_the_statuses_of_all_errors_are_explained() -> None:
    explained = {status for status, _ in table(MANUAL, "status | when")}

    described = {s for o in OPERATIONS.values() for s in o["responses"] if s >= "400"}
    # These belong to no call: a method that is not there, and a fault of the server.
    assert explained == described | {"405", "500"}


def test_the_objects_are_told_with_all_their_members() -> None:
    batch = " ".join(name for name, _ in table(MANUAL, "member"))

    assert set(re.findall(r"`(\w+)`", batch)) == set(members_of("Batch"))
    [file] = re.findall(r"^A file object is .*$", MANUAL, re.M)
    assert {f"`{name}`" for name in members_of("File")} <= set(re.findall(r"`\w+`", file))


def members_of(name: str) -> list[str]:
    return list(DOCUMENT["components"]["schemas"][name]["properties"])


def test_the_endpoints_and_statuses_are_those_that_there_are() -> None:
    endpoints = MANUAL.partition("#### Endpoints")[2].partition("####")[0]
    statuses = dict(table(MANUAL, "member"))["`status`"]

    assert re.findall(r"`(.+?)`", endpoints) == list(ENDPOINTS)
    assert set(re.findall(r"`(\w+)`", statuses)) == set(BatchStatus)


def test_links_lead_somewhere() -> None:
    titles = re.findall(r"^#+ (.*)$", MANUAL, re.M)
    anchors = {f"#{re.sub(r'[^a-z0-9 -]', '', t.lower()).replace(' ', '-')}" for t in titles}

    for link in re.findall(r"\]\(([^)]+)\)", MANUAL):
        assert link in anchors or (Path(__file__).parents[2] / "docs" / link).exists(), link
