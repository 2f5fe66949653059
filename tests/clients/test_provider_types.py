"""What we write for a provider is what the provider's own client would have sent."""

import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from penstock.upstream.translation import anthropic, gemini
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


@pytest.mark.parametrize(
    ("provider", "kind", "models", "least"),
    [
        (
            anthropic,
            "anthropic",
            ("claude-3-5-haiku-20241022", "claude-sonnet-4-5", "claude-sonnet-5-5"),
            40,
        ),
        (gemini, "gemini", ("gemini-2.0-flash", "gemini-2.5-flash", "gemini-3.8-flash"), 40),
    ],
)
def test_bodies_are_of_the_clients_types(
    provider: ModuleType, kind: str, models: tuple[str, ...], least: int
) -> None:
    documents = translated(provider, kind, *models)

    assert len(documents) >= least
    assert [found for found in check(documents) if found is not None] == []


def test_the_answers_of_our_examples_are_of_the_clients_types() -> None:
    documents = [
        {"type": "anthropic-answer", "body": test_anthropic.MESSAGE},
        {"type": "gemini-answer", "body": test_gemini.ANSWER},
    ]

    assert check(documents) == [None, None]


def test_the_types_find_what_is_wrong() -> None:
    text = {"type": "text", "text": "x"}
    message = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": [text]}]}
    content = {"contents": [{"role": "user", "parts": [{"text": "x"}]}]}
    wrong = [
        {**message, "seed": 5},
        {**message, "messages": [{"role": "user", "content": [{**text, "txt": "x"}]}]},
        {**message, "thinking": {"type": "enabled"}},
        {**message, "output_config": {"effort": "minimal"}},
    ]
    documents = [
        {"type": "anthropic", "body": message},
        *[{"type": "anthropic", "body": body} for body in wrong],
        {"type": "gemini", "body": content},
        {"type": "gemini", "body": {**content, "generationConfig": {"seeds": 5}}},
        {"type": "gemini", "body": {"contents": [{"role": "user", "parts": [{"txt": "x"}]}]}},
    ]

    found = check(documents)

    assert [each is None for each in found] == [True, *[False] * 4, True, False, False]
