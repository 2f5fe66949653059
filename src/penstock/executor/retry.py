"""Whether and when to try a line again. Pure: time and chance come in as arguments."""

from dataclasses import dataclass

from penstock.upstream.base import Reply

_PASSING_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
"""HTTP answers that another attempt may not get. A 400, a 401 or a 404 stays what it is: a
wrong model name fails in seconds, not after a day of attempts."""

_DOUBLINGS = 64
"""More of them than any wait needs, and few enough for a float."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How patient to be with an upstream."""

    max_attempts: int = 5
    """How often a line is sent at most, from 1."""
    first_wait_s: float = 0.5
    max_wait_s: float = 30.0
    max_retry_after_s: float = 60.0
    """The longest wait that an upstream may ask for."""

    def wait_s(
        self, reply: Reply, *, attempt: int, jitter: float, time_left_s: float
    ) -> float | None:
        """How long to wait before the next attempt at a line.

        The wait doubles with each attempt, from `first_wait_s` to `max_wait_s`, and is at
        least what the upstream asked for, up to `max_retry_after_s`. `jitter` then adds up to
        a quarter, so that lines turned away together do not come back together.

        Args:
            reply: What the attempt brought.
            attempt: Which attempt it was, from 1.
            jitter: A number from 0 to 1.
            time_left_s: Until the batch's completion window closes.

        Returns:
            Seconds, or None if the line has ended: it succeeded, its failure is not one that
            passes, or it has no attempt or no time left.
        """
        if reply.is_success or attempt >= self.max_attempts or not may_pass(reply):
            return None
        wait = min(self.first_wait_s * 2.0 ** min(attempt - 1, _DOUBLINGS), self.max_wait_s)
        if reply.retry_after_s is not None:
            wait = max(wait, min(reply.retry_after_s, self.max_retry_after_s))
        wait *= 1 + jitter / 4
        return wait if wait < time_left_s else None


def may_pass(reply: Reply) -> bool:
    """Whether another attempt may bring something better."""
    if reply.failure is not None:
        return True
    return reply.status_code in _PASSING_STATUSES
