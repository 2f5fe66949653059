"""Whether lines of a model may go to an upstream now. Pure: time and chance come in.

An upstream that is down fails every line that it is sent. Were each of them tried as often as
its policy says, an outage of minutes would fail whole batches. So when nothing but failures
has come for a second, or a good many in a row, the circuit opens: nothing is sent but one line
now and then, a probe, and a probe that fails does not count as one of its line's attempts.

    closed ── failures in a row ──► open ── pause over: one probe ──► closed, if it is answered
                                     ▲                          └──► open, for twice as long
"""

from dataclasses import dataclass

from penstock.upstream.base import Failure, Reply

_OUTAGE_STATUSES = frozenset({502, 503, 504, 520, 522, 524, 529})
_OUTAGE_FAILURES = frozenset({Failure.UNREACHABLE, Failure.TIMEOUT, Failure.DISCONNECTED})


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitPolicy:
    """When to leave an upstream alone, and for how long."""

    failures: int = 3
    """How many in a row, without an answer in between, open the circuit after `quiet_s`."""
    quiet_s: float = 1.0
    """For how long there must have been none but failures."""
    burst: int = 32
    """How many in a row open it at once. An upstream that is only overloaded fails many lines
    too, but answers others in between."""
    first_pause_s: float = 1.0
    max_pause_s: float = 60.0
    patience_s: float = 5.0
    """How long a slice is held of which nothing is left but lines that wait."""


class Circuit:
    """One for each model of each upstream. Times are those of one monotonic clock, seconds."""

    def __init__(self, policy: CircuitPolicy) -> None:
        self._policy = policy
        self._failures = 0
        self._failing_since = 0.0
        self._pause_s = 0.0
        self._open_until: float | None = None
        self._is_probing = False

    @property
    def is_open(self) -> bool:
        return self._open_until is not None

    def is_blocking(self, now: float) -> bool:
        """Whether a line would have to wait."""
        return self._open_until is not None and (self._is_probing or now < self._open_until)

    def begin_probe(self) -> None:
        """Say that a line is sent although it is open. The probe's end must be told by a note
        or by `forget_probe`."""
        self._is_probing = True

    def wake_at(self) -> float | None:
        """When the next probe may go; None if none may before a reply has come."""
        return None if self._is_probing else self._open_until

    def forget_probe(self) -> None:
        """Say that a probe was called back without a reply."""
        self._is_probing = False

    def note_answer(self) -> bool:
        """Say that the upstream has answered a line, be it with a refusal.

        Returns:
            Whether that closed the circuit.
        """
        was_open = self.is_open
        self._failures = 0
        self._pause_s = 0.0
        self._open_until = None
        self._is_probing = False
        return was_open

    def note_failure(self, now: float, *, was_probe: bool, jitter: float) -> bool:
        """Say that a line failed as it does in an outage.

        Args:
            jitter: A number from 0 to 1; adds up to a quarter to the pause.

        Returns:
            Whether that opened the circuit, which was closed.
        """
        if self._open_until is not None:
            if was_probe:
                self._open(now, jitter)
            return False  # it was sent before the circuit opened
        if not self._failures:
            self._failing_since = now
        self._failures += 1
        policy = self._policy
        is_quiet = now - self._failing_since >= policy.quiet_s
        if self._failures < (policy.failures if is_quiet else policy.burst):
            return False
        self._open(now, jitter)
        return True

    def _open(self, now: float, jitter: float) -> None:
        self._is_probing = False
        self._pause_s = min(
            max(2 * self._pause_s, self._policy.first_pause_s), self._policy.max_pause_s
        )
        self._open_until = now + self._pause_s * (1 + jitter / 4)


def is_outage(reply: Reply) -> bool:
    """Whether a reply is what an upstream gives that is down, or overloaded as a whole."""
    if reply.failure is not None:
        return reply.failure in _OUTAGE_FAILURES
    return reply.status_code in _OUTAGE_STATUSES
