"""Sides that take turns: what they are compared by was measured one right after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

Clock = Callable[[], float]


def take_turns(
    runs: Mapping[str, Callable[[int], object]],
    rounds: int,
    seconds: float,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run, round by round; a round begins with another side each time.

    Args:
        runs: side to what it does in a round, which it is told.
        rounds: how many there are at most, 1 at least.
        seconds: no further round begins that would, by the last one, end after so many.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    names, begun, last = list(runs), clock(), 0.0
    for turn in range(max(1, rounds)):
        started = clock()
        if turn and started - begun + last > seconds:
            break
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            before = clock()
            runs[name](turn)
            found[name].append(clock() - before)
        last = clock() - started
    return found


def medians(found: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each side."""
    return {name: median(one) for name, one in found.items()}
