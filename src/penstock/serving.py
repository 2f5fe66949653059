"""The processes that serve: the API with or without workers, and workers alone."""

import asyncio
import contextlib
import gc
import math
import signal
import socket
from collections.abc import Callable, Coroutine, Generator

import structlog
import uvicorn
from starlette.types import ASGIApp

from penstock import __version__
from penstock.api.routes import create_api, create_health_api
from penstock.app import App, open_app, raise_file_limit
from penstock.errors import InvalidSettings
from penstock.places import KEY_FILE
from penstock.settings import Settings

_log = structlog.get_logger()

_GARBAGE = 20_000
"""After how many new objects the collector looks for cycles; lines leave none behind."""
_M_ARENA_MAX = -8  # of glibc's malloc.h


async def serve(
    settings: Settings, *, works: bool = True, announce: Callable[[str, App], None]
) -> None:
    """Serve the API, and run the work beside it, until SIGTERM or SIGINT.

    Args:
        works: Whether this process runs lines too.
        announce: Called with the API's address once it answers.

    Raises:
        InvalidSettings: The address cannot be listened on; nothing was made.
    """
    raise_file_limit()
    with _listen(settings.server.host, settings.server.port) as listener:
        async with open_app(settings, works=works) as app:
            open_project = None if settings.server.auth else app.project_id
            api = create_api(
                app.service, app.uploads, app.health, app.metrics, open_project=open_project
            )
            await _serve(settings, api, listener, lambda at: announce(at, app))
    _log.info("Stopped.")


async def work(settings: Settings, *, announce: Callable[[str | None], None]) -> None:
    """Run lines of a cluster until SIGTERM or SIGINT.

    Args:
        announce: Called once it works, with the address at which it tells how it is, if it
            does.

    Raises:
        InvalidSettings: There is no cluster, or the address cannot be listened on.
    """
    if settings.database_url is None:
        raise InvalidSettings(
            "`penstock work` needs a database that it shares with others: set database_url to "
            "a PostgreSQL URL. On one machine, `penstock serve` runs the work too."
        )
    raise_file_limit()
    port = settings.worker.health_port
    if port:
        with _listen(settings.server.host, port) as listener:
            async with open_app(settings, serves=False) as app:
                api = create_health_api(app.health, app.metrics)
                await _serve(settings, api, listener, announce)
    else:
        stopped = asyncio.Event()
        _on_signals(stopped.set)
        async with open_app(settings, serves=False):
            announce(None)
            await stopped.wait()
            _log.info("Stopping; what is in flight may end.")
    _log.info("Stopped.")


async def _serve(
    settings: Settings,
    api: ASGIApp,
    listener: socket.socket,
    announce: Callable[[str], None],
) -> None:
    server = _Server(
        uvicorn.Config(
            api,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=math.ceil(settings.server.shutdown_grace_s),
        )
    )
    _on_signals(server.ask_to_stop)
    serving = asyncio.create_task(server.serve([listener]))
    try:
        while not (server.started or serving.done()):  # noqa: ASYNC110  (no event to await)
            await asyncio.sleep(0.01)
        if server.started:
            # What lives now lives long: the collector need not walk it again and again.
            gc.collect()
            gc.freeze()
            gc.set_threshold(_GARBAGE)
            announce(_address(listener))
        await serving
    finally:
        server.should_exit = True
        await serving


def _on_signals(call: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, call)


class _Server(uvicorn.Server):
    """Uvicorn, without its hold on signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield

    def ask_to_stop(self) -> None:
        """Stop in good order; asked a second time, at once."""
        _log.info("Stopping; what is in flight may end. A second signal stops at once.")
        self.force_exit = self.should_exit
        self.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    try:
        place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(place[0])
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(place[4])
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise InvalidSettings(
            f"The address {host}, port {port}, cannot be listened on: {error.strerror}. "
            "Choose others with --host and --port; port 0 takes a free one."
        ) from error
    return listener


def _address(listener: socket.socket) -> str:
    """Where it listens; the port is the real one also if 0 was asked for."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def greeting(address: str, app: App, settings: Settings) -> str:
    """What `serve` prints once it answers."""
    where = (
        f"data in {settings.data_dir}" if settings.database_url is None else "a cluster's API"
    )
    lines = [f"Penstock {__version__} listens on {address} ({where})."]
    if not settings.upstreams:
        lines.append(
            "There is no upstream yet, so every batch will fail: add --upstream URL or an "
            "[[upstreams]] table to the settings."
        )
    if app.first_key is not None:
        lines += [
            f"Your API key, shown only this once: {app.first_key}",
            f"It is kept in {settings.data_dir / KEY_FILE} for the commands of this directory.",
        ]
    if not settings.server.auth:
        lines.append("No key is asked for.")
    return "\n".join(lines)


def run_server(settings: Settings, *, works: bool = True) -> None:
    """Serve until the process is told to stop. What `penstock serve` does."""

    def announce(address: str, app: App) -> None:
        print(greeting(address, app, settings), flush=True)

    _run(serve(settings, works=works, announce=announce))


def run_worker(settings: Settings) -> None:
    """Work until the process is told to stop. What `penstock work` does."""

    def announce(address: str | None) -> None:
        told = f"; it tells how it is at {address}" if address else ""
        print(f"Penstock {__version__} works{told}.", flush=True)

    _run(work(settings, announce=announce))


def _run(process: Coroutine[None, None, None]) -> None:
    import uvloop  # noqa: PLC0415  (not on every platform)

    _share_arenas()
    uvloop.run(process)


def _share_arenas() -> None:
    """Let all threads share two of glibc's memory arenas.

    Each thread would get one of its own, and what one of them once needed stays with it.
    """
    import ctypes  # noqa: PLC0415  (needed here alone)

    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)
