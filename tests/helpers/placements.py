"""Oracles of the placement room: loads by plain loops, every partition of a few experts, histories for hypothesis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from fairseq_moe_opt.placement import Cluster

Slots = tuple[tuple[int, ...], ...]


def naive_loads(slots: Sequence[Sequence[int]], shares: NDArray[np.float64]) -> list[list[float]]:
    """For every batch the load of every rank: each replica takes an even part of its expert's share."""
    copies = [sum(rank.count(expert) for rank in map(list, slots)) for expert in range(shares.shape[1])]
    return [[sum(batch[expert] / copies[expert] for expert in rank) for rank in slots] for batch in shares.tolist()]


def naive_objective(slots: Sequence[Sequence[int]], shares: NDArray[np.float64]) -> float:
    """The paper's objective: the worst distance of any load from 1/W."""
    return max(abs(load - 1 / len(slots)) for batch in naive_loads(slots, shares) for load in batch)


def partitions(experts: Sequence[int], sizes: Sequence[int]) -> Iterator[Slots]:
    """Every way to give each rank as many experts as ``sizes`` say."""
    if not sizes:
        yield ()
        return
    for first in combinations(experts, sizes[0]):
        rest = [expert for expert in experts if expert not in first]
        for others in partitions(rest, sizes[1:]):
            yield (first, *others)


@st.composite
def histories(draw: st.DrawFn, max_experts: int = 12, max_batches: int = 8, min_batches: int = 1) -> NDArray[np.int64]:
    """(B, E) counts with no empty batch; many zeros, ties and constant experts."""
    num_experts = draw(st.integers(1, max_experts))
    num_batches = draw(st.integers(min_batches, max_batches))
    cell = st.one_of(st.just(0), st.integers(0, 5), st.integers(0, 1000))
    row = st.lists(cell, min_size=num_experts, max_size=num_experts).map(lambda one: one if any(one) else [1, *one[1:]])
    return np.array(draw(st.lists(row, min_size=num_batches, max_size=num_batches)), dtype=np.int64)


@st.composite
def clusters(draw: st.DrawFn, num_experts: int) -> Cluster:
    """Room for ``num_experts`` and some more, on 1 to 6 ranks of 1 to 3 nodes; now and then very uneven."""
    num_nodes = draw(st.integers(1, 3))
    num_ranks = num_nodes * draw(st.integers(1, 2))
    if draw(st.booleans()):
        most = min(6, num_experts * (num_ranks - 1))
        return Cluster.even(num_ranks, num_experts, spare_slots=draw(st.integers(0, most)), num_nodes=num_nodes)
    slots = draw(st.lists(st.integers(0, num_experts), min_size=num_ranks, max_size=num_ranks))
    slots[0] += max(0, num_experts - sum(slots))
    return Cluster(tuple(slots), num_nodes)
