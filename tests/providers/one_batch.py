"""A process that runs one batch at a provider, to be killed.

    python -m tests.providers.one_batch DATA_DIR BASE_URL

Started again on the same directory it goes on, and prints the results.
"""

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path

from penstock.executor.native import NativePolicy
from penstock.store.base import BatchFilter
from penstock.upstream.openai_batch import DIALECTS
from tests.integration.bench import Bench, ids
from tests.providers.openai_server import KEY

NAMES = [f"line-{n}" for n in range(20)]
HASTY = NativePolicy(first_poll_s=0.02, max_poll_s=0.05, first_wait_s=0.02, max_wait_s=0.05)


class Server:
    """Where the provider is."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url


async def run(data_dir: Path, base_url: str) -> None:
    DIALECTS["openai"] = replace(DIALECTS["openai"], find_after_s=0.1)
    one = {"mode": "native", "api_key": KEY}
    async with Bench(
        data_dir,
        Server(base_url),
        upstream=one,
        natives=HASTY,
        worker={"slice_requests": 6},
    ) as bench:
        project_id = bench.app.project_id
        listed = await bench.app.service.list_batches(
            project_id, after=None, limit=1, where=BatchFilter()
        )
        batch = listed.items[0] if listed.items else await bench.create(*NAMES)
        ended = await bench.wait_until_ended(batch)
        output, errors = await bench.results(batch)
        told = {"status": ended.status, "output": ids(output), "errors": ids(errors)}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1]), sys.argv[2]))
