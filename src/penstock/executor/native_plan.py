"""Which lines go to a provider's own batch API, and in which jobs. Pure but for chance.

Lines of one upstream (and of one model, where the provider wants that) go one way; the input
is cut so that no slice holds lines of two ways. A way becomes one native run or, beyond the
provider's limits, several; one with too few lines is sent line by line.
"""

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from penstock.jsonl import SlicePlan
from penstock.model import Batch, NativeRun, NativeRunId, Slice, find_endpoint
from penstock.upstream.base import BatchLimits
from penstock.upstream.routes import Route, Routes

_log = structlog.get_logger()

BY_LINE = ""
"""The way of lines that are sent one by one."""
_ENVELOPE_BYTES = 64
"""By how much a record of ours may be longer than the client's line."""
_FALLBACK_SHARE = 0.1
"""Which part of the window is left to lines that a native run leaves over."""


def way_of(route: Route | None, model: str, endpoint: str) -> str:
    """The way that lines of a model go: a name that differs where slices must."""
    native = route.native if route else None
    if route is None or native is None or endpoint not in native.upstream.limits.endpoints:
        return BY_LINE
    return f"{route.name}\n{model}" if native.upstream.limits.one_model else route.name


def split(pieces: Sequence[SlicePlan], limits: BatchLimits) -> list[list[int]]:
    """Divide slices of one way into jobs of about the same size.

    Returns:
        Indexes into `pieces`, in order, one list for each job. A slice that alone is more than
        the provider takes is in none, and so are those of a job with too few lines.
    """
    sizes = [piece.bytes + _ENVELOPE_BYTES * piece.requests for piece in pieces]
    fitting = [
        index
        for index, piece in enumerate(pieces)
        if piece.requests <= limits.max_requests and sizes[index] <= limits.max_bytes
    ]
    requests = sum(pieces[index].requests for index in fitting)
    size = sum(sizes[index] for index in fitting)
    parts = max(math.ceil(requests / limits.max_requests), math.ceil(size / limits.max_bytes))
    jobs: list[list[int]] = []
    job: list[int] = []
    count = held = 0
    for index in fitting:
        more, larger = count + pieces[index].requests, held + sizes[index]
        is_full = more > limits.max_requests or larger > limits.max_bytes
        if job and (is_full or count * parts >= requests or held * parts >= size):
            jobs.append(job)
            job = []
            more, larger = pieces[index].requests, sizes[index]
        job.append(index)
        count, held = more, larger
    if job:
        jobs.append(job)
    least = limits.min_requests
    return [job for job in jobs if sum(pieces[index].requests for index in job) >= least]


def stop_at(batch: Batch, *, falls_back: bool) -> float:
    """When a native run that has not ended is to be cancelled: at the end of the window, or
    early enough that what it leaves over can be sent line by line."""
    window_s = batch.expires_at - batch.created_at
    return batch.expires_at - (_FALLBACK_SHARE * window_s if falls_back else 0)


@dataclass(frozen=True, slots=True)
class Planned:
    """How the slices of a batch are run."""

    slices: list[Slice]
    runs: list[NativeRun]


class NativePlanner:
    """Plans the native runs of batches whose input is good."""

    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        self._is_used = any(route.native for route in routes)

    def ways(self, batch: Batch) -> Callable[[str], str] | None:
        """The way of each model's lines; None if all are sent line by line."""
        endpoint = find_endpoint(batch.endpoint)
        if not self._is_used or endpoint is None:
            return None
        asked = batch.asked_model
        return lambda model: way_of(self._route(batch, model), asked or model, endpoint.path)

    def plan(self, batch: Batch, plans: Sequence[SlicePlan], *, now: float) -> Planned:
        """Make slices, and the runs that hold some of them."""
        ways = self.ways(batch)
        by_way: dict[str, list[int]] = {}
        for index, plan in enumerate(plans if ways else ()):
            by_way.setdefault(ways(plan.models[0]) if ways else BY_LINE, []).append(index)
        by_way.pop(BY_LINE, None)
        held: dict[int, NativeRunId] = {}
        runs: list[NativeRun] = []
        for indexes in by_way.values():
            for job in self._jobs(batch, [plans[index] for index in indexes]):
                mine = [indexes[each] for each in job]
                model = batch.asked_model or plans[mine[0]].models[0]
                run = NativeRun(
                    id=_new_id(),
                    batch_id=batch.id,
                    upstream=self._name(batch, model),
                    model=model,
                    requests=sum(plans[index].requests for index in mine),
                    due_at=now,
                )
                runs.append(run)
                held |= dict.fromkeys(mine, run.id)
        slices = [
            Slice(
                batch_id=batch.id,
                index=index,
                start=plan.start,
                end=plan.end,
                first_line=plan.first_line,
                requests=plan.requests,
                models=plan.models,
                upstream=batch.upstream,
                native_run=held.get(index),
            )
            for index, plan in enumerate(plans)
        ]
        return Planned(slices, runs)

    def _jobs(self, batch: Batch, plans: Sequence[SlicePlan]) -> list[list[int]]:
        """The jobs of one way."""
        route = self._route(batch, plans[0].models[0])
        native = route.native if route else None
        if route is None or native is None:
            return []
        limits = native.upstream.limits
        requests = sum(plan.requests for plan in plans)
        least = max(limits.min_requests, native.from_requests)
        jobs = split(plans, limits) if requests >= least else []
        alone = requests - sum(plans[index].requests for job in jobs for index in job)
        if alone:
            _log.info(
                "Lines are sent one by one that could not be a batch of the provider.",
                batch_id=batch.id,
                upstream=route.name,
                model=plans[0].models[0],
                requests=alone,
                least=least,
                most=limits.max_requests,
            )
        return jobs

    def _route(self, batch: Batch, model: str) -> Route | None:
        return self._routes.find(model, upstream=batch.upstream)

    def _name(self, batch: Batch, model: str) -> str:
        route = self._route(batch, model)
        assert route is not None  # noqa: S101  (or its lines would have no way)
        return route.name


def parts_of(
    run: NativeRun, pieces: Sequence[Slice], *, now: float
) -> list[tuple[NativeRun, list[Slice]]]:
    """Two runs in place of one that the provider finds too large; none if it has one slice."""
    if len(pieces) < 2:
        return []
    middle = len(pieces) // 2
    parts: list[tuple[NativeRun, list[Slice]]] = []
    for mine in (list(pieces[:middle]), list(pieces[middle:])):
        new = NativeRun(
            id=_new_id(),
            batch_id=run.batch_id,
            upstream=run.upstream,
            model=mine[0].models[0],
            requests=sum(piece.requests for piece in mine),
            due_at=now,
        )
        parts.append((new, mine))
    return parts


def _new_id() -> NativeRunId:
    return NativeRunId(f"nat-{secrets.token_hex(10)}")
