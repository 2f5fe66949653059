"""Bytes in, checked request lines or faults out.

An input file may be larger than memory, so it is read as it arrives: what is held is the
longest line, eight bytes a line for finding duplicates, and one row a slice.

Lines end at `\\n` and nowhere else. `str.splitlines` would also cut at U+2028 and U+0085,
which JSON allows inside a string, and turn one good line into two broken ones. A byte order
mark, `\\r\\n` and blank lines are accepted; line numbers are the file's own, from 1.

Each line is decoded once, into the few fields that routing needs. Only a line that does not
pass is looked at again, slowly, to say all that is wrong with it.
"""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from penstock.model import ENDPOINTS, Endpoint, Fault, find_endpoint

BOM = b"\xef\xbb\xbf"
MAX_CUSTOM_ID_CHARS = 512
"""Longest `custom_id`; OpenAI publishes no limit."""
_READ_BYTES = 1 << 20
_PARTS = 256
_NOT_JSON = "This line is not parseable as valid JSON."


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRules:
    """What an input file must hold to."""

    endpoint: Endpoint | None
    """Which endpoint every line must name; None takes it from the first line that names one."""
    max_requests: int
    max_line_bytes: int
    max_faults: int
    """How many faults are told; the others are only counted."""
    slice_requests: int
    """The most requests of one slice."""
    slice_bytes: int
    """The most bytes of one slice, unless a single line is longer."""
    accepts_model: Callable[[str], bool] | None = None
    """Whether an upstream serves this model; None accepts every model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicePlan:
    """A run of neighbouring requests; the fields are those of `model.Slice`."""

    start: int
    end: int
    first_line: int
    requests: int
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedInput:
    """What is known of an input file once all of it was read."""

    total: int
    """How many requests it holds."""
    faults: list[Fault]
    """In line order; empty if the file is good. If there were more than `max_faults`, a last
    entry without a line says how many."""
    slices: list[SlicePlan]
    """In input order. Only of use without faults."""
    models: list[str]
    """The models that its requests name, in the order of their first appearance."""
    endpoint: Endpoint | None
    """The given endpoint or the one found; None if no line names one."""


@dataclass(frozen=True, slots=True)
class RequestLine:
    """One request, ready to be sent."""

    line: int
    """Its number in the input file, from 1."""
    custom_id: str
    body: bytes
    """Byte for byte as it stands in the file."""
    model: str


class _Envelope(msgspec.Struct):
    custom_id: str
    body: msgspec.Raw


class _CustomId(msgspec.Struct):
    custom_id: str


class _Model(msgspec.Struct):
    model: str


_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_custom_id = msgspec.json.Decoder(_CustomId).decode
_decode_model = msgspec.json.Decoder(_Model).decode
_decode_any = msgspec.json.Decoder().decode


def iter_requests(data: bytes, *, first_line: int) -> Iterator[RequestLine]:
    """Read the requests of a slice of a checked file.

    Args:
        data: The bytes of the slice.
        first_line: The number of its first line in the input file, from 1.
    """
    for line, text in enumerate(data.split(b"\n"), first_line):
        if text.strip():
            envelope = _decode_envelope(text)
            body = bytes(envelope.body)
            yield RequestLine(line, envelope.custom_id, body, _decode_model(body).model)


def _line_decoder(endpoint: Endpoint) -> Callable[[bytes], Any]:
    """A decoder that fails unless a line has all that `endpoint` requires."""
    required: list[tuple[str, Any]] = [
        (name, str if name == "model" else msgspec.Raw) for name in endpoint.required
    ]
    body = msgspec.defstruct("Body", [*required, ("stream", bool | None, None)])
    line = msgspec.defstruct(
        "Line", [("custom_id", str), ("method", str), ("url", str), ("body", body)]
    )
    return msgspec.json.Decoder(line).decode


class InputChecker:
    """Checks an input file piece by piece.

        checker = InputChecker(rules)
        while True:
            for piece in read(): checker.feed(piece)
            if (checked := checker.finish()) is not None: break

    A file is read a second time only if two of its `custom_id` seem to be equal.
    """

    def __init__(self, rules: InputRules) -> None:
        self._rules = rules
        self._endpoint = rules.endpoint
        self._prepare_endpoint()
        self._offset = 0
        self._line = 0
        self._carry: list[bytes] = []
        self._carry_bytes = 0
        self._is_skipping = False
        self._total = 0
        self._faults: list[Fault] = []
        self._fault_count = 0
        self._slices: list[SlicePlan] = []
        self._open = _OpenSlice()
        self._models: dict[str, bool] = {}
        # 64-bit hashes of the custom IDs, spread over small arrays: a set of all of them
        # would cost ten times as much, and one array at a time is enough to compare.
        self._hashes = [array("q") for _ in range(_PARTS)]
        self._suspects: set[int] | None = None
        self._first_seen: dict[str, int] = {}

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the file, in pieces of any size."""
        end = data.rfind(b"\n")
        if end < 0:
            self._hold(data)
            return
        block = b"".join([*self._carry, data[:end]]) if self._carry else data[:end]
        self._carry.clear()
        self._carry_bytes = 0
        self._take_lines(block, ends_line=True)
        self._hold(data[end + 1 :])

    def finish(self) -> CheckedInput | None:
        """Say what the file holds, or return None: then feed all of it once more."""
        if self._carry or self._is_skipping:
            block = b"".join(self._carry)
            self._carry.clear()
            self._carry_bytes = 0
            self._take_lines(block, ends_line=False)
        if self._suspects is None:
            self._close_slice()
            self._suspects = self._equal_hashes()
            if self._suspects:
                self._offset = self._line = 0
                return None
        return self._result()

    # Lines

    def _hold(self, data: bytes) -> None:
        if not data:
            return
        if self._is_skipping:
            self._offset += len(data)
            return
        self._carry.append(data)
        self._carry_bytes += len(data)
        if self._carry_bytes > self._rules.max_line_bytes + len(BOM):
            self._offset += self._carry_bytes
            self._carry.clear()
            self._carry_bytes = 0
            self._is_skipping = True

    def _take_lines(self, block: bytes, *, ends_line: bool) -> None:
        """Take whole lines; only the last one of a file may lack its line end."""
        lines = block.split(b"\n")
        if self._is_skipping:
            self._is_skipping = False
            self._line += 1
            self._offset += len(lines[0]) + ends_line
            self._too_long()
            del lines[0]
        if self._offset == 0 and lines and lines[0].startswith(BOM):
            lines[0] = lines[0][len(BOM) :]
            self._offset = len(BOM)
        if self._suspects is None:
            self._check(lines, is_utf8=_is_utf8(block))
            if not ends_line:
                self._offset -= 1
                self._open.end = min(self._open.end, self._offset)
        else:
            self._look_for_duplicates(lines)

    def _check(self, lines: list[bytes], *, is_utf8: bool) -> None:
        """The hot loop: one decode and a few comparisons for a good line."""
        max_bytes = self._rules.max_line_bytes
        hashes = self._hashes
        offset, number = self._offset, self._line
        for text in lines:
            number += 1
            start = offset
            offset += len(text) + 1
            if len(text) > max_bytes:
                self._line = number
                self._too_long()
                continue
            model: str | None = None
            custom_id = ""
            try:
                request = self._decode(text)
                custom_id = request.custom_id
                named: str = request.body.model
                model = named
                is_good = (
                    is_utf8
                    and request.url in self._urls
                    and request.method == "POST"
                    and not request.body.stream
                    and 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARS
                    and (self._models.get(named) or self._take_model(named))
                )
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                is_good = False
            if is_good and model:
                hashed = hash(custom_id)
                hashes[hashed & 0xFF].append(hashed)
            else:
                self._line = number
                model = self._explain(text)
                if model is None:
                    continue
            self._add_to_slice(start, offset, number, model)
        self._offset, self._line = offset, number

    def _add_to_slice(self, start: int, end: int, line: int, model: str) -> None:
        self._total += 1
        opened = self._open
        if opened.requests and (
            opened.requests >= self._rules.slice_requests
            or end - opened.start > self._rules.slice_bytes
        ):
            self._close_slice()
            opened = self._open
        if not opened.requests:
            opened.start = start
            opened.first_line = line
        opened.end = end
        opened.requests += 1
        opened.models[model] = None

    def _close_slice(self) -> None:
        if self._open.requests and not self._fault_count:
            self._slices.append(self._open.plan())
        self._open = _OpenSlice()

    def _take_model(self, model: str) -> bool:
        accepts = self._rules.accepts_model
        is_good = bool(model) and (accepts is None or accepts(model))
        if is_good:
            self._models[model] = True
        return is_good

    def _prepare_endpoint(self) -> None:
        endpoint = self._endpoint or next(iter(ENDPOINTS.values()))
        self._decode = _line_decoder(endpoint)
        path = endpoint.path
        # Without an endpoint no line passes at once, so the first one is looked at slowly.
        self._urls = {path, path.removeprefix("/v1")} if self._endpoint else set[str]()

    # Faults

    def _fault(self, code: str, message: str, param: str | None = None) -> None:
        self._fault_count += 1
        if len(self._faults) < self._rules.max_faults:
            self._faults.append(Fault(code=code, message=message, param=param, line=self._line))

    def _too_long(self) -> None:
        if self._suspects is None:
            self._total += 1
            self._fault(
                "line_too_long",
                f"This line is longer than {self._rules.max_line_bytes} bytes.",
            )

    def _explain(self, text: bytes) -> str | None:
        """Find all that is wrong with a line.

        Returns:
            The line's model if nothing is wrong after all; None for a blank or faulty line.
        """
        if not text.strip():
            return None
        faults_before = self._fault_count
        request = self._parse(text)
        if request is None:
            self._total += 1
            return None
        custom_id = self._explain_custom_id(request)
        self._explain_method(request)
        self._explain_url(request)
        model = self._explain_body(request)
        if custom_id is not None:
            hashed = hash(custom_id)
            self._hashes[hashed & 0xFF].append(hashed)
        if self._fault_count > faults_before:
            self._total += 1
            return None
        try:
            next(iter_requests(text, first_line=self._line), None)
        except msgspec.DecodeError:
            self._fault("invalid_json_line", f"{_NOT_JSON} It names a key twice.")
            self._total += 1
            return None
        return model

    def _parse(self, text: bytes) -> dict[str, Any] | None:
        try:
            text.decode()
        except UnicodeDecodeError as error:
            self._fault(
                "invalid_json_line",
                f"{_NOT_JSON} It is not valid UTF-8 at byte {error.start + 1} of the line.",
            )
            return None
        try:
            value = _decode_any(text)
        except RecursionError:
            self._fault("invalid_json_line", f"{_NOT_JSON} It is nested too deeply.")
            return None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._fault("invalid_json_line", f"{_NOT_JSON} {_sentence(error)}")
            return None
        if not isinstance(value, dict):
            self._fault(
                "invalid_json_line",
                f"{_NOT_JSON} It holds {_kind(value)} instead of an object.",
            )
            return None
        return value  # pyright: ignore[reportUnknownVariableType]

    def _explain_custom_id(self, request: dict[str, Any]) -> str | None:
        custom_id = request.get("custom_id")
        if "custom_id" not in request:
            self._missing("custom_id")
        elif not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARS:
            was = (
                f"{len(custom_id)} characters"
                if isinstance(custom_id, str)
                else _kind(custom_id)
            )
            self._fault(
                "invalid_custom_id",
                f"Invalid 'custom_id': expected a string of 1 to {MAX_CUSTOM_ID_CHARS} "
                f"characters, but got {was}.",
                "custom_id",
            )
        else:
            return custom_id
        return None

    def _explain_method(self, request: dict[str, Any]) -> None:
        if "method" not in request:
            self._missing("method")
        elif request["method"] != "POST":
            self._fault(
                "invalid_method",
                f"Invalid method: {_shown(request['method'])}. Only 'POST' is allowed.",
                "method",
            )

    def _explain_url(self, request: dict[str, Any]) -> None:
        url = request.get("url")
        if "url" not in request:
            self._missing("url")
            return
        if self._endpoint is None and isinstance(url, str):
            self._endpoint = find_endpoint(url)
            self._prepare_endpoint()
        if not isinstance(url, str) or url not in self._urls:
            wanted = (
                f"it must be '{self._endpoint.path}'"
                if self._endpoint
                else "supported are " + ", ".join(f"'{path}'" for path in ENDPOINTS)
            )
            self._fault(
                "invalid_url",
                "The URL provided for this request does not match the batch endpoint. "
                f"It is {_shown(url)}; {wanted}.",
                "url",
            )

    def _explain_body(self, request: dict[str, Any]) -> str | None:
        body = request.get("body")
        if "body" not in request:
            self._missing("body")
            return None
        if not isinstance(body, dict):
            self._fault(
                "invalid_type",
                f"Invalid type for 'body': expected an object, but got {_kind(body)} instead.",
                "body",
            )
            return None
        model = body.get("model")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        for name in self._endpoint.required if self._endpoint else ("model",):
            if name not in body or (name == "model" and not (isinstance(model, str) and model)):
                self._fault(
                    "invalid_request",
                    f"{name.capitalize()} parameter is required.",
                    f"body.{name}",
                )
        if isinstance(model, str) and model and not self._take_model(model):
            self._fault(
                "model_not_found",
                f"The provided model {_shown(model)} is not supported by the Batch API. "
                "No upstream in the settings serves it.",
                "body.model",
            )
        if body.get("stream") is True:  # pyright: ignore[reportUnknownMemberType]
            self._fault(
                "streaming_unsupported",
                "Streaming is not supported in the Batch API. Leave out 'stream'.",
                "body.stream",
            )
        return model if isinstance(model, str) else None

    def _missing(self, name: str) -> None:
        self._fault(
            "missing_required_parameter", f"Missing required parameter: '{name}'.", name
        )

    # Duplicates

    def _equal_hashes(self) -> set[int]:
        equal: set[int] = set()
        for part in self._hashes:
            if len(set(part)) != len(part):
                seen: set[int] = set()
                equal.update(value for value in part if value in seen or seen.add(value))
        self._hashes = []
        return equal

    def _look_for_duplicates(self, lines: list[bytes]) -> None:
        suspects = self._suspects or set()
        for text in lines:
            self._line += 1
            self._offset += len(text) + 1
            if len(text) > self._rules.max_line_bytes:
                continue
            try:
                custom_id = _decode_custom_id(text).custom_id
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                continue
            if hash(custom_id) not in suspects:
                continue
            first = self._first_seen.setdefault(custom_id, self._line)
            if first != self._line:
                self._fault(
                    "duplicate_custom_id",
                    f"The custom_id {_shown(custom_id)} of this line is already used by "
                    f"line {first}.",
                    "custom_id",
                )

    # The end

    def _result(self) -> CheckedInput:
        faults = sorted(self._faults, key=lambda fault: fault.line or 0)
        told = self._fault_count
        if not self._total:
            faults.append(
                Fault(
                    code="empty_file",
                    message="The input file holds no request; it must hold at least one.",
                )
            )
        elif self._total > self._rules.max_requests:
            faults.insert(
                0,
                Fault(
                    code="too_many_requests",
                    message=f"The input file holds {self._total} requests; "
                    f"at most {self._rules.max_requests} are allowed.",
                ),
            )
        if told > self._rules.max_faults:
            faults.append(
                Fault(
                    code="too_many_faults",
                    message=f"The input file has {told} faults; "
                    f"only the first {self._rules.max_faults} are listed.",
                )
            )
        return CheckedInput(
            total=self._total,
            faults=faults,
            slices=self._slices,
            models=list(self._models),
            endpoint=self._endpoint,
        )


@dataclass(slots=True)
class _OpenSlice:
    start: int = 0
    end: int = 0
    first_line: int = 0
    requests: int = 0
    models: dict[str, None] = field(default_factory=dict[str, None])

    def plan(self) -> SlicePlan:
        return SlicePlan(
            start=self.start,
            end=self.end,
            first_line=self.first_line,
            requests=self.requests,
            models=tuple(self.models),
        )


def check_file(path: Path, rules: InputRules) -> CheckedInput:
    """Check a file on disk, in bounded memory.

    Raises:
        OSError: The file cannot be read.
    """
    checker = InputChecker(rules)
    while True:
        with path.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                checker.feed(piece)
        if (checked := checker.finish()) is not None:
            return checked


def _is_utf8(data: bytes) -> bool:
    # msgspec accepts invalid UTF-8 in fields that it skips, so the bytes are checked apart.
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _sentence(error: Exception) -> str:
    text = str(error)
    return text[:1].upper() + text[1:].rstrip(".") + "."


_KINDS: dict[type, str] = {
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


def _kind(value: object) -> str:
    return _KINDS.get(type(value), "something else")


def _shown(value: object) -> str:
    """A value as a message shows it: short, and on one line."""
    text = repr(value) if isinstance(value, str) else _kind(value)
    return text if len(text) <= 100 else text[:99] + "…"
