"""How fast fairseq generates and scores with Mixture-of-Experts here: static beside dynamic gating, end to end.

One run builds random models through fairseq and the plugin: encoder-decoders, which translate with fairseq's
SequenceGenerator at capacity fraction 1.0, and language models, which score text with its SequenceScorer at capacity
fraction 0.05. Both gatings run the same weights in one process. Their outputs are compared first (tokens, scores,
encoder states), then they take turns. Rows are medians over rounds; ratios are taken within a round. Where there is no
time for a round the first run counts, and the table says ``0`` rounds. ``make bench`` runs it.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _fairseq_models import LanguageModel, Translator
from _fairseq_results import LANGUAGE_MODEL, TRANSLATION, Row, row_of, table_of
from _fairseq_work import Work
from _machine import usable_cores, write_results
from _sides import QUICK, Shape
from _turns import Limits, take_turns
from rich.console import Console

from fairseq_moe_opt.options import MoEOptions

STATIC = MoEOptions(gating="static", capacity="checkpoint")
DYNAMIC = {capacity: MoEOptions(capacity=capacity) for capacity in ("checkpoint", "none")}
NEVER_BINDS, PUBLISHED = 1.0, 0.05
"""Capacity fractions: NLLB's, and that of the published language models as the paper runs them."""

TABLE_WIDTH = 140
"""Columns of the table where there is no terminal to ask."""

RESULTS = Path(__file__).resolve().parent / "results" / "fairseq_generate.json"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Suite:
    """A kind of model at several numbers of experts, and what each of them is measured on.

    Attributes:
        model: ``translation`` or ``language model``.
        experts: of each sparse layer.
        works: the workloads.
        capacity_fraction: of the checkpoint; static gating always follows it.
        capacities: capacity options of the dynamic sides.
    """

    model: str
    experts: tuple[int, ...]
    works: tuple[Work, ...]
    capacity_fraction: float
    capacities: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Everything that decides what is measured, as it goes into the JSON file."""

    shape: Shape
    suites: tuple[Suite, ...]
    limits: Limits
    threads: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the shape's number of experts is each suite's own."""
        values = asdict(self)
        del values["shape"]["experts"]
        return values


def run(plan: Plan, console: Console) -> list[Row]:
    """Measure ``plan`` and print a table a kind of model."""
    torch.set_num_threads(plan.threads)
    rows: list[Row] = []
    for suite in plan.suites:
        found: list[Row] = []
        with console.status("") as status:
            for experts in suite.experts:
                found += measure(plan, suite, experts, status.update)
                gc.collect()  # a model's parts refer to each other, and the next model needs the memory
        if found:
            console.print(table_of(found))
        rows += found
    return rows


def measure(plan: Plan, suite: Suite, experts: int, progress: Callable[[str], None]) -> list[Row]:
    """The rows of one model."""
    rows: list[Row] = []
    progress(f"making the {suite.model} model with {experts} experts")
    kind = Translator if suite.model == TRANSLATION else LanguageModel
    runner = kind(replace(plan.shape, experts=experts), suite.capacity_fraction, plan.seed)
    for work in suite.works:
        label = f"{suite.model}, {experts} experts, batch {work.batch}, beam {work.beam}"
        # Dynamic gating first: when static gating is given up, there is something to set it beside.
        options = {**{capacity: DYNAMIC[capacity] for capacity in suite.capacities}, "static": STATIC}
        runs = {name: lambda work=work, chosen=chosen: runner.run(work, chosen) for name, chosen in options.items()}
        sides = take_turns(runs, plan.limits, lambda text, label=label: progress(f"{label}, {text}"))
        for capacity in suite.capacities:
            rows.append(row_of(suite.model, experts, work, capacity, sides["static"], sides[capacity]))
    return rows


def write_json(path: Path, plan: Plan, rows: Sequence[Row]) -> None:
    """Write machine, versions, date, arguments and rows."""
    versions = {"fairseq-fixed": version("fairseq-fixed")}
    write_results(path, versions, plan.to_dict(), [row.to_dict() for row in rows])


@app.command()
def main(
    experts: Annotated[list[int] | None, typer.Option(min=2, help="of the translators [default: 16, 64, 128]")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="sentences at once [default: 1, 8, 48]")] = None,
    beam: Annotated[list[int] | None, typer.Option(min=1, help="[default: 1, 4]")] = None,
    source_tokens: Annotated[int, typer.Option(min=2, help="tokens of each source sentence")] = 24,
    new_tokens: Annotated[int, typer.Option(min=2, help="tokens generated for each sentence")] = 8,
    lm_experts: Annotated[
        list[int] | None, typer.Option(min=2, help="of the language models [default: 128, 512]")
    ] = None,
    lm_batch: Annotated[list[int] | None, typer.Option(min=1, help="blocks scored at once [default: 8]")] = None,
    lm_tokens: Annotated[int, typer.Option(min=2, help="tokens of each block")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="at most so many rounds a row")] = 3,
    budget: Annotated[float, typer.Option(min=0, help="seconds a row; further rounds have to fit")] = 60,
    longest: Annotated[float, typer.Option(min=1, help="seconds after which static gating is given up")] = 120,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads [default: cores]")] = None,
    seed: Annotated[int, typer.Option(help="of the random models")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="tiny models: shows that all runs, measures nothing")] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="where results go [default: results/fairseq_generate.json, none if quick]"),
    ] = None,
) -> None:
    """Time generation and scoring through fairseq, static and dynamic gating in one run."""
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    console = Console()
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    translation = Suite(
        TRANSLATION,
        experts=tuple(experts or ([4, 8] if quick else [16, 64, 128])),
        works=tuple(
            Work(size, source_tokens, width, new_tokens)
            for size in batch or ([2] if quick else [1, 8, 48])
            for width in beam or ([1, 2] if quick else [1, 4])
        ),
        capacity_fraction=NEVER_BINDS,
        capacities=("checkpoint",),
    )
    language_model = Suite(
        LANGUAGE_MODEL,
        experts=tuple(lm_experts or ([8] if quick else [128, 512])),
        works=tuple(Work(size, lm_tokens) for size in lm_batch or ([2] if quick else [8])),
        capacity_fraction=PUBLISHED,
        capacities=("checkpoint", "none"),
    )
    plan = Plan(
        shape=QUICK if quick else Shape(),
        suites=(translation, language_model),
        limits=Limits(rounds, budget, longest),
        threads=threads or usable_cores(),
        seed=seed,
    )
    rows = run(plan, console)
    target = json_file or (None if quick else RESULTS)
    if target is not None:
        write_json(target, plan, rows)
        console.print(f"written to {target}")


if __name__ == "__main__":
    app()
