"""Multipart forms, read as they arrive.

The parts come in any order: Python's client sends the file last, Node's sends it first, with
its purpose after it. So a form is not collected and then read, but handed on while it comes:
what is held is one piece of the file and the small fields.
"""

import logging
from collections.abc import AsyncIterator, Mapping

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, MultipartState, parse_options_header

from penstock.errors import InvalidRequest
from penstock.refusals import missing_parameter, quoted

MAX_PARTS = 32
MAX_FIELD_BYTES = 64 << 10
PIECE_BYTES = 256 << 10
"""How much of the file is handed on at once: storage takes small pieces slowly."""

# What is wrong with a form is told to its sender; the parser would log it as well.
logging.getLogger("python_multipart").setLevel(logging.ERROR)


class UploadForm:
    """A form with one file and small fields around it.

    Args:
        content: What the file is called in the form.
    """

    def __init__(
        self,
        body: AsyncIterator[bytes],
        *,
        content: str,
        content_type: str,
        content_length: str | None,
    ) -> None:
        is_number = content_length is not None and content_length.isdecimal()
        self.declared_bytes = int(content_length[:20]) if content_length and is_number else None
        self._body = body
        self._content = content
        self._parts = _Parts(content)
        self._parser = _make_parser(content_type, self._parts)

    @property
    def fields(self) -> Mapping[str, str]:
        return self._parts.fields

    @property
    def filename(self) -> str:
        return self._parts.filename or ""

    async def content(self) -> AsyncIterator[bytes]:
        async for chunk in self._body:
            self._parse(chunk)
            if self._parts.has_ended:
                break
            if self._parts.content_bytes >= PIECE_BYTES:
                yield self._parts.take_content()
        if not self._parts.has_ended:
            raise InvalidRequest("The form is cut: it ends before its last boundary.")
        if self._parts.filename is None:
            raise missing_parameter(self._content)
        if self._parts.content_bytes:
            yield self._parts.take_content()

    def _parse(self, chunk: bytes) -> None:
        # The end of a part begins with a carriage return, and to look for one takes a small
        # part of the time that it takes to look for a boundary. Without one all is content,
        # unless the end has begun already: `index` tells how much of it was there.
        parser = self._parser
        if (
            self._parts.is_in_content
            and parser.state == MultipartState.PART_DATA
            and not parser.index
            and b"\r" not in chunk
        ):
            self._parts.add_content(chunk)
            return
        try:
            parser.write(chunk)
        except FormParserError as error:
            raise InvalidRequest(f"The form is not valid multipart: {error}.") from None


def read_form(request: Request, *, content: str = "file") -> UploadForm:
    """The form that a request brings.

    Args:
        content: What its one file is called.

    Raises:
        InvalidRequest: The request does not say that it brings one.
    """
    return UploadForm(
        request.stream(),
        content=content,
        content_type=request.headers.get("content-type", ""),
        content_length=request.headers.get("content-length"),
    )


class _Parts:
    """Sorts what the parser finds: content of the file aside, fields under their names."""

    def __init__(self, content: str) -> None:
        self._content_name = content
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.has_ended = False
        self.is_in_content = False
        """Whether what comes is the file, until the end of its part."""
        self.content_bytes = 0
        """How many bytes of the file wait for `take_content`."""
        self._count = 0
        self._content: list[bytes] = []
        self._headers: dict[bytes, bytes] = {}
        self._header_name = b""
        self._header_value = b""
        self._name = ""
        self._value = bytearray()

    def take_content(self) -> bytes:
        """The bytes of the file that were found since the last call."""
        content = b"".join(self._content)
        self._content.clear()
        self.content_bytes = 0
        return content

    def add_content(self, data: bytes) -> None:
        """Take more of the file."""
        self._content.append(data)
        self.content_bytes += len(data)

    def on_part_begin(self) -> None:
        self._count += 1
        if self._count > MAX_PARTS:
            raise InvalidRequest(f"The form has more than {MAX_PARTS} parts.")
        self._headers = {}
        self._value = bytearray()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        if b"name" not in options:
            raise InvalidRequest("A part of the form has no name.")
        self._name = _dotted(options[b"name"].decode("utf-8", "replace"))
        if self._name == self._content_name:
            if self.filename is not None:
                raise InvalidRequest("The form has more than one file.", param=self._name)
            self.filename = _unescaped(options.get(b"filename", b""))
            self.is_in_content = True
        elif self._name in self.fields:
            raise InvalidRequest(
                f"The form has more than one '{quoted(self._name)}'.", param=quoted(self._name)
            )

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self.is_in_content:
            self.add_content(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            raise InvalidRequest(
                f"Invalid '{quoted(self._name)}': longer than {MAX_FIELD_BYTES} bytes.",
                param=quoted(self._name),
            )

    def on_part_end(self) -> None:
        if not self.is_in_content:
            self.fields[self._name] = self._value.decode("utf-8", "replace")
        self.is_in_content = False

    def on_end(self) -> None:
        self.has_ended = True


def _make_parser(content_type: str, parts: _Parts) -> MultipartParser:
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequest(
            "A file is uploaded as a form: the Content-Type must be multipart/form-data with "
            f"a boundary, but it is '{quoted(content_type)}'."
        )
    try:
        return MultipartParser(
            boundary,
            {
                "on_part_begin": parts.on_part_begin,
                "on_header_field": parts.on_header_field,
                "on_header_value": parts.on_header_value,
                "on_header_end": parts.on_header_end,
                "on_headers_finished": parts.on_headers_finished,
                "on_part_data": parts.on_part_data,
                "on_part_end": parts.on_part_end,
                "on_end": parts.on_end,
            },
        )
    except FormParserError as error:
        raise InvalidRequest(f"The form is not valid multipart: {error}.") from None


def _unescaped(filename: bytes) -> str:
    """A name as its sender had it: three characters are escaped, and nothing else is.

    https://html.spec.whatwg.org/multipage/form-control-infrastructure.html#multipart-form-data
    """
    for escaped, plain in ((b"%22", b'"'), (b"%0D", b"\r"), (b"%0A", b"\n")):
        filename = filename.replace(escaped, plain)
    return filename.decode("utf-8", "replace")


def _dotted(name: str) -> str:
    """`expires_after[seconds]` as `expires_after.seconds`, which Azure's clients send."""
    return name.replace("[", ".").replace("]", "")
