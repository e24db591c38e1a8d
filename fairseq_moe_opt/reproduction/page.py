"""Sections to one Markdown page: what was scaled, what is reached, every table, and why something is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fairseq_moe_opt.reproduction.config import PHASES, TITLES, Plan, shape_of
from fairseq_moe_opt.reproduction.results import Line, Section

DIFFERENT = 1.25
"""Numbers without a goal that are further apart than this factor are explained."""


@dataclass(frozen=True)
class Picture:
    """A link, relative to the page, and what to read where it cannot be seen."""

    link: str
    text: str


@dataclass(frozen=True)
class Told:
    """A section, where and when it was measured, in how many minutes, and its pictures."""

    section: Section
    machine: Mapping[str, str]
    minutes: float
    pictures: tuple[Picture, ...] = ()


def page_of(plan: Plan, told: Sequence[Told], results: str = "results.json") -> str:
    """The page; ``results`` is the link to all numbers."""
    parts = [*_head(plan, told, results), *_goals(told)]
    for one in told:
        parts += _section(one)
    return "\n\n".join(parts) + "\n"


def _head(plan: Plan, told: Sequence[Told], results: str) -> Iterator[str]:
    option = " --quick" if plan.scale_name == "quick" else ""
    yield "# The paper's tables and figures, measured here"
    yield (
        f"Written by `moe-opt reproduce{option}`. The paper is arXiv 2303.06182. Each line has the paper's figure, the "
        "one measured here, and their ratio (here over paper), with the setting. All numbers are in "
        f"[results.json]({results})."
    )
    if plan.scale_name == "quick":
        yield (
            "**This is a quick run**: small models, few rounds. It shows that everything runs; the full one is what "
            "counts."
        )
    yield "\n".join(_scaling(plan))
    if told:
        seen = {key: ", ".join(dict.fromkeys(one.machine[key] for one in told)) for key in told[0].machine}
        seen["date"] = " to ".join(dict.fromkeys(f([one.machine["date"] for one in told]) for f in (min, max)))
        yield (
            f"Machine: {seen['processor']}, {seen['cores']} cores, {seen['system']}; torch {seen['torch']}, Python "
            f"{seen['python']}, this project {seen['fairseq_moe_opt']}; {seen['date']}; "
            f"{sum(one.minutes for one in told):.0f} minutes in all."
        )


def _scaling(plan: Plan) -> Iterator[str]:
    yield "What was scaled, and what was not:"
    yield ""
    for phase in PHASES:
        paper, shape = plan.paper(phase), shape_of(phase, plan.paper(phase), plan.size(phase))
        yield (
            f"* {TITLES[phase]}: D {paper.width} to {shape.width}, F {4 * paper.width} to {shape.ffn}, {paper.layers} "
            f"layers to {shape.layers}, words {paper.vocabulary:,} to {shape.vocabulary:,} (the same share of the "
            f"work), tokens a sequence {paper.length} to {shape.length} (as many a unit of width; the paper does not "
            f"state them)."
        )
    yield (
        "* As in the paper: experts (512 and 128), two a token, capacity (0.05 and 1), one layer in two and in four "
        "sparse, F four times D."
    )
    yield "* float32 instead of float16, one process on a CPU instead of 8 to 32 GPUs: no exchange between devices."


def _goals(told: Sequence[Told]) -> Iterator[str]:
    lines = [line for one in told for line in one.section.lines if line.is_reached is not None]
    missed = [line for line in lines if not line.is_reached]
    yield f"Of {len(lines)} figures and statements of the paper that can be reached, {len(lines) - len(missed)} are."
    if missed:
        yield "\n".join(["Not reached:", "", *(_because(line) for line in missed)])


def _section(one: Told) -> Iterator[str]:
    section = one.section
    yield f"## {section.title}"
    yield section.intro
    rows = [
        "| what | paper | here | ratio | reached | setting |",
        "|---|---|---|---|---|---|",
        *(_row(line) for line in section.lines),
    ]
    yield "\n".join(rows)
    yield from (f"![{picture.text}]({picture.link})" for picture in one.pictures)
    different = [line for line in section.lines if _is_different(line)]
    if different:
        yield "\n".join(["Why it is not as in the paper:", "", *(_because(line) for line in different)])
    if section.notes:
        yield "\n".join(f"* {note}" for note in section.notes)


def _row(line: Line) -> str:
    ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
    reached = {True: "yes", False: "**no**", None: ""}[line.is_reached]
    cells = (line.what, f"{line.paper.text} ({line.paper.where})", line.here, ratio, reached, line.setting)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _is_different(line: Line) -> bool:
    """Missed, or a description of the paper's own machine that is far from what is here."""
    if not line.why or line.is_reached:
        return False
    if line.is_reached is False:
        return True
    return line.ratio is not None and not 1 / DIFFERENT <= line.ratio <= DIFFERENT


def _because(line: Line) -> str:
    return f"* {line.what}: {line.here}, paper {line.paper.text}: {line.why or 'no cause was measured'}."
