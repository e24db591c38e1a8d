"""How skewed and how sticky a run's routing was, from its trace."""

from __future__ import annotations

from itertools import pairwise

from fairseq_moe_opt.moe.trace import Trace


def routing_facts(trace: Trace, phase: str = "decoder") -> dict[str, float]:
    """Shares, over the layers of ``phase``.

    ``hottest_quarter`` of uses go to each layer's most used quarter of experts, and ``used_again`` is how much of a
    forward's experts the layer's forward before it used too.
    """
    hot = total = again = followed = 0
    for layer in trace.layers:
        visits = [set(visit.experts) for visit in trace.phase(phase) if visit.layer == layer.name]
        counts = sorted((sum(expert in visit for visit in visits) for expert in range(layer.num_experts)), reverse=True)
        hot += sum(counts[: layer.num_experts // 4])
        total += sum(counts)
        for before, after in pairwise(visits):
            again += len(before & after)
            followed += len(after)
    return {"hottest_quarter": hot / max(total, 1), "used_again": again / max(followed, 1)}
