"""Fireworks' own client goes through the life of two jobs at a server, and prints it."""

import json
import sys
from typing import Any

import fireworks
from fireworks import Fireworks

ROOT_URL, KEY, ACCOUNT = sys.argv[1:4]


def client_of(key: str) -> Fireworks:
    return Fireworks(api_key=key, account_id=ACCOUNT, base_url=ROOT_URL, max_retries=0)


def plain(value: Any) -> Any:
    return value.model_dump(mode="json", exclude_none=True)


def fails(call: Any) -> int:
    """The status of the error that a call raises."""
    try:
        call()
    except fireworks.APIStatusError as error:
        return error.status_code
    return 0


def main() -> None:
    client, stranger = client_of(KEY), client_of("wrong")
    datasets, jobs = client.datasets, client.batch_inference_jobs
    dataset: Any = {"user_uploaded": {}, "example_count": "2"}
    datasets.create(dataset_id="input", dataset=dataset)
    said = {"messages": [{"role": "user", "content": "Hi."}]}
    lines = [json.dumps({"custom_id": f"r{number}", "body": said}) for number in range(2)]
    content = "".join(f"{line}\n" for line in lines).encode()
    datasets.upload("input", file=("requests.jsonl", content))
    states = [datasets.get("input").state, datasets.get("input").state]

    def create(name: str) -> Any:
        return jobs.create(
            batch_inference_job_id=name,
            model="accounts/fireworks/models/m",
            input_dataset_id=f"accounts/{ACCOUNT}/datasets/input",
            output_dataset_id=f"accounts/{ACCOUNT}/datasets/{name}-out",
        )

    created, other = create("first"), create("second")
    listed = [job.name for job in jobs.list()]
    jobs.delete("second")
    seen: dict[str, Any] = {
        "states": states,
        "created": plain(created),
        "listed": [(name or "").rpartition("/")[2] for name in listed],
        "deleted": jobs.get("second").state,
        "refused": [
            fails(lambda: datasets.create(dataset_id="input", dataset=dataset)),
            fails(lambda: create("first")),
            fails(lambda: jobs.get("unknown")),
            fails(lambda: stranger.batch_inference_jobs.get("first")),
        ],
        "ids": [job.name.rpartition("/")[2] for job in (created, other)],
    }
    print(json.dumps({"ids": seen["ids"]}), flush=True)
    sys.stdin.readline()  # until the job has ended
    seen["ended"] = plain(jobs.get("first"))
    found = datasets.get_download_endpoint("first-out").filename_to_signed_urls or {}
    seen["files"] = list(found)
    print(json.dumps(seen), flush=True)


main()
