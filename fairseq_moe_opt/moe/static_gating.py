"""The capacity-padded baseline: what fairseq's branches compute, masks and padding included.

Every expert processes exactly C rows however many it was given, through (T, E, C) combine and dispatch tensors and two
dense products (paper section 2.1; ``moe_layer.py`` of the branches). It is here to be measured against and to verify
with; nothing else uses it. Its cost is T*E*C in memory and E*C*D in rows, where dynamic gating pays T*K.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager as Context
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional

from fairseq_moe_opt.moe.experts import NO_DROPOUT, ExpertDropout, compute_dtype, expert_ffn
from fairseq_moe_opt.moe.protocols import ExpertStore, PaddedExchange
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


def own_capacity(num_tokens: int, capacity: int | None) -> int:
    """C that these tokens alone need: the routing's, or T when it drops nothing, the least that never overflows."""
    if num_tokens == 0 or capacity is None:
        return num_tokens
    return max(1, capacity)


def static_moe(
    tokens: Tensor,
    routing: Routing,
    store: ExpertStore,
    activation: str,
    exchange: PaddedExchange,
    dropout: ExpertDropout = NO_DROPOUT,
    timed: Callable[[str], Context[None]] = lambda _: nullcontext(),
) -> tuple[Tensor, int]:
    """(T, D) tokens through all experts at C rows each, agreed among ranks; differentiable on one rank.

    Ranks with fewer tokens pad to the C of the largest one, as the branches do; unlike there, each rank drops by its
    own capacity. ``timed`` gives the context of a step by its name, as of ``report.STEPS``. Returns (T, D), and the
    rows that this rank computed.
    """
    num_tokens, width = tokens.shape
    num_experts = routing.num_experts
    capacity = exchange.capacity(own_capacity(num_tokens, routing.capacity))
    if capacity == 0:
        return torch.zeros_like(tokens), 0
    with timed("dispatch"):
        combine = combine_weights(routing, capacity).to(tokens.dtype)
        dispatch = combine.bool().permute(1, 2, 0).reshape(num_experts * capacity, num_tokens)
        buffers = torch.mm(dispatch.to(tokens.dtype), tokens).view(num_experts, capacity, width)
        arrived = exchange.dispatch(buffers.to(compute_dtype(store.dtype, tokens.dtype)))
    with timed("experts"):
        outputs: dict[int, Tensor] = {}
        for wave in store.waves(range(arrived.shape[0])):
            for expert, weights in zip(wave.experts, wave.weights, strict=True):
                outputs[expert] = expert_ffn(arrived[expert], weights, activation, dropout)
        stacked = torch.stack([outputs[expert] for expert in range(arrived.shape[0])])
    with timed("combine"):
        returned = exchange.combine(stacked).reshape(-1, width).to(tokens.dtype)
        output = torch.mm(combine.reshape(num_tokens, num_experts * capacity), returned)
    return output, arrived.shape[0] * arrived.shape[1]
