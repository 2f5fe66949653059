"""`compose.yaml`: valid, wired to what there is, and patient enough with processes that end."""

import re
import tomllib
from collections.abc import Iterator
from typing import Any

import boto3
import jsonschema_rs
import obstore
import pytest
import yaml
from moto.server import ThreadedMotoServer
from obstore.store import from_url

from penstock.settings import Settings
from penstock.settings import load_settings as load
from tests.deploy.facts import DEPLOY, FOREIGN, HEALTH_PATHS, is_setting, longest_end_s
from tests.deploy.tools import Tools, faults

TEXT = (DEPLOY / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
EXAMPLE = dict(re.findall(r"^(\w+)=(.*)$", (DEPLOY / ".env.example").read_text(), re.M))
OURS = ("migrate", "api", "worker")


def environment(service: str) -> dict[str, str]:
    return SERVICES[service].get("environment", {})


def seconds(text: str) -> int:
    [number] = re.findall(r"^(\d+)s$", text)
    return int(number)


def test_it_is_a_compose_file(tools: Tools) -> None:
    validator: jsonschema_rs.Validator = tools.compose_validator()

    assert faults(validator, COMPOSE) == []
    assert faults(validator, COMPOSE | {"service": {}}) != []


@pytest.mark.parametrize("service", OURS)
def test_every_variable_is_read_by_somebody(service: str) -> None:
    for name in environment(service):
        assert is_setting(name) if name.startswith("PENSTOCK_") else FOREIGN.fullmatch(name)


def test_every_name_in_the_env_file_is_used() -> None:
    for name in EXAMPLE:
        in_settings = f'env = "{name}"' in (DEPLOY / "penstock.toml").read_text()
        assert f"${{{name}:?" in TEXT or in_settings
        assert is_setting(name) if name.startswith("PENSTOCK_") else FOREIGN.fullmatch(name)


def test_every_value_from_outside_is_in_the_env_file_and_must_be_given() -> None:
    named = re.findall(r"\$\{(\w+)(.*?)\}", TEXT)

    assert {name for name, _ in named} <= set(EXAMPLE)
    assert {rest for _, rest in named} == {":?is missing in .env"}


def test_no_secret_stands_in_the_files() -> None:
    for service in SERVICES:
        for name, value in environment(service).items():
            if re.search("PASSWORD|SECRET|KEY", name):
                assert value.startswith("${")


def test_the_settings_file_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPSTREAM_API_KEY", EXAMPLE["UPSTREAM_API_KEY"])

    settings = Settings.model_validate(tomllib.loads((DEPLOY / "penstock.toml").read_text()))

    assert [upstream.name for upstream in settings.upstreams] == ["main"]


def test_the_settings_file_is_where_the_commands_look() -> None:
    for service in ("api", "worker"):
        [mounted] = SERVICES[service]["configs"]
        command = SERVICES[service]["command"]
        assert command[command.index("--config") + 1] == mounted["target"]
    assert (DEPLOY / COMPOSE["configs"]["penstock"]["file"]).is_file()


def test_the_commands_are_those_of_a_cluster() -> None:
    assert SERVICES["migrate"]["command"] == ["migrate"]
    assert SERVICES["api"]["command"][:2] == ["serve", "--no-workers"]
    assert SERVICES["worker"]["command"][:1] == ["work"]


@pytest.mark.parametrize("service", ["api", "worker"])
def test_health_is_asked_where_it_is_told(service: str) -> None:
    call = " ".join(SERVICES[service]["healthcheck"]["test"])
    [(port, path)] = re.findall(r"127\.0\.0\.1:(\d+)(/\w+)", call)

    told = environment(service).get("PENSTOCK_WORKER__HEALTH_PORT", load().server.port)
    assert int(port) == int(told)
    assert path in HEALTH_PATHS


@pytest.mark.parametrize("service", ["api", "worker"])
def test_a_process_has_time_to_end(service: str) -> None:
    grace_s = float(environment(service)["PENSTOCK_SERVER__SHUTDOWN_GRACE_S"])

    assert seconds(SERVICES[service]["stop_grace_period"]) > longest_end_s(grace_s)


def test_each_part_waits_for_what_it_needs() -> None:
    def needs(service: str) -> dict[str, str]:
        return {n: each["condition"] for n, each in SERVICES[service]["depends_on"].items()}

    for service in ("api", "worker"):
        assert needs(service) == {
            "migrate": "service_completed_successfully",
            "bucket": "service_completed_successfully",
        }
    for service in ("migrate", "bucket"):
        [(needed, condition)] = needs(service).items()
        assert condition == "service_healthy"
        assert "healthcheck" in SERVICES[needed]


def test_what_must_last_lies_on_volumes() -> None:
    for service in ("postgres", "seaweedfs"):
        [volume] = SERVICES[service]["volumes"]
        assert volume.partition(":")[0] in COMPOSE["volumes"]


@pytest.mark.parametrize("service", OURS)
def test_our_processes_may_do_nothing_that_they_need_not(service: str) -> None:
    assert SERVICES[service]["read_only"] is True
    assert SERVICES[service]["cap_drop"] == ["ALL"]


def test_workers_can_be_many() -> None:
    assert not {"ports", "container_name"} & set(SERVICES["worker"])


def test_the_api_is_published_to_this_machine_alone() -> None:
    assert SERVICES["api"]["ports"] == ["127.0.0.1:8080:8080"]
    assert all("ports" not in SERVICES[name] for name in SERVICES if name != "api")


@pytest.fixture
def s3() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def test_the_storage_client_understands_the_variables(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {n: v for n, v in environment("worker").items() if n.startswith("AWS_")}
    for name, value in variables.items():
        known = value.replace("http://seaweedfs:8333", s3)
        monkeypatch.setenv(name, "some" if value.startswith("${") else known)
    client = boto3.session.Session().client("s3", endpoint_url=s3)
    url = environment("worker")["PENSTOCK_STORAGE_URL"]
    [bucket, prefix] = url.removeprefix("s3://").split("/")
    client.create_bucket(Bucket=bucket)

    store = from_url(url, retry_config={"max_retries": 0})
    obstore.put(store, "object", b"bytes")

    [found] = client.list_objects_v2(Bucket=bucket)["Contents"]
    assert found["Key"] == f"{prefix}/object"
    assert f"-name {bucket}" in " ".join(SERVICES["bucket"]["entrypoint"])
