"""Paper 1.4: rows that static gating computes for each one that is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fairseq_moe_opt.reproduction.config import ENCODER, LM, PHASES
from fairseq_moe_opt.reproduction.context import Context
from fairseq_moe_opt.reproduction.drawing import COLOURS, new_figure
from fairseq_moe_opt.reproduction.models import DYNAMIC, STATIC
from fairseq_moe_opt.reproduction.results import ABOUT, Line, PaperValue, Section, times

NAME, TITLE = "waste", "Waste factor"

_MT = PaperValue("64 = 128 x 1 / 2", "III", 64.0, ABOUT)
PAPER: Mapping[str, PaperValue] = {
    LM: PaperValue("12.8 = 512 x 0.05 / 2", "III", 12.8, ABOUT),
    ENCODER: _MT,
    "decoder": _MT,
}


def measure(context: Context) -> Section:
    """Count rows with the layers' own counters."""
    lines, data = [], {}
    for phase in PHASES:
        found = context.reference(phase)
        (asked, computed), (needed, done) = found.rows[STATIC], found.rows[DYNAMIC]
        data[phase] = {"title": found.title, "static": computed / asked, "dynamic": done / needed}
        lines.append(
            Line(
                f"{found.title}: rows static gating computes for each one needed",
                f"{found.batch}; {found.setting}",
                PAPER[phase],
                f"{computed / asked:.2f} ({computed:,} for {asked:,}); dynamic gating {done / needed:.2f}",
                computed / asked,
                why="capacity is rounded up to whole rows",
            )
        )
    return Section(NAME, TITLE, "Counted by the layers themselves while they were timed.", tuple(lines), (), data)


def draw(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """One bar a phase and gating."""
    figure = new_figure(6, 3.2)
    axes = figure.subplots()
    for place, side in enumerate((STATIC, DYNAMIC)):
        values = [data[phase][side] for phase in PHASES]
        bars = axes.bar([n + 0.4 * place for n in range(len(PHASES))], values, 0.38, color=COLOURS[side], label=side)
        axes.bar_label(bars, [times(value) for value in values])
    axes.set_xticks([n + 0.2 for n in range(len(PHASES))], [data[phase]["title"] for phase in PHASES])
    axes.set_ylabel("rows computed a row needed")
    most = max(data[phase][STATIC] for phase in PHASES)
    axes.set_title(f"Static gating computes up to {most:.0f} rows for each one needed")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    yield "waste.png", figure
