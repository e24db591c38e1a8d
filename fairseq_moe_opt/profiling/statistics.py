"""What a trace says of a layer's experts: pure functions over counts.

Letters of this room: B batches (a layer's forwards, a decoder's being steps), E experts, K choices a token, I inputs
that are compared (languages, domains).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fairseq_moe_opt.errors import InputError
from fairseq_moe_opt.moe.trace import Trace

Counts = NDArray[np.int64]
"""Routed rows, (B, E)."""
Floats = NDArray[np.float64]

DISTANCES = (1, 2, 4, 8, 16, 32)
"""Reuse distances whose cumulative shares are reported, in batches."""


def layer_counts(trace: Trace) -> dict[str, Counts]:
    """(B, E) rows of every layer of ``trace``, batch by batch; InputError where it has needs but no counts."""
    visits: dict[str, list[NDArray[np.int64]]] = {layer.name: [] for layer in trace.layers}
    sizes = {layer.name: layer.num_experts for layer in trace.layers}
    for visit in trace.visits:
        if not visit.counts:
            raise InputError("the trace says which experts were needed, but not how many rows they got: record it anew")
        row = np.zeros(sizes[visit.layer], dtype=np.int64)
        row[list(visit.experts)] = visit.counts
        visits[visit.layer].append(row)
    return {name: np.array(rows, dtype=np.int64).reshape(-1, sizes[name]) for name, rows in visits.items()}


def shares(counts: Counts) -> Floats:
    """(B', E) rows of each batch as shares of it; batches without a row say nothing and are left out."""
    rows = counts.sum(axis=1, keepdims=True)
    used = rows[:, 0] > 0
    return np.asarray(counts[used] / rows[used], dtype=np.float64)


def gini(load: Sequence[float] | NDArray[np.generic]) -> float:
    """Gini coefficient of a load: 0 when all experts get the same, (E - 1) / E when one gets all; 0 for no load."""
    ordered = np.sort(np.asarray(load, dtype=np.float64))
    total = ordered.sum()
    if total == 0:
        return 0.0
    ranks = np.arange(1, len(ordered) + 1)
    return float((2 * ranks - len(ordered) - 1) @ ordered / (len(ordered) * total))


def inactive_share(counts: Counts) -> float:
    """Mean over batches of the share of experts that got no row."""
    return float((counts == 0).mean()) if counts.size else 0.0


def inactive_if_even(counts: Counts, top_k: int) -> float:
    """The same if every token chose its K experts at random: what so few rows leave idle however even the gate is."""
    if not counts.size:
        return 0.0
    tokens = counts.sum(axis=1) / top_k
    return float(((1 - top_k / counts.shape[1]) ** tokens).mean())


def reuse_distances(counts: Counts) -> NDArray[np.int64]:
    """Of every use of an expert but its first: batches since the use before, 1 for the batch just before."""
    distances = [np.diff(np.flatnonzero(counts[:, expert])) for expert in range(counts.shape[1])]
    return np.concatenate([np.zeros(0, dtype=np.int64), *distances])


def stickiness(counts: Counts) -> tuple[float, float]:
    """Share of a batch's experts that the next batch needs too, and what that would be without memory.

    Both are over all pairs of consecutive batches together. Without memory, an expert is needed as often after a batch
    that needed it as after any other: as often as it is needed at all. 0 and 0 for fewer than two batches.
    """
    active = counts > 0
    before, after = active[:-1], active[1:]
    used = before.sum()
    if not used:
        return 0.0, 0.0
    kept = float((before & after).sum() / used)
    by_chance = float((before.sum(axis=0) * after.mean(axis=0)).sum() / used)
    return kept, by_chance


def correlation(counts: Counts) -> Floats:
    """(E, E) Pearson correlation of experts' shares over batches; 0 with an expert whose share never changes."""
    values = shares(counts)
    if not len(values):
        return np.zeros((counts.shape[1], counts.shape[1]))
    centred = values - values.mean(axis=0)
    spread = np.sqrt((centred**2).sum(axis=0))
    scale = np.where(spread > 1e-12, spread, np.inf)
    return np.asarray((centred / scale).T @ (centred / scale), dtype=np.float64)


def waste_factor(num_experts: int, capacity_fraction: float, top_k: int) -> float:
    """Rows that static gating computes for each one that is needed: E * C / K (paper, section 1.4)."""
    return num_experts * capacity_fraction / top_k


def overlap(one: Floats, other: Floats) -> float:
    """How much of two loads (E,) that sum to 1 is the same: 1 for equal loads, 0 where no expert serves both."""
    return float(1 - np.abs(one - other).sum() / 2)


@dataclass(frozen=True)
class ExpertPair:
    """Two experts and the correlation of their shares."""

    one: int
    other: int
    correlation: float


@dataclass(frozen=True)
class LayerStatistics:
    """What one layer's experts did for one input.

    Attributes:
        batches: forwards with at least one row.
        rows: routed rows over all of them.
        mean_rows: rows of a batch.
        load: (E,) share of all rows that each expert got.
        gini: of a batch's load, mean over batches; ``gini_total`` of all rows together.
        max_share: the busiest expert's share of a batch, mean; ``worst_share`` the largest of any batch, which was
            ``worst_expert``'s; ``hottest`` has the most rows in all.
        inactive: share of experts without a row, mean over batches; ``inactive_if_even``: what random choices of as
            many tokens would leave idle; ``never_used``: experts without any row at all.
        stickiness: share of a batch's experts that the next one needs too; ``stickiness_by_chance``: without memory.
        reuse_within: share of repeated uses at most so many batches after the use before, by distance.
        median_reuse: of the distances; None where nothing was used twice.
        mean_correlation: mean of the absolute correlations of two experts; ``correlation_by_chance``: what so many
            independent batches would show.
        strongest_pair: the two experts with the largest correlation, and ``opposite_pair`` with the smallest.
    """

    batches: int
    rows: int
    mean_rows: float
    load: tuple[float, ...]
    gini: float
    gini_total: float
    max_share: float
    worst_share: float
    worst_expert: int
    hottest: int
    inactive: float
    inactive_if_even: float
    never_used: tuple[int, ...]
    stickiness: float
    stickiness_by_chance: float
    reuse_within: dict[int, float]
    median_reuse: float | None
    mean_correlation: float
    correlation_by_chance: float
    strongest_pair: ExpertPair | None
    opposite_pair: ExpertPair | None

    def to_dict(self) -> dict[str, object]:
        """Plain values, ready for ``json.dump``."""
        return asdict(self)


def layer_statistics(counts: Counts, top_k: int) -> LayerStatistics | None:
    """All statistics of one layer; None where it was given no row at all."""
    counts = counts[counts.sum(axis=1) > 0]
    if not len(counts):
        return None
    by_batch = shares(counts)
    distances = reuse_distances(counts)
    kept, by_chance = stickiness(counts)
    related = correlation(counts)
    pairs = _pairs(related, by_batch)
    total = counts.sum(axis=0)
    worst = np.unravel_index(int(by_batch.argmax()), by_batch.shape)
    return LayerStatistics(
        batches=len(counts),
        rows=int(total.sum()),
        mean_rows=float(counts.sum(axis=1).mean()),
        load=tuple((total / total.sum()).tolist()),
        gini=float(np.mean([gini(batch) for batch in counts])),
        gini_total=gini(total),
        max_share=float(by_batch.max(axis=1).mean()),
        worst_share=float(by_batch.max()),
        worst_expert=int(worst[1]),
        hottest=int(total.argmax()),
        inactive=inactive_share(counts),
        inactive_if_even=inactive_if_even(counts, top_k),
        never_used=tuple(np.flatnonzero(total == 0).tolist()),
        stickiness=kept,
        stickiness_by_chance=by_chance,
        reuse_within={one: float((distances <= one).mean()) if len(distances) else 0.0 for one in DISTANCES},
        median_reuse=float(np.median(distances)) if len(distances) else None,
        mean_correlation=float(np.mean([abs(pair.correlation) for pair in pairs])) if pairs else 0.0,
        # Mean of |r| for two independent series of B values: a normal of spread 1 / sqrt(B - 1).
        correlation_by_chance=float(np.sqrt(2 / np.pi / (len(counts) - 1))) if len(counts) > 1 else 0.0,
        strongest_pair=pairs[-1] if pairs else None,
        opposite_pair=pairs[0] if pairs else None,
    )


def _pairs(related: Floats, by_batch: Floats) -> list[ExpertPair]:
    """Pairs of experts whose shares change at all, the smallest correlation first."""
    changing = np.flatnonzero(by_batch.std(axis=0) > 1e-12).tolist()
    found = [
        ExpertPair(one, other, float(related[one, other]))
        for place, one in enumerate(changing)
        for other in changing[place + 1 :]
    ]
    return sorted(found, key=lambda pair: pair.correlation)


@dataclass(frozen=True)
class SpecificExpert:
    """An expert that one input uses far more than any other: its share of that input's rows, and of the next most."""

    expert: int
    input: str
    share: float
    next_share: float


@dataclass(frozen=True)
class LayerComparison:
    """One layer over several inputs.

    Attributes:
        overlap: of the loads of every two inputs, (I, I), in the inputs' order.
        self_overlap: of the loads of an input's batches of odd and of even numbers: what chance alone leaves of it.
        specific: experts of one input.
    """

    overlap: tuple[tuple[float, ...], ...]
    self_overlap: tuple[float, ...]
    specific: tuple[SpecificExpert, ...]

    @property
    def mean_overlap(self) -> float:
        """Of two different inputs."""
        values = [value for row, line in enumerate(self.overlap) for value in line[row + 1 :]]
        return float(np.mean(values)) if values else 1.0

    def to_dict(self) -> dict[str, object]:
        """Plain values, ready for ``json.dump``."""
        return {**asdict(self), "mean_overlap": self.mean_overlap}


SPECIFIC = 3.0
"""How many times the share of any other input an expert must have in one to count as specific to it."""


def compare_layer(counts: Mapping[str, Counts]) -> LayerComparison:
    """The loads of one layer for each input, by its label; every one of them needs at least one row."""
    loads = {label: _load(one) for label, one in counts.items()}
    matrix = tuple(tuple(overlap(one, other) for other in loads.values()) for one in loads.values())
    halves = tuple(_halves_overlap(one) for one in counts.values())
    return LayerComparison(matrix, halves, tuple(_specific(loads)) if len(loads) > 1 else ())


def _specific(loads: Mapping[str, Floats]) -> list[SpecificExpert]:
    labels, table = list(loads), np.array(list(loads.values()))
    found = []
    for expert in range(table.shape[1]):
        order = np.argsort(-table[:, expert], kind="stable")
        most, following = (float(table[place, expert]) for place in order[:2])
        # At least an even share, so that a rare expert's few rows are not taken for a rule.
        if most >= 1 / table.shape[1] and most >= SPECIFIC * following:
            found.append(SpecificExpert(expert, labels[int(order[0])], most, following))
    return sorted(found, key=lambda one: -one.share)


def _load(counts: Counts) -> Floats:
    total = counts.sum(axis=0)
    return np.asarray(total / total.sum(), dtype=np.float64)


def _halves_overlap(counts: Counts) -> float:
    counts = counts[counts.sum(axis=1) > 0]
    return overlap(_load(counts[::2]), _load(counts[1::2])) if len(counts) > 1 else 1.0


def heat_map(counts: Counts, most: int = 256) -> Floats:
    """(B', E) shares of batches to draw: every batch where there are at most ``most``, else means of neighbours."""
    values = shares(counts)
    if len(values) <= most:
        return values
    edges = np.linspace(0, len(values), most + 1).astype(int)
    return np.array([values[start:stop].mean(axis=0) for start, stop in pairwise(edges.tolist())])
