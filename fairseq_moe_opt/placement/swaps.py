"""Local search over swaps of two slots of different ranks, with incremental evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fairseq_moe_opt.placement.types import Cluster

_Floats = NDArray[np.float64]
_Indices = NDArray[np.int64]

MAX_SWEEPS = 50
"""Sweeps over all items after which the search ends; it has ended by itself after about ten."""
LEAST_GAIN = 0.25
"""Standard errors that a swap has to gain. Less than one: the errors of hundreds of swaps average out."""
_CANDIDATES = 16
"""How many of an item's best partners are held against the conditions."""
_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Items:
    """What lies in slots: each replica of each expert.

    Attributes:
        expert: (I,) logical expert of each item.
        shares: (I, B) each item's share of each batch: its expert's over its number of replicas.
        moment: (I, I) second moments of those shares.
    """

    expert: _Indices
    shares: _Floats
    moment: _Floats

    @classmethod
    def of(cls, expert: _Indices, shares: _Floats, moment: _Floats) -> Items:
        """From (B, E) shares and (E, E) moments of the logical experts."""
        copies = np.bincount(expert, minlength=shares.shape[1])[expert]
        return cls(
            expert,
            np.ascontiguousarray((shares[:, expert] / copies).T),
            moment[np.ix_(expert, expert)] / np.outer(copies, copies),
        )


@dataclass(frozen=True)
class Conditions:
    """What a swap has to meet besides lowering the cost.

    Attributes:
        low, high: loads that no rank may leave in any batch of the history.
        effective_batches: independent batches that the history is worth: what a gain's standard error is taken over.
    """

    low: float
    high: float
    effective_batches: float

    @classmethod
    def no_worse_than(cls, loads: _Floats, effective_batches: float) -> Conditions:
        """Keep to the largest of (W, B) ``loads``, and as far under 1/W as any of them is from it.

        So neither Max Load nor the paper's objective can get worse than that of ``loads``.
        """
        ideal = 1 / len(loads)
        furthest = float(np.abs(loads - ideal).max())
        return cls(ideal - furthest - _TOLERANCE, float(loads.max()) + _TOLERANCE, effective_batches)


class Assignment:
    """Items on ranks, and what follows from it; ``swap`` keeps all of it up to date.

    The cost is the sum over ranks, and over nodes where there are several, of the expected square of their load.
    """

    def __init__(self, items: Items, ranks: _Indices, cluster: Cluster) -> None:
        """``ranks``: (I,) where each item starts."""
        self.items, self.ranks = items, ranks.copy()
        self._square = np.diag(items.moment).copy()
        self.loads: _Floats = np.zeros((cluster.num_ranks, items.shares.shape[1]))
        np.add.at(self.loads, self.ranks, items.shares)
        self._held = held_by(items.expert, self.ranks, cluster.num_ranks)
        self._levels = [_Level(items.moment, self.ranks, cluster.num_ranks)]
        if cluster.num_nodes > 1:
            self._levels.append(_Level(items.moment, cluster.node_of_rank()[ranks], cluster.num_nodes))

    def cost(self) -> float:
        """Summed expected squares over ranks and nodes."""
        return float(sum(level.own_pull.sum() for level in self._levels))

    def cost_changes(self, item: int) -> _Floats:
        """(I,) change of the cost when ``item`` swaps ranks with each other item; 0 for those of its own rank."""
        moment = self.items.moment[item]
        apart = self._square[item] + self._square - 2 * moment
        return np.asarray(sum(level.changes(item, apart) for level in self._levels))

    def meets(self, conditions: Conditions, item: int, others: _Indices, gains: _Floats) -> NDArray[np.bool_]:
        """(len(others),) whether swapping ``item`` with each, for these gains, meets the conditions.

        No swap may bring two replicas of an expert to one rank.
        """
        change = self.items.shares[others] - self.items.shares[item]
        here, there = self.loads[self.ranks[item]], self.loads[self.ranks[others]]
        both = np.stack((here + change, there - change))
        within = ((both <= conditions.high) & (both >= conditions.low)).all(axis=(0, 2))
        # What the swap would have changed in each batch of the history, by its ranks' loads.
        by_batch = 2 * change * (here - there + change)
        error = by_batch.std(axis=1) / np.sqrt(conditions.effective_batches)
        apart = keep_apart(self._held, self.items.expert, self.ranks, item, others)
        return np.asarray(within & apart & (gains > LEAST_GAIN * error))

    def swap(self, one: int, other: int) -> None:
        """Let two items change ranks."""
        here, there = self.ranks[one], self.ranks[other]
        change = self.items.shares[other] - self.items.shares[one]
        self.loads[here] += change
        self.loads[there] -= change
        self.ranks[one], self.ranks[other] = there, here
        move_held(self._held, self.items.expert, one, other, int(here), int(there))
        for level in self._levels:
            level.swap(self.items.moment, one, other)


def held_by(expert: _Indices, ranks: _Indices, num_ranks: int) -> _Indices:
    """(W, E) how many replicas of each expert each rank holds; ``expert`` and ``ranks`` are (I,)."""
    held = np.zeros((num_ranks, int(expert.max()) + 1), dtype=np.int64)
    np.add.at(held, (ranks, expert), 1)
    return held


def keep_apart(held: _Indices, expert: _Indices, ranks: _Indices, item: int, others: _Indices) -> NDArray[np.bool_]:
    """(len(others),) whether swapping ``item`` with each brings neither rank an expert that it holds already."""
    return np.asarray((held[ranks[others], expert[item]] == 0) & (held[ranks[item], expert[others]] == 0))


def move_held(held: _Indices, expert: _Indices, one: int, other: int, here: int, there: int) -> None:
    """Note in ``held`` that ``one`` has gone from rank ``here`` to ``there``, and ``other`` the other way."""
    for item, source, target in ((one, here, there), (other, there, here)):
        held[source, expert[item]] -= 1
        held[target, expert[item]] += 1


class _Level:
    """One kind of home, ranks or nodes.

    Attributes:
        home: (I,) of each item.
        pull: (I, homes) each item's moments with the items of each home, summed.
        own_pull: (I,) the same with the item's own home.
    """

    def __init__(self, moment: _Floats, home: _Indices, num_homes: int) -> None:
        self.home = home.copy()
        self.pull: _Floats = moment @ np.eye(num_homes)[home]
        self.own_pull: _Floats = self.pull[np.arange(len(home)), home]

    def changes(self, item: int, apart: _Floats) -> _Floats:
        """(I,) change of this level's cost for each partner; ``apart`` is E[(a_item - a_other)^2]."""
        here = self.home[item]
        moved = self.pull[item, self.home] - self.own_pull[item] + self.pull[:, here] - self.own_pull
        return np.where(self.home == here, 0.0, 2 * (moved + apart))

    def swap(self, moment: _Floats, one: int, other: int) -> None:
        here, there = self.home[one], self.home[other]
        if here == there:
            return
        change = moment[:, other] - moment[:, one]
        self.pull[:, here] += change
        self.pull[:, there] -= change
        self.home[one], self.home[other] = there, here
        self.own_pull = self.pull[np.arange(len(self.home)), self.home]


@dataclass(frozen=True)
class Partner:
    """An item to swap with, and how much lower the cost is afterwards."""

    item: int
    gain: float


def descend(assignment: Assignment, conditions: Conditions) -> None:
    """Swap each item in turn with its best partner, until no item has one."""
    for _ in range(MAX_SWEEPS):
        swapped = False
        for item in range(len(assignment.ranks)):
            partner = best_partner(assignment, item, conditions)
            if partner is not None:
                assignment.swap(item, partner.item)
                swapped = True
        if not swapped:
            return


def best_partner(assignment: Assignment, item: int, conditions: Conditions) -> Partner | None:
    """The partner with which ``item`` lowers the cost most while ``conditions`` are met; ties go to the lower item."""
    gains = -assignment.cost_changes(item)
    best = np.argpartition(-gains, min(_CANDIDATES, len(gains)) - 1)[:_CANDIDATES]
    best = best[gains[best] > _TOLERANCE]
    if len(best) == 0:
        return None
    best = best[np.lexsort((best, -gains[best]))]
    allowed = best[assignment.meets(conditions, item, best, gains[best])]
    return Partner(int(allowed[0]), float(gains[allowed[0]])) if len(allowed) else None
