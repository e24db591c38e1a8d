"""A new placement close to the running one: the swaps that gain most, as many as the moves allow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fairseq_moe_opt.errors import OptionError, PlacementError
from fairseq_moe_opt.placement.history import LoadHistory, Shares
from fairseq_moe_opt.placement.moments import believed_second_moment, effective_batches
from fairseq_moe_opt.placement.swaps import Assignment, Conditions, Items, best_partner
from fairseq_moe_opt.placement.types import Cluster, Placement, RankSlots, rank_slots

MOVES_PER_SWAP = 2
"""Experts that ranks fetch for one swap, at most."""


def replan(
    running: Placement,
    history: LoadHistory,
    *,
    max_moves: int | None = None,
    least_gain: float = 0.0,
    num_nodes: int = 1,
) -> Placement:
    """Improve ``running`` on ``history`` with few moves; slots and replicas of a layer stay as many as they are.

    Each step makes the swap that lowers the cost of the ``balanced`` strategy most, of all layers together, under the
    same conditions: no layer's Max Load or objective on ``history`` gets worse.

    Args:
        running: the placement to start from; layers that ``history`` does not know stay as they are.
        history: what to place by, usually the most recent batches.
        max_moves: the result is at most so many ``moves_between`` away, all layers together; None for any number.
        least_gain: share of a layer's running cost that each move must save: the price of a move.
        num_nodes: nodes that the ranks are spread over.

    Raises:
        OptionError: a negative allowance or price.
        PlacementError: a history of other layers or another number of experts.
    """
    _check(running, history, max_moves, least_gain)
    layers = {
        name: _Layer.start(running.layers[name], history.shares(name), num_nodes) for name in sorted(history.layers)
    }
    best = {name: layer.best_swap() for name, layer in layers.items()}
    swaps = 0
    while max_moves is None or MOVES_PER_SWAP * (swaps + 1) <= max_moves:
        name = max(best, key=lambda one: best[one].gain)
        if best[name].gain <= MOVES_PER_SWAP * least_gain:
            break
        layers[name].assignment.swap(best[name].one, best[name].other)
        best[name] = layers[name].best_swap()
        swaps += 1
    improved = {name: layer.slots() for name, layer in layers.items()}
    return Placement(
        {**running.layers, **improved}, running.num_experts, running.num_ranks, running.strategy, running.fingerprint
    )


@dataclass(frozen=True)
class _Swap:
    """Two items to swap, and the share of the running cost that it saves; 0 when there is nothing to gain."""

    gain: float
    one: int = 0
    other: int = 0


@dataclass(frozen=True)
class _Layer:
    """One layer on its way from the running placement."""

    assignment: Assignment
    conditions: Conditions
    running_cost: float

    @classmethod
    def start(cls, slots: RankSlots, shares: Shares, num_nodes: int) -> _Layer:
        """The layer as it runs."""
        cluster = Cluster(tuple(map(len, slots)), num_nodes)
        experts = np.concatenate([np.asarray(rank, dtype=np.int64) for rank in slots])
        ranks = np.repeat(np.arange(cluster.num_ranks), cluster.slots)
        assignment = Assignment(Items.of(experts, shares, believed_second_moment(shares)), ranks, cluster)
        conditions = Conditions.no_worse_than(assignment.loads, effective_batches(shares))
        return cls(assignment, conditions, assignment.cost())

    def best_swap(self) -> _Swap:
        """The swap that saves most."""
        best = _Swap(0.0)
        for item in range(len(self.assignment.ranks)):
            partner = best_partner(self.assignment, item, self.conditions)
            if partner is not None and partner.gain > best.gain * self.running_cost:
                best = _Swap(partner.gain / self.running_cost, item, partner.item)
        return best

    def slots(self) -> RankSlots:
        """The layer as it is now."""
        return rank_slots(self.assignment.items.expert, self.assignment.ranks, len(self.assignment.loads))


def _check(running: Placement, history: LoadHistory, max_moves: int | None, least_gain: float) -> None:
    if max_moves is not None and max_moves < 0:
        raise OptionError("max_moves", f"must be 0 or more; got {max_moves}")
    if least_gain < 0:
        raise OptionError("least_gain", f"must be 0 or more; got {least_gain}")
    if running.num_experts != history.num_experts:
        raise PlacementError(f"made for {running.num_experts} experts; the history has {history.num_experts}")
    unknown = [name for name in history.layers if name not in running.layers]
    if unknown:
        raise PlacementError(f"layer {unknown[0]!r} of the history is not in the running placement")
