"""Whether the process lives, and whether it can work."""

from typing import Protocol

from fastapi import Request, Response

from penstock.api.wire import answer


class Health(Protocol):
    """Knows what is wrong with the process."""

    def faults(self) -> dict[str, str]:
        """What is wrong, in a sentence each, by the name of the part; empty if nothing is."""
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
