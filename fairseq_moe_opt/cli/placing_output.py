"""How a comparison of strategies looks: tables, JSON, a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from fairseq_moe_opt.cli.placing import BEFORE, BOUND, Comparison, PlaceJob, Score
from fairseq_moe_opt.cli.plots import new_figure
from fairseq_moe_opt.sizes import readable


def render(found: Comparison, job: PlaceJob, console: Console) -> None:
    """Print a table of loads a phase, one of misses where caches were asked for, and what was left out."""
    for phase in found.loads:
        scores = [score for score in found.scores if score.phase == phase]
        spare = f" and {job.spare_slots} spare slots" if job.spare_slots else ""
        # Not a table's title, which would be wrapped to the table's width.
        console.print(f"{phase}: {job.ranks} ranks{spare}", highlight=False)
        console.print(_loads_table(scores, found, job))
        if job.slots is not None:
            console.print(
                f"{phase}: misses of the worst rank / of all, {job.slots} experts a layer in each rank's cache"
            )
            console.print(_misses_table(scores, job))
    for name, reason in found.skipped.items():
        console.print(f"{name} is left out: {reason}", highlight=False)
    console.print(
        "Placed by the first half of each layer's steps, tested on the second; means over layers; loads are shares of "
        f"a step's rows, {1 / job.ranks:.4f} is even. The one asked for is marked *.",
        highlight=False,
    )


def _loads_table(scores: Sequence[Score], found: Comparison, job: PlaceJob) -> Table:
    unit = "rows" if found.row_bytes is None else "bytes"
    table = Table(box=box.SIMPLE)
    table.add_column("strategy")
    names = ["Max Load", "Avg Max Load", "objective", f"busiest rank, {unit}"]
    for name in [*names, f"busiest node, {unit}"] if job.nodes > 1 else names:
        table.add_column(name, justify="right", no_wrap=True)
    for score in scores:
        sent = [score.busiest_rank, score.busiest_node] if job.nodes > 1 else [score.busiest_rank]
        loads = [score.max_load, score.avg_max_load, score.objective]
        cells = ["" if one is None else f"{one:.4f}" for one in loads]
        table.add_row(_label(score, job), *cells, *(_sent(one, found.row_bytes) for one in sent))
    return table


def _misses_table(scores: Sequence[Score], job: PlaceJob) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("strategy", no_wrap=True)
    for policy in scores[0].misses:
        table.add_column(policy, justify="right", no_wrap=True)
    for score in scores:
        if score.strategy != BOUND:
            cells = (f"{one.worst:.1%} / {one.overall:.1%}" for one in score.misses.values())
            table.add_row(_label(score, job), *cells)
    return table


def _label(score: Score, job: PlaceJob) -> str:
    return f"{score.strategy} *" if score.strategy == job.strategy else score.strategy


def _sent(value: float | None, row_bytes: int | None) -> str:
    if value is None:
        return ""
    return f"{value:,.1f}" if row_bytes is None else readable(round(value))


def as_json(found: Comparison) -> str:
    """Scores, what was left out and the placement's own words as JSON."""
    content = {
        "fingerprint": found.placement.fingerprint,
        "num_ranks": found.placement.num_ranks,
        "strategy": found.placement.strategy,
        "row_bytes": found.row_bytes,
        "scores": [asdict(score) for score in found.scores],
        "skipped": dict(found.skipped),
    }
    return json.dumps(content, indent=2)


def finding(found: Comparison, phase: str) -> str:
    """What the plot of ``phase`` shows, in a sentence."""
    strategy, ranks = found.placement.strategy, found.placement.num_ranks
    before, after = (100 * float(found.loads[phase][name].max(axis=1).mean()) for name in (BEFORE, strategy))
    if strategy == BEFORE:
        return f"{phase}, {BEFORE}: the busiest of {ranks} ranks gets {after:.1f} % of a step's rows"
    gets = f"{phase}: {strategy} gives the busiest of {ranks} ranks {after:.1f} % of a step's rows"
    return f"{gets}, {BEFORE} {before:.1f} %"


def draw(found: Comparison, path: Path) -> None:
    """Draw loads of ranks before and after as a PNG, a panel a phase; MoEError where matplotlib is not installed.

    Ranks stand in the order of their load in each step, so that the first bar is the one that everybody waits for,
    and means over steps and layers hide nothing.
    """
    figure = new_figure(8, 3.6 * len(found.loads))
    panels = figure.subplots(len(found.loads), 1, squeeze=False)[:, 0]
    for axes, (phase, by_strategy) in zip(panels, found.loads.items(), strict=True):
        width = 0.8 / len(by_strategy)
        for place, (name, loads) in enumerate(by_strategy.items()):
            ordered = 100 * np.sort(loads, axis=1)[:, ::-1].mean(axis=0)
            middles = np.arange(1, len(ordered) + 1) + width * (place - (len(by_strategy) - 1) / 2)
            axes.bar(middles, ordered, width, label=name)
        axes.axhline(100 / found.placement.num_ranks, color="black", linestyle="--", label="even")
        axes.set_title(finding(found, phase), fontsize="medium")
        axes.set_xlabel("ranks, 1 is the busiest of each step")
        axes.locator_params("x", integer=True)
        axes.set_ylabel("% of a step's rows")
        axes.legend()
    figure.savefig(path, format="png", dpi=150)
