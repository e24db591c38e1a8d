"""Paper 2.4: the largest batch, and the highest throughput, that each gating reaches in the same memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fairseq_moe_opt.reproduction.config import DECODER, ENCODER, LM, PHASES
from fairseq_moe_opt.reproduction.context import Context
from fairseq_moe_opt.reproduction.drawing import COLOURS, GIB, new_figure
from fairseq_moe_opt.reproduction.memory import available_bytes
from fairseq_moe_opt.reproduction.models import DYNAMIC, STATIC
from fairseq_moe_opt.reproduction.results import AT_LEAST, Line, PaperValue, Section, times
from fairseq_moe_opt.reproduction.search import (
    BUDGET,
    END,
    MACHINE,
    Found,
    Point,
    batches_around,
    best_within,
    gain_within,
    largest_batch,
    largest_within,
)
from fairseq_moe_opt.reproduction.workload import Workload
from fairseq_moe_opt.sizes import readable

NAME, TITLE = "throughput", "Largest batch and maximum throughput in the same memory"

PAPER: Mapping[str, Mapping[str, PaperValue]] = {
    "batch": {
        LM: PaperValue("8x (8 to 64)", "V, 1 node", 8.0, AT_LEAST),
        ENCODER: PaperValue("2x (48 to 96)", "V, 1 node", 2.0, AT_LEAST),
        DECODER: PaperValue("2x (48 to 96)", "V, 1 node", 2.0, AT_LEAST),
    },
    "one node": {
        LM: PaperValue("6.21x", "V, 1 node", 6.21, AT_LEAST),
        ENCODER: PaperValue("5.75x", "V, 1 node", 5.75, AT_LEAST),
        DECODER: PaperValue("2.58x", "V, 1 node", 2.58, AT_LEAST),
    },
    "nodes": {
        LM: PaperValue("11.55x", "V, 2 and 4 nodes, the best", 11.55, AT_LEAST),
        ENCODER: PaperValue("10.98x", "V, 2 and 4 nodes, the best", 10.98, AT_LEAST),
        DECODER: PaperValue("5.71x", "V, 2 and 4 nodes, the best", 5.71, AT_LEAST),
    },
}

_STOPPED: Mapping[str, str] = {
    BUDGET: "the budget",
    END: "the largest batch tried",
    MACHINE: "this machine's memory",
}


@dataclass(frozen=True)
class Side:
    """One gating: what its search found, and its points, timed where they fit."""

    found: Found
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Ladder:
    """Both gatings of one phase, with ``budget`` bytes for activations beside ``weights`` bytes."""

    workload: Workload
    budget: int
    weights: int
    sides: Mapping[str, Side]

    @property
    def gain(self) -> float | None:
        """Best throughput of dynamic over static gating within the budget."""
        return gain_within(self.sides[DYNAMIC].points, self.sides[STATIC].points, self.budget)

    def best(self, side: str) -> Point | None:
        """Of one side, within the budget."""
        return best_within(self.sides[side].points, self.budget)


def measure(context: Context) -> Section:
    """Search the largest batch of each gating, time every batch that fits, and compare the best ones."""
    ladders = {phase: _climb(context, context.workload(phase)) for phase in PHASES}
    lines = [line for phase, ladder in ladders.items() for line in _lines(phase, ladder)]
    return Section(
        NAME,
        TITLE,
        "Random weights; experts get the shares of a synthetic trace. The budget is the bytes of the weights times the "
        "paper's quotient of device memory and weights, which was fixed before measuring. Activations of each batch "
        "are counted by torch's profiler; the largest batch is searched for; at each batch that fits, both gatings "
        "take turns. Maximum throughput is that of a gating's best batch, which need not be its largest.",
        tuple(lines),
        tuple(_note(phase, ladder) for phase, ladder in ladders.items()),
        {phase: _as_data(ladder) for phase, ladder in ladders.items()},
    )


def _climb(context: Context, workload: Workload) -> Ladder:
    scale, budget = context.plan.scale, workload.activation_budget
    batches = batches_around(workload.paper.batch, scale.most_batches)
    found = {}
    for side in (STATIC, DYNAMIC):

        def peak(batch: int, side: str = side) -> int:
            context.say(f"{workload.phase}: memory of {side} gating at batch {batch}")
            return workload.peak(side, batch)

        found[side] = largest_batch(peak, batches, budget, available=available_bytes)
    context.say(f"{workload.phase}: comparing outputs")
    workload.compare(min(workload.paper.batch, found[STATIC].largest or 1))
    points: dict[str, list[Point]] = {STATIC: [], DYNAMIC: []}
    for batch in sorted({batch for one in found.values() for batch in one.peaks}):
        able = [side for side in (STATIC, DYNAMIC) if batch in found[side].peaks and batch <= found[side].largest]
        for side in found:
            if batch in found[side].peaks:
                points[side].append(Point(batch, workload.shape.tokens(batch), found[side].peaks[batch]))
        if not able:
            continue
        context.say(f"{workload.phase}: timing batch {batch}")
        for side, timing in workload.time(able, batch, scale.rounds, scale.seconds).items():
            points[side][-1] = replace(points[side][-1], seconds=timing.median, sparse_seconds=timing.sparse)
    sides = {side: Side(one, tuple(points[side])) for side, one in found.items()}
    return Ladder(workload, budget, workload.static.total, sides)


def _lines(phase: str, ladder: Ladder) -> Iterator[Line]:
    static, dynamic = ladder.sides[STATIC], ladder.sides[DYNAMIC]
    title, setting = ladder.workload.title, f"{readable(ladder.budget + ladder.weights)}; {ladder.workload.describe()}"
    if static.found.largest == 0 or ladder.gain is None:
        why = "static gating does not fit into the budget with a single sequence"
        yield Line(f"{title}: maximum throughput", setting, PAPER["nodes"][phase], "no batch fits", None, False, why)
        return
    more = dynamic.found.largest / static.found.largest
    at_least = "" if dynamic.found.stopped_by == BUDGET else "at least "
    yield Line(
        f"{title}: largest batch, dynamic over static gating",
        setting,
        PAPER["batch"][phase],
        f"{at_least}{times(more)} ({static.found.largest} to {dynamic.found.largest})",
        more,
        why=f"dynamic gating was stopped by {_STOPPED[dynamic.found.stopped_by]}",
    )
    best, theirs = ladder.best(DYNAMIC), ladder.best(STATIC)
    if best is None or theirs is None or best.seconds is None:
        return
    rest = 1 - best.sparse_seconds / best.seconds
    for nodes in ("one node", "nodes"):
        yield Line(
            f"{title}: maximum throughput, dynamic over static gating",
            setting,
            PAPER[nodes][phase],
            f"{times(ladder.gain)} ({theirs.tokens_per_second:,.0f} to {best.tokens_per_second:,.0f} tokens/s, "
            f"batch {theirs.batch} and {best.batch})",
            ladder.gain,
            why=f"{rest:.0%} of a forward with dynamic gating is outside of sparse layers, which gating leaves alone",
        )


def _note(phase: str, ladder: Ladder) -> str:
    one, other = (largest_within(ladder.sides[side].points, ladder.budget) for side in (DYNAMIC, STATIC))
    if one is None or other is None:
        return f"{ladder.workload.title}: nothing to compare within the budget."
    gain = one.tokens_per_second / other.tokens_per_second
    return (
        f"{ladder.workload.title}: each at its largest batch ({other.batch} and {one.batch}) instead of its best, "
        f"dynamic gating has {times(gain)} the throughput. Budget: {readable(ladder.weights)} of weights x "
        f"{ladder.workload.paper.budget_ratio:.3f}, of which {readable(ladder.budget)} for activations."
    )


def _as_data(ladder: Ladder) -> dict[str, Any]:
    return {
        "title": ladder.workload.title,
        "budget": ladder.budget,
        "weights": ladder.weights,
        "gain": ladder.gain,
        "points": {side: [asdict(point) for point in one.points] for side, one in ladder.sides.items()},
        "stopped_by": {side: one.found.stopped_by for side, one in ladder.sides.items()},
        "curve": curve(ladder.sides[STATIC].points, ladder.sides[DYNAMIC].points, ladder.budget),
    }


def curve(static: Sequence[Point], dynamic: Sequence[Point], budget: int) -> list[dict[str, float]]:
    """Gain at every budget up to ``budget`` at which either side gets a larger batch."""
    sizes = sorted({point.peak_bytes for point in (*static, *dynamic) if point.peak_bytes <= budget} | {budget})
    gains = ((size, gain_within(dynamic, static, size)) for size in sizes)
    return [{"budget": size, "gain": gain} for size, gain in gains if gain is not None]


def draw(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Throughput over activation bytes, then the gain over the budget."""
    figure = new_figure(11, 3.6)
    for axes, phase in zip(figure.subplots(1, len(PHASES)), PHASES, strict=True):
        one = data[phase]
        for side in (STATIC, DYNAMIC):
            timed = [point for point in one["points"][side] if point["seconds"]]
            sizes = [point["peak_bytes"] / GIB for point in timed]
            axes.plot(sizes, [p["tokens"] / p["seconds"] for p in timed], ".-", color=COLOURS[side], label=side)
        axes.axvline(one["budget"] / GIB, color="k", linestyle=":", label="budget")
        axes.set(xscale="log", yscale="log", xlabel="GiB of activations", ylabel="tokens a second")
        gain = "no batch fits" if one["gain"] is None else f"{times(one['gain'])} within the budget"
        axes.set_title(f"{one['title']}: {gain}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    yield "throughput.png", figure
    figure = new_figure(7, 3.8)
    axes = figure.subplots()
    for phase in PHASES:
        one = data[phase]
        sizes = [(row["budget"] + one["weights"]) / one["weights"] for row in one["curve"]]
        axes.step(sizes, [row["gain"] for row in one["curve"]], where="post", marker=".", label=one["title"])
    axes.set(xlabel="budget over bytes of weights", ylabel="maximum throughput, dynamic over static", ylim=(0, None))
    axes.set_title("What dynamic gating gains at every budget up to the paper's")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    yield "budgets.png", figure
