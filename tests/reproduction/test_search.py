"""The largest batch within a budget, on a fake that is asked what a batch takes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fairseq_moe_opt.reproduction.search import (
    BUDGET,
    END,
    MACHINE,
    Point,
    batches_around,
    best_within,
    gain_within,
    largest_batch,
    largest_within,
)
from fairseq_moe_opt.reproduction.sections.throughput import curve

BATCHES = (1, 2, 4, 8, 16)


def square(batch: int) -> int:
    return 10 * batch * batch


def test_batches_are_around_the_reference() -> None:
    assert batches_around(8, 4) == (1, 2, 4, 6, 8, 12, 16, 24, 32)
    assert batches_around(48, 1) == (6, 12, 24, 36, 48)
    assert batches_around(1, 1) == (1,)


def test_the_search_climbs_then_halves_the_gap() -> None:
    found = largest_batch(square, BATCHES, 1000)  # 8 takes 640, 16 takes 2560, 12 takes 1440, 10 takes 1000
    assert (found.largest, found.stopped_by) == (10, BUDGET)
    assert found.peaks == {1: 10, 2: 40, 4: 160, 8: 640, 10: 1000, 12: 1440, 16: 2560}


def test_nothing_larger_is_tried_than_the_last_batch() -> None:
    found = largest_batch(square, BATCHES, 10_000)
    assert (found.largest, found.stopped_by, max(found.peaks)) == (16, END, 16)


def test_no_batch_fits() -> None:
    found = largest_batch(square, BATCHES, 5)
    assert (found.largest, found.stopped_by, dict(found.peaks)) == (0, BUDGET, {1: 10})


def test_what_the_machine_has_no_memory_for_is_not_tried() -> None:
    found = largest_batch(square, BATCHES, 10_000, available=lambda: 1000)  # 16 could need 640 * 4
    assert (found.largest, found.stopped_by) == (8, MACHINE)
    assert 16 not in found.peaks


@given(st.integers(1, 5000), st.integers(1, 30), st.integers(0, 6))
def test_the_largest_fits_and_the_next_tried_does_not(budget: int, unit: int, halvings: int) -> None:
    found = largest_batch(lambda batch: unit * batch, BATCHES, budget, halvings=halvings)
    assert all((peak <= budget) == (batch <= found.largest) for batch, peak in found.peaks.items())
    if halvings >= 4 and found.stopped_by == BUDGET:
        assert found.largest == budget // unit  # nothing is left between them


STATIC = (Point(1, 10, 100, 1.0), Point(2, 20, 400, 2.5), Point(4, 40, 1600, None))
DYNAMIC = (Point(1, 10, 20, 0.5), Point(8, 80, 160, 2.0), Point(32, 320, 640, 4.0))


def test_the_best_batch_need_not_be_the_largest() -> None:
    assert best_within(STATIC, 1000) == STATIC[0]  # 10 tokens a second against 8
    assert largest_within(STATIC, 1000) == STATIC[1]
    assert best_within(STATIC, 2000) == STATIC[0]  # what was not timed does not count
    assert best_within(STATIC, 50) is None and largest_within((), 50) is None


def test_gain_at_every_budget() -> None:
    assert gain_within(DYNAMIC, STATIC, 640) == 8.0
    assert gain_within(DYNAMIC, STATIC, 90) is None
    gains = [(row["budget"], row["gain"]) for row in curve(STATIC, DYNAMIC, 1000)]
    assert gains == [(100, 2.0), (160, 4.0), (400, 4.0), (640, 8.0), (1000, 8.0)]
