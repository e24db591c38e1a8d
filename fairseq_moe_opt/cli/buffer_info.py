"""What ``moe-opt info`` says of buffering: what a budget keeps resident, and the paper's static-memory table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from fairseq_moe_opt.cli.info import CheckpointInfo
from fairseq_moe_opt.errors import CheckpointError
from fairseq_moe_opt.sizes import num_slots, readable

if TYPE_CHECKING:
    from fairseq_moe_opt.buffering import StaticMemory
    from fairseq_moe_opt.moe.trace import Trace

_ITEM_BYTES = 2
"""The table's: 16-bit weights, as in the paper."""


@dataclass(frozen=True)
class BufferPlan:
    """What a budget for experts means for a checkpoint, at the dtype it is stored in.

    Attributes:
        slots: experts that are resident together, of ``experts`` in all.
        slot_bytes: of one expert.
        nbytes: of all slots.
        smallest: bytes of the smallest budget.
        miss_rate: of the decoder in the second half of the trace; None without one.
        bytes_per_token: read for each token that the decoder computes there; None without a trace.
    """

    slots: int
    experts: int
    slot_bytes: int
    nbytes: int
    smallest: int
    miss_rate: float | None = None
    bytes_per_token: float | None = None


def plan_buffer(info: CheckpointInfo, memory: str, trace: Path | None) -> BufferPlan:
    """The slots that ``memory`` gives, and what the trace foretells for them.

    Raises OptionError when there is not one slot, CheckpointError when the trace is of another model.
    """
    if not info.layers:
        raise CheckpointError(info.path, "has no Mixture-of-Experts layers, so there is nothing to buffer")
    slot_bytes = max(layer.slot_bytes for layer in info.layers)
    experts = sum(layer.num_experts for layer in info.layers)
    slots = num_slots("expert_memory", memory, experts * slot_bytes, slot_bytes, at_least=1, at_most=experts)
    miss_rate, bytes_per_token = (None, None) if trace is None else _steady_state(info, trace, slots, slot_bytes)
    return BufferPlan(slots, experts, slot_bytes, slots * slot_bytes, slot_bytes, miss_rate, bytes_per_token)


def require_same_layers(trace: Trace, path: Path, info: CheckpointInfo) -> None:
    """CheckpointError unless the trace in ``path`` is of a model with the checkpoint's layers.

    Names are not compared: they differ between fairseq and Transformers, whose traces speak of the same experts.
    """
    layers = ([(one.phase, one.num_experts) for one in layers] for layers in (trace.layers, info.layers))
    if len({tuple(sorted(one)) for one in layers}) != 1:
        raise CheckpointError(path, f"was recorded from another model than {info.path}: their layers differ")


def _steady_state(info: CheckpointInfo, path: Path, slots: int, slot_bytes: int) -> tuple[float, float]:
    """Miss rate and bytes a token of the decoder in the second half of the trace, with the default policy."""
    from fairseq_moe_opt.moe.trace import read_trace

    trace = read_trace(path)
    require_same_layers(trace, path, info)
    half = len(trace.visits) // 2
    before, after = (_decoder_counts(trace, end, slots) for end in (half, len(trace.visits)))
    misses, asked_for = after[0] - before[0], after[1] - before[1]
    layers = [layer.name for layer in trace.layers if layer.phase == "decoder"]
    tokens = sum(visit.tokens for visit in trace.visits[half:] if layers and visit.layer == layers[0])
    if not tokens:
        raise CheckpointError(path, "has no decoder forwards in its second half: record a longer one")
    return misses / asked_for, misses * slot_bytes / tokens


def _decoder_counts(trace: Trace, end: int, slots: int) -> tuple[int, int]:
    """Misses, and experts asked for, of the decoder's layers in the first ``end`` visits."""
    from fairseq_moe_opt.buffering import DEFAULT_POLICY, simulate

    decoder = {layer.name for layer in trace.layers if layer.phase == "decoder"}
    found = [layer for name, layer in simulate(trace.visits[:end], slots, DEFAULT_POLICY).items() if name in decoder]
    misses = sum(layer.misses for layer in found)
    return misses, misses + sum(layer.hits for layer in found)


def render_plan(plan: BufferPlan, console: Console) -> None:
    """Print ``plan`` for a reader."""
    console.print(
        f"experts in {readable(plan.nbytes)}: {plan.slots} of {plan.experts} resident "
        f"({plan.slots / plan.experts:.0%}), {readable(plan.slot_bytes)} each; "
        f"the smallest possible is {plan.smallest} bytes",
        highlight=False,
    )
    if plan.miss_rate is not None and plan.bytes_per_token is not None:
        console.print(
            f"by the trace, {plan.miss_rate:.1%} of the experts the decoder asks for are not there: "
            f"{readable(round(plan.bytes_per_token))} are read a token",
            highlight=False,
        )


def static_memory_tables(path: Path, ranks: int) -> dict[str, tuple[StaticMemory, ...]]:
    """The table with slots in the decoder's layers alone, as in the paper, and in all layers; from ``config.json``."""
    from fairseq_moe_opt.buffering import static_memory
    from hf_integration.footprint import model_sizes

    dense_bytes, layers = model_sizes(path.parent if path.name == "config.json" else path, _ITEM_BYTES)
    return {
        "decoder": static_memory(dense_bytes, layers, ranks),
        "all": static_memory(dense_bytes, layers, ranks, ("encoder", "decoder")),
    }


def render_static_memory(
    tables: Mapping[str, Sequence[StaticMemory]], ranks: int, console: Console, *, as_json: bool
) -> None:
    """Print the tables for a reader, or as JSON."""
    if as_json:
        console.file.write(json.dumps({name: [asdict(row) for row in rows] for name, rows in tables.items()}) + "\n")
        return
    title = f"weights on each of {ranks} devices, 16 bits: slots a layer for experts of the decoder's, or of all layers"
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    for name in ("slots", "decoder", "saved", "less", "all layers", "saved", "less"):
        table.add_column(name, justify="right", no_wrap=True)
    for one, other in zip(tables["decoder"], tables["all"], strict=True):
        table.add_row(str(one.slots), *_cells(one), *_cells(other))
    console.print(table)


def _cells(row: StaticMemory) -> tuple[str, str, str]:
    return f"{row.nbytes / 2**30:.3f} GiB", f"{row.saved / 2**30:.3f} GiB", f"{row.ratio:.3f}x"
