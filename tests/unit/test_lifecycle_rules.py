"""What a batch needs next, and how it ends: pure rules, as tables."""

from dataclasses import replace

import pytest

from penstock.executor.lifecycle import Step, ending, next_step
from penstock.model import FINAL, Batch, BatchId, BatchStatus, FileId, ProjectId
from penstock.store.base import SliceTally

CLOSE = 1_700_000_000
BATCH = Batch(
    id=BatchId("batch-1"),
    project_id=ProjectId("proj-1"),
    status=BatchStatus.IN_PROGRESS,
    endpoint="/v1/chat/completions",
    input_file_id=FileId("file-1"),
    input_blob_key="files/file-1",
    completion_window="24h",
    expires_at=CLOSE,
    created_at=CLOSE - 86_400,
)
S = BatchStatus


def step(status: BatchStatus, *, now: float = CLOSE - 1, **slices: int) -> Step:
    return next_step(replace(BATCH, status=status), SliceTally(**slices), now=now)


@pytest.mark.parametrize("status", [S.IN_PROGRESS, S.FINALIZING])
@pytest.mark.parametrize(
    ("slices", "in_time", "late"),
    [
        ({"ended": 3}, Step.WRITE, Step.WRITE),
        ({"ended": 2, "pending": 1}, Step.WAIT, Step.WRITE),
        ({"ended": 2, "running": 1}, Step.WAIT, Step.STOP),
        ({"running": 1, "pending": 5}, Step.WAIT, Step.STOP),
        ({"pending": 5}, Step.WAIT, Step.WRITE),
        ({"pending": 5, "native": 1}, Step.WAIT, Step.STOP),
        ({"ended": 2, "pending": 1, "native": 1}, Step.WAIT, Step.STOP),
    ],
)
def test_a_batch_is_written_when_its_slices_ended_or_its_window_closed_and_none_runs(
    status: BatchStatus, slices: dict[str, int], in_time: Step, late: Step
) -> None:
    assert step(status, now=CLOSE - 0.001, **slices) is in_time
    assert step(status, now=CLOSE, **slices) is late
    assert step(status, now=CLOSE + 86_400, **slices) is late


@pytest.mark.parametrize("now", [CLOSE - 1, CLOSE, CLOSE + 1])
@pytest.mark.parametrize(
    ("slices", "expected"),
    [
        ({}, Step.WRITE),
        ({"ended": 3}, Step.WRITE),
        ({"pending": 3}, Step.WRITE),
        ({"pending": 2, "running": 1}, Step.STOP),
        ({"ended": 2, "running": 1}, Step.STOP),
        ({"ended": 2, "pending": 2, "native": 1}, Step.STOP),
    ],
)
def test_a_cancelled_batch_is_written_when_none_of_its_slices_runs(
    slices: dict[str, int], expected: Step, now: float
) -> None:
    assert step(S.CANCELLING, now=now, **slices) is expected


@pytest.mark.parametrize("status", [S.VALIDATING, *sorted(FINAL)])
def test_a_batch_that_has_not_begun_or_has_ended_needs_nothing(status: BatchStatus) -> None:
    assert step(status, ended=3) is Step.WAIT
    assert step(status, now=CLOSE + 1, running=1, pending=1) is Step.WAIT


@pytest.mark.parametrize(
    ("status", "is_whole", "expected"),
    [
        (S.FINALIZING, True, S.COMPLETED),
        (S.FINALIZING, False, S.EXPIRED),
        (S.CANCELLING, True, S.CANCELLED),
        (S.CANCELLING, False, S.CANCELLED),
    ],
)
def test_how_a_batch_ends(status: BatchStatus, is_whole: bool, expected: BatchStatus) -> None:
    assert ending(replace(BATCH, status=status), is_whole=is_whole) is expected
