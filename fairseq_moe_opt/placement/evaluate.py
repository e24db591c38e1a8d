"""How good a placement is on a history: the metrics of the paper's section 4.4, bytes, and lower bounds."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fairseq_moe_opt.errors import PlacementError
from fairseq_moe_opt.placement.history import Counts, LoadHistory, Shares, shares_of
from fairseq_moe_opt.placement.types import Cluster, Placement, RankSlots, fractions_of


@dataclass(frozen=True)
class LayerBalance:
    """One layer of a placement on one history; loads are shares of a batch's rows.

    Attributes:
        max_load: largest load of any rank in any batch: what memory must be there for.
        avg_max_load: mean over batches of the largest load of any rank: what everyone waits for.
        objective: largest distance of any load from 1/W, in any batch: what the paper minimises.
        ideal: 1/W.
    """

    max_load: float
    avg_max_load: float
    objective: float
    ideal: float


@dataclass(frozen=True)
class NetworkBytes:
    """What one layer sends, dispatch and combine together, as means over batches.

    Attributes:
        total: bytes that leave a rank. The same for every placement, since every rank owns as many tokens.
        busiest_rank: bytes in and out of the rank with most of them in its batch.
        busiest_node: bytes in and out of the node with most of them, less what stays in it; 0 with one node.
    """

    total: float
    busiest_rank: float
    busiest_node: float


@dataclass(frozen=True)
class LowerBounds:
    """What no placement into the same slots can be under, batch by batch (so they may be out of reach together).

    Attributes:
        max_load: of ``LayerBalance.max_load``.
        avg_max_load: of ``LayerBalance.avg_max_load``.
    """

    max_load: float
    avg_max_load: float


def rank_loads(slots: RankSlots, shares: Shares) -> NDArray[np.float64]:
    """(B, W) loads of one layer: the share of each batch's rows that each rank computes."""
    return np.asarray(shares @ fractions_of(slots, shares.shape[1]))


def layer_balance(slots: RankSlots, shares: Shares) -> LayerBalance:
    """The metrics of one layer on a history given as (B, E) shares."""
    loads, ideal = rank_loads(slots, shares), 1 / len(slots)
    largest = loads.max(axis=1)
    return LayerBalance(
        max_load=float(largest.max()),
        avg_max_load=float(largest.mean()),
        objective=float(np.abs(loads - ideal).max()),
        ideal=ideal,
    )


def evaluate(placement: Placement, history: LoadHistory) -> Mapping[str, LayerBalance]:
    """The metrics of every layer; the paper's protocol evaluates on the half that placed nothing.

    Raises PlacementError where the placement lacks a layer of the history or is for another number of experts.
    """
    if placement.num_experts != history.num_experts:
        raise PlacementError(f"made for {placement.num_experts} experts; the history has {history.num_experts}")
    missing = [name for name in history.layers if name not in placement.layers]
    if missing:
        raise PlacementError(f"layer {missing[0]!r} of the history is not in the placement")
    return {name: layer_balance(placement.layers[name], history.shares(name)) for name in history.layers}


def network_bytes(slots: RankSlots, counts: Counts, bytes_per_row: int, num_nodes: int = 1) -> NetworkBytes:
    """Bytes that one layer exchanges when every rank owns as many tokens of every kind.

    Args:
        slots: the layer's placement.
        counts: (B, E) routed rows.
        bytes_per_row: of one row, one way: D times the size of an element.
        num_nodes: nodes that the ranks are spread over, contiguously and equally.
    """
    used = counts[counts.sum(axis=1) > 0]
    loads = rank_loads(slots, shares_of(used))
    rows = used.sum(axis=1)
    cluster = Cluster(tuple(map(len, slots)), num_nodes)
    node_loads = loads.reshape(len(loads), num_nodes, -1).sum(axis=2)
    return NetworkBytes(
        total=float((2 * bytes_per_row * rows * (1 - 1 / cluster.num_ranks)).mean()),
        busiest_rank=float(_busiest(loads, rows, bytes_per_row).mean()),
        busiest_node=float(_busiest(node_loads, rows, bytes_per_row).mean()),
    )


def lower_bounds(shares: Shares, cluster: Cluster) -> LowerBounds:
    """Bounds for any placement of the E experts into ``cluster``'s slots, on (B, E) shares.

    In a batch, some rank has at least the mean 1/W. Some rank also holds the hottest expert (or, with spare slots, a
    replica of the hottest once replicas are given as that batch would like best) and, without spare slots, fills its
    other slots with no less than the coldest experts.
    """
    cluster.check_room(shares.shape[1])
    spare = cluster.num_slots - shares.shape[1]
    bounds = [_batch_bound(batch, cluster, spare) for batch in shares]
    return LowerBounds(max_load=float(max(bounds)), avg_max_load=float(np.mean(bounds)))


def _busiest(loads: NDArray[np.float64], rows: NDArray[np.int64], bytes_per_row: int) -> NDArray[np.float64]:
    """(B,) bytes of the place with most of them: it receives others' rows, sends its own away, and all come back.

    A place with load l of n rows, among P that own n/P rows each, receives l n (1 - 1/P) and sends n/P (1 - l).
    """
    places = loads.shape[1]
    one_way = loads * (1 - 1 / places) + (1 - loads) / places
    return np.asarray(2 * bytes_per_row * rows * one_way.max(axis=1)) if places > 1 else np.zeros(len(loads))


def _batch_bound(batch: NDArray[np.float64], cluster: Cluster, spare: int) -> float:
    if spare:
        return max(1 / cluster.num_ranks, _smallest_largest_replica(batch, spare))
    fewest = min(size for size in cluster.slots if size)
    return max(1 / cluster.num_ranks, float(batch.max() + np.sort(batch)[: fewest - 1].sum()))


def _smallest_largest_replica(batch: NDArray[np.float64], spare: int) -> float:
    """The largest share of one replica when each spare slot goes to the largest: no other way brings it down more."""
    heap = [(-float(share), float(share), 1) for share in batch]
    heapq.heapify(heap)
    for _ in range(spare):
        _, share, copies = heap[0]
        heapq.heapreplace(heap, (-share / (copies + 1), share, copies + 1))
    return -heap[0][0]
