"""Object storage for tests: moto's S3, which also speaks the XML API of Google Cloud Storage.

    with Buckets() as buckets:
        bucket = buckets.create()
        buckets.spoil("GET", Trouble(status=503))

Both clouds' buckets are read and written by the same verbs and the same XML; they differ in
how a request says whose it is, which `may_enter` decides. The process has one store for all.
"""

import logging
import secrets
import threading
from collections.abc import Callable, Iterable
from typing import Any, Self
from urllib.parse import quote

import boto3
import botocore.config
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

from tests.providers.openai_server import Trouble

_DENIED = b"<Error><Code>AccessDenied</Code><Message>Access denied.</Message></Error>"


class Buckets:
    """The server, on a free port of loopback."""

    def __init__(self) -> None:
        self.may_enter: Callable[[str], bool] = bool
        """Whether a request with this header may be carried out."""
        self.calls: list[str] = []
        """Methods and paths of all requests but our own, in order."""
        self._troubles: dict[str, list[Trouble]] = {}
        self._app = DomainDispatcherApplication(create_backend_app)
        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
        self._server = make_server(
            "127.0.0.1", 0, self._serve, threaded=True, request_handler=MotoRequestHandler
        )
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._own = secrets.token_hex(8)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=self._own,
            aws_secret_access_key="own",
            config=botocore.config.Config(
                s3={"addressing_style": "path"}, retries={"max_attempts": 0}
            ),
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    # What tests do

    def create(self) -> str:
        """The name of a new bucket."""
        name = f"bucket-{secrets.token_hex(6)}"
        self.client.create_bucket(Bucket=name)
        return name

    def spoil(self, method: str, *troubles: Trouble) -> None:
        """Let the next requests with a method go wrong, one by one."""
        self._troubles.setdefault(method, []).extend(troubles)

    def read(self, bucket: str, key: str) -> bytes:
        return self.client.get_object(Bucket=bucket, Key=key)["Body"].read()

    def write(self, bucket: str, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=bucket, Key=key, Body=data)

    def names(self, bucket: str) -> list[str]:
        found = self.client.list_objects_v2(Bucket=bucket).get("Contents", [])
        return sorted(each["Key"] for each in found)

    # The server

    def _serve(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        authorization = environ.get("HTTP_AUTHORIZATION", "")
        if self._own in authorization:
            return self._app(environ, start_response)
        method = environ["REQUEST_METHOD"]
        self.calls.append(f"{method} {environ['PATH_INFO']}")
        waiting = self._troubles.get(method)
        trouble = waiting.pop(0) if waiting else Trouble()
        if not self.may_enter(authorization):
            trouble = Trouble(status=403)
        if trouble.status:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            head = [("Content-Type", "application/xml"), ("Content-Length", str(len(_DENIED)))]
            start_response(f"{trouble.status} No", head)
            return [_DENIED]
        # Google's clients write every sign of a path in hexadecimal, which moto does not read.
        environ["RAW_URI"] = environ["REQUEST_URI"] = quote(environ["PATH_INFO"]) + (
            f"?{environ['QUERY_STRING']}" if environ["QUERY_STRING"] else ""
        )
        answer = self._app(environ, start_response)
        return _half(b"".join(answer)) if trouble.is_cut else answer


def _half(whole: bytes) -> Iterable[bytes]:
    yield whole[: len(whole) // 2]
    raise ConnectionResetError
