"""Expert buffering: where an expert's weights live when not all of them fit. In torch alone.

A pool of equal slots on the device holds the experts in use; a policy decides what makes room; readers fetch what is
missing while resident experts are computed. The paper's section 3, with everything it leaves open.
"""

from fairseq_moe_opt.buffering.cost import MissCosts
from fairseq_moe_opt.buffering.devices import DeviceLink, link_to
from fairseq_moe_opt.buffering.footprint import LayerSize, StaticMemory, static_memory
from fairseq_moe_opt.buffering.host import HostTier
from fairseq_moe_opt.buffering.host_compute import HostCompute, measure_layers
from fairseq_moe_opt.buffering.policies import BELADY, DEFAULT_POLICY, POLICIES, find_policy
from fairseq_moe_opt.buffering.pool import GLOBAL, PER_LAYER, POOLS, ExpertPool, PooledLayer
from fairseq_moe_opt.buffering.prefetch import LAYERS, OFF, PREVIOUS, ROUTER, Prefetcher, RouterGuess
from fairseq_moe_opt.buffering.simulation import SimulatedLayer, simulate
from fairseq_moe_opt.buffering.slots import SlotArena, SlotLayout, slot_bytes_for
from fairseq_moe_opt.buffering.store import BufferedExperts

__all__ = [
    "BELADY",
    "DEFAULT_POLICY",
    "GLOBAL",
    "LAYERS",
    "OFF",
    "PER_LAYER",
    "POLICIES",
    "POOLS",
    "PREVIOUS",
    "ROUTER",
    "BufferedExperts",
    "DeviceLink",
    "ExpertPool",
    "HostCompute",
    "HostTier",
    "LayerSize",
    "MissCosts",
    "PooledLayer",
    "Prefetcher",
    "RouterGuess",
    "SimulatedLayer",
    "SlotArena",
    "SlotLayout",
    "StaticMemory",
    "find_policy",
    "link_to",
    "measure_layers",
    "simulate",
    "slot_bytes_for",
    "static_memory",
]
