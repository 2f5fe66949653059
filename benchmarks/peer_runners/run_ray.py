"""Ray Data's HTTP processor. The clock starts once Ray itself is up, in its favour."""

from typing import Any

import ray
from common import CONCURRENCY, Run
from ray.data.llm import HttpRequestProcessorConfig, build_processor

if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    run = Run()
    config = HttpRequestProcessorConfig(
        url=run.url + "/v1/chat/completions",
        headers={"Content-Type": "application/json"},
        batch_size=CONCURRENCY,
        concurrency=1,
    )

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        return {"payload": row["body"], "custom_id": row["custom_id"]}

    def answer(row: dict[str, Any]) -> dict[str, Any]:
        return {"custom_id": row["custom_id"], "response": row["http_response"]}

    process = build_processor(config, preprocess=ask, postprocess=answer)
    run.write(process(ray.data.from_items(run.read())).take_all())
    ray.shutdown()
