"""Batches whose input is gone from the storage: when they are tried again, and told of. Pure.

It may come back, from a backup or an earlier version of the object, so its batch fails only
with its window. Until then one slice at a time tries whether it is there, and what the others
of the batch would do is left to other batches. Times are seconds of any one clock.
"""

from collections.abc import Container
from dataclasses import dataclass

from penstock.model import BatchId, SliceId

_FIRST_PAUSE_S = 1.0
_LAST_PAUSE_S = 60.0
_TELL_S = 30.0
"""How often each is told of, at most."""


@dataclass(slots=True)
class _Absence:
    pause_s: float
    try_at: float
    told_at: float = float("-inf")
    tried_with: SliceId | None = None
    """The last slice that was to find out whether the input is back."""


class Absences:
    """The batches of a worker whose input is gone, as far as it knows."""

    def __init__(self) -> None:
        self._of: dict[BatchId, _Absence] = {}

    def note(self, batch_id: BatchId, now: float) -> bool:
        """Note that a slice found nothing to read.

        Returns:
            Whether it is time to tell of it.
        """
        absence = self._of.setdefault(batch_id, _Absence(_FIRST_PAUSE_S, now + _FIRST_PAUSE_S))
        if now - absence.told_at < _TELL_S:
            return False
        absence.told_at = now
        return True

    def may_try(self, batch_id: BatchId, now: float) -> bool:
        """Whether a slice of the batch may be handed out."""
        absence = self._of.get(batch_id)
        return absence is None or now >= absence.try_at

    def tries(self, batch_id: BatchId, slice_id: SliceId, now: float) -> bool:
        """Note that a slice is handed out.

        Returns:
            Whether it is to be the only one for now: it tries whether the input is back.
        """
        absence = self._of.get(batch_id)
        if absence is None:
            return False
        absence.pause_s = min(2 * absence.pause_s, _LAST_PAUSE_S)
        absence.try_at = now + absence.pause_s
        absence.tried_with = slice_id
        return True

    def end(self, batch_id: BatchId, slice_id: SliceId) -> bool:
        """Note that a slice could be read.

        Returns:
            Whether the input was gone before, and is back: what was read before it was gone
            says nothing.
        """
        absence = self._of.get(batch_id)
        if absence is None or absence.tried_with != slice_id:
            return False
        del self._of[batch_id]
        return True

    def forget(self, now: float, *, but: Container[BatchId]) -> None:
        """Forget batches that have not been tried for long, but those that have slices to
        hand out."""
        self._of = {
            batch_id: absence
            for batch_id, absence in self._of.items()
            if batch_id in but or now < absence.try_at + _LAST_PAUSE_S
        }
