"""What a person should know of an object store that does not do what it is asked.

Object stores tell their troubles in their own ways: by status, by a code in XML, by silence.
Here they become one sentence, which names the storage and says what to do. Nothing of what
the store wrote is passed on but its code: its texts repeat signatures and signed addresses.
"""

import re

from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

_CODE = re.compile(r"<Code>([A-Za-z]{1,64})</Code>")
_STATUS = re.compile(r"status code: (\d{3})")
_ADDRESS = re.compile(r"\S*://\S+")

_FULL = {"QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "InsufficientCapacity"}
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound"}
_NO_UPLOAD = {"NoSuchUpload", "InvalidBlockList"}
_SLOW = {"SlowDown", "ServerBusy", "TooManyRequests", "RequestLimitExceeded"}
_METADATA_SERVERS = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")
"""Where credentials are looked for if none were given."""


def names_no_bucket(error: BaseException) -> bool:
    """Whether a store answered so because the bucket itself is not there."""
    text = str(error)
    return _code(text) in _NO_BUCKET or "bucket does not exist" in text


def names_no_upload(error: BaseException) -> bool:
    """Whether a store does not know an upload in parts, or not any more."""
    return _code(str(error)) in _NO_UPLOAD


def explain(error: BaseException, *, url: str, is_write: bool) -> str:
    """The sentence for an error of obstore.

    Args:
        url: The storage, as the settings name it.
        is_write: Whether something was to be written or deleted there.
    """
    did = "did not take a write" if is_write else "did not answer"
    return f"The storage {url} {did}: {_reason(error)}."


def _reason(error: BaseException) -> str:
    text = str(error)
    code, status = _code(text), _status(text)
    told = f" ({code or status})" if code or status else ""
    if status == "507" or code in _FULL:
        return f"it is full or over its quota{told}; make room there, then work goes on"
    if names_no_bucket(error):
        return f"there is no such bucket{told}; make it, or set another storage_url"
    if any(server in text for server in _METADATA_SERVERS):
        return "no credentials were found for it; give them in the environment"
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in (
        "401",
        "403",
    ):
        return (
            f"it refuses the credentials, or they lack a right{told}; they must be allowed to "
            "read, write, list and delete there"
        )
    if status in ("429", "503") or code in _SLOW:
        return f"it has too much to do{told}; work goes on when it has room"
    if "Timeout" in text or "timed out" in text:
        return "it did not answer in time; see whether it and the network work"
    if "kind: Connect" in text:
        return "it cannot be reached; see whether its address is right and the network works"
    if status:
        return f"it answered with an error{told}; its own log may say why"
    if "HTTP error" in text:
        return "the connection broke off; see whether it and the network work"
    return _plain(text) or type(error).__name__


def _code(text: str) -> str | None:
    found = _CODE.search(text)
    return found.group(1) if found else None


def _status(text: str) -> str | None:
    found = _STATUS.search(text)
    return found.group(1) if found else None


def _plain(text: str) -> str:
    """The first line of an error, without addresses, for these may be signed."""
    line = (text.strip() or " ").splitlines()[0]
    return _ADDRESS.sub("…", line).strip().rstrip(".")
