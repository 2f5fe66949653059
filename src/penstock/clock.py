"""The time by which this process works: Unix seconds.

Alone, a process takes its machine's. Processes that share a database take the database's, so
that a lease which one wrote means the same to the others, whatever their own clocks say:
`follow` is told what the database said, and the monotonic clock counts on from there.
"""

import time

_base: float | None = None
"""What the shared clock said when this machine's monotonic clock said 0; None: not shared."""


def now() -> float:
    """The time, in Unix seconds."""
    return time.time() if _base is None else _base + time.monotonic()


def follow(said: float, *, asked_at: float, heard_at: float) -> None:
    """Follow another clock from now on.

    Args:
        said: Its time, in Unix seconds.
        asked_at: This machine's monotonic clock before it was asked.
        heard_at: And when its answer was there.
    """
    global _base  # noqa: PLW0603
    _base = said - (asked_at + heard_at) / 2


def follow_machine() -> None:
    """Follow this machine's clock again."""
    global _base  # noqa: PLW0603
    _base = None
