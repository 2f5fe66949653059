"""What most people write: `AsyncOpenAI` and a semaphore."""

import asyncio
from typing import Any

from common import CONCURRENCY, Run
from openai import AsyncOpenAI


async def main(run: Run) -> list[dict[str, Any]]:
    client = AsyncOpenAI(base_url=run.url + "/v1", api_key="none", max_retries=2)
    semaphore = asyncio.Semaphore(CONCURRENCY)

    async def ask(line: dict[str, Any]) -> dict[str, Any]:
        async with semaphore:
            completion = await client.chat.completions.create(**line["body"])
        return {"custom_id": line["custom_id"], "response": completion.model_dump()}

    return await asyncio.gather(*(ask(line) for line in run.read()))


if __name__ == "__main__":
    run = Run()
    run.write(asyncio.run(main(run)))
