"""Layers whose experts are spread over ranks, beside the same layer on one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fairseq_moe_opt.moe import (
    LayerConfig,
    LayerCounters,
    MoELayer,
    PackedExperts,
    ResidentPackedExperts,
    Routing,
    SoftmaxTopKRouter,
)
from fairseq_moe_opt.moe.protocols import PaddedExchange, TokenExchange
from fairseq_moe_opt.moe.routing import first_come_slots


def experts_of(packed: PackedExperts, held: Sequence[int]) -> PackedExperts:
    """The experts ``held``, in slot order."""
    index = torch.tensor(held, dtype=torch.int64)
    assert packed.fc1_bias is not None and packed.fc2_bias is not None
    return PackedExperts(
        packed.fc1_weight[index], packed.fc1_bias[index], packed.fc2_weight[index], packed.fc2_bias[index]
    )


def dynamic_layer(
    packed: PackedExperts, held: Sequence[int], exchange: TokenExchange | None, num_experts: int, kernel: str = "auto"
) -> MoELayer:
    """A rank's layer over its experts; without an ``exchange`` it holds them all."""
    counters = LayerCounters("layer", "encoder", num_experts, exchange=None if exchange is None else exchange.counters)
    return MoELayer(
        no_gate,
        SoftmaxTopKRouter(num_experts, 1),
        ResidentPackedExperts(experts_of(packed, held)),
        LayerConfig(kernel=kernel),
        counters,
        exchange=exchange,
    )


def static_layer(
    packed: PackedExperts, held: Sequence[int], exchange: PaddedExchange | None, num_experts: int
) -> MoELayer:
    """The same for the padded baseline."""
    counters = LayerCounters("layer", "encoder", num_experts, exchange=None if exchange is None else exchange.counters)
    return MoELayer(
        no_gate,
        SoftmaxTopKRouter(num_experts, 1),
        ResidentPackedExperts(experts_of(packed, held)),
        LayerConfig(gating="static"),
        counters,
        padded_exchange=exchange,
    )


def no_gate(tokens: Tensor) -> Tensor:
    """These layers are given their routing."""
    raise AssertionError("the gate was asked, though the routing is injected")


def random_routing(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    generator: torch.Generator,
    *,
    skew: float = 0.0,
    padding: float = 0.0,
) -> Routing:
    """Distinct experts a token, some far more popular than others with ``skew``; slots for the static baseline."""
    scores = torch.randn(num_tokens, num_experts, generator=generator)
    scores = scores + skew * torch.randn(num_experts, generator=generator)
    index = scores.topk(top_k, dim=1).indices
    padded = torch.rand(num_tokens, generator=generator) < padding
    index = index.masked_fill(padded.unsqueeze(1), num_experts)
    weight = torch.rand(num_tokens, top_k, generator=generator) * (index != num_experts)
    return Routing(index, weight, num_experts, None, first_come_slots(index, num_experts))


def moved(routing: Routing, device: torch.device) -> Routing:
    """The same routing on ``device``."""
    return replace(routing, expert_index=routing.expert_index.to(device), weight=routing.weight.to(device), slot=None)


def packed_on(packed: PackedExperts, device: torch.device) -> PackedExperts:
    """The same experts on ``device``."""
    assert packed.fc1_bias is not None and packed.fc2_bias is not None
    tensors = (packed.fc1_weight, packed.fc1_bias, packed.fc2_weight, packed.fc2_bias)
    return PackedExperts(*(tensor.to(device) for tensor in tensors))


def part_of(routing: Routing, rows: slice) -> Routing:
    """The routing of some of the tokens."""
    index = routing.expert_index[rows]
    return Routing(index, routing.weight[rows], routing.num_experts, None, first_come_slots(index, routing.num_experts))
