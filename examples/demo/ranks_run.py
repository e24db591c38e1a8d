"""The demo's run on two processes, which share the experts by a placement made from the trace just recorded.

What ``moe-opt place`` and ``torchrun -m hf_integration.launch translate`` do: the same functions, and the same command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from fairseq_moe_opt.errors import InputError
from fairseq_moe_opt.moe.trace import Trace, write_trace
from fairseq_moe_opt.placement import (
    DEFAULT_STRATEGY,
    Cluster,
    LoadHistory,
    Placement,
    history_of,
    place,
    rank_loads,
    write_placement,
)

RANKS = 2
DEADLINE = 600


@dataclass(frozen=True)
class Translation:
    """Sentences to translate again, where files go, how, and what the sentences became in one process."""

    model: Path
    folder: Path
    sentences: Sequence[str]
    languages: tuple[str, str]
    num_beams: int
    batch_size: int
    expected: Sequence[str]


def compare(console: Console, work: Translation, trace: Trace) -> bool:
    """Place, translate on ``RANKS`` processes and show who had to do what; whether it reads the same."""
    write_trace(trace, work.folder / "trace.json")
    placement = placed(console, trace)
    write_placement(placement, work.folder / "placement.json")
    start = time.perf_counter()
    done = launch(work)
    if done.returncode != 0:
        end = "\n".join(done.stderr.splitlines()[-5:])
        console.print(f"demo, {RANKS} processes: failed:\n{end}", style="bold red", markup=False)
        return False
    lines = (work.folder / "ranks.txt").read_text(encoding="utf-8").splitlines()
    rows = [computed_rows(work.folder / f"ranks.rank-{rank}.json") for rank in range(RANKS)]
    shares = " and ".join(f"{one / sum(rows):.1%}" for one in rows)
    seconds = time.perf_counter() - start
    console.print(
        f"{len(work.sentences)} sentences to {work.languages[1]}: the ranks computed {shares} of {sum(rows):,} expert "
        f"rows ({seconds:.1f} s, starting them included)",
        highlight=False,
    )
    agree = lines == list(work.expected)
    if agree:
        console.print(f"{RANKS} processes and one gave the same translations\n")
    else:
        console.print(f"{RANKS} processes and one DISAGREE", style="bold red")
    return agree


def placed(console: Console, trace: Trace) -> Placement:
    """The placement by the whole trace; the table shows one that the first half of it made, on the second half."""
    history = history_of(trace)
    cluster = Cluster.even(RANKS, history.num_experts)
    try:
        first, second = history.halves()
    except InputError:  # a few sentences of one batch each have no halves
        first = second = history
        title = "expert rows of the trace, placed by it"
    else:
        title = "expert rows of the trace's second half, placed by its first"
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    for name in ("phase", "placement", *(f"rank {rank}" for rank in range(RANKS)), "busiest of each step"):
        table.add_column(name, justify="left" if name in ("phase", "placement") else "right")
    for strategy in ("contiguous", DEFAULT_STRATEGY):
        placement = place(first, cluster, strategy, fingerprint=trace.fingerprint)
        for phase in dict.fromkeys(layer.phase for layer in trace.layers):
            layers = [layer.name for layer in trace.layers if layer.phase == phase]
            shares, busiest = loads_of(placement, second, layers)
            table.add_row(phase, strategy, *(f"{share:.1%}" for share in shares), f"{busiest:.1%}")
    console.print(table)
    return place(history, cluster, DEFAULT_STRATEGY, fingerprint=trace.fingerprint)


def loads_of(placement: Placement, history: LoadHistory, layers: Sequence[str]) -> tuple[list[float], float]:
    """The share of all rows that each rank computes, and the busiest rank's mean share of a step's rows."""
    rows, busiest, steps = [0.0] * placement.num_ranks, 0.0, 0
    for layer in layers:
        counts = history.layers[layer]
        loads = rank_loads(placement.layers[layer], history.shares(layer))
        used = counts[counts.sum(axis=1) > 0].sum(axis=1)
        for rank, share in enumerate((loads * used[:, None]).sum(axis=0)):
            rows[rank] += float(share)
        busiest, steps = busiest + float(loads.max(axis=1).sum()), steps + len(loads)
    return [share / sum(rows) for share in rows], busiest / steps


def launch(work: Translation) -> subprocess.CompletedProcess[str]:
    """Run the launcher; it writes ``ranks.txt`` and a report of each rank."""
    source, target = work.languages
    text = work.folder / "ranks-in.txt"
    text.write_text("".join(f"{sentence}\n" for sentence in work.sentences), encoding="utf-8")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)),
        *("-m", "hf_integration.launch", "translate", str(work.model), str(text)),
        *("--src-lang", source, "--tgt-lang", target, "-o", str(work.folder / "ranks.txt")),
        *("--placement", str(work.folder / "placement.json"), "--device", "cpu", "--threads", "1"),
        *("--num-beams", str(work.num_beams), "--batch-size", str(work.batch_size)),
        *("--moe-report", str(work.folder / "ranks.json")),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=DEADLINE)


def computed_rows(report: Path) -> int:
    """The expert rows that a rank computed, for whomever."""
    content = json.loads(report.read_text(encoding="utf-8"))
    return sum(sum(layer["exchange"]["slot_rows"]) for layer in content["layers"])
