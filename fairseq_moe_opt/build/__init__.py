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
from fairseq_moe_opt.build.spread import spread_experts

__all__ = [
    "EXPERT_DTYPES",
    "AnyRouter",
    "ExpertBuffer",
    "ExpertLayer",
    "LayerSpec",
    "build_buffer",
    "build_layer",
    "capacity_fraction",
    "connect_routers",
    "needs_packed_experts",
    "slots_of",
    "spread_experts",
]
