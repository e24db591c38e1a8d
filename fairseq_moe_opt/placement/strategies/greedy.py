"""The paper's greedy placement (section 4.2): largest expert first, to the least loaded rank with room."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fairseq_moe_opt.placement.history import Shares
from fairseq_moe_opt.placement.types import Cluster, RankSlots, rank_slots


def place_greedy(shares: Shares, cluster: Cluster) -> RankSlots:
    """The paper's greedy on mean historic shares; with spare slots, ranks of cold experts hold more of them."""
    ranks = pack(shares.mean(axis=0), cluster.slots)
    return rank_slots(np.arange(shares.shape[1]), ranks, cluster.num_ranks)


def pack(loads: NDArray[np.float64], room: Sequence[int]) -> NDArray[np.int64]:
    """Longest processing time first under a limit on items a pack; also EPLB's ``balanced_packing``.

    Args:
        loads: (I,) of the items.
        room: items each pack can take; together I or more.

    Returns:
        (I,) the pack of each item. Ties go to the lower item, then to the lower pack.
    """
    total, left = np.zeros(len(room)), np.array(room)
    packs = np.empty(len(loads), dtype=np.int64)
    for item in np.argsort(-loads, kind="stable"):
        pack_ = int(np.argmin(np.where(left > 0, total, np.inf)))
        packs[item] = pack_
        total[pack_] += loads[item]
        left[pack_] -= 1
    return packs
