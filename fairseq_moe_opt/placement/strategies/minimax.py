"""The paper's objective as it stands: lower the worst load of the worst batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fairseq_moe_opt.placement.history import Shares
from fairseq_moe_opt.placement.strategies.anti_correlation import place_anti_correlation
from fairseq_moe_opt.placement.strategies.balanced import place_balanced
from fairseq_moe_opt.placement.strategies.eplb import place_eplb
from fairseq_moe_opt.placement.swaps import held_by, move_held
from fairseq_moe_opt.placement.types import Cluster, RankSlots, rank_slots

_Floats = NDArray[np.float64]
_Indices = NDArray[np.int64]

MAX_SWAPS = 500
"""Swaps after which the descent ends."""
_PAIRS = 512
"""How many of the pairs that help in the worst batch are tried on all batches."""
_TOLERANCE = 1e-12


def place_minimax(shares: Shares, cluster: Cluster) -> RankSlots:
    """Local search on ``max |load - 1/W|`` over ranks and batches (section 4.1, with the indices as meant).

    Starts from EPLB's plan, the anti-correlation one and ``balanced``; the best end is taken. For when memory
    decides, not throughput: it fits the one batch that is worst.
    """
    starts = [strategy(shares, cluster) for strategy in (place_balanced, place_eplb, place_anti_correlation)]
    ends = [lower_peak(shares, start) for start in starts]
    return min(ends, key=lambda end: end[1])[0]


def lower_peak(shares: Shares, slots: RankSlots) -> tuple[RankSlots, float]:
    """Swap until no swap lowers the worst distance from 1/W; the placement, and that distance."""
    experts = np.concatenate([np.asarray(rank, dtype=np.int64) for rank in slots])
    ranks = np.repeat(np.arange(len(slots)), [len(rank) for rank in slots])
    items = np.ascontiguousarray((shares / np.bincount(experts))[:, experts].T)
    excess = np.full((len(slots), len(shares)), -1 / len(slots))
    np.add.at(excess, ranks, items)
    held = held_by(experts, ranks, len(slots))
    for _ in range(MAX_SWAPS):
        swap = _best_swap(items, experts, ranks, held, excess)
        if swap is None:
            break
        one, other = swap
        change = items[other] - items[one]
        excess[ranks[one]] += change
        excess[ranks[other]] -= change
        move_held(held, experts, one, other, int(ranks[one]), int(ranks[other]))
        ranks[one], ranks[other] = ranks[other], ranks[one]
    return rank_slots(experts, ranks, len(slots)), float(np.abs(excess).max())


def _best_swap(
    items: _Floats, experts: _Indices, ranks: _Indices, held: _Indices, excess: _Floats
) -> tuple[int, int] | None:
    """The swap out of the worst rank after which the two ranks' worst is smallest; None if it is not smaller.

    None brings two replicas of an expert to one rank.
    """
    rank, batch = np.unravel_index(np.argmax(np.abs(excess)), excess.shape)
    peak = abs(excess[rank, batch])
    one, other = _pairs(items[:, batch], ranks, excess[:, batch], int(rank), float(peak))
    if len(one) == 0:
        return None
    change = items[other] - items[one]
    both = np.abs(np.stack((excess[rank] + change, excess[ranks[other]] - change))).max(axis=(0, 2))
    doubles = (held[ranks[other], experts[one]] > 0) | (held[ranks[one], experts[other]] > 0)
    both = np.where(doubles, np.inf, both)
    best = int(np.argmin(both))
    return (int(one[best]), int(other[best])) if both[best] < peak - _TOLERANCE else None


def _pairs(column: _Floats, ranks: _Indices, excess: _Floats, rank: int, peak: float) -> tuple[_Indices, _Indices]:
    """Pairs (item of the worst rank, item elsewhere) that help in the worst batch, the ``_PAIRS`` that help most.

    Args:
        column: (I,) shares of the items in that batch.
        ranks: (I,) of the items.
        excess: (W,) loads over 1/W in that batch.
        rank: the worst one.
        peak: its distance.
    """
    here, elsewhere = np.flatnonzero(ranks == rank), np.flatnonzero(ranks != rank)
    change = column[elsewhere][None, :] - column[here][:, None]
    after = np.maximum(np.abs(excess[rank] + change), np.abs(excess[ranks[elsewhere]][None, :] - change))
    flat = np.flatnonzero(after.ravel() < peak - _TOLERANCE)
    flat = flat[np.argsort(after.ravel()[flat], kind="stable")[:_PAIRS]]
    one, other = np.unravel_index(flat, after.shape)
    return here[one], elsewhere[other]
