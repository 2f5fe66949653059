"""Signatures for requests to Amazon, by botocore: the extra `bedrock`.

Credentials come from botocore's own chain (environment, profiles, web identity, the roles of
containers and machines), which may ask the network; so that is done in a thread.
"""

import asyncio
import importlib
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from penstock.errors import InvalidSettings, UpstreamDown

if TYPE_CHECKING:
    from obstore.store import S3Credential

_KEPT = timedelta(minutes=5)
"""How long others may use credentials before they ask again; botocore renews those that end
within ten minutes."""


@dataclass(frozen=True, slots=True)
class AwsCredentials:
    access_key: str
    secret_key: str
    token: str | None


class AwsSigner:
    """Signs requests to one service in one region.

    Args:
        name: The upstream's, for messages.
        service: As signatures name it, such as `bedrock`.

    Raises:
        InvalidSettings: botocore is not installed.
    """

    def __init__(self, *, name: str, service: str, region: str) -> None:
        self._name = name
        self._service = service
        self._region = region
        try:
            self._auth: Any = importlib.import_module("botocore.auth")
            self._request: Any = importlib.import_module("botocore.awsrequest")
            self._errors: Any = importlib.import_module("botocore.exceptions")
            self._session: Any = importlib.import_module("botocore.session").Session()
        except ImportError as error:
            raise InvalidSettings(
                f"The upstream {name} needs botocore to sign requests to Amazon, which is not "
                "installed; install the extra bedrock of Penstock."
            ) from error
        self._lock = threading.Lock()

    async def sign(self, method: str, url: str, body: bytes) -> dict[str, str]:
        """The headers that make a request ours.

        Args:
            url: As it will be sent, with its query.

        Raises:
            UpstreamDown: There are no credentials, or they cannot be renewed now.
        """
        found = await self.credentials()
        request = self._request.AWSRequest(method=method, url=url, data=body)
        self._auth.SigV4Auth(found, self._service, self._region).add_auth(request)
        return {str(name): str(value) for name, value in request.headers.items()}

    async def credentials(self) -> AwsCredentials:
        """Those that are valid now.

        Raises:
            UpstreamDown: As `sign`.
        """
        return await asyncio.to_thread(self._find)

    def for_storage(self) -> "S3Credential":
        """The same, for obstore, which asks in threads of its own that have no event loop."""
        found = self._find()
        return {
            "access_key_id": found.access_key,
            "secret_access_key": found.secret_key,
            "token": found.token,
            "expires_at": datetime.now(UTC) + _KEPT,
        }

    def _find(self) -> AwsCredentials:
        try:
            with self._lock:  # a session is for one thread at a time
                found = self._session.get_credentials()
                frozen = found and found.get_frozen_credentials()
        except (self._errors.BotoCoreError, self._errors.ClientError, OSError) as error:
            raise UpstreamDown(
                f"The credentials of Amazon for the upstream {self._name} cannot be had: "
                f"{type(error).__name__}."
            ) from error
        if frozen is None:
            raise UpstreamDown(
                f"There are no credentials of Amazon for the upstream {self._name}: neither in "
                "the environment, nor in a profile, nor by a role."
            )
        return AwsCredentials(frozen.access_key, frozen.secret_key, frozen.token)
