"""Paper 1.2 and v1: what experts cost over a dense twin, and what dynamic gating gains at the same batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from statistics import median_high
from typing import Any

from fairseq_moe_opt.reproduction.config import DECODER, ENCODER, LM, PHASES
from fairseq_moe_opt.reproduction.context import Context, Reference
from fairseq_moe_opt.reproduction.drawing import new_figure, variant_bars
from fairseq_moe_opt.reproduction.models import DENSE, DYNAMIC, STATIC, VARIANTS
from fairseq_moe_opt.reproduction.results import AT_LEAST, Line, PaperValue, Section, seconds_text, times

NAME, TITLE = "latency", "Latency at the paper's batch"

PAPER: Mapping[str, Mapping[str, PaperValue]] = {
    "slowdown": {
        LM: PaperValue("15x (74.2 ms, > 1.09 s)", "III, 1 node", 15.0),
        ENCODER: PaperValue("22x (101 ms, 2.26 s)", "III, 1 node", 22.0),
        DECODER: PaperValue("3x (32 ms, 90 ms)", "III, 1 node", 3.0),
    },
    "gain": {
        LM: PaperValue("1.25x to 4x", "v1, same batch", 4.0, AT_LEAST),
        ENCODER: PaperValue("2x to 5x", "v1, same batch", 5.0, AT_LEAST),
        DECODER: PaperValue("1.09x to 1.5x", "v1, same batch", 1.5, AT_LEAST),
    },
}


def measure(context: Context) -> Section:
    """Time dense twin, static and dynamic gating in turns."""
    found = {phase: context.reference(phase) for phase in PHASES}
    lines = [line for kind in (_slowdown, _gain) for phase, one in found.items() for line in kind(phase, one)]
    notes = [_agreement_note(one) for one in found.values()]
    return Section(
        NAME,
        TITLE,
        "Random weights; experts get the shares of a synthetic trace. Dense twin, static and dynamic gating take "
        "turns, median of the rounds, after outputs of both gatings were compared from the same routing.",
        tuple(lines),
        tuple(notes),
        {
            phase: {
                "timings": {name: asdict(one) for name, one in reference.timings.items()},
                "agreement": asdict(reference.agreement),
                "active_share": reference.active_share,
                "title": reference.title,
                "batch": reference.batch,
            }
            for phase, reference in found.items()
        },
    )


def _slowdown(phase: str, found: Reference) -> Iterator[Line]:
    dense, static = found.seconds(DENSE), found.seconds(STATIC)
    sparse = found.timings[STATIC].sparse
    asked, computed = found.rows[STATIC]
    yield Line(
        f"{found.title}: static gating over the dense twin",
        f"{found.batch}; {found.setting}",
        PAPER["slowdown"][phase],
        f"{times(static / dense)} ({seconds_text(dense)}, {seconds_text(static)})",
        static / dense,
        why=(
            f"{sparse / static:.0%} of the time is in sparse layers, which compute {computed / asked:.1f} rows for "
            "each one needed; on one process there is no exchange, which is part of the paper's time"
        ),
    )


def _gain(phase: str, found: Reference) -> Iterator[Line]:
    static, dynamic = found.seconds(STATIC), found.seconds(DYNAMIC)
    rest = 1 - found.timings[DYNAMIC].sparse / dynamic
    yield Line(
        f"{found.title}: dynamic over static gating, same batch",
        f"{found.batch}; {found.setting}",
        PAPER["gain"][phase],
        f"{times(static / dynamic)} ({seconds_text(static)}, {seconds_text(dynamic)})",
        static / dynamic,
        why=f"{rest:.0%} of the time with dynamic gating is outside of sparse layers, where gating changes nothing",
    )


def _agreement_note(found: Reference) -> str:
    one = found.agreement
    return (
        f"{found.title}: from the same routing, outputs of static and dynamic gating differ by {one.difference:.1e} of "
        f"the largest value at most; {one.dropped:,} of {one.choices:,} choices dropped by both. Timed, dynamic gating "
        f"drops nothing. {found.active_share:.0%} of the experts got a row."
    )


def draw(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Seconds of each variant, on one scale a phase."""
    figure = new_figure(10, 3.4)
    for axes, phase in zip(figure.subplots(1, len(PHASES)), PHASES, strict=True):
        one = data[phase]
        seconds = {name: 1000 * median_high(one["timings"][name]["seconds"]) for name in VARIANTS}
        gain = times(seconds[STATIC] / seconds[DYNAMIC])
        title = f"{one['title']}: dynamic gating {gain} as fast\n{one['batch']}"
        variant_bars(axes, seconds, ",.0f", "ms a forward", title)
    yield "latency.png", figure
