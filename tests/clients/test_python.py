"""The official Python client, the newest and an old one that many still have."""

import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.clients.conftest import PROMPTS, RunFlow
from tests.clients.contract import ClientContract, Seen, UploadsContract, lines

FLOW = str(Path(__file__).parent / "flow.py")
NEWEST = [sys.executable, FLOW]


class TestNewest(ClientContract):
    @pytest.fixture(scope="class", params=["openai", "azure", "azure-deployment"])
    @classmethod
    def seen(cls, request: pytest.FixtureRequest, run_flow: RunFlow) -> Seen:
        return Seen(
            document=run_flow(NEWEST, "all", request.param),
            version=openai.__version__,
            rooms=frozenset({"/v1" if request.param == "openai" else "/openai"}),
        )


class Test155(ClientContract):
    """It ignores `has_more` and asks for pages until one is empty."""

    @pytest.fixture(scope="class", params=["openai", "azure-deployment"])
    @classmethod
    def seen(
        cls,
        request: pytest.FixtureRequest,
        run_flow: RunFlow,
        python_155: tuple[list[str], dict[str, str]],
    ) -> Seen:
        python, env = python_155
        return Seen(
            document=run_flow([*python, FLOW], "all", request.param, env=env),
            version="1.55.3",
            rooms=frozenset(
                {"/v1" if request.param == "openai" else "/openai/deployments/sim"}
            ),
        )


class TestNewestUploads(UploadsContract):
    @pytest.fixture(scope="class")
    @classmethod
    def seen(cls, run_flow: RunFlow) -> Any:
        return run_flow(NEWEST, "uploads", "openai")

    def test_a_file_is_uploaded_in_chunks_by_one_call(self, seen: Any) -> None:
        upload = seen["chunked"]
        size = len(seen["content"].encode())

        assert upload["status"] == "completed"
        assert (upload["bytes"], upload["file"]["bytes"]) == (size, size)
        assert upload["file"]["filename"] == "requests.jsonl"


class TestNewestAsync:
    @pytest.fixture(scope="class")
    @classmethod
    def seen(cls, run_flow: RunFlow) -> Any:
        return run_flow(NEWEST, "async", "openai")

    def test_a_batch_completes(self, seen: Any) -> None:
        assert seen["completed"]["status"] == "completed"
        assert lines(seen["output"]).keys() == PROMPTS.keys() - {"refused"}

    def test_batches_are_listed_over_all_pages(self, seen: Any) -> None:
        assert seen["listed"] == seen["made"][::-1]
