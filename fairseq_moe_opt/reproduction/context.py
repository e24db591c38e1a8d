"""What sections share: the plan, where progress goes, a recorded trace, and measurements that several of them use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from fairseq_moe_opt.moe.trace import Trace
from fairseq_moe_opt.reproduction.config import Plan
from fairseq_moe_opt.reproduction.models import DYNAMIC, STATIC, VARIANTS
from fairseq_moe_opt.reproduction.workload import Agreement, StaticBytes, Timing, Workload

SMALL_BATCH = 8
"""The batch for which the paper gives activation memory of both models."""


@dataclass(frozen=True)
class Reference:
    """One phase at the paper's own batch.

    Attributes:
        title, setting, batch: for tables.
        timings: by variant.
        peaks: batch to variant to bytes of activations.
        reference_batch: the paper's.
        agreement: of static and dynamic gating.
        rows: by gating, expert rows asked for and computed.
        active_share: of the experts in a forward.
        static: bytes of weights.
    """

    title: str
    setting: str
    batch: str
    timings: dict[str, Timing]
    peaks: dict[int, dict[str, int]]
    reference_batch: int
    agreement: Agreement
    rows: dict[str, tuple[int, int]]
    active_share: float
    static: StaticBytes

    def peak(self, variant: str) -> int:
        """At the paper's batch."""
        return self.peaks[self.reference_batch][variant]

    def seconds(self, variant: str) -> float:
        """Median."""
        return self.timings[variant].median


class Context:
    """Passed from section to section.

    Args:
        plan: what to measure.
        record_demo: gives a trace of the demo checkpoint's own text, or None where there is no checkpoint.
        say: is told what is being measured.
    """

    def __init__(self, plan: Plan, record_demo: Callable[[], Trace | None], say: Callable[[str], None]) -> None:
        self.plan, self.say = plan, say
        self._record_demo = record_demo
        self._references: dict[str, Reference] = {}
        self._workload: Workload | None = None

    @cached_property
    def demo(self) -> Trace | None:
        """The demo's trace, recorded at the first question."""
        self.say("recording the demo checkpoint's routing")
        return self._record_demo()

    def workload(self, phase: str) -> Workload:
        """``phase`` with weights; the one before is let go, so that there is memory for this one."""
        if self._workload is None or self._workload.phase != phase:
            self._workload = None
            self.say(f"{phase}: making random weights")
            self._workload = Workload(self.plan, phase)
        return self._workload

    def reference(self, phase: str) -> Reference:
        """``phase`` at the paper's batch; measured once."""
        if phase not in self._references:
            self._references[phase] = self._measure(phase)
        return self._references[phase]

    def _measure(self, phase: str) -> Reference:
        workload = self.workload(phase)
        batch = workload.paper.batch
        self.say(f"{phase}: memory at batch {batch}")
        peaks = {
            size: {variant: workload.peak(variant, size) for variant in VARIANTS}
            for size in dict.fromkeys((SMALL_BATCH, batch))
        }
        self.say(f"{phase}: comparing outputs, then timing at batch {batch}")
        agreement = workload.compare(batch)
        workload.reset_counters()
        scale = self.plan.scale
        timings = workload.time(VARIANTS, batch, scale.rounds, 2 * scale.seconds)
        return Reference(
            title=workload.title,
            setting=workload.describe(),
            batch=workload.describe_batch(batch),
            timings=dict(timings),
            peaks=peaks,
            reference_batch=batch,
            agreement=agreement,
            rows={variant: workload.counted_rows(variant) for variant in (STATIC, DYNAMIC)},
            active_share=workload.active_share(DYNAMIC),
            static=workload.static,
        )
