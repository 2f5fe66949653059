"""The adapter for OpenAI's batch API keeps its contract at providers that are nearly OpenAI."""

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import ClassVar

import pytest
from msgspec.structs import replace as with_fields

from penstock.errors import JobRefused
from penstock.testing.native import KEY, BatchUpstreamContract
from penstock.upstream.azure import VERSION_HEADER
from penstock.upstream.base import BatchUpstream, NativeJob, NativeState
from penstock.upstream.kinds import KINDS
from penstock.upstream.openai_batch import DIALECTS, OpenAIBatchUpstream
from tests.providers import openai_server
from tests.providers.dialects import (
    AzureProvider,
    ClassicAzureProvider,
    GroqProvider,
    TogetherProvider,
)
from tests.providers.openai_server import OpenAIProvider
from tests.unit.test_openai_batch import FarOpenAI


async def opened(provider: OpenAIProvider, kind: str) -> AsyncIterator[OpenAIBatchUpstream]:
    dialect = replace(DIALECTS[kind], find_after_s=0.05)
    upstream = OpenAIBatchUpstream(
        name="hosted", base_url=provider.base_url, api_key=KEY, dialect=dialect
    )
    yield upstream
    await upstream.close()


class DialectContract(BatchUpstreamContract):
    """The contract at one of the providers."""

    server: ClassVar[type[OpenAIProvider]]
    kind: ClassVar[str]

    @pytest.fixture
    async def provider(self, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[OpenAIProvider]:
        monkeypatch.setattr(openai_server, "KEY", KEY)
        async with self.server() as provider:
            yield provider

    @pytest.fixture
    def far_side(self, provider: OpenAIProvider) -> FarOpenAI:
        return FarOpenAI(provider)

    @pytest.fixture
    async def upstream(self, provider: OpenAIProvider) -> AsyncIterator[OpenAIBatchUpstream]:
        async for upstream in opened(provider, self.kind):
            yield upstream


class TestAzure(DialectContract):
    server, kind = AzureProvider, "azure"


class TestClassicAzure(DialectContract):
    server, kind = ClassicAzureProvider, "azure"

    def job(self, upstream: BatchUpstream, key: str = "nat-0123456789-1") -> NativeJob:
        version = {VERSION_HEADER: ClassicAzureProvider.version}
        return with_fields(super().job(upstream, key), parameters=version)

    async def test_without_its_version_it_lets_nobody_in(
        self, upstream: OpenAIBatchUpstream
    ) -> None:
        job = with_fields(self.job(upstream), parameters={})

        with pytest.raises(JobRefused):
            await self.submit(upstream, job)

    async def test_a_version_of_the_settings_does_for_clients_that_name_none(
        self, provider: OpenAIProvider
    ) -> None:
        upstream = OpenAIBatchUpstream(
            name="hosted",
            base_url=provider.base_url,
            api_key=KEY,
            dialect=DIALECTS["azure"],
            api_version=ClassicAzureProvider.version,
        )
        silent = with_fields(self.job(upstream), parameters={})
        wrong = with_fields(silent, parameters={VERSION_HEADER: "2020-01-01"})

        assert await self.submit(upstream, silent) in provider.batches
        with pytest.raises(JobRefused):
            await self.submit(upstream, wrong)
        await upstream.close()

    async def test_a_version_is_no_way_into_the_address(
        self, upstream: OpenAIBatchUpstream
    ) -> None:
        odd = {VERSION_HEADER: "2024-10-21&x=/../#"}

        with pytest.raises(JobRefused):
            await self.submit(upstream, with_fields(self.job(upstream), parameters=odd))

    async def test_lines_name_the_endpoint_without_v1(
        self, provider: OpenAIProvider, upstream: OpenAIBatchUpstream
    ) -> None:
        native_id = await self.submit(upstream, self.job(upstream))

        assert {line["url"] for line in provider.lines_of(native_id)} == {"/chat/completions"}


class TestGroq(DialectContract):
    server, kind = GroqProvider, "groq"

    @pytest.mark.parametrize(("left_s", "window"), [(60, "24h"), (3 * 86400 + 9, "3d")])
    async def test_it_is_given_whole_days_of_what_is_left(
        self,
        provider: OpenAIProvider,
        upstream: OpenAIBatchUpstream,
        left_s: float,
        window: str,
    ) -> None:
        job = with_fields(self.job(upstream), expires_at=time.time() + left_s)

        native_id = await self.submit(upstream, job)

        assert provider.batches[native_id]["completion_window"] == window

    async def test_a_version_for_azure_is_told_to_nobody_else(
        self, provider: OpenAIProvider, upstream: OpenAIBatchUpstream
    ) -> None:
        job = with_fields(self.job(upstream), parameters={VERSION_HEADER: "2024-10-21"})

        assert await self.submit(upstream, job) in provider.batches


class TestTogether(DialectContract):
    server, kind = TogetherProvider, "together"

    async def test_why_a_batch_failed_is_told(
        self, provider: OpenAIProvider, upstream: OpenAIBatchUpstream
    ) -> None:
        native_id = await self.submit(upstream, self.job(upstream))
        provider.end(native_id, "failed", faults=[{"code": "x", "message": "Bad file."}])

        status = await upstream.check(self.job(upstream), native_id)

        assert (status.state, status.message) == (NativeState.FAILED, "Bad file.")
        assert not status.may_pass


def test_what_clients_may_say_of_azure_is_the_version_of_its_api() -> None:
    assert KINDS["azure"].job_headers == {VERSION_HEADER}
    assert all(not KINDS[kind].job_headers for kind in ("openai", "groq", "together"))
