"""The time by which a process works."""

import time
from collections.abc import Iterator

import pytest

from penstock import clock


@pytest.fixture(autouse=True)
def own_time() -> Iterator[None]:
    yield
    clock.follow_machine()


def test_alone_it_is_the_machines() -> None:
    assert abs(clock.now() - time.time()) < 1


def test_a_shared_clock_counts_on_whatever_the_machines_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard_at = time.monotonic()
    clock.follow(5000.0, asked_at=heard_at - 0.4, heard_at=heard_at)
    monkeypatch.setattr(time, "time", lambda: 1e9)

    assert 5000.2 <= clock.now() < 5001
    monkeypatch.setattr(time, "monotonic", lambda: heard_at + 60)
    assert clock.now() == pytest.approx(5060.2)
