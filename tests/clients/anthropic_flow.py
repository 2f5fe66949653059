"""Anthropic's own client goes through the life of two batches at a server, and prints it."""

import json
import sys
from typing import Any

import anthropic
from pydantic import BaseModel

ROOT_URL, KEY = sys.argv[1:3]


def plain(value: BaseModel) -> Any:
    return value.model_dump(mode="json")


def fails(call: Any) -> list[Any]:
    """The class and status of the error that a call raises."""
    try:
        call()
    except anthropic.APIStatusError as error:
        return [type(error).__name__, error.status_code]
    return []


def main() -> None:
    client = anthropic.Anthropic(base_url=ROOT_URL, api_key=KEY, max_retries=0)
    stranger = anthropic.Anthropic(base_url=ROOT_URL, api_key="sk-wrong", max_retries=0)
    batches = client.messages.batches
    said: Any = {
        "model": "m",
        "max_tokens": 5,
        "messages": [{"role": "user", "content": "Hi."}],
    }
    requests: Any = [{"custom_id": f"r{number}", "params": said} for number in range(2)]
    created = batches.create(requests=requests)
    other = batches.create(requests=requests[:1])
    seen: dict[str, Any] = {
        "created": plain(created),
        "listed": [batch.id for batch in batches.list(limit=1)],
        "cancelled": plain(batches.cancel(other.id)),
        "refused": [
            fails(lambda: batches.create(requests=requests * 2)),
            fails(lambda: batches.retrieve("msgbatch_unknown")),
            fails(lambda: batches.delete(created.id)),
            fails(stranger.messages.batches.list),
        ],
        "ids": [created.id, other.id],
    }
    print(json.dumps({"ids": seen["ids"]}), flush=True)
    sys.stdin.readline()  # until the batch has ended
    seen["ended"] = plain(batches.retrieve(created.id))
    seen["results"] = [plain(result) for result in batches.results(created.id)]
    seen["deleted"] = plain(batches.delete(created.id))
    print(json.dumps(seen), flush=True)


main()
