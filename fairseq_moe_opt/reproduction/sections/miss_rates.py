"""Paper 3.3: misses of expert caches by policy and size, before and after experts are placed anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import numpy as np

from fairseq_moe_opt.buffering import BELADY, DEFAULT_POLICY
from fairseq_moe_opt.placement import Cluster, LoadHistory, Placement, place
from fairseq_moe_opt.rank_caches import simulate_ranks
from fairseq_moe_opt.reproduction.config import DECODER
from fairseq_moe_opt.reproduction.context import Context
from fairseq_moe_opt.reproduction.drawing import new_figure
from fairseq_moe_opt.reproduction.results import Line, PaperValue, Section
from fairseq_moe_opt.reproduction.traces import DEMO, LABELS, SYNTHETIC, recorded, synthetic, visits_of

NAME, TITLE = "miss_rates", "Cache misses by policy, with and without re-placement"
BEFORE, AFTER = "contiguous", "anti-correlation"
LIFO, FIFO = "lifo", "fifo"
POLICIES = tuple(dict.fromkeys((LIFO, FIFO, "lru", "lfu", DEFAULT_POLICY, BELADY)))
DEMO_RANKS = 2
"""So that the demo's few experts leave each device a cache worth looking at."""

PAPER: Mapping[str, PaperValue] = {
    "placement": PaperValue("lower at all sizes", "VI, Fig. 12a"),
    "fifo": PaperValue("LIFO is better", "VI, Fig. 12b"),
    "belady": PaperValue("very close", "VI, Fig. 12b"),
    "knee": PaperValue("falls faster from 5 on, flat from 10 on", "VI, Fig. 12a"),
}
CLOSE = 0.05
"""Miss rates no further apart than this count as very close."""

Curves = Mapping[str, Mapping[str, list[float]]]
"""Placement to policy to miss rates, from one slot on."""


@dataclass(frozen=True)
class Swept:
    """Miss rates of one trace.

    Attributes:
        ranks: devices.
        layers, devices: of the worst layer over all devices, and of the worst device of any layer.
        correlation: placement to the mean correlation of two experts on one device.
        active: experts that a forward asks a device for, in the mean.
    """

    ranks: int
    layers: Curves
    devices: Curves
    correlation: Mapping[str, float]
    active: float


def measure(context: Context) -> Section:
    """Simulate every policy at every size, on the half of the trace that placed nothing."""
    plan = context.plan
    sources = {SYNTHETIC: (synthetic(plan, DECODER), plan.ranks)}
    demo = recorded(context.demo)
    if DECODER in demo:
        sources[DEMO] = (demo[DECODER], DEMO_RANKS)
    lines: list[Line] = []
    data: dict[str, Any] = {}
    for kind, (history, ranks) in sources.items():
        context.say(f"miss rates, {kind} trace")
        found = sweep(history, ranks)
        data[kind] = {"experts": history.num_experts, **asdict(found)}
        lines += _lines(kind, history, found, plan.cache_slots)
    return Section(
        NAME,
        TITLE,
        "Misses over experts asked for, of the worst layer, all devices together: one cache a device and layer, empty "
        "at first, the runtime's own policies. The first half of each trace places, the second is simulated.",
        tuple(lines),
        (
            f"The paper does not look at lru, lfu and {DEFAULT_POLICY} (this project's default); its curves are "
            "pictures, so statements are compared, not numbers.",
        ),
        data,
    )


def sweep(history: LoadHistory, ranks: int) -> Swept:
    """Miss rates at 1, 2, ... slots, by both placements and every policy."""
    first, second = history.halves()
    cluster = Cluster.even(ranks, history.num_experts)
    placements = {strategy: place(first, cluster, strategy) for strategy in (BEFORE, AFTER)}
    sizes = range(1, history.num_experts // ranks + 1)
    layers, devices = {}, {}
    for strategy, placement in placements.items():
        found = {policy: [worst(second, placement, slots, policy) for slots in sizes] for policy in POLICIES}
        layers[strategy] = {policy: [rate for rate, _ in rates] for policy, rates in found.items()}
        devices[strategy] = {policy: [rate for _, rate in rates] for policy, rates in found.items()}
    together = {strategy: correlation_on_devices(second, placement) for strategy, placement in placements.items()}
    active = mean(float((counts > 0).sum(axis=1).mean()) for counts in second.layers.values()) / ranks
    return Swept(ranks, layers, devices, together, active)


def worst(history: LoadHistory, placement: Placement, slots: int, policy: str) -> tuple[float, float]:
    """The miss rates of the worst layer over all devices, and of the worst device of any layer."""
    found = [simulate_ranks(visits_of(history, name), placement, slots, policy) for name in history.layers]
    return max(one.overall for one in found), max(one.worst for one in found)


def correlation_on_devices(history: LoadHistory, placement: Placement) -> float:
    """Mean Pearson correlation between the shares of two experts on one device, over all layers and devices."""
    found = []
    for name, devices in placement.layers.items():
        shares = history.shares(name)
        used = shares.std(axis=0) > 0
        for experts in devices:
            mine = [expert for expert in experts if used[expert]]
            if len(mine) > 1:
                table = np.corrcoef(shares[:, mine].T)
                found.append(float(table[np.triu_indices(len(mine), 1)].mean()))
    return mean(found) if found else 0.0


def _lines(kind: str, history: LoadHistory, swept: Swept, slots: int) -> Iterator[Line]:
    setting = (
        f"{LABELS[kind]}: MT decoder, E {history.num_experts}, {swept.ranks} devices, {len(history.layers)} layers"
    )
    for which, found in (("worst layer", swept.layers), ("worst device", swept.devices)):
        yield _placement_line(f"{kind}, {which}: anti-correlation placement, LIFO", setting, found, swept)
    before, after = swept.layers[BEFORE], swept.layers[AFTER]
    sizes = len(before[LIFO])
    not_worse = sum(one <= other for one, other in zip(before[LIFO], before[FIFO], strict=True))
    yield Line(
        f"{kind}: LIFO against FIFO",
        setting,
        PAPER["fifo"],
        f"better or equal at {not_worse} of {sizes} sizes",
        holds=not_worse == sizes,
        why=f"where it is not, LIFO misses {_most(before[LIFO], before[FIFO]):.3f} more at most",
    )
    gap = _most(after[LIFO], after[BELADY])
    at = min(slots, sizes)
    yield Line(
        f"{kind}: LIFO with re-placement against Belady's MIN",
        setting,
        PAPER["belady"],
        f"{after[LIFO][at - 1] - after[BELADY][at - 1]:.3f} more misses at {at} slots, {gap:.3f} at most; "
        f"{_most(after[DEFAULT_POLICY], after[BELADY]):.3f} at most with {DEFAULT_POLICY}",
        holds=gap <= CLOSE,
        why=f"the gap is largest at {_where(after[LIFO], after[BELADY])} slots; a forward asks a device for "
        f"{swept.active:.1f} experts in the mean, and MIN alone knows the next forward's",
    )
    rates = ", ".join(f"{n}: {before[LIFO][n - 1]:.3f}" for n in (1, 5, slots, sizes) if n <= sizes)
    yield Line(f"{kind}: LIFO by slots", setting, PAPER["knee"], rates)


def _placement_line(what: str, setting: str, found: Curves, swept: Swept) -> Line:
    before, after = found[BEFORE][LIFO], found[AFTER][LIFO]
    lower = sum(one < other for one, other in zip(after, before, strict=True))
    higher = [n + 1 for n, (one, other) in enumerate(zip(after, before, strict=True)) if one > other]
    return Line(
        what,
        setting,
        PAPER["placement"],
        f"lower at {lower} of {len(before)} sizes, by {_most(before, after):.3f} at most; higher at {len(higher)}",
        holds=not higher and lower > 0,
        why=f"higher at {', '.join(map(str, higher))} slots, by {_most(after, before):.3f} at most; two experts on one "
        f"device correlate by {swept.correlation[BEFORE]:+.3f} in the mean before and {swept.correlation[AFTER]:+.3f} "
        "after, on the half that placed nothing",
    )


def _most(one: list[float], other: list[float]) -> float:
    return max(a - b for a, b in zip(one, other, strict=True))


def _where(one: list[float], other: list[float]) -> int:
    return max(range(len(one)), key=lambda n: one[n] - other[n]) + 1


def draw(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Curves of each placement beside each other, one row a trace."""
    figure = new_figure(10, 3.6 * len(data))
    grid = figure.subplots(len(data), 2, squeeze=False, sharey="row")
    for row, (kind, one) in zip(grid, data.items(), strict=True):
        for axes, strategy in zip(row, (BEFORE, AFTER), strict=True):
            for policy, rates in one["layers"][strategy].items():
                style = "k--" if policy == BELADY else ".-"
                axes.plot(range(1, len(rates) + 1), [100 * rate for rate in rates], style, label=policy)
            axes.set_title(f"{kind} trace, {strategy}, {one['ranks']} devices", fontsize=10)
            axes.set(xlabel="slots a device and layer", ylim=(0, None))
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("misses, % of experts asked for")
    grid[0][0].legend(frameon=False, fontsize=8)
    yield "miss_rates.png", figure
