"""What a profiler recorded, made into numbers: one object that JSON, pictures and page are all made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from fairseq_moe_opt.moe.trace import Trace
from fairseq_moe_opt.profiling.clock import COMPONENTS, Times
from fairseq_moe_opt.profiling.experts import ExpertTime
from fairseq_moe_opt.profiling.memory import Timeline, WeightBytes
from fairseq_moe_opt.profiling.profiler import LayerFacts, Profiler, Recorded
from fairseq_moe_opt.profiling.statistics import (
    Counts,
    LayerComparison,
    LayerStatistics,
    compare_layer,
    heat_map,
    layer_counts,
    layer_statistics,
    waste_factor,
)

FORMAT = 1


@dataclass(frozen=True)
class InputProfile:
    """One input.

    Attributes:
        label: what it is called.
        seconds: wall time of all that ran, 0 where that was not measured; what is not in a forward (a search's steps,
            tokenising) is the difference.
        times: of components, and of forwards as a whole.
        counts: (B, E) rows by layer.
        tokens: rows of a layer's input, padding included, by layer.
        statistics: by layer; without those that were given no row.
        trace: what ``counts`` is from.
    """

    label: str
    seconds: float
    times: Times
    counts: Mapping[str, Counts]
    tokens: Mapping[str, int]
    statistics: Mapping[str, LayerStatistics]
    trace: Trace

    @classmethod
    def of(cls, recorded: Recorded, facts: Sequence[LayerFacts]) -> InputProfile:
        """Of what was recorded."""
        trace = recorded.trace
        counts = layer_counts(trace)
        tokens = dict.fromkeys(counts, 0)
        for visit in trace.visits:
            tokens[visit.layer] += visit.tokens
        found = {one.name: layer_statistics(counts[one.name], one.top_k) for one in facts}
        statistics = {name: one for name, one in found.items() if one is not None}
        return cls(recorded.label, recorded.seconds, recorded.times, counts, tokens, statistics, trace)

    def milliseconds(self, phase: str) -> dict[str, float]:
        """Of each component in a mean forward of ``phase``; empty where there was none."""
        forwards = len(self.times.forwards.get(phase, ()))
        return {name: 1000 * one / forwards for name, one in self.times.components(phase).items()} if forwards else {}

    def difference(self, phase: str) -> float:
        """How far the sum of the components is from the forwards as a whole, as a share of these."""
        whole = self.times.whole(phase)
        return sum(self.times.components(phase).values()) / whole - 1 if whole else 0.0


@dataclass(frozen=True)
class Profile:
    """Everything a report says.

    Attributes:
        about: the model, its options, the machine: shown as they are.
        layers: facts of the sparse layers.
        inputs: in the order in which they ran.
        weights: static memory.
        timelines: memory of one forward a phase.
        comparison: of the inputs, by layer.
        experts: times of experts run one at a time; empty where they were not.
    """

    about: Mapping[str, Any]
    layers: tuple[LayerFacts, ...]
    inputs: tuple[InputProfile, ...]
    weights: WeightBytes
    timelines: Mapping[str, Timeline]
    comparison: Mapping[str, LayerComparison]
    experts: tuple[ExpertTime, ...] = ()

    @classmethod
    def of(cls, profiler: Profiler, about: Mapping[str, Any], weights: WeightBytes) -> Profile:
        """Of what ``profiler`` recorded so far."""
        profiler.settle()
        # What an option began and nothing ran in is no input.
        seen = [one for one in profiler.inputs if one.times.forwards or one.trace.visits]
        inputs = tuple(InputProfile.of(one, profiler.facts) for one in seen)
        comparison = {}
        for facts in profiler.facts:
            used = {one.label: one.counts[facts.name] for one in inputs if facts.name in one.statistics}
            if used:
                comparison[facts.name] = compare_layer(used)
        timelines = {phase: timeline.thinned() for phase, timeline in profiler.timelines.items()}
        return cls(about, profiler.facts, inputs, weights, timelines, comparison, tuple(profiler.expert_times))

    @property
    def phases(self) -> tuple[str, ...]:
        """Those with a sparse layer or a timed forward, the encoder first."""
        timed = [phase for one in self.inputs for phase in one.times.forwards]
        return tuple(dict.fromkeys([*(one.phase for one in self.layers), *timed]))

    def layers_of(self, phase: str) -> tuple[LayerFacts, ...]:
        """Of one phase."""
        return tuple(one for one in self.layers if one.phase == phase)

    def inputs_of(self, layer: str) -> tuple[InputProfile, ...]:
        """Those with rows for ``layer``: what its comparison is over."""
        return tuple(one for one in self.inputs if layer in one.statistics)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for ``json.dump``."""
        return {
            "format": FORMAT,
            "about": dict(self.about),
            "layers": [{**asdict(one), "waste_factor": waste_of(one)} for one in self.layers],
            "memory": {
                "weight_bytes": self.weights.total,
                "dense_bytes": self.weights.dense,
                "expert_bytes": self.weights.experts,
                "forwards": {phase: _timeline(one) for phase, one in self.timelines.items()},
            },
            "inputs": [self._input(one) for one in self.inputs],
            "comparison": {name: one.to_dict() for name, one in self.comparison.items()},
            "experts": [{**asdict(one), "is_slow": one.is_slow} for one in self.experts],
        }

    def _input(self, one: InputProfile) -> dict[str, Any]:
        layers = {}
        for facts in self.layers:
            if facts.name not in one.statistics:
                continue
            layers[facts.name] = {
                "seconds": one.times.of_layer(facts.name),
                "tokens": one.tokens[facts.name],
                **one.statistics[facts.name].to_dict(),
                "heat_map": [[round(share, 4) for share in row] for row in heat_map(one.counts[facts.name]).tolist()],
            }
        return {
            "label": one.label,
            "seconds": one.seconds,
            "phases": {phase: _phase(one, phase) for phase in self.phases},
            "modules": _modules(one.times, {facts.name for facts in self.layers}),
            "layers": layers,
        }


def waste_of(facts: LayerFacts) -> float | None:
    """E * C / K of a layer; None where the checkpoint has no capacity."""
    if facts.capacity_fraction is None:
        return None
    return waste_factor(facts.num_experts, facts.capacity_fraction, facts.top_k)


def _phase(one: InputProfile, phase: str) -> dict[str, Any]:
    forwards = one.times.forwards.get(phase, [])
    components = one.times.components(phase)
    return {
        "forwards": len(forwards),
        "seconds": sum(forwards),
        "median_forward_seconds": median(forwards) if forwards else None,
        "components": {name: components[name] for name in COMPONENTS},
        "components_sum_seconds": sum(components.values()),
        "components_sum_difference": one.difference(phase),
    }


def _modules(times: Times, layers: set[str]) -> dict[str, dict[str, float]]:
    """Seconds of the modules that are no sparse layer, by component."""
    found: dict[str, dict[str, float]] = {}
    for key, seconds in times.seconds.items():
        if key.place not in layers:
            found.setdefault(key.place, {})[key.component] = seconds
    return found


def _timeline(one: Timeline) -> dict[str, Any]:
    return {
        "peak_bytes": one.peak.nbytes,
        "peak_component": one.peak.component,
        "peak_bytes_by_component": one.peaks(),
        "moments": [[round(moment.microseconds, 1), moment.nbytes, moment.component] for moment in one.moments],
    }
