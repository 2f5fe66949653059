"""Bytes in, slices of checked lines or faults out.

An input file may be larger than memory, so it is read as it arrives: what is held is the
longest line, eight bytes a line for finding duplicates, and one row a slice.

Lines end at `\\n` and nowhere else. `str.splitlines` would also cut at U+2028 and U+0085,
which JSON allows inside a string, and turn one good line into two broken ones. A byte order
mark, `\\r\\n` and blank lines are accepted; line numbers are the file's own, from 1.

Each line is decoded once, into the few fields that routing needs. Only a line that does not
pass is looked at again, slowly, to say all that is wrong with it.
"""

import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import msgspec

from penstock.model import ENDPOINTS, Endpoint, Fault, find_endpoint
from penstock.request_lines import iter_requests

BOM = b"\xef\xbb\xbf"
MAX_CUSTOM_ID_CHARS = 512
"""Longest `custom_id`; OpenAI publishes no limit."""
MAX_NESTING = 500
"""How deep arrays and objects of a line may lie in each other, its own object counted.

A decoder gives up at the interpreter's recursion limit, 1000, less the depth of the call that
it runs in. That depth is one where a file is checked and another where a worker reads it, a few
dozen in both; so the bound is half of the limit, and what passes here can be read there."""
_READ_BYTES = 1 << 20
_SMALL_SLICE = 256
_SLICES_BEFORE = 16
"""Of how many slices of its size the file must consist before a larger one begins."""
_PARTS = 256
_EMBEDDINGS = "/v1/embeddings"
_TOLD_MODELS = 20
# Each level takes a byte to open and one to close.
_SURELY_FLAT_BYTES = 2 * MAX_NESTING
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.S)
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # up and, as a signed byte, down
_NO_STEPS = bytes(set(range(256)) - set(b"[{]}"))
_SEVERAL = re.compile(rb"\[\s*[^\s0-9-]")
_NOT_JSON = "This line is not parseable as valid JSON."


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRules:
    """What an input file must hold to."""

    endpoint: Endpoint | None
    """Which endpoint every line must name; None takes it from the first line that names one."""
    max_requests: int
    max_line_bytes: int
    max_embedding_inputs: int
    """The most inputs of all lines together, if the lines ask for embeddings."""
    max_faults: int
    """How many faults are told; the others are only counted."""
    one_model: bool
    """Whether all lines must name the same model."""
    slice_requests: int
    """The most requests of one slice; see `slice_size`."""
    slice_bytes: int
    """The most bytes of one slice, unless a single line is longer."""
    accepts_model: Callable[[str], bool] | None = None
    """Whether an upstream serves this model; None accepts every model."""
    served_models: tuple[str, ...] = ()
    """The models that `accepts_model` accepts, by name or pattern, as a message tells them."""
    way_of: Callable[[str], str] | None = None
    """The way that lines of a model go: lines of different ways share no slice. None: all go
    the same way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicePlan:
    """A run of neighbouring requests; the fields are those of `model.Slice`."""

    start: int
    end: int
    first_line: int
    requests: int
    models: tuple[str, ...]
    bytes: int
    """Of its own lines; less than its range has where it shares that with others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedInput:
    """What is known of an input file once all of it was read."""

    total: int
    """How many requests it holds."""
    faults: list[Fault]
    """Those of the whole file, then those of its lines in their order; empty if it is good. If
    there were more than `max_faults`, a last entry says how many."""
    slices: list[SlicePlan]
    """In input order. Only of use without faults."""
    models: list[str]
    """The models that its requests name, in the order of their first appearance."""
    endpoint: Endpoint | None
    """The given endpoint or the one found; None if no line names one."""


class _CustomId(msgspec.Struct):
    custom_id: str


class _Input(msgspec.Struct):
    input: msgspec.Raw


class _InputLine(msgspec.Struct):
    body: _Input


_decode_custom_id = msgspec.json.Decoder(_CustomId).decode
_decode_any = msgspec.json.Decoder().decode
_decode_input = msgspec.json.Decoder(_InputLine).decode
_decode_items = msgspec.json.Decoder(list[msgspec.Raw]).decode


def slice_size(before: int, most: int) -> int:
    """How many requests a slice may hold.

    Each slice costs a claim, a segment and a report, so large ones are cheaper; but a file of
    a few thousand lines must be enough for several workers. So slices grow with the file.

    Args:
        before: How many requests of the file stand before it.
        most: What the settings allow.
    """
    return min(max(before // _SLICES_BEFORE, _SMALL_SLICE), most)


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
        self._skipped = 0
        self._total = 0
        self._faults: list[Fault] = []
        self._faults_before: list[Fault] = []
        self._fault_count = 0
        self._inputs = 0
        self._slices: list[SlicePlan] = []
        self._open = _OpenSlice()
        self._slice_requests = slice_size(0, rules.slice_requests)
        # The served models that are named, and whether a good line may name them.
        self._models: dict[str, bool] = {}
        self._model = ""
        self._model_line = 0
        # 64-bit hashes of the custom IDs, spread over small arrays: a set of all of them
        # would cost ten times as much, and one array at a time is enough to compare.
        self._hashes = [array("q") for _ in range(_PARTS)]
        self._suspects: set[int] | None = None
        self._first_seen: dict[str, int] = {}

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the file, in pieces of any size."""
        end = data.rfind(b"\n") + 1
        if not end:
            self._hold(data)
            return
        block = b"".join([*self._carry, data[:end]]) if self._carry else data[:end]
        self._carry.clear()
        self._carry_bytes = 0
        self._take_lines(block)
        self._hold(data[end:])

    def finish(self) -> CheckedInput | None:
        """Say what the file holds, or return None: then feed all of it once more."""
        if self._carry or self._is_skipping:
            block = b"".join(self._carry)
            self._carry.clear()
            self._carry_bytes = 0
            self._take_lines(block)
        if self._suspects is None:
            self._close_slice()
            self._suspects = self._equal_hashes()
            if self._suspects:
                self._offset = self._line = 0
                self._faults_before, self._faults = self._faults, []
                return None
        return self._result()

    # Lines

    def _hold(self, data: bytes) -> None:
        if not data:
            return
        if self._is_skipping:
            self._offset += len(data)
            self._skipped += len(data)
            return
        self._carry.append(data)
        self._carry_bytes += len(data)
        if self._carry_bytes > self._rules.max_line_bytes + len(BOM):
            has_mark = self._offset == 0 and b"".join(self._carry).startswith(BOM)
            self._skipped = self._carry_bytes - (len(BOM) if has_mark else 0)
            self._offset += self._carry_bytes
            self._carry.clear()
            self._carry_bytes = 0
            self._is_skipping = True

    def _take_lines(self, block: bytes) -> None:
        """Take whole lines, each with its line end; only the last one of a file may lack it."""
        lines = BytesIO(block).readlines()  # which leaps to the next end; `split` walks
        if self._is_skipping:
            self._is_skipping = False
            rest = lines.pop(0) if lines else b""
            self._line += 1
            self._offset += len(rest)
            self._too_long(self._skipped + _length(rest))
        if self._offset == 0 and lines and lines[0].startswith(BOM):
            lines[0] = lines[0][len(BOM) :]
            self._offset = len(BOM)
        if self._suspects is None:
            self._check(lines, is_utf8=_is_utf8(block))
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
            offset += len(text)
            if len(text) > max_bytes and _length(text) > max_bytes:
                self._line = number
                self._too_long(_length(text))
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
                    and (len(text) <= _SURELY_FLAT_BYTES or not _is_too_deep(text))
                    and (self._models.get(named) or self._take_model(named, number))
                )
                if is_good and self._counts_inputs:
                    self._inputs += _count_inputs(request.body.input)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                is_good = False
            if is_good and model:
                hashed = hash(custom_id)
                hashes[hashed & 0xFF].append(hashed)
            else:
                self._line = number
                model = self._explain(text.removesuffix(b"\n"))
                if model is None:
                    continue
            self._add_to_slice(start, offset, number, model)
        self._offset, self._line = offset, number

    def _add_to_slice(self, start: int, end: int, line: int, model: str) -> None:
        opened = self._open
        if opened.requests and (
            opened.requests >= self._slice_requests
            or end - opened.start > self._rules.slice_bytes
        ):
            self._close_slice()
            opened = self._open
        if not opened.requests:
            opened.start = start
            opened.first_line = line
        opened.end = end
        opened.requests += 1
        counts = opened.models.get(model)
        if counts is None:
            counts = opened.models[model] = [0, 0]
        counts[0] += 1
        counts[1] += end - start
        self._total += 1

    def _close_slice(self) -> None:
        if self._open.requests and not self._fault_count:
            self._slices += self._open.plans(self._rules.way_of)
        self._open = _OpenSlice()
        self._slice_requests = slice_size(self._total, self._rules.slice_requests)

    def _take_model(self, model: str, line: int) -> bool:
        """Whether a line may name this model in which nothing else is wrong."""
        if not model or not self._is_served(model):
            return False
        if not self._model_line:
            self._model, self._model_line = model, line
        self._models[model] = not self._rules.one_model or model == self._model
        return self._models[model]

    def _is_served(self, model: str) -> bool:
        accepts = self._rules.accepts_model
        return model in self._models or accepts is None or accepts(model)

    def _prepare_endpoint(self) -> None:
        endpoint = self._endpoint or next(iter(ENDPOINTS.values()))
        self._decode = _line_decoder(endpoint)
        self._counts_inputs = endpoint.path == _EMBEDDINGS
        path = endpoint.path
        # Without an endpoint no line passes at once, so the first one is looked at slowly.
        self._urls = {path, path.removeprefix("/v1")} if self._endpoint else set[str]()

    # Faults

    def _fault(self, code: str, message: str, param: str | None = None) -> None:
        self._fault_count += 1
        if len(self._faults) < self._rules.max_faults:
            self._faults.append(Fault(code=code, message=message, param=param, line=self._line))

    def _too_long(self, length: int) -> None:
        if self._suspects is None:
            self._total += 1
            self._fault(
                "line_too_long",
                f"This line is longer than {self._rules.max_line_bytes} bytes: "
                f"it has {length}.",
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
        if self._counts_inputs:
            self._inputs += _inputs_of_line(text)
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
        if model is not None:
            self._take_model(model, self._line)
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
            is_too_deep = _is_too_deep(text)
        except RecursionError:
            value, is_too_deep = None, True
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._fault("invalid_json_line", f"{_NOT_JSON} {_sentence(error)}")
            return None
        if is_too_deep:
            self._fault(
                "invalid_json_line",
                f"{_NOT_JSON} It is nested too deeply; {MAX_NESTING} levels are allowed.",
            )
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
        fields = cast("dict[str, object]", body)
        model = fields.get("model")
        is_model = isinstance(model, str) and model != ""
        for name in self._endpoint.required if self._endpoint else ("model",):
            if name not in fields or (name == "model" and not is_model):
                was = f" It must be a name, but is {_named(model)}." if name in fields else ""
                self._fault(
                    "invalid_request",
                    f"{name.capitalize()} parameter is required.{was}",
                    f"body.{name}",
                )
        if is_model:
            self._explain_model(str(model))
        if fields.get("stream") not in (None, False):
            self._fault(
                "streaming_unsupported",
                f"{_title(self._endpoint)}Streaming is not supported in the Batch API. "
                "Leave out 'stream'.",
                "body.stream",
            )
        return str(model) if is_model else None

    def _explain_model(self, model: str) -> None:
        if not self._is_served(model):
            self._fault(
                "model_not_found",
                f"The provided model {_shown(model)} is not supported by the Batch API. "
                f"{_told_models(self._rules.served_models)}",
                "body.model",
            )
            return
        self._models.setdefault(model, not self._rules.one_model)
        if self._rules.one_model and self._model_line and model != self._model:
            self._fault(
                "mismatched_model",
                f"The model {_shown(model)} of this line is not {_shown(self._model)}, which "
                f"line {self._model_line} names; all lines of a batch must name the same one.",
                "body.model",
            )

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
            self._offset += len(text)
            if _length(text) > self._rules.max_line_bytes:
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
                    f"The custom_id {_shown(custom_id)} of line {self._line} is already used "
                    f"by line {first}.",
                    "custom_id",
                )

    # The end

    def _result(self) -> CheckedInput:
        rules = self._rules
        faults = [
            *self._faults_of_file(),
            *sorted([*self._faults_before, *self._faults], key=lambda fault: fault.line or 0),
        ]
        count = self._fault_count + sum(fault.line is None for fault in faults)
        if count > rules.max_faults:
            faults[rules.max_faults :] = [
                Fault(
                    code="too_many_faults",
                    message=f"The input file has {count} faults; "
                    f"only the first {rules.max_faults} are listed.",
                )
            ]
        return CheckedInput(
            total=self._total,
            faults=faults,
            slices=self._slices,
            models=list(self._models),
            endpoint=self._endpoint,
        )

    def _faults_of_file(self) -> Iterator[Fault]:
        rules = self._rules
        if not self._total:
            yield Fault(
                code="empty_file",
                message="The input file holds no request; it must hold at least one.",
            )
        if self._total > rules.max_requests:
            yield Fault(
                code="too_many_tasks",
                message=f"The input file holds {self._total} requests; "
                f"at most {rules.max_requests} are allowed.",
            )
        if self._inputs > rules.max_embedding_inputs:
            yield Fault(
                code="too_many_embedding_inputs",
                message=f"The requests of the input file hold {self._inputs} inputs together; "
                f"at most {rules.max_embedding_inputs} are allowed.",
                param="body.input",
            )


@dataclass(slots=True)
class _OpenSlice:
    start: int = 0
    end: int = 0
    first_line: int = 0
    requests: int = 0
    models: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    """How many requests name each model, and how many bytes these have."""

    def plans(self, way_of: Callable[[str], str] | None) -> Iterator[SlicePlan]:
        """One slice; or where its requests go several ways, one for each, of the same range."""
        ways: dict[str, list[str]] = {}
        for model in self.models:
            ways.setdefault(way_of(model) if way_of else "", []).append(model)
        for models in ways.values():
            yield SlicePlan(
                start=self.start,
                end=self.end,
                first_line=self.first_line,
                requests=sum(self.models[model][0] for model in models),
                models=tuple(models),
                bytes=sum(self.models[model][1] for model in models),
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


def _length(text: bytes) -> int:
    """How many bytes a line has, without its line end."""
    return len(text) - text.endswith(b"\n")


def _is_too_deep(text: bytes) -> bool:
    """Whether valid JSON is nested deeper than `MAX_NESTING`."""
    # To count them would take longer: `replace` leaps from one to the next.
    arrays = len(text) - len(text.replace(b"[", b"", MAX_NESTING + 1))
    objects = len(text) - len(text.replace(b"{", b"", MAX_NESTING + 1))
    if arrays + objects <= MAX_NESTING:
        return False
    steps = _STRING.sub(b"", text).translate(_STEPS, _NO_STEPS)
    return max(accumulate(memoryview(steps).cast("b")), default=0) > MAX_NESTING


def _count_inputs(given: msgspec.Raw) -> int:
    """How many inputs one request for embeddings gives: a text or one list of tokens is 1."""
    return len(_decode_items(given)) if _SEVERAL.match(given) else 1


def _inputs_of_line(text: bytes) -> int:
    """The same of a whole line, which may be faulty; 0 if it gives none."""
    try:
        return _count_inputs(_decode_input(text).body.input)
    except msgspec.DecodeError:
        return 0


def _is_utf8(data: bytes) -> bool:
    # msgspec accepts invalid UTF-8 in fields that it skips, so the bytes are checked apart.
    if data.isascii():
        return True
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


def _named(value: object) -> str:
    """A value that should have been a name."""
    return "an empty string" if value == "" else _kind(value)


def _title(endpoint: Endpoint | None) -> str:
    """What OpenAI puts before some messages: `Chat Completions: `, and so on."""
    if endpoint is None:
        return ""
    return endpoint.path.removeprefix("/v1/").replace("/", " ").title() + ": "


def _told_models(served: tuple[str, ...]) -> str:
    if not served:
        return "No upstream serves it."
    told = ", ".join(_shown(model) for model in served[:_TOLD_MODELS])
    rest = len(served) - _TOLD_MODELS
    return f"The upstreams serve {told}{f' and {rest} more' if rest > 0 else ''}."
