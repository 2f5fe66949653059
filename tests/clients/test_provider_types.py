"""What we write for a provider is what the provider's own client would have sent."""

import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from penstock.upstream.translation import anthropic, bedrock, gemini
from penstock.upstream.translation.base import Untranslatable
from tests.clients import environments
from tests.clients.conftest import give_up
from tests.clients.environments import Unavailable
from tests.unit.translation import test_anthropic, test_gemini
from tests.unit.translation.bodies import EMBEDDINGS, SAMPLES

SCRIPT = Path(__file__).parent / "provider_types.py"
Document = dict[str, Any]


def check(documents: list[Document]) -> list[str | None]:
    """What is wrong with each document; None if nothing is."""
    try:
        python, env = environments.old_python("requirements-providers.txt")
    except Unavailable as error:
        give_up(error)
    done = subprocess.run(
        [*python, str(SCRIPT)],
        env={"PYTHONUTF8": "1", **env},
        input=json.dumps(documents),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[str | None] = json.loads(done.stdout)
    return found


def translated(provider: ModuleType, kind: str, *models: str) -> list[Document]:
    documents: list[Document] = []
    for endpoint, body in SAMPLES:
        for model in models:
            try:
                written = provider.translate_request(endpoint, model, body)
            except Untranslatable:
                continue
            type_ = f"{kind}-embedding" if endpoint == EMBEDDINGS else kind
            documents.append({"type": type_, "body": json.loads(written)})
    return documents


TEXT = {"type": "text", "text": "x"}
MESSAGE = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": [TEXT]}]}
CONTENT = {"contents": [{"role": "user", "parts": [{"text": "x"}]}]}
GROUPS: dict[str, list[Document]] = {
    "anthropic": translated(
        anthropic,
        "anthropic",
        "claude-3-5-haiku-20241022",
        "claude-sonnet-4-5",
        "claude-sonnet-5-5",
    ),
    "bedrock": translated(
        bedrock, "bedrock-claude", "us.anthropic.claude-sonnet-4-5-20250929-v1:0"
    ),
    "gemini": translated(
        gemini, "gemini", "gemini-2.0-flash", "gemini-2.5-flash", "gemini-3.8-flash"
    ),
    "answers": [
        {"type": "anthropic-answer", "body": test_anthropic.MESSAGE},
        {"type": "gemini-answer", "body": test_gemini.ANSWER},
    ],
    "wrong": [
        {"type": "anthropic", "body": {**MESSAGE, "seed": 5}},
        {
            "type": "anthropic",
            "body": {
                **MESSAGE,
                "messages": [{"role": "user", "content": [{**TEXT, "txt": "x"}]}],
            },
        },
        {"type": "anthropic", "body": {**MESSAGE, "thinking": {"type": "enabled"}}},
        {"type": "anthropic", "body": {**MESSAGE, "output_config": {"effort": "minimal"}}},
        {"type": "gemini", "body": {**CONTENT, "generationConfig": {"seeds": 5}}},
        {"type": "gemini", "body": {"contents": [{"role": "user", "parts": [{"txt": "x"}]}]}},
    ],
}


@pytest.fixture(scope="module")
def found() -> dict[str, list[str | None]]:
    """What is wrong with each document of each group; the clients take long to import."""
    documents = [document for group in GROUPS.values() for document in group]
    told = iter(check(documents))
    return {name: [next(told) for _ in group] for name, group in GROUPS.items()}


@pytest.mark.parametrize(
    ("name", "least"), [("anthropic", 40), ("bedrock", 10), ("gemini", 40)]
)
def test_bodies_are_of_the_clients_types(
    found: dict[str, list[str | None]], name: str, least: int
) -> None:
    assert len(found[name]) >= least
    assert [each for each in found[name] if each is not None] == []


def test_the_answers_of_our_examples_are_of_the_clients_types(
    found: dict[str, list[str | None]],
) -> None:
    assert found["answers"] == [None, None]


def test_the_types_find_what_is_wrong(found: dict[str, list[str | None]]) -> None:
    assert None not in found["wrong"]
