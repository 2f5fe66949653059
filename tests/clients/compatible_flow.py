"""The client of a provider that is nearly OpenAI goes through two batches, and prints it."""

import json
import sys
from typing import Any

import groq
import httpx
import together

NAME, ROOT_URL, KEY = sys.argv[1:4]
SAID = {"model": "m", "messages": [{"role": "user", "content": "Hi."}]}
LINES = [
    {"custom_id": f"r{n}", "method": "POST", "url": "/v1/chat/completions", "body": SAID}
    for n in range(2)
]
CONTENT = "".join(f"{json.dumps(line)}\n" for line in LINES).encode()


def plain(value: Any) -> Any:
    return value.model_dump(mode="json", exclude_none=True)


def fails(call: Any) -> int:
    """The status of the error that a call raises."""
    try:
        call()
    except (groq.APIStatusError, together.APIStatusError) as error:
        return error.status_code
    return 0


def open_groq() -> tuple[Any, str, Any]:
    client = groq.Groq(api_key=KEY, base_url=ROOT_URL, max_retries=0)
    file = client.files.create(file=("requests.jsonl", CONTENT), purpose="batch")
    return client, file.id, lambda file_id: client.files.content(file_id).read()


def open_together() -> tuple[Any, str, Any]:
    client = together.Together(api_key=KEY, base_url=ROOT_URL, max_retries=0)
    sent = httpx.post(  # its client sends files to signed addresses of a storage instead
        f"{ROOT_URL}/v1/files/upload",
        headers={"Authorization": f"Bearer {KEY}"},
        data={"purpose": "batch-api", "file_name": "requests.jsonl", "file_type": "jsonl"},
        files={"file": ("requests.jsonl", CONTENT)},
    )
    return client, sent.json()["id"], lambda file_id: client.files.content(file_id).read()


def main() -> None:
    client, file_id, read = open_groq() if NAME == "groq" else open_together()
    batches = client.batches
    told: Any = {"input_file_id": file_id, "endpoint": "/v1/chat/completions"}
    told["completion_window"] = "24h"

    def create(**other: Any) -> Any:
        made = batches.create(**{**told, **other})
        return getattr(made, "job", made)

    created, other = create(), create()
    listed = batches.list()
    seen: dict[str, Any] = {
        "created": plain(created),
        "listed": sorted(batch.id for batch in getattr(listed, "data", listed)),
        "cancelled": plain(batches.cancel(other.id)),
        "refused": [
            fails(lambda: create(input_file_id="file-unknown")),
            fails(lambda: batches.retrieve("batch_unknown")),
        ],
        "ids": [created.id, other.id],
    }
    print(json.dumps({"ids": seen["ids"]}), flush=True)
    sys.stdin.readline()  # until the batch has ended
    ended = batches.retrieve(created.id)
    seen["ended"] = plain(ended)
    lines = [json.loads(line) for line in read(ended.output_file_id).splitlines()]
    seen["output"] = {line["custom_id"]: line["response"]["status_code"] for line in lines}
    print(json.dumps(seen), flush=True)


main()
