"""What can go wrong, as one tree.

    PenstockError
    ├── InvalidRequest      the caller sent something that is not allowed
    ├── NotFound            no such object, or it belongs to another project
    ├── Conflict            the object is in a state that does not allow this
    ├── Unauthorized        no key, or one that is not known
    ├── StorageUnavailable  the disk is full, or storage or database do not answer
    ├── UpstreamDown        an upstream did not answer a question of ours (never for a line)
    ├── JobNotTaken         a provider did not take a batch now, but may later
    ├── JobRefused          a provider will never take a batch, or does not know it
    ├── InvalidSettings     a setting is unknown or wrong
    └── DataDirInUse        another process works in the same data directory

Each message is a sentence for the person who reads it: the value at fault and what is
allowed. `api.errors` alone knows how they look on the wire. What an upstream does to a line
is never an exception: it is a `Reply`.
"""


class PenstockError(Exception):
    """The base of every error that Penstock raises on purpose."""


class InvalidRequest(PenstockError):
    """The caller sent something that is not allowed; nothing was changed.

    Args:
        message: What is wrong and what is allowed.
        param: The parameter at fault, in the wire's spelling; None if it is no single one.
        code: OpenAI's error code where there is one, such as `invalid_value`.
    """

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class NotFound(PenstockError):
    """There is no such object, or it belongs to another project."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class Conflict(PenstockError):
    """The object exists, but its present state does not allow this; nothing was changed."""


class Unauthorized(PenstockError):
    """No key was given (`code` None) or it is not known (`code` `invalid_api_key`)."""

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class StorageUnavailable(PenstockError):
    """Bytes or state could not be kept for now: try again later; nothing was half done."""


class UpstreamDown(PenstockError):
    """An upstream did not answer a question of our own, such as which models it has.

    Args:
        retry_after_s: How long it asked to wait, in seconds; None if it did not.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class JobNotTaken(PenstockError):
    """A provider surely did not take a batch, nothing is paid, and it may be given again later.

    Args:
        retry_after_s: How long it asked to wait, in seconds; None if it did not.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class JobRefused(PenstockError):
    """A provider surely will not take a batch as it is, or knows no such batch.

    Args:
        is_too_large: Whether parts of it would be taken.
    """

    def __init__(self, message: str, *, is_too_large: bool = False) -> None:
        super().__init__(message)
        self.is_too_large = is_too_large


class InvalidSettings(PenstockError):
    """A setting is unknown, missing or wrong; the message names it and what is allowed."""


class DataDirInUse(PenstockError):
    """Another Penstock process works in this data directory."""
