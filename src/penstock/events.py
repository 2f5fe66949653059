"""What webhooks are told. Pure.

OpenAI's event names the batch and nothing else; the rest of `data` spares its receiver the
next question.
"""

import msgspec

from penstock.model import Batch

TEST_EVENT = "webhook.test"
"""The event that `penstock webhooks test` sends."""


def batch_event(batch: Batch, *, event_id: str) -> tuple[str, str]:
    """The event of a batch that has ended.

    Returns:
        Its type, such as `batch.completed`, and its body, JSON.
    """
    type_ = f"batch.{batch.status}"
    ended_at = (
        batch.completed_at or batch.failed_at or batch.expired_at or batch.cancelled_at or 0
    )
    data = {
        "id": batch.id,
        "status": batch.status,
        "job_name": batch.job_name,
        "metadata": batch.metadata,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "request_counts": {
            "total": batch.counts.total,
            "completed": batch.counts.completed,
            "failed": batch.counts.failed,
        },
    }
    return type_, _encode(event_id, ended_at, type_, data)


def sample_event(*, event_id: str, now: int) -> str:
    """The body of an event that tells of nothing: to try whether a webhook answers."""
    return _encode(event_id, now, TEST_EVENT, {"id": "batch_0"})


def _encode(event_id: str, created_at: int, type_: str, data: object) -> str:
    event = {
        "id": event_id,
        "object": "event",
        "created_at": created_at,
        "type": type_,
        "data": data,
    }
    return msgspec.json.encode(event).decode()
