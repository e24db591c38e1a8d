"""Experts in order of their ids: what fairseq's rank files and Transformers' sharding do."""

from __future__ import annotations

import numpy as np

from fairseq_moe_opt.placement.history import Shares
from fairseq_moe_opt.placement.types import Cluster, RankSlots, rank_slots


def place_contiguous(shares: Shares, cluster: Cluster) -> RankSlots:
    """Neighbours together, as evenly as the slots allow; the history is not looked at, and spare slots stay empty."""
    num_experts = shares.shape[1]
    ranks = np.repeat(np.arange(cluster.num_ranks), _even_counts(num_experts, cluster))
    return rank_slots(np.arange(num_experts), ranks, cluster.num_ranks)


def _even_counts(num_experts: int, cluster: Cluster) -> list[int]:
    """Experts of each rank: as even as ``cluster.slots`` allow, the first ranks one more."""
    counts, left = [0] * cluster.num_ranks, num_experts
    while left:
        for rank, size in enumerate(cluster.slots):
            if left and counts[rank] < size:
                counts[rank] += 1
                left -= 1
    return counts
