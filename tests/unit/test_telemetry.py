"""What is told about the work."""

import subprocess
import sys
from pathlib import Path

import pytest

from penstock.telemetry import Durations, Health, Metrics, NativeFigures, UpstreamStats

LOG = """
import structlog
from penstock.telemetry import NativeFigures, configure_logging
configure_logging()
structlog.get_logger().error("Something is wrong.", why="nothing")
print("still here")
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_log_that_cannot_be_written_costs_only_itself() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", LOG]
        run = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=full, text=True, check=False
        )

    assert run.stdout == "still here\n"


def test_durations_are_counted_up_to_each_bound() -> None:
    durations = Durations((0.1, 1.0))
    for seconds in (0.05, 0.1, 0.5, 3.0):
        durations.note(seconds)

    assert durations.buckets() == [("0.1", 2), ("1.0", 3), ("+Inf", 4)]
    assert durations.sum_s == pytest.approx(3.65)


def test_all_that_is_counted_is_shown() -> None:
    health = Health()
    health.fail("storage", "The disk is full.")
    metrics = Metrics(health)
    stats: UpstreamStats = metrics.upstream("gpu")
    stats.note("200", 0.2)
    stats.note("timeout", 600.0)
    stats.add_tokens(10, 4, 5)
    metrics.work.count_batch("completed")
    metrics.work.flushes.note(0.002)
    metrics.native_figures = {
        "far": NativeFigures(
            input_tokens=10,
            cached_tokens=4,
            output_tokens=5,
            cost_usd=0.5,
            by_line_usd=1.25,
            unpriced_tokens=3,
        )
    }
    text = metrics.render().decode()

    for sample in (
        'penstock_native_tokens_total{kind="input",upstream="far"} 10.0',
        'penstock_native_tokens_total{kind="cached",upstream="far"} 4.0',
        'penstock_native_tokens_total{kind="output",upstream="far"} 5.0',
        'penstock_native_cost_usd_total{upstream="far"} 0.5',
        'penstock_native_by_line_cost_usd_total{upstream="far"} 1.25',
        'penstock_native_unpriced_tokens_total{upstream="far"} 3.0',
        'penstock_fault{fault="storage"} 1.0',
        'penstock_upstream_requests_total{outcome="200",upstream="gpu"} 1.0',
        'penstock_upstream_requests_total{outcome="timeout",upstream="gpu"} 1.0',
        'penstock_upstream_tokens_total{kind="cached",upstream="gpu"} 4.0',
        'penstock_upstream_request_duration_seconds_bucket{le="+Inf",upstream="gpu"} 2.0',
        'penstock_batches_total{status="completed"} 1.0',
        "penstock_flush_duration_seconds_count 1.0",
    ):
        assert f"{sample}\n" in text
    assert metrics.upstream("gpu") is stats


def test_a_cost_that_is_not_known_has_no_sample() -> None:
    metrics = Metrics(Health())
    metrics.native_figures = {
        "unknown": NativeFigures(unpriced_tokens=3),
        "by_line": NativeFigures(unpriced_tokens=3, by_line_usd=1.25),
        "idle": NativeFigures(cost_usd=0.0, by_line_usd=0.0),
    }
    samples = [
        line
        for line in metrics.render().decode().splitlines()
        if line.startswith("penstock_native_") and "_usd_total" in line
    ]

    assert samples == [
        'penstock_native_cost_usd_total{upstream="idle"} 0.0',
        'penstock_native_by_line_cost_usd_total{upstream="by_line"} 1.25',
        'penstock_native_by_line_cost_usd_total{upstream="idle"} 0.0',
    ]
