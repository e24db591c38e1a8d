"""The capacity-padded baseline: what fairseq's branches compute, masks and padding included.

Every expert processes exactly C rows however many it was given, through (T, E, C) combine and dispatch tensors and two
dense products (paper section 2.1; ``moe_layer.py`` of the branches). It is here to be measured against and to verify
with; nothing else uses it. Its cost is T*E*C in memory and E*C*D in rows, where dynamic gating pays T*K.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fairseq_moe_opt.moe.experts import NO_DROPOUT, ExpertDropout, compute_dtype, expert_ffn
from fairseq_moe_opt.moe.protocols import ExpertStore
from fairseq_moe_opt.moe.types import Routing


def combine_weights(routing: Routing, capacity: int) -> Tensor:
    """(T, E, C) tensor of combine weights: an outer product of one-hot expert and one-hot slot a choice, summed.

    ``routing.slot`` must be there. Choices not computed are zero everywhere.
    """
    if routing.slot is None:
        raise ValueError("static gating needs a routing with slots: route(..., with_slots=True)")
    num_experts, top_k = routing.num_experts, routing.weight.shape[1]
    total: Tensor | None = None
    for choice in range(top_k):
        expert = functional.one_hot(routing.expert_index[:, choice], num_experts + 1)[:, :num_experts]
        gates = routing.weight[:, choice : choice + 1] * expert
        # A dropped choice has weight 0, so the slot it is clamped to does not matter.
        slots = functional.one_hot(routing.slot[:, choice].clamp(max=capacity - 1), capacity)
        part = torch.bmm(gates.unsqueeze(2), slots.to(gates.dtype).unsqueeze(1))
        total = part if total is None else total + part
    if total is None:
        raise ValueError("a routing needs at least one choice a token")
    return total


def static_moe(
    tokens: Tensor, routing: Routing, store: ExpertStore, activation: str, dropout: ExpertDropout = NO_DROPOUT
) -> Tensor:
    """(T, D) tokens through all E experts at C rows each; returns (T, D). Differentiable.

    C is the routing's capacity, or T when it drops nothing (the smallest fixed size that can never overflow).
    """
    num_tokens, width = tokens.shape
    if num_tokens == 0:
        return torch.zeros_like(tokens)
    capacity = max(1, num_tokens if routing.capacity is None else routing.capacity)
    combine = combine_weights(routing, capacity).to(tokens.dtype)
    dispatch = combine.bool().permute(1, 2, 0).reshape(routing.num_experts * capacity, num_tokens)
    buffers = torch.mm(dispatch.to(tokens.dtype), tokens).view(routing.num_experts, capacity, width)
    buffers = buffers.to(compute_dtype(store.dtype, tokens.dtype))
    outputs: dict[int, Tensor] = {}
    for wave in store.waves(range(routing.num_experts)):
        for expert, weights in zip(wave.experts, wave.weights, strict=True):
            outputs[expert] = expert_ffn(buffers[expert], weights, activation, dropout)
    stacked = torch.cat([outputs[expert] for expert in range(routing.num_experts)]).to(tokens.dtype)
    return torch.mm(combine.reshape(num_tokens, routing.num_experts * capacity), stacked)
