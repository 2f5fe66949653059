"""Whether the process lives, whether it can work, and how the work goes."""

from typing import Protocol

from fastapi import Request, Response

from penstock.api.wire import answer
from penstock.telemetry import METRICS_TYPE


class Health(Protocol):
    """Knows what is wrong with the process."""

    def faults(self) -> dict[str, str]:
        """What is wrong, in a sentence each, by the name of the part; empty if nothing is."""
        ...


class Metrics(Protocol):
    """Knows how the work goes."""

    def render(self) -> bytes:
        """All of it, in Prometheus' text format."""
        ...


async def is_alive() -> Response:
    """Tell whether the process runs."""
    return answer({"status": "ok"})


async def is_ready(request: Request) -> Response:
    """Tell whether the process can work.

    If not, why: each fault in a sentence.
    """
    health: Health = request.app.state.health
    faults = health.faults()
    if faults:
        return answer({"status": "unavailable", "faults": faults}, status=503)
    return answer({"status": "ok", "faults": {}})


async def get_metrics(request: Request) -> Response:
    """Tell how the work goes, in Prometheus' text format."""
    metrics: Metrics = request.app.state.metrics
    return Response(metrics.render(), media_type=METRICS_TYPE)
