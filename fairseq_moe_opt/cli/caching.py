"""The body of ``moe-opt cache``: a trace through every policy at every size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from fairseq_moe_opt.buffering import BELADY, GLOBAL, POLICIES, POOLS, simulate
from fairseq_moe_opt.cli.buffer_info import require_same_layers
from fairseq_moe_opt.cli.info import inspect_checkpoint
from fairseq_moe_opt.cli.plots import new_figure
from fairseq_moe_opt.errors import CheckpointError, OptionError
from fairseq_moe_opt.moe.trace import Trace, read_trace
from fairseq_moe_opt.sizes import readable

SHARES = (5, 10, 15, 20, 25, 30, 40, 50, 60, 75, 100)
"""Cache sizes in percent of all experts."""

_PHASES = ("encoder", "decoder", "all")


@dataclass(frozen=True)
class SweepRow:
    """One cache size: percent of all experts, slots over all layers, their bytes, and the miss rate of each policy."""

    percent: int
    slots: int
    nbytes: int
    miss_rates: Mapping[str, float]


@dataclass(frozen=True)
class Sweep:
    """Miss rates by size; what they are of is in ``visits`` forwards of ``phase`` over ``pool``."""

    pool: str
    phase: str
    visits: int
    rows: tuple[SweepRow, ...]


def sweep(path: Path, trace_path: Path, pool: str, phase: str) -> Sweep:
    """Simulate the trace at every size of ``SHARES``.

    Raises CheckpointError when the trace is not of the checkpoint or has nothing of the phase, OptionError for a pool
    or phase that does not exist.
    """
    for option, value, known in (("pool", pool, POOLS), ("phase", phase, _PHASES)):
        if value not in known:
            raise OptionError(option, f"{value!r} is not one of {', '.join(known)}")
    trace = read_trace(trace_path)
    info = inspect_checkpoint(path)
    require_same_layers(trace, trace_path, info)
    counted = trace.visits if phase == "all" else trace.phase(phase)
    if not counted:
        raise CheckpointError(trace_path, f"has no forwards of phase {phase!r}")
    rows = tuple(
        _row(trace, percent, pool, phase, max(layer.slot_bytes for layer in info.layers)) for percent in SHARES
    )
    return Sweep(pool, phase, len(counted), rows)


def _row(trace: Trace, percent: int, pool: str, phase: str, slot_bytes: int) -> SweepRow:
    sizes = {layer.name: layer.num_experts for layer in trace.layers}
    shares = {name: max(1, size * percent // 100) for name, size in sizes.items()}
    total = max(1, sum(sizes.values()) * percent // 100) if pool == GLOBAL else sum(shares.values())
    slots = total if pool == GLOBAL else shares
    rates = {policy: _miss_rate(trace, slots, policy, phase) for policy in (*POLICIES, BELADY)}
    return SweepRow(percent, total, total * slot_bytes, rates)


def _miss_rate(trace: Trace, slots: int | Mapping[str, int], policy: str, phase: str) -> float:
    counted = {layer.name for layer in trace.layers if phase in ("all", layer.phase)}
    found = [layer for name, layer in simulate(trace.visits, slots, policy).items() if name in counted]
    misses = sum(layer.misses for layer in found)
    return misses / (misses + sum(layer.hits for layer in found))


def render_sweep(found: Sweep, console: Console) -> None:
    """Print the table, the best policy of each size in bold."""
    where = "one cache for all layers" if found.pool == GLOBAL else "one cache a layer"
    title = f"share of experts asked for that are not there: {where}, {found.visits:,} forwards, phase {found.phase}"
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    for name in ("size", "experts", "bytes", *POLICIES, f"{BELADY} (knows the future)"):
        table.add_column(name, justify="right")
    for row in found.rows:
        best = min(row.miss_rates[policy] for policy in POLICIES)
        cells = [
            f"[bold]{rate:.1%}[/bold]" if rate == best and policy != BELADY else f"{rate:.1%}"
            for policy, rate in row.miss_rates.items()
        ]
        table.add_row(f"{row.percent}%", str(row.slots), readable(row.nbytes), *cells)
    console.print(table)


def sweep_as_json(found: Sweep) -> str:
    """``found`` as JSON."""
    return json.dumps(asdict(found), indent=2)


def draw(found: Sweep, path: Path) -> None:
    """Draw miss rate against size as a PNG; MoEError where matplotlib is not installed."""
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    sizes = [row.percent for row in found.rows]
    for policy in (*POLICIES, BELADY):
        rates = [100 * row.miss_rates[policy] for row in found.rows]
        axes.plot(sizes, rates, "k--" if policy == BELADY else ".-", label=policy)
    axes.set_xlabel("cache size, % of all experts")
    axes.set_ylabel("misses, % of experts asked for")
    axes.set_title(f"{found.pool} pool, phase {found.phase}, {found.visits:,} forwards")
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, format="png", dpi=150)
