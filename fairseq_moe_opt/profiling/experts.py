"""Experts run one at a time: how long each takes, beside what its rows would let one expect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from time import perf_counter

import torch

from fairseq_moe_opt.moe.trace import Trace

SLOW = 2.0
"""How many times the expected time makes an expert slow."""
LEAST_CALLS = 3
"""Calls that say enough."""

Calls = dict[tuple[str, int], list[float]]


class ExpertClock:
    """Times experts that run one at a time; ``Calls`` are seconds of each call by (layer, expert).

    It waits for the device before and after each of them: nothing else is timed meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self.calls: Calls = {}
        self._device = device

    @contextmanager
    def expert(self, layer: str, expert: str) -> Iterator[None]:
        """The context of one expert."""
        self._wait()
        start = perf_counter()
        yield
        self._wait()
        self.calls.setdefault((layer, int(expert)), []).append(perf_counter() - start)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@dataclass(frozen=True)
class ExpertTime:
    """One expert, run alone.

    Attributes:
        layer: its layer.
        expert: its number there.
        calls: forwards it was needed in.
        rows: median of a forward.
        seconds: the same.
        fastest: of its forwards, in seconds.
        expected: seconds of an expert of this layer with as many rows.
    """

    layer: str
    expert: int
    calls: int
    rows: float
    seconds: float
    fastest: float
    expected: float

    @property
    def is_slow(self) -> bool:
        """Whether it always takes much longer than it should: one long call may be the machine's doing."""
        return self.calls >= LEAST_CALLS and self.fastest >= SLOW * self.expected


def expert_times(calls: Calls, trace: Trace) -> list[ExpertTime]:
    """What calls, which ``trace`` has the rows of, say of every expert."""
    rows: dict[tuple[str, int], list[int]] = {}
    for visit in trace.visits:
        for expert, count in zip(visit.experts, visit.counts, strict=True):
            rows.setdefault((visit.layer, expert), []).append(count)
    found = []
    for layer in dict.fromkeys(layer for layer, _ in calls):
        keys = [key for key in sorted(calls) if key[0] == layer and key in rows]
        points = [(median(rows[key]), median(calls[key])) for key in keys]
        for key, (few, seconds), expected in zip(keys, points, expected_seconds(points), strict=True):
            found.append(ExpertTime(layer, key[1], len(calls[key]), few, seconds, min(calls[key]), expected))
    return found


def expected_seconds(points: Sequence[tuple[float, float]]) -> list[float]:
    """Seconds that a line through (rows, seconds) gives for each of them.

    Its slope is the median of all slopes, which an outlier or two do not bend (Theil and Sen), and never falls.
    """
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2) if x1 != x2]
    slope = max(0.0, median(slopes)) if slopes else 0.0
    start = median(y - slope * x for x, y in points) if points else 0.0
    return [max(start, 0.0) + slope * x for x, _ in points]
