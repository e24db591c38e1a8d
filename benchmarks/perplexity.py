"""What a capacity costs a language model: perplexity on held-out text with static gating, and with dynamic gating.

    python benchmarks/perplexity.py TEXT... [--model FOLDER] [--fraction 0.05]

Static gating drops the tokens that find their expert full; dynamic gating with the checkpoint's rule drops the same
ones, and without it none. Texts (``.xz`` files too) are cut into blocks, as in training: a paragraph a line, an end
token after each, blocks of so many tokens, and all tokens of a batch compete for the same places. Logits of static and
dynamic gating are compared before anything is timed.
"""

from __future__ import annotations

import lzma
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from _machine import usable_cores, write_results
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_integration
from fairseq_moe_opt.errors import MoEError

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "language_model" / "model"
RESULTS = ROOT / "benchmarks" / "results" / "perplexity.json"
TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, of two gatings that drop the same tokens."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Side:
    """One way to run the model: options of ``optimize``, and the capacity as a fraction of a batch's tokens."""

    name: str
    gating: str
    fraction: float | None

    @property
    def options(self) -> dict[str, str]:
        """For ``optimize``."""
        return {"gating": self.gating, "capacity": "none" if self.fraction is None else "checkpoint"}


@dataclass(frozen=True)
class Row:
    """One side.

    Attributes:
        side: its name.
        fraction: of a batch's tokens, which one expert takes; None for all.
        perplexity: per piece of the vocabulary.
        dropped: share of the routed rows that no expert computed.
        tokens_per_second: median over batches.
    """

    side: str
    fraction: float | None
    perplexity: float
    dropped: float
    tokens_per_second: float


def sides_of(fractions: Sequence[float]) -> list[Side]:
    """Static and dynamic gating at every fraction, and dynamic gating without a capacity."""
    found = [Side(f"{gating} gating", gating, one) for one in fractions for gating in ("static", "dynamic")]
    return [*found, Side("dynamic gating", "dynamic", None)]


def paragraphs(path: Path) -> Iterator[str]:
    """The lines that hold something."""
    opened: Callable[..., Any] = lzma.open if path.suffix == ".xz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        yield from (line.strip() for line in lines if line.strip())


def blocks_of(texts: Sequence[Path], tokenizer: Any, length: int, batch: int, batches: int) -> list[Tensor]:
    """``batches`` of (B, T) ids, as many whole ones as the texts give; the end token is in front of the first."""
    end, ids = tokenizer.eos_token_id, [tokenizer.eos_token_id]
    wanted = batches * batch * length + 1
    for path in texts:
        for paragraph in paragraphs(path):
            ids += [*tokenizer(paragraph, add_special_tokens=False, verbose=False)["input_ids"], end]
            if len(ids) >= wanted:
                break
    count = (len(ids) - 1) // (batch * length)
    if count == 0:
        raise typer.BadParameter(f"the texts have {len(ids)} tokens, a batch needs {batch * length + 1}")
    # Each block has one token more: what follows its last one.
    starts = range(0, min(count, batches) * batch * length, length)
    rows = [ids[start : start + length + 1] for start in starts]
    return [torch.tensor(rows[at : at + batch]) for at in range(0, len(rows), batch)]


@dataclass(frozen=True)
class Outcome:
    """What one side made of the batches; ``first`` are the first batch's logits."""

    row: Row
    first: Tensor


def run(model: Any, side: Side, batches: Sequence[Tensor]) -> Outcome:
    """Score every batch."""
    if side.fraction is not None:
        model.config.eval_capacity_token_fraction = side.fraction
    handle = hf_integration.optimize(model, **side.options)
    losses, seconds, first = [], [], torch.empty(0)
    try:
        with torch.inference_mode():
            model(input_ids=batches[0][:, :-1], use_cache=False)
            handle.reset()
            for number, batch in enumerate(batches):
                begin = time.perf_counter()
                logits = model(input_ids=batch[:, :-1], use_cache=False).logits
                seconds.append(time.perf_counter() - begin)
                losses.append(float(functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())))
                first = logits.clone() if number == 0 else first
        report = handle.report()
    finally:
        handle.undo()
    dropped, routed = (sum(getattr(layer, name) for layer in report.layers) for name in ("dropped_rows", "routed_rows"))
    row = Row(
        side=side.name,
        fraction=side.fraction,
        perplexity=math.exp(sum(losses) / len(losses)),
        dropped=dropped / max(routed, 1),
        tokens_per_second=batches[0][:, 1:].numel() / median(seconds),
    )
    return Outcome(row, first)


def require_equal(static: Outcome, dynamic: Outcome) -> None:
    """Raise MoEError when two gatings that drop the same tokens differ by more than rounding."""
    difference = float((static.first - dynamic.first).abs().max() / static.first.abs().max())
    if difference > TOLERANCE:
        raise MoEError(f"static and dynamic gating at fraction {static.row.fraction} differ by {difference:.2g}")


def table_of(rows: Sequence[Row]) -> Table:
    """A line a side."""
    table = Table(title="perplexity on held-out text")
    table.add_column("side")
    for heading in ("capacity", "perplexity", "dropped", "tokens a second"):
        table.add_column(heading, justify="right")
    for row in rows:
        capacity = "none" if row.fraction is None else f"{row.fraction:g}"
        table.add_row(
            row.side, capacity, f"{row.perplexity:.2f}", f"{row.dropped:.1%}", f"{row.tokens_per_second:,.0f}"
        )
    return table


@app.command()
def main(
    texts: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="held-out text, a paragraph a line")],
    model: Annotated[Path, typer.Option(help="folder of a language model with its tokenizer")] = MODEL,
    fraction: Annotated[list[float], typer.Option(help="capacities, as fractions of a batch's tokens")] = [0.05, 0.25],  # noqa: B006 - typer copies it
    length: Annotated[int, typer.Option(min=2, help="tokens of a block")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="blocks at once")] = 16,
    batches: Annotated[int, typer.Option(min=1, help="most batches to score")] = 16,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads [default: cores]")] = None,
    json_file: Annotated[Path, typer.Option("--json", help="where results go")] = RESULTS,
) -> None:
    """Score the texts with static and dynamic gating at every capacity, and with dynamic gating without one."""
    console = Console()
    torch.set_num_threads(threads or usable_cores())
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    blocks = blocks_of(texts, tokenizer, length, batch_size, batches)
    outcomes = [run(loaded, side, blocks) for side in sides_of(fraction)]
    for static, dynamic in zip(outcomes[0:-1:2], outcomes[1:-1:2], strict=True):
        require_equal(static, dynamic)
    rows = [outcome.row for outcome in outcomes]
    console.print(table_of(rows))
    arguments = {"length": length, "batch_size": batch_size, "batches": len(blocks), "threads": torch.get_num_threads()}
    write_results(json_file, {"transformers": version("transformers")}, arguments, [asdict(row) for row in rows])
    console.print(f"written to {json_file}")


if __name__ == "__main__":
    app()
