"""What is told about the work: faults that stop it now, metrics, and log events.

`Health` is how the parts that notice a fault and the part that answers `/readyz` meet. Metrics
are plain numbers where they are counted, since some change with every line; `Metrics` turns
them into Prometheus' text when that is asked for. Log lines are a fixed message with fields,
never a prompt, an answer or a key.
"""

import logging
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TextIO, cast

import structlog
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from penstock import __version__

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_REPLY_BOUNDS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_FLUSH_BOUNDS_S = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class Health:
    """The faults that keep this process from its work at this moment, by name."""

    def __init__(self) -> None:
        self._faults: dict[str, str] = {}

    def fail(self, name: str, message: str) -> bool:
        """Note a fault.

        Returns:
            Whether it is new, and so worth a line in the log.
        """
        is_new = name not in self._faults
        self._faults[name] = message
        return is_new

    def recover(self, name: str) -> bool:
        """Take a fault back.

        Returns:
            Whether there was one.
        """
        return self._faults.pop(name, None) is not None

    def faults(self) -> dict[str, str]:
        """The present faults: name and what a person should know."""
        return dict(self._faults)


class Durations:
    """How often something took how long."""

    __slots__ = ("_bounds", "_counts", "_sum_s")

    def __init__(self, bounds_s: tuple[float, ...]) -> None:
        self._bounds = bounds_s
        self._counts = [0] * (len(bounds_s) + 1)
        self._sum_s = 0.0

    def note(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum_s += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bounds and how often it took at most as long, as Prometheus wants them."""
        found: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip((*self._bounds, None), self._counts, strict=True):
            total += count
            found.append(("+Inf" if bound is None else str(bound), total))
        return found

    @property
    def sum_s(self) -> float:
        return self._sum_s


class UpstreamStats:
    """What was counted of one upstream since the start."""

    __slots__ = (
        "cached_tokens",
        "durations",
        "free",
        "input_tokens",
        "output_tokens",
        "requests",
    )

    def __init__(self) -> None:
        self.requests: dict[str, int] = {}
        """Attempts at lines by what came of them: an HTTP status, or why there was none."""
        self.free = 0
        """Attempts among them that do not count as one of their line's `max_attempts`."""
        self.durations = Durations(_REPLY_BOUNDS_S)
        self.input_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0

    def note(self, outcome: str, seconds: float) -> None:
        """Count an attempt."""
        self.requests[outcome] = self.requests.get(outcome, 0) + 1
        self.durations.note(seconds)

    def add_tokens(self, input_tokens: int, cached_tokens: int, output_tokens: int) -> None:
        self.input_tokens += input_tokens
        self.cached_tokens += cached_tokens
        self.output_tokens += output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamGauges:
    """How one upstream stands now."""

    in_flight: int
    limit: int
    """How many requests it may have in flight now."""
    most: int
    """How many it may ever have."""
    limited_by: str | None
    """Why it is not sent more; None if it would take more."""
    engine_running: int | None = None
    engine_waiting: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneGauges:
    """How the lines for an upstream, or a group of them, stand now."""

    queued: int
    parked: int
    upstreams: Mapping[str, UpstreamGauges]


@dataclass(slots=True)
class WorkStats:
    """What was counted of the work since the start."""

    completed_lines: int = 0
    failed_lines: int = 0
    flushes: Durations = field(default_factory=lambda: Durations(_FLUSH_BOUNDS_S))
    flushed_bytes: int = 0
    batches: dict[str, int] = field(default_factory=dict[str, int])
    """How many batches the work brought to which status."""

    def count_batch(self, status: str) -> None:
        self.batches[status] = self.batches.get(status, 0) + 1


@dataclass(slots=True)
class NativeFigures:
    """What jobs at the batch API of one upstream took and cost, all that were ever counted."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float | None = None
    """What those cost whose price is known; None if there are none."""
    by_line_usd: float | None = None
    """What those would have cost line by line of which that is known; None if there are none.
    They may be more, where the discount of a batch is not known."""
    unpriced_tokens: int = 0
    """Those of which it is not known what they cost."""


class Metrics:
    """All that `/metrics` shows, each metric declared here.

    Args:
        health: Its faults are metrics too.
    """

    def __init__(self, health: Health) -> None:
        self.work = WorkStats()
        self._health = health
        self._upstreams: dict[str, UpstreamStats] = {}
        self._measure_lanes: Callable[[], Mapping[str, LaneGauges]] = dict
        self._count_slices: Callable[[], int] = int
        self.pending_lines: int | None = None
        """Lines for workers of all batches that lack their result; None where nobody counts."""
        self.native_lines: Mapping[tuple[str, str], int] = {}
        """Lines that batch APIs of providers have or are to have, by upstream and status."""
        self.native_figures: Mapping[str, NativeFigures] = {}
        """What they took and cost, by upstream."""
        self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._registry.register(self)

    def upstream(self, name: str) -> UpstreamStats:
        """Where to count what is sent to an upstream."""
        return self._upstreams.setdefault(name, UpstreamStats())

    def watch(
        self,
        *,
        lanes: Callable[[], Mapping[str, LaneGauges]],
        held_slices: Callable[[], int],
    ) -> None:
        """Say whom to ask how the work stands."""
        self._measure_lanes = lanes
        self._count_slices = held_slices

    def render(self) -> bytes:
        """Prometheus' text format, 0.0.4."""
        return generate_latest(self._registry)

    def describe(self) -> Iterator[Metric]:
        """Nothing: asked for by the registry, which would collect otherwise."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("penstock", "This process.", value={"version": __version__})
        yield from self._collect_work()
        yield from self._collect_upstreams()
        yield from self._collect_lanes()

    def _collect_work(self) -> Iterator[Metric]:
        work = self.work
        lines = CounterMetricFamily(
            "penstock_lines", "Lines that got their result.", labels=["result"]
        )
        lines.add_metric(["completed"], work.completed_lines)
        lines.add_metric(["failed"], work.failed_lines)
        yield lines
        batches = CounterMetricFamily(
            "penstock_batches",
            "Batches that the work brought to this status.",
            labels=["status"],
        )
        for status, count in sorted(work.batches.items()):
            batches.add_metric([status], count)
        yield batches
        yield GaugeMetricFamily(
            "penstock_slices_held", "Slices that are worked on now.", self._count_slices()
        )
        if self.pending_lines is not None:
            yield GaugeMetricFamily(
                "penstock_pending_lines",
                "Lines of all batches that lack their result, in the whole cluster, but for "
                "those that a provider's batch API has.",
                self.pending_lines,
            )
        natives = GaugeMetricFamily(
            "penstock_native_lines",
            "Lines that providers run in batches of their own, or soon will.",
            labels=["upstream", "status"],
        )
        for (upstream, status), count in sorted(self.native_lines.items()):
            natives.add_metric([upstream, status], count)
        yield natives
        yield from self._collect_natives()
        yield HistogramMetricFamily(
            "penstock_flush_duration_seconds",
            "How long it took to make a group of results durable.",
            buckets=work.flushes.buckets(),
            sum_value=work.flushes.sum_s,
        )
        yield CounterMetricFamily(
            "penstock_flushed_bytes", "Bytes of results made durable.", work.flushed_bytes
        )
        faults = GaugeMetricFamily(
            "penstock_fault", "A fault that keeps this process from its work.", labels=["fault"]
        )
        for name in self._health.faults():
            faults.add_metric([name], 1)
        yield faults

    def _collect_natives(self) -> Iterator[Metric]:
        tokens = CounterMetricFamily(
            "penstock_native_tokens",
            "Tokens that batches of providers took; cached ones are input too.",
            labels=["upstream", "kind"],
        )
        unpriced = CounterMetricFamily(
            "penstock_native_unpriced_tokens",
            "Tokens among them of which it is not known what they cost.",
            labels=["upstream"],
        )
        cost = CounterMetricFamily(
            "penstock_native_cost_usd",
            "What the others cost, at today's prices, in US dollars.",
            labels=["upstream"],
        )
        by_line = CounterMetricFamily(
            "penstock_native_by_line_cost_usd",
            "What tokens would have cost line by line, where that is known, in US dollars.",
            labels=["upstream"],
        )
        for name, figures in sorted(self.native_figures.items()):
            tokens.add_metric([name, "input"], figures.input_tokens)
            tokens.add_metric([name, "cached"], figures.cached_tokens)
            tokens.add_metric([name, "output"], figures.output_tokens)
            unpriced.add_metric([name], figures.unpriced_tokens)
            if figures.cost_usd is not None:
                cost.add_metric([name], figures.cost_usd)
            if figures.by_line_usd is not None:
                by_line.add_metric([name], figures.by_line_usd)
        yield from (tokens, unpriced, cost, by_line)

    def _collect_upstreams(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "penstock_upstream_requests",
            "Attempts at lines, by HTTP status or by why there was none.",
            labels=["upstream", "outcome"],
        )
        free = CounterMetricFamily(
            "penstock_upstream_free_requests",
            "Attempts among them that do not count for max_attempts.",
            labels=["upstream"],
        )
        durations = HistogramMetricFamily(
            "penstock_upstream_request_duration_seconds",
            "How long an attempt at a line took.",
            labels=["upstream"],
        )
        tokens = CounterMetricFamily(
            "penstock_upstream_tokens",
            "Tokens that successful lines took; cached ones are input too.",
            labels=["upstream", "kind"],
        )
        for name, stats in self._upstreams.items():
            for outcome, count in sorted(stats.requests.items()):
                requests.add_metric([name, outcome], count)
            free.add_metric([name], stats.free)
            durations.add_metric([name], stats.durations.buckets(), stats.durations.sum_s)
            tokens.add_metric([name, "input"], stats.input_tokens)
            tokens.add_metric([name, "cached"], stats.cached_tokens)
            tokens.add_metric([name, "output"], stats.output_tokens)
        yield from (requests, free, durations, tokens)

    def _collect_lanes(self) -> Iterator[Metric]:
        def gauge(name: str, told: str, *labels: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"penstock_{name}", told, labels=labels)

        queued = gauge("lane_queued_lines", "Lines that are ready to be sent.", "lane")
        parked = gauge("lane_parked_lines", "Lines that wait for an open circuit.", "lane")
        in_flight = gauge("upstream_in_flight_requests", "Lines in flight.", "upstream")
        limit = gauge(
            "upstream_concurrency_limit", "Lines that may be in flight now.", "upstream"
        )
        most = gauge("upstream_max_concurrency", "The setting max_concurrency.", "upstream")
        limited = gauge(
            "upstream_limited", "1 while this keeps lines waiting.", "upstream", "reason"
        )
        running = gauge(
            "upstream_engine_running_requests", "What the engine tells.", "upstream"
        )
        waiting = gauge(
            "upstream_engine_waiting_requests", "What the engine tells.", "upstream"
        )
        for name, lane in self._measure_lanes().items():
            queued.add_metric([name], lane.queued)
            parked.add_metric([name], lane.parked)
            for upstream, gauges in lane.upstreams.items():
                in_flight.add_metric([upstream], gauges.in_flight)
                limit.add_metric([upstream], gauges.limit)
                most.add_metric([upstream], gauges.most)
                if gauges.limited_by:
                    limited.add_metric([upstream, gauges.limited_by], 1)
                if gauges.engine_running is not None:
                    running.add_metric([upstream], gauges.engine_running)
                if gauges.engine_waiting is not None:
                    waiting.add_metric([upstream], gauges.engine_waiting)
        yield from (queued, parked, in_flight, limit, most, limited, running, waiting)


class _Patient:
    """A stream to which nothing can go wrong: what it does not take is lost, not the work.

    A log that is redirected to a full disk, or to a reader that has gone, raises on each line.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


def configure_logging(*, level: int = logging.INFO) -> None:
    """Log to standard error: for people on a terminal, as JSON elsewhere."""
    is_terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(pad_event_to=40)
            if is_terminal
            else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Patient(sys.stderr))),
        cache_logger_on_first_use=False,
    )
    # PgQueuer tells of its own comings and goings through the standard library.
    logging.getLogger("pgqueuer").setLevel(logging.ERROR)
