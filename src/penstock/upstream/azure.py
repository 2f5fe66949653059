"""Where Azure OpenAI takes lines on its classic surface: the deployment stands in the address.

Source: https://learn.microsoft.com/azure/foundry/openai/reference, and what OpenAI's client for
Azure does, 25 November 2026.
"""

from urllib.parse import quote, urlsplit

import msgspec

_BY_DEPLOYMENT = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/images/generations",
        "/v1/images/edits",
    }
)
"""Others name it in the body alone."""


def is_classic(base_url: str) -> bool:
    """Whether that is the surface of old, whose paths have no `/v1`."""
    path = urlsplit(base_url).path.rstrip("/")
    return bool(path) and not path.endswith("/v1")  # which one without a path is given


def version_query(api_version: str | None) -> str:
    """What names a version in an address; empty without one."""
    return f"api-version={quote(api_version, safe='')}" if api_version else ""


def locate(endpoint: str, body: bytes) -> str:
    """Where a line is sent on the classic surface, below its `/openai`."""
    path = endpoint.removeprefix("/v1")
    if endpoint not in _BY_DEPLOYMENT:
        return path
    try:
        model = _decode_model(body).model
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return path  # it is Azure's to refuse
    return f"/deployments/{quote(model, safe='')}{path}"


class _Model(msgspec.Struct):
    model: str


_decode_model = msgspec.json.Decoder(_Model).decode
