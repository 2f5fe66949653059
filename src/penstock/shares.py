"""Which part of an upstream each of several workers may use. Pure: times come in.

Each worker holds a part under a lease. Whoever renews sees what the others hold and decides
its own part: as much as is fair, and never more than they leave. So the parts never add up to
more than the whole, whoever asks when. A part that has to shrink does so at its owner's next
renewal, and as far as requests are in flight, only when these have ended.

Fair is max-min: each gets what it can use, or as much as any other that cannot get all it
could use.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

_RESERVE = 16
"""Whoever has no work keeps this part of an equal share, so that it can begin at once."""
_LEAST_RATE = 1e-6
"""Less than this a minute is nothing."""
_TURN_S = 10.0
"""How long those of whom there are too many have their turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """So much of an upstream, or all of it."""

    concurrency: int = 0
    """How many requests in flight."""
    requests_per_minute: float = 0.0
    """Of a whole, 0 is no limit."""
    tokens_per_minute: float = 0.0
    """Of a whole, 0 is no limit."""


NOTHING = Part()


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A worker that shares an upstream."""

    worker_id: str
    demand: int
    """How many requests it could have in flight, had it the upstream to itself."""
    holds: Part = NOTHING
    """What it was given, as long as its lease has not ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a worker gets."""

    part: Part
    """What it may use from now on."""
    holds: Part
    """What is kept from the others: `part`, and what it still has in flight beyond that."""


def decide_part(
    whole: Part, mine: Claim, others: Sequence[Claim], *, in_flight: int, now: float
) -> Decision:
    """Decide what a worker gets that renews.

    Args:
        in_flight: How many requests it has, and will have at most until it knows the answer.
        now: Unix seconds, the same for all within a second or so.
    """
    fair = fair_parts(whole.concurrency, (mine, *others), turn=int(now / _TURN_S))
    share = _share_of_rates(fair, mine, others)
    held = [each.holds for each in others]
    part = Part(
        concurrency=min(
            fair[mine.worker_id],
            max(whole.concurrency - sum(each.concurrency for each in held), 0),
        ),
        requests_per_minute=_rate(
            whole.requests_per_minute, share, (each.requests_per_minute for each in held)
        ),
        tokens_per_minute=_rate(
            whole.tokens_per_minute, share, (each.tokens_per_minute for each in held)
        ),
    )
    if not part.concurrency or _lacks_rate(whole, part):
        part = NOTHING
    kept = max(part.concurrency, min(in_flight, mine.holds.concurrency))
    return Decision(part=part, holds=replace(part, concurrency=kept))


def fair_parts(whole: int, claims: Sequence[Claim], *, turn: int) -> dict[str, int]:
    """Share a number out by demand, max-min fair.

    Args:
        turn: Where there is less than one for each, who gets one changes with this number.
    """
    reserve = whole // (_RESERVE * len(claims))
    wants = {each.worker_id: min(max(each.demand, reserve), whole) for each in claims}
    level, left = _level(whole, list(wants.values()))
    parts = {name: min(want, level) for name, want in wants.items()}
    short = sorted(name for name, want in wants.items() if want > level)
    if not level:
        short.sort(key=lambda name: _lot(name, turn))
    for name in short[:left]:
        parts[name] += 1
    return parts


def _level(whole: int, wants: list[int]) -> tuple[int, int]:
    """Up to what number each can have what it wants, and how much is left of `whole` then."""
    left = whole
    ordered = sorted(wants)
    for index, want in enumerate(ordered):
        sharers = len(ordered) - index
        if want * sharers > left:
            return left // sharers, left % sharers
        left -= want
    return (ordered[-1] if ordered else 0), left


def _lot(name: str, turn: int) -> bytes:
    """What each worker draws, the same wherever it is looked at."""
    return hashlib.blake2s(f"{turn} {name}".encode(), digest_size=8).digest()


def _share_of_rates(fair: Mapping[str, int], mine: Claim, others: Sequence[Claim]) -> float:
    """What part of the rates is mine: those with work share them as the concurrency."""
    claims = (mine, *others)
    reserve = 1 / (_RESERVE * len(claims))
    if not mine.demand:
        return reserve
    busy = [fair[each.worker_id] for each in claims if each.demand]
    left = 1 - reserve * (len(claims) - len(busy))
    return left * fair[mine.worker_id] / max(sum(busy), 1)


def _rate(whole: float, share: float, held: Iterable[float]) -> float:
    """As much of a rate as the others leave."""
    return max(min(whole * share, whole - math.fsum(held)), 0.0)


def _lacks_rate(whole: Part, part: Part) -> bool:
    """Whether a rate is limited and nothing of it is to be had."""
    return any(
        limit and rate < _LEAST_RATE
        for limit, rate in (
            (whole.requests_per_minute, part.requests_per_minute),
            (whole.tokens_per_minute, part.tokens_per_minute),
        )
    )
