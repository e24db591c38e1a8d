"""One phase of one model, ready to be measured: its bytes, its budget, and that both gatings compute the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from fairseq_moe_opt.errors import MoEError
from fairseq_moe_opt.reproduction.config import DECODER, ENCODER, FFN_FACTOR, LM, TITLES, Plan, Shape, shape_of
from fairseq_moe_opt.reproduction.memory import peak_bytes
from fairseq_moe_opt.reproduction.models import DENSE, DYNAMIC, STATIC, Model, Watch
from fairseq_moe_opt.reproduction.timing import take_turns

ITEM_BYTES = 4
"""float32: CPUs compute nothing narrower as fast."""
MOST_DIFFERENCE = 1e-4
"""Largest difference of two gatings' outputs, relative to the largest value, that counts as rounding."""


@dataclass(frozen=True)
class StaticBytes:
    """Bytes of weights that are always there: those of the model, of its experts among them, of its dense twin."""

    total: int
    experts: int
    dense_twin: int


@dataclass(frozen=True)
class Agreement:
    """Both gatings from one routing: the largest relative difference, choices dropped by both, and of how many."""

    difference: float
    dropped: int
    choices: int


@dataclass(frozen=True)
class Timing:
    """Seconds of one side at one batch: of each round, and the median of those in sparse layers."""

    seconds: tuple[float, ...]
    sparse: float

    @property
    def median(self) -> float:
        """Of the rounds."""
        return median(self.seconds)


def static_bytes(shapes: Sequence[Shape]) -> StaticBytes:
    """Of a model with these phases, which share one embedding."""
    width, ffn, words = shapes[0].width, shapes[0].width * FFN_FACTOR, shapes[0].vocabulary
    dense_ffn = 2 * width * ffn + ffn + width
    linear, norm = width * width + width, 2 * width
    experts = attention = others = 0
    for shape in shapes:
        is_decoder = shape.phase == DECODER
        experts += shape.sparse_layers * shape.paper.experts * dense_ffn
        attention += shape.layers * (linear * (8 if is_decoder else 4) + norm * (3 if is_decoder else 2)) + norm
        others += (shape.layers - shape.sparse_layers) * dense_ffn
    gates = sum(shape.sparse_layers * shape.paper.experts * width for shape in shapes)
    twins = sum(shape.sparse_layers for shape in shapes) * dense_ffn
    shared = words * width + attention + others
    total = shared + gates + experts
    return StaticBytes(total * ITEM_BYTES, experts * ITEM_BYTES, (shared + twins) * ITEM_BYTES)


class Workload:
    """A phase with random weights, and what is measured of it."""

    def __init__(self, plan: Plan, phase: str) -> None:
        self.phase, self.paper = phase, plan.paper(phase)
        self.shape = shape_of(phase, self.paper, plan.size(phase))
        phases = (LM,) if phase == LM else (ENCODER, DECODER)
        self.static = static_bytes([shape_of(one, self.paper, plan.size(one)) for one in phases])
        self.model = Model(self.shape, plan.seed)
        self._seed = plan.seed

    @property
    def title(self) -> str:
        """As the page names it."""
        return TITLES[self.phase]

    @property
    def activation_budget(self) -> int:
        """Bytes that a device of the paper's ratio has left beside the weights."""
        return round(self.static.total * (self.paper.budget_ratio - 1))

    def describe(self) -> str:
        """The setting, for a table."""
        shape, paper = self.shape, self.paper
        return (
            f"E {paper.experts}, k {paper.top_k}, C {paper.capacity:g}, D {shape.width}, F {shape.ffn}, "
            f"{shape.layers} layers ({shape.sparse_layers} sparse), {shape.vocabulary:,} words, float32"
        )

    def describe_batch(self, batch: int) -> str:
        """What a batch of ``batch`` sequences is."""
        if self.phase == DECODER:
            return f"{batch} sentences, one decoding step"
        return f"{batch} x {self.shape.length} tokens"

    def peak(self, variant: str, batch: int) -> int:
        """Bytes of activations of one forward, its input included."""

        def work() -> object:
            torch.manual_seed(self._seed)
            return self.model.run(self.model.make_batch(batch), variant)

        return peak_bytes(work)

    @torch.inference_mode()
    def compare(self, batch: int) -> Agreement:
        """Run static gating, then dynamic gating with the routing it had, what it dropped included.

        Raises MoEError when outputs differ by more than rounding.
        """
        torch.manual_seed(self._seed)
        made, seen = self.model.make_batch(batch), Watch()
        expected = self.model.run(made, STATIC, watch=seen)
        found = self.model.run(made, DYNAMIC, inject=seen.routings)
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= MOST_DIFFERENCE:
            raise MoEError(f"{self.title}: static and dynamic gating differ by {difference:.2e}; nothing was timed")
        lost = sum(int(one.dropped) for one in seen.routings if one.dropped is not None)
        return Agreement(difference, lost, sum(one.expert_index.numel() for one in seen.routings))

    @torch.inference_mode()
    def time(self, variants: Sequence[str], batch: int, rounds: int, seconds: float) -> Mapping[str, Timing]:
        """Let ``variants`` take turns on the same batches, after a run each that does not count."""
        torch.manual_seed(self._seed)
        made = self.model.make_batch(batch)
        watches: dict[str, list[float]] = {variant: [] for variant in variants}

        def run(variant: str, step: int) -> None:
            watch = Watch()
            self.model.run(made, variant, step, watch=watch)
            watches[variant].append(watch.sparse_seconds)

        for variant in variants:
            run(variant, 0)
            watches[variant].clear()
        sides = {variant: (lambda turn, variant=variant: run(variant, turn)) for variant in variants}
        found = take_turns(sides, rounds, seconds)
        return {variant: Timing(tuple(found[variant]), median(watches[variant])) for variant in variants}

    def counted_rows(self, variant: str) -> tuple[int, int]:
        """Expert rows asked for and expert rows computed by ``variant``, since the counters were last reset."""
        reports = [one.layers[variant].counters.snapshot() for one in self.model.sparse]
        return sum(one.routed_rows for one in reports), sum(one.computed_rows for one in reports)

    def active_share(self, variant: str) -> float:
        """Mean share of experts that got a row, since the counters were last reset."""
        reports = [one.layers[variant].counters.snapshot() for one in self.model.sparse]
        return sum(one.active_experts / self.paper.experts for one in reports) / len(reports)

    def reset_counters(self) -> None:
        """Start to count anew."""
        for one in self.model.sparse:
            for layer in one.layers.values():
                layer.counters.reset()


__all__ = ["DENSE", "DYNAMIC", "STATIC", "Agreement", "StaticBytes", "Timing", "Workload", "static_bytes"]
