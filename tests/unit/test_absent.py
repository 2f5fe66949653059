"""Batches whose input is gone: when they are tried again, and how often they are told of."""

from penstock.executor.absent import Absences
from penstock.model import BatchId, SliceId

GONE = BatchId("gone")
OTHER = BatchId("other")
FIRST, SECOND = SliceId("gone:1"), SliceId("gone:2")


def test_a_batch_is_left_alone_for_a_while_and_others_are_not() -> None:
    absences = Absences()
    absences.note(GONE, 100.0)

    assert not absences.may_try(GONE, 100.9)
    assert absences.may_try(GONE, 101.0)
    assert absences.may_try(OTHER, 100.0)
    assert not absences.tries(OTHER, FIRST, 100.0)


def test_one_slice_at_a_time_tries_with_growing_pauses_up_to_a_minute() -> None:
    absences = Absences()
    absences.note(GONE, 0.0)

    tried: list[float] = []
    for now in range(300):
        if absences.may_try(GONE, now):
            tried.append(now)
            assert absences.tries(GONE, FIRST, now)
            absences.note(GONE, now)

    assert tried == [1, 3, 7, 15, 31, 63, 123, 183, 243]


def test_it_is_told_of_at_most_every_half_minute() -> None:
    absences = Absences()

    told = [now for now in range(100) if absences.note(GONE, now)]

    assert told == [0, 30, 60, 90]


def test_a_batch_that_could_be_read_is_as_any_other() -> None:
    absences = Absences()
    absences.note(GONE, 0.0)
    absences.tries(GONE, SECOND, 1.0)

    assert not absences.end(GONE, FIRST)  # it was read before
    assert not absences.may_try(GONE, 1.0)
    assert absences.end(GONE, SECOND)
    assert absences.may_try(GONE, 1.0)
    assert not absences.end(GONE, SECOND)


def test_batches_that_have_nothing_to_hand_out_any_more_are_forgotten() -> None:
    absences = Absences()
    absences.note(GONE, 0.0)
    absences.note(OTHER, 0.0)

    absences.forget(30.0, but={OTHER})
    assert not absences.may_try(GONE, 0.0)
    absences.forget(61.0, but={OTHER})
    assert absences.may_try(GONE, 0.0)
    assert not absences.may_try(OTHER, 0.0)
