"""A provider that follows Together's reference where it differs from OpenAI's."""

from datetime import UTC, datetime
from typing import Any

from tests.providers.openai_server import OpenAIProvider

_SHOWN = ("id", "endpoint", "input_file_id", "output_file_id", "error_file_id")


class TogetherProvider(OpenAIProvider):
    """States in capitals, times as dates, no metadata, and a list that is one."""

    upload_path = "/files/upload"
    purpose = "batch-api"

    def show(self, batch: dict[str, Any]) -> Any:
        faults = (batch["errors"] or {}).get("data") or []
        return {
            **{name: batch[name] for name in _SHOWN},
            "status": batch["status"].upper(),
            "created_at": datetime.fromtimestamp(batch["created_at"], UTC).isoformat(),
            "error": faults[0]["message"] if faults else None,
        }

    def show_new(self, batch: dict[str, Any]) -> Any:
        return {"job": self.show(batch)}

    def show_list(self, page: list[dict[str, Any]], *, has_more: bool) -> Any:
        return [self.show(batch) for batch in page]
