"""Paper 1.5: who is asked for: idle experts, hot ones, and whether they are the same in the next batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fairseq_moe_opt.placement import LoadHistory
from fairseq_moe_opt.reproduction.config import DECODER, ENCODER, LM, PHASES, TITLES
from fairseq_moe_opt.reproduction.context import Context
from fairseq_moe_opt.reproduction.drawing import new_figure
from fairseq_moe_opt.reproduction.results import Line, PaperValue, Section
from fairseq_moe_opt.reproduction.traces import DEMO, LABELS, SYNTHETIC, recorded, synthetic

NAME, TITLE = "activation", "Expert activation"
HOT_SHARE = 0.1
"""Experts that count as hot: the tenth with most rows."""
DRAWN_BATCHES = 64

PAPER: Mapping[str, Mapping[str, PaperValue]] = {
    "idle": {
        LM: PaperValue("almost none", "III, Fig. 7"),
        ENCODER: PaperValue("almost none", "III, Fig. 7"),
        DECODER: PaperValue("about 75%", "III, Fig. 7", 75.0),
    },
    "largest": {
        LM: PaperValue("a few hot ones in every batch", "III, Fig. 6"),
        ENCODER: PaperValue("almost half of a batch", "III, Fig. 6", 50.0),
        DECODER: PaperValue("almost half of a batch", "III, Fig. 6", 50.0),
    },
    "again": {phase: PaperValue("the same ones in the next batch", "III, Fig. 6") for phase in PHASES},
}


@dataclass(frozen=True)
class Activity:
    """Means over layers, in percent.

    Attributes:
        idle: of the experts, without a row in a batch.
        largest: share of a batch that one expert got, at most.
        hottest: share of all rows that the hottest tenth of experts got.
        again: of the experts active in a batch, active in the next one too.
        active: of the experts, in a batch: what ``again`` would be without memory.
    """

    idle: float
    largest: float
    hottest: float
    again: float
    active: float


def measure(context: Context) -> Section:
    """Statistics of synthetic traces and of the demo's."""
    sources = {SYNTHETIC: {phase: synthetic(context.plan, phase) for phase in PHASES}, DEMO: recorded(context.demo)}
    lines: list[Line] = []
    data: dict[str, Any] = {"demo": bool(sources[DEMO]), "activity": {}, "maps": {}}
    for kind, histories in sources.items():
        for phase, history in histories.items():
            found = activity_of(history)
            lines += _lines(kind, phase, history, found)
            data["activity"][f"{kind} {phase}"] = asdict(found)
            data["maps"][f"{kind} {phase}"] = _map(history)
    return Section(
        NAME,
        TITLE,
        "The paper's traces are not public. What was drawn with their statistics shows that the statistics are met; "
        "what was recorded is real, of a small model.",
        tuple(lines),
        () if sources[DEMO] else ("No demo checkpoint was given, so there is no recorded trace.",),
        data,
    )


def activity_of(history: LoadHistory) -> Activity:
    """Statistics of ``history``."""
    layers = []
    for name, counts in history.layers.items():
        active, shares = counts > 0, history.shares(name)
        hot = np.sort(shares.mean(axis=0))[::-1][: max(1, round(HOT_SHARE * history.num_experts))]
        before = active[:-1].sum()
        again = (active[1:] & active[:-1]).sum() / before if before else 0.0
        layers.append([1 - active.mean(), shares.max(), hot.sum(), again, active.mean()])
    return Activity(*(float(100 * value) for value in np.mean(layers, axis=0)))


def _lines(kind: str, phase: str, history: LoadHistory, found: Activity) -> list[Line]:
    batches = max(len(counts) for counts in history.layers.values())
    setting = f"{LABELS[kind]}: E {history.num_experts}, {len(history.layers)} layers, {batches} batches"
    title = f"{TITLES[phase]}, {kind}"
    again = f"{found.again:.0f}% of active experts are active again; {found.active:.0f}% would be by chance"
    return [
        Line(f"{title}: idle experts", setting, PAPER["idle"][phase], f"{found.idle:.1f}%", found.idle),
        Line(
            f"{title}: largest share of a batch",
            setting,
            PAPER["largest"][phase],
            f"{found.largest:.0f}%; the hottest tenth gets {found.hottest:.0f}% of all rows",
            found.largest,
        ),
        Line(f"{title}: persistence", setting, PAPER["again"][phase], again),
    ]


def _map(history: LoadHistory) -> list[list[float]]:
    shares = history.shares(next(iter(history.layers)))[:DRAWN_BATCHES]
    return [[round(float(value), 4) for value in row] for row in shares]


def draw(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Heat maps, batch by expert, each on the scale of its own hottest expert."""
    names = list(data["maps"])
    columns = 3
    rows = -(-len(names) // columns)
    figure = new_figure(11, 2.9 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        shares = 100 * np.asarray(data["maps"][name])
        image = axes.imshow(
            shares, aspect="auto", cmap="magma_r", interpolation="nearest", vmax=np.quantile(shares, 0.995)
        )
        kind, phase = name.split(" ", 1)
        axes.set_title(f"{TITLES[phase]} ({kind}): {data['activity'][name]['idle']:.0f}% idle", fontsize=10)
        axes.set(xlabel="expert", ylabel="batch")
        figure.colorbar(image, ax=axes, label="% of the batch")
    for axes in list(grid.flat)[len(names) :]:
        axes.set_visible(False)
    yield "activation.png", figure
