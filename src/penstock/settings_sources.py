"""Puts the sources of settings together and finds words for what is wrong with them.

Every value goes into one tree with the place it came from, so that an error can name it, and
an unknown name is found in the source it stands in. The sources are read here and not by
`pydantic-settings`, which neither refuses unknown variables, nor remembers where a value came
from, nor reaches into a list of tables: `PENSTOCK_UPSTREAMS__0__API_KEY` sets the key of the
first `[[upstreams]]` of the file.

What the settings are stands in `settings`; here they are any tree of `Table`.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from penstock.errors import InvalidSettings

PREFIX = "PENSTOCK_"
# Kubernetes puts these into every pod beside a service called `penstock` or `penstock-...`.
_SERVICE_LINK = re.compile(
    r"PENSTOCK_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP)(_PROTO|_PORT|_ADDR)?)"
)

SettingPath = tuple[str | int, ...]
"""The way to a setting: names of tables and settings, and numbers of entries, from 0."""


class Table(BaseModel):
    """A table of settings.

    Each field is a table, a tuple of tables or a setting. A setting has a description and
    says in `json_schema_extra["allowed"]` which values it takes, to follow "it must be".
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class ListOf:
    """A place in the tree that holds a list of tables."""

    table: type[Table]


Spot = type[Table] | ListOf | FieldInfo
"""What a path leads to."""


@dataclass(slots=True)
class Sources:
    """What the sources say, put together; a later one wins.

    Every method raises `InvalidSettings` where a source names what `root` does not have.
    """

    root: type[Table]
    tree: dict[str, Any] = field(default_factory=dict[str, Any])
    origins: dict[SettingPath, str] = field(default_factory=dict[SettingPath, str])

    def put(self, path: SettingPath, value: object, origin: str) -> None:
        """Put a value, a table or a list of tables at `path`.

        Args:
            origin: Where it comes from, such as `flag --port`.
        """
        spot = self._find(path, origin)
        if isinstance(spot, FieldInfo):
            self._set(path, value, origin)
        elif isinstance(spot, ListOf):
            if not isinstance(value, list):
                raise InvalidSettings(
                    f"{dotted(path)} ({origin}) must be a list of tables: "
                    f"write [[{dotted(path)}]] before each."
                )
            self._set(path, [], origin)
            for index, item in enumerate(cast("list[object]", value)):
                self.put((*path, index), item, origin)
        else:
            if not isinstance(value, dict):
                raise InvalidSettings(f"{dotted(path)} ({origin}) must be a table.")
            self._container(path, origin)
            for name, item in cast("dict[str, object]", value).items():
                self.put((*path, name), item, origin)

    def put_environment(self, environ: Mapping[str, str], *, beside: frozenset[str]) -> None:
        """Put every variable that starts with `PENSTOCK_`, save those in `beside`.

        A table and a list are written as JSON. An empty variable counts as not set, as shells
        and compose files write it.
        """
        found: list[tuple[SettingPath, str]] = []
        for variable, text in environ.items():
            is_foreign = _SERVICE_LINK.fullmatch(variable) is not None or (
                variable.endswith("_PORT") and text.startswith(("tcp://", "udp://"))
            )
            if variable.startswith(PREFIX) and variable not in beside and not is_foreign:
                steps = variable.removeprefix(PREFIX).lower().split("__")
                path = tuple(int(step) if step.isdecimal() else step for step in steps)
                found.append((path, variable))
        # A whole list comes before its entries, and they come in their order.
        for path, variable in sorted(found, key=lambda entry: _sortable(entry[0])):
            origin = f"environment variable {variable}"
            spot = self._find(path, origin)
            if text := environ[variable].strip():
                is_one = isinstance(spot, FieldInfo) and get_origin(spot.annotation) not in (
                    tuple,
                    dict,
                )
                self.put(path, text if is_one else _json(path, text, origin), origin)

    def origin(self, path: SettingPath) -> str:
        """Where the value at `path` came from; what is said of a whole holds for its parts."""
        for length in range(len(path), 0, -1):
            if (origin := self.origins.get(path[:length])) is not None:
                return origin
        return "default"

    def told(self, path: SettingPath, value: object) -> str:
        """`server.port is 70000 (flag --port)`, without the value if it is secret."""
        place = f"({self.origin(path)})"
        if _is_secret(self._setting_at(path)[1]):
            return f"{dotted(path)} {place} cannot be used"
        return f"{dotted(path)} is {_as_written(value)} {place}"

    def sentence(self, error: ErrorDetails) -> str:
        """Say what pydantic found in our own words."""
        path = error["loc"]
        owner, setting = self._setting_at(path)
        extra = cast("dict[str, str]", setting.json_schema_extra)
        # A validator may say more than what is allowed, such as which variable is not set.
        problem = str(error.get("ctx", {}).get("error", "")) or f"must be {extra['allowed']}"
        if error["type"] == "missing":
            return f"{dotted(path)} is missing ({self.origin(path)}); it {problem}."
        subject = "it" if owner == path else dotted(owner)
        return f"{self.told(path, error['input'])}; {subject} {problem}."

    def _set(self, path: SettingPath, value: object, origin: str) -> None:
        self._container(path[:-1], origin)[path[-1]] = value
        for below in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[below]
        self.origins[path] = origin

    def _container(self, path: SettingPath, origin: str) -> Any:
        """The table or list at `path`, made if it is not there."""
        if not path:
            return self.tree
        parent, last = self._container(path[:-1], origin), path[-1]
        if isinstance(last, str):
            empty: Any = [] if isinstance(self._find(path, origin), ListOf) else {}
            return parent.setdefault(last, empty)
        if last > len(parent):
            raise InvalidSettings(
                f"There is no {dotted(path)} ({origin}): {dotted(path[:-1])} has "
                f"{len(parent)} entries, counted from 0."
            )
        if last == len(parent):
            parent.append({})
            self.origins[path] = origin
        return parent[last]

    def _find(self, path: SettingPath, origin: str) -> Spot:
        spot = find_spot(self.root, path)
        if spot is None:
            raise InvalidSettings(self._unknown(path, origin))
        return spot

    def _setting_at(self, path: SettingPath) -> tuple[SettingPath, FieldInfo]:
        """The setting that `path` leads to or into: a value in a list belongs to the list."""
        for length in range(len(path), 0, -1):
            spot = find_spot(self.root, path[:length])
            if isinstance(spot, FieldInfo):
                return path[:length], spot
        raise LookupError(dotted(path))

    def _unknown(self, path: SettingPath, origin: str) -> str:
        is_variable = origin.startswith("environment")
        spell = variable_name if is_variable else dotted
        place = " in the environment" if is_variable else f" ({origin})"
        if (likely := self._nearest(path)) is not None:
            hint = f"did you mean {spell(likely)}?"
        elif isinstance(table := find_spot(self.root, path[:-1]), type):
            names = ", ".join(spell((*path[:-1], name)) for name in table.model_fields)
            hint = f"there are {names}."
        else:
            hint = "docs/settings.md lists all."
        return f"There is no setting {spell(path)}{place}; {hint}"

    def _nearest(self, path: SettingPath) -> SettingPath | None:
        """The known name that looks most like `path`, in its table or in another one."""
        best, best_likeness = None, (False, 0.0)
        is_in_table = len(path) > 1
        given = [step for step in path if isinstance(step, int)]
        for known in self._known_paths(given[0] if given else 0):
            last = _likeness(str(known[-1]), str(path[-1]))
            whole = _likeness(variable_name(known), variable_name(path))
            is_near = known[:-1] == path[:-1]
            is_likely = last > (0.65 if is_near else 0.85) or whole > 0.9
            likeness = (is_near and is_in_table, max(last, whole))
            if is_likely and likeness > best_likeness:
                best, best_likeness = known, likeness
        return best

    def _known_paths(self, entry: int) -> Iterator[SettingPath]:
        for path, _ in iter_settings(self.root):
            known = tuple(entry if isinstance(step, int) else step for step in path)
            yield from (known[:length] for length in range(1, len(known) + 1))


def _likeness(known: str, given: str) -> float:
    return SequenceMatcher(None, known, given).ratio()


def _sortable(path: SettingPath) -> list[tuple[int, str]]:
    return [(step, "") if isinstance(step, int) else (-1, step) for step in path]


def _json(path: SettingPath, text: str, origin: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        raise InvalidSettings(f"{dotted(path)} ({origin}) must be written as JSON.") from None


# Places in the tree


def find_spot(root: type[Table], path: SettingPath) -> Spot | None:
    """What the settings have at `path`; None if there is no such place."""
    spot: Spot = root
    for step in path:
        if isinstance(spot, ListOf) and isinstance(step, int):
            spot = spot.table
        elif isinstance(spot, type) and isinstance(step, str) and step in spot.model_fields:
            spot = spot_of(spot.model_fields[step])
        else:
            return None
    return spot


def spot_of(setting: FieldInfo) -> Spot:
    """Whether a field is a table, a list of tables or a setting."""
    kind = setting.annotation
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if isinstance(item, type) and issubclass(item, Table):
            return ListOf(item)
    if isinstance(kind, type) and issubclass(kind, Table):
        return kind
    return setting


def iter_settings(
    table: type[Table], path: SettingPath = ()
) -> Iterator[tuple[SettingPath, FieldInfo]]:
    """Every setting in the order of the tree; of a list of tables those of its entry 0."""
    for name, setting in table.model_fields.items():
        spot = spot_of(setting)
        if isinstance(spot, FieldInfo):
            yield (*path, name), spot
        elif isinstance(spot, ListOf):
            yield from iter_settings(spot.table, (*path, name, 0))
        else:
            yield from iter_settings(spot, (*path, name))


# Names and values, for a person


def dotted(path: SettingPath) -> str:
    """A setting's name, such as `upstreams[0].base_url`."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return "".join(steps).removeprefix(".")


def variable_name(path: SettingPath) -> str:
    """A setting's environment variable, such as `PENSTOCK_UPSTREAMS__0__BASE_URL`."""
    return PREFIX + "__".join(str(step).upper() for step in path)


def show(value: object) -> str:
    """A value in force; secrets are `***`."""
    if isinstance(value, tuple):
        items = cast("tuple[object, ...]", value)
        shown = (f'"{item}"' if isinstance(item, str) else show(item) for item in items)
        return f"[{', '.join(shown)}]"
    if isinstance(value, dict):
        entries = cast("dict[str, object]", value)
        return f"{{{', '.join(f'{json.dumps(key)}: {show(entries[key])}' for key in entries)}}}"
    if isinstance(value, Table):
        given = (name for name in type(value).model_fields if getattr(value, name) is not None)
        return f"{{{', '.join(f'{name}: {show(getattr(value, name))}' for name in given)}}}"
    if isinstance(value, SecretStr):
        return "***"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return _without_password(str(value))


def _as_written(value: object) -> str:
    text = _without_password(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 100 else text[:100] + "…"


def _without_password(text: str) -> str:
    return re.sub(r"(://)[^/@\s]*@", r"\1***@", text)


def _is_secret(setting: FieldInfo) -> bool:
    return "SecretStr" in repr(setting.annotation)
