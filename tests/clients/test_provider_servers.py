"""Our servers that stand for providers are taken for them by the providers' own clients."""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.clients import environments
from tests.clients.conftest import give_up
from tests.clients.environments import Unavailable
from tests.providers import (
    anthropic_server,
    fireworks_server,
    gemini_server,
    mistral_server,
    openai_server,
    vertex_server,
)
from tests.providers.anthropic_server import AnthropicProvider, errored
from tests.providers.buckets import Buckets
from tests.providers.dialects import GroqProvider, TogetherProvider
from tests.providers.fireworks_server import FireworksProvider
from tests.providers.gemini_server import GeminiProvider
from tests.providers.mistral_server import MistralProvider
from tests.providers.openai_server import OpenAIProvider
from tests.providers.vertex_server import VertexProvider
from tests.upstreams import chat_completion

HERE = Path(__file__).parent


async def see(
    requirements: str, flow: str, *told: str, end: Callable[[str], None]
) -> dict[str, Any]:
    """What a provider's own client sees on its way through a flow.

    Args:
        told: What the flow is told.
        end: Lets the batch end that the flow created first, which then goes on.
    """
    try:
        python, env = environments.old_python(requirements)
    except Unavailable as error:
        give_up(error)
    process = await asyncio.create_subprocess_exec(
        *python,
        str(HERE / flow),
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
        [created, *_] = json.loads(await process.stdout.readline())["ids"]
        end(created)
        process.stdin.write(b"\n")
        await process.stdin.drain()
        seen: Any = json.loads(await process.stdout.readline())
        assert await process.wait() == 0
    return seen


async def test_anthropics_client_is_served() -> None:
    outcomes = [anthropic_server.message("Hi."), errored("api_error", "Sorry.")]
    async with AnthropicProvider(behave=lambda *_: outcomes.pop()) as provider:
        seen = await see(
            "requirements-providers.txt",
            "anthropic_flow.py",
            provider.root_url,
            anthropic_server.KEY,
            end=provider.end,
        )

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


async def test_mistrals_client_is_served() -> None:
    outcomes = {
        "r0": (400, mistral_server.fault("No.")),
        "r1": (200, mistral_server.completion("Hi.")),
    }
    async with MistralProvider(behave=lambda name, _: outcomes[name]) as provider:
        seen = await see(
            "requirements-batches.txt",
            "mistral_flow.py",
            provider.root_url,
            mistral_server.KEY,
            end=provider.end,
        )

    assert seen["created"]["status"] == "QUEUED"
    assert seen["created"]["metadata"] == {"key": "k1"}
    assert seen["listed"] == seen["ids"][::-1]
    assert seen["cancelled"]["status"] == "CANCELLATION_REQUESTED"
    assert seen["refused"] == [422, 404, 422, 401]
    assert seen["ended"]["status"] == "SUCCESS"
    assert seen["ended"]["succeeded_requests"] == seen["ended"]["failed_requests"] == 1
    assert seen["output"]["custom_id"] == "r1"
    assert seen["output"]["response"]["body"]["choices"][0]["message"]["content"] == "Hi."
    assert seen["errors"]["response"]["status_code"] == 400
    assert seen["deleted"]["deleted"] is True


async def test_googles_client_is_served() -> None:
    outcomes = {"r0": gemini_server.fault(400, "No."), "r1": gemini_server.content("Hi.")}
    async with GeminiProvider(behave=lambda key, _: outcomes[key]) as provider:
        seen = await see(
            "requirements-providers.txt",
            "gemini_flow.py",
            provider.root_url,
            gemini_server.KEY,
            end=provider.end,
        )

    assert seen["created"]["state"] == "JOB_STATE_PENDING"
    assert seen["created"]["display_name"] == "k1 Reviews"
    assert seen["listed"] == seen["ids"][::-1]
    assert seen["cancelled"] is None
    assert seen["refused"] == [400, 404, 400, 403, 401]
    assert seen["ended"]["state"] == "JOB_STATE_SUCCEEDED"
    assert seen["text"] == "Hi."
    assert seen["error"]["code"] == 400
    assert seen["deleted"] == 403


async def test_fireworks_client_is_served() -> None:
    outcomes = {"r0": (400, {"message": "No."}), "r1": (200, chat_completion("Hi."))}
    async with FireworksProvider(behave=lambda name, _: outcomes[name]) as provider:
        seen = await see(
            "requirements-batches.txt",
            "fireworks_flow.py",
            provider.root_url,
            fireworks_server.KEY,
            fireworks_server.ACCOUNT,
            end=provider.end,
        )

    assert seen["states"] == ["UPLOADING", "READY"]
    assert seen["created"]["state"] == "JOB_STATE_VALIDATING"
    assert seen["listed"] == seen["ids"]
    assert seen["deleted"] == "JOB_STATE_DELETING_CLEANING_UP"
    assert seen["refused"] == [409, 409, 404, 401]
    assert seen["ended"]["state"] == "JOB_STATE_COMPLETED"
    assert seen["ended"]["job_progress"]["successfully_processed_requests"] == 1
    assert sorted(name.rpartition("/")[2] for name in seen["files"]) == [
        "BIJOutputSet.jsonl",
        "error-data",
    ]


@pytest.mark.parametrize(
    ("name", "server"), [("groq", GroqProvider), ("together", TogetherProvider)]
)
async def test_the_clients_of_compatible_providers_are_served(
    name: str, server: type[OpenAIProvider]
) -> None:
    async with server() as provider:
        seen = await see(
            "requirements-batches.txt",
            "compatible_flow.py",
            name,
            provider.base_url.removesuffix(provider.prefix),
            openai_server.KEY,
            end=provider.end,
        )

    assert seen["created"]["status"].lower() == "validating"
    assert seen["listed"] == sorted(seen["ids"])
    assert seen["cancelled"]["status"].lower() in ("cancelling", "cancelled")
    assert seen["refused"] == [400, 404]
    assert seen["ended"]["status"].lower() == "completed"
    assert seen["output"] == {"r0": 200, "r1": 200}


async def test_googles_client_is_served_at_vertex() -> None:
    row = {"request": {"contents": [{"parts": [{"text": "Hi."}]}]}, "key": "line-1"}
    with Buckets() as buckets:
        bucket = buckets.create()
        buckets.write(bucket, "in/input.jsonl", json.dumps(row).encode())
        async with VertexProvider(buckets) as provider:
            where = [vertex_server.PROJECT, vertex_server.REGION, f"gs://{bucket}/in"]
            seen = await see(
                "requirements-providers.txt",
                "vertex_flow.py",
                provider.url,
                provider.new_token(),
                *where,
                end=provider.end,
            )

    assert seen["created"]["state"] == "JOB_STATE_PENDING"
    assert seen["created"]["display_name"] == "reviews"
    assert seen["created"]["src"]["gcs_uri"] == [f"gs://{bucket}/in/input.jsonl"]
    assert seen["created"]["dest"]["gcs_uri"] == f"gs://{bucket}/in/output"
    assert seen["listed"] == seen["ids"]
    assert seen["cancelling"]["state"] == "JOB_STATE_CANCELLING"
    refused = [[404, "NOT_FOUND"], [401, "UNAUTHENTICATED"], [400, "INVALID_ARGUMENT"]]
    assert seen["refused"] == refused
    assert seen["ended"]["state"] == "JOB_STATE_SUCCEEDED"
    assert seen["ended"]["completion_stats"] == {"successful_count": 1}
    directory = seen["ended"]["output_info"]["gcs_output_directory"]
    assert directory.startswith(f"gs://{bucket}/in/output/prediction-model-")
