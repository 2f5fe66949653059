"""Azure OpenAI by both of its surfaces, line by line and as jobs, from the settings on."""

from pathlib import Path
from typing import Any

import pytest

from penstock.checkup import Verdict, check_batches, check_upstream
from penstock.executor.native import NativePolicy
from penstock.model import BatchStatus
from penstock.settings import Upstream
from penstock.upstream.azure import find_fault, is_version, locate
from penstock.upstream.openai_http import OpenAIHttpUpstream, make_reqwest
from tests.integration.bench import Bench, ids, line, until
from tests.providers.dialects import AzureProvider, ClassicAzureProvider
from tests.providers.openai_server import KEY, OpenAIProvider

HASTY = NativePolicy(first_poll_s=0.02, max_poll_s=0.05, first_wait_s=0.02, max_wait_s=0.05)
NAMES = [f"line-{n}" for n in range(4)]
VERSION = ClassicAzureProvider.version
CHAT = "/v1/chat/completions"
SURFACES = [(ClassicAzureProvider, {"api_version": VERSION}), (AzureProvider, {})]


def told(**more: Any) -> dict[str, Any]:
    return {"kind": "azure", "api_key": KEY, **more}


@pytest.mark.parametrize(("server", "more"), SURFACES)
async def test_lines_are_sent_one_by_one_to_their_deployments(
    server: type[OpenAIProvider], more: dict[str, Any], tmp_path: Path
) -> None:
    data = b"".join(line(name, model=f"deployed {name}") for name in NAMES)
    async with server() as provider, Bench(tmp_path, provider, upstream=told(**more)) as bench:
        batch = await bench.create_from(data)
        ended = await bench.wait_until_ended(batch)
        output, errors = await bench.results(batch)

    assert (ended.status, ids(output), errors) == (BatchStatus.COMPLETED, NAMES, [])
    assert sorted(provider.models_by_line) == [f"deployed {name}" for name in NAMES]


@pytest.mark.parametrize(("server", "more"), SURFACES)
async def test_what_a_job_leaves_is_sent_one_by_one(
    server: type[OpenAIProvider], more: dict[str, Any], tmp_path: Path
) -> None:
    upstream = told(mode="native", fallback="lines", **more)
    async with (
        server() as provider,
        Bench(tmp_path, provider, upstream=upstream, natives=HASTY) as bench,
    ):

        async def is_there() -> bool:
            return bool(provider.batches)

        batch = await bench.create(*NAMES)
        await until(is_there)
        provider.end(provider.native_ids[0], "expired", only=1)
        await bench.wait_until_ended(batch)
        output, errors = await bench.results(batch)

    assert (ids(output), errors) == (NAMES, [])
    assert provider.models_by_line == ["m"] * 3


@pytest.mark.parametrize(("server", "more"), SURFACES)
async def test_a_check_finds_that_it_answers(
    server: type[OpenAIProvider], more: dict[str, Any]
) -> None:
    async with server() as provider:
        settings = Upstream.model_validate(
            told(name="az", base_url=provider.base_url, mode="native", **more)
        )
        lines, batches = await check_upstream(settings), await check_batches(settings)

    assert (lines.verdict, batches.verdict) == (Verdict.OK, Verdict.OK)


async def test_the_address_of_a_deployment_goes_through_the_other_transport_too() -> None:
    async with ClassicAzureProvider() as provider:
        upstream = OpenAIHttpUpstream(
            name="az",
            base_url=provider.base_url,
            api_key=KEY,
            key_header="api-key",
            max_concurrency=1,
            request_timeout_s=10,
            query=f"api-version={VERSION}",
            locate=locate,
            make_transport=make_reqwest,
        )
        reply = await upstream.send(CHAT, b'{"model": "my deployment", "messages": []}')
        await upstream.close()

    assert reply.is_success
    assert provider.models_by_line == ["my deployment"]


@pytest.mark.parametrize(
    ("endpoint", "body", "path"),
    [
        (CHAT, b'{"model":"gpt-4.1_x"}', "/deployments/gpt-4.1_x/chat/completions"),
        (CHAT, b'{"model":"a/../b?c"}', "/deployments/a%2F..%2Fb%3Fc/chat/completions"),
        ("/v1/embeddings", b'{"model":"e"}', "/deployments/e/embeddings"),
        ("/v1/responses", b'{"model":"e"}', "/responses"),
        (CHAT, b'{"n":1}', "/chat/completions"),
        (CHAT, b"\xff", "/chat/completions"),
    ],
)
def test_where_a_line_is_sent(endpoint: str, body: bytes, path: str) -> None:
    assert locate(endpoint, body) == path


@pytest.mark.parametrize("prefix", ["", ":8443", "/proxy", "/v1/openai/of"])
@pytest.mark.parametrize(
    ("path", "version"),
    [("/openai/v1", None), ("/openai/v1/", VERSION), ("/openai", VERSION), ("/openai/", "v1")],
)
def test_an_address_may_be_that_of_either_surface(
    prefix: str, path: str, version: str | None
) -> None:
    assert find_fault(f"https://a.example{prefix}{path}", version) is None


@pytest.mark.parametrize(
    ("path", "version", "meant"),
    [
        ("", None, "/openai/v1"),
        ("", VERSION, "/openai"),
        ("/v1", None, "/openai/v1"),
        ("/proxy", None, "/proxy/openai/v1"),
        ("/proxy/v1", VERSION, "/proxy/openai"),
        ("/openai/deployments/gpt", VERSION, "/openai"),
        ("/proxy/openai/deployments/gpt", None, "/proxy/openai/v1"),
        ("/OpenAI/v1", None, "/openai/v1"),
        ("/notopenai", VERSION, "/notopenai/openai"),
    ],
)
def test_another_address_is_refused_with_the_one_that_was_meant(
    path: str, version: str | None, meant: str
) -> None:
    fault = find_fault(f"https://user:secret@a.openai.azure.com:8443{path}", version)

    assert fault is not None
    assert fault.endswith(f"; https://a.openai.azure.com:8443{meant} is probably meant")


@pytest.mark.parametrize("path", ["", "/", "/v1", "/proxy/v1/"])
def test_a_proxy_may_have_the_surface_elsewhere(path: str) -> None:
    assert find_fault(f"https://a.example{path}", None) is None
    assert find_fault("https://a.example/proxy", None) is not None
    assert find_fault("https://a.example/openai/deployments/gpt", VERSION) is not None


@pytest.mark.parametrize("text", [VERSION, "2025-04-01-preview", "v1", "a_b.c", "x" * 64])
def test_a_version_may_look_so(text: str) -> None:
    assert is_version(text)


@pytest.mark.parametrize("text", ["", "soon & late", "1&x=2", "x" * 65, "2024-10-21\n", "\xe9"])
def test_a_version_may_not_look_so(text: str) -> None:
    assert not is_version(text)
