"""Small layers for tests, and an oracle of the whole layer that shares nothing with the engine."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fairseq_moe_opt.moe import (
    ExpertWeights,
    GShardTop2Router,
    LayerConfig,
    LayerCounters,
    MoELayer,
    PackedExperts,
    ResidentExperts,
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


def int8_expert(
    model_width: int = 24, ffn_width: int = 40, *, dtype: torch.dtype = torch.float32, gated: bool = False
) -> ExpertWeights:
    """Random codes, scales that make outputs of order 1, and biases of ``dtype``."""
    expert = ExpertWeights.empty(model_width, ffn_width, dtype=torch.int8, bias_dtype=dtype, gated=gated)
    for tensor in expert.tensors():
        if tensor.dtype == torch.int8:
            tensor.random_(-127, 128)
        else:
            tensor.normal_(0, 0.1)
    for scale, width in ((expert.fc1_scale, model_width), (expert.fc2_scale, ffn_width), (expert.gate_scale, 16)):
        if scale is not None:
            scale.uniform_(0.5, 1.5).div_(70 * width**0.5)
    return expert


def int8_layer(experts: list[ExpertWeights], *, kernel: str = "auto", gating: str = "dynamic") -> MoELayer:
    """A layer over ``experts`` kept apart, the same gate every time."""
    generator = torch.Generator().manual_seed(3)
    gate = torch.randn(len(experts), experts[0].fc1_weight.shape[1], generator=generator)
    store = ResidentExperts(len(experts), experts.__getitem__)
    counters = LayerCounters("layer", "encoder", len(experts), False)
    config = LayerConfig("relu", gating, kernel)
    return MoELayer(
        lambda x: x.float() @ gate.to(x.device).t(), GShardTop2Router(len(experts)), store, config, counters
    )


def moved_expert(expert: ExpertWeights, device: torch.device) -> ExpertWeights:
    """``expert`` on ``device``."""
    return ExpertWeights(*(None if tensor is None else tensor.to(device) for tensor in vars(expert).values()))


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
