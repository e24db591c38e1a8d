"""Paper 3.2: weights on a device by slots for experts of the decoder, at the paper's own sizes. Arithmetic alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from fairseq_moe_opt.buffering import LayerSize, StaticMemory, static_memory
from fairseq_moe_opt.reproduction.config import DECODER, ENCODER, FFN_FACTOR, PaperModel, Size, shape_of
from fairseq_moe_opt.reproduction.context import Context
from fairseq_moe_opt.reproduction.drawing import COLOURS, GIB, new_figure
from fairseq_moe_opt.reproduction.results import ABOUT, Line, PaperValue, Section
from fairseq_moe_opt.reproduction.workload import ITEM_BYTES, static_bytes

NAME, TITLE = "static_memory", "Static memory with expert buffering"
HALF_BYTES = 2

PAPER: Mapping[str, PaperValue] = {
    "whole": PaperValue("17.49 GiB", "III, derived from 21.16 and 3.67", 17.49, ABOUT),
    "10 slots": PaperValue("2.25 GB less", "VI", 2.25, ABOUT),
    "1 slot": PaperValue("32.2% less", "VI", 32.2, ABOUT),
    "up to": PaperValue("up to 1.47x", "abstract", 1.47, ABOUT),
}


def measure(context: Context) -> Section:
    """The table of ``moe-opt info --static-memory-table`` for the paper's translation model."""
    rows = {row.slots: row for row in table(context.plan.models["mt"], context.plan.ranks)}
    setting = f"MT at full size, 16 bits, {context.plan.ranks} devices, slots in the decoder's sparse layers"
    most = rows[max(rows)]
    ten, one = rows[context.plan.cache_slots], rows[1]

    def line(what: str, key: str, here: str, number: float) -> Line:
        return Line(what, setting, PAPER[key], here, number)

    return Section(
        NAME,
        TITLE,
        "Arithmetic from the shapes of the paper's translation model (nothing is scaled, nothing is timed).",
        (
            line("weights on a device, all experts there", "whole", f"{most.nbytes / GIB:.2f} GiB", most.nbytes / GIB),
            line(
                f"{ten.slots} slots a layer and device", "10 slots", f"{ten.saved / GIB:.2f} GiB less", ten.saved / GIB
            ),
            line("1 slot", "1 slot", f"{100 * one.saved / most.nbytes:.1f}% less", 100 * one.saved / most.nbytes),
            line("1 slot: times less", "up to", f"{one.ratio:.3f}x", one.ratio),
        ),
        (f"At the {ten.slots} slots for which the paper reports throughput, it is {ten.ratio:.2f}x less, not 1.47x.",),
        {"rows": [asdict(row) for row in rows.values()]},
    )


def table(paper: PaperModel, ranks: int) -> tuple[StaticMemory, ...]:
    """Bytes by slots, at 16 bits."""
    size = Size(paper.width, paper.layers)
    shapes = [shape_of(phase, paper, size) for phase in (ENCODER, DECODER)]
    whole = static_bytes(shapes)
    dense = (whole.total - whole.experts) // ITEM_BYTES * HALF_BYTES
    ffn = FFN_FACTOR * paper.width
    expert = (2 * paper.width * ffn + ffn + paper.width) * HALF_BYTES
    layers = [LayerSize(shape.phase, paper.experts, expert) for shape in shapes for _ in range(shape.sparse_layers)]
    return static_memory(dense, layers, ranks)


def draw(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Bytes over slots."""
    figure = new_figure(6, 3.4)
    axes = figure.subplots()
    rows = sorted(data["rows"], key=lambda row: row["slots"])
    axes.plot([row["slots"] for row in rows], [row["nbytes"] / GIB for row in rows], ".-", color=COLOURS["dynamic"])
    axes.set(xlabel="slots a decoder layer and device", ylabel="GiB of weights on a device", ylim=(0, None))
    axes.set_title(f"One slot a layer takes {rows[0]['ratio']:.2f} times less than all experts")
    axes.spines[["top", "right"]].set_visible(False)
    yield "static_memory.png", figure
