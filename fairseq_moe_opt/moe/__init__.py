"""The forward pass of one Mixture-of-Experts layer, in torch alone."""

from fairseq_moe_opt.moe.experts import ExpertDropout, ResidentExperts, ResidentPackedExperts
from fairseq_moe_opt.moe.kernels import available_kernels, register_kernel
from fairseq_moe_opt.moe.layer import LayerConfig, LayerOutput, MoELayer
from fairseq_moe_opt.moe.report import LayerCounters, LayerReport
from fairseq_moe_opt.moe.routing import CapacityRule, GShardTop2Router, SoftmaxTopKRouter, Top1Router
from fairseq_moe_opt.moe.types import Dispatch, ExpertWeights, PackedExperts, Routing

__all__ = [
    "CapacityRule",
    "Dispatch",
    "ExpertDropout",
    "ExpertWeights",
    "GShardTop2Router",
    "LayerConfig",
    "LayerCounters",
    "LayerOutput",
    "LayerReport",
    "MoELayer",
    "PackedExperts",
    "ResidentExperts",
    "ResidentPackedExperts",
    "Routing",
    "SoftmaxTopKRouter",
    "Top1Router",
    "available_kernels",
    "register_kernel",
]
