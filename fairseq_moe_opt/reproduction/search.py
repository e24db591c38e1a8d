"""The largest batch within a budget, and the best throughput there: pure, over whatever measures a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

STEPS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
"""Batches below the paper's, as shares of it; above it they double, with one step between."""
BUDGET, END, MACHINE = "budget", "end", "machine"
GROWTH = 2.0
"""Memory grows at most with this power of the batch: the masks of static gating are quadratic."""


@dataclass(frozen=True)
class Point:
    """One side at one batch.

    Attributes:
        batch, tokens: sequences, and rows of the forward.
        peak_bytes: the most that activations took.
        seconds: of the forward; None if it was not timed.
        sparse_seconds: those of them in sparse layers.
    """

    batch: int
    tokens: int
    peak_bytes: int
    seconds: float | None = None
    sparse_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """0 where it was not timed."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        peaks: batch to bytes, of all batches tried; ascending.
        largest: the largest batch within the budget, 0 if none.
        stopped_by: what the next larger one would have broken: the ``budget``, the ``machine``'s memory, or nothing
            that is known, where the ``end`` of the batches was reached.
    """

    peaks: Mapping[int, int]
    largest: int
    stopped_by: str


def batches_around(reference: int, most: int) -> tuple[int, ...]:
    """Batches to try: shares of ``reference``, itself, 1.5, 2, 3, 4, 6, ... times as many, up to ``most`` times."""
    found = {max(1, round(share * reference)) for share in STEPS}
    factor = 1
    while factor <= most:
        found |= {factor * reference} | ({3 * factor * reference // 2} if 3 * factor <= 2 * most else set())
        factor *= 2
    return tuple(sorted(found))


def largest_batch(
    peak_of: Callable[[int], int],
    batches: Sequence[int],
    budget: int,
    *,
    halvings: int = 2,
    available: Callable[[], int | None] = lambda: None,
) -> Found:
    """Climb ``batches`` (ascending) until one does not fit into ``budget`` bytes, then halve the gap a few times.

    Args:
        peak_of: bytes that a batch takes; grows with the batch.
        halvings: times the gap between the last that fits and the first that does not is halved.
        available: bytes that the machine has; a batch that could need more by the square of the last step is not tried.
    """
    peaks: dict[int, int] = {}
    fits, too_large, stopped_by = 0, 0, END
    for batch in batches:
        free = available()
        if fits and free is not None and peaks[fits] * (batch / fits) ** GROWTH > free:
            stopped_by = MACHINE
            break
        peaks[batch] = peak_of(batch)
        if peaks[batch] > budget:
            too_large, stopped_by = batch, BUDGET
            break
        fits = batch
    for _ in range(halvings if stopped_by == BUDGET else 0):
        middle = (fits + too_large) // 2
        if middle in (fits, too_large) or middle == 0:
            break
        peaks[middle] = peak_of(middle)
        if peaks[middle] > budget:
            too_large = middle
        else:
            fits = middle
    return Found(dict(sorted(peaks.items())), fits, stopped_by)


def best_within(points: Iterable[Point], budget: int) -> Point | None:
    """The timed point with most tokens a second among those that fit."""
    able = [point for point in points if point.peak_bytes <= budget and point.seconds]
    return max(able, key=lambda point: point.tokens_per_second) if able else None


def largest_within(points: Iterable[Point], budget: int) -> Point | None:
    """The timed point with the largest batch among those that fit."""
    able = [point for point in points if point.peak_bytes <= budget and point.seconds]
    return max(able, key=lambda point: point.batch) if able else None


def gain_within(one: Sequence[Point], other: Sequence[Point], budget: int) -> float | None:
    """Best throughput of ``one`` over that of ``other`` within ``budget``; None where either does not fit at all."""
    best, theirs = best_within(one, budget), best_within(other, budget)
    return None if best is None or theirs is None else best.tokens_per_second / theirs.tokens_per_second
