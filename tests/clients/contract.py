"""What every official client must see. A test class inherits, and has a fixture `seen`."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

from tests.clients.conftest import PROMPTS

MONTH_S = 30 * 24 * 3600
LIFE_S = 7200
"""What the flows ask for in `expires_after`."""

REFUSALS = {
    "unknown_batch": ("NotFoundError", 404, None, None, "batch_unknown"),
    "unknown_file": ("NotFoundError", 404, "id", None, "file-unknown"),
    "wrong_endpoint": ("BadRequestError", 400, "endpoint", "invalid_value", "/v1/x"),
    "not_jsonl": ("BadRequestError", 400, None, None, "Invalid file format for Batch API"),
    "wrong_key": ("AuthenticationError", 401, None, "invalid_api_key", "Incorrect API key"),
}
"""By the flows' names: class, status, `param`, `code` and some words of the message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a flow has printed, and what is told of the client beside it."""

    document: Any
    version: str
    """The client's version, or how it begins."""
    rooms: frozenset[str] = frozenset({"/v1"})
    """Below which paths it finds files and batches."""

    @property
    def files(self) -> Any:
        return self.document["files"]

    @property
    def batches(self) -> Any:
        return self.document["batches"]

    @property
    def exchanges(self) -> list[Any]:
        return self.document["exchanges"]


def lines(text: str) -> dict[str, Any]:
    """A result file's lines by `custom_id`; each must be there once."""
    assert text.endswith("\n")
    parsed = [json.loads(line) for line in text[:-1].split("\n")]
    assert max(Counter(line["custom_id"] for line in parsed).values()) == 1
    return {line["custom_id"]: line for line in parsed}


def assert_refused(refusal: Any, name: str, status: int, words: str) -> None:
    """That the client raised, at once, an error with all that it shows to a program."""
    assert (refusal["name"], refusal["status"]) == (name, status)
    assert words in refusal["message"]
    assert refusal["type"] == "invalid_request_error"
    assert refusal["request_id"].startswith("req_")
    assert refusal["requests"] == 1


class ClientContract:
    def test_it_is_the_client_that_is_meant(self, seen: Seen) -> None:
        rooms = {
            path.partition(word)[0]
            for path in (exchange["path"] for exchange in seen.exchanges)
            for word in ("/files", "/batches")
            if word in path
        }

        assert seen.document["version"].startswith(seen.version)
        assert rooms == seen.rooms

    def test_every_answer_is_direct_and_names_its_request(self, seen: Seen) -> None:
        assert {exchange["status"] for exchange in seen.exchanges} == {200, 400, 401, 404, 409}
        ids = [exchange["request_id"] for exchange in seen.exchanges]
        assert all(ids)
        assert len(set(ids)) == len(ids)

    @pytest.mark.parametrize("way", ["from_path", "from_bytes", "from_stream"])
    def test_a_file_may_be_given_in_any_way(self, seen: Seen, way: str) -> None:
        file = seen.files[way]

        assert (file["object"], file["purpose"]) == ("file", "batch")
        assert file["bytes"] == len(seen.files["content"].encode())

    def test_a_file_keeps_its_name_and_is_processed_at_once(self, seen: Seen) -> None:
        uploaded = seen.files["from_path"]

        assert (uploaded["filename"], uploaded["status"]) == ("requests.jsonl", "processed")
        assert seen.files["retrieved"] == seen.files["waited"] == uploaded

    def test_a_file_is_kept_as_long_as_was_asked_or_for_a_month(self, seen: Seen) -> None:
        lives = [
            seen.files[way]["expires_at"] - seen.files[way]["created_at"]
            for way in ("from_path", "from_bytes")
        ]

        assert lives == [LIFE_S, MONTH_S]

    def test_a_file_comes_back_as_it_was_sent(self, seen: Seen) -> None:
        sent = [json.loads(line) for line in seen.files["content"].splitlines()]

        prompts = {line["custom_id"]: line["body"]["messages"][0]["content"] for line in sent}
        assert prompts == PROMPTS

    def test_files_are_listed_over_all_pages(self, seen: Seen) -> None:
        ways = ("from_path", "from_bytes", "from_stream")

        assert seen.files["listed"] == [seen.files[way]["id"] for way in ways]

    def test_a_deleted_file_is_gone(self, seen: Seen) -> None:
        file_id = seen.files["from_bytes"]["id"]

        assert seen.files["deleted"] == {"id": file_id, "object": "file", "deleted": True}
        refusal = seen.files["after_delete"]
        assert_refused(refusal, "NotFoundError", 404, f"No such File object: {file_id}")

    def test_metadata_is_given_back_and_may_be_null(self, seen: Seen) -> None:
        assert seen.batches["named"]["metadata"] == {"team": "search"}
        assert seen.batches["completed"]["metadata"] == {"team": "search"}
        assert seen.batches["plain"]["metadata"] is None

    def test_a_batch_begins_without_results(self, seen: Seen) -> None:
        batch = seen.batches["named"]

        assert batch["status"] in ("validating", "in_progress")
        assert batch["expires_at"] - batch["created_at"] == 24 * 3600
        assert batch["output_file_id"] is batch["error_file_id"] is batch["errors"] is None

    def test_a_batch_completes_with_one_line_for_each_request(self, seen: Seen) -> None:
        batch = seen.batches["completed"]
        good, bad = lines(seen.batches["output"]), lines(seen.batches["errors"])

        assert batch["status"] == "completed"
        assert batch["request_counts"] == {"total": 4, "completed": 3, "failed": 1}
        assert batch["usage"]["total_tokens"] == 15
        assert good.keys() | bad.keys() == PROMPTS.keys()
        assert bad.keys() == {"refused"}

    def test_result_lines_hold_what_the_upstream_said(self, seen: Seen) -> None:
        good, bad = lines(seen.batches["output"]), lines(seen.batches["errors"])

        texts = {
            custom_id: line["response"]["body"]["choices"][0]["message"]["content"]
            for custom_id, line in good.items()
        }
        assert texts == {name: f"You said: {PROMPTS[name]}" for name in good}
        refused = bad["refused"]
        assert refused["response"]["status_code"] == 400
        assert refused["response"]["body"]["error"]["message"] == "No such luck."
        for line in (*good.values(), refused):
            assert line.keys() == {"id", "custom_id", "response", "error"}
            assert line["error"] is None

    def test_batches_are_listed_newest_first_over_all_pages(self, seen: Seen) -> None:
        newest_first = seen.batches["made"][::-1]

        assert seen.batches["first_page"] == newest_first
        assert seen.batches["listed"] == newest_first

    def test_a_running_batch_is_cancelled(self, seen: Seen) -> None:
        cancelling, cancelled = seen.batches["cancelling"], seen.batches["cancelled"]

        assert cancelling["status"] in ("cancelling", "cancelled")
        assert cancelled["status"] == "cancelled"
        assert cancelled["cancelling_at"] == cancelling["cancelling_at"]

    def test_a_second_cancel_changes_nothing(self, seen: Seen) -> None:
        assert seen.batches["cancelled_again"] == seen.batches["cancelled"]

    def test_a_cancel_that_comes_too_late_is_refused_at_once(self, seen: Seen) -> None:
        words = "Cannot cancel a batch with status 'completed'."

        assert_refused(seen.batches["cancel_of_completed"], "ConflictError", 409, words)
        [conflict] = [exchange for exchange in seen.exchanges if exchange["status"] == 409]
        assert conflict["should_retry"] == "false"

    @pytest.mark.parametrize("case", REFUSALS)
    def test_an_error_is_raised_with_all_its_fields(self, seen: Seen, case: str) -> None:
        name, status, param, code, words = REFUSALS[case]
        refusal = seen.document["refused"][case]

        assert_refused(refusal, name, status, words)
        assert (refusal["param"], refusal["code"]) == (param, code)


class UploadsContract:
    """For a fixture `seen` whose document is that of the flow `uploads`."""

    def test_an_upload_begins_pending_and_ends_in_an_hour(self, seen: Any) -> None:
        upload = seen["created"]

        assert (upload["object"], upload["status"]) == ("upload", "pending")
        assert (upload["filename"], upload["purpose"]) == ("parts.jsonl", "batch")
        assert upload["bytes"] == len(seen["content"].encode())
        assert upload["expires_at"] - upload["created_at"] == 3600

    def test_a_part_names_its_upload(self, seen: Any) -> None:
        part = seen["part"]

        assert (part["object"], part["upload_id"]) == ("upload.part", seen["created"]["id"])

    def test_parts_become_a_file_in_the_order_in_which_they_are_named(self, seen: Any) -> None:
        sent = [json.loads(line)["custom_id"] for line in seen["content"].splitlines()]

        assert sent == list(PROMPTS)

    def test_a_completed_upload_holds_its_file(self, seen: Any) -> None:
        upload = seen["completed"]
        file = upload["file"]

        assert (upload["id"], upload["status"]) == (seen["created"]["id"], "completed")
        assert (file["object"], file["purpose"], file["status"]) == (
            "file",
            "batch",
            "processed",
        )
        assert (file["filename"], file["bytes"]) == ("parts.jsonl", upload["bytes"])
        assert file["expires_at"] - file["created_at"] == LIFE_S

    def test_a_batch_runs_from_a_file_that_came_in_parts(self, seen: Any) -> None:
        batch = seen["batch"]

        assert batch["status"] == "completed"
        assert batch["request_counts"] == {"total": 4, "completed": 3, "failed": 1}

    def test_an_upload_that_is_too_short_is_not_completed(self, seen: Any) -> None:
        assert_refused(seen["refused"]["too_short"], "BadRequestError", 400, "bytes")

    def test_a_cancelled_upload_takes_no_part(self, seen: Any) -> None:
        late = seen["refused"]["late_part"]

        assert seen["cancelled"]["status"] == "cancelled"
        assert_refused(late, late["name"], late["status"], "cancelled")
        assert late["status"] in (400, 409)

    def test_an_unknown_upload_is_not_found(self, seen: Any) -> None:
        unknown = seen["refused"]["unknown"]
        assert_refused(unknown, "NotFoundError", 404, "upload_unknown")
