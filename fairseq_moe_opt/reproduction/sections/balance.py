"""Paper 4.4: how even devices are loaded, placed by the first half of a trace and tested on the second."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from fairseq_moe_opt.placement import DEFAULT_STRATEGY, Cluster, LoadHistory, evaluate, place
from fairseq_moe_opt.reproduction.config import DECODER, ENCODER, LM, PHASES, TITLES
from fairseq_moe_opt.reproduction.context import Context
from fairseq_moe_opt.reproduction.drawing import new_figure
from fairseq_moe_opt.reproduction.results import Line, PaperValue, Section
from fairseq_moe_opt.reproduction.traces import DEMO, LABELS, SYNTHETIC, recorded, synthetic

NAME, TITLE = "balance", "Load balance"
BEFORE, GREEDY, ANTI_CORRELATION = "contiguous", "greedy", "anti-correlation"
STRATEGIES = tuple(dict.fromkeys((BEFORE, GREEDY, ANTI_CORRELATION, DEFAULT_STRATEGY)))
CHOSEN: Mapping[str, str] = {LM: GREEDY, ENCODER: GREEDY, DECODER: ANTI_CORRELATION}
"""The paper's strategy for each phase."""

PAPER: Mapping[str, PaperValue] = {
    LM: PaperValue("both from over 0.6 to under 0.4", "VII, Fig. 14"),
    ENCODER: PaperValue("greedy balances it", "VII, Fig. 14"),
    DECODER: PaperValue("anti-correlation lowers both, in most cases", "VII, Fig. 14"),
}


@dataclass(frozen=True)
class Load:
    """Means over layers: the largest load of any device in any batch, and the mean over batches of the largest."""

    max_load: float
    avg_max_load: float


def measure(context: Context) -> Section:
    """Place by one half, evaluate on the other."""
    plan, lines = context.plan, []
    data: dict[str, Any] = {}
    sources = {SYNTHETIC: {phase: synthetic(plan, phase) for phase in PHASES}, DEMO: recorded(context.demo)}
    for kind, histories in sources.items():
        for phase, history in histories.items():
            loads = loads_of(history, plan.ranks)
            data[f"{kind} {phase}"] = {
                "ideal": 1 / plan.ranks,
                "loads": {name: asdict(load) for name, load in loads.items()},
            }
            lines.append(_line(kind, phase, history, loads, plan.ranks))
    return Section(
        NAME,
        TITLE,
        f"Shares of a batch's rows on the most loaded of {plan.ranks} devices; {1 / plan.ranks:.3f} is even. The first "
        "half of each trace places, the second tests, as in the paper.",
        tuple(lines),
        (
            "The paper's loads are those of its own traces, which are not public; synthetic traces share the "
            "statistics its text gives, and the loads of a plain placement are not among them.",
        ),
        data,
    )


def loads_of(history: LoadHistory, ranks: int) -> dict[str, Load]:
    """Loads by strategy, on the half that placed nothing."""
    first, second = history.halves()
    cluster = Cluster.even(ranks, history.num_experts)
    found = {}
    for name in STRATEGIES:
        layers = evaluate(place(first, cluster, name), second).values()
        found[name] = Load(mean(one.max_load for one in layers), mean(one.avg_max_load for one in layers))
    return found


def _line(kind: str, phase: str, history: LoadHistory, loads: Mapping[str, Load], ranks: int) -> Line:
    before, after, ours = loads[BEFORE], loads[CHOSEN[phase]], loads[DEFAULT_STRATEGY]
    return Line(
        f"{TITLES[phase]}, {kind}: Max Load, Avg Max Load",
        f"{LABELS[kind]}: E {history.num_experts}, {ranks} devices, {len(history.layers)} layers",
        PAPER[phase],
        f"{before.max_load:.3f}, {before.avg_max_load:.3f} to {after.max_load:.3f}, {after.avg_max_load:.3f} with "
        f"{CHOSEN[phase]}; {ours.max_load:.3f}, {ours.avg_max_load:.3f} with {DEFAULT_STRATEGY}",
        holds=after.max_load < before.max_load and after.avg_max_load < before.avg_max_load,
        why=f"{CHOSEN[phase]} changes Max Load by {after.max_load - before.max_load:+.3f} and Avg Max Load by "
        f"{after.avg_max_load - before.avg_max_load:+.3f} on the half it has not seen",
    )


def draw(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Both metrics, by strategy."""
    figure = new_figure(2.4 * len(data) + 1, 3.6)
    for axes, (name, one) in zip(
        figure.subplots(1, len(data), sharey=True, squeeze=False)[0], data.items(), strict=True
    ):
        places = range(len(STRATEGIES))
        axes.bar([p - 0.2 for p in places], [one["loads"][s]["max_load"] for s in STRATEGIES], 0.4, label="Max Load")
        axes.bar(
            [p + 0.2 for p in places], [one["loads"][s]["avg_max_load"] for s in STRATEGIES], 0.4, label="Avg Max Load"
        )
        axes.axhline(one["ideal"], color="k", linestyle=":", label="even")
        axes.set_xticks(places, STRATEGIES, rotation=60, fontsize=8)
        kind, phase = name.split(" ", 1)
        axes.set_title(f"{TITLES[phase]}\n{kind}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("share of a batch on the busiest device")
    figure.axes[0].legend(frameon=False, fontsize=8)
    yield "balance.png", figure
