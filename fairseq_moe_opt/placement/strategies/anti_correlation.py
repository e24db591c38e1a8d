"""The paper's anti-correlation placement (section 4.3): greedy that also keeps apart what is active together."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fairseq_moe_opt.placement.history import Shares
from fairseq_moe_opt.placement.types import Cluster, RankSlots, rank_slots

CORRELATION_WEIGHT = 0.5
"""What the paper multiplies the correlation by."""


def place_anti_correlation(shares: Shares, cluster: Cluster) -> RankSlots:
    """Greedy order; the load of a rank is the sum of A + 0.5 S over its experts, S the correlation with the newcomer.

    The paper does not say how A, the mean historic shares, is scaled, and it matters: A sums to 1 over all experts,
    while S reaches 1 for a single pair, so unscaled shares only break ties. Here A is divided by its largest value:
    both terms then have the same range, up to 1, and one fully correlated neighbour weighs half the hottest expert.
    """
    mean = shares.mean(axis=0)
    heat, correlation = mean / mean.max(), pearson(shares)
    ranks, left = np.full(len(mean), -1, dtype=np.int64), np.array(cluster.slots)
    cost = np.zeros((len(mean), cluster.num_ranks))
    for expert in np.argsort(-mean, kind="stable"):
        rank = int(np.argmin(np.where(left > 0, cost[expert], np.inf)))
        ranks[expert] = rank
        left[rank] -= 1
        cost[:, rank] += heat[expert] + CORRELATION_WEIGHT * correlation[expert]
    return rank_slots(np.arange(len(mean)), ranks, cluster.num_ranks)


def pearson(shares: Shares) -> NDArray[np.float64]:
    """(E, E) correlations of experts over batches; 0 with an expert whose share never changes."""
    centred = shares - shares.mean(axis=0)
    # A constant column has a spread of rounding only; its correlations would be noise.
    spread = np.sqrt((centred**2).sum(axis=0))
    scale = np.where(spread > 1e-12, spread, np.inf)
    return np.asarray((centred / scale).T @ (centred / scale))
