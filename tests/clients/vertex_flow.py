"""Google's own client goes through the life of two batches at a server, and prints it."""

import json
import sys
from typing import Any

from google import genai
from google.genai import errors, types
from google.oauth2.credentials import Credentials

ROOT_URL, TOKEN, PROJECT, REGION, PLACE = sys.argv[1:6]


def plain(value: Any) -> Any:
    return value.model_dump(mode="json", exclude_none=True)


def fails(call: Any) -> list[Any]:
    """The code and status of the error that a call raises."""
    try:
        call()
    except errors.APIError as error:
        return [error.code, error.status]
    return []


def client(token: str) -> genai.Client:
    return genai.Client(
        vertexai=True,
        project=PROJECT,
        location=REGION,
        credentials=Credentials(token=token),
        http_options=types.HttpOptions(base_url=ROOT_URL, api_version="v1"),
    )


def main() -> None:
    known, stranger = client(TOKEN), client("wrong")  # which close when nobody holds them
    batches = known.batches

    def create() -> types.BatchJob:
        return batches.create(
            model="gemini-2.5-flash",
            src=f"{PLACE}/input.jsonl",
            config=types.CreateBatchJobConfig(display_name="reviews", dest=f"{PLACE}/output"),
        )

    created, other = create(), create()
    batches.cancel(name=str(other.name))
    ended = str(created.name)
    seen: dict[str, Any] = {
        "created": plain(created),
        "listed": [job.name for job in batches.list(config={"page_size": 1})],
        "cancelling": plain(batches.get(name=str(other.name))),
        "ids": [created.name, other.name],
        "refused": [
            fails(lambda: batches.get(name=f"{ended}0")),
            fails(stranger.batches.list),
        ],
    }
    print(json.dumps({"ids": seen["ids"]}), flush=True)
    sys.stdin.readline()  # until the batch has ended
    seen["ended"] = plain(batches.get(name=ended))
    seen["refused"].append(fails(lambda: batches.cancel(name=ended)))
    print(json.dumps(seen), flush=True)


main()
