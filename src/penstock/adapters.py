"""The upstreams of the settings: which adapter speaks to each, by line and by batch API."""

from collections.abc import Callable
from typing import Any

from penstock.settings import Settings, Upstream
from penstock.upstream import azure
from penstock.upstream.anthropic_batch import AnthropicBatchUpstream
from penstock.upstream.base import BatchUpstream, LineUpstream
from penstock.upstream.bedrock_batch import BedrockBatchUpstream
from penstock.upstream.fireworks_batch import FireworksBatchUpstream
from penstock.upstream.gemini_batch import GeminiBatchUpstream
from penstock.upstream.kinds import KINDS
from penstock.upstream.mistral_batch import MistralBatchUpstream
from penstock.upstream.openai_batch import DIALECTS, OpenAIBatchUpstream
from penstock.upstream.openai_http import OpenAIHttpUpstream
from penstock.upstream.routes import NativeUse, Route, Routes
from penstock.upstream.translated import Locate, TranslatedUpstream
from penstock.upstream.translation import anthropic, gemini, mistral
from penstock.upstream.translation.base import Translation
from penstock.upstream.vertex_batch import VertexBatchUpstream


def open_routes(settings: Settings) -> Routes:
    members: dict[str, list[Upstream]] = {}
    for upstream in settings.upstreams:
        members.setdefault(upstream.group or upstream.name, []).append(upstream)
    return Routes(
        [
            Route(
                name=name,
                upstreams=tuple(map(_make_upstream, group)),
                models=group[0].models,
                native=_make_native(group[0]),
            )
            for name, group in members.items()
        ]
    )


def open_lines(upstream: Upstream) -> OpenAIHttpUpstream:
    """What sends lines to an upstream one by one, in its own form."""
    kind = KINDS[upstream.kind]
    is_classic = upstream.kind == "azure" and azure.is_classic(upstream.base_url)
    return OpenAIHttpUpstream(
        **_provider(upstream),
        max_concurrency=upstream.max_concurrency,
        request_timeout_s=upstream.request_timeout_s,
        first_byte_timeout_s=upstream.first_byte_timeout_s,
        silence_timeout_s=upstream.silence_timeout_s,
        streams=upstream.stream,
        headers=kind.headers,
        key_header=kind.key_header,
        query=azure.version_query(upstream.api_version),
        locate=azure.locate if is_classic else None,
    )


def _make_upstream(upstream: Upstream) -> LineUpstream:
    http, form = open_lines(upstream), KINDS[upstream.kind].form
    if form is None:
        return http
    translation, locate = _FORMS[form]
    return TranslatedUpstream(http, translation=translation, locate=locate)


_FORMS: dict[str, tuple[Translation, Locate]] = {
    "anthropic": (anthropic, lambda endpoint, model: anthropic.MESSAGES),
    "gemini": (gemini, gemini.locate),
    "mistral": (mistral, mistral.locate),
}
"""What translates, and where it is sent, by the name that `upstream.kinds` gives it."""
_BATCH_ADAPTERS: dict[str, Callable[[Upstream], BatchUpstream]] = {
    "openai": lambda upstream: OpenAIBatchUpstream(
        **_provider(upstream),
        dialect=DIALECTS[upstream.kind],
        api_version=upstream.api_version,
    ),
    "anthropic": lambda upstream: AnthropicBatchUpstream(**_provider(upstream)),
    "fireworks": lambda upstream: FireworksBatchUpstream(
        **_provider(upstream), account=upstream.account or ""
    ),
    "gemini": lambda upstream: GeminiBatchUpstream(**_provider(upstream)),
    "mistral": lambda upstream: MistralBatchUpstream(**_provider(upstream)),
    "bedrock": lambda upstream: BedrockBatchUpstream(
        name=upstream.name,
        region=upstream.region or "",
        storage=upstream.batch_storage or "",
        role_arn=upstream.role_arn or "",
        endpoint=upstream.batch_url,
        storage_endpoint=upstream.batch_storage_url,
        connect_timeout_s=upstream.connect_timeout_s,
    ),
    "vertex": lambda upstream: VertexBatchUpstream(
        name=upstream.name,
        project=upstream.google_project or "",
        region=upstream.region or "",
        storage=upstream.batch_storage or "",
        service_account=upstream.service_account,
        endpoint=upstream.batch_url,
        storage_endpoint=upstream.batch_storage_url,
        connect_timeout_s=upstream.connect_timeout_s,
    ),
}
"""What speaks to batch APIs, by the name that `upstream.kinds` gives it."""


def _provider(upstream: Upstream) -> dict[str, Any]:
    """What all adapters are told."""
    return {
        "name": upstream.name,
        "base_url": upstream.base_url,
        "api_key": upstream.api_key.get_secret_value() if upstream.api_key else None,
        "connect_timeout_s": upstream.connect_timeout_s,
    }


def open_batches(upstream: Upstream) -> BatchUpstream | None:
    """What speaks to an upstream's batch API; None if its lines are sent one by one.

    Raises:
        InvalidSettings: Something that it needs is not installed.
    """
    batches = KINDS[upstream.kind].batches
    if upstream.mode == "lines" or batches is None:
        return None
    return _BATCH_ADAPTERS[batches](upstream)


def _make_native(upstream: Upstream) -> NativeUse | None:
    batches = open_batches(upstream)
    if batches is None:
        return None
    return NativeUse(
        upstream=batches,
        from_requests=upstream.native_from if upstream.mode == "auto" else 1,
        falls_back=upstream.fallback == "lines",
    )
