"""NLLB-MoE-54B's exact shape on a machine that holds a fraction of it: experts in int8, buffered from the disk.

Makes a checkpoint with random weights (see ``_nllb54b_weights``; 54 GiB with all 128 experts a layer, resumed where it
was interrupted) and translates with it in a process of its own, in bfloat16, with the memory for experts that
``--budget`` allows. The page cache is dropped before, experts are dropped from it as they are read, and rows are called
cold only if the system says that the bytes came from the disk. ``make bench-nllb54b``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from _machine import available_bytes, usable_cores, write_results
from _nllb54b_weights import NLLB_54B, Checkpoint, FolderError, write_checkpoint
from _sides import QUICK, Case, Shape
from rich.console import Console
from rich.table import Table

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.sizes import parse_size, readable

ROOM_BYTES = 3 * 2**29
"""What a run takes beside weights and slots: the libraries, activations, logits."""

TABLE_WIDTH = 140
RESULTS = Path(__file__).resolve().parent / "results"
_RUN = Path(__file__).resolve().with_name("_nllb54b_run.py")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class RunError(Exception):
    """The run cannot be made here, or failed; the message is one line."""


@dataclass(frozen=True)
class Plan:
    """Everything that decides what is measured, as it goes into the JSON file."""

    shape: Shape
    case: Case
    budget: str
    prefetch: str
    rounds: int
    threads: int
    seed: int

    def spec(self, folder: Path) -> dict[str, Any]:
        """For the process that runs it."""
        options = {"expert_memory": self.budget, "prefetch": self.prefetch}
        return {
            **asdict(self.case),
            "rounds": self.rounds,
            "threads": self.threads,
            "folder": str(folder),
            "options": options,
        }


def require_memory(checkpoint: Checkpoint, budget: str) -> None:
    """RunError unless non-expert weights and the slots of ``budget`` fit into the memory that can be had now."""
    experts = checkpoint.expert_bytes
    wanted = checkpoint.nbytes - experts + parse_size("expert_memory", budget, experts)
    there = available_bytes()
    if there is not None and wanted + ROOM_BYTES > there:
        raise RunError(
            f"the run needs {readable(wanted + ROOM_BYTES)} of memory, {readable(there)} is available: give a smaller "
            "--budget"
        )


def run(plan: Plan, folder: Path) -> dict[str, Any]:
    """Load and translate in a process of its own; RunError when it fails."""
    done = subprocess.run(
        [sys.executable, str(_RUN), json.dumps(plan.spec(folder))], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise RunError(f"the process that runs the model ended with {done.returncode}; its last words are above")
    return dict(json.loads(done.stdout))


def table_of(rows: list[dict[str, Any]]) -> Table:
    """One line a round and phase."""
    table = Table(title="translating with buffered int8 experts, bfloat16")
    table.add_column("round", justify="right")
    table.add_column("phase")
    for name in ("tokens", "seconds", "tokens/s", "misses", "read a token", "read", "from disk", "stalled s"):
        table.add_column(name, justify="right")
    table.add_column("files")
    for row in rows:
        table.add_row(
            str(row["round"]),
            row["phase"],
            str(row["tokens"]),
            f"{row['seconds']:.1f}",
            f"{row['tokens_per_second']:.2f}",
            f"{row['miss_rate']:.1%} of {row['hits'] + row['misses']}",
            readable(round(row["bytes_per_token"])),
            readable(row["bytes_read"]),
            "-" if row["disk_bytes"] is None else readable(row["disk_bytes"]),
            f"{row['stall_seconds']:.1f}",
            row["file_tier"],
        )
    return table


def facts_of(checkpoint: dict[str, int], found: dict[str, Any], budget: str) -> Table:
    """What the run as a whole took."""
    buffer, routing = found["buffer"], found["routing"]
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    size, experts = readable(checkpoint["nbytes"]), readable(checkpoint["expert_bytes"])
    on_disk = f"{size} in {checkpoint['shards']} shards, experts {experts} of it"
    slots = f"{readable(buffer['arena_bytes'])}, {buffer['slots']} of {buffer['experts']} experts"
    load = f"{found['load_seconds']:.1f} s, peak {readable(found['load_peak_bytes'])}"
    skew = f"{routing['hottest_quarter']:.0%} of uses go to a quarter of each layer's experts"
    sticky = f"{routing['used_again']:.0%} of a step's experts were used in the step before"
    for name, value in (
        ("checkpoint", on_disk),
        (f"budget {budget}", slots),
        ("load", load),
        ("peak RSS", readable(found["peak_bytes"])),
        ("decoder's routing", f"{skew}; {sticky}; {routing['distinct_tokens']:.0%} of tokens are different ones"),
    ):
        facts.add_row(name, value)
    return facts


@contextmanager
def folder_for(given: Path | None) -> Iterator[Path]:
    """The folder ``given``, which stays, or a temporary one, which does not."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="moe-bench-") as base:
        yield Path(base)


def measure(plan: Plan, given: Path | None, console: Console) -> tuple[dict[str, int], dict[str, Any]]:
    """Make the checkpoint, run it, and print what came of it; gives facts of the checkpoint, and of the run."""
    with folder_for(given) as folder, console.status("making the checkpoint") as status:
        facts = make(plan, folder, status.update)
        status.update("translating")
        found = run(plan, folder)
    console.print(table_of(found["rows"]), facts_of(facts, found, plan.budget))
    return facts, found


def make(plan: Plan, folder: Path, progress: Callable[[str], None]) -> dict[str, int]:
    """Write what is missing of the checkpoint, once it is known that it can be run; gives its sizes."""
    checkpoint = Checkpoint.of(plan.shape, plan.seed)
    require_memory(checkpoint, plan.budget)
    written = write_checkpoint(folder, checkpoint, progress)
    return {"nbytes": checkpoint.nbytes, "expert_bytes": checkpoint.expert_bytes, **asdict(written)}


def results_path(shape: Shape) -> Path:
    """Where results go: fewer experts do not overwrite those of the whole model."""
    whole = shape.experts == NLLB_54B.experts
    return RESULTS / ("nllb54b.json" if whole else f"nllb54b-{shape.experts}.json")


@app.command()
def main(
    experts: Annotated[int, typer.Option(min=4, help="experts a sparse layer; the model has 128")] = 128,
    folder: Annotated[
        Path | None, typer.Option(help="of the checkpoint, kept and resumed [default: a temporary one, removed]")
    ] = None,
    budget: Annotated[str, typer.Option(help="memory for experts, as 12GiB or 25%")] = "25%",
    prefetch: Annotated[str, typer.Option(help="auto, off, previous or router; see the option of that name")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="sentences at once")] = 8,
    source_tokens: Annotated[int, typer.Option(min=1, help="tokens of each source sentence")] = 24,
    new_tokens: Annotated[int, typer.Option(min=2, help="tokens generated for each sentence")] = 24,
    rounds: Annotated[int, typer.Option(min=1, help="translations; the first starts with no expert in memory")] = 2,
    threads: Annotated[int | None, typer.Option(min=1, help="that compute [default: cores]")] = None,
    seed: Annotated[int, typer.Option(help="of the weights")] = 6182,
    quick: Annotated[bool, typer.Option("--quick", help="a tiny model: shows that all runs, measures nothing")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="where results go [default: results/nllb54b.json, none if quick]")
    ] = None,
) -> None:
    """Translate with a model of NLLB-MoE-54B's shape whose experts do not fit into memory."""
    console = Console()
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    plan = Plan(
        shape=replace(QUICK, layers=4) if quick else replace(NLLB_54B, experts=experts),
        case=Case(batch, source_tokens, new_tokens),
        budget=budget,
        prefetch=prefetch,
        rounds=rounds,
        threads=threads or usable_cores(),
        seed=seed,
    )
    try:
        facts, found = measure(plan, folder, console)
    except (FolderError, RunError, OptionError) as error:
        raise typer.BadParameter(str(error)) from error
    target = json_file or (None if quick else results_path(plan.shape))
    if target is not None:
        rows = found.pop("rows")
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        versions = {"transformers": transformers.__version__}
        write_results(target, versions, asdict(plan), rows, checkpoint=facts, memory_bytes=memory, run=found)
        console.print(f"written to {target}")


if __name__ == "__main__":
    # Told to stop, leave through the context managers: the checkpoint in a temporary folder is large.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app()
