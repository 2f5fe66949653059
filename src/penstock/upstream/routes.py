"""Which upstream takes a line, and which models there are to choose from."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from penstock.errors import UpstreamDown
from penstock.upstream.base import BatchUpstream, LineUpstream

_ASK_S = 5.0
_FRESH_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeUse:
    """How the batch API of an upstream is used."""

    upstream: BatchUpstream
    from_requests: int = 1
    """With fewer lines of one kind in a batch, they are sent one by one."""
    falls_back: bool = False
    """Whether what a job leaves over is sent line by line, to the same upstream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """An upstream, or several that share their lines, and the models whose lines they take."""

    name: str
    """The upstream's, or the group's."""
    upstreams: tuple[LineUpstream, ...]
    models: tuple[str, ...]
    """Glob patterns; case counts."""
    native: NativeUse | None = None
    """Its batch API, where that takes lines; only of a single upstream."""

    def takes(self, model: str) -> bool:
        return any(fnmatchcase(model, pattern) for pattern in self.models)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model that a client may name."""

    id: str
    owned_by: str
    """The upstream or group that takes its lines, as the settings call it."""


class Routes:
    """The upstreams in the order of the settings: the first that matches takes the line."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes = tuple(routes)
        self._named = {route.name: route for route in self._routes}
        self._found: dict[str, Route | None] = {}
        self._listed: list[ServedModel] = []
        self._listed_until = 0.0

    def find(self, model: str, *, upstream: str | None = None) -> Route | None:
        """The route that takes lines of `model`, or None.

        Args:
            upstream: The name of the route that was asked for, whatever its models are.
        """
        if upstream is not None:
            return self.get(upstream)
        if model not in self._found:
            if len(self._found) > 10_000:
                self._found.clear()  # clients choose these names
            self._found[model] = next((r for r in self._routes if r.takes(model)), None)
        return self._found[model]

    def find_one(self, model: str, upstream: str | None) -> str | None:
        """The one upstream that takes lines of `model`; None if there is none, or a group.

        Args:
            upstream: As for `find`.
        """
        route = self.find(model, upstream=upstream)
        return route.name if route is not None and len(route.upstreams) == 1 else None

    def get(self, name: str) -> Route | None:
        """The route of this name."""
        return self._named.get(name)

    @property
    def find_after_s(self) -> float:
        """After how long every batch API can be asked what became of a submission."""
        return max(
            (route.native.upstream.find_after_s for route in self._routes if route.native),
            default=0.0,
        )

    async def list_models(self) -> list[ServedModel]:
        """The models that can be named: what each upstream says it serves, as far as lines of
        it would go there, and the names that the settings spell out.

        An upstream that does not answer within 5 s adds only the latter. The answer is kept
        for 15 s.
        """
        if time.monotonic() >= self._listed_until:
            answers = await asyncio.gather(*(_ask(route) for route in self._routes))
            named = [[m for m in r.models if not set(m) & set("*?[")] for r in self._routes]
            listed: dict[str, ServedModel] = {}
            for route, answer, names in zip(self._routes, answers, named, strict=True):
                for model in sorted({*answer, *names}):
                    if self.find(model) is route:
                        listed[model] = ServedModel(id=model, owned_by=route.name)
            self._listed = list(listed.values())
            self._listed_until = time.monotonic() + _FRESH_S
        return self._listed

    async def close(self) -> None:
        """Close all upstreams."""
        for route in self._routes:
            for upstream in route.upstreams:
                await upstream.close()
            if route.native is not None:
                await route.native.upstream.close()

    def __iter__(self):
        return iter(self._routes)


async def _ask(route: Route) -> set[str]:
    """What the upstreams of a route say that they serve."""
    answers = await asyncio.gather(*map(_ask_one, route.upstreams))
    return {model for answer in answers for model in answer}


async def _ask_one(upstream: LineUpstream) -> list[str]:
    try:
        async with asyncio.timeout(_ASK_S):
            return await upstream.list_models()
    except (UpstreamDown, TimeoutError):
        return []
