"""What a missing expert costs, copied to the device or computed where it is: measured once, then a pure decision.

Fiddler (Kamahori et al., 2024) sends a few activations to the expert instead of the expert to them, with constants
typed into its source; here both sides are measured on the machine at hand.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

_FEW, _MORE = 1, 16
"""Numbers of rows that computing is timed with: a line through both gives what each further row costs."""

_LEAST_PER_ROW = sys.float_info.epsilon


@dataclass(frozen=True)
class MissCosts:
    """Seconds that a missing expert of one size takes.

    Attributes:
        copy: to bring it from main memory to the device.
        compute_fixed: to compute it in main memory, however few its rows: reading its weights, and the rows' way there
            and back.
        compute_per_row: for each row on top of that; above 0.
    """

    copy: float
    compute_fixed: float
    compute_per_row: float

    def compute(self, rows: int) -> float:
        """Seconds to compute ``rows`` rows in main memory."""
        return self.compute_fixed + rows * self.compute_per_row

    @property
    def break_even(self) -> int:
        """The most rows for which computing takes no longer than copying; 0 when no number is small enough."""
        return max(0, math.floor((self.copy - self.compute_fixed) / self.compute_per_row))


def compute_on_host(rows: int, costs: MissCosts, spent: float = 0.0) -> bool:
    """Whether a missing expert with so many rows is to be computed where it is instead of copied.

    ``spent`` is how many seconds it was computed there since it was last copied. Once that adds up to a copy it is
    copied, so that an expert that comes again and again gets a slot: ski rental, never worse than twice the best.
    """
    return spent + costs.compute(rows) <= costs.copy


def measure(
    copy: Callable[[], None],
    compute: Callable[[int], None],
    *,
    clock: Callable[[], float] = time.perf_counter,
    repeats: int = 5,
) -> MissCosts:
    """The costs of one size of expert, from medians of ``repeats`` runs after one that does not count.

    Args:
        copy: brings an expert to the device, and returns when it is there.
        compute: computes so many rows in main memory, and returns when the results are on the device.
        clock: gives seconds.
    """

    def timed(work: Callable[[], None]) -> float:
        work()
        return statistics.median(_seconds(work, clock) for _ in range(repeats))

    few, more = timed(lambda: compute(_FEW)), timed(lambda: compute(_MORE))
    per_row = max((more - few) / (_MORE - _FEW), _LEAST_PER_ROW)
    return MissCosts(timed(copy), max(few - _FEW * per_row, 0.0), per_row)


def _seconds(work: Callable[[], None], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return clock() - start
