"""Google's own client goes through the life of two batches at a server, and prints it."""

import io
import json
import sys
from typing import Any

from google import genai
from google.genai import errors, types

ROOT_URL, KEY = sys.argv[1:3]
MODEL = "gemini-3.8-flash"


def client_of(key: str) -> genai.Client:
    options = types.HttpOptions(base_url=ROOT_URL, api_version="v1beta")
    return genai.Client(api_key=key, http_options=options)


def plain(value: Any) -> Any:
    return value.model_dump(mode="json", exclude_none=True)


def fails(call: Any) -> int:
    """The status of the error that a call raises."""
    try:
        call()
    except errors.APIError as error:
        return error.code
    return 0


def main() -> None:
    client, stranger = client_of(KEY), client_of("wrong")
    request = {"contents": [{"role": "user", "parts": [{"text": "Hi."}]}]}
    lines = [json.dumps({"key": f"r{number}", "request": request}) for number in range(2)]
    file = client.files.upload(
        file=io.BytesIO("".join(f"{line}\n" for line in lines).encode()),
        config={"display_name": "requests", "mime_type": "application/jsonl"},
    )
    assert file.name
    told: Any = {"model": MODEL, "src": file.name, "config": {"display_name": "k1 Reviews"}}
    created, other = client.batches.create(**told), client.batches.create(**told)
    embedded = client.batches.create_embeddings(
        model="gemini-embedding-001",
        src={"file_name": file.name},
        config={"display_name": "k2"},
    )
    ids: list[str] = [each.name or "" for each in (created, other, embedded)]
    seen: dict[str, Any] = {
        "created": plain(created),
        "listed": [batch.name for batch in client.batches.list(config={"page_size": 2})],
        "cancelled": client.batches.cancel(name=ids[1]),
        "refused": [
            fails(lambda: client.batches.create(**{**told, "src": "files/unknown"})),
            fails(lambda: client.batches.get(name="batches/unknown")),
            fails(lambda: client.batches.cancel(name=ids[1])),
            fails(lambda: client.files.download(file=file.name)),
            fails(lambda: stranger.batches.get(name=ids[0])),
        ],
        "ids": ids,
    }
    print(json.dumps({"ids": ids}), flush=True)
    sys.stdin.readline()  # until the batch has ended
    ended = client.batches.get(name=ids[0])
    assert ended.dest
    assert ended.dest.file_name
    results = client.files.download(file=ended.dest.file_name).splitlines()
    answers = {each["key"]: each for each in map(json.loads, results)}
    seen["ended"] = plain(ended)
    answer = types.GenerateContentResponse.model_validate(answers["r1"]["response"])
    seen["text"], seen["error"] = answer.text, answers["r0"]["error"]
    client.files.delete(name=file.name)
    seen["deleted"] = fails(lambda: client.files.get(name=file.name))
    print(json.dumps(seen), flush=True)


main()
