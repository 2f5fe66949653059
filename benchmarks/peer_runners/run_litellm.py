"""LiteLLM's batch runner and router, with its database and file store replaced by memory: its
proxy needs a database, whose cost is left out in its favour."""

import asyncio
from types import SimpleNamespace
from typing import Any

from common import CONCURRENCY, Run
from litellm import Router
from litellm.proxy._types import UserAPIKeyAuth
from litellm.proxy.batches_endpoints.litellm_executed_batches import LiteLLMExecutedBatchRunner


class Memory:
    """Files and batches."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.batch: Any = None
        self.results: list[bytes] = []

    def get_unified_batch_id(self, batch_id: str, model_id: str) -> str:
        return batch_id

    async def get_unified_file_id(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(storage_backend="memory", storage_url="memory")

    async def store_unified_object_id(self, *, file_object: Any, **_: Any) -> None:
        self.batch = file_object

    async def download_file(self, _: str) -> bytes:
        return self.content

    async def load_batch(self, _: str) -> Any:
        return self.batch

    async def load_status(self, _: str) -> str:
        return self.batch.status

    async def compare_and_set(self, updated: Any, *_: Any) -> bool:
        self.batch = updated
        return True

    async def touch(self, *_: Any) -> None:
        pass

    async def upload(self, *, file_data: Any, **_: Any) -> Any:
        self.results.append(file_data["content"])
        return SimpleNamespace(id=f"file-{len(self.results)}")


async def main(run: Run) -> None:
    memory = Memory(run.source.read_bytes())
    parameters = {"model": "openai/sim", "api_base": run.url + "/v1", "api_key": "none"}
    router = Router(model_list=[{"model_name": "sim", "litellm_params": parameters}])
    runner = LiteLLMExecutedBatchRunner(
        llm_router=router,
        prisma_client=None,
        managed_files=memory,
        batches=memory,
        proxy_logging_obj=None,
        general_settings={},
        concurrency=CONCURRENCY,
        storage_backend_factory=lambda *_, **__: memory,
        upload_result_file=memory.upload,
    )
    await runner.create(
        {"endpoint": "/v1/chat/completions", "metadata": None},
        "file-in",
        "sim",
        "openai",
        UserAPIKeyAuth(api_key="none"),
        None,
    )
    while memory.batch.status not in ("completed", "failed", "expired"):
        await asyncio.sleep(0.02)
    run.target.write_bytes(b"".join(memory.results))
    run.report()


if __name__ == "__main__":
    asyncio.run(main(Run()))
