"""What profiling costs while it is on (trace and timers), and after it is off again, side by side in one process.

Three sides take turns on the demo model: a model that was never profiled, one with a profiler attached, and the same
one detached. Both models compute the same tokens, which is checked first. Memory is not recorded here: that is done in
a forward of its own, which is not timed.

    python benchmarks/profiling.py --rounds 9
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from _machine import write_results
from rich.console import Console
from rich.table import Table

import fairseq_moe_opt
import hf_integration
from fairseq_moe_opt.profiling import Profiler

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "examples" / "demo" / "model"
PLAIN, ON, OFF = SIDES = ("never profiled", "profiling on", "profiling off again")
WORK = ("encode", "generate")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="folder of an NLLB-MoE checkpoint")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--source", type=int, default=24, help="source tokens")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "profiling.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rows = measure(arguments)
    Console(width=120).print(table_of(rows))
    versions = {"transformers": transformers.__version__, "fairseq_moe_opt": fairseq_moe_opt.__version__}
    given = {**vars(arguments), "output": arguments.output.name, "model": Path(arguments.model).name}
    write_results(arguments.output, versions, given, rows)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a piece of work: seconds of every round by side, wall and processor time, and medians of their ratios."""
    plain, profiled = (hf_integration.from_pretrained(arguments.model, dtype="float32") for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, plain.config.vocab_size - 8, (arguments.batch, arguments.source), generator=generator)
    profiler = profiled.moe.profiler()
    if not torch.equal(generate(plain, ids, arguments.tokens), generate(profiled, ids, arguments.tokens)):
        raise SystemExit("the two models give different tokens")
    rows = []
    for work in WORK:
        runs: dict[str, Callable[[], object]] = {
            PLAIN: _work(work, plain, ids, arguments.tokens),
            ON: _work(work, profiled, ids, arguments.tokens),
            OFF: _work(work, profiled, ids, arguments.tokens),
        }
        rows.append(_row(work, runs, profiler, arguments.rounds))
    return rows


def _row(work: str, runs: dict[str, Callable[[], object]], profiler: Profiler, rounds: int) -> dict[str, Any]:
    wall: dict[str, list[float]] = {side: [] for side in SIDES}
    processor: dict[str, list[float]] = {side: [] for side in SIDES}
    for step in range(rounds + 1):
        for turn in range(len(SIDES)):
            side = SIDES[(turn + step) % len(SIDES)]
            seconds = _run(runs[side], profiler, side == ON, f"{work} {step}")
            if step:  # the first round warms up
                wall[side].append(seconds[0])
                processor[side].append(seconds[1])
    return {
        "work": work,
        "wall_seconds": wall,
        "processor_seconds": processor,
        "wall_ratio": {side: _ratio(wall[side], wall[PLAIN]) for side in (ON, OFF)},
        "processor_ratio": {side: _ratio(processor[side], processor[PLAIN]) for side in (ON, OFF)},
    }


def _run(run: Callable[[], object], profiler: Profiler, is_on: bool, label: str) -> tuple[float, float]:
    """Wall and processor seconds; attaching is no part of them, settling the times is."""
    if is_on:
        profiler.attach()
        profiler.begin(label)
    start = time.perf_counter(), time.process_time()
    run()
    if is_on:
        profiler.settle()
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    if is_on:
        profiler.current = None
        profiler.detach()
    return seconds


def _work(work: str, model: Any, ids: torch.Tensor, tokens: int) -> Callable[[], object]:
    return (lambda: encode(model, ids)) if work == "encode" else (lambda: generate(model, ids, tokens))


def encode(model: Any, ids: torch.Tensor, times: int = 10) -> None:
    """Run the encoder several times."""
    with torch.inference_mode():
        for _ in range(times):
            model.get_encoder()(input_ids=ids)


def generate(model: Any, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """Greedy, exactly ``tokens`` new ones."""
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "max_length": None}
    found: torch.Tensor = model.generate(input_ids=ids, num_beams=1, do_sample=False, **length)
    return found


def _ratio(seconds: Sequence[float], plain: Sequence[float]) -> float:
    """Median over rounds: both sides of each quotient ran one after the other."""
    return median(own / other for own, other in zip(seconds, plain, strict=True))


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """How many times as long as without a profiler."""
    table = Table(title="times as long as a model that was never profiled, median over rounds")
    table.add_column("work")
    for side in (ON, OFF):
        table.add_column(f"{side}, wall", justify="right")
        table.add_column(f"{side}, processor", justify="right")
    for row in rows:
        ratios = [row[kind][side] for side in (ON, OFF) for kind in ("wall_ratio", "processor_ratio")]
        table.add_row(row["work"], *(f"{ratio:.3f}" for ratio in ratios))
    return table


if __name__ == "__main__":
    main()
