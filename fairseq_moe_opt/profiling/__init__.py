"""Where time and memory of a forward go, and which experts are asked for: observers, timers, memory marks, pictures.

This room looks and never steers: a model computes the same with it and without it.
"""

from fairseq_moe_opt.profiling.clock import COMPONENTS
from fairseq_moe_opt.profiling.memory import Timeline, WeightBytes, tensor_bytes
from fairseq_moe_opt.profiling.profile import InputProfile, Profile
from fairseq_moe_opt.profiling.profiler import ALL_CALLS, LayerFacts, Part, Profiler
from fairseq_moe_opt.profiling.writing import check_folder, write_profile

__all__ = [
    "ALL_CALLS",
    "COMPONENTS",
    "InputProfile",
    "LayerFacts",
    "Part",
    "Profile",
    "Profiler",
    "Timeline",
    "WeightBytes",
    "check_folder",
    "tensor_bytes",
    "write_profile",
]
