"""Where the settings file, the data directory and the server are.

Client commands need no more than this, so they do not load the settings: they start at once,
and a mistake in an upstream's settings does not keep anyone from looking at a batch.
"""

import os
import tomllib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from penstock.errors import InvalidSettings, StorageUnavailable

DEFAULT_URL = "http://127.0.0.1:8080"
DEFAULT_DATA_DIR = "penstock-data"
DEFAULT_CONFIG = "penstock.toml"
KEY_FILE = "api-key"
"""In the data directory: the key that the first start made, mode 0600."""


def find_config(flag: Path | None) -> Path | None:
    """Find the settings file: `--config`, else `PENSTOCK_CONFIG`, else `penstock.toml` here.

    Returns:
        Its path, or None if none was named and there is none here.

    Raises:
        InvalidSettings: One was named, but there is no such file.
    """
    for path, where in ((flag, "--config"), (_named("PENSTOCK_CONFIG"), "PENSTOCK_CONFIG")):
        if path is not None:
            if not path.is_file():
                raise InvalidSettings(f"{where} names {path}, but there is no such file.")
            return path
    here = Path(DEFAULT_CONFIG)
    return here if here.is_file() else None


def read_config(path: Path) -> dict[str, Any]:
    """Read a settings file as it stands.

    Raises:
        InvalidSettings: It cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InvalidSettings(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise InvalidSettings(f"{path} is not valid TOML: {error}.") from error


def find_data_dir(flag: Path | None, *, config: Path | None = None) -> Path:
    """Find the data directory as the settings would, without checking anything else.

    Args:
        flag: As `--data-dir` gives it; None looks on.
        config: The settings file, as `--config` gives it; None looks where it may be.
    """
    if flag is not None:
        return flag.expanduser()
    if (named := _named("PENSTOCK_DATA_DIR")) is not None:
        return named.expanduser()
    path = find_config(config)
    value = read_config(path).get("data_dir") if path is not None else None
    return Path(value if isinstance(value, str) else DEFAULT_DATA_DIR).expanduser()


def find_url() -> str:
    """Where the server is: `PENSTOCK_URL`, with or without `/v1`, else this machine."""
    url = os.environ.get("PENSTOCK_URL") or DEFAULT_URL
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def find_key(data_dir: Path | None) -> str | None:
    """The client's key: `PENSTOCK_API_KEY`, else the one kept in the data directory.

    Args:
        data_dir: As the flag `--data-dir` gives it; None looks where the settings say.

    Returns:
        The key, or None if there is none, which a server without authentication accepts.
    """
    if key := os.environ.get("PENSTOCK_API_KEY", "").strip():
        return key
    path = find_data_dir(data_dir) / KEY_FILE
    try:
        return path.read_text().strip() or None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InvalidSettings(
            f"The key in {path} cannot be read: {error.strerror}; set PENSTOCK_API_KEY."
        ) from error


def _named(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value) if value else None


def find_database(flag: Path | None, *, config: Path | None = None) -> str:
    """The URL of the database as the settings would find it, without checking anything else.

    Args:
        flag: The data directory as `--data-dir` gives it; None looks on.
        config: The settings file, as `--config` gives it; None looks where it may be.

    Raises:
        InvalidSettings: It is to be taken from an environment variable that is not set.
    """
    if flag is None:
        if url := os.environ.get("PENSTOCK_DATABASE_URL"):
            return url
        path = find_config(config)
        value = read_config(path).get("database_url") if path is not None else None
        if isinstance(value, dict):
            name = str(next(iter(cast("dict[str, object]", value).values()), ""))
            value = os.environ.get(name)
            if not value:
                raise InvalidSettings(
                    f"database_url names the environment variable {name}, which is not set."
                )
        if isinstance(value, str):
            return value
    return store_url(find_data_dir(flag, config=config))


def database_path(data_dir: Path) -> Path:
    """Where the database of a data directory is."""
    return data_dir.absolute() / "penstock.db"


def store_url(data_dir: Path) -> str:
    """The same as a database URL."""
    return f"sqlite:///{database_path(data_dir)}"


@contextmanager
def must_keep_files(data_dir: Path) -> Generator[None]:
    """Say what a data directory must be, should it turn out that no files can be kept there.

    Raises:
        InvalidSettings: In place of what tells that.
    """
    try:
        yield
    except (OSError, StorageUnavailable) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        raise InvalidSettings(
            f"data_dir is {data_dir}, where files are kept as storage_url is not set, and it "
            f"cannot be used ({reason}); it must be a directory that this user can write to, "
            "or that can be made. Or set storage_url."
        ) from error
