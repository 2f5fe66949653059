"""Which of Schemathesis's findings are none, and why.

All are of one kind: a request that the document allows is refused for a reason that no schema
can tell.
"""

import re

import schemathesis
from schemathesis import Case, HookContext
from schemathesis.core.failures import Failure
from schemathesis.core.transport import Response
from schemathesis.openapi.checks import RejectedPositiveData

_NEVER_GIVEN_BACK = "Not allowed to download files of purpose: (assistants|user_data)"
# What an upload takes depends on what became of it.
_UPLOAD_HAS_ENDED = r"The upload 'upload_[0-9a-f]+' is (completed|cancelled|expired):"
_REASONS = {
    "POST /v1/files": (
        # A schema cannot say what a file holds, and only if its purpose is `batch`.
        "Invalid file format for Batch API.",
    ),
    # What is refused depends on the file, and OpenAI's contract wants 400, not 403.
    "GET /v1/files/{file_id}/content": (
        _NEVER_GIVEN_BACK,
        "The range is not in the file,",  # it depends on its size
    ),
    "HEAD /v1/files/{file_id}/content": ("$",),  # the same, without its body
    "POST /v1/batches": (
        # It depends on the file.
        r"Invalid input file 'file-[0-9a-f]+': its purpose is",
        # The limit is a setting, limits.max_completion_window.
        r"Invalid value: '[0-9]+[smhd]'. Supported values of completion_window",
        # Together, the pairs of the body and those of the header are more than 16.
        "Invalid 'metadata': too many properties.",
    ),
    # The limit of purpose `batch` is a setting, limits.input_file_bytes.
    "POST /v1/uploads": ("File is too large. A file of purpose 'batch' may have",),
    "POST /v1/uploads/{upload_id}/parts": (
        _UPLOAD_HAS_ENDED,
        "The upload takes no more parts:",
    ),
    "POST /v1/uploads/{upload_id}/cancel": (_UPLOAD_HAS_ENDED,),
    "POST /v1/uploads/{upload_id}/complete": (
        _UPLOAD_HAS_ENDED,
        # It depends on the parts that have come.
        r"The upload is to have [0-9]+ bytes, but its [0-9]+ parts have",
        "Invalid 'part_ids': '.*' is (named twice|no part of this upload)",
        "The MD5 of the parts is",
        "Invalid file format for Batch API.",
    ),
}
"""By operation, how the messages of such refusals begin."""


@schemathesis.hook
def filter_failure(
    context: HookContext, failure: Failure, case: Case, response: Response
) -> bool:
    """Whether a failure is one."""
    if not isinstance(failure, RejectedPositiveData) or response.status_code not in (400, 416):
        return True
    reasons = _REASONS.get(case.operation.label, ())
    message = response.json()["error"]["message"] if response.content else ""
    return not any(re.match(reason, message, re.DOTALL) for reason in reasons)
