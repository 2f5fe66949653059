"""The official Node client, the newest and the one before its last great change.

Node comes with the development packages; the machine needs none.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import RunFlow
from tests.clients.contract import ClientContract, Seen, UploadsContract

FLOW = str(Path(__file__).parent / "flow.mjs")
ROOMS = {
    "openai": frozenset({"/v1"}),
    "azure": frozenset({"/openai"}),
    # A batch is created there, and looked for without a deployment.
    "azure-deployment": frozenset({"/openai", "/openai/deployments/sim"}),
}


def look(node: tuple[list[str], Path], run_flow: RunFlow, package: str, flavour: str) -> Seen:
    program, packages = node
    document = run_flow([*program, FLOW], "all", flavour, str(packages / package))
    return Seen(
        document=document,
        version=f"{package.removeprefix('openai-')}.",
        rooms=ROOMS[flavour],
    )


class TestNewest(ClientContract):
    @pytest.fixture(scope="class", params=ROOMS)
    @classmethod
    def seen(
        cls, request: pytest.FixtureRequest, node: tuple[list[str], Path], run_flow: RunFlow
    ) -> Seen:
        return look(node, run_flow, "openai-7", request.param)


class Test6(ClientContract):
    @pytest.fixture(scope="class", params=["openai", "azure-deployment"])
    @classmethod
    def seen(
        cls, request: pytest.FixtureRequest, node: tuple[list[str], Path], run_flow: RunFlow
    ) -> Seen:
        return look(node, run_flow, "openai-6", request.param)


class TestNewestUploads(UploadsContract):
    @pytest.fixture(scope="class")
    @classmethod
    def seen(cls, node: tuple[list[str], Path], run_flow: RunFlow) -> Any:
        program, packages = node
        return run_flow([*program, FLOW], "uploads", "openai", str(packages / "openai-7"))
