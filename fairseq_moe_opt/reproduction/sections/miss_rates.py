"""Paper 3.3: misses of expert caches by policy and size, before and after experts are placed anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

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
        found = curves(history, ranks)
        data[kind] = {"ranks": ranks, "experts": history.num_experts, "curves": found}
        lines += _lines(kind, history, ranks, found, plan.cache_slots)
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


def curves(history: LoadHistory, ranks: int) -> Curves:
    """Miss rates of the worst layer at 1, 2, ... slots."""
    first, second = history.halves()
    cluster = Cluster.even(ranks, history.num_experts)
    sizes = range(1, history.num_experts // ranks + 1)
    found = {}
    for strategy in (BEFORE, AFTER):
        placement = place(first, cluster, strategy)
        found[strategy] = {
            policy: [worst_layer(second, placement, slots, policy) for slots in sizes] for policy in POLICIES
        }
    return found


def worst_layer(history: LoadHistory, placement: Placement, slots: int, policy: str) -> float:
    """The miss rate of the layer with the highest, over all devices."""
    layers = history.layers
    return max(simulate_ranks(visits_of(history, name), placement, slots, policy).overall for name in layers)


def _lines(kind: str, history: LoadHistory, ranks: int, found: Curves, slots: int) -> Iterator[Line]:
    setting = f"{LABELS[kind]}: MT decoder, E {history.num_experts}, {ranks} devices, {len(history.layers)} layers"
    before, after = found[BEFORE], found[AFTER]
    sizes = len(before[LIFO])
    lower = sum(one < other for one, other in zip(after[LIFO], before[LIFO], strict=True))
    higher = [n + 1 for n in range(sizes) if after[LIFO][n] > before[LIFO][n]]
    yield Line(
        f"{kind}: anti-correlation placement, LIFO",
        setting,
        PAPER["placement"],
        f"lower at {lower} of {sizes} sizes, higher at {len(higher)}",
        holds=not higher and lower > 0,
        why=f"higher at {', '.join(map(str, higher))} slots, by {_most(after[LIFO], before[LIFO]):.3f} at most",
    )
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
    ours = _most(after[DEFAULT_POLICY], after[BELADY])
    yield Line(
        f"{kind}: LIFO with re-placement against Belady's MIN",
        setting,
        PAPER["belady"],
        f"{gap:.3f} more misses at most; {ours:.3f} with {DEFAULT_POLICY}",
        holds=gap <= CLOSE,
        why=f"largest gap at {_where(after[LIFO], after[BELADY])} slots",
    )
    if sizes >= slots:
        rates = ", ".join(f"{n}: {before[LIFO][n - 1]:.3f}" for n in (1, 5, slots, sizes))
        yield Line(f"{kind}: LIFO by slots", setting, PAPER["knee"], rates)


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
            for policy, rates in one["curves"][strategy].items():
                style = "k--" if policy == BELADY else ".-"
                axes.plot(range(1, len(rates) + 1), [100 * rate for rate in rates], style, label=policy)
            axes.set_title(f"{kind} trace, {strategy}, {one['ranks']} devices", fontsize=10)
            axes.set(xlabel="slots a device and layer", ylim=(0, None))
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("misses, % of experts asked for")
    grid[0][0].legend(frameon=False, fontsize=8)
    yield "miss_rates.png", figure
