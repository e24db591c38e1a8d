"""Transformers' own functions for experts, over the same weights as the project's kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fairseq_moe_opt.moe.types import PackedExperts

EAGER, BATCHED, GROUPED = "eager", "batched_mm", "grouped_mm"


def transformers_ways(packed: PackedExperts, index: Tensor, weight: Tensor) -> Mapping[str, Callable[[Tensor], Tensor]]:
    """``MixtralExperts`` of Transformers 5 by each of its functions, for (T, K) choices and their weights.

    Nothing is copied where the gate and ``fc1`` of the experts lie in one tensor, halves one after the other; otherwise
    they are joined first. Raises ValueError for experts without a gate.
    """
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    if packed.gate_weight is None:
        raise ValueError("MixtralExperts have a gate, these experts have none")
    num_experts, ffn_width, model_width = packed.fc1_weight.shape
    config = MixtralConfig(
        hidden_size=model_width,
        intermediate_size=ffn_width,
        num_local_experts=num_experts,
        num_experts_per_tok=index.shape[1],
    )
    with torch.device("meta"):
        experts = MixtralExperts(config)
    joined = packed.joined
    gate_up = joined.matrix if joined is not None else torch.cat([packed.gate_weight, packed.fc1_weight], 1)
    experts.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
    experts.down_proj = torch.nn.Parameter(packed.fc2_weight, requires_grad=False)

    def run(way: str, tokens: Tensor) -> Tensor:
        config._experts_implementation = way
        return experts(tokens, index, weight)  # type: ignore[no-any-return]

    return {way: lambda tokens, way=way: run(way, tokens) for way in (EAGER, BATCHED, GROUPED)}  # type: ignore[misc]
