"""The schema of the chart's values, which refuses what it does not know.

The part under `config` is made from the settings themselves, so that a misspelt setting is
refused by `helm` and not only by a pod that does not start. Secrets may not stand there: a
ConfigMap is read by many.
"""

from typing import Any

from penstock.settings import Settings

Schema = dict[str, Any]

CHART_SETS = {
    "": ("data_dir", "database_url", "storage_url", "api_key"),
    "Server": ("host", "port", "auth", "shutdown_grace_s"),
    "Worker": ("health_port",),
}
"""Settings that `config` may not have, by table: the chart sets them from other values."""

_NAME = "^[A-Za-z_][A-Za-z0-9_]*$"
_OWN_VARIABLES = (
    "^PENSTOCK_(CONFIG|DATA_DIR|DATABASE_URL|STORAGE_URL|API_KEY|SERVER__HOST|SERVER__PORT"
    "|SERVER__SHUTDOWN_GRACE_S|WORKER__HEALTH_PORT)$"
)
_PYDANTIC = ("title", "default", "allowed")
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
ANY: Schema = {"type": "object"}
"""What Kubernetes defines and checks itself."""


def values_schema() -> Schema:
    """What `values.schema.json` holds."""
    config, definitions = _config_schema()
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart penstock",
        **_table(
            nameOverride=TEXT,
            fullnameOverride=TEXT,
            image=_table(
                repository=_filled(),
                tag=TEXT,
                pullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
                pullSecrets=_list(_filled()),
            ),
            database=_table(
                url={"type": "string", "pattern": "^(postgres(ql)?://.+)?$"},
                existingSecret=TEXT,
                key=_filled(),
            ),
            storage=_table(
                url={"type": "string", "pattern": "^((s3|gs|az)://.+)?$"},
                env=_variables(),
                credentials=_variables(),
                existingSecret=TEXT,
            ),
            apiKey=_table(
                value={"type": "string", "pattern": "^([!-~]{16,})?$"},
                existingSecret=TEXT,
                key=_filled(),
            ),
            secretEnv=_variables(),
            secretEnvFrom=_list(_filled()),
            env=_variables(),
            config=config,
            shutdownGraceSeconds=_whole(0),
            serviceAccount=_table(
                create=FLAG, name=TEXT, annotations=_texts(), labels=_texts()
            ),
            podSecurityContext=ANY,
            api=_api(),
            worker=_worker(),
            migration=_table(
                enabled=FLAG,
                serviceAccountName=_filled(),
                activeDeadlineSeconds=_whole(1),
                backoffLimit=_whole(0),
                resources=ANY,
            ),
            networkPolicy=_table(enabled=FLAG, apiFrom=_list(ANY), metricsFrom=_list(ANY)),
            serviceMonitor=_table(enabled=FLAG, interval=_filled(), labels=_texts()),
            # Helm gives these two to every chart that is part of another.
            **{"global": ANY, "enabled": FLAG},
        ),
        "$defs": definitions,
    }


def _api() -> Schema:
    return _table(
        replicas=_whole(1),
        port=_port(),
        drainSeconds=_whole(0),
        service=_table(
            type={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]}, annotations=_texts()
        ),
        ingress=_table(
            enabled=FLAG,
            className=TEXT,
            annotations=_texts(),
            host=TEXT,
            tlsSecret=TEXT,
            paths=_list({"type": "string", "pattern": "^/"}) | {"minItems": 1},
        ),
        **_pods(),
    )


def _worker() -> Schema:
    return _table(
        replicas=_whole(1),
        healthPort=_port(),
        autoscaling=_table(
            enabled=FLAG,
            minReplicas=_whole(1),
            maxReplicas=_whole(1),
            linesPerWorker=_whole(1),
            pollingIntervalSeconds=_whole(1),
            scaleDownStabilizationSeconds=_whole(0) | {"maximum": 3600},
            fallback=_table(enabled=FLAG, failureThreshold=_whole(1), replicas=_whole(1)),
        ),
        **_pods(),
    )


def _pods() -> Schema:
    return {
        "resources": ANY,
        "podDisruptionBudget": _table(
            enabled=FLAG,
            maxUnavailable={
                "anyOf": [_whole(1), {"type": "string", "pattern": "^[1-9][0-9]*%$"}]
            },
        ),
        "podAnnotations": _texts(),
        "podLabels": _texts(),
        "nodeSelector": _texts(),
        "tolerations": _list(ANY),
        "affinity": ANY,
        "topologySpread": _table(
            enabled=FLAG,
            topologyKey=_filled(),
            whenUnsatisfiable={"enum": ["ScheduleAnyway", "DoNotSchedule"]},
        ),
    }


def _table(**properties: Schema) -> Schema:
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def _filled() -> Schema:
    return {"type": "string", "minLength": 1}


def _whole(least: int) -> Schema:
    return {"type": "integer", "minimum": least}


def _port() -> Schema:
    # The image's user may not listen below.
    return {"type": "integer", "minimum": 1024, "maximum": 65535}


def _texts() -> Schema:
    return {"type": "object", "additionalProperties": TEXT}


def _variables() -> Schema:
    """Environment variables by name, save those that the chart sets itself."""
    return {
        "type": "object",
        "propertyNames": {"allOf": [{"pattern": _NAME}, {"not": {"pattern": _OWN_VARIABLES}}]},
        "additionalProperties": {"type": ["string", "integer", "boolean"]},
    }


def _config_schema() -> tuple[Schema, Schema]:
    """The schema of `config`, and of the tables in it by name."""
    whole = Settings.model_json_schema()
    definitions = whole.pop("$defs")
    for name, table in {"": whole, **definitions}.items():
        for setting in CHART_SETS.get(name, ()):
            table["properties"].pop(setting, None)
    return _plain(whole), {name: _plain(table) for name, table in definitions.items()}


def _plain(node: Any) -> Any:
    """A schema of pydantic's, without what only pydantic reads, and with secrets by name."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    if "properties" in node:
        properties = {name: _plain(each) for name, each in node["properties"].items()}
        kept = ("type", "additionalProperties", "required")
        return {key: node[key] for key in kept if key in node} | {"properties": properties}
    node = {key: each for key, each in node.items() if key not in _PYDANTIC}
    # What may be left out need not be null.
    choices = [each for each in node.pop("anyOf", []) if each != {"type": "null"}]
    if len(choices) == 1:
        node |= choices[0]
    elif choices:
        node["anyOf"] = choices
    if node.get("format") == "password":
        secret = _table(env={"type": "string", "pattern": _NAME}) | {"required": ["env"]}
        return {key: node[key] for key in ("description",) if key in node} | secret
    return {key: _plain(each) for key, each in node.items()}
