"""The Helm chart, rendered by Helm itself and held to the schemas of Kubernetes."""

import base64
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from penstock import __version__
from penstock.settings import Settings
from penstock.settings import load_settings as load
from tests.deploy.facts import (
    API_PREFIXES,
    CHART,
    HEALTH_PATHS,
    is_metric,
    is_setting,
    longest_end_s,
)
from tests.deploy.tools import KUBERNETES, Tools, faults

HERE = Path(__file__).parent
CASES = sorted((HERE / "values").glob("*.yaml"))
NAMES = [path.stem for path in CASES]
SHAPES = json.loads((HERE / "shapes.json").read_text())
Manifest = dict[str, Any]
Render = Callable[[str], list[Manifest]]


@pytest.fixture(scope="module")
def render(tools: Tools) -> Render:
    """Renders the chart with a file of `values`, each once."""
    rendered: dict[str, list[Manifest]] = {}

    def give(case: str) -> list[Manifest]:
        if case not in rendered:
            values = HERE / "values" / f"{case}.yaml"
            done = tools.helm("template", "night", CHART, "-f", values, "--namespace", "llm")
            assert done.returncode == 0, done.stderr
            found = yaml.safe_load_all(done.stdout)
            rendered[case] = [each for each in found if each is not None]
        return rendered[case]

    return give


def only(manifests: list[Manifest], kind: str, name: str = "") -> Manifest:
    [found] = [
        each
        for each in manifests
        if each["kind"] == kind and each["metadata"]["name"].endswith(name)
    ]
    return found


def pods(manifests: list[Manifest]) -> list[Manifest]:
    """The specification of every pod."""
    return [
        each["spec"]["template"]["spec"]
        for each in manifests
        if "template" in each.get("spec", {})
    ]


def container(pod: Manifest) -> Manifest:
    [found] = pod["containers"]
    return found


def variables(pod: Manifest) -> dict[str, str | None]:
    """Set by name; None where the value comes from a secret."""
    return {each["name"]: each.get("value") for each in container(pod)["env"]}


def pod_of(manifests: list[Manifest], part: str) -> Manifest:
    return only(manifests, "Deployment", f"-{part}")["spec"]["template"]["spec"]


def refusal(tools: Tools, tmp_path: Path, values: dict[str, Any]) -> str:
    path = tmp_path / "values.yaml"
    path.write_text(json.dumps(values))
    least = HERE / "values" / "least.yaml"
    done = tools.helm("template", "night", CHART, "-f", least, "-f", path)
    assert done.returncode != 0
    return done.stderr


# Whole


@pytest.mark.parametrize("case", NAMES)
def test_helm_finds_nothing_wrong(tools: Tools, case: str) -> None:
    done = tools.helm("lint", "--strict", CHART, "-f", HERE / "values" / f"{case}.yaml")

    assert done.returncode == 0, done.stdout
    assert "WARNING" not in done.stdout


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("case", NAMES)
def test_kubernetes_takes_every_object(
    tools: Tools, render: Render, case: str, version: str
) -> None:
    for manifest in render(case):
        if manifest["kind"] not in SHAPES["$defs"]:
            assert tools.kubernetes_faults(manifest, version) == [], manifest["kind"]


@pytest.mark.parametrize("case", NAMES)
def test_other_operators_take_their_objects(render: Render, case: str) -> None:
    for manifest in render(case):
        if (kind := manifest["kind"]) in SHAPES["$defs"]:
            schema = {"$ref": f"#/$defs/{kind}", "$defs": SHAPES["$defs"]}
            assert faults(jsonschema_rs.validator_for(schema), manifest) == []


def test_a_misspelt_field_would_be_found(tools: Tools, render: Render) -> None:
    manifest = only(render("least"), "Deployment", "-api")
    wrong = manifest | {"spec": manifest["spec"] | {"replica": 3}}

    assert tools.kubernetes_faults(wrong, KUBERNETES[0]) != []


@pytest.mark.parametrize("case", NAMES)
def test_no_two_objects_have_the_same_name(render: Render, case: str) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in render(case)]

    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", NAMES)
def test_names_fit_however_long_the_release_is_called(tools: Tools, case: str) -> None:
    values = HERE / "values" / f"{case}.yaml"
    done = tools.helm("template", "n" * 53, CHART, "-f", values)

    for manifest in yaml.safe_load_all(done.stdout):
        assert len(manifest["metadata"]["name"]) <= 63


def test_everything_is_rendered_by_some_case(render: Render) -> None:
    kinds = {each["kind"] for case in NAMES for each in render(case)}

    assert kinds == {
        *("ConfigMap", "Deployment", "Ingress", "Job", "NetworkPolicy"),
        *("PodDisruptionBudget", "ScaledObject", "Secret", "Service", "ServiceAccount"),
        "ServiceMonitor",
    }


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())

    assert chart["appVersion"] == __version__


# Pods


@pytest.mark.parametrize("case", NAMES)
def test_every_variable_of_ours_is_a_setting(render: Render, case: str) -> None:
    for pod in pods(render(case)):
        for name in variables(pod):
            assert not name.startswith("PENSTOCK_") or is_setting(name), name


@pytest.mark.parametrize("case", NAMES)
def test_no_variable_is_set_twice(render: Render, case: str) -> None:
    for pod in pods(render(case)):
        names = [each["name"] for each in container(pod)["env"]]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", NAMES)
def test_probes_ask_routes_that_there_are_where_they_are(render: Render, case: str) -> None:
    for part, variable in (("api", "SERVER__PORT"), ("worker", "WORKER__HEALTH_PORT")):
        pod = pod_of(render(case), part)
        ports = {each["name"]: each["containerPort"] for each in container(pod)["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container(pod)[probe]["httpGet"]
            assert asked["path"] in HEALTH_PATHS
            assert ports[asked["port"]] == int(variables(pod)[f"PENSTOCK_{variable}"] or 0)
        # A fault that passes must not have a process killed that will work again.
        assert container(pod)["livenessProbe"]["httpGet"]["path"] == "/healthz"
        assert container(pod)["readinessProbe"]["httpGet"]["path"] == "/readyz"


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("part", ["api", "worker"])
def test_a_pod_has_time_to_end(render: Render, case: str, part: str) -> None:
    pod = pod_of(render(case), part)
    grace_s = float(variables(pod)["PENSTOCK_SERVER__SHUTDOWN_GRACE_S"] or 0)
    stop = container(pod).get("lifecycle", {}).get("preStop", {"sleep": {"seconds": 0}})

    least_s = stop["sleep"]["seconds"] + longest_end_s(grace_s)
    assert pod["terminationGracePeriodSeconds"] > least_s


@pytest.mark.parametrize("case", NAMES)
def test_pods_may_do_nothing_that_they_need_not(render: Render, case: str) -> None:
    for pod in pods(render(case)):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        assert container(pod)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


@pytest.mark.parametrize("case", NAMES)
def test_what_a_pod_writes_lies_on_a_volume(render: Render, case: str) -> None:
    for pod in pods(render(case)):
        volumes = {each["name"]: each for each in pod["volumes"]}
        mounts = {each["mountPath"]: each["name"] for each in container(pod)["volumeMounts"]}
        data_dir = variables(pod)["PENSTOCK_DATA_DIR"]
        assert "emptyDir" in volumes[mounts[data_dir or ""]]
        assert "emptyDir" in volumes[mounts["/tmp"]]


@pytest.mark.parametrize("case", NAMES)
def test_services_budgets_and_policies_find_their_pods(render: Render, case: str) -> None:
    manifests = render(case)
    deployments = [each for each in manifests if each["kind"] == "Deployment"]
    for manifest in manifests:
        spec = manifest.get("spec", {})
        match manifest["kind"]:
            case "Service":
                wanted = spec["selector"]
            case "PodDisruptionBudget" | "Deployment":
                wanted = spec["selector"]["matchLabels"]
            case "NetworkPolicy":
                wanted = spec["podSelector"]["matchLabels"]
            case _:
                continue
        found = [
            each["metadata"]["name"]
            for each in deployments
            if wanted.items() <= each["spec"]["template"]["metadata"]["labels"].items()
        ]
        assert found == [manifest["metadata"]["name"]]


def test_the_parts_run_the_commands_of_a_cluster(render: Render) -> None:
    manifests = render("least")
    mounted = variables(pod_of(manifests, "api"))["PENSTOCK_CONFIG"]

    assert container(pod_of(manifests, "api"))["args"] == [
        *("serve", "--no-workers", "--config", mounted)
    ]
    assert container(pod_of(manifests, "worker"))["args"] == ["work", "--config", mounted]


# The migration


@pytest.mark.parametrize("case", NAMES)
def test_the_database_is_migrated_before_any_new_pod_starts(render: Render, case: str) -> None:
    job = only(render(case), "Job")

    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert container(job["spec"]["template"]["spec"])["args"] == ["migrate"]


@pytest.mark.parametrize("case", NAMES)
def test_the_migration_needs_nothing_that_comes_after_it(render: Render, case: str) -> None:
    manifests = render(case)
    later = {
        (each["kind"], each["metadata"]["name"])
        for each in manifests
        if "helm.sh/hook" not in each["metadata"].get("annotations", {})
    }
    pod = only(manifests, "Job")["spec"]["template"]["spec"]
    [source] = [each["valueFrom"] for each in container(pod)["env"] if "valueFrom" in each]

    assert ("ServiceAccount", pod["serviceAccountName"]) not in later
    assert ("Secret", source["secretKeyRef"]["name"]) not in later
    assert not any("configMap" in each or "secret" in each for each in pod["volumes"])
    assert "envFrom" not in container(pod)


# Settings and secrets


@pytest.mark.parametrize("case", NAMES)
def test_the_settings_file_is_accepted(
    render: Render, case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    manifests = render(case)
    text = only(manifests, "ConfigMap")["data"]["penstock.toml"]
    for name in re.findall(r'env = "(\w+)"', text):
        monkeypatch.setenv(name, f"some-secret-of-24-letters-{name}")
    for part in ("api", "worker"):
        for name, value in variables(pod_of(manifests, part)).items():
            known = name.removeprefix("PENSTOCK_").lower().replace("__", ".")
            if value is not None and known != "config":
                monkeypatch.setenv(name, value)
    path = tmp_path / "penstock.toml"
    path.write_text(text)

    settings = load(config=path)

    values = yaml.safe_load((HERE / "values" / f"{case}.yaml").read_text())
    wanted = values.get("config", {})
    assert len(settings.upstreams) == len(wanted.get("upstreams", []))
    assert settings.server.host == "0.0.0.0"
    for upstream, given in zip(settings.upstreams, wanted.get("upstreams", []), strict=True):
        assert list(upstream.models) == given.get("models", ["*"])
        assert upstream.max_concurrency == given.get("max_concurrency", 256)


def test_texts_and_numbers_arrive_as_they_were_given(render: Render) -> None:
    text = only(render("most"), "ConfigMap")["data"]["penstock.toml"]

    settings = tomllib.loads(text)

    assert settings["limits"] == {"input_file_bytes": 2147483648, "strict_openai": False}
    assert settings["worker"] == {"flush_interval_s": 0.25}
    assert settings["upstreams"][0]["models"] == ["qwen*", 'a "quoted" <name> & é\\']
    assert settings["upstreams"][0]["prices"] == {"qwen*": {"input": 0.5, "output": 2}}


@pytest.mark.parametrize("case", NAMES)
def test_secrets_stand_in_secrets_alone(render: Render, case: str) -> None:
    open_text = json.dumps([each for each in render(case) if each["kind"] != "Secret"])

    assert "hidden" not in open_text
    for manifest in render(case):
        for name, value in manifest.get("data", {}).items():
            if manifest["kind"] == "Secret":
                assert b"hidden" in base64.b64decode(value), name


def test_secrets_of_ones_own_are_used_in_place_of_ours(render: Render) -> None:
    manifests = render("own_secrets")
    sources = {
        each["name"]: each["valueFrom"]["secretKeyRef"]
        for each in container(pod_of(manifests, "worker"))["env"]
        if "valueFrom" in each
    }

    assert not any(each["kind"] == "Secret" for each in manifests)
    assert sources == {
        "PENSTOCK_DATABASE_URL": {"name": "penstock-database", "key": "url"},
        "PENSTOCK_API_KEY": {"name": "penstock-key", "key": "api-key"},
    }
    names = [e["secretRef"]["name"] for e in container(pod_of(manifests, "api"))["envFrom"]]
    assert names == ["penstock-bucket", "penstock-upstreams"]


def test_pods_start_anew_when_settings_or_secrets_change(tools: Tools, render: Render) -> None:
    values = HERE / "values" / "least.yaml"

    def sums(*more: str) -> dict[str, str]:
        done = tools.helm("template", "night", CHART, "-f", values, *more)
        found = only([*yaml.safe_load_all(done.stdout)], "Deployment", "-worker")
        return found["spec"]["template"]["metadata"]["annotations"]

    before = sums()

    assert (
        sums("--set", "config.limits.line_bytes=7")["checksum/config"]
        != (before["checksum/config"])
    )
    assert sums("--set", "secretEnv.A=b")["checksum/secret"] != before["checksum/secret"]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"api": {"replica": 3}}, "additional properties 'replica'"),
        ({"config": {"upstrems": []}}, "additional properties 'upstrems'"),
        ({"config": {"server": {"port": 1}}}, "additional properties 'port'"),
        (
            {"config": {"upstreams": [{"name": "a", "base_url": "b", "api_key": "sk-1"}]}},
            "/config/upstreams/0/api_key",
        ),
        ({"worker": {"autoscaling": {"minReplicas": 0}}}, "/worker/autoscaling/minReplicas"),
        ({"secretEnv": {"PENSTOCK_API_KEY": "x"}}, "PENSTOCK_API_KEY"),
        ({"database": {"url": "mysql://db"}}, "/database/url"),
        ({"database": {"url": ""}}, "database.url or database.existingSecret must be given"),
        ({"database": {"existingSecret": "a"}}, "only one may be given"),
        ({"storage": {"url": ""}}, "storage.url must be given"),
        ({"apiKey": {"value": ""}}, "config.projects must be given"),
        (
            {"worker": {"autoscaling": {"enabled": True, "minReplicas": 11}}},
            "worker.autoscaling.maxReplicas must not be below",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(
    tools: Tools, tmp_path: Path, values: dict[str, Any], told: str
) -> None:
    assert told in refusal(tools, tmp_path, values)


# Scale, ways in, and what is watched


def test_workers_follow_the_lines_that_wait(render: Render) -> None:
    manifests = render("most")
    scaled = only(manifests, "ScaledObject")["spec"]
    [trigger] = scaled["triggers"]
    service = only(manifests, "Service", "-api")
    [port] = service["spec"]["ports"]
    host = f"{service['metadata']['name']}.llm.svc"

    assert (
        scaled["scaleTargetRef"]["name"]
        == only(manifests, "Deployment", "-worker")["metadata"]["name"]
    )
    assert trigger["metadata"]["url"] == f"http://{host}:{port['port']}/metrics"
    assert "/metrics" in HEALTH_PATHS
    assert is_metric(trigger["metadata"]["valueLocation"])
    # Who scales sets the number; a number in the Deployment would undo it at each upgrade.
    assert "replicas" not in only(manifests, "Deployment", "-worker")["spec"]


def test_without_autoscaling_the_number_of_workers_is_given(render: Render) -> None:
    assert only(render("least"), "Deployment", "-worker")["spec"]["replicas"] == 2


def test_the_ingress_leads_to_the_api_and_to_nothing_else(render: Render) -> None:
    ingress = only(render("most"), "Ingress")["spec"]
    [rule] = ingress["rules"]
    paths = [each["path"] for each in rule["http"]["paths"]]

    assert all(any(prefix.startswith(path) for prefix in API_PREFIXES) for path in paths)
    assert all(any(prefix.startswith(path) for path in paths) for prefix in API_PREFIXES)
    assert not any(health.startswith(path) for health in HEALTH_PATHS for path in paths)


def test_metrics_of_every_pod_are_collected(render: Render) -> None:
    manifests = render("most")
    monitor = only(manifests, "ServiceMonitor")["spec"]
    wanted = monitor["selector"]["matchLabels"].items()
    services = [
        each
        for each in manifests
        if each["kind"] == "Service" and wanted <= each["metadata"]["labels"].items()
    ]
    ports = {port["name"] for each in services for port in each["spec"]["ports"]}

    assert len(services) == 2
    assert ports == {each["port"] for each in monitor["endpoints"]}
    assert {each["path"] for each in monitor["endpoints"]} <= HEALTH_PATHS


# What is written about it


def test_the_readme_explains_every_value() -> None:
    readme = (CHART / "README.md").read_text()
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def leaves(table: dict[str, Any], path: str = "") -> list[str]:
        found: list[str] = []
        for name, value in table.items():
            whole = f"{path}{name}"
            is_table = isinstance(value, dict) and value and whole not in GROUPS
            found += leaves(value, f"{whole}.") if is_table else [whole]
        return found

    for name in leaves(values):
        assert f"`{name}`" in readme, name


GROUPS = {
    "podSecurityContext",
    *(f"{part}.resources" for part in ("api", "worker", "migration")),
    *(
        f"{part}.{name}"
        for part in ("api", "worker")
        for name in ("podDisruptionBudget", "topologySpread")
    ),
    "worker.autoscaling.fallback",
    "config",
}
"""Tables that are explained as one."""


def test_a_schema_is_there_for_every_value_and_for_no_other() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(table: dict[str, Any], told: dict[str, Any], path: str) -> None:
        if "properties" in told and path != ".config":
            known = set(told["properties"]) - ({"global", "enabled"} if not path else set())
            assert set(table) == known, path
            for name, value in table.items():
                if isinstance(value, dict):
                    compare(value, told["properties"][name], f"{path}.{name}")

    compare(values, schema, "")


def test_settings_that_the_schema_hides_are_set_by_the_chart() -> None:
    config = json.loads((CHART / "values.schema.json").read_text())["properties"]["config"]
    whole = set(Settings.model_fields)

    assert whole - set(config["properties"]) <= {
        "data_dir",
        "api_key",
        "database_url",
        "storage_url",
    }
