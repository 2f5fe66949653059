"""Our servers that stand for providers are taken for them by the providers' own clients."""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any

from tests.clients import environments
from tests.clients.conftest import give_up
from tests.clients.environments import Unavailable
from tests.providers import anthropic_server, vertex_server
from tests.providers.anthropic_server import AnthropicProvider, errored
from tests.providers.buckets import Buckets
from tests.providers.vertex_server import VertexProvider

HERE = Path(__file__).parent


async def test_anthropics_client_is_served() -> None:
    try:
        python, env = environments.old_python("requirements-providers.txt")
    except Unavailable as error:
        give_up(error)
    outcomes = [anthropic_server.message("Hi."), errored("api_error", "Sorry.")]
    async with AnthropicProvider(behave=lambda *_: outcomes.pop()) as provider:
        told = [str(HERE / "anthropic_flow.py"), provider.root_url, anthropic_server.KEY]
        process = await asyncio.create_subprocess_exec(
            *python,
            *told,
            env={"PYTHONUTF8": "1", **env},
            stdin=PIPE,
            stdout=PIPE,
            stderr=sys.stderr,
            limit=1 << 20,
        )
        assert process.stdin
        assert process.stdout
        async with asyncio.timeout(120):
            [created, _] = json.loads(await process.stdout.readline())["ids"]
            provider.end(created)
            process.stdin.write(b"\n")
            await process.stdin.drain()
            seen: Any = json.loads(await process.stdout.readline())
            assert await process.wait() == 0

    assert seen["created"]["processing_status"] == "in_progress"
    assert seen["created"]["request_counts"]["processing"] == 2
    assert seen["listed"] == seen["ids"][::-1]
    assert seen["cancelled"]["processing_status"] == "canceling"
    assert seen["refused"] == [
        ["BadRequestError", 400],
        ["NotFoundError", 404],
        ["BadRequestError", 400],
        ["AuthenticationError", 401],
    ]
    assert seen["ended"]["processing_status"] == "ended"
    results = {each["custom_id"]: each["result"]["type"] for each in seen["results"]}
    assert results == {"r0": "errored", "r1": "succeeded"}
    assert seen["deleted"]["type"] == "message_batch_deleted"


async def test_googles_client_is_served() -> None:
    try:
        python, env = environments.old_python("requirements-providers.txt")
    except Unavailable as error:
        give_up(error)
    row = {"request": {"contents": [{"parts": [{"text": "Hi."}]}]}, "key": "line-1"}
    with Buckets() as buckets:
        bucket = buckets.create()
        buckets.write(bucket, "in/input.jsonl", json.dumps(row).encode())
        async with VertexProvider(buckets) as provider:
            where = [vertex_server.PROJECT, vertex_server.REGION, f"gs://{bucket}/in"]
            told = [str(HERE / "vertex_flow.py"), provider.url, provider.new_token(), *where]
            process = await asyncio.create_subprocess_exec(
                *python,
                *told,
                env={"PYTHONUTF8": "1", **env},
                stdin=PIPE,
                stdout=PIPE,
                stderr=sys.stderr,
                limit=1 << 20,
            )
            assert process.stdin
            assert process.stdout
            async with asyncio.timeout(120):
                [created, _] = json.loads(await process.stdout.readline())["names"]
                provider.end(created)
                process.stdin.write(b"\n")
                await process.stdin.drain()
                seen: Any = json.loads(await process.stdout.readline())
                assert await process.wait() == 0

    assert seen["created"]["state"] == "JOB_STATE_PENDING"
    assert seen["created"]["display_name"] == "reviews"
    assert seen["created"]["src"]["gcs_uri"] == [f"gs://{bucket}/in/input.jsonl"]
    assert seen["created"]["dest"]["gcs_uri"] == f"gs://{bucket}/in/output"
    assert seen["listed"] == seen["names"]
    assert seen["cancelling"]["state"] == "JOB_STATE_CANCELLING"
    refused = [[404, "NOT_FOUND"], [401, "UNAUTHENTICATED"], [400, "INVALID_ARGUMENT"]]
    assert seen["refused"] == refused
    assert seen["ended"]["state"] == "JOB_STATE_SUCCEEDED"
    assert seen["ended"]["completion_stats"] == {"successful_count": 1}
    directory = seen["ended"]["output_info"]["gcs_output_directory"]
    assert directory.startswith(f"gs://{bucket}/in/output/prediction-model-")
