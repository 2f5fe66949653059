"""One served Penstock and one upstream for all clients; each has a project of its own."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from anyio.from_thread import start_blocking_portal
from benchmarks import harness

from tests.clients import environments
from tests.clients.environments import Unavailable
from tests.upstreams import (
    Action,
    ScriptedUpstream,
    answer,
    chat_completion,
    fail,
    model_list,
    stall,
)

FLOW_TIMEOUT_S = 60
PROMPTS = {
    "plain": "Hello.",
    "unicode": "Grüße, 世界 🌊",
    "refused": "Fail.",
    "long": "x" * 2000,
}
"""The request lines of `requests.jsonl`, prompt by `custom_id`; `refused` gets a 400."""


def behave(path: str, headers: dict[str, str], body: bytes, nth: int) -> Action:
    if path.endswith("/models"):
        return answer(model_list("sim"))
    match json.loads(body)["messages"][0]["content"]:
        case "Hold.":
            return stall()
        case "Fail.":
            return fail(400, "No such luck.")
        case prompt:
            return answer(chat_completion(f"You said: {prompt}"))


@pytest.fixture(scope="session")
def upstream_url() -> Iterator[str]:
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(ScriptedUpstream(behave)) as upstream,
    ):
        yield f"http://127.0.0.1:{upstream.port}"


class Penstock:
    """A served one, and keys of projects in which nothing has happened yet."""

    PROJECTS = 40

    def __init__(self, process: harness.Process, log: Path) -> None:
        self.url = process.url
        self.log = log
        self._keys = [self._key(number) for number in range(self.PROJECTS)]

    def new_key(self) -> str:
        return self._keys.pop()

    @classmethod
    def settings(cls) -> dict[str, str]:
        projects = [
            {"name": f"p{number}", "api_keys": [cls._key(number)]}
            for number in range(cls.PROJECTS)
        ]
        return {
            "PENSTOCK_PROJECTS": json.dumps(projects),
            "PENSTOCK_WORKER__CANCEL_GRACE_S": "0",  # `Hold.` is never answered
        }

    @staticmethod
    def _key(number: int) -> str:
        return f"sk-client-0123456789abcdef-{number}"


@pytest.fixture(scope="session")
def penstock(tmp_path_factory: pytest.TempPathFactory, upstream_url: str) -> Iterator[Penstock]:
    data_dir = tmp_path_factory.mktemp("clients") / "data"
    with harness.server(data_dir, upstream_url, settings=Penstock.settings()) as process:
        yield Penstock(process, data_dir / "server.log")


def write_requests(path: Path, prompts: dict[str, str]) -> Path:
    lines = [
        json.dumps(
            {
                "custom_id": custom_id,
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"model": "sim", "messages": [{"role": "user", "content": prompt}]},
            },
            ensure_ascii=False,
        )
        for custom_id, prompt in prompts.items()
    ]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what the clients upload."""
    folder = tmp_path_factory.mktemp("inputs")
    write_requests(folder / "requests.jsonl", PROMPTS)
    write_requests(folder / "held.jsonl", {"held": "Hold."})
    return folder


RunFlow = Callable[..., Any]


@pytest.fixture(scope="session")
def run_flow(penstock: Penstock, inputs: Path) -> RunFlow:
    def run(
        command: list[str],
        part: str,
        flavour: str,
        *more: str,
        env: dict[str, str] | None = None,
    ) -> Any:
        """Run a flow in a project of its own and return the document that it prints.

        Args:
            command: Without what all flows are told, which follows it.
            more: What this one is told beyond that.
            env: Its environment, which is empty otherwise: a client finds no setting there.
        """
        told = [part, flavour, penstock.url, penstock.new_key(), str(inputs), *more]
        done = subprocess.run(
            [*command, *told],
            env={"PYTHONUTF8": "1", **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=FLOW_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            log = penstock.log.read_text()[-2000:]
            pytest.fail(f"{part}, {flavour}: {done.stderr}\nThe server: {log}", pytrace=False)
        return json.loads(done.stdout)

    return run


def give_up(error: Unavailable) -> NoReturn:
    """CI has to have everything; elsewhere what cannot be had is passed over."""
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(str(error), pytrace=False)
    pytest.skip(str(error))


@pytest.fixture(scope="session")
def python_155() -> tuple[list[str], dict[str, str]]:
    """The start of a command for openai 1.55.3, and its environment."""
    try:
        return environments.old_python("requirements-1.55.txt")
    except Unavailable as error:
        give_up(error)


@pytest.fixture(scope="session")
def node() -> tuple[list[str], Path]:
    """The start of a command for Node, and the folder of its packages."""
    try:
        return environments.node()
    except Unavailable as error:
        give_up(error)
