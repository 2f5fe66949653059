"""Bytes in, typed values out; or the field that is wrong."""

import base64
import binascii
import re
from typing import Any, TypeVar, cast

import msgspec
from msgspec import inspect

from penstock.upstream.translation.base import Image, Untranslatable

T = TypeVar("T")

_PATH = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?$", re.S)
_STEP = re.compile(r"\[[^\]]*\]|[^.\[]+")
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>.*)`$", re.S)
_MISSING = re.compile(r"^Object missing required field `(?P<name>.*)`$", re.S)
_DATA_URL = re.compile(r"data:(?P<type>[\w.+/-]*)(?:;[\w.+=-]+)*?;base64,(?P<data>.*)", re.S)
_NO_JSON = (
    msgspec.DecodeError,  # not JSON, or not of this form
    UnicodeDecodeError,
    RecursionError,
)


def decode(
    decoder: "msgspec.json.Decoder[T]", body: bytes | msgspec.Raw, prefix: str = ""
) -> T:
    """Decode a line's body, or a part of it.

    Args:
        prefix: Where the part stands; empty for the body itself.

    Raises:
        Untranslatable: It has another form.
    """
    try:
        bytes(body).decode()
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _explain(str(error), prefix, decoder.type) from error
    except _NO_JSON as error:
        raise Untranslatable(prefix, f"This is not valid JSON: {error}.") from error


def find(decoder: "msgspec.json.Decoder[T]", body: bytes) -> T | None:
    """Decode what a provider sent; None if it is something else."""
    try:
        body.decode()
        return decoder.decode(body)
    except _NO_JSON:
        return None


def _explain(told: str, prefix: str, type_: object) -> Untranslatable:
    parts = _PATH.match(told)
    what = parts["what"] if parts else told
    path = (parts["path"] if parts else None) or ""
    if unknown := _UNKNOWN.match(what):
        field = join(join(prefix, path), unknown["name"])
        return Untranslatable(field, "This field is not known here, so it is not translated.")
    if missing := _MISSING.match(what):
        field = join(join(prefix, path), missing["name"])
        return Untranslatable(field, "This field is required.")
    allowed = _allowed(type_, path)
    more = f"; allowed: {', '.join(map(repr, allowed))}" if allowed else ""
    return Untranslatable(join(prefix, path), f"{what}{more}.")


def _allowed(type_: object, path: str) -> list[object]:
    """The values that may stand at a path, if these are few."""
    here = _spread(inspect.type_info(type_))
    names = _STEP.findall(path)
    for position, name in enumerate(names):
        structs = [each for each in here if isinstance(each, inspect.StructType)]
        if name.startswith("["):
            lists = [each for each in here if isinstance(each, inspect.ListType)]
            here = [found for each in lists for found in _spread(each.item_type)]
            continue
        if position == len(names) - 1:
            tags = [each.tag for each in structs if each.tag_field == name]
            if tags:
                return [tag for tag in tags if tag is not None]
        fields = [field for each in structs for field in each.fields]
        here = [found for f in fields if f.encode_name == name for found in _spread(f.type)]
    literals = [each for each in here if isinstance(each, inspect.LiteralType)]
    return list(dict.fromkeys(value for each in literals for value in each.values))


def _spread(type_: inspect.Type) -> list[inspect.Type]:
    return list(type_.types) if isinstance(type_, inspect.UnionType) else [type_]


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name and name[0] != "[" else f"{path}{name}"


_decode_object = msgspec.json.Decoder(dict[str, Any])


def read_arguments(text: str, field: str) -> dict[str, Any]:
    """The arguments of a tool call; models write nothing where they mean an empty object.

    Raises:
        Untranslatable: They are not a JSON object, and no provider takes anything else.
    """
    if not text.strip():
        return {}
    try:
        return _decode_object.decode(text)
    except _NO_JSON as error:
        message = f"The arguments of a call must be the text of a JSON object: {error}."
        raise Untranslatable(field, message) from error


def read_image(url: str, field: str) -> Image:
    """An image by its address or as a data URL.

    Raises:
        Untranslatable: It is neither.
    """
    if url.startswith(("https://", "http://")):
        return Image(field=field, url=url)
    found = _DATA_URL.fullmatch(url)
    if found is None:
        raise Untranslatable(
            field, "An image must be an http or https URL, or `data:TYPE;base64,DATA`."
        )
    data = found["data"]
    try:
        if not base64.b64decode(data, validate=True):
            raise Untranslatable(field, "The data of an image must not be empty.")
    except (binascii.Error, ValueError) as error:
        raise Untranslatable(field, f"The data is not base64: {error}.") from error
    return Image(field=field, media_type=found["type"].lower(), data=data)


def read_schema(schema: object, field: str) -> dict[str, Any]:
    if not isinstance(schema, dict):
        raise Untranslatable(field, "A JSON schema must be an object.")
    return cast("dict[str, Any]", schema)
