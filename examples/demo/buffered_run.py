"""The demo's buffered run: a language once more with memory for a quarter of the experts, and what the cache did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fairseq_moe_opt.moe.report import Report
from fairseq_moe_opt.sizes import readable
from hf_integration import from_pretrained
from hf_integration.translate import translate_lines

BUDGET = "25%"


@dataclass(frozen=True)
class Translation:
    """Sentences to translate again, how, and what they became with all experts in memory."""

    model: Path
    sentences: Sequence[str]
    source: str
    target: str
    num_beams: int
    batch_size: int
    expected: Sequence[str]


def compare(console: Console, work: Translation, tokenizer: Any) -> bool:
    """Translate with ``BUDGET`` and show what the cache did; whether it reads the same."""
    model: Any = from_pretrained(work.model, dtype="float32", expert_memory=BUDGET)
    lines = translate_lines(
        model,
        tokenizer,
        work.sentences,
        work.source,
        work.target,
        batch_size=work.batch_size,
        generation={"num_beams": work.num_beams},
    )
    agree = list(lines) == list(work.expected)
    report = model.moe.report()
    show_cache(console, report, work.target)
    if agree:
        console.print(f"buffered and resident experts gave the same translations ({report.seconds:.1f} s)\n")
    else:
        console.print("buffered and resident experts DISAGREE", style="bold red")
    return agree


def show_cache(console: Console, report: Report, target: str) -> None:
    """Hits, misses, bytes and waiting of every layer."""
    buffer = report.buffer
    if buffer is None:
        raise TypeError("a model loaded with a budget has a buffer")
    memory = readable(buffer.arena_bytes)
    title = f"{buffer.slots} of {buffer.experts} experts in memory ({memory}), policy {buffer.policy}, {target}"
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    for name in ("layer", "hits", "misses", "miss rate", "read", "waited"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for layer in report.layers:
        if (cache := layer.cache) is not None:
            table.add_row(
                layer.name.removeprefix("model."),
                f"{cache.hits:,}",
                f"{cache.misses:,}",
                f"{cache.miss_rate:.1%}",
                readable(sum(cache.bytes_read.values())),
                f"{cache.stall_seconds:.2f} s",
            )
    console.print(table)
