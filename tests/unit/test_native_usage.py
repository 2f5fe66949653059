"""What a job of a provider took, from the slices that its run holds."""

from dataclasses import replace
from typing import Any

from penstock.executor.native_lines import count_up
from penstock.model import (
    Batch,
    BatchId,
    BatchStatus,
    FileId,
    NativeRun,
    NativeRunId,
    ProjectId,
    Slice,
    Spent,
    Usage,
)


def batch(**parameters: str) -> Batch:
    return Batch(
        id=BatchId("batch-1"),
        project_id=ProjectId("p"),
        status=BatchStatus.IN_PROGRESS,
        endpoint="/v1/chat/completions",
        input_file_id=FileId("file-1"),
        input_blob_key="files/1",
        completion_window="24h",
        created_at=0,
        expires_at=86400,
        parameters={name.replace("_", "-"): value for name, value in parameters.items()},
    )


def piece(index: int, *models: str, **more: Any) -> Slice:
    usage = Usage(
        input_tokens=10 * (index + 1),
        cached_tokens=3,
        output_tokens=2,
        reasoning_tokens=1,
        total_tokens=10 * (index + 1) + 2,
    )
    return Slice(
        batch_id=BatchId("batch-1"),
        index=index,
        start=index,
        end=index + 1,
        first_line=index + 1,
        requests=5,
        completed=4,
        failed=1,
        models=models,
        usage=usage,
        **more,
    )


def run_of(slices: int) -> NativeRun:
    """A run that was given so many slices."""
    return NativeRun(
        id=NativeRunId("nat-1"),
        batch_id=BatchId("batch-1"),
        upstream="far",
        model="m",
        requests=5 * slices,
        due_at=0.0,
    )


def model_of(spent: Spent | None) -> str | None:
    return spent.model if spent else None


BOTH = Usage(
    input_tokens=30, cached_tokens=6, output_tokens=4, reasoning_tokens=2, total_tokens=34
)


def test_what_all_slices_took_is_summed() -> None:
    spent = count_up(run_of(2), [piece(0, "m"), piece(1, "m")], batch(), longest_input=9)

    assert spent == Spent(answered=8, usage=BOTH, model="m", longest_input=9)


def test_lines_of_several_models_have_no_one_model() -> None:
    for models in (("a", "b"), ("a",)):
        spent = count_up(
            run_of(2), [piece(0, *models), piece(1, "b")], batch(), longest_input=None
        )
        assert spent == Spent(answered=8, usage=BOTH, model=None, longest_input=None)


def test_the_model_that_a_client_chose_takes_the_place_of_those_of_the_lines() -> None:
    slices = [piece(0, "a", "b")]
    chosen = {"x_tfy_provider_model": "chosen"}

    assert model_of(count_up(run_of(1), slices, batch(**chosen), longest_input=1)) == "chosen"
    chosen["x_tfy_aws_bedrock_model"] = "of-amazon"
    found = count_up(run_of(1), slices, batch(**chosen), longest_input=1)
    assert model_of(found) == "of-amazon"


def test_a_job_without_an_answer_took_nothing() -> None:
    empty = replace(piece(0, "m"), completed=0, usage=Usage())

    assert count_up(run_of(1), [empty], batch(), longest_input=0) == Spent(
        answered=0, usage=Usage(), model="m", longest_input=0
    )


def test_a_job_of_which_slices_are_gone_took_what_nobody_knows() -> None:
    for left in ([], [piece(0, "m")]):
        assert count_up(run_of(2), left, batch(), longest_input=1) is None
