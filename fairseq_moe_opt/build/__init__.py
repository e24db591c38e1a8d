"""The composition root: options and descriptions in, layers, buffers and spreads out.

The only room that knows every other one; cross-checks happen here, before the first weight is read.
"""

from fairseq_moe_opt.build.buffers import ExpertBuffer, ExpertLayer, build_buffer, connect_routers, slots_of
from fairseq_moe_opt.build.layers import (
    EXPERT_DTYPES,
    AnyRouter,
    LayerSpec,
    build_layer,
    capacity_fraction,
    needs_packed_experts,
)
from fairseq_moe_opt.build.rebalancing import Rebalancer
from fairseq_moe_opt.build.shares import BufferedShare, ExpertShare, ModuleShare
from fairseq_moe_opt.build.spread import require_ranks, spread_experts

__all__ = [
    "EXPERT_DTYPES",
    "AnyRouter",
    "BufferedShare",
    "ExpertBuffer",
    "ExpertLayer",
    "ExpertShare",
    "LayerSpec",
    "ModuleShare",
    "Rebalancer",
    "build_buffer",
    "build_layer",
    "capacity_fraction",
    "connect_routers",
    "needs_packed_experts",
    "require_ranks",
    "slots_of",
    "spread_experts",
]
