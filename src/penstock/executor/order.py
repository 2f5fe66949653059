"""In which order the lines of a slice are sent. Pure.

Inference engines keep the prefix of a prompt for a while, and an answer costs less if its
prompt begins as one before it did. So lines with the same beginning, which in a chat is the
system prompt, are sent one after another. The output has the input's order all the same.
"""

from collections.abc import Sequence

from penstock.request_lines import RequestLine

_FEWEST = 3
"""With fewer lines there is nothing to gain."""


def by_prefix(lines: Sequence[RequestLine]) -> Sequence[RequestLine]:
    """Bring lines of one model that begin alike together.

    Groups stand in the order in which their first lines came, and so do the lines in each.
    """
    if len(lines) < _FEWEST:
        return lines
    groups: dict[tuple[str, int], list[RequestLine]] = {}
    for line in lines:
        groups.setdefault((line.model, line.beginning), []).append(line)
    if len(groups) in (1, len(lines)):
        return lines
    return [line for group in groups.values() for line in group]
