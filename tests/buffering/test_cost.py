"""What a miss costs: the decision by hand, and measuring against a clock that only the measured work moves."""

from __future__ import annotations

import pytest

from fairseq_moe_opt.buffering.cost import MissCosts, compute_on_host, measure

COSTS = MissCosts(copy=10.0, compute_fixed=4.0, compute_per_row=2.0)
"""Three rows take as long as a copy."""


@pytest.mark.parametrize(
    ("rows", "spent", "stays"),
    [
        (1, 0.0, True),  # 6 of 10
        (3, 0.0, True),  # 10 of 10
        (4, 0.0, False),  # 12
        (1, 4.0, True),  # 4 + 6
        (1, 5.0, False),  # 5 + 6
        (3, 1.0, False),
    ],
)
def test_few_rows_stay_until_they_took_as_long_as_a_copy(rows: int, spent: float, stays: bool) -> None:
    assert compute_on_host(rows, COSTS, spent) == stays


def test_break_even_is_the_last_number_of_rows_that_stays() -> None:
    assert COSTS.break_even == 3
    assert MissCosts(10.5, 4.0, 2.0).break_even == 3
    assert MissCosts(10.0, 9.0, 2.0).break_even == 0  # a row would fit, but for its own time
    assert MissCosts(3.0, 4.0, 2.0).break_even == 0  # a processor too slow for anything


class Machine:
    """Copies in 9 s and computes in 3 s and half a second a row; first times, and a hiccup, take longer."""

    def __init__(self) -> None:
        self.now = 0.0
        self.runs: list[int] = []

    def copy(self) -> None:
        self.now += 9.0 + self._extra(0)

    def compute(self, rows: int) -> None:
        self.now += 3.0 + 0.5 * rows + self._extra(rows)

    def _extra(self, rows: int) -> float:
        self.runs.append(rows)
        times = self.runs.count(rows)
        return 100.0 if times == 1 else 50.0 if times == 3 else 0.0


def test_measuring_takes_medians_and_ignores_first_times() -> None:
    machine = Machine()
    costs = measure(machine.copy, machine.compute, clock=lambda: machine.now, repeats=3)
    assert costs == MissCosts(copy=9.0, compute_fixed=3.0, compute_per_row=0.5)
    assert machine.runs == [1] * 4 + [16] * 4 + [0] * 4
    assert costs.break_even == 12


def test_a_clock_too_coarse_for_rows_gives_costs_all_the_same() -> None:
    costs = measure(lambda: None, lambda rows: None, clock=lambda: 0.0)
    assert costs.copy == costs.compute_fixed == 0.0
    assert costs.break_even == 0
