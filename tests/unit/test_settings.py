"""Where settings come from, which one wins and what is refused."""

import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from penstock.errors import InvalidSettings
from penstock.settings import Settings, load_settings, upstream_from_flag
from penstock.upstream.kinds import KINDS

UPSTREAM = '[[upstreams]]\nname = "local"\nbase_url = "http://127.0.0.1:9000/v1"\n'
KEY = "sk-alpha-0123456789"


@pytest.fixture(autouse=True)
def bare_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PENSTOCK_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def load(toml: str = "", **overrides: Any) -> Settings:
    Path("penstock.toml").write_text(toml, encoding="utf-8")
    return load_settings(
        config=None, overrides={k.replace("__", "."): v for k, v in overrides.items()}
    )


def refused(toml: str = "", **overrides: Any) -> str:
    with pytest.raises(InvalidSettings) as caught:
        load(toml, **overrides)
    return str(caught.value)


# Sources


def test_without_any_source_the_defaults_hold() -> None:
    settings = load_settings(config=None, overrides={})

    assert settings.data_dir == Path("penstock-data")
    assert (settings.server.host, settings.server.port) == ("127.0.0.1", 8080)
    assert settings.upstreams == ()


def test_the_environment_beats_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_SERVER__PORT", "9002")

    assert load("[server]\nport = 9001").server.port == 9002


def test_a_flag_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_SERVER__PORT", "9002")

    assert load("[server]\nport = 9001", server__port=9003).server.port == 9003


def test_a_flag_that_was_not_given_changes_nothing() -> None:
    assert load("[server]\nport = 9001", server__port=None).server.port == 9001


def test_sources_are_merged_setting_by_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_SERVER__HOST", "::1")

    server = load("[server]\nport = 9001").server

    assert (server.host, server.port) == ("::1", 9001)


def test_the_file_named_in_the_environment_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.toml").write_text("[server]\nport = 9005")
    monkeypatch.setenv("PENSTOCK_CONFIG", "other.toml")

    assert load("[server]\nport = 9001").server.port == 9005


def test_the_file_named_by_the_flag_beats_the_one_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.toml").write_text("[server]\nport = 9005")
    monkeypatch.setenv("PENSTOCK_CONFIG", "missing.toml")

    assert load_settings(config=Path("other.toml")).server.port == 9005


def test_a_named_file_must_be_there() -> None:
    with pytest.raises(InvalidSettings, match=r"--config names gone\.toml, but there is no"):
        load_settings(config=Path("gone.toml"))


def test_a_file_that_is_not_toml_is_refused() -> None:
    assert refused("[server").startswith("penstock.toml is not valid TOML: ")


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_API_KEY", "")
    monkeypatch.setenv("PENSTOCK_SERVER__PORT", " ")

    settings = load()

    assert settings.api_key is None
    assert settings.server.port == 8080


def test_a_variable_reaches_into_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_UPSTREAMS__0__MAX_CONCURRENCY", "7")
    monkeypatch.setenv("PENSTOCK_UPSTREAMS__0__MODELS", '["qwen*"]')
    monkeypatch.setenv("PENSTOCK_UPSTREAMS__1__NAME", "second")
    monkeypatch.setenv("PENSTOCK_UPSTREAMS__1__BASE_URL", "https://b.example")

    first, second = load(UPSTREAM).upstreams

    assert (first.name, first.max_concurrency, first.models) == ("local", 7, ("qwen*",))
    assert (second.name, second.base_url) == ("second", "https://b.example")


def test_a_variable_holds_a_whole_list_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_UPSTREAMS", '[{"name": "a", "base_url": "http://a"}]')
    monkeypatch.setenv("PENSTOCK_UPSTREAMS__0__API_KEY", "sk-a")

    [upstream] = load(UPSTREAM).upstreams

    assert upstream.name == "a"
    assert upstream.api_key is not None


def test_the_tenth_entry_comes_after_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(11):
        monkeypatch.setenv(f"PENSTOCK_PROJECTS__{number}__NAME", f"p{number}")

    assert [p.name for p in load().projects] == [f"p{number}" for number in range(11)]


def test_an_upstream_by_flag_replaces_those_of_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PENSTOCK_UPSTREAM_API_KEY", "sk-up")

    [upstream] = load(
        UPSTREAM, upstreams=upstream_from_flag("http://b", max_concurrency=9)
    ).upstreams

    assert (upstream.base_url, upstream.max_concurrency) == ("http://b", 9)
    assert upstream.api_key is not None
    assert upstream.api_key.get_secret_value() == "sk-up"


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        load().server.port = 1  # pyright: ignore[reportAttributeAccessIssue]


# Names


@pytest.mark.parametrize(
    ("toml", "unknown", "nearest"),
    [
        ("[server]\nprot = 1", "server.prot", "server.port"),
        ("port = 1", "port", "server.port"),
        ("[sever]\nport = 1", "sever", "server"),
        (UPSTREAM + "baseurl = 1", "upstreams[0].baseurl", "upstreams[0].base_url"),
    ],
)
def test_an_unknown_name_is_refused_and_the_nearest_one_told(
    toml: str, unknown: str, nearest: str
) -> None:
    assert refused(toml) == (
        f"There is no setting {unknown} (file penstock.toml); did you mean {nearest}?"
    )


@pytest.mark.parametrize("name", ["metrics"])
def test_a_setting_of_a_later_release_is_unknown(name: str) -> None:
    assert refused(f'{name} = "x"').startswith(
        f"There is no setting {name} (file penstock.toml); there are data_dir, api_key, "
    )


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("PENSTOCK_SERVER__PROT", "PENSTOCK_SERVER__PORT"),
        ("PENSTOCK_SERVER_PORT", "PENSTOCK_SERVER__PORT"),
        ("PENSTOCK_PORT", "PENSTOCK_SERVER__PORT"),
        ("PENSTOCK_UPSTREAMS__2__URL", "PENSTOCK_UPSTREAMS__2__BASE_URL"),
    ],
)
def test_an_unknown_variable_is_refused_and_the_nearest_one_told(
    variable: str, nearest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")

    assert refused() == (
        f"There is no setting {variable} in the environment; did you mean {nearest}?"
    )


def test_variables_of_the_client_and_of_kubernetes_are_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PENSTOCK_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("PENSTOCK_UPSTREAM_API_KEY", "sk-up")
    monkeypatch.setenv("PENSTOCK_PORT", "tcp://10.0.0.1:8080")
    monkeypatch.setenv("PENSTOCK_PORT_8080_TCP_ADDR", "10.0.0.1")
    monkeypatch.setenv("PENSTOCK_API_SERVICE_HOST", "10.0.0.1")

    assert load().server.port == 8080


# Values


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[server]\nport = 70000", "server.port is 70000 (file penstock.toml); it must be a "
         "whole number from 0 to 65535."),
        ("[server]\nport = true", "server.port is true (file penstock.toml); it must be a "
         "whole number from 0 to 65535."),
        ("[worker]\nflush_interval_s = 0", "worker.flush_interval_s is 0 (file penstock.toml); "
         "it must be a number above 0."),
        ("[worker]\nflush_interval_s = nan", "worker.flush_interval_s is NaN (file "
         "penstock.toml); it must be a number above 0."),
        ('[limits]\nmax_completion_window = "1w"', 'limits.max_completion_window is "1w" (file '
         "penstock.toml); it must be a whole number from 1 followed by s, m, h or d, such as "
         "24h."),
        ('[limits]\ndefault_completion_window = "31d"', "limits.default_completion_window is "
         '"31d" (file penstock.toml); it must not be longer than limits.max_completion_window, '
         "30d."),
        ('[limits]\nstrict_openai = true\ndefault_completion_window = "1h"',
         'limits.default_completion_window is "1h" (file penstock.toml); it must be 24h '
         "because limits.strict_openai is true."),
        ('[limits]\nstrict_openai = "yes, please"', 'limits.strict_openai is "yes, please" '
         "(file penstock.toml); it must be true or false."),
        ('data_dir = ""', 'data_dir is "" (file penstock.toml); it must be a path.'),
        ('[upstreams]\nname = "a"', "upstreams (file penstock.toml) must be a list of tables: "
         "write [[upstreams]] before each."),
        ("server = 3", "server (file penstock.toml) must be a table."),
        ('[[upstreams]]\nname = "a"', "upstreams[0].base_url is missing (file penstock.toml); "
         "it must be an http or https URL with a host and without a query, such as "
         "http://127.0.0.1:9000/v1."),
        (UPSTREAM + 'kind = "acme"', 'upstreams[0].kind is "acme" (file penstock.toml); it '
         f"must be one of {', '.join(KINDS)}."),
        (UPSTREAM + 'mode = "native"\ngroup = "a"', 'upstreams[0].mode is "native" (file '
         "penstock.toml); it must be lines for an upstream of a group, because a batch of a "
         "provider is not shared."),
        (UPSTREAM + 'fallback = "lines"', 'upstreams[0].fallback is "lines" (file '
         "penstock.toml); it must be none where upstreams[0].mode is lines."),
        (UPSTREAM + 'kind = "penstock"\nmode = "auto"', 'upstreams[0].mode is "auto" (file '
         "penstock.toml); it must be native for kind penstock, which takes batches and no "
         "single lines."),
        (UPSTREAM + 'kind = "penstock"', 'upstreams[0].mode is "lines" (file '
         "penstock.toml); it must be native for kind penstock, which takes batches and no "
         "single lines."),
        (UPSTREAM + 'kind = "penstock"\nmode = "native"\nfallback = "lines"',
         'upstreams[0].fallback is "lines" (file penstock.toml); it must be none for kind '
         "penstock, which takes batches and no single lines."),
        ('[[upstreams]]\nname = "a"\nkind = "azure"\nbase_url = "https://a.example/openai"',
         'upstreams[0].base_url is "https://a.example/openai" (file penstock.toml); it must '
         "end in /openai/v1, or api_version must be set beside it, such as 2024-10-21: without "
         "/v1 Azure takes nothing that names no version."),
        ('[[upstreams]]\nname = "a"\nkind = "azure"\nbase_url = "https://a.azure.com/"',
         'upstreams[0].base_url is "https://a.azure.com" (file penstock.toml); with kind azure '
         "it must end in /openai/v1, or in /openai where api_version is set; "
         "https://a.azure.com/openai/v1 is probably meant."),
        ('[[upstreams]]\nname = "a"\nkind = "azure"\nbase_url = "https://a.example/openai"\n'
         'api_version = "soon & late"', 'upstreams[0].api_version is "soon & late" (file '
         "penstock.toml); it must be 1 to 64 letters, digits, dots, dashes or underscores, "
         "such as 2024-10-21."),
        (UPSTREAM + 'api_version = "2024-10-21"', 'upstreams[0].api_version is "2024-10-21" '
         "(file penstock.toml); it must not be set for the kind openai, which does not read "
         "it."),
        ('[[projects]]\nname = "a"\nallow_upstreams = ["b"]\n' + UPSTREAM,
         'projects[0].allow_upstreams[0] is "b" (file penstock.toml); it must be the name of '
         "an upstream without a group: local."),
        (UPSTREAM + "models = []", "upstreams[0].models is [] (file penstock.toml); it must be "
         "a list of at least one pattern."),
        (UPSTREAM + UPSTREAM, 'upstreams[1].name is "local" (file penstock.toml); it must not '
         "be that of upstreams[0]."),
        ('[[projects]]\nname = "a"\n' * 2, 'projects[1].name is "a" (file penstock.toml); it '
         "must not be that of projects[0]."),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_with_what_is_allowed(toml: str, message: str) -> None:
    assert refused(toml) == message


@pytest.mark.parametrize(
    "url",
    [
        "localhost:9000",
        "ftp://a",
        "http://",
        "http://a:99999",
        "http://a/v1?x=1",
        "http://[::1",
    ],
)
def test_a_base_url_must_be_one(url: str) -> None:
    assert refused(upstreams=upstream_from_flag(url)).startswith(
        f'upstreams[0].base_url is "{url}" (flag --upstream); it must be an http or https URL'
    )


CLOUD = {
    "bedrock": {
        "region": "us-east-1",
        "batch_storage": "s3://b",
        "role_arn": "arn:aws:iam::1:role/r",
    },
    "vertex": {"region": "us-central1", "batch_storage": "gs://b", "google_project": "p"},
}


@pytest.mark.parametrize("kind", CLOUD)
def test_a_cloud_must_be_told_where_its_batches_are_run(kind: str) -> None:
    upstream = {"name": "a", "base_url": "http://a/v1", "kind": kind, "mode": "native"}

    assert load(upstreams=[upstream | CLOUD[kind]]).upstreams[0].region
    assert load(upstreams=[upstream | {"mode": "lines"}]).upstreams[0].region is None
    for name in CLOUD[kind]:
        given = {key: value for key, value in CLOUD[kind].items() if key != name}
        with pytest.raises(
            InvalidSettings, match=rf"^upstreams\[0\].{name} is not set; it must"
        ):
            load(upstreams=[upstream | given])


@pytest.mark.parametrize("kind", ["openai", "bedrock", "vertex"])
def test_what_a_kind_does_not_read_must_not_be_set(kind: str) -> None:
    read = {*KINDS[kind].needs, *KINDS[kind].takes}
    everything = CLOUD["bedrock"] | CLOUD["vertex"] | {"service_account": "/key.json"}

    for name in everything.keys() - read:
        upstream = {
            "name": "a",
            "base_url": "http://a/v1",
            "kind": kind,
            name: everything[name],
        }
        with pytest.raises(InvalidSettings, match=f"it must not be set for the kind {kind}"):
            load(upstreams=[upstream])


def test_the_models_of_all_upstreams_are_told_once() -> None:
    first = {"name": "a", "base_url": "http://a/v1", "models": ["x*", "y"]}
    second = {"name": "b", "base_url": "http://b/v1", "models": ["y", "z"]}

    assert load(upstreams=[first, second]).served_models == ("x*", "y", "z")
    assert load().served_models == ()


def test_a_base_url_ends_without_a_slash() -> None:
    [upstream] = load(upstreams=upstream_from_flag("http://a/v1/")).upstreams

    assert upstream.base_url == "http://a/v1"


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_SERVER__PORT", "eighty")

    assert refused() == (
        'server.port is "eighty" (environment variable PENSTOCK_SERVER__PORT); '
        "it must be a whole number from 0 to 65535."
    )


def test_a_variable_that_must_be_json_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_UPSTREAMS", '[{"api_key": "sk-secret"')

    assert refused() == (
        "upstreams (environment variable PENSTOCK_UPSTREAMS) must be written as JSON."
    )


def test_a_list_in_the_environment_has_no_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_UPSTREAMS__1__NAME", "b")

    assert refused() == (
        "There is no upstreams[1] (environment variable PENSTOCK_UPSTREAMS__1__NAME): "
        "upstreams has 0 entries, counted from 0."
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_authentication_may_be_off_on_a_loopback_address(host: str) -> None:
    assert not load(server__auth=False, server__host=host).server.auth


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org"])
def test_authentication_may_not_be_off_elsewhere(host: str) -> None:
    assert refused(server__auth=False, server__host=host) == (
        "server.auth is false (flag --no-auth); it must be true unless server.host is a "
        f'loopback address such as 127.0.0.1, and server.host is "{host}" (flag --host).'
    )


# Secrets


def test_a_key_in_two_projects_is_refused() -> None:
    toml = "".join(f'[[projects]]\nname = "{name}"\napi_keys = ["{KEY}"]\n' for name in "ab")

    message = refused(toml)

    assert message.startswith(
        "projects[1].api_keys[0] (file penstock.toml) is also projects[0]"
    )
    assert KEY not in message


def test_the_key_of_default_is_no_key_of_another_project(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PENSTOCK_API_KEY", KEY)

    assert "(environment variable PENSTOCK_API_KEY)" in refused(
        f'[[projects]]\nname = "a"\napi_keys = ["{KEY}"]'
    )
    assert load(f'[[projects]]\nname = "default"\napi_keys = ["{KEY}"]').projects


def test_a_key_may_stand_in_another_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_KEY", "sk-local\n")

    [upstream] = load(UPSTREAM + 'api_key = { env = "LOCAL_KEY" }').upstreams

    assert upstream.api_key is not None
    assert upstream.api_key.get_secret_value() == "sk-local"


def test_a_key_in_a_variable_that_is_not_set_is_refused() -> None:
    assert refused(UPSTREAM + 'api_key = { env = "LOCAL_KEY" }') == (
        "upstreams[0].api_key (file penstock.toml) cannot be used; it names the environment "
        "variable LOCAL_KEY, which is not set."
    )


@pytest.mark.parametrize(
    "toml",
    [
        UPSTREAM + 'api_key = "sk secret"',
        UPSTREAM + 'api_key = { key = "sk-secret" }',
        '[[projects]]\nname = "a"\napi_keys = ["sk-secret"]',
        '[[projects]]\nname = "a"\napi_keys = "sk-secret"',
        '[[upstreams]]\nname = "a"\nbase_url = "ftp://me:secret@a"',
        'upstreams = ["sk-secret"]',
        'api_kye = "sk-secret"',
    ],
)
def test_an_error_never_holds_a_secret(toml: str) -> None:
    assert "secret" not in refused(toml)


def test_settings_in_force_are_told_with_their_source_and_without_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PENSTOCK_UPSTREAMS__0__API_KEY", "sk-secret")
    toml = UPSTREAM + f'[[projects]]\nname = "a"\napi_keys = ["{KEY}"]'

    settings = load(toml, server__port=9000)
    shown = {row.name: (row.value, row.source) for row in settings.describe()}

    assert shown["server.port"] == ("9000", "flag --port")
    assert shown["server.host"] == ("127.0.0.1", "default")
    assert shown["upstreams[0].models"] == ('["*"]', "default")
    assert shown["upstreams[0].api_key"] == (
        "***",
        "environment variable PENSTOCK_UPSTREAMS__0__API_KEY",
    )
    assert shown["projects[0].api_keys"] == ("[***]", "file penstock.toml")
    assert "sk-" not in repr(settings) + str(shown)


# Webhooks

HOOK_SECRET = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="


def hook(*more: str, url: str = "https://example.org/hook", secret: str = HOOK_SECRET) -> str:
    head = f'[[webhooks]]\nproject = "default"\nurl = "{url}"\nsecret = "{secret}"\n'
    return head + "".join(f"{line}\n" for line in more)


def test_a_webhook_is_told_of_a_project() -> None:
    settings = load('[[projects]]\nname = "a"\n' + hook().replace("default", "a"))

    [webhook] = settings.webhooks
    assert (webhook.project, webhook.url) == ("a", "https://example.org/hook")
    assert webhook.keys == (bytes(range(32)),)
    assert not webhook.allow_private_addresses


def test_a_webhook_may_have_a_secret_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLD", "somebody chose this secret")

    [webhook] = load(hook('previous_secret = { env = "OLD" }')).webhooks

    assert webhook.keys == (bytes(range(32)), b"somebody chose this secret")


def test_a_webhook_has_a_project_that_is_there() -> None:
    toml = '[[projects]]\nname = "a"\n' + hook().replace('"default"', '"b"')

    assert refused(toml) == (
        'webhooks[0].project is "b" (file penstock.toml); it must be one of default, a.'
    )


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.org/",
        "example.org",
        "https://",
        "https:///hook",
        "https://example.org/hook#part",
        "https://me:pass@example.org/",
        "https://me@example.org/",
        "https://exa mple.org/",
        "https://example.org/a b",
        "https://example.org:99999/",
        "https://[::1/",
    ],
)
def test_the_url_of_a_webhook_must_be_one(url: str) -> None:
    assert "it must be an http or https URL with a host" in refused(hook(url=url))


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("https://EXAMPLE.org", "https://example.org/"),
        ("https://example.org:443/a?b=c", "https://example.org/a?b=c"),
        ("https://zürich.example/", "https://xn--zrich-kva.example/"),
    ],
)
def test_the_url_of_a_webhook_has_one_form(url: str, normal: str) -> None:
    assert load(hook(url=url)).webhooks[0].url == normal


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost.",
        "127.0.0.1",
        "127.1",
        "0x7f.1",
        "2130706433",
        "10.1.2.3",
        "169.254.169.254",
        "224.0.0.1",
        "0.0.0.0",
        "[::1]",
        "[::]",
        "[fe80::1]",
        "[fd00::1]",
        "[::ffff:192.168.0.1]",
    ],
)
def test_a_webhook_within_a_network_of_one_s_own_must_be_allowed(host: str) -> None:
    toml = hook(url=f"http://{host}:9000/hook")

    message = refused(toml)

    assert message.startswith("webhooks[0].url is ")
    assert message.endswith(
        "it must not lead to an address that is not public unless "
        "webhooks[0].allow_private_addresses is true."
    )
    assert load(toml + "allow_private_addresses = true").webhooks


def test_a_webhook_is_told_once() -> None:
    assert refused(hook() + hook(url="HTTPS://example.org:443/hook")) == (
        'webhooks[1].url is "https://example.org/hook" (file penstock.toml); it must not be '
        "that of webhooks[0], which is of the same project."
    )
    other = '[[projects]]\nname = "a"\n' + hook().replace("default", "a")
    assert len(load(hook() + other).webhooks) == 2


@pytest.mark.parametrize("name", ["secret", "previous_secret"])
@pytest.mark.parametrize("value", ['"too-short"', '"whsec_c2hvcnQ="', '{ env = "GONE" }', "1"])
def test_a_secret_that_is_none_is_refused_and_not_told(name: str, value: str) -> None:
    line = f"secret = {value}"
    toml = hook().replace(f'secret = "{HOOK_SECRET}"', line) if name == "secret" else ""

    message = refused(toml or hook(f"{name} = {value}"))

    assert message.startswith(f"webhooks[0].{name} (file penstock.toml) cannot be used; it ")
    assert "too-short" not in message
    assert "c2hvcnQ" not in message


def test_the_secrets_of_a_webhook_are_not_shown() -> None:
    settings = load(hook(f'previous_secret = "{"s" * 30}"'))

    shown = {row.name: row.value for row in settings.describe()}

    assert shown["webhooks[0].secret"] == shown["webhooks[0].previous_secret"] == "***"
    assert "AAEC" not in repr(settings) + str(shown)
    assert "sss" not in repr(settings) + str(shown)


@pytest.mark.parametrize(
    ("url", "is_good"),
    [
        ("postgresql://user:pw@host:5432/db?sslmode=require", True),
        ("postgres:///db?host=/var/run/postgresql", True),
        ("postgresql://host", False),
        ("postgresql://host:port/db", False),
        ("sqlite:////tmp/penstock.db", False),
        ("mysql://host/db", False),
        ("", False),
    ],
)
def test_a_database_url_names_a_postgresql_database(url: str, is_good: bool) -> None:
    toml = f'database_url = "{url}"'
    if is_good:
        assert load(toml).database_url == url
    else:
        assert refused(toml).startswith(
            f'database_url is "{url}" (file penstock.toml); it must be a URL such as '
        )


def test_the_password_of_a_database_is_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB", "postgresql://user:geheim@host/db")

    settings = load('database_url = { env = "DB" }')

    [shown] = [each for each in settings.describe() if each.name == "database_url"]
    assert settings.database_url == "postgresql://user:geheim@host/db"
    assert shown.value == "postgresql://***@host/db"
    assert "geheim" not in refused('database_url = "mysql://user:geheim@host/db"')


@pytest.mark.parametrize(
    ("url", "is_good"),
    [
        ("s3://bucket", True),
        ("gs://my.bucket/some/prefix", True),
        ("az://container/prefix/", True),
        ("file:///tmp/x", False),
        ("s3://", False),
        ("s3://bucket?x=1", False),
        ("bucket", False),
    ],
)
def test_a_storage_url_names_a_bucket(url: str, is_good: bool) -> None:
    toml = f'storage_url = "{url}"'
    if is_good:
        assert load(toml).storage_url == url.rstrip("/")
    else:
        assert f'storage_url is "{url}"' in refused(toml)


# Prices


def test_prices_are_read_from_the_file_or_as_json_and_shown_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    toml = UPSTREAM + 'prices."gpt-*" = { input = 0.15, output = 2 }\nbatch_discount = 0.25'
    settings = load(toml)

    shown = {row.name: row.value for row in settings.describe()}
    assert settings.upstreams[0].prices["gpt-*"].input == Decimal("0.15")
    assert settings.upstreams[0].batch_discount == Decimal("0.25")
    assert shown["upstreams[0].prices"] == '{"gpt-*": {input: 0.15, output: 2}}'

    text = '{"m": {"input": 1, "cached_input": 0.5, "output": 3}}'
    monkeypatch.setenv("PENSTOCK_UPSTREAMS__0__PRICES", text)
    [upstream] = load(toml).upstreams
    assert list(upstream.prices) == ["m"]
    assert upstream.prices["m"].cached_input == Decimal("0.5")


@pytest.mark.parametrize(
    ("line", "start"),
    [
        ('prices."m" = { input = -1, output = 1 }', "upstreams[0].prices.m.input is -1"),
        ('prices."m" = { input = true, output = 1 }', "upstreams[0].prices.m.input is true"),
        ('prices."m" = { input = 1 }', "upstreams[0].prices.m.output is missing"),
        (
            'prices."m" = { input = 1, output = 1, cache = 1 }',
            "upstreams[0].prices.m.cache is 1",
        ),
        ('prices."m" = 3', "upstreams[0].prices.m is 3"),
        ("prices = 3", "upstreams[0].prices is 3"),
        ("batch_discount = 1.5", "upstreams[0].batch_discount is 1.5"),
        ("batch_discount = true", "upstreams[0].batch_discount is true"),
    ],
)
def test_a_price_that_is_none_is_refused(line: str, start: str) -> None:
    message = refused(UPSTREAM + line)

    assert message.startswith(f"{start} (file penstock.toml)")
    assert "it must be" in message or "upstreams[0].prices must be a table such as" in message
