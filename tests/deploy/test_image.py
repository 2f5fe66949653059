"""The image, as far as it can be known without a container engine."""

import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.deploy.facts import DEPLOY, ROOT, is_setting
from tests.deploy.tools import Tools

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
IGNORED = (DEPLOY / "Dockerfile.dockerignore").read_text().split()


def steps() -> list[tuple[str, str]]:
    """Instruction and arguments, of all stages."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M))
    pairs = (line.partition(" ")[::2] for line in text.splitlines() if line.strip())
    return [(name, " ".join(rest.split())) for name, rest in pairs]


def of(instruction: str) -> list[str]:
    return [rest for name, rest in steps() if name == instruction]


def copied() -> list[str]:
    """What comes from the repository."""
    found = [shlex.split(rest)[:-1] for rest in of("COPY") if not rest.startswith("--from")]
    return [name for names in found for name in names]


def variables() -> dict[str, str]:
    pairs = [pair.partition("=") for rest in of("ENV") for pair in shlex.split(rest)]
    return {name: value for name, _, value in pairs}


def test_the_installer_is_the_one_of_development() -> None:
    [version] = re.findall(r"^UV_VERSION=(.+)$", (ROOT / "dev").read_text(), re.M)

    assert f"UV_VERSION={version}" in of("ARG")


def test_exactly_what_is_locked_is_installed() -> None:
    installs = [run for run in of("RUN") if run.startswith("uv sync")]

    assert len(installs) == 2
    for run in installs:
        assert {"--frozen", "--no-dev"} <= set(shlex.split(run))


def test_what_is_copied_is_there_and_reaches_the_build() -> None:
    assert IGNORED[0] == "*"
    for name in copied():
        assert (ROOT / name).exists()
        assert f"!{name}" in IGNORED


def test_what_is_copied_is_enough_to_build_the_program(tools: Tools, tmp_path: Path) -> None:
    context = tmp_path / "build"
    context.mkdir()
    for name in copied():
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, context / name, ignore=shutil.ignore_patterns("*.pyc"))
        else:
            shutil.copy(source, context / name)
    tools.build_wheel(context, tmp_path)

    [wheel] = tmp_path.glob("penstock-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "penstock/__main__.py" in names
    assert "penstock/examples/reviews.jsonl" in names
    assert any(
        re.fullmatch(r"penstock/store/migrations/versions/.+\.py", name) for name in names
    )


def test_it_does_not_run_as_root() -> None:
    assert of("USER") == ["10001:10001"]


def test_process_1_hands_signals_on() -> None:
    # The exec form: with a shell in between, the program would never hear of SIGTERM.
    assert of("ENTRYPOINT") == ['["tini", "--", "penstock"]']
    assert of("CMD") == ['["serve"]']


def test_whoever_runs_it_decides_how_its_health_is_asked() -> None:
    assert of("HEALTHCHECK") == []


@pytest.mark.parametrize("variable", [v for v in variables() if v.startswith("PENSTOCK_")])
def test_a_variable_of_the_image_is_a_setting(variable: str) -> None:
    assert is_setting(variable)


def test_the_program_starts_with_the_variables_of_the_image(tmp_path: Path) -> None:
    env = {name: value for name, value in variables().items() if name.startswith("PENSTOCK_")}
    done = subprocess.run(
        [sys.executable, "-m", "penstock", "check"],
        env=env | {"PENSTOCK_DATA_DIR": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert "0.0.0.0" in done.stdout
    assert "There is no setting" not in done.stderr
