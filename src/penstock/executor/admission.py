"""Whether a line may go to an upstream now, and to which of several. Pure: time and chance
come in.

An `Admission` is all that is known of one upstream: how many requests it can use, its rates,
whether it asked to be left alone, and the circuit of each of its models. Where workers share
the upstream, it sends only as much as its part allows, and nothing once its lease is over.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

import msgspec

from penstock.executor.circuit import Circuit, CircuitPolicy, is_outage
from penstock.executor.limits import (
    ConcurrencyLimit,
    ConcurrencyPolicy,
    Limiter,
    TokenBucket,
    TokenEstimate,
)
from penstock.executor.retry import RetryPolicy
from penstock.shares import Part
from penstock.upstream.base import EngineLoad, Failure, LineUpstream, Reply

_REFUSALS = frozenset({429, 503, 529})


class Verdict(IntEnum):
    """What may be done with a line. The higher, the better."""

    PARK = 0  # its model's circuit is open
    WAIT = 1  # the upstream has as much as it takes for now
    SEND = 2
    PROBE = 3  # send it, and none of its model beside it until its reply is there


class Hindrance(StrEnum):
    """Why an upstream is not sent more, beside what its `Limiter` says."""

    CIRCUIT = "circuit_open"
    RETRY_AFTER = "retry_after"
    RATE = "rate_limit"
    LEASE = "no_lease"  # it does not know what part of the upstream is its own


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionPolicy:
    """How an upstream is to be treated; mostly the settings of its table."""

    concurrency: ConcurrencyPolicy
    retries: RetryPolicy = field(default_factory=RetryPolicy)
    circuits: CircuitPolicy = field(default_factory=CircuitPolicy)
    weight: int = 1
    requests_per_minute: int = 0
    """0 sets no limit."""
    tokens_per_minute: int = 0
    """0 sets no limit."""
    is_shared: bool = False
    """Whether it belongs to several workers, so that nothing is sent without a part of it."""


class Ticket(msgspec.Struct, frozen=True, gc=False):
    """Leave to send one line."""

    admission: "Admission"
    sent_at: float
    tokens: int
    """What it is thought to cost."""
    is_probe: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a reply has changed."""

    has_opened: bool = False
    """The model's circuit is open now."""
    has_closed: bool = False
    """The model's circuit is closed again."""
    is_free: bool = False
    """The attempt does not count: what happened to the line is not its fault."""


_NOTHING = Outcome()


class Admission:
    """The door to one upstream."""

    def __init__(self, upstream: LineUpstream, policy: AdmissionPolicy) -> None:
        self.upstream = upstream
        self.policy = policy
        self.limit = ConcurrencyLimit(policy.concurrency)
        self.in_flight = 0
        self.load: EngineLoad | None = None
        """What its engine told last; None if it tells nothing."""
        self._circuits: dict[str, Circuit] = {}
        """By model; one that never failed has none."""
        self._held_until = float("-inf")
        self._ready_at = float("-inf")
        """Before this no rate has room."""
        self._most = 0 if policy.is_shared else policy.concurrency.most
        """How many may be in flight by the part that is known."""
        self._leased_until = float("-inf" if policy.is_shared else "inf")
        self._requests = _bucket(policy.requests_per_minute)
        self._tokens = _bucket(policy.tokens_per_minute)
        self._estimate = TokenEstimate()

    def look(self, model: str, now: float) -> Verdict:
        """What may be done with a line of a model."""
        is_open = False
        if self._circuits and (circuit := self._circuits.get(model)):
            if circuit.is_blocking(now):
                return Verdict.PARK
            is_open = circuit.is_open
        if (
            self.in_flight >= self.limit.current
            or self.in_flight >= self._most
            or now < self._held_until
            or now < self._ready_at
            or now >= self._leased_until
        ):
            return Verdict.WAIT
        return Verdict.PROBE if is_open else Verdict.SEND

    def take(self, model: str, body: bytes, now: float) -> Ticket:
        """Take the place of a line that may be sent. It is given back by `note` or `forget`."""
        self.in_flight += 1
        tokens = 0
        if self._requests or self._tokens:
            tokens = self._estimate.cost(body) if self._tokens else 0
            self._pay(now, requests=1, tokens=tokens)
        circuit = self._circuits.get(model) if self._circuits else None
        is_probe = circuit is not None and circuit.is_open
        if circuit is not None and is_probe:
            circuit.begin_probe()
        return Ticket(self, now, tokens, is_probe)

    def forget(self, ticket: Ticket, model: str) -> None:
        """Say that a line was called back before its reply came."""
        self.in_flight -= 1
        if ticket.is_probe:
            self._circuits[model].forget_probe()

    def note(
        self,
        ticket: Ticket,
        model: str,
        body: bytes,
        reply: Reply,
        now: float,
        *,
        jitter: float,
    ) -> Outcome:
        """Say what came of a line.

        Args:
            jitter: A number from 0 to 1, so that upstreams are not probed all at once.
        """
        in_flight = self.in_flight
        self.in_flight -= 1
        if reply.is_success:
            self.limit.note_success(
                now, sent_at=ticket.sent_at, work=reply.output_tokens, in_flight=in_flight
            )
            if self._tokens:
                self._correct(ticket, body, reply, now)
            if not self._circuits:
                return _NOTHING
            circuit = self._circuits.get(model)
            return Outcome(has_closed=circuit is not None and circuit.note_answer())
        if self._tokens and reply.failure is not Failure.TIMEOUT:
            self._pay(now, requests=0, tokens=-ticket.tokens)
        if _is_refusal(reply):
            self.limit.note_refusal(now, sent_at=ticket.sent_at)
        asks_to_wait = _asks_to_wait(reply)
        if asks_to_wait:
            wait_s = min(reply.retry_after_s or 0.0, self.policy.retries.max_retry_after_s)
            self._held_until = max(self._held_until, now + wait_s)
        circuit = self._circuits.get(model)
        if not is_outage(reply):
            has_closed = circuit is not None and circuit.note_answer()
            return Outcome(has_closed=has_closed, is_free=asks_to_wait)
        if circuit is None:
            circuit = self._circuits[model] = Circuit(self.policy.circuits)
        has_opened = circuit.note_failure(now, was_probe=ticket.is_probe, jitter=jitter)
        return Outcome(has_opened=has_opened, is_free=asks_to_wait or ticket.is_probe)

    def note_load(self, load: EngineLoad | None, now: float) -> None:
        """Say what its engine tells of itself."""
        self.load = load
        if load is not None:
            self.limit.note_load(load, now, in_flight=self.in_flight)

    def is_parking(self, model: str, now: float) -> bool:
        """Whether lines of a model would be parked."""
        circuit = self._circuits.get(model)
        return circuit is not None and circuit.is_blocking(now)

    def probe_at(self, model: str) -> float | None:
        """When a line of a model may be sent as a probe; None if there is no need or no way."""
        circuit = self._circuits.get(model)
        return circuit.wake_at() if circuit else None

    def is_probing(self, model: str) -> bool:
        """Whether the model's circuit is open, so that one line at a time is sent at most."""
        circuit = self._circuits.get(model)
        return circuit is not None and circuit.is_open

    # A part of it

    @property
    def held_until(self) -> float:
        """Until when it asked to be left alone."""
        return self._held_until

    def demand(self, waiting: int) -> int:
        """How many could be in flight, had the worker the upstream to itself.

        Args:
            waiting: How many lines wait for it.
        """
        return min(self.limit.wish, self.in_flight + waiting)

    def freeze(self) -> int:
        """Send no more than are in flight, until `take_part` says more.

        Returns:
            How many are.
        """
        self._most = min(self._most, self.in_flight)
        return self.in_flight

    def take_part(self, part: Part, now: float, *, asked_at: float, until: float) -> None:
        """Keep to a part from now on.

        Args:
            asked_at: From when others may use what was given back.
            until: When it ends.
        """
        self._most = part.concurrency
        self._leased_until = until
        self.limit.set_bound(part.concurrency, now)
        if not part.concurrency:
            return
        rates = (part.requests_per_minute, part.tokens_per_minute)
        for bucket, rate in zip((self._requests, self._tokens), rates, strict=True):
            if bucket is not None:
                bucket.set_rate(now, rate, since=asked_at)
        self._find_ready(now)

    def hear(self, now: float, *, refused_at: float | None, held_until: float | None) -> None:
        """Hear what other workers have met with."""
        if refused_at is not None:
            self.limit.hear_refusal(now, refused_at=refused_at)
        if held_until is not None:
            latest = now + self.policy.retries.max_retry_after_s
            self._held_until = max(self._held_until, min(held_until, latest))

    # Time

    def ready_at(self) -> float:
        """When it takes lines again, as far as time decides that."""
        return max(self._held_until, self._ready_at)

    def hindrance(self, now: float) -> Hindrance | Limiter | None:
        """Why it is not sent more now; None if it would take more at once."""
        if any(circuit.is_open for circuit in self._circuits.values()):
            return Hindrance.CIRCUIT
        if now >= self._leased_until:
            return Hindrance.LEASE
        if now < self._held_until:
            return Hindrance.RETRY_AFTER
        if now < self._ready_at:
            return Hindrance.RATE
        return self.limit.limiter if self.in_flight >= self.limit.current else None

    def _pay(self, now: float, *, requests: int, tokens: int) -> None:
        for bucket, amount in ((self._requests, requests), (self._tokens, tokens)):
            if bucket is not None and amount:
                bucket.take(now, amount)
                self._find_ready(now)

    def _find_ready(self, now: float) -> None:
        ready = [each.ready_at(now) for each in (self._requests, self._tokens) if each]
        self._ready_at = max(ready, default=float("-inf"))

    def _correct(self, ticket: Ticket, body: bytes, reply: Reply, now: float) -> None:
        """Replace what a line was thought to cost by what it did."""
        taken = reply.total_tokens or reply.input_tokens + reply.output_tokens
        if taken:
            self._pay(now, requests=0, tokens=taken - ticket.tokens)
            self._estimate.learn(
                len(body),
                input_tokens=reply.input_tokens,
                output_tokens=max(taken - reply.input_tokens, 0),
            )


def choose(
    admissions: Iterable[Admission], model: str, now: float, *, avoid: Admission | None = None
) -> tuple[Verdict, Admission | None]:
    """Choose the upstream for a line: one that is due to be probed, else that which has least
    in flight for its weight.

    Args:
        avoid: Where the line has just failed; only taken if no other takes it.

    Returns:
        What may be done, and by whom; no one if the line is to wait.
    """
    best: tuple[Verdict, bool, float] | None = None
    chosen: Admission | None = None
    for admission in admissions:
        verdict = admission.look(model, now)
        load = (admission.in_flight + 1) / admission.policy.weight
        rank = (verdict, admission is not avoid, -load)
        if best is None or rank > best:
            best, chosen = rank, admission
    if best is None:
        return Verdict.PARK, None
    return best[0], chosen if best[0] >= Verdict.SEND else None


def _is_refusal(reply: Reply) -> bool:
    return reply.failure is Failure.TIMEOUT or reply.status_code in _REFUSALS


def _asks_to_wait(reply: Reply) -> bool:
    """Whether an upstream asks to be left alone for a time that it names."""
    return reply.status_code in (429, 503) and bool(reply.retry_after_s)


def _bucket(per_minute: int) -> TokenBucket | None:
    return TokenBucket(per_minute) if per_minute else None
