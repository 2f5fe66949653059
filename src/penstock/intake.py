"""Judge an uploaded file while its bytes pass on their way to storage.

A file is refused from within the stream that is being stored, as soon as it can be, so a
refused or cut upload is never kept and nothing has to be cleaned up. Its purpose, on which
the rules depend, may come after it: what cannot be judged before is judged at the end.
"""

import hashlib
import unicodedata
from collections.abc import AsyncIterator, Mapping
from typing import Protocol

import msgspec

from penstock.errors import InvalidRequest
from penstock.model import UPLOAD_PURPOSES, Purpose
from penstock.refusals import (
    above_maximum,
    below_minimum,
    missing_parameter,
    quoted,
    unknown_parameter,
    unsupported,
    wrong_type,
)

MAX_FILENAME_CHARS = 255
MIN_FILE_LIFE_S = 3600
MAX_FILE_LIFE_S = 30 * 86400
_ANCHOR = "expires_after.anchor"
_SECONDS = "expires_after.seconds"
_FIELDS = ("purpose", _ANCHOR, _SECONDS)
_HEAD_BYTES = 1 << 20
"""How much of a first line is held to judge it; of a longer one only the start is judged."""
_FORM_BYTES = 4 << 20
"""The most that a form can be larger than the file in it."""
_NO_OBJECT = "its first line is not a JSON object"


class FileForm(Protocol):
    """An upload that is still arriving, its parts in any order."""

    @property
    def fields(self) -> Mapping[str, str]:
        """The small fields that have arrived; all of them once `content` has ended.
        Nested names are dotted: `expires_after.seconds`."""
        ...

    @property
    def filename(self) -> str:
        """The name that the client gave its file; empty if it gave none or not yet."""
        ...

    @property
    def declared_bytes(self) -> int | None:
        """How long the whole form is said to be; None if it is not said."""
        ...

    def content(self) -> AsyncIterator[bytes]:
        """The bytes of the one file as they arrive; ends when the whole form has arrived.

        Raises:
            InvalidRequest: The form is not well made, was cut, or has not exactly one file.
        """
        ...


class Intake:
    """Counts, hashes and judges the file of one form.

    All but `chunks` is of use once the last chunk has passed.
    """

    def __init__(
        self, form: FileForm, *, input_file_bytes: int, upload_file_bytes: int
    ) -> None:
        self._form = form
        self._input_file_bytes = input_file_bytes
        self._upload_file_bytes = upload_file_bytes
        self._digest = hashlib.sha256()
        self._first_line = _FirstLine()
        self._is_judged = False
        self.bytes = 0

    async def chunks(self) -> AsyncIterator[bytes]:
        """The form's file.

        Raises:
            InvalidRequest: It is refused, which may be in the middle or at the very end.
        """
        async for chunk in self._form.content():
            self.bytes += len(chunk)
            self._digest.update(chunk)
            self._first_line.feed(chunk)
            self._judge_so_far()
            yield chunk
        self._judge_whole()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    @property
    def purpose(self) -> Purpose:
        return read_purpose(self._form.fields.get("purpose"))

    @property
    def filename(self) -> str:
        return safe_filename(self._form.filename)

    @property
    def life_s(self) -> int | None:
        """How long its uploader wants it to be kept, in seconds; None if that is not said."""
        return _read_life(self._form.fields)

    def _judge_so_far(self) -> None:
        purpose = self.purpose if "purpose" in self._form.fields else None
        limit = self._limit(purpose)
        declared = self._form.declared_bytes or 0
        if self.bytes > limit or declared > limit + _FORM_BYTES:
            raise self._too_large(limit, purpose)
        if purpose is Purpose.BATCH and self._first_line.is_whole:
            self._judge_first_line()

    def _judge_whole(self) -> None:
        for name in self._form.fields:
            if name not in _FIELDS:
                raise unknown_parameter(name)
        purpose = self.purpose
        _read_life(self._form.fields)
        if self.bytes > self._limit(purpose):
            raise self._too_large(self._limit(purpose), purpose)
        if purpose is Purpose.BATCH:
            self._judge_first_line()

    def _judge_first_line(self) -> None:
        if self._is_judged:
            return
        fault = self._first_line.fault()
        if fault is not None:
            raise InvalidRequest(f"Invalid file format for Batch API. Must be .jsonl: {fault}.")
        self._is_judged = True

    def _limit(self, purpose: Purpose | None) -> int:
        if purpose is None:
            return max(self._input_file_bytes, self._upload_file_bytes)
        is_input = purpose is Purpose.BATCH
        return self._input_file_bytes if is_input else self._upload_file_bytes

    def _too_large(self, limit: int, purpose: Purpose | None) -> InvalidRequest:
        declared = self._form.declared_bytes
        size = f"more than {limit}" if declared is None else str(declared)
        kind = "" if purpose is None else f" of purpose '{purpose}'"
        return InvalidRequest(
            f"File is too large. A file{kind} may have up to {limit} bytes; this upload has "
            f"{size} bytes.",
            param="file",
        )


class _FirstLine:
    """The first line of a file that is not blank, as far as it is needed to judge it."""

    def __init__(self) -> None:
        self._line = bytearray()
        self.is_whole = False

    def feed(self, chunk: bytes) -> None:
        if self.is_whole:
            return
        if not self._line:
            chunk = chunk.lstrip(b"\xef\xbb\xbf \t\r\n")  # a byte order mark is let pass
        end = chunk.find(b"\n")
        self._line += chunk if end < 0 else chunk[:end]
        self.is_whole = end >= 0 or len(self._line) > _HEAD_BYTES

    def fault(self) -> str | None:
        """What is wrong with it; None if it is, or may be, a JSON object."""
        if not self._line:
            return "the file is empty"
        if len(self._line) > _HEAD_BYTES:
            return None if self._line.startswith(b"{") else _NO_OBJECT
        try:
            msgspec.json.decode(self._line, type=dict[str, msgspec.Raw])
        except (ValueError, RecursionError):
            return _NO_OBJECT
        return None


def safe_filename(name: str) -> str:
    """The last part of a path-like name, without control characters.

    If nothing is left of it: `upload`.
    """
    last = name.replace("\\", "/").rpartition("/")[2]
    kept = "".join(char for char in last if unicodedata.category(char) not in ("Cc", "Cs"))
    kept = kept.strip()[:MAX_FILENAME_CHARS]
    return "upload" if kept in ("", ".", "..") else kept


def read_purpose(text: str | None) -> Purpose:
    """
    Raises:
        InvalidRequest: There is none, or a client may not upload files of it.
    """
    if text is None:
        raise missing_parameter("purpose")
    if text not in UPLOAD_PURPOSES:
        raise unsupported(text, UPLOAD_PURPOSES, param="purpose")
    return Purpose(text)


def _read_life(fields: Mapping[str, str]) -> int | None:
    anchor, seconds = fields.get(_ANCHOR), fields.get(_SECONDS)
    if anchor is None and seconds is None:
        return None
    if anchor is None:
        raise missing_parameter(_ANCHOR)
    if seconds is None:
        raise missing_parameter(_SECONDS)
    if anchor != "created_at":
        raise unsupported(anchor, ["created_at"], param=_ANCHOR)
    return _read_seconds(seconds)


def _read_seconds(text: str) -> int:
    if not (text.isascii() and text.removeprefix("-").isdigit()):
        raise wrong_type(_SECONDS, expected="an integer", given=f"'{quoted(text)}'")
    # int() refuses the longest numbers; 20 digits are enough to see that one is too large.
    seconds = int(text[:20])
    if seconds < MIN_FILE_LIFE_S:
        raise below_minimum(_SECONDS, text, MIN_FILE_LIFE_S)
    if seconds > MAX_FILE_LIFE_S:
        raise above_maximum(_SECONDS, text, MAX_FILE_LIFE_S)
    return seconds
