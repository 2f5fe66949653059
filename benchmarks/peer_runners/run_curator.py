"""Curator in its online mode."""

import os
import tempfile

from bespokelabs import curator
from common import CONCURRENCY, Run
from datasets import Dataset


class Asker(curator.LLM):
    """Sends each prompt as it is."""

    def prompt(self, input: dict) -> str:
        return input["prompt"]

    def parse(self, input: dict, response: str) -> dict:
        return {"custom_id": input["custom_id"], "response": response}


if __name__ == "__main__":
    run = Run()
    os.environ["OPENAI_API_KEY"] = "none"
    with tempfile.TemporaryDirectory() as cache:
        asker = Asker(
            model_name="sim",
            backend="openai",
            backend_params={
                "base_url": run.url + "/v1",
                "max_concurrent_requests": CONCURRENCY,
                "max_requests_per_minute": 10_000_000,
                "max_tokens_per_minute": 10_000_000_000,
            },
        )
        rows = [
            {"custom_id": line["custom_id"], "prompt": line["body"]["messages"][0]["content"]}
            for line in run.read()
        ]
        answers = asker(Dataset.from_list(rows), working_dir=cache)
        run.write(getattr(answers, "dataset", answers))
