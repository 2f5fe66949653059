"""Every setting of Penstock, as one frozen tree that is read once at start.

    flags  >  environment (PENSTOCK_*)  >  settings file (TOML)  >  defaults

An unknown name is refused wherever it stands: a misspelt limit that is passed over in silence
is found out when it is too late. An error names the setting, what is wrong, what is allowed
and where the value came from, and never a secret.

To add a setting, add a field to its table and a row to `docs/settings.md`.
"""

import ipaddress
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, PrivateAttr, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import Url

from penstock.addresses import is_private_host, read_base_url
from penstock.errors import InvalidSettings
from penstock.model import parse_window
from penstock.places import DEFAULT_DATA_DIR, find_config, read_config
from penstock.settings_prices import ModelPrices, Share
from penstock.settings_sources import (
    ListOf,
    SettingPath,
    Sources,
    Table,
    dotted,
    iter_settings,
    show,
    spot_of,
    variable_name,
)
from penstock.signing import read_secret
from penstock.upstream import azure
from penstock.upstream.kinds import KINDS

DEFAULT_PROJECT = "default"
"""The project that is always there."""
UPSTREAM_KEY_VARIABLE = "PENSTOCK_UPSTREAM_API_KEY"
"""Holds the key of an upstream that a flag names, which has no table of its own."""
_BESIDE_THE_TREE = frozenset({"PENSTOCK_CONFIG", "PENSTOCK_URL", UPSTREAM_KEY_VARIABLE})
_FLAGS = {"server.auth": "--no-auth", "upstreams": "--upstream"}
_KEY = "printable ASCII characters without spaces"
_SECRET = f'{_KEY}, or {{ env = "NAME" }}'
_SIGNS = (
    "`whsec_` and at least 24 bytes in base64, as `penstock webhooks secret` makes it, or at "
    'least 24 printable characters, or { env = "NAME" }'
)
_LABEL = "1 to 64 letters, digits, dots, dashes or underscores"
_OPENAI_WINDOW = "24h"
_WINDOW = "a whole number from 1 followed by s, m, h or d, such as 24h"


# Kinds of values


def _not_a_bool(value: object) -> object:
    # pydantic would read true as 1.
    if isinstance(value, bool):
        raise ValueError
    return value


def _window(value: object) -> object:
    if not isinstance(value, str) or parse_window(value) is None:
        raise ValueError
    return value


def is_label(text: str) -> bool:
    """Whether `text` may be the name of an upstream or a project."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", text, re.A) is not None


def _label(value: object) -> object:
    if not isinstance(value, str) or not is_label(value):
        raise ValueError
    return value


def _kind(value: object) -> object:
    if not isinstance(value, str) or value not in KINDS:
        raise ValueError
    return value


def _hook_url(value: object) -> object:
    """The normal form of a webhook's URL, so that each place has one name."""
    if not isinstance(value, str) or not re.match(r"https?://[^/]", value, re.I):
        raise ValueError
    try:
        url = Url(value)
    except ValueError:
        raise ValueError from None  # pydantic would tell the value, too
    has_more = url.username or url.password or url.fragment
    if not url.host or has_more or re.search(r"[\s\\]", value):
        raise ValueError
    return str(url)


def _from_variable(value: object) -> object:
    """What `{ env = "NAME" }` stands for; anything else as it is."""
    if isinstance(value, dict):
        names = list(cast("dict[str, object]", value).items())
        if len(names) != 1 or names[0][0] != "env" or not isinstance(names[0][1], str):
            raise ValueError
        name = names[0][1]
        value = os.environ.get(name, "").strip()
        if not value:
            raise ValueError(f"names the environment variable {name}, which is not set")
    return value


def _secret(value: object) -> object:
    value = _from_variable(value)
    if isinstance(value, str) and not re.fullmatch(r"[!-~]+", value):
        raise ValueError
    return value


def _project_key(value: object) -> object:
    value = _secret(value)
    if isinstance(value, str) and len(value) < 16:
        raise ValueError
    return value


def _signing_secret(value: object) -> object:
    value = _from_variable(value)
    if not isinstance(value, str) or read_secret(value) is None:
        raise ValueError
    return value


def _database_url(value: object) -> object:
    value = _from_variable(value)
    if not isinstance(value, str):
        raise ValueError
    try:
        parts = urlsplit(value)
        _ = parts.port
    except ValueError:
        raise ValueError from None
    is_whole = parts.scheme in ("postgresql", "postgres") and len(parts.path) > 1
    if not is_whole or re.search(r"\s", value):
        raise ValueError
    return value


def _storage_url(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(
        r"(s3|gs|az)://[A-Za-z0-9][\w.-]{1,62}(/[\w./=-]*)?", value, re.A
    ):
        raise ValueError
    return value.rstrip("/")


def _directory(value: object) -> object:
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError
    return Path(value).expanduser()


Whole = Annotated[int, BeforeValidator(_not_a_bool)]
Number = Annotated[float, BeforeValidator(_not_a_bool)]
Window = Annotated[str, BeforeValidator(_window)]
Label = Annotated[str, BeforeValidator(_label)]
Secret = Annotated[SecretStr, BeforeValidator(_secret)]
ProjectKey = Annotated[SecretStr, BeforeValidator(_project_key)]
SigningSecret = Annotated[SecretStr, BeforeValidator(_signing_secret)]
Text = Annotated[str, Field(min_length=1)]


def _setting(description: str, allowed: str, **rest: Any) -> Any:
    return Field(description=description, json_schema_extra={"allowed": allowed}, **rest)


def _whole(default: int, description: str, *, ge: int = 1, le: int | None = None) -> Any:
    allowed = f"a whole number from {ge}" + ("" if le is None else f" to {le}")
    return _setting(description, allowed, default=default, ge=ge, le=le)


def _positive(default: float, description: str) -> Any:
    return _setting(description, "a number above 0", default=default, gt=0)


def _not_negative(default: float, description: str) -> Any:
    return _setting(description, "a number from 0", default=default, ge=0)


# The tree


class Server(Table):
    """The API's door."""

    host: Text = _setting(
        "The address that the API listens on.", "an address or host name", default="127.0.0.1"
    )
    port: Whole = _whole(
        8080, "The TCP port that the API listens on; 0 takes any free one.", ge=0, le=65535
    )
    auth: bool = _setting(
        "Whether a key is asked for; may be false on a loopback address only.",
        "true or false",
        default=True,
    )
    shutdown_grace_s: Number = _not_negative(
        10, "How long open requests and lines in flight may go on at a shutdown, in seconds."
    )


class Limits(Table):
    """What clients may ask for."""

    requests_per_batch: Whole = _whole(50_000, "The most requests in one batch.")
    input_file_bytes: Whole = _whole(209_715_200, "The largest file, in bytes.")
    line_bytes: Whole = _whole(16 * 2**20, "The longest line of an input file, in bytes.")
    embedding_inputs: Whole = _whole(
        50_000, "The most inputs of all lines together in one batch of embeddings."
    )
    default_completion_window: Window = _setting(
        "The completion window of a batch whose client names none.", _WINDOW, default="24h"
    )
    max_completion_window: Window = _setting(
        "The longest completion window that a client may name.", _WINDOW, default="30d"
    )
    reported_faults: Whole = _whole(
        1000, "The most faults of an input file that are told; the others are counted."
    )
    strict_openai: bool = _setting(
        "Whether to allow no more than OpenAI does: only `24h` as completion window, one model "
        "per file, and a batch of an unknown input file that fails instead of a 404 at its "
        "creation.",
        "true or false",
        default=False,
    )


class Worker(Table):
    """How batches are run."""

    slice_requests: Whole = _whole(
        1024,
        "The most requests in a slice, which is what a worker claims; the first slices of a "
        "file have 256 at most, later ones a sixteenth of what stands before them.",
    )
    slice_bytes: Whole = _whole(2 * 2**20, "The most input bytes in a slice.")
    flush_interval_s: Number = _positive(
        0.05,
        "How long a reply may wait until it is made durable, in seconds; with `storage_url` at "
        "least 1.",
    )
    flush_bytes: Whole = _whole(
        256 * 1024,
        "How many bytes of replies may wait until they are made durable; with `storage_url` at "
        "least 8388608.",
    )
    cancel_grace_s: Number = _not_negative(
        600, "How long lines in flight may go on after their batch is cancelled, in seconds."
    )
    health_port: Whole = _whole(
        0,
        "The TCP port on which `penstock work` tells how it is, under `/healthz`, `/readyz` "
        "and `/metrics`, at `server.host`; 0: none.",
        ge=0,
        le=65535,
    )
    lease_s: Number = _positive(
        30, "How long a slice stays with a worker that gives no sign of life, in seconds."
    )


class Upstream(Table):
    """A place where lines are sent, one by one or as batches of the provider."""

    name: Label = _setting("What the upstream is called; each name once.", _LABEL)
    kind: Annotated[str, BeforeValidator(_kind)] = _setting(
        "What it is: `openai` is any OpenAI-compatible server, and the others are providers "
        "whose batch API has limits or ways of its own.",
        f"one of {', '.join(KINDS)}",
        default="openai",
    )
    mode: Literal["lines", "native", "auto"] = _setting(
        "How lines are run: `lines` sends them one by one, `native` gives them to the "
        "provider's own batch API, and `auto` does so from `native_from` lines on.",
        "lines, native or auto",
        default="lines",
    )
    native_from: Whole = _whole(
        1000,
        "With mode `auto`, how many lines of a batch make a batch of the provider; fewer are "
        "sent one by one.",
    )
    fallback: Literal["none", "lines"] = _setting(
        "What becomes of lines that a batch of the provider leaves without a good answer: "
        "`lines` sends them one by one, to the same upstream and at its usual price, and stops "
        "a batch of the provider when a tenth of the completion window is left.",
        "none or lines",
        default="none",
    )
    base_url: Annotated[str, BeforeValidator(read_base_url)] = _setting(
        "Where its API is, with `/v1` if it has one; an address without a path gets `/v1`, "
        "and at Azure it must end in `/openai/v1` or `/openai`.",
        "an http or https URL with a host and without a query, "
        "such as http://127.0.0.1:9000/v1",
    )
    api_key: Secret | None = _setting(
        'Its key, or `{ env = "NAME" }` to take it from an environment variable.',
        _SECRET,
        default=None,
    )
    api_version: Annotated[str, BeforeValidator(azure.read_version)] | None = _setting(
        "With kind `azure`, the version of its API, needed where `base_url` ends in `/openai`.",
        azure.VERSION,
        default=None,
    )
    account: Label | None = _setting(
        "The ID of the account at the provider whose batch API it uses; only kind `fireworks` "
        "has one, and needs it unless `mode` is `lines`.",
        _LABEL,
        default=None,
    )
    region: Text | None = _setting(
        "With a batch API in a cloud, the cloud's region where batches are run, such as "
        "`us-east-1` or `us-central1`.",
        "a region's name",
        default=None,
    )
    batch_storage: Text | None = _setting(
        "With a batch API in a cloud, the bucket for the files of batches, and a folder in it, "
        "such as `s3://bucket/folder` or `gs://bucket/folder`.",
        "s3:// or gs:// and a bucket's name, and a folder if you like",
        default=None,
    )
    role_arn: Text | None = _setting(
        "With kind `bedrock`, the role by which Amazon reads and writes in that bucket.",
        "a role's ARN, such as arn:aws:iam::123456789012:role/batch",
        default=None,
    )
    google_project: Text | None = _setting(
        "With kind `vertex`, the project of Google Cloud in which batches are run.",
        "a project's ID",
        default=None,
    )
    service_account: Annotated[Path, BeforeValidator(_directory)] | None = _setting(
        "With kind `vertex`, the file of a service account's key; without one Google's own "
        "chain of credentials is asked.",
        "a path",
        default=None,
    )
    batch_url: Annotated[str, BeforeValidator(read_base_url)] | None = _setting(
        "Where the batch API is, if not where its cloud has it for the region.",
        "an http or https URL with a host and without a query",
        default=None,
    )
    batch_storage_url: Annotated[str, BeforeValidator(read_base_url)] | None = _setting(
        "Where the storage's API is, if not where its cloud has it for the region.",
        "an http or https URL with a host and without a query",
        default=None,
    )
    models: Annotated[tuple[Text, ...], Field(min_length=1)] = _setting(
        "Glob patterns; the first upstream that matches a line's model takes the line.",
        "a list of at least one pattern",
        default=("*",),
    )
    group: Label | None = _setting(
        "Upstreams of one group, which must have the same `models`, share their lines: each "
        "goes to the one with the least in flight for its weight, and past one that is down.",
        _LABEL,
        default=None,
    )
    weight: Whole = _whole(1, "Its share of the lines beside others of its group.")
    max_concurrency: Whole = _whole(256, "The most lines in flight at the same time.")
    initial_concurrency: Whole = _whole(
        128,
        "How many lines are in flight at first; more follow while that brings more work done.",
    )
    queue_reserve: Whole = _whole(
        4,
        "How many requests may wait in the queue of an engine that tells so under `/metrics` "
        "(vLLM, SGLang, TGI, llama.cpp).",
        ge=0,
    )
    requests_per_minute: Whole = _whole(
        0, "The most attempts at lines a minute; 0: no limit.", ge=0
    )
    tokens_per_minute: Whole = _whole(
        0, "The most tokens a minute, input and output together; 0: no limit.", ge=0
    )
    request_timeout_s: Number = _positive(
        600, "How long one attempt at a line may take, in seconds."
    )
    connect_timeout_s: Number = _positive(
        10, "How long a connection may take to open, in seconds."
    )
    first_byte_timeout_s: Number = _not_negative(
        0, "How long an answer may take to begin, in seconds; 0: as long as all of it."
    )
    silence_timeout_s: Number = _not_negative(
        0,
        "How long nothing may come of an answer that has begun, in seconds; 0: as long as all "
        "of it.",
    )
    stream: bool = _setting(
        "Whether answers are asked for piece by piece and put together here, so that no proxy "
        "cuts off a long one.",
        "true or false",
        default=False,
    )
    max_attempts: Whole = _whole(5, "How often a line is tried before it fails.")
    prices: dict[Text, ModelPrices] = _setting(
        "What models cost, by glob pattern, of which the longest that matches counts, in US "
        "dollars for a million tokens: `input`, `output` and, if it is another, "
        "`cached_input`; for other models list prices are asked.",
        'a table such as { "gpt-*" = { input = 2, cached_input = 0.5, output = 8 } } with '
        "numbers from 0",
        default={},
    )
    batch_discount: Share | None = _setting(
        "How much less a batch of the provider costs than lines one by one, such as `0.5` for "
        "half; without it, what is known of the kind.",
        "a number from 0 to 1",
        default=None,
    )


class ProjectSettings(Table):
    """A project and the keys that open it."""

    name: Label = _setting("What the project is called; each name once.", _LABEL)
    api_keys: tuple[ProjectKey, ...] = _setting(
        "Its keys; no key may belong to two projects.",
        f"a list of keys, each of at least 16 {_KEY}",
        default=(),
    )
    weight: Whole = _whole(1, "Its share of the workers beside other projects that have work.")
    allow_upstreams: tuple[Label, ...] = _setting(
        "The upstreams that its clients may choose by name, with `x-tfy-provider-name`; those "
        "of a `group` cannot be chosen.",
        "a list of names of [[upstreams]]",
        default=(),
    )
    tier: Literal["normal", "background"] = _setting(
        "With `background` its lines run only where those of no other project would.",
        "`normal` or `background`",
        default="normal",
    )


class WebhookSettings(Table):
    """A place that is told when a batch of a project ends."""

    project: Label = _setting(
        "Whose batches it is told of.", "`default` or the name of one of [[projects]]"
    )
    url: Annotated[str, BeforeValidator(_hook_url)] = _setting(
        "Where events are sent, once for each project.",
        "an http or https URL with a host, without a password and without a fragment, "
        "such as https://example.org/hook",
    )
    secret: SigningSecret = _setting(
        "What events are signed with: `whsec_…` as `penstock webhooks secret` makes it, or a "
        "text of at least 24 characters.",
        _SIGNS,
    )
    previous_secret: SigningSecret | None = _setting(
        "The secret before this one, while receivers change over: events are signed with both.",
        _SIGNS,
        default=None,
    )
    allow_private_addresses: bool = _setting(
        "Whether its host may have a private or loopback address.",
        "true or false",
        default=False,
    )

    @property
    def keys(self) -> tuple[bytes, ...]:
        """What its secrets stand for, the newest first."""
        found = (
            read_secret(secret.get_secret_value())
            for secret in (self.secret, self.previous_secret)
            if secret is not None
        )
        return tuple(key for key in found if key is not None)


@dataclass(frozen=True, slots=True)
class Shown:
    """A setting in force, as a person may see it."""

    name: str
    """Dotted, such as `server.port` or `upstreams[0].base_url`."""
    value: str
    """Secrets are `***`."""
    source: str
    """`default`, the settings file, the environment variable or the flag."""


class Settings(Table):
    """All settings in force."""

    data_dir: Annotated[Path, BeforeValidator(_directory)] = _setting(
        "The directory of the database and all files.", "a path", default=Path(DEFAULT_DATA_DIR)
    )
    api_key: Secret | None = _setting(
        "The key of the project `default`; without one and without projects, "
        "the first start makes one.",
        _SECRET,
        default=None,
    )
    database_url: Annotated[str, BeforeValidator(_database_url)] | None = _setting(
        "The PostgreSQL database of a cluster; without one, all is in an SQLite database in "
        "`data_dir`.",
        'a URL such as postgresql://user:password@host:5432/penstock, or { env = "NAME" }',
        default=None,
    )
    storage_url: Annotated[str, BeforeValidator(_storage_url)] | None = _setting(
        "Where files and replies are kept; without one, in `data_dir`.",
        "s3://BUCKET, gs://BUCKET or az://CONTAINER, each also with /PREFIX",
        default=None,
    )
    server: Server = Server()
    limits: Limits = Limits()
    worker: Worker = Worker()
    upstreams: tuple[Upstream, ...] = ()
    projects: tuple[ProjectSettings, ...] = ()
    webhooks: tuple[WebhookSettings, ...] = ()

    @property
    def served_models(self) -> tuple[str, ...]:
        """The patterns of all upstreams, each once, in their order."""
        patterns = [pattern for upstream in self.upstreams for pattern in upstream.models]
        return tuple(dict.fromkeys(patterns))

    _origins: dict[SettingPath, str] = PrivateAttr(default_factory=dict[SettingPath, str])

    def describe(self) -> list[Shown]:
        """Every setting in force and where it came from, in the order of the manual."""
        return list(_describe(self, (), self._origins))


def load_settings(
    *, config: Path | None = None, overrides: Mapping[str, Any] | None = None
) -> Settings:
    """Read the settings from all their sources.

    Args:
        config: The settings file; None takes `PENSTOCK_CONFIG`, else `penstock.toml` in the
            working directory if it is there.
        overrides: What flags say, by dotted name, such as `{"server.port": 9000}`. None
            stands for a flag that was not given.

    Raises:
        InvalidSettings: A setting is unknown or wrong; the message names it, its value unless
            it is secret, what is allowed, and where it came from.
    """
    sources = Sources(Settings)
    if (path := find_config(config)) is not None:
        sources.put((), read_config(path), f"file {path}")
    sources.put_environment(os.environ, beside=_BESIDE_THE_TREE)
    for name, value in (overrides or {}).items():
        if value is not None:
            flag = _FLAGS.get(name, "--" + name.rpartition(".")[2].replace("_", "-"))
            sources.put(tuple(name.split(".")), value, f"flag {flag}")
    try:
        settings = Settings.model_validate(sources.tree)
    except ValidationError as error:
        raise InvalidSettings(sources.sentence(error.errors()[0])) from None
    settings._origins.update(sources.origins)  # pyright: ignore[reportPrivateUsage]
    _check_together(settings, sources)
    return settings


def upstream_from_flag(base_url: str, **rest: Any) -> list[dict[str, Any]]:
    """What `--upstream URL` means, as the override of `upstreams`.

    Args:
        base_url: The URL, as given.
        rest: Other settings of this upstream by name, such as `max_concurrency`. None stands
            for one that was not given.
    """
    upstream: dict[str, Any] = {"name": "default", "base_url": base_url}
    if os.environ.get(UPSTREAM_KEY_VARIABLE):
        upstream["api_key"] = {"env": UPSTREAM_KEY_VARIABLE}
    upstream.update((name, value) for name, value in rest.items() if value is not None)
    return [upstream]


# What there is and what is in force


@dataclass(frozen=True, slots=True)
class Entry:
    """A setting as the manual has it."""

    name: str
    """Dotted, with `[]` for any entry of a list."""
    variable: str
    """The environment variable, with `N` for the entry's number, from 0."""
    default: str
    description: str


def list_settings() -> list[Entry]:
    """Every setting there is, in the order of the manual."""
    return [
        Entry(
            name=dotted(path).replace("[0]", "[]"),
            variable=variable_name(path).replace("__0__", "__N__"),
            default="required" if setting.is_required() else show(setting.default),
            description=setting.description or "",
        )
        for path, setting in iter_settings(Settings)
    ]


def _describe(
    table: Table, path: SettingPath, origins: Mapping[SettingPath, str]
) -> Iterator[Shown]:
    for name, setting in type(table).model_fields.items():
        value: Any = getattr(table, name)
        here = (*path, name)
        spot = spot_of(setting)
        if isinstance(spot, FieldInfo) or not value:
            yield Shown(dotted(here), show(value), origins.get(here, "default"))
        elif isinstance(spot, ListOf):
            for index, item in enumerate(value):
                yield from _describe(item, (*here, index), origins)
        else:
            yield from _describe(value, here, origins)


# What settings must hold to together


def _check_together(settings: Settings, sources: Sources) -> None:
    def told(*path: str | int) -> str:
        value: Any = settings
        for step in path:
            value = value[step] if isinstance(step, int) else getattr(value, step)
        return sources.told(path, value)

    limits = settings.limits
    default, longest = limits.default_completion_window, limits.max_completion_window
    if (parse_window(default) or 0) > (parse_window(longest) or 0):
        raise InvalidSettings(
            f"{told('limits', 'default_completion_window')}; "
            f"it must not be longer than limits.max_completion_window, {longest}."
        )
    if limits.strict_openai and default != _OPENAI_WINDOW:
        raise InvalidSettings(
            f"{told('limits', 'default_completion_window')}; it must be {_OPENAI_WINDOW} "
            "because limits.strict_openai is true."
        )
    if not settings.server.auth and not _is_loopback(settings.server.host):
        raise InvalidSettings(
            f"{told('server', 'auth')}; it must be true unless server.host is a loopback "
            f"address such as 127.0.0.1, and {told('server', 'host')}."
        )
    for table, entries in (("upstreams", settings.upstreams), ("projects", settings.projects)):
        names: dict[str, int] = {}
        for index, entry in enumerate(entries):
            if (first := names.setdefault(entry.name, index)) != index:
                raise InvalidSettings(
                    f"{told(table, index, 'name')}; it must not be that of {table}[{first}]."
                )
    _check_groups(settings, told)
    _check_choices(settings, told)
    _check_kinds(settings, told)
    _check_keys(settings, sources)
    _check_webhooks(settings, told)


def _check_groups(settings: Settings, told: Callable[..., str]) -> None:
    firsts: dict[str, int] = {}
    for index, upstream in enumerate(settings.upstreams):
        if upstream.group is None:
            continue
        first = firsts.setdefault(upstream.group, index)
        if set(upstream.models) != set(settings.upstreams[first].models):
            raise InvalidSettings(
                f"{told('upstreams', index, 'models')}; it must be the same as of "
                f"upstreams[{first}], because both are of the group {upstream.group}."
            )
    for index, upstream in enumerate(settings.upstreams):
        if upstream.group is None and upstream.name in firsts:
            raise InvalidSettings(
                f"{told('upstreams', index, 'name')}; it must not be the name of a group, "
                f"unless it is of that group itself."
            )


def _check_choices(settings: Settings, told: Callable[..., str]) -> None:
    for index, upstream in enumerate(settings.upstreams):
        if upstream.mode != "lines" and upstream.group is not None:
            raise InvalidSettings(
                f"{told('upstreams', index, 'mode')}; it must be lines for an upstream of a "
                "group, because a batch of a provider is not shared."
            )
        if upstream.fallback != "none" and upstream.mode == "lines":
            raise InvalidSettings(
                f"{told('upstreams', index, 'fallback')}; it must be none where "
                f"upstreams[{index}].mode is lines."
            )
    names = [each.name for each in settings.upstreams if each.group is None]
    for index, project in enumerate(settings.projects):
        for number, name in enumerate(project.allow_upstreams):
            if name not in names:
                raise InvalidSettings(
                    f"{told('projects', index, 'allow_upstreams', number)}; it must be the "
                    f"name of an upstream without a group: {', '.join(names) or 'none is set'}."
                )


def _check_kinds(settings: Settings, told: Callable[..., str]) -> None:
    special = {name for kind in KINDS.values() for name in (*kind.needs, *kind.takes)}
    for index, upstream in enumerate(settings.upstreams):
        kind = KINDS[upstream.kind]
        if not kind.has_lines:
            for name, only in (("mode", "native"), ("fallback", "none")):
                if getattr(upstream, name) != only:
                    raise InvalidSettings(
                        f"{told('upstreams', index, name)}; it must be {only} for kind "
                        f"{upstream.kind}, which takes batches and no single lines."
                    )
        if upstream.stream and not kind.streams:
            raise InvalidSettings(
                f"{told('upstreams', index, 'stream')}; it must be false for kind "
                f"{upstream.kind}, whose streams are not spoken here."
            )
        for name in sorted(special - {*kind.needs, *kind.takes}):
            if getattr(upstream, name) is not None:
                raise InvalidSettings(
                    f"{told('upstreams', index, name)}; it must not be set for the kind "
                    f"{upstream.kind}, which does not read it."
                )
        is_azure = upstream.kind == "azure"
        if is_azure and (fault := azure.find_fault(upstream.base_url, upstream.api_version)):
            raise InvalidSettings(f"{told('upstreams', index, 'base_url')}; {fault}.")
        for name in kind.needs:
            if upstream.mode != "lines" and getattr(upstream, name) is None:
                raise InvalidSettings(
                    f"upstreams[{index}].{name} is not set; it must be for the kind "
                    f"{upstream.kind} unless upstreams[{index}].mode is lines."
                )


def _check_webhooks(settings: Settings, told: Callable[..., str]) -> None:
    projects = dict.fromkeys([DEFAULT_PROJECT, *(each.name for each in settings.projects)])
    places: dict[tuple[str, str], int] = {}
    for index, hook in enumerate(settings.webhooks):
        if hook.project not in projects:
            names = ", ".join(projects)
            raise InvalidSettings(
                f"{told('webhooks', index, 'project')}; it must be one of {names}."
            )
        if is_private_host(Url(hook.url).host or "") and not hook.allow_private_addresses:
            raise InvalidSettings(
                f"{told('webhooks', index, 'url')}; it must not lead to an address that is not "
                f"public unless webhooks[{index}].allow_private_addresses is true."
            )
        if (first := places.setdefault((hook.project, hook.url), index)) != index:
            raise InvalidSettings(
                f"{told('webhooks', index, 'url')}; it must not be that of webhooks[{first}], "
                "which is of the same project."
            )


def _check_keys(settings: Settings, sources: Sources) -> None:
    owners: dict[str, tuple[str, SettingPath]] = {}
    if settings.api_key is not None:
        owners[settings.api_key.get_secret_value()] = ("default", ("api_key",))
    for index, project in enumerate(settings.projects):
        for number, key in enumerate(project.api_keys):
            path: SettingPath = ("projects", index, "api_keys", number)
            owner, first = owners.setdefault(key.get_secret_value(), (project.name, path))
            if owner != project.name:
                raise InvalidSettings(
                    f"{dotted(path)} ({sources.origin(path)}) is also {dotted(first)} "
                    f"({sources.origin(first)}); it must not be a key of another project, "
                    f"such as {owner}."
                )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
