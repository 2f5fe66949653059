"""Tokens of Google Cloud, by google-auth: the extra `vertex`.

Credentials come from the key file of a service account, or from Google's own chain (the file
that `GOOGLE_APPLICATION_CREDENTIALS` names, gcloud's, the metadata of the machine). To find
them and to ask for a token may use the network, so that is done in a thread.
"""

import asyncio
import importlib
import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pyreqwest.client import SyncClientBuilder
from pyreqwest.exceptions import RequestError
from pyreqwest.http import Url

from penstock.errors import InvalidSettings, UpstreamDown

if TYPE_CHECKING:
    from obstore.store import GCSCredential

_SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)
_TIMEOUT_S = 30.0


class GoogleTokens:
    """Tokens for one account, each for as long as it is valid.

    Args:
        name: The upstream's, for messages.
        service_account: The file of a service account's key; None: Google's own chain.

    Raises:
        InvalidSettings: google-auth is not installed, or the file is no such key.
    """

    def __init__(self, *, name: str, service_account: Path | None) -> None:
        self._name = name
        try:
            self._auth: Any = importlib.import_module("google.auth")
            self._errors: Any = importlib.import_module("google.auth.exceptions")
            accounts: Any = importlib.import_module("google.oauth2.service_account")
        except ImportError as error:
            raise InvalidSettings(
                f"The upstream {name} needs google-auth to get tokens of Google, which is not "
                "installed; install the extra vertex of Penstock."
            ) from error
        self._request = _Transport(self._errors.TransportError)
        self._lock = threading.Lock()
        self._credentials: Any = None
        if service_account is None:
            return
        try:
            self._credentials = accounts.Credentials.from_service_account_file(
                str(service_account), scopes=_SCOPES
            )
        except (OSError, ValueError, self._errors.GoogleAuthError) as error:
            raise InvalidSettings(
                f"The service_account of upstream {name}, {service_account}, is not the file "
                f"of a service account's key: {type(error).__name__}."
            ) from error

    async def headers(self) -> dict[str, str]:
        """What makes a request ours.

        Raises:
            UpstreamDown: There are no credentials, or no token is to be had now.
        """
        found = await asyncio.to_thread(self._valid)
        return {"Authorization": f"Bearer {found.token}"}

    def for_storage(self) -> "GCSCredential":
        """The same, for obstore, which asks in threads of its own that have no event loop."""
        found = self._valid()
        if found.expiry is None:  # nobody knows; so it is asked for again soon
            ends_at = datetime.now(UTC) + timedelta(minutes=5)
        else:  # until google-auth itself would ask for another
            ends_at = found.expiry.replace(tzinfo=UTC) - timedelta(minutes=3)
        return {"token": str(found.token), "expires_at": ends_at}

    def _valid(self) -> Any:
        try:
            with self._lock:  # one at a time renews them
                if self._credentials is None:
                    self._credentials, _ = self._auth.default(
                        scopes=_SCOPES, request=self._request
                    )
                if not self._credentials.valid:
                    self._credentials.refresh(self._request)
                return self._credentials
        except (self._errors.GoogleAuthError, OSError) as error:
            raise UpstreamDown(
                f"The upstream {self._name} has no token of Google: {type(error).__name__}."
            ) from error


class _Answer(NamedTuple):
    """An answer, with the names that google-auth asks for."""

    status: int
    headers: Mapping[str, str]
    data: bytes


class _Transport:
    """Makes google-auth's requests."""

    def __init__(self, transport_error: type[Exception]) -> None:
        self._error = transport_error

    def __call__(
        self,
        url: str,
        method: str = "GET",
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        **_: object,
    ) -> _Answer:
        wait = timedelta(seconds=timeout or _TIMEOUT_S)
        try:
            with SyncClientBuilder().timeout(wait).follow_redirects(False).build() as client:
                request = client.request(method, Url(url))
                for name, value in (headers or {}).items():
                    request = request.header(name, value)
                if body is not None:
                    request = request.body_bytes(body)
                answer = request.build().send()
                told = {name.lower(): value for name, value in answer.headers.items()}
                return _Answer(answer.status, told, answer.bytes().to_bytes())
        except (RequestError, ValueError) as error:
            raise self._error(type(error).__name__) from error
