"""The kinds of upstreams that the settings may name.

To add a provider, add a row; if its batch API is not like OpenAI's, add its adapter to the
table in `adapters` that makes them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from penstock.model import BEDROCK_MODEL, PROVIDER_MODEL
from penstock.upstream.translation.anthropic import API_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What an upstream of a kind speaks."""

    title: str
    """What people call it."""
    batches: str | None = None
    """Which adapter speaks to its batch API; None: it has none."""
    form: str | None = None
    """Which form its bodies have; None: OpenAI's."""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    """What each request needs beside the key."""
    key_header: str | None = None
    """Which header holds the key; None: `Authorization`, as a bearer token."""
    streams: bool = True
    """Whether answers may be asked for piece by piece, as OpenAI or Anthropic give them."""
    model_headers: frozenset[str] = frozenset({PROVIDER_MODEL})
    """Which headers of a client name the model of all lines."""
    job_headers: frozenset[str] = frozenset()
    """Which other `x-tfy-...` headers its adapter reads, as `NativeJob.parameters`."""
    needs: tuple[str, ...] = ()
    """Which settings of an upstream its adapter cannot do without."""
    has_cloud_credentials: bool = False
    """Whether its batch API is opened by credentials of a cloud, and `api_key` is for lines
    that are sent one by one alone."""
    takes: tuple[str, ...] = ()
    """Which others it reads, that other kinds do not have."""
    has_lines: bool = True
    """Whether it can be sent lines one by one."""

    def client_headers(self, *, has_jobs: bool) -> frozenset[str]:
        """Which headers of a client say something, where lines become jobs or do not."""
        return self.model_headers | self.job_headers if has_jobs else self.model_headers


KINDS: dict[str, Kind] = {
    "openai": Kind(title="OpenAI, or any server that is compatible", batches="openai"),
    "penstock": Kind(title="another Penstock", batches="openai", has_lines=False),
    "azure": Kind(
        title="Azure OpenAI",
        batches="openai",
        job_headers=frozenset({"x-tfy-azure-api-version"}),
        key_header="api-key",
        takes=("api_version",),
    ),
    "groq": Kind(title="Groq", batches="openai"),
    "anthropic": Kind(
        title="Anthropic",
        batches="anthropic",
        form="anthropic",
        key_header="x-api-key",
        headers={"anthropic-version": API_VERSION},
    ),
    "fireworks": Kind(title="Fireworks AI", batches="fireworks", needs=("account",)),
    "gemini": Kind(
        title="Google's Gemini API",
        batches="gemini",
        form="gemini",
        key_header="x-goog-api-key",
        streams=False,
    ),
    "mistral": Kind(title="Mistral", batches="mistral", form="mistral", streams=False),
    "together": Kind(title="Together AI", batches="openai"),
    "bedrock": Kind(
        title="Amazon Bedrock",
        batches="bedrock",
        model_headers=frozenset({BEDROCK_MODEL, PROVIDER_MODEL}),
        job_headers=frozenset({"x-tfy-aws-s3-bucket"}),
        has_cloud_credentials=True,
        needs=("region", "batch_storage", "role_arn"),
        takes=("batch_url", "batch_storage_url"),
    ),
    "vertex": Kind(
        title="Gemini at Vertex AI",
        batches="vertex",
        job_headers=frozenset({"x-tfy-vertex-storage-bucket-name", "x-tfy-vertex-region"}),
        has_cloud_credentials=True,
        needs=("region", "batch_storage", "google_project"),
        takes=("service_account", "batch_url", "batch_storage_url"),
    ),
}
"""By name."""
