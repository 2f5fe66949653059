"""Object stores that take long to install: OpenStack Swift, which speaks S3, from Debian's
packages, and Azurite, Microsoft's emulator of Azure's, from npm."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.object_stores import S3Server, ended, free_port, wait_until_up

TOOLS = Path(__file__).parents[2] / ".venv-tools"
SWIFT_PACKAGES = (
    "swift-proxy",
    "swift-account",
    "swift-container",
    "swift-object",
    "memcached",
)
AZURITE = "azurite@3.37.0"
ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
"""The key of Azurite's one account, which its manual publishes."""

KINDS = ("account", "container", "object")


def install_swift() -> None:
    if all(shutil.which(name) for name in ("swift-proxy-server", "memcached")):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.skip("only root on Debian can install Swift")
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *SWIFT_PACKAGES],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"Swift could not be installed: {done.stderr[-300:]}")


class Processes:
    """Servers with their configuration in a folder."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self._stack = stack

    def start(self, name: str, command: list[str]) -> "subprocess.Popen[bytes]":
        log = self._stack.enter_context((self.folder / f"{name}.log").open("wb"))
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={**os.environ, "SWIFT_HOME": str(self.folder)},
        )
        self._stack.enter_context(ended(process))
        return process


@pytest.fixture(scope="session")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real object store with its four kinds of servers."""
    install_swift()
    folder = tmp_path_factory.mktemp("swift")
    ports = {name: free_port() for name in (*KINDS, "proxy", "memcached")}
    write_swift(folder, ports)
    with contextlib.ExitStack() as stack:
        processes = Processes(folder, stack)
        processes.start(
            "memcached",
            ["memcached", "-u", "root", "-l", "127.0.0.1", "-p", str(ports["memcached"])],
        )
        for kind in KINDS:
            conf = str(folder / f"{kind}.conf")
            process = processes.start(kind, [f"swift-{kind}-server", conf])
            wait_until_up(f"http://127.0.0.1:{ports[kind]}/healthcheck", process, within_s=60)
        process = processes.start("proxy", ["swift-proxy-server", str(folder / "proxy.conf")])
        url = f"http://127.0.0.1:{ports['proxy']}"
        wait_until_up(f"{url}/healthcheck", process, within_s=60)
        yield S3Server(url, access_key_id="test:tester", secret_access_key="testing")


def write_swift(folder: Path, ports: dict[str, int]) -> None:
    """Configuration and rings of a store with one device and one copy of each object."""
    (folder / "disks" / "d1").mkdir(parents=True)
    (folder / "swift.conf").write_text(
        "[swift-hash]\nswift_hash_path_suffix = tests\nswift_hash_path_prefix = tests\n"
        "[storage-policy:0]\nname = one\ndefault = yes\n"
    )
    common = f"swift_dir = {folder}\nbind_ip = 127.0.0.1\nworkers = 1\nuser = root\n"
    for kind in KINDS:
        (folder / f"{kind}.conf").write_text(
            f"[DEFAULT]\n{common}devices = {folder}/disks\nmount_check = false\n"
            f"bind_port = {ports[kind]}\n"
            f"[pipeline:main]\npipeline = healthcheck {kind}-server\n"
            f"[app:{kind}-server]\nuse = egg:swift#{kind}\n"
            "[filter:healthcheck]\nuse = egg:swift#healthcheck\n"
        )
        ring = ["swift-ring-builder", str(folder / f"{kind}.builder")]
        device = f"r1z1-127.0.0.1:{ports[kind]}/d1"
        for command in (["create", "6", "1", "0"], ["add", device, "1"], ["rebalance"]):
            subprocess.run([*ring, *command], check=True, capture_output=True)
    (folder / "proxy.conf").write_text(
        f"[DEFAULT]\n{common}bind_port = {ports['proxy']}\n"
        "[pipeline:main]\n"
        "pipeline = catch_errors healthcheck cache s3api tempauth bulk slo proxy-server\n"
        "[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\n"
        "[filter:catch_errors]\nuse = egg:swift#catch_errors\n"
        "[filter:healthcheck]\nuse = egg:swift#healthcheck\n"
        "[filter:cache]\nuse = egg:swift#memcache\n"
        f"memcache_servers = 127.0.0.1:{ports['memcached']}\n"
        "[filter:s3api]\nuse = egg:swift#s3api\nlocation = us-east-1\n"
        "[filter:tempauth]\nuse = egg:swift#tempauth\n"
        "user_test_tester = testing .admin\n"
        "[filter:bulk]\nuse = egg:swift#bulk\n"
        "[filter:slo]\nuse = egg:swift#slo\n"
    )


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Azure's emulator; its endpoint with the account."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("Azurite needs Node and npm")
    home = TOOLS / "azurite"
    main = home / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
    if not main.exists():
        home.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [npm, "install", "--no-fund", "--no-audit", "--prefix", str(home), AZURITE],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"Azurite could not be installed: {done.stderr[-300:]}")
    folder, port = tmp_path_factory.mktemp("azurite"), free_port()
    options = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--silent"]
    options += ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"]
    with contextlib.ExitStack() as stack:
        processes = Processes(folder, stack)
        process = processes.start("azurite", ["node", str(main), *options])
        endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
        wait_until_up(endpoint, process, within_s=60)
        yield endpoint
