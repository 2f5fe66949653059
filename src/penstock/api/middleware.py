"""What surrounds every request: its ID, its time, and the answer to a fault of our own.

Plain ASGI, because a wrapper that makes request and response objects would hold streams back.
"""

import secrets
import time

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.api.errors import fault_answer

_log = structlog.get_logger()


class RequestContext:
    """Puts `x-request-id` and `openai-processing-ms` on every answer, errors too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(16)}"
        began_at = time.perf_counter()
        has_started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                took_ms = round((time.perf_counter() - began_at) * 1000)
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"openai-processing-ms", b"%d" % took_ms),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            # Nobody is there to be answered; what was begun has cleaned up after itself.
            _log.debug("A client went away.", request_id=request_id)
        except Exception:
            _log.exception("A request failed.", request_id=request_id, path=scope["path"])
            # After its start an answer can only be cut short, which the server does when
            # nothing more comes; the client sees that it is not whole.
            if not has_started:
                await fault_answer(request_id)(scope, receive, send_with_headers)
