"""What buffering experts costs: tokens a second, memory, misses and bytes at every budget, beside the resident model.

One run makes a random model of which some experts are popular, records what the resident model routes, and runs every
side after it in a process of its own, one at a time, its files dropped from the page cache before. Tokens are compared
first. Miss rates of policies are also simulated from the recorded trace, beside Belady's. ``make bench-buffering``.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from _buffers import ACCELERATE, BufferRow, measure_accelerate, measure_sides, sides
from _machine import usable_cores, write_results
from _rounds import make_weights
from _routing_facts import routing_facts
from _sides import QUICK, REFERENCE, Case, Shape
from rich.console import Console
from rich.table import Table

from fairseq_moe_opt.buffering import BELADY, POLICIES, simulate
from fairseq_moe_opt.moe.trace import Trace, read_trace
from fairseq_moe_opt.sizes import readable

RESULTS = Path(__file__).resolve().parent / "results" / "buffering.json"
TABLE_WIDTH = 180
SKEW = 0.5
BUDGETS = (100, 50, 25, 10)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def miss_rates(trace: Trace, budgets: Sequence[int]) -> dict[int, dict[str, float]]:
    """Of the decoder, by budget in percent and policy, over one pool."""
    experts = sum(layer.num_experts for layer in trace.layers)
    decoder = {layer.name for layer in trace.layers if layer.phase == "decoder"}
    found: dict[int, dict[str, float]] = {}
    for budget in budgets:
        found[budget] = {}
        for policy in (*POLICIES, BELADY):
            layers = simulate(trace.visits, max(1, experts * budget // 100), policy)
            misses = sum(layer.misses for name, layer in layers.items() if name in decoder)
            hits = sum(layer.hits for name, layer in layers.items() if name in decoder)
            found[budget][policy] = misses / (misses + hits)
    return found


def table_of(rows: Sequence[BufferRow]) -> Table:
    """One line a side."""
    table = Table(title="decoding, float32; budgets are shares of all experts' bytes")
    table.add_column("side", no_wrap=True)
    for name in ("tokens/s", "of resident", "misses", "read a token", "stalled s", "peak RSS", "grown", "slots"):
        table.add_column(name, justify="right")
    table.add_column("tokens")
    table.add_column("memory")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: BufferRow) -> list[str]:
    if row.error is not None:
        return [row.side, *["-"] * 8, f"failed: {row.error}", ""]
    buffered = row.miss_rate is not None and row.bytes_per_token is not None and row.stall_seconds is not None
    return [
        row.side,
        f"{row.tokens_per_second:,.1f}",
        f"{row.of_resident:.2f}",
        f"{row.miss_rate:.1%}" if buffered else "-",
        readable(round(row.bytes_per_token or 0)) if buffered else "-",
        f"{row.stall_seconds:.2f}" if buffered else "-",
        readable(row.peak_bytes),
        readable(max(row.grown_bytes, 0)),
        readable(row.arena_bytes) if buffered else "-",
        "equal" if row.tokens_equal else "WRONG",
        {None: "", True: "within", False: "OVER"}[row.within_budget],
    ]


def misses_table(rates: dict[int, dict[str, float]]) -> Table:
    """Miss rates by policy, simulated from the resident model's routing."""
    table = Table(title="share of the decoder's experts that were not there, simulated over one pool, no prefetch")
    for name in ("budget", *POLICIES, BELADY):
        table.add_column(name, justify="right")
    for budget, found in rates.items():
        table.add_row(f"{budget}%", *(f"{rate:.1%}" for rate in found.values()))
    return table


@dataclass(frozen=True)
class Plan:
    """What is measured of each model; accelerate's turn has ``accelerate_tokens`` a sentence, where it is there."""

    case: Case
    rounds: int
    threads: int
    budgets: tuple[int, ...]
    policies: bool
    reference: Path | None
    accelerate_tokens: int


def run(shape: Shape, plan: Plan) -> dict[str, Any]:
    """Measure everything for one model and print it; returns plain values."""
    console, case = _console(), plan.case
    with tempfile.TemporaryDirectory(prefix="moe-bench-") as base, console.status("making the model") as status:
        folder, trace_file = Path(base) / "model", Path(base) / "trace.json"
        make_weights(shape, 1, folder)
        wanted = list(sides(plan.budgets, policies=plan.policies))
        rows, expected = measure_sides(wanted, case, plan.rounds, folder, plan.threads, trace_file, status.update)
        if plan.reference is not None:
            status.update(ACCELERATE)
            short = replace(case, new_tokens=plan.accelerate_tokens)
            rows.append(measure_accelerate(short, folder, plan.threads, plan.reference, expected, rows[0]))
        trace = read_trace(trace_file)
    rates, facts = miss_rates(trace, plan.budgets), routing_facts(trace)
    console.print(table_of(rows), misses_table(rates))
    console.print(
        f"routing: {facts['hottest_quarter']:.0%} of uses go to a quarter of each layer's experts; "
        f"{facts['used_again']:.0%} of a step's experts were used in the step before"
    )
    return {
        "shape": shape.to_dict(),
        "rows": [row.to_dict() for row in rows],
        "simulated_miss_rates": rates,
        "routing": facts,
    }


def _console() -> Console:
    console = Console()
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    return console


@app.command()
def main(
    d_model: Annotated[list[int] | None, typer.Option(min=32, help="widths to measure [default: 512 and 1024]")] = None,
    budget: Annotated[list[int] | None, typer.Option(min=1, max=100, help="percent; repeat for more")] = None,
    batch: Annotated[int, typer.Option(min=1, help="sentences at once")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="timed rounds of each side")] = 3,
    new_tokens: Annotated[int, typer.Option(min=2, help="tokens generated for each sentence")] = 24,
    source_tokens: Annotated[int, typer.Option(min=1, help="tokens of each source sentence")] = 24,
    threads: Annotated[int | None, typer.Option(min=1, help="threads of each side [default: cores]")] = None,
    accelerate_tokens: Annotated[int, typer.Option(min=2, help="tokens a sentence for accelerate's turn")] = 4,
    policies: Annotated[bool, typer.Option(help="run every policy, not only simulate them")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="a tiny model: shows that all runs, measures nothing")] = False,
    reference: Annotated[Path, typer.Option(help="folder with Transformers 4.57.1 (`make reference`)")] = Path(
        ".reference/transformers-4.57.1"
    ),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="where results go [default: results/buffering.json, none if quick]")
    ] = None,
) -> None:
    """Measure buffered experts at every budget, beside the resident model and accelerate's disk offload."""
    found = reference if (reference / "transformers").is_dir() else None
    if found is None:
        typer.echo(f"{REFERENCE} with accelerate is not measured: {reference} does not hold it")
    plan = Plan(
        case=Case(batch, source_tokens, new_tokens),
        rounds=rounds,
        threads=threads or usable_cores(),
        budgets=tuple(sorted(budget or BUDGETS, reverse=True)),
        policies=policies,
        reference=found,
        accelerate_tokens=min(accelerate_tokens, new_tokens),
    )
    shapes = [Shape(d_model=width, ffn_dim=4 * width, skew=SKEW) for width in d_model or [512, 1024]]
    models = [run(shape, plan) for shape in ([replace(QUICK, skew=SKEW)] if quick else shapes)]
    target = json_file or (None if quick else RESULTS)
    if target is not None:
        settings = {"batch": batch, "rounds": rounds, "new_tokens": new_tokens, "threads": plan.threads}
        write_results(target, {"transformers": transformers.__version__}, settings, models)
        typer.echo(f"written to {target}")


if __name__ == "__main__":
    # Told to stop, leave through the context managers: the model in the temporary folder is large.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app()
