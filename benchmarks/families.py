"""How fast every model family generates on a CPU: this project beside each of Transformers' own ways, in one run.

A small random model a family, whose weights are mostly experts'. In float32 every side has to give the tokens and,
to 1e-5, the logits of Transformers' eager code before anything is timed; in bfloat16 it may be as far from float32 as
Transformers' own ways are. Then the sides take turns, in one process and over the same weights: a prompt (prefill) and
single tokens with a cache (decode), the same tokens for all. Ratios are medians of ratios within a round, and compare
with whichever of Transformers' ways was fastest in that round.

    python benchmarks/families.py --families Mixtral,GptOss --append    # others stay in the file as they are
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from _families_models import FAMILIES, QUICK, TRANSLATORS, Size, cast, expert_share, model_of, twin
from _families_work import (
    BATCHED,
    EAGER,
    MOST_COPIED,
    OPTIMIZE,
    PHASES,
    REGISTERED,
    SIDES,
    TRANSFORMERS,
    Case,
    Side,
    copied_bytes,
    greedy,
    largest_difference,
    norm_difference,
    run,
    take_turns,
)
from _machine import machine, usable_cores, write_results
from rich.console import Console
from rich.table import Table
from torch import Tensor

import hf_integration
from hf_integration.translate import quiet_host

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = 1e-5
WORSE_THAN_HOST = 2.0
"""Times as far from float32 as Transformers' own bfloat16 is; more is an error."""
WRONG_IN_HOST = ("NllbMoe",)
"""Transformers 5 computes these wrongly, whatever the way: the naive loop of this project is the reference there."""

TABLE_WIDTH = 150
RESULTS = Path(__file__).resolve().parent / "results" / "families.json"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class BenchmarkError(Exception):
    """A side computes something else."""


@dataclass(frozen=True)
class Row:
    """One side on one case.

    Attributes:
        expert_share: the part of the model's weights that is experts'.
        difference: of its logits from float32's of the reference: relative to the largest in float32, in the norm
            in bfloat16.
        tokens: whether greedy generation gave the reference's; None in bfloat16.
        seconds: of every round, by phase; none for a phase that it is left out of.
        tokens_per_second: by phase.
        times_fastest: speed against the fastest of Transformers' ways, by phase.
        measured: when.
    """

    family: str
    dtype: str
    batch: int
    side: str
    expert_share: float
    difference: float
    tokens: bool | None
    seconds: dict[str, list[float]]
    tokens_per_second: dict[str, float]
    times_fastest: dict[str, float]
    measured: str


@dataclass(frozen=True)
class Plan:
    """What is measured, as it goes into the JSON file."""

    size: Size
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    prompt_tokens: int
    new_tokens: int
    rounds: int
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "size": self.size.to_dict(), "batches": list(self.batches), "dtypes": list(self.dtypes)}


@dataclass(frozen=True)
class Reference:
    """What is right in one case: the case itself, with greedy tokens, and the float32 logits of ``side``."""

    case: Case
    logits: Tensor
    side: Side


def sides_of(family: str, model: Any, optimized: Any) -> list[Side]:
    """All ways of one family, Transformers' eager code first."""
    if family in TRANSLATORS:
        return [Side(EAGER, model), Side(OPTIMIZE, optimized)]
    return [*(Side(way, model, way) for way in (*TRANSFORMERS, REGISTERED)), Side(OPTIMIZE, optimized)]


def references(family: str, model: Any, plan: Plan) -> list[Reference]:
    """One a batch size, from float32 weights."""
    reference = Side(EAGER, model, None if family in TRANSLATORS else EAGER)
    if family in WRONG_IN_HOST:
        reference = Side("naive", twin(model))
        hf_integration.optimize(reference.model, kernel="naive")
    generator = torch.Generator().manual_seed(1)
    found = []
    for batch in plan.batches:
        prompts = torch.randint(3, plan.size.vocabulary, (batch, plan.prompt_tokens), generator=generator)
        case = Case(prompts, greedy(reference, prompts, plan.new_tokens))
        found.append(Reference(case, run(reference, case).logits, reference))
    return found


def rounding(right: Reference) -> float:
    """How far the reference itself is from float64: what a model's own depth and scales make of float32."""
    exact = copy.deepcopy(right.side.model).double()
    logits = run(Side(EAGER, exact, right.side.way), right.case).logits
    return largest_difference(right.logits, logits)


def check(side: Side, right: Reference, dtype: str, family: str) -> tuple[float, bool | None]:
    """How far its logits are from the reference's, and whether its tokens are; BenchmarkError where they must be."""
    logits = run(side, right.case).logits
    if dtype != "float32":
        return norm_difference(logits, right.logits), None
    difference = largest_difference(logits, right.logits)
    equal = torch.equal(greedy(side, right.case.prompts, right.case.tokens.shape[1]), right.case.tokens)
    excused = family in WRONG_IN_HOST and side.name in TRANSFORMERS
    if not excused and not (equal and difference <= TOLERANCE) and not (equal and difference <= 2 * rounding(right)):
        raise BenchmarkError(f"{family}, {side.name}: logits differ by {difference:.1e}, the same tokens: {equal}")
    return difference, equal


def measure(family: str, plan: Plan) -> list[Row]:
    """Every side in every case of one family."""
    model = model_of(family, plan.size)
    rights, rows = references(family, model, plan), []
    optimized = twin(model)
    hf_integration.optimize(optimized)
    for dtype in plan.dtypes:
        for one in (model, optimized):
            cast(one, DTYPES[dtype])
        for right in rights:
            sides = [_suited(side, right.case, plan) for side in sides_of(family, model, optimized)]
            found = {side.name: check(side, right, dtype, family) for side in sides}
            if dtype != "float32" and family not in WRONG_IN_HOST:
                _require_like_host({name: difference for name, (difference, _) in found.items()}, family, dtype)
            rows += rows_of(family, dtype, right.case, found, take_turns(sides, right.case, plan.rounds), model)
    return rows


def _suited(side: Side, case: Case, plan: Plan) -> Side:
    copied = copied_bytes(case.prompts.numel() * plan.size.top_k, side.model) if side.way == BATCHED else 0
    return Side(side.name, side.model, side.way, in_prefill=copied <= MOST_COPIED)


def _require_like_host(differences: Mapping[str, float], family: str, dtype: str) -> None:
    most = WORSE_THAN_HOST * max(differences[way] for way in TRANSFORMERS if way in differences)
    for side, difference in differences.items():
        if not difference <= most:
            raise BenchmarkError(f"{family}, {side}, {dtype}: logits differ by {difference:.1e}, others' by {most:.1e}")


def rows_of(
    family: str,
    dtype: str,
    case: Case,
    found: Mapping[str, tuple[float, bool | None]],
    seconds: Mapping[str, Mapping[str, list[float]]],
    model: Any,
) -> list[Row]:
    """A row a side."""
    fastest = {}
    for phase in PHASES:
        ways = [seconds[way][phase] for way in TRANSFORMERS if way in seconds and seconds[way][phase]]
        fastest[phase] = [min(one) for one in zip(*ways, strict=True)]
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    rows = []
    for side, times in seconds.items():
        timed = {phase: values for phase, values in times.items() if values}
        speeds = {phase: case.counts()[phase] / median(values) for phase, values in timed.items()}
        ratios = {
            phase: median(theirs / own for own, theirs in zip(values, fastest[phase], strict=True))
            for phase, values in timed.items()
        }
        share = expert_share(model)
        rows.append(Row(family, dtype, case.batch, side, share, *found[side], timed, speeds, ratios, now))
    return rows


def table_of(rows: Sequence[Row], dtype: str) -> Table:
    """A line a family and batch size, tokens a second of every side by phase."""
    table = Table(title=f"{dtype}: tokens a second; in brackets, times the fastest of Transformers' ways in a round")
    table.add_column("family")
    for heading in ("batch", *(f"{phase[:7]}\n{side}" for phase in PHASES for side in SIDES)):
        table.add_column(heading, justify="right", no_wrap=True)
    groups: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        if row.dtype == dtype:
            groups.setdefault((row.family, row.batch), {})[row.side] = row
    for (family, batch), sides in groups.items():
        cells = [_cell(sides.get(side), phase) for phase in PHASES for side in SIDES]
        table.add_row(family, str(batch), *cells, end_section=batch == max(size for _, size in groups))
    return table


def _cell(row: Row | None, phase: str) -> str:
    if row is None or phase not in row.tokens_per_second:
        return "-"
    speed = f"{row.tokens_per_second[phase]:,.0f}"
    if row.tokens is False:
        return f"{speed}\nWRONG"
    return speed if row.side in TRANSFORMERS else f"{speed}\n({row.times_fastest[phase]:.2f})"


def kept_rows(path: Path, plan: Plan, families: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of other families in the file; BenchmarkError when they were measured elsewhere, or otherwise."""
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    same = {"machine": machine(), "arguments": plan.to_dict()}
    differ = [name for name, value in same.items() if content[name] != value]
    differ += [name for name, value in _versions().items() if content["versions"].get(name) != value]
    if differ:
        raise BenchmarkError(f"{path} is of another {' and '.join(differ)}: measure all families again")
    return [row for row in content["rows"] if row["family"] not in families]


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers")}


@app.command()
def main(
    families: Annotated[str, typer.Option(help="separated by commas")] = ",".join(FAMILIES),
    batch: Annotated[list[int] | None, typer.Option(min=1, help="prompts at once; repeat for more")] = None,
    dtypes: Annotated[str, typer.Option(help="separated by commas")] = ",".join(DTYPES),
    prompt_tokens: Annotated[int, typer.Option(min=1, help="of each prompt")] = 32,
    new_tokens: Annotated[int, typer.Option(min=2, help="after each prompt")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="in each of which every side runs once")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="[default: cores]")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="tiny models: shows that all runs, measures nothing")] = False,
    append: Annotated[bool, typer.Option("--append", help="keep other families' rows of the file")] = False,
    results: Annotated[Path | None, typer.Option(help="JSON file [default: results/families.json]")] = None,
) -> None:
    """Compare, time, print a table a dtype, write the JSON."""
    unknown = sorted({*families.split(",")} - {*FAMILIES})
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(FAMILIES)}", param_hint="--families")
    wanted = [family for family in FAMILIES if family in families.split(",")]
    quiet_host()
    cores = threads or usable_cores()
    torch.set_num_threads(cores)
    sizes = tuple(batch or (1, 8))
    size = QUICK if quick else Size()
    plan = Plan(size, sizes, tuple(dtypes.split(",")), prompt_tokens, new_tokens, rounds, cores)
    target = results or (None if quick else RESULTS)
    kept = kept_rows(target, plan, wanted) if append and target is not None else []
    with torch.inference_mode():
        rows = [row for family in wanted for row in measure(family, plan)]
    console = Console(width=TABLE_WIDTH)
    for dtype in plan.dtypes:
        console.print(table_of(rows, dtype))
    if target is not None:
        every = sorted([*kept, *map(asdict, rows)], key=lambda row: FAMILIES.index(row["family"]))
        write_results(target, _versions(), plan.to_dict(), every)
        console.print(f"written to {target}")


if __name__ == "__main__":
    app()
