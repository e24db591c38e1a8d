"""How fast NLLB-MoE generates here: this project beside Transformers 4.57.1, 5.x as shipped, and static gating.

One run makes a random model, gives it to every side in a process of its own, compares their tokens, then lets them take
turns for several rounds. Rows are medians over rounds; ratios are taken within a round. Peak memory is the largest
resident size of a side's process while it ran a case, all its weights included. ``make bench`` runs it.
"""

from __future__ import annotations

import json
import platform
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _machine import machine, usable_cores
from _results import Baseline, Row, baseline_of, rows_of, table_of
from _rounds import busy_neighbour, make_weights, measure
from _sides import QUICK, REFERENCE, Case, Shape, Side, sides_of
from rich.console import Console

from fairseq_moe_opt.moe import available_kernels

DTYPES = ("float32", "bfloat16")
TABLE_WIDTH = 140
"""Columns of the table where there is no terminal to ask."""

RESULTS = Path(__file__).resolve().parent / "results" / "generate.json"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Plan:
    """Everything that decides what is measured, as it goes into the JSON file."""

    shape: Shape
    cases: tuple[Case, ...]
    dtypes: tuple[str, ...]
    rounds: int
    threads: int
    neighbour: int
    seed: int
    naive: bool
    reference: Path | None

    def sides(self, dtype: str) -> tuple[Side, ...]:
        """The sides of one dtype; the naive loop only when asked for."""
        kernels = [name for name in available_kernels("cpu", getattr(torch, dtype)) if self.naive or name != "naive"]
        return sides_of(dtype, kernels, self.reference)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "shape": self.shape.to_dict(),
            "batch": [case.batch for case in self.cases],
            "source_tokens": self.cases[0].source_tokens,
            "new_tokens": self.cases[0].new_tokens,
            "dtype": list(self.dtypes),
            "rounds": self.rounds,
            "threads": self.threads,
            "neighbour": self.neighbour,
            "seed": self.seed,
            "naive": self.naive,
        }


def run(plan: Plan, console: Console) -> list[Row]:
    """Measure ``plan`` and print a table a dtype."""
    rows: list[Row] = []
    baseline: Baseline | None = None
    with tempfile.TemporaryDirectory(prefix="moe-bench-") as folder, console.status("making the model") as status:
        make_weights(plan.shape, plan.seed, Path(folder))
        with busy_neighbour(plan.neighbour) if plan.neighbour else nullcontext():
            for dtype in plan.dtypes:
                measured = measure(
                    plan.sides(dtype), plan.cases, plan.rounds, Path(folder), plan.threads, status.update
                )
                baseline = baseline or baseline_of(measured, plan.cases)
                found = rows_of(measured, plan.cases, baseline)
                console.print(table_of(found, dtype))
                rows += found
    return rows


def write_json(path: Path, plan: Plan, rows: Sequence[Row]) -> None:
    """Write machine, versions, date, arguments and rows."""
    content = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "reference": REFERENCE if plan.reference is not None else None,
        },
        "arguments": plan.to_dict(),
        "rows": [row.to_dict() for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@app.command()
def main(
    batch: Annotated[list[int] | None, typer.Option(min=1, help="sentences at once; repeat for more")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32 or bfloat16; repeat for both")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="rounds, in each of which every side runs once")] = 5,
    new_tokens: Annotated[int, typer.Option(min=2, help="tokens generated for each sentence")] = 24,
    source_tokens: Annotated[int, typer.Option(min=1, help="tokens of each source sentence")] = 24,
    threads: Annotated[int | None, typer.Option(min=1, help="threads of each side [default: cores]")] = None,
    neighbour: Annotated[int, typer.Option(min=0, help="cores kept busy by another process meanwhile")] = 0,
    seed: Annotated[int, typer.Option(help="of the random model")] = 1,
    naive: Annotated[bool, typer.Option("--naive", help="time the naive loop too")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="a tiny model: shows that all runs, measures nothing")] = False,
    reference: Annotated[Path, typer.Option(help="folder with Transformers 4.57.1 (`make reference`)")] = Path(
        ".reference/transformers-4.57.1"
    ),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="where results go [default: results/generate.json, none if quick]")
    ] = None,
) -> None:
    """Time encoding and decoding of a random NLLB-MoE, every side in one run."""
    console = Console()
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    dtypes = tuple(name for name in DTYPES if name in (dtype or DTYPES))
    unknown = sorted(set(dtype or ()) - set(DTYPES))
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(DTYPES)}", param_hint="--dtype")
    found = (reference / "transformers").is_dir()
    if not found:
        console.print(f"{REFERENCE} is not measured: {reference} does not hold it; `make reference` makes it")
    plan = Plan(
        shape=QUICK if quick else Shape(),
        cases=tuple(Case(size, source_tokens, new_tokens) for size in batch or ([2] if quick else [1, 8, 32])),
        dtypes=dtypes,
        rounds=rounds,
        threads=threads or usable_cores(),
        neighbour=neighbour,
        seed=seed,
        naive=naive,
        reference=reference if found else None,
    )
    rows = run(plan, console)
    target = json_file or (None if quick else RESULTS)
    if target is not None:
        write_json(target, plan, rows)
        console.print(f"written to {target}")


if __name__ == "__main__":
    # Told to stop, leave through the context managers: the model in the temporary folder is 2 GB.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app()
