"""Small layers for tests, and an oracle of the whole layer that shares nothing with the engine."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fairseq_moe_opt.moe import (
    LayerConfig,
    LayerCounters,
    MoELayer,
    PackedExperts,
    ResidentPackedExperts,
    Routing,
)
from fairseq_moe_opt.moe.protocols import Router


def random_experts(
    num_experts: int, model_width: int = 8, ffn_width: int = 16, dtype: torch.dtype = torch.float32
) -> PackedExperts:
    """Experts with entries around 1 / sqrt(width), biases included."""
    packed = PackedExperts.empty(num_experts, model_width, ffn_width, dtype=dtype)
    for tensor in (packed.fc1_weight, packed.fc1_bias, packed.fc2_weight, packed.fc2_bias):
        assert tensor is not None
        tensor.normal_(0, 1 / math.sqrt(tensor.shape[-1]))
    return packed


def layer_of(
    router: Router,
    experts: PackedExperts,
    *,
    gating: str = "dynamic",
    kernel: str = "auto",
    gate: Tensor | None = None,
    expert_masking: float = 0.0,
    final_masking: float = 0.0,
    activation: str = "relu",
    profile: bool = False,
) -> MoELayer:
    """A layer over resident packed experts; ``gate`` is its (E, D) classifier."""
    config = LayerConfig(activation, gating, kernel, expert_masking, final_masking)
    weight = torch.randn(router.num_experts, experts.fc1_weight.shape[2]) if gate is None else gate
    counters = LayerCounters("layer", "encoder", router.num_experts, profile)
    store = ResidentPackedExperts(experts)
    return MoELayer(lambda x: x @ weight.to(x.dtype).t(), router, store, config, counters)


def oracle(tokens: Tensor, routing: Routing, experts: PackedExperts) -> Tensor:
    """Token by token, choice by choice, in float64: y_t = sum_k w_tk * fc2(relu(fc1 x_t)) of the chosen expert."""
    assert experts.fc1_bias is not None and experts.fc2_bias is not None
    result = torch.zeros(tokens.shape, dtype=torch.float64)
    for token in range(tokens.shape[0]):
        for choice in range(routing.weight.shape[1]):
            expert = int(routing.expert_index[token, choice])
            if expert == routing.num_experts:
                continue
            hidden = experts.fc1_weight[expert].double() @ tokens[token].double() + experts.fc1_bias[expert].double()
            value = experts.fc2_weight[expert].double() @ hidden.clamp(min=0) + experts.fc2_bias[expert].double()
            result[token] += routing.weight[token, choice].double() * value
    return result


def logits_for(choices: list[tuple[int, int]], num_experts: int, first: float = 2.0, second: float = 1.0) -> Tensor:
    """(T, E) logits whose two largest entries a row are the given experts."""
    logits = torch.zeros(len(choices), num_experts)
    for row, (one, two) in enumerate(choices):
        logits[row, one], logits[row, two] = first, second
    return logits
