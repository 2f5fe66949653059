"""What people write who care for speed: aiohttp and a semaphore."""

import asyncio
from typing import Any

import aiohttp
from common import CONCURRENCY, Run


async def main(run: Run) -> list[dict[str, Any]]:
    semaphore = asyncio.Semaphore(CONCURRENCY)
    connector = aiohttp.TCPConnector(limit=CONCURRENCY)

    async with aiohttp.ClientSession(connector=connector) as session:

        async def ask(line: dict[str, Any]) -> dict[str, Any]:
            async with semaphore, session.post(run.url + line["url"], json=line["body"]) as got:
                return {"custom_id": line["custom_id"], "response": await got.json()}

        return await asyncio.gather(*(ask(line) for line in run.read()))


if __name__ == "__main__":
    run = Run()
    run.write(asyncio.run(main(run)))
