"""Routing that was recorded, or drawn with the paper's statistics, as histories and as visits of caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fairseq_moe_opt.moe.trace import Trace, TraceVisit
from fairseq_moe_opt.placement import LoadHistory, history_of, synthetic_history
from fairseq_moe_opt.reproduction.config import DECODER, ENCODER, Plan

SYNTHETIC, DEMO = "synthetic", "demo"
LABELS: Mapping[str, str] = {
    SYNTHETIC: "synthetic trace with the paper's statistics",
    DEMO: "demo checkpoint, its own text",
}


def synthetic(plan: Plan, phase: str) -> LoadHistory:
    """A synthetic trace of ``phase`` with the paper's E."""
    scale = plan.scale
    return synthetic_history(phase, plan.paper(phase).experts, scale.trace_batches, scale.trace_layers, plan.seed)


def recorded(trace: Trace | None) -> dict[str, LoadHistory]:
    """The phases of a recorded trace, encoder and decoder; nothing where there is none."""
    if trace is None:
        return {}
    found = {one.phase for one in trace.layers}
    return {phase: history_of(trace, phase) for phase in (ENCODER, DECODER) if phase in found}


def visits_of(history: LoadHistory, layer: str) -> Sequence[TraceVisit]:
    """One layer's batches as visits; those without a row ask for nothing."""
    found = []
    for counts in history.layers[layer]:
        experts = np.flatnonzero(counts)
        if len(experts):
            rows = tuple(int(counts[expert]) for expert in experts)
            found.append(TraceVisit(layer, tuple(map(int, experts)), int(counts.sum()), rows))
    return found
