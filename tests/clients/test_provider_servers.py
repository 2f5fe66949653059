"""Our servers that stand for providers are taken for them by the providers' own clients."""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncAzureOpenAI, AsyncOpenAI

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
from tests.providers.dialects import (
    AzureProvider,
    ClassicAzureProvider,
    GroqProvider,
    TogetherProvider,
)
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


def open_azure(name: str, root_url: str, key: str) -> AsyncOpenAI:
    """A client as Microsoft's pages make it."""
    v1: Any = {"base_url": f"{root_url}/openai/v1", "max_retries": 0}
    match name:
        case "classic":
            version = ClassicAzureProvider.version
            return AsyncAzureOpenAI(
                azure_endpoint=root_url, api_key=key, api_version=version, max_retries=0
            )
        case "v1":
            return AsyncOpenAI(api_key=key, **v1)
        case _:
            return AsyncOpenAI(api_key="none", default_headers={"api-key": key}, **v1)


@pytest.mark.parametrize(
    ("name", "server", "endpoint"),
    [
        ("classic", ClassicAzureProvider, "/chat/completions"),
        ("v1", AzureProvider, "/v1/chat/completions"),
        ("v1 with api-key", AzureProvider, "/chat/completions"),
    ],
)
async def test_openais_client_is_served_at_azure(
    name: str, server: type[OpenAIProvider], endpoint: Any
) -> None:
    body = {"model": "deployed", "messages": [{"role": "user", "content": "Hi."}]}
    lines = [
        {"custom_id": custom_id, "method": "POST", "url": endpoint, "body": body}
        for custom_id in ("r0", "r1")
    ]
    data = b"".join(json.dumps(each).encode() + b"\n" for each in lines)
    told: Any = {"endpoint": endpoint, "completion_window": "24h"}
    outcomes = {"r0": (400, {"error": {"message": "No."}}), "r1": (200, chat_completion("Hi."))}
    async with server(behave=lambda custom_id, _: outcomes[custom_id]) as provider:
        root_url = provider.base_url.removesuffix(provider.prefix)
        client = open_azure(name, root_url, openai_server.KEY)
        stranger = open_azure(name, root_url, "wrong")

        file = await client.files.create(file=("r.jsonl", data), purpose="batch")
        created = await client.batches.create(input_file_id=file.id, **told)
        other = await client.batches.create(input_file_id=file.id, **told)
        listed = [each.id async for each in client.batches.list(limit=1)]
        cancelled = await client.batches.cancel(other.id)
        with pytest.raises(openai.NotFoundError):
            await client.batches.retrieve("batch_unknown")
        with pytest.raises(openai.BadRequestError):
            await client.batches.create(input_file_id="file-unknown", **told)
        with pytest.raises(openai.AuthenticationError):
            await stranger.batches.retrieve(created.id)
        provider.end(created.id)
        ended = await client.batches.retrieve(created.id)
        output = await client.files.content(ended.output_file_id or "")
        errors = await client.files.content(ended.error_file_id or "")
        alone = await client.chat.completions.create(model="deployed", messages=[])
        files = [each.id async for each in client.files.list()]
        deleted = await client.files.delete(file.id)
        for each in (client, stranger):
            await each.close()

    assert created.status.lower() == "validating"
    assert created.request_counts
    assert created.request_counts.completed is None
    assert listed == [other.id, created.id]
    assert cancelled.status in ("cancelling", "cancelled")
    assert (ended.status, ended.object) == ("completed", "batch")
    assert json.loads(output.text)["response"]["body"]["choices"][0]["message"]["content"]
    assert json.loads(errors.text)["response"]["status_code"] == 400
    assert provider.models_by_line == ["deployed"]
    assert alone.choices[0].message.content
    assert file.id in files
    assert (file.status, deleted.deleted) == ("processed", True)


async def test_a_classic_azure_is_not_found_without_its_version() -> None:
    async with (
        ClassicAzureProvider() as provider,
        AsyncAzureOpenAI(
            azure_endpoint=provider.base_url.removesuffix(provider.prefix),
            api_key=openai_server.KEY,
            api_version="2020-01-01",
            max_retries=0,
        ) as client,
    ):
        with pytest.raises(openai.NotFoundError, match="Resource not found"):
            await client.batches.retrieve("batch_1")


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
