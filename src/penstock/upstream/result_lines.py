"""The lines of a provider's result file, cut from what comes of it. Pure."""

from collections.abc import Iterator

from penstock.errors import JobRefused

MAX_LINE_BYTES = 80 << 20
"""The longest line that is accepted; a reply has at most 64 MiB, and may stand beside its
request."""


class ResultLines:
    """Cuts pieces of any size into lines; of the file, one unended line is held.

    Args:
        source: Whose file it is, for messages.
    """

    def __init__(self, source: str, *, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._source = source
        self._max_line_bytes = max_line_bytes
        self._begun: list[bytes] = []
        self._held = 0
        self.size = 0
        """How many bytes have come."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The lines that end in the next bytes, without their ends and without blank ones.

        Raises:
            JobRefused: After these, the one that has begun is too long.
        """
        self.size += len(data)
        if b"\n" in data:
            *lines, data = b"".join([*self._begun, data]).split(b"\n")
            self._begun, self._held = [], 0
            for line in lines:
                if line.strip():
                    yield line
        self._begun.append(data)
        self._held += len(data)
        if self._held > self._max_line_bytes:
            raise JobRefused(
                f"{self._source} sent a line of results of more than {self._max_line_bytes} "
                "bytes."
            )

    def finish(self) -> list[bytes]:
        """The last line, if it has no end and is not blank."""
        rest = b"".join(self._begun)
        return [rest] if rest.strip() else []
