"""Where the time of encoding and decoding goes, component by component: 4.57.1, this project, and a former state of it.

The model and the workload are those of ``generate.py``. Every side runs in a process of its own; they take turns, round
by round, with the same hooks on the same modules (see ``_components.py``). Each number is a median over rounds.

    python benchmarks/around.py --before CHECKOUT     # a checkout of an older commit, its kernel built in place
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from _components import COMPONENTS
from _machine import usable_cores, write_results
from _rounds import Worker, make_weights
from _sides import QUICK, REFERENCE, Case, Shape, Side
from rich.console import Console
from rich.table import Table

DTYPES = ("float32", "bfloat16")
PROJECT = "this project"
BEFORE = "this project before"
PHASES = ("encoder", "decoder")
RESULTS = Path(__file__).resolve().parent / "results" / "around.json"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def sides_of(dtype: str, reference: Path | None, before: Path | None, kernel: str) -> tuple[Side, ...]:
    """The sides for one dtype; this project times the steps of its layers, which is how routing is told apart."""
    options: dict[str, Any] = {"capacity": "none", "kernel": kernel, "profile": True}
    sides = [Side(REFERENCE, dtype, python_path=reference)] if reference is not None else []
    if before is not None:
        sides.append(Side(BEFORE, dtype, options, before))
    return (*sides, Side(PROJECT, dtype, options))


def measure(
    sides: Sequence[Side],
    cases: Sequence[Case],
    rounds: int,
    folder: Path,
    threads: int,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row a side, case and phase: seconds of each component, a pass of the encoder or a token of the decoder."""
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moe-bench-logs-")))
        workers = [
            stack.enter_context(Worker(side, folder, threads, logs / f"{number}.txt"))
            for number, side in enumerate(sides)
        ]
        for worker in workers:
            worker.wait_ready()
        for case in cases:
            tokens = [worker.ask("begin", **asdict(case))["tokens"] for worker in workers]
            found: list[list[dict[str, Any]]] = [[] for _ in workers]
            plain: list[list[dict[str, Any]]] = [[] for _ in workers]
            for step in range(rounds):
                for turn in range(len(workers)):
                    index = (turn + step) % len(workers)
                    progress(f"{sides[index].dtype}, batch {case.batch}, round {step + 1}: {sides[index].name}")
                    workers[index].ask("round")  # whatever another side left in the caches is gone after it
                    # In turn the first of the two, so that neither is always the one that runs sooner after that.
                    for kind in ("round", "components") if step % 2 == 0 else ("components", "round"):
                        (plain if kind == "round" else found)[index].append(workers[index].ask(kind))
            for index, worker in enumerate(workers):
                equal = tokens[index] == tokens[0]
                rows += _rows(worker.side, case, found[index], plain[index], equal=equal)
    return rows


def _rows(
    side: Side,
    case: Case,
    found: Sequence[dict[str, Any]],
    plain: Sequence[dict[str, Any]],
    *,
    equal: bool,
) -> list[dict[str, Any]]:
    """Of the encoder, and of the decoder; ``whole`` was timed without hooks."""
    rows = []
    for phase, parts in zip(PHASES, (1, case.new_tokens), strict=True):
        seconds = {component: median(one[phase][component] for one in found) / parts for component in COMPONENTS}
        rows.append(
            {
                "side": side.name,
                "dtype": side.dtype,
                "batch": case.batch,
                "phase": phase,
                "seconds": seconds,
                "whole": median(one[phase] for one in plain) / parts,
                "tokens_equal": equal,
            }
        )
    return rows


def table_of(rows: Sequence[dict[str, Any]], dtype: str, phase: str) -> Table:
    """Milliseconds of each component, a column a batch size and side."""
    chosen = [row for row in rows if row["dtype"] == dtype and row["phase"] == phase]
    unit = "a pass of the encoder" if phase == "encoder" else "a token of every sentence"
    table = Table(title=f"{dtype}: milliseconds of {unit}")
    table.add_column("component")
    for row in chosen:
        table.add_column(f"batch {row['batch']}:\n{row['side']}", justify="right")
    for component in COMPONENTS:
        table.add_row(component, *(f"{row['seconds'][component] * 1000:.2f}" for row in chosen))
    table.add_row("whole, without hooks", *(f"{row['whole'] * 1000:.2f}" for row in chosen))
    return table


def commit_of(folder: Path) -> str:
    """What a checkout is of: its commit, or the folder's name where git does not know."""
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else folder.name


def model_in(folder: Path, shape: Shape, seed: int) -> Path:
    """The random model of ``shape`` and ``seed`` in ``folder``, made there unless it is there already."""
    made = folder / "made.json"
    wanted = {"shape": shape.to_dict(), "seed": seed}
    if not made.exists() or json.loads(made.read_text(encoding="utf-8")) != wanted:
        folder.mkdir(parents=True, exist_ok=True)
        make_weights(shape, seed, folder)
        made.write_text(json.dumps(wanted), encoding="utf-8")
    return folder


def merged(path: Path, arguments: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``rows`` and those of the dtypes and batches in ``path`` that were not measured again, under equal arguments."""
    if not path.exists():
        return list(rows)
    before = json.loads(path.read_text(encoding="utf-8"))
    if before["arguments"] != arguments:
        raise SystemExit(f"{path} was measured with other arguments: {before['arguments']}")
    again = {(row["dtype"], row["batch"]) for row in rows}
    return [*(row for row in before["rows"] if (row["dtype"], row["batch"]) not in again), *rows]


@app.command()
def main(
    batch: Annotated[list[int] | None, typer.Option(min=1, help="sentences at once; repeat for more")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32 or bfloat16; repeat for both")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="rounds, in each of which every side runs once")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="threads of each side [default: cores]")] = None,
    kernel: Annotated[str, typer.Option(help="of this project")] = "auto",
    seed: Annotated[int, typer.Option(help="of the random model")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="a tiny model: shows that all runs, measures nothing")] = False,
    reference: Annotated[Path, typer.Option(help="folder with Transformers 4.57.1 (`make reference`)")] = Path(
        ".reference/transformers-4.57.1"
    ),
    before: Annotated[Path | None, typer.Option(help="checkout of another commit of this project")] = None,
    model: Annotated[Path | None, typer.Option(help="folder where the random model is made, or was")] = None,
    add: Annotated[bool, typer.Option("--add", help="keep what the file has of other dtypes and batches")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="where results go [default: results/around.json, none if quick]")
    ] = None,
) -> None:
    """Time the components of encoding and decoding, every side in one run."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    unknown = sorted(set(dtype or ()) - set(DTYPES))
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(DTYPES)}", param_hint="--dtype")
    found = (reference / "transformers").is_dir()
    if not found:
        console.print(f"{REFERENCE} is not measured: {reference} does not hold it; `make reference` makes it")
    shape, tokens = (QUICK, 4) if quick else (Shape(), 24)
    cases = [Case(size, tokens, tokens) for size in batch or ([2] if quick else [1, 32])]
    dtypes = [name for name in DTYPES if name in (dtype or DTYPES)]
    cores = threads or usable_cores()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="moe-bench-") as folder, console.status("making the model") as status:
        weights = model_in(model or Path(folder), shape, seed)
        for name in dtypes:
            sides = sides_of(name, reference if found else None, before, kernel)
            rows += measure(sides, cases, rounds, weights, cores, status.update)
            for phase in PHASES:
                console.print(table_of(rows, name, phase))
    target = json_file or (None if quick else RESULTS)
    if target is not None:
        versions = {"transformers": version("transformers"), "reference": REFERENCE if found else None}
        arguments = {
            "shape": shape.to_dict(),
            "tokens": tokens,
            "rounds": rounds,
            "threads": cores,
            "kernel": kernel,
            "seed": seed,
            "before": None if before is None else commit_of(before),
        }
        write_results(target, versions, arguments, merged(target, arguments, rows) if add else rows)
        console.print(f"written to {target}")


if __name__ == "__main__":
    app()
