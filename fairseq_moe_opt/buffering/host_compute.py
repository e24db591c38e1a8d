"""Experts that are computed where they are, in the main-memory tier, because copying them would take longer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import cycle

import torch
from torch import Tensor

from fairseq_moe_opt.buffering.cost import MissCosts, compute_on_host, measure
from fairseq_moe_opt.buffering.host import HostTier, copy_expert
from fairseq_moe_opt.buffering.pool import PooledLayer
from fairseq_moe_opt.buffering.slots import SlotArena, SlotLayout
from fairseq_moe_opt.moe.types import ExpertKey, ExpertWeights

HostFFN = Callable[[Tensor, ExpertWeights], Tensor]
"""(r, D) rows on the device through an expert in main memory, back to the device."""

_TIMED_EXPERTS = 8
"""Copies and computations go round so many experts, as one alone would stay in the processor's caches."""


class HostCompute:
    """Decides which of a forward's missing experts are computed in main memory, and keeps them there meanwhile.

    Args:
        tier: where they are.
        costs: of a miss, by layer.
    """

    def __init__(self, tier: HostTier, costs: Mapping[str, MissCosts]) -> None:
        self._tier, self._costs = tier, costs
        self._spent: dict[ExpertKey, float] = {}

    @property
    def most_rows(self) -> int:
        """The most rows with which an expert of any layer can be computed in main memory."""
        return max(costs.break_even for costs in self._costs.values())

    def borrow(self, key: ExpertKey, rows: int) -> ExpertWeights | None:
        """The weights of ``key``, kept until ``give_back``; None when it is to be copied. Not for two threads at once.

        Called for an expert that misses.
        """
        costs, spent = self._costs[key.layer], self._spent.pop(key, 0.0)
        weights = self._tier.borrow(key) if compute_on_host(rows, costs, spent) else None
        if weights is not None:
            self._spent[key] = spent + costs.compute(rows)
        return weights

    def give_back(self, keys: Iterable[ExpertKey]) -> None:
        """The borrowed ``keys`` were computed."""
        for key in keys:
            self._tier.give_back(key)


def measure_layers(
    layers: Collection[PooledLayer], tier: HostTier, slots: SlotArena, dtype: torch.dtype, ffn: HostFFN
) -> dict[str, MissCosts]:
    """The costs of a miss in each layer, experts laid out alike being timed once.

    Overwrites slots of ``slots`` and of the tier's arena, so it comes before anything is loaded.

    Args:
        layers: of the pool.
        tier: from which is copied.
        slots: to which is copied.
        dtype: of the rows.
        ffn: what computes in main memory.
    """
    found: dict[tuple[SlotLayout, SlotLayout], MissCosts] = {}
    for layer in layers:
        pair = tier.layout(layer.name), layer.layout
        if pair not in found:
            found[pair] = _measure(*pair, tier.arena, slots, dtype, ffn)
    return {layer.name: found[tier.layout(layer.name), layer.layout] for layer in layers}


def _measure(
    stored: SlotLayout, layout: SlotLayout, host: SlotArena, slots: SlotArena, dtype: torch.dtype, ffn: HostFFN
) -> MissCosts:
    views = [host.view(slot, stored) for slot in range(min(_TIMED_EXPERTS, host.num_slots))]
    for tensor in (tensor for view in views for tensor in view.tensors()):
        tensor.zero_()  # what happens to be in memory may be numbers that are slow to compute with
    experts, target = cycle(views), slots.view(0, layout)
    width = views[0].fc1_weight.shape[1]

    def compute(rows: int) -> None:
        ffn(torch.zeros(rows, width, dtype=dtype, device=slots.device), next(experts)).cpu()

    with torch.no_grad():
        return measure(lambda: copy_expert(next(experts), target), compute)
