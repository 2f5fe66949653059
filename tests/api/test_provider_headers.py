"""What headers say of the provider of a batch, where its project may choose an upstream."""

from typing import Any

import httpx2
import pytest

from penstock.api.batches import PROVIDER_HEADERS
from penstock.service import PROVIDER_NAME, UpstreamChoice
from tests.api.conftest import Server, Tenant

CHAT = "/v1/chat/completions"
VERSION = "x-tfy-azure-api-version"
NAMED = (PROVIDER_NAME, "azure")
AZURE = UpstreamChoice(headers=frozenset({"x-tfy-provider-model", VERSION}), models=("*",))


@pytest.fixture
def chooser(server: Server, tenant: Tenant) -> Tenant:
    """Whose project may choose an upstream."""
    server.choices[tenant.project_id] = {"azure": AZURE}
    return tenant


def error_of(answer: httpx2.Response) -> dict[str, Any]:
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def create(http: httpx2.Client, tenant: Tenant, *headers: tuple[str, str]) -> httpx2.Response:
    body = {"input_file_id": tenant.add_input(), "endpoint": CHAT}
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    return http.post("/batches", json=body, headers=encoded)


@pytest.mark.parametrize("version", ["2024-10-21", "2025-04-01-preview", "x" * 64])
def test_a_version_of_azures_api_is_taken(
    http: httpx2.Client, chooser: Tenant, version: str
) -> None:
    assert create(http, chooser, NAMED, (VERSION, version)).status_code == 200


@pytest.mark.parametrize("version", ["foo bar&x=1", "2024/10", "x" * 65, "caf\xe9"])
def test_what_cannot_be_a_version_of_azures_api_is_refused(
    http: httpx2.Client, chooser: Tenant, version: str
) -> None:
    error = error_of(create(http, chooser, NAMED, (VERSION, version)))

    assert (error["param"], error["code"]) == (VERSION, "invalid_value")
    assert error["message"].endswith(
        "It must be 1 to 64 letters, digits, dots, dashes or underscores, such as 2024-10-21."
    )


@pytest.mark.parametrize("name", [PROVIDER_NAME, VERSION, "x-tfy-provider-model"])
def test_an_empty_header_is_refused(http: httpx2.Client, chooser: Tenant, name: str) -> None:
    named = [] if name == PROVIDER_NAME else [NAMED]

    error = error_of(create(http, chooser, *named, (name, "")))

    assert error["param"] == name
    assert error["message"] == f"Invalid header '{name}': it is empty."


@pytest.mark.parametrize("name", [PROVIDER_NAME, *PROVIDER_HEADERS])
@pytest.mark.parametrize("values", [("azure", "azure"), ("azure", "other"), ("azure", "")])
def test_a_header_that_is_given_twice_is_refused(
    http: httpx2.Client, chooser: Tenant, name: str, values: tuple[str, str]
) -> None:
    named = [] if name == PROVIDER_NAME else [NAMED]

    error = error_of(create(http, chooser, *named, *((name, value) for value in values)))

    assert error["param"] == name
    assert error["message"] == f"Invalid header '{name}': it is given more than once."


def test_where_nothing_can_be_chosen_no_header_is_read(
    http: httpx2.Client, tenant: Tenant
) -> None:
    headers = [(PROVIDER_NAME, ""), (VERSION, "foo bar&x=1"), (VERSION, "")]

    assert create(http, tenant, *headers).status_code == 200
