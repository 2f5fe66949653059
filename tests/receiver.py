"""A webhook in a thread of its own, for tests that run the program as processes.

with run_receiver() as receiver:
    receiver.answers = [500, 500]  # and 200 from then on
    ...  # let events be sent to receiver.url
    receiver.wait_for(3)
"""

import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from openai import OpenAI

from penstock.signing import new_secret

PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Event:
    """An event as it came, with its headers by lower-case name."""

    headers: dict[str, str]
    body: bytes

    @property
    def delivery_id(self) -> str:
        return self.headers["webhook-id"]

    def unwrap(self, secret: str) -> Any:
        """As OpenAI's client reads it. Raises unless its signature is good and new."""
        with OpenAI(api_key="-", base_url="http://127.0.0.1:9") as client:
            return client.webhooks.unwrap(self.body, self.headers, secret=secret)


class Receiver:
    """What came, and what is answered."""

    def __init__(self) -> None:
        self.url = ""
        self.secret = new_secret()
        self.events: list[Event] = []
        self.answers: list[int | None] = []
        """The statuses of the next answers, 200 when none is left; None says nothing."""
        self.changed = threading.Condition()
        self.is_over = threading.Event()

    def wait_for(self, count: int) -> list[Event]:
        """Wait until that many events have come in all."""
        with self.changed:
            is_there = self.changed.wait_for(lambda: len(self.events) >= count, PATIENCE_S)
        assert is_there, f"{len(self.events)} of {count} events came"
        return list(self.events)

    def table(self, **more: str) -> str:
        """The table of this webhook in a settings file."""
        settings = {
            "project": '"default"',
            "url": f'"{self.url}"',
            "secret": f'"{self.secret}"',
            "allow_private_addresses": "true",
            **more,
        }
        return "[[webhooks]]\n" + "".join(f"{k} = {v}\n" for k, v in settings.items())


@contextmanager
def run_receiver() -> Generator[Receiver]:
    receiver = Receiver()
    handler = type("Handler", (_Handler,), {"receiver": receiver})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    receiver.url = f"http://127.0.0.1:{server.server_port}/hook"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.is_over.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    receiver: Receiver

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        receiver = self.receiver
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        with receiver.changed:
            receiver.events.append(Event(headers, body))
            status = receiver.answers.pop(0) if receiver.answers else 200
            receiver.changed.notify_all()
        if status is None:
            receiver.is_over.wait(PATIENCE_S)
            return
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()
