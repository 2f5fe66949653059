"""Mistral's own client goes through the life of two batch jobs at a server, and prints it."""

import json
import sys
from typing import Any

from mistralai.client import Mistral
from mistralai.client.errors import MistralError
from pydantic import BaseModel

ROOT_URL, KEY = sys.argv[1:3]


def plain(value: BaseModel) -> Any:
    return value.model_dump(mode="json")


def fails(call: Any) -> int:
    """The status of the error that a call raises."""
    try:
        call()
    except MistralError as error:
        return error.status_code
    return 0


def main() -> None:
    client = Mistral(server_url=ROOT_URL, api_key=KEY)
    stranger = Mistral(server_url=ROOT_URL, api_key="wrong")
    jobs = client.batch.jobs
    said = {"messages": [{"role": "user", "content": "Hi."}], "max_tokens": 5}
    lines = [json.dumps({"custom_id": f"r{number}", "body": said}) for number in range(2)]
    content = "".join(f"{line}\n" for line in lines).encode()
    file = client.files.upload(
        file={"file_name": "requests.jsonl", "content": content}, purpose="batch"
    )
    told: Any = {
        "input_files": [file.id],
        "endpoint": "/v1/chat/completions",
        "model": "mistral-small-latest",
        "metadata": {"key": "k1"},
        "timeout_hours": 24,
    }
    created, other = jobs.create(**told), jobs.create(**told)
    listed = jobs.list(page=0, page_size=100, order_by="-created").data or []
    seen: dict[str, Any] = {
        "created": plain(created),
        "listed": [job.id for job in listed],
        "cancelled": plain(jobs.cancel(job_id=other.id)),
        "refused": [
            fails(lambda: jobs.create(**{**told, "endpoint": "/v1/other"})),
            fails(lambda: jobs.get(job_id="00000000-0000-0000-0000-000000000000")),
            fails(lambda: jobs.cancel(job_id=other.id)),
            fails(stranger.batch.jobs.list),
        ],
        "ids": [created.id, other.id],
    }
    print(json.dumps({"ids": seen["ids"]}), flush=True)
    sys.stdin.readline()  # until the job has ended
    ended = jobs.get(job_id=created.id)
    seen["ended"] = plain(ended)
    for name, file_id in (("output", ended.output_file), ("errors", ended.error_file)):
        assert isinstance(file_id, str)
        seen[name] = json.loads(client.files.download(file_id=file_id).read())
    seen["deleted"] = plain(client.files.delete(file_id=file.id))
    print(json.dumps(seen), flush=True)


main()
