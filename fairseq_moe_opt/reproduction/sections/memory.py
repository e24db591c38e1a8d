"""Paper 1.3 and 2.4: memory of weights and activations, and what dynamic gating saves of the latter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from fairseq_moe_opt.reproduction.config import DECODER, ENCODER, LM, PHASES, TITLES
from fairseq_moe_opt.reproduction.context import Context, Reference
from fairseq_moe_opt.reproduction.drawing import MIB, new_figure, variant_bars
from fairseq_moe_opt.reproduction.models import DENSE, DYNAMIC, STATIC, VARIANTS
from fairseq_moe_opt.reproduction.results import AT_LEAST, Line, PaperValue, Section, times
from fairseq_moe_opt.sizes import readable

NAME, TITLE = "memory", "Memory"
MT = "mt"

PAPER: Mapping[str, Mapping[str, PaperValue]] = {
    "peak": {
        LM: PaperValue("8.58x (2.2 GB, 18.88 GB)", "III, a GPU of 8", 8.58),
        MT: PaperValue("3.01x (7.02 GB, 21.16 GB)", "III, a GPU of 8", 3.01),
    },
    "activation": {
        LM: PaperValue("-79.6% (6.29 GB to 1.28 GB)", "V, batch 8", 79.6, AT_LEAST),
        MT: PaperValue("-44.2% (1.89 GB to 1.05 GB)", "V, batch 8", 44.2, AT_LEAST),
    },
    "total": {
        LM: PaperValue("1.36x", "V", 1.36, AT_LEAST),
        MT: PaperValue("1.1x", "V", 1.1, AT_LEAST),
    },
}
_Peaks = Mapping[str, int]


def measure(context: Context) -> Section:
    """Count what the allocator gives out in one forward."""
    found = {phase: context.reference(phase) for phase in PHASES}
    translation = {
        batch: _larger(found[ENCODER].peaks[batch], found[DECODER].peaks[batch]) for batch in found[ENCODER].peaks
    }
    lines = [
        *_lines(LM, "LM", found[LM], found[LM].peaks),
        *_lines(MT, "MT (the larger of encoder and decoder)", found[ENCODER], translation),
        *(
            _activation(MT, TITLES[phase], found[phase], found[phase].peaks[batch], batch)
            for phase in (ENCODER, DECODER)
            for batch in found[phase].peaks
        ),
    ]
    return Section(
        NAME,
        TITLE,
        "Activations are what the allocator gave out and took back during one forward, as torch's profiler records it; "
        "the input and the decoder's kept keys and values are among them. Weights are counted by their shapes.",
        tuple(lines),
        (
            f"One process holds all E experts of each sparse layer here, one of the paper's {context.plan.ranks} "
            f"devices 1/{context.plan.ranks} of them in {_fewer(context, LM):g} (LM) and {_fewer(context, ENCODER):g} "
            "(MT) times as many layers: about as many experts, so weights and activations stand to each other about "
            "as there.",
        ),
        {
            phase: {"peaks": one.peaks, "static": asdict(one.static), "title": one.title, "batch": one.batch}
            for phase, one in found.items()
        },
    )


def _fewer(context: Context, phase: str) -> float:
    return context.plan.paper(phase).layers / context.plan.size(phase).layers


def _larger(one: _Peaks, other: _Peaks) -> dict[str, int]:
    return {variant: max(one[variant], other[variant]) for variant in one}


def _lines(model: str, title: str, found: Reference, peaks: Mapping[int, _Peaks]) -> Iterator[Line]:
    yield _peak(model, title, found, peaks[found.reference_batch])
    yield from (_activation(model, title, found, one, batch) for batch, one in peaks.items())
    yield _total(model, title, found, peaks[found.reference_batch])


def _peak(model: str, title: str, found: Reference, peaks: _Peaks) -> Line:
    dense, sparse = found.static.dense_twin + peaks[DENSE], found.static.total + peaks[STATIC]
    return Line(
        f"{title}: weights and activations, static gating over the dense twin",
        f"batch {found.reference_batch}; {found.setting}",
        PAPER["peak"][model],
        f"{times(sparse / dense)} ({readable(dense)}, {readable(sparse)})",
        sparse / dense,
        why=(
            f"here weights are {found.static.total / found.static.dense_twin:.0f} times the twin's and activations "
            f"{peaks[STATIC] / peaks[DENSE]:.0f} times; fewer layers share the paper's number of experts"
        ),
    )


def _activation(model: str, title: str, found: Reference, peaks: _Peaks, batch: int) -> Line:
    saved = 100 * (1 - peaks[DYNAMIC] / peaks[STATIC])
    return Line(
        f"{title}: activation memory, dynamic against static gating",
        f"batch {batch}; {found.setting}",
        PAPER["activation"][model],
        f"-{saved:.1f}% ({readable(peaks[STATIC])} to {readable(peaks[DYNAMIC])})",
        saved,
        why=f"the dense twin alone, which has no gating, takes {readable(peaks[DENSE])}",
    )


def _total(model: str, title: str, found: Reference, peaks: _Peaks) -> Line:
    static, dynamic = found.static.total + peaks[STATIC], found.static.total + peaks[DYNAMIC]
    return Line(
        f"{title}: weights and activations, static over dynamic gating",
        f"batch {found.reference_batch}; {found.setting}",
        PAPER["total"][model],
        f"{times(static / dynamic)} ({readable(static)}, {readable(dynamic)})",
        static / dynamic,
        why=f"weights, which gating does not change, are {found.static.total / dynamic:.0%} of it with dynamic gating",
    )


def draw(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Activation bytes of each variant."""
    figure = new_figure(10, 3.4)
    for axes, phase in zip(figure.subplots(1, len(PHASES)), PHASES, strict=True):
        one = data[phase]
        batch = max(one["peaks"], key=int)
        peaks = {name: one["peaks"][batch][name] / MIB for name in VARIANTS}
        share = f"{peaks[DYNAMIC] / peaks[STATIC]:.0%}"
        title = f"{one['title']}: dynamic gating takes {share} of static's\n{one['batch']}"
        variant_bars(axes, peaks, ",.1f", "MiB of activations", title)
    yield "memory.png", figure
