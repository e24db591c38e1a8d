"""DeepSeek's EPLB, from its published description (https://github.com/deepseek-ai/EPLB, README and docstrings).

One layer at a time: replicate the expert with the largest load a replica until the slots are full, then sort by load
and give each to the least loaded rank with room. The hierarchical variant does so within nodes, after packing whole
groups of experts onto nodes. Two things differ from what is published: ranks may have uneven slots, and an expert has
at most as many replicas as there are ranks to put them on.
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
    experts = replicate(loads, sum(slots), len(slots))
    return experts, pack((loads / np.bincount(experts))[experts], slots)


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
