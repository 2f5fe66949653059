"""What deployments rely on of the program, read from the program itself."""

import inspect
import re
from pathlib import Path

from penstock import telemetry
from penstock.api.routes import HEALTH, PREFIXES
from penstock.app import _DRAIN_S
from penstock.settings import list_settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "penstock"

BESIDE_THE_TREE = frozenset({"PENSTOCK_CONFIG"})
FOREIGN = re.compile(r"(AWS|S3|GOOGLE|AZURE)_[A-Z_]+|POSTGRES_PASSWORD|UPSTREAM_API_KEY")
"""Variables that storage clients, other servers or `{ env = ... }` read."""

HEALTH_PATHS = {route.path for route in HEALTH}
API_PREFIXES = set(PREFIXES)


def is_setting(variable: str) -> bool:
    """Whether an environment variable sets something that the program has."""
    if variable in BESIDE_THE_TREE:
        return True
    known = {entry.variable for entry in list_settings()}
    return re.sub(r"__\d+__", "__N__", variable) in known


def is_metric(name: str) -> bool:
    """Whether the program tells a metric under this very name."""
    declared = re.findall(r'"(penstock_\w+)"', inspect.getsource(telemetry))
    return name in declared


def longest_end_s(grace_s: float) -> float:
    """How long a process may take from SIGTERM to its end.

    Open requests have the grace time, then lines in flight have it, then the rest a bit more.
    """
    return 2 * grace_s + _DRAIN_S
