"""DeepSeek's EPLB, from its published description (https://github.com/deepseek-ai/EPLB, README and docstrings).

One layer at a time: replicate the expert with the largest load a replica until the slots are full, then sort by load
and give each to the least loaded rank with room. The hierarchical variant does so within nodes, after packing whole
groups of experts onto nodes. Two things differ from what is published: ranks may have uneven slots, and no rank gets
two replicas of one expert, since the second would take memory and spare nobody a row.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.placement.history import Shares
from fairseq_moe_opt.placement.strategies.greedy import pack
from fairseq_moe_opt.placement.types import Cluster, RankSlots, rank_slots

_Loads = NDArray[np.float64]
_Indices = NDArray[np.int64]


def place_eplb(shares: Shares, cluster: Cluster) -> RankSlots:
    """EPLB on mean historic shares; an expert is a group of its own, as in models without group-limited routing."""
    return rank_slots(*eplb_items(shares.mean(axis=0), cluster), cluster.num_ranks)


def eplb_items(loads: _Loads, cluster: Cluster, num_groups: int | None = None) -> tuple[_Indices, _Indices]:
    """The logical expert and the rank of every slot, two (S,) arrays.

    Args:
        loads: (E,) of the logical experts.
        cluster: its nodes decide the variant: hierarchical where groups and slots allow, else global, as published.
        num_groups: groups of neighbouring experts that stay on one node; E when None.

    Raises:
        OptionError: groups that do not divide the experts, or fewer slots than experts.
    """
    cluster.check_room(len(loads))
    groups = len(loads) if num_groups is None else num_groups
    if groups < 1 or len(loads) % groups:
        raise OptionError("num_groups", f"must divide the {len(loads)} experts; got {groups}")
    node_slots = np.reshape(cluster.slots, (cluster.num_nodes, -1)).sum(axis=1)
    divides = groups % cluster.num_nodes == 0 and min(node_slots) >= len(loads) // cluster.num_nodes
    if cluster.num_nodes == 1 or not divides:
        return _global(loads, cluster.slots)
    return _hierarchical(loads, cluster, groups)


def replicate(loads: _Loads, num_slots: int, most: int) -> _Indices:
    """(S,) the experts in order, then their replicas in the order they are given; ties go to the lower expert.

    S is ``num_slots``, or less where every expert has ``most`` replicas.
    """
    experts, counts = list(range(len(loads))), [1] * len(loads)
    heap = [(-float(load), expert) for expert, load in enumerate(loads)]
    heapq.heapify(heap)
    for _ in range(num_slots - len(loads)):
        while heap and counts[heap[0][1]] == most:
            heapq.heappop(heap)
        if not heap:
            break
        expert = heap[0][1]
        experts.append(expert)
        counts[expert] += 1
        heapq.heapreplace(heap, (-float(loads[expert]) / counts[expert], expert))
    return np.array(experts)


def _global(loads: _Loads, slots: tuple[int, ...]) -> tuple[_Indices, _Indices]:
    experts = replicate(loads, sum(slots), sum(size > 0 for size in slots))
    ranks = _pack_apart((loads / np.bincount(experts))[experts], experts, slots)
    placed = ranks >= 0
    return experts[placed], ranks[placed]


def _pack_apart(loads: _Loads, experts: _Indices, room: tuple[int, ...]) -> _Indices:
    """(I,) the rank of each item: ``pack``, but items of one expert go to different ranks.

    Where only ranks that have the expert are left with room, another item makes way to one of those, the one whose
    load is closest. A replica for which there is none (ranks with very uneven slots) is not placed: -1.
    """
    ranks, total, left = np.full(len(experts), -1, dtype=np.int64), np.zeros(len(room)), np.array(room)
    has = np.zeros((len(room), int(experts.max()) + 1), dtype=np.bool_)

    def put(item: int, rank: int) -> None:
        ranks[item] = rank
        has[rank, experts[item]] = True
        total[rank] += loads[item]
        left[rank] -= 1

    def take(item: int) -> None:
        rank = ranks[item]
        has[rank, experts[item]] = False
        total[rank] -= loads[item]
        left[rank] += 1

    for item in np.argsort(-loads, kind="stable"):
        open_ranks = (left > 0) & ~has[:, experts[item]]
        if open_ranks.any():
            put(item, int(np.argmin(np.where(open_ranks, total, np.inf))))
            continue
        way = _way_for(item, loads, experts, ranks, has, left)
        if way is not None:
            other, rank = way
            freed = int(ranks[other])
            take(other)
            put(other, rank)
            put(item, freed)
    return ranks


def _way_for(
    item: int, loads: _Loads, experts: _Indices, ranks: _Indices, has: NDArray[np.bool_], left: _Indices
) -> tuple[int, int] | None:
    """A placed item that can make way for ``item``, and the rank with room it goes to; None where there is none."""
    found = [
        (abs(float(loads[other] - loads[item])), int(other), int(rank))
        for rank in np.flatnonzero(left > 0)
        for other in np.flatnonzero(ranks >= 0)
        if not has[ranks[other], experts[item]] and not has[rank, experts[other]]
    ]
    return min(found)[1:] if found else None


def _hierarchical(loads: _Loads, cluster: Cluster, num_groups: int) -> tuple[_Indices, _Indices]:
    """Groups to nodes with equal numbers of groups, then the global variant within each node."""
    group_loads = loads.reshape(num_groups, -1).sum(axis=1)
    node_of_group = pack(group_loads, [num_groups // cluster.num_nodes] * cluster.num_nodes)
    node_of_expert = np.repeat(node_of_group, len(loads) // num_groups)
    ranks_per_node = cluster.num_ranks // cluster.num_nodes
    experts, ranks = [], []
    for node in range(cluster.num_nodes):
        members, first = np.flatnonzero(node_of_expert == node), node * ranks_per_node
        local, rank = _global(loads[members], cluster.slots[first : first + ranks_per_node])
        experts.append(members[local])
        ranks.append(rank + first)
    return np.concatenate(experts), np.concatenate(ranks)
