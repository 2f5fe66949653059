"""Batches on a real inference engine, sent as a person would send them.

The model is greedy, so the reply to a prompt is the same at every time: a line's reply is
compared with what the engine says to the same prompt when it is asked without Penstock.
"""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from benchmarks import harness
from openai import OpenAI
from openai.types import Batch

from .conftest import MODEL, Engine
from .make_model import WORDS

pytestmark = pytest.mark.real_model

CHAT = "/v1/chat/completions"
PATIENCE_S = 120.0
TOKENS = 16
PROMPTS = {f"ask-{word}": f"Tell me of the {word}." for word in WORDS[:24]}


def line(custom_id: str, body: dict[str, Any], endpoint: str = CHAT) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": endpoint, "body": body}


def chat(prompt: str, **more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": prompt}
    return {"model": MODEL, "messages": [message], "max_tokens": TOKENS, **more}


def write(path: Path, lines: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


ANSWERED = [line(name, chat(prompt)) for name, prompt in PROMPTS.items()]
BAD = [
    line("no-model", chat("Hello.", model="no-such-model")),
    line("no-field", chat("Hello.", no_such_field=1)),
    line("no-number", chat("Hello.", temperature="hot")),
]
MIXED = [*ANSWERED[:7], *BAD, *ANSWERED[7:]]
MIXED_REQUESTS = len(ANSWERED) + 5
"""How often the engine gets to work on `MIXED`: it breaks on the line "no-number" each of the
five times that it is tried, and refuses the other bad lines at once."""


@pytest.fixture(scope="module")
def texts(model: OpenAI) -> dict[str, str]:
    """What the model says to each of `PROMPTS` where nothing is in between."""
    found: dict[str, str] = {}
    for name, prompt in PROMPTS.items():
        answer = model.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": prompt}], max_tokens=TOKENS
        )
        text = answer.choices[0].message.content
        assert text is not None
        assert len(text.split()) == TOKENS
        assert set(text.split()) <= set(WORDS)
        found[name] = text
    assert len(set(found.values())) > 20, "a reply cannot be told from others"
    return found


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, engine: Engine
) -> Iterator[harness.Process]:
    with harness.server(tmp_path_factory.mktemp("data"), engine.url) as process:
        yield process


def connect(server: harness.Process) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=harness.KEY, max_retries=0)


def create(client: OpenAI, path: Path, endpoint: str = CHAT) -> Batch:
    with path.open("rb") as file:
        uploaded = client.files.create(file=file, purpose="batch")
    return client.batches.create(
        input_file_id=uploaded.id,
        endpoint=endpoint,
        completion_window="24h",
    )


def wait_until_ended(client: OpenAI, batch: Batch) -> Batch:
    deadline = time.monotonic() + PATIENCE_S
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < deadline, f"no end after {PATIENCE_S} s: {batch}"
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    return batch


def wait_until_kept(server: harness.Process, batch: Batch, count: int) -> int:
    """Wait until `count` results or more would outlive a crash; how many they are."""
    request = urllib.request.Request(
        f"{server.url}/v1/batches/{batch.id}/output",
        headers={"Authorization": f"Bearer {harness.KEY}"},
    )
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            kept = len(json.load(answer))
        if kept >= count:
            assert kept < len(ANSWERED), "the batch was over before it could be disturbed"
            return kept
        assert time.monotonic() < deadline, f"{kept} results after {PATIENCE_S} s"
        time.sleep(0.02)


def download(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return parse(client.files.content(file_id).text)


def parse(text: str) -> list[dict[str, Any]]:
    return [json.loads(each) for each in text.splitlines()]


def ids(results: list[dict[str, Any]]) -> list[str]:
    return [each["custom_id"] for each in results]


def said(results: list[dict[str, Any]]) -> dict[str, str]:
    return {
        each["custom_id"]: each["response"]["body"]["choices"][0]["message"]["content"]
        for each in results
    }


def check_bad(errors: list[dict[str, Any]]) -> None:
    """Each line of `BAD` has the engine's own answer."""
    assert ids(errors) == ["no-model", "no-field", "no-number"]
    assert [each["error"] for each in errors] == [None, None, None]
    responses = [each["response"] for each in errors]
    assert [each["status_code"] for each in responses] == [400, 422, 500]
    no_model, no_field, no_number = (each["body"] for each in responses)
    assert "requested 'no-such-model'" in no_model["detail"]
    assert "no_such_field" in no_field["detail"]
    assert no_number["error"]["message"] == "Internal Server Error"  # came as plain text


def test_a_batch_has_what_the_engine_answers_to_each_line(
    tmp_path: Path, engine: Engine, server: harness.Process, texts: dict[str, str]
) -> None:
    before = engine.requests()
    with closing(connect(server)) as client:
        created = create(client, write(tmp_path / "in.jsonl", MIXED))
        batch = wait_until_ended(client, created)
        output = download(client, batch.output_file_id)
        errors = download(client, batch.error_file_id)

    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 27, "completed": 24, "failed": 3}
    assert ids(output) == list(PROMPTS)
    assert said(output) == texts
    for each in output:
        assert each["error"] is None
        assert each["response"]["status_code"] == 200
        # This engine names its answers after the header x-request-id.
        assert each["response"]["request_id"] == each["response"]["body"]["id"]
    check_bad(errors)
    assert engine.requests() - before == MIXED_REQUESTS
    usages = [each["response"]["body"]["usage"] for each in output]
    assert batch.usage is not None
    assert batch.usage.input_tokens == sum(usage["prompt_tokens"] for usage in usages) > 0
    assert batch.usage.output_tokens == 24 * TOKENS
    assert batch.usage.total_tokens == sum(usage["total_tokens"] for usage in usages)


def test_a_server_that_is_killed_twice_loses_no_reply_and_doubles_none(
    tmp_path: Path, engine: Engine, texts: dict[str, str]
) -> None:
    data_dir = tmp_path / "data"
    before = engine.requests()
    may_be_sent = len(ANSWERED)
    process = harness.start_server(data_dir, engine.url)
    try:
        with closing(connect(process)) as client:
            batch = create(client, write(tmp_path / "in.jsonl", ANSWERED))
            for count in (6, 14):
                kept = wait_until_kept(process, batch, count)
                process.kill()
                may_be_sent += len(ANSWERED) - kept
                process = harness.start_server(data_dir, engine.url, port=process.port)
            batch = wait_until_ended(client, batch)
            output = download(client, batch.output_file_id)
    finally:
        process.kill()

    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 24, "completed": 24, "failed": 0}
    assert batch.error_file_id is None
    assert ids(output) == list(PROMPTS)
    assert said(output) == texts
    assert batch.usage is not None
    assert batch.usage.output_tokens == 24 * TOKENS
    # What was in flight was sent again, and what had come was not.
    assert len(ANSWERED) < engine.requests() - before <= may_be_sent


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/completions", {"model": MODEL, "prompt": "Water", "max_tokens": TOKENS}),
        (
            "/v1/responses",
            {"model": MODEL, "input": "Water", "max_output_tokens": TOKENS, "stream": False},
        ),
    ],
)
def test_other_endpoints_of_the_engine_serve_batches_too(
    tmp_path: Path, server: harness.Process, endpoint: str, body: dict[str, Any]
) -> None:
    lines = [line(f"{n}", body, endpoint) for n in range(3)]
    with closing(connect(server)) as client:
        created = create(client, write(tmp_path / "in.jsonl", lines), endpoint)
        batch = wait_until_ended(client, created)
        output = download(client, batch.output_file_id)

    assert ids(output) == ["0", "1", "2"]
    bodies = [each["response"]["body"] for each in output]
    for each in bodies:
        text = (
            each["choices"][0]["text"]
            if endpoint == "/v1/completions"
            else each["output"][0]["content"][0]["text"]
        )
        assert len(text.split()) == TOKENS
        assert set(text.split()) <= set(WORDS)
    assert batch.usage is not None
    assert batch.usage.input_tokens > 0
    assert batch.usage.output_tokens == 3 * TOKENS
    assert batch.usage.total_tokens == sum(each["usage"]["total_tokens"] for each in bodies)


def test_an_endpoint_that_the_engine_lacks_fails_its_lines_only(
    tmp_path: Path, server: harness.Process
) -> None:
    endpoint = "/v1/embeddings"
    lines = [line("a", {"model": MODEL, "input": "Water"}, endpoint)]
    with closing(connect(server)) as client:
        created = create(client, write(tmp_path / "in.jsonl", lines), endpoint)
        batch = wait_until_ended(client, created)
        errors = download(client, batch.error_file_id)

    assert batch.status == "completed"
    assert batch.output_file_id is None
    assert ids(errors) == ["a"]
    assert errors[0]["response"]["status_code"] == 404
    assert errors[0]["response"]["body"] == {"detail": "Not Found"}


def test_run_gives_the_same_replies_without_a_server(
    tmp_path: Path, engine: Engine, texts: dict[str, str]
) -> None:
    write(tmp_path / "in.jsonl", MIXED)
    command = [sys.executable, "-m", "penstock", "run", "in.jsonl", "-o", "out.jsonl", "--json"]
    before = engine.requests()

    done = subprocess.run(
        [*command, "--upstream", f"{engine.url}/v1", "--max-concurrency", "4"],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )

    assert done.returncode == 1, done.stderr
    output = parse((tmp_path / "out.jsonl").read_text())
    assert ids(output) == list(PROMPTS)
    assert said(output) == texts
    check_bad(parse((tmp_path / "out.errors.jsonl").read_text()))
    assert engine.requests() - before == MIXED_REQUESTS
    assert json.loads(done.stdout)["usage"]["output_tokens"] == len(ANSWERED) * TOKENS
