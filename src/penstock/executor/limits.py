"""How much may go to an upstream at a time. Pure: times come in, in seconds of one monotonic
clock.

`ConcurrencyLimit` finds out how many requests an upstream can use, up to what the settings
allow. It begins small and doubles while that brings more work done. Then it listens:

- 429s, 503s and time-outs halve it, unless as many come when it is halved: then they are not
  due to too many requests;
- an inference engine that tells how many requests wait in its queue is kept so full that a few
  of them wait, and no fuller, so that others who use it find their turn;
- without that, a small step up or down is tried now and then, and kept if it brings more work
  done, or as much with fewer requests: what more of them would do is wait in a queue unseen.

Where several workers share the upstream, each has its part, the bound of its limit, which comes
and goes. What the limit has found out outlasts a time with less.

`TokenBucket` holds a rate, of requests or of tokens.
"""

from dataclasses import dataclass
from enum import StrEnum

import msgspec

from penstock.upstream.base import EngineLoad

_START_ROUND_S = 0.05
_ROUND_S = 1.0
_ENOUGH_GAIN = 1.2
"""By how much doubling must raise the work done to be worth the next doubling."""
_STEP_UP = 1.1
_STEP_DOWN = 0.85
_STEP_GAIN = 0.4
"""What part of a step up must be found in the work done."""
_SAME = 0.97
"""How much of the best is as good as it."""
_CROWDED = 0.6
"""With less of the best than this at the same limit, others use the upstream too."""
_CROWDED_ROUNDS = 3
_MOST_HOLDS = 16
_FEW_REFUSALS = 0.02
"""What part of the replies may be refusals without a cut."""
_MANY_REFUSALS = 0.5
_AS_MANY = 0.8
"""With more than this part of the refusals left after a cut, it has not helped."""
_JUDGED_REPLIES = 50
_ECHO_S = 2.0
"""Refusals that several workers see within this time have one cause."""
_STALE_S = 10.0
"""Refusals of others from longer ago say nothing of now."""
_GUIDED_S = 5.0
"""For how long a load that the engine told stays true."""
_FULL_CACHE = 0.95
_FREE_LOOKS = 4


class Limiter(StrEnum):
    """What the limit is due to."""

    START = "slow_start"  # it has not been higher yet
    REFUSALS = "refusals"  # 429, 503 or time-outs
    ENGINE_QUEUE = "engine_queue"  # requests wait in the engine's queue
    LATENCY = "latency"  # more requests only take longer
    SHARE = "share"  # other workers have the rest of it
    SETTING = "max_concurrency"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConcurrencyPolicy:
    """Between what bounds a limit may move."""

    most: int
    initial: int = 128
    queue_reserve: int = 4
    """How many requests may wait in an engine's own queue."""


class ConcurrencyLimit:
    """How many requests may be in flight to one upstream."""

    def __init__(self, policy: ConcurrencyPolicy) -> None:
        self._policy = policy
        self._bound = policy.most
        self._found = min(policy.initial, policy.most)
        """What it would be but for the bound; at least 1."""
        self.current = self._found
        """Requests; 0 only if the bound is."""
        self.cut_at = float("-inf")
        """When refusals last cut it."""
        self._heard_at = float("-inf")
        """When those of others last did."""
        self._limiter = Limiter.START
        self._is_starting = True
        self._window_at = float("-inf")
        self._answered = 0
        self._refused = 0
        self._refusal_s = 0.0
        """How long refusals take to come, at most, of late."""
        self._tolerated = _FEW_REFUSALS
        self._cut: tuple[int, float] | None = None
        """The limit before the last cut and what part was refused; None once judged."""
        self._guided_until = float("-inf")
        self._free_looks = 0
        self._begin_round(float("-inf"))
        # Work done, in output tokens (or requests) per second:
        self._before: float | None = None  # in the last round, with the limit of that time
        self._best = 0.0
        self._base: int | None = None
        """The limit from which a step is being tried; None between steps."""
        self._crowded = 0
        self._is_next_up = True
        self._holds = 0
        self._most_holds = 1

    @property
    def limiter(self) -> Limiter:
        if self.current >= self._policy.most:
            return Limiter.SETTING
        return Limiter.SHARE if self.current >= self._bound else self._limiter

    @property
    def wish(self) -> int:
        """How many it would allow, or try to, had the worker the upstream to itself."""
        return self._policy.most if self._found == self._bound else self._found

    def set_bound(self, most: int, now: float) -> None:
        """Allow so many at most, from 0 to what the settings say."""
        bound, before = min(most, self._policy.most), self.current
        may_grow = bound > self._bound and self._found == self._bound
        self._bound = bound
        self.current = min(self._found, bound)
        if self.current != before or may_grow:
            is_starting = self._is_starting or may_grow
            self._settle(now)
            self._is_starting = is_starting

    def hear_refusal(self, now: float, *, refused_at: float) -> None:
        """Hear that refusals have cut another worker's limit: cut this one's too, unless it has
        been cut for the same reason.

        Args:
            refused_at: When that was.
        """
        known_at = max(self.cut_at, self._heard_at)
        if refused_at <= known_at + _ECHO_S or now - refused_at > _STALE_S or not self.current:
            return
        self._heard_at = self._window_at = now
        self._answered = self._refused = 0
        self._cut = None
        self._set(self.current // 2, Limiter.REFUSALS)
        self._settle(now)

    def note_success(self, now: float, *, sent_at: float, work: int, in_flight: int) -> None:
        """Say that a request has succeeded.

        Args:
            sent_at: When it was sent.
            work: What it brought, in output tokens; 0 counts as 1.
            in_flight: How many requests there were, with this one.
        """
        if sent_at > self._window_at:
            self._answered += 1
            if self._refused or self._cut:
                self._look_at_refusals(now)
        if sent_at < self._round_at:
            return  # it was on its way before the limit changed
        self._replies += 1
        self._seconds += now - sent_at
        self._work += work or 1
        self._full += in_flight >= self.current
        if self._replies < max(self.current >> 1, 8):
            return
        least_s = _START_ROUND_S if self._is_starting else _ROUND_S
        if now - self._round_at >= least_s:
            self._end_round(now)

    def note_refusal(self, now: float, *, sent_at: float) -> None:
        """Say that the upstream refused a request because it has too many, or did not get to
        it in time."""
        if sent_at <= self._window_at or not self.current:
            return  # it was on its way before the last cut
        self._refused += 1
        self._refusal_s = max(self._refusal_s, now - sent_at)
        self._look_at_refusals(now)

    def _look_at_refusals(self, now: float) -> None:
        replies = self._answered + self._refused
        share = self._refused / replies
        is_bad = share > _MANY_REFUSALS and self._refused >= min(self.current, 8)
        if not is_bad and (
            replies < max(_JUDGED_REPLIES, self.current)
            # A time-out takes its time to show, so a short window has too few of them.
            or now - self._window_at < 2 * self._refusal_s
        ):
            return
        cut, self._cut = self._cut, None
        if not is_bad and cut is not None and share >= _AS_MANY * cut[1]:
            self._tolerated = 1.5 * share
            self._set(cut[0], Limiter.START)
            self._settle(now)
        elif is_bad or share > self._tolerated:
            self._cut = (self.current, share)
            self.cut_at = now
            self._set(self.current // 2, Limiter.REFUSALS)
            self._settle(now)
        elif 2 * share < self._tolerated:
            self._tolerated = max(0.9 * self._tolerated, _FEW_REFUSALS)
        self._window_at = now
        self._answered = self._refused = 0
        self._refusal_s *= 0.8

    def note_load(self, load: EngineLoad, now: float, *, in_flight: int) -> None:
        """Say what the engine tells of itself."""
        self._guided_until = now + _GUIDED_S
        if not self.current:
            return
        excess = load.waiting - self._policy.queue_reserve
        if excess > 0:
            self._free_looks = 0
            if in_flight <= self.current:  # else the last cut has not taken effect yet
                self._set(in_flight - excess, Limiter.ENGINE_QUEUE)
                self._settle(now)
            return
        if in_flight < self.current or load.cache_usage >= _FULL_CACHE:
            return
        if self._is_starting:
            self._set(2 * self.current, Limiter.START)
        elif load.waiting:
            self._free_looks = 0
            self._set(self.current - excess, Limiter.ENGINE_QUEUE)
        else:
            self._free_looks += 1
            is_far = self._free_looks > _FREE_LOOKS
            step = max(-excess, self.current >> 3 if is_far else 1)
            self._set(self.current + step, Limiter.ENGINE_QUEUE)

    # The rounds in which the limit is judged by the work done

    def _begin_round(self, now: float) -> None:
        self._round_at = now
        self._replies = 0
        self._seconds = 0.0
        self._work = 0
        self._full = 0

    def _end_round(self, now: float) -> None:
        done = self.current * self._work / max(self._seconds, 1e-9)  # Little's law
        is_full = 2 * self._full >= self._replies
        self._begin_round(now)
        if now < self._guided_until or not is_full:
            self._base = None
            return
        if self._is_starting:
            self._grow(done)
        elif self._base is None:
            self._try_step(done)
        else:
            self._judge_step(self._base, done)

    def _grow(self, done: float) -> None:
        if self._before is not None and done < self._before * _ENOUGH_GAIN:
            self._is_starting = False
            self._set(self.current // 2, Limiter.LATENCY)
        elif self.current >= self._bound:
            self._is_starting = False
        else:
            self._before = done
            self._set(2 * self.current, Limiter.START)

    def _try_step(self, done: float) -> None:
        """At the end of a round without a step: begin one, or wait for a better time."""
        self._crowded = self._crowded + 1 if done < _CROWDED * self._best else 0
        if self._crowded:
            if self._crowded >= _CROWDED_ROUNDS:
                self._crowded, self._best = 0, done
                self._set(int(self.current * 0.75), Limiter.LATENCY)
            return
        self._best = max(self._best * 0.99, done)
        self._before = done
        if self._holds:
            self._holds -= 1
            return
        step = _STEP_UP if self._is_next_up else _STEP_DOWN
        base = self.current
        if self._is_next_up:
            self._set(max(int(base * step), base + 1), Limiter.LATENCY)
        else:
            self._set(int(base * step), Limiter.LATENCY)
        self._base = base if self.current != base else None
        if self._base is None:
            self._is_next_up = not self._is_next_up

    def _judge_step(self, base: int, done: float) -> None:
        self._base = None
        if self.current > base:
            needed = (self._before or 0.0) * (1 + _STEP_GAIN * (self.current / base - 1))
        else:
            needed = _SAME * self._best
        if done >= needed:
            self._most_holds = 1
        else:
            self._found, self.current = base, min(base, self._bound)
            self._is_next_up = not self._is_next_up
            self._most_holds = min(2 * self._most_holds, _MOST_HOLDS)
            self._holds = self._most_holds

    def _settle(self, now: float) -> None:
        """Judge anew from here, after a cut."""
        self._is_starting = False
        self._before = None
        self._best = 0.0
        self._base = None
        self._is_next_up = True
        self._holds = 0
        self._begin_round(now)

    def _set(self, limit: int, limiter: Limiter) -> None:
        self._found = max(min(limit, self._bound), 1)
        self.current = min(self._found, self._bound)
        self._limiter = limiter


class TokenBucket:
    """A rate that is kept over each second, with what one second brings as the largest burst.

    What costs more than there is may go as soon as there is anything: the bucket then owes it.
    """

    def __init__(self, per_minute: float) -> None:
        self._per_s = per_minute / 60
        self._most = max(self._per_s, 1.0)
        self._level = self._most
        self._at = float("-inf")

    def take(self, now: float, amount: float) -> None:
        """Take from it; a negative amount gives back."""
        self._fill(now)
        self._level = min(self._level - amount, self._most)

    def set_rate(self, now: float, per_minute: float, *, since: float) -> None:
        """Fill it faster from now on, or slower. That brings no burst.

        Args:
            per_minute: Above 0.
            since: When a lower rate has begun to count.
        """
        self._fill(now)
        before, self._per_s = self._per_s, per_minute / 60
        self._most = max(self._per_s, 1.0)
        too_much = max(before - self._per_s, 0.0) * max(now - since, 0.0)
        self._level = min(self._level - too_much, self._most)

    def ready_at(self, now: float) -> float:
        """When something may be taken; not after `now` if it may be now."""
        self._fill(now)
        return now if self._level >= 1 else now + (1 - self._level) / self._per_s

    def _fill(self, now: float) -> None:
        if now > self._at:
            self._level = min(self._level + (now - self._at) * self._per_s, self._most)
            self._at = now


class _Bounds(msgspec.Struct):
    """What a request says of its answer's length, by each API's name."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    n: int | None = None


_decode_bounds = msgspec.json.Decoder(_Bounds, strict=False).decode
_BYTES_A_TOKEN = 4
_UNKNOWN_OUTPUT = 256
_MEMORY = 0.05


class TokenEstimate:
    """What a request will cost in tokens, learned from those before it."""

    def __init__(self) -> None:
        self._output: float | None = None
        self._input_share: float | None = None
        """Input tokens for each byte of a body."""

    def cost(self, body: bytes) -> int:
        """Input and output tokens of a request, about: what earlier ones took, and before
        there are any, a quarter of its bytes and the longest answer that it allows."""
        share = self._input_share or 1 / _BYTES_A_TOKEN
        try:
            bounds = _decode_bounds(body)
        except (msgspec.DecodeError, RecursionError):
            bounds = _Bounds()
        most = bounds.max_completion_tokens or bounds.max_tokens or bounds.max_output_tokens
        output = self._output
        if output is None:
            output = float(most or _UNKNOWN_OUTPUT) * max(bounds.n or 1, 1)
        elif most and most > 0:
            output = min(output, float(most) * max(bounds.n or 1, 1))
        return max(int(len(body) * share + output), 1)

    def learn(self, body_bytes: int, *, input_tokens: int, output_tokens: int) -> None:
        """Say what a request took."""
        self._output = _mean(self._output, output_tokens)
        self._input_share = _mean(self._input_share, input_tokens / max(body_bytes, 1))


def _mean(before: float | None, value: float) -> float:
    return value if before is None else before + _MEMORY * (value - before)
