"""How even ranks are loaded under each placement strategy: Max Load and Avg Max Load, beside EPLB's and lower bounds.

The paper's protocol: the first half of a trace places the experts, the second half tests. Traces are synthetic with the
paper's statistics, recorded here from the demo checkpoint over its three languages, and whatever files are given (a
trace of ``moe-opt trace``, or ``.npz`` of counts). Each number of ranks up to that of experts is tried with exactly one
slot an expert, and with 10 % spare slots for the strategies that replicate.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from _machine import write_results
from _placement_results import Row, Trace, losses, losses_table, measure, summary, table_of
from _recorded import demo_traces, traces_of_file
from rich.console import Console

from fairseq_moe_opt.errors import MoEError
from fairseq_moe_opt.placement import WORKLOADS, strategy_names, synthetic_history
from fairseq_moe_opt.placement.strategies import get_strategy

SPARE = 0.1
"""Spare slots as a share of the experts."""
TABLE_WIDTH = 160
"""Columns of the table where there is no terminal to ask."""
NOT_MEASURED = "exact"
"""The integer program, which takes no case of this size."""

RESULTS = Path(__file__).resolve().parent / "results" / "placement.json"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Plan:
    """Everything that decides what is measured, as it goes into the JSON file."""

    ranks: tuple[int, ...]
    experts: tuple[int, ...]
    layers: int
    batches: int
    seed: int
    demo_lines: int
    files: tuple[str, ...]

    def traces(self) -> list[Trace]:
        """The synthetic traces, each from a seed of its own, then the demo's, then the files'."""
        made = [
            Trace(
                f"{name}-{experts}",
                synthetic_history(name, experts, self.batches, self.layers, self.seed + index),
                workload.correlated,
            )
            for index, (name, workload) in enumerate(WORKLOADS.items())
            for experts in self.experts
        ]
        demo = demo_traces(self.demo_lines) if self.demo_lines else []
        return [*made, *demo, *(trace for file in self.files for trace in traces_of_file(Path(file)))]


def run(plan: Plan, console: Console) -> tuple[list[Row], dict[str, Any]]:
    """Measure ``plan``, print its tables, and return rows and summary."""
    every = [name for name in strategy_names() if name != NOT_MEASURED]
    replicating = [name for name in every if get_strategy(name).replicates]
    traces, rows = plan.traces(), []
    with console.status("placing") as status:
        for trace in traces:
            for ranks in (one for one in plan.ranks if one <= trace.history.num_experts):
                status.update(f"{trace.name}, {ranks} ranks")
                rows += measure(trace, ranks, 0, every)
                rows += measure(trace, ranks, max(1, round(SPARE * trace.history.num_experts)), replicating)
    for spare in (False, True):
        console.print(table_of(rows, spare))
    console.print(losses_table(losses(rows)))
    totals = summary(rows, traces)
    console.print(totals)
    return rows, totals


@app.command()
def main(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="traces, or .npz files of counts a layer")
    ] = None,
    ranks: Annotated[list[int] | None, typer.Option(min=2, help="ranks to place on; repeat for more")] = None,
    experts: Annotated[list[int] | None, typer.Option(min=8, help="experts of the synthetic traces; repeat")] = None,
    layers: Annotated[int, typer.Option(min=1, help="layers of each synthetic trace")] = 6,
    batches: Annotated[int, typer.Option(min=4, help="batches of each, half of which place")] = 256,
    seed: Annotated[int, typer.Option(help="of the synthetic traces")] = 6182,
    demo_lines: Annotated[
        int | None, typer.Option(min=0, help="sentences translated to each language [default: 300, none if quick]")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="tiny traces: shows that all runs, says nothing")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="where results go [default: results/placement.json, none if quick]")
    ] = None,
) -> None:
    """Compare placement strategies on held-out batches."""
    console = Console()
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    plan = Plan(
        ranks=tuple(ranks or ([2, 4] if quick else [4, 8, 16, 64])),
        experts=tuple(experts or ([16] if quick else [128, 512])),
        layers=2 if quick else layers,
        batches=24 if quick else batches,
        seed=seed,
        demo_lines=(0 if quick else 300) if demo_lines is None else demo_lines,
        files=tuple(map(str, files or ())),
    )
    try:
        rows, totals = run(plan, console)
    except MoEError as error:
        raise typer.BadParameter(str(error)) from error
    target = json_file or (None if quick else RESULTS)
    if target is not None:
        write_results(
            target,
            {"numpy": np.__version__},
            asdict(plan),
            [row.to_dict() for row in rows],
            summary=totals,
            losses=[asdict(one) for one in losses(rows)],
        )
        console.print(f"written to {target}")


if __name__ == "__main__":
    app()
