"""What a program does with an official Python client and a served Penstock.

    python flow.py PART FLAVOUR URL KEY INPUTS

It runs in environments that have the client and nothing of ours. What it saw is printed as
one JSON document, whose keys `flow.mjs` has as well; what is right is for the tests to say.
"""

import asyncio
import hashlib
import json
import sys
import time
from inspect import signature
from pathlib import Path
from typing import Any

import openai
from openai import AsyncOpenAI, AzureOpenAI, OpenAI

Document = dict[str, Any]
CHAT: Any = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
FINAL = ("completed", "failed", "expired", "cancelled")
PATIENCE_S = 20
LIFE_S = 7200

exchanges: list[Document] = []


def note(response: Any) -> None:
    header = response.headers.get
    exchanges.append(
        {
            "method": response.request.method,
            "path": response.request.url.path,
            "status": response.status_code,
            "content_type": header("content-type"),
            "request_id": header("x-request-id"),
            "should_retry": header("x-should-retry"),
        }
    )


def connect(flavour: str, url: str, key: str) -> OpenAI:
    http = openai.DefaultHttpxClient(event_hooks={"response": [note]})
    if flavour == "openai":
        return OpenAI(base_url=f"{url}/v1", api_key=key, http_client=http)
    return AzureOpenAI(
        azure_endpoint=url,
        azure_deployment="sim" if flavour == "azure-deployment" else None,
        api_version="2025-04-01-preview",
        api_key=key,
        http_client=http,
    )


def shown(thing: Any) -> Document:
    return thing.to_dict(mode="json")


def refusal(call: Any, *arguments: Any, **named: Any) -> Document:
    """How the client tells of an error, and how many requests it took."""
    before = len(exchanges)
    try:
        call(*arguments, **named)
    except openai.APIStatusError as error:
        return {
            "name": type(error).__name__,
            "status": error.status_code,
            "message": error.body["message"] if isinstance(error.body, dict) else None,
            "type": error.type,
            "param": error.param,
            "code": error.code,
            "request_id": error.request_id,
            "requests": len(exchanges) - before,
        }
    return {}


def run_files(client: OpenAI, inputs: Path) -> Document:
    source = inputs / "requests.jsonl"
    life: Any = {"expires_after": {"anchor": "created_at", "seconds": LIFE_S}}
    if "expires_after" not in signature(client.files.create).parameters:
        life = {"extra_body": life}  # 1.55 does not know it yet
    from_path = client.files.create(file=source, purpose="batch", **life)
    from_bytes = client.files.create(file=source.read_bytes(), purpose="batch")
    with source.open("rb") as stream:
        from_stream = client.files.create(file=stream, purpose="batch")
    listing = client.files.list(purpose="batch", order="asc", limit=2)
    return {
        "from_path": shown(from_path),
        "from_bytes": shown(from_bytes),
        "from_stream": shown(from_stream),
        "retrieved": shown(client.files.retrieve(from_path.id)),
        "waited": shown(client.files.wait_for_processing(from_path.id)),
        "content": client.files.content(from_stream.id).text,
        "listed": [file.id for file in listing],
        "deleted": shown(client.files.delete(from_bytes.id)),
        "after_delete": refusal(client.files.retrieve, from_bytes.id),
    }


def wait(client: OpenAI, batch_id: str, *until: str) -> Document:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        batch = client.batches.retrieve(batch_id)
        if batch.status in until:
            return shown(batch)
        if time.monotonic() > deadline:
            raise TimeoutError(f"The batch is {batch.status}.")
        time.sleep(0.05)


def run_batches(client: OpenAI, inputs: Path) -> Document:
    source = client.files.create(file=inputs / "requests.jsonl", purpose="batch").id
    slow = client.files.create(file=inputs / "held.jsonl", purpose="batch").id
    named = client.batches.create(input_file_id=source, metadata={"team": "search"}, **CHAT)
    plain = client.batches.create(input_file_id=source, metadata=None, **CHAT)
    rest = [client.batches.create(input_file_id=source, **CHAT).id for _ in range(2)]
    held = client.batches.create(input_file_id=slow, **CHAT)
    completed = wait(client, named.id, *FINAL)
    wait(client, held.id, "in_progress")
    cancelling = shown(client.batches.cancel(held.id))
    return {
        "made": [named.id, plain.id, *rest, held.id],
        "named": shown(named),
        "plain": shown(plain),
        "completed": completed,
        "output": client.files.content(completed["output_file_id"]).text,
        "errors": client.files.content(completed["error_file_id"]).text,
        "listed": [batch.id for batch in client.batches.list(limit=2)],
        "first_page": [batch.id for batch in client.batches.list().data],
        "cancelling": cancelling,
        "cancelled": wait(client, held.id, *FINAL),
        "cancelled_again": shown(client.batches.cancel(held.id)),
        "cancel_of_completed": refusal(client.batches.cancel, named.id),
    }


def run_all(flavour: str, url: str, key: str, inputs: Path) -> Document:
    client = connect(flavour, url, key)
    create = client.batches.create
    return {
        "files": run_files(client, inputs),
        "batches": run_batches(client, inputs),
        "refused": {
            "unknown_batch": refusal(client.batches.retrieve, "batch_unknown"),
            "unknown_file": refusal(client.files.content, "file-unknown"),
            "wrong_endpoint": refusal(
                create, input_file_id="file-1", **{**CHAT, "endpoint": "/v1/x"}
            ),
            "not_jsonl": refusal(client.files.create, file=b"no JSON\n", purpose="batch"),
            "wrong_key": refusal(connect(flavour, url, "sk-wrong-0123456789").batches.list),
        },
    }


def run_uploads(flavour: str, url: str, key: str, inputs: Path) -> Document:
    client = connect(flavour, url, key)
    source = inputs / "requests.jsonl"
    data = source.read_bytes()
    half = len(data) // 2
    kind: Any = {"mime_type": "application/jsonl", "purpose": "batch"}
    size: Any = {"bytes": len(data), "filename": "parts.jsonl", **kind}

    chunked = client.uploads.upload_file_chunked(
        file=source,
        part_size=100,
        md5=hashlib.md5(data, usedforsecurity=False).hexdigest(),
        **kind,
    )
    assert chunked.file is not None
    batch = client.batches.create(input_file_id=chunked.file.id, **CHAT)

    created = client.uploads.create(
        expires_after={"anchor": "created_at", "seconds": LIFE_S}, **size
    )
    last = client.uploads.parts.create(created.id, data=data[half:])
    first = client.uploads.parts.create(created.id, data=data[:half])
    completed = client.uploads.complete(created.id, part_ids=[first.id, last.id])
    assert completed.file is not None

    short = client.uploads.create(**size)
    part = client.uploads.parts.create(short.id, data=data[:half])
    too_short = refusal(client.uploads.complete, short.id, part_ids=[part.id])
    cancelled = client.uploads.cancel(short.id)
    return {
        "chunked": shown(chunked),
        "batch": wait(client, batch.id, *FINAL),
        "created": shown(created),
        "part": shown(first),
        "completed": shown(completed),
        "content": client.files.content(completed.file.id).text,
        "cancelled": shown(cancelled),
        "refused": {
            "too_short": too_short,
            "late_part": refusal(client.uploads.parts.create, short.id, data=b"late"),
            "unknown": refusal(client.uploads.cancel, "upload_unknown"),
        },
    }


async def run_async(flavour: str, url: str, key: str, inputs: Path) -> Document:
    async def note_later(response: Any) -> None:
        note(response)

    http = openai.DefaultAsyncHttpxClient(event_hooks={"response": [note_later]})
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=key, http_client=http) as client:
        file = await client.files.create(file=inputs / "requests.jsonl", purpose="batch")
        made = [await client.batches.create(input_file_id=file.id, **CHAT) for _ in range(3)]
        async with asyncio.timeout(PATIENCE_S):
            while (batch := await client.batches.retrieve(made[0].id)).status not in FINAL:
                await asyncio.sleep(0.05)
        assert batch.output_file_id is not None
        output = await client.files.content(batch.output_file_id)
        return {
            "made": [batch.id for batch in made],
            "completed": shown(batch),
            "output": output.text,
            "listed": [batch.id async for batch in client.batches.list(limit=1)],
        }


def main() -> None:
    part, *where, inputs = sys.argv[1:]
    flavour, url, key = where
    run: Any = {"all": run_all, "uploads": run_uploads, "async": run_async}[part]
    document = run(flavour, url, key, Path(inputs))
    if part == "async":
        document = asyncio.run(document)
    print(json.dumps({"version": openai.__version__, **document, "exchanges": exchanges}))


if __name__ == "__main__":
    main()
