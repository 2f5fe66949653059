"""How Azure OpenAI is addressed: by which surface, and in which version of its API. On the
classic surface the deployment of a line stands in the address.

Source: https://learn.microsoft.com/azure/foundry/openai/reference, and what OpenAI's client for
Azure does, 25 November 2026.
"""

import re
from urllib.parse import quote, urlsplit, urlunsplit

import msgspec

VERSION_HEADER = "x-tfy-azure-api-version"
"""The header with which a client names the version of Azure's API."""
VERSION = "1 to 64 letters, digits, dots, dashes or underscores, such as 2024-10-21"
"""What a version of Azure's API must be."""
_SURFACE = "/openai/v1"
_CLASSIC = "/openai"
_HOSTS = (".azure.com", ".azure.us", ".azure.cn")
"""The ends of Azure's own names."""
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
    return _path(base_url).endswith(_CLASSIC)


def find_fault(base_url: str, api_version: str | None) -> str | None:
    """What an address must be that cannot be used with that version; None if it can."""
    if is_classic(base_url) and api_version is None:
        return (
            f"it must end in {_SURFACE}, or api_version must be set beside it, such as "
            "2024-10-21: without /v1 Azure takes nothing that names no version"
        )
    if not _is_surface(base_url):
        meant = _meant(base_url, _CLASSIC if api_version else _SURFACE)
        return (
            f"with kind azure it must end in {_SURFACE}, or in {_CLASSIC} where api_version is "
            f"set; {meant} is probably meant"
        )
    return None


def _is_surface(base_url: str) -> bool:
    """Whether an address may be one of a surface. Behind a proxy it may be called otherwise."""
    path = _path(base_url)
    if path.endswith((_SURFACE, _CLASSIC)):
        return True
    host = urlsplit(base_url).hostname or ""
    return not host.endswith(_HOSTS) and (not path or path.endswith("/v1"))


def _path(base_url: str) -> str:
    return urlsplit(base_url).path.rstrip("/")


def _meant(base_url: str, surface: str) -> str:
    """The address of a surface, behind the prefix of a proxy if there is one."""
    prefix = re.sub(r"(/openai(/.*)?|/v1)$", "", _path(base_url), flags=re.I)
    parts = urlsplit(base_url)
    host = parts.netloc.rpartition("@")[2]  # without a password
    return urlunsplit((parts.scheme, host, prefix + surface, "", ""))


def is_version(text: str) -> bool:
    """Whether `text` can be a version of Azure's API; which ones there are, Azure knows."""
    return re.fullmatch(r"[\w.-]{1,64}", text, re.A) is not None


def read_version(value: object) -> str:
    """
    Raises:
        ValueError: It cannot be a version of Azure's API.
    """
    if not isinstance(value, str) or not is_version(value):
        raise ValueError
    return value


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
