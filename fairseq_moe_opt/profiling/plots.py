"""The pictures: each has the finding in its title, units on its axes, and one scale for all that is compared in it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fairseq_moe_opt.errors import MoEError
from fairseq_moe_opt.profiling import findings
from fairseq_moe_opt.profiling.clock import COMPONENTS
from fairseq_moe_opt.profiling.findings import short_name
from fairseq_moe_opt.profiling.profile import InputProfile, Profile
from fairseq_moe_opt.profiling.profiler import LayerFacts
from fairseq_moe_opt.profiling.statistics import DISTANCES, Floats, correlation, heat_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS: Mapping[str, str] = dict(
    zip(
        COMPONENTS,
        ("#cc79a7", "#56b4e9", "#999933", "#666633", "#882255", "#d55e00", "#0072b2", "#e69f00", "#cccccc"),
        strict=True,
    )
)
_INPUT_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
_TALLEST = 24.0


def require_matplotlib() -> None:
    """MoEError where matplotlib is not installed."""
    new_figure(1, 1)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches; MoEError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MoEError("a profile's pictures need matplotlib: pip install 'fairseq-moe-opt[plots]'") from error
    return Figure(figsize=(width, min(height, _TALLEST)), layout="constrained")


def draw(profile: Profile) -> Iterator[tuple[str, Figure]]:
    """Name and figure of every picture that there is something to draw in."""
    timed = [phase for phase in profile.phases if any(one.milliseconds(phase) for one in profile.inputs)]
    if timed:
        yield "time", time_picture(profile, timed)
    if profile.timelines:
        yield "memory", memory_picture(profile)
    for phase in profile.phases:
        layers = [one for one in profile.layers_of(phase) if profile.inputs_of(one.name)]
        if layers:
            yield f"heat-{phase}", heat_picture(profile, phase, layers)
            yield f"loads-{phase}", loads_picture(profile, phase, layers)
    if any(one.statistics for one in profile.inputs):
        yield "skew", skew_picture(profile)
        yield "reuse", reuse_picture(profile)
    for phase in profile.phases:
        layers = [one for one in profile.layers_of(phase) if profile.inputs_of(one.name)]
        if layers:
            yield f"correlation-{phase}", correlation_picture(profile, phase, layers)
    if profile.experts:
        yield "experts", experts_picture(profile)


def time_picture(profile: Profile, phases: Sequence[str]) -> Figure:
    """Milliseconds of a mean forward by component, a bar an input, a panel a phase."""
    figure = new_figure(9, 1.6 + len(phases) * (1.0 + 0.35 * len(profile.inputs)))
    panels = figure.subplots(len(phases), 1, squeeze=False)[:, 0]
    for axes, phase in zip(panels, phases, strict=True):
        bars = {one.label: one.milliseconds(phase) for one in profile.inputs if one.milliseconds(phase)}
        left = np.zeros(len(bars))
        for component in COMPONENTS:
            widths = np.array([parts[component] for parts in bars.values()])
            if widths.any():
                axes.barh(list(bars), widths, left=left, color=_COLOURS[component], label=component)
                left += widths
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds of a mean forward")
        _title(axes, findings.time_finding(profile, phase))
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)))
    return figure


def memory_picture(profile: Profile) -> Figure:
    """Memory above the weights during one forward, coloured by component, a panel a phase, each of its own scale.

    Not against time: recording makes some allocations slow, and a pause of the machine would be most of the picture.
    """
    phases = [phase for phase in profile.phases if phase in profile.timelines]
    figure = new_figure(9, 1.2 + 2.6 * len(phases))
    panels = figure.subplots(len(phases), 1, squeeze=False)[:, 0]
    seen: dict[str, None] = {}
    for axes, phase in zip(panels, phases, strict=True):
        moments = profile.timelines[phase].moments
        sizes = [moment.nbytes / 2**20 for moment in moments]
        colours = [_COLOURS[moment.component] for moment in moments]
        seen |= dict.fromkeys(moment.component for moment in moments)
        axes.bar(range(len(sizes)), sizes, width=1.0, align="edge", color=colours)
        axes.step(range(len(sizes)), sizes, where="post", color="black", linewidth=0.6)
        axes.set_xlim(0, len(sizes))
        axes.set_xlabel("allocations and releases, in order")
        axes.set_ylabel("MiB above the weights")
        axes.set_ylim(bottom=0)
        _title(axes, findings.memory_finding(profile, phase))
    patches = {name: panels[0].plot([], [], color=_COLOURS[name], linewidth=6)[0] for name in seen}
    figure.legend(patches.values(), patches.keys(), loc="outside lower center", ncols=min(6, len(patches)))
    return figure


def heat_picture(profile: Profile, phase: str, layers: Sequence[LayerFacts]) -> Figure:
    """Share of each batch that each expert got: batches down, experts across; a row of panels a layer."""
    maps = {
        (facts.name, one.label): heat_map(one.counts[facts.name], 200)
        for facts in layers
        for one in profile.inputs_of(facts.name)
    }
    largest = max(float(one.max()) for one in maps.values())
    return _panels(
        profile,
        layers,
        lambda facts, one: 100 * maps[facts.name, one.label],
        (0, 100 * largest, "magma", "% of a batch's rows"),
        findings.skew_finding(profile, phase),
        ("expert", "batch"),
    )


def loads_picture(profile: Profile, phase: str, layers: Sequence[LayerFacts]) -> Figure:
    """Which experts each input uses: inputs down, experts across, a panel a layer, one colour scale."""
    tables = {
        facts.name: np.array([one.statistics[facts.name].load for one in profile.inputs_of(facts.name)])
        for facts in layers
    }
    largest = 100 * max(float(one.max()) for one in tables.values())
    figure = new_figure(9, 1.4 + len(layers) * (0.8 + 0.28 * len(profile.inputs)))
    panels = figure.subplots(len(layers), 1, squeeze=False)[:, 0]
    image = None
    for axes, facts in zip(panels, layers, strict=True):
        image = axes.imshow(100 * tables[facts.name], aspect="auto", cmap="viridis", vmin=0, vmax=largest)
        axes.set_yticks(range(len(tables[facts.name])), [one.label for one in profile.inputs_of(facts.name)])
        axes.locator_params("x", integer=True)
        axes.set_title(f"{phase} {short_name(facts)}", fontsize="small", loc="left")
    panels[-1].set_xlabel("expert")
    if image is not None:
        figure.colorbar(image, ax=list(panels), label="% of an input's rows")
    _headline(figure, findings.load_finding(profile, phase) or findings.skew_finding(profile, phase))
    return figure


def skew_picture(profile: Profile) -> Figure:
    """Idle experts, Gini and the busiest expert's share, by layer and input; dashes are for even choices."""
    layers = [one for one in profile.layers if profile.inputs_of(one.name)]
    figure = new_figure(9, 8)
    panels = figure.subplots(3, 1, sharex=True)
    names = [f"{one.phase}\n{short_name(one)}" for one in layers]
    wanted: tuple[tuple[str, Callable[[InputProfile, LayerFacts], tuple[float, float | None]]], ...] = (
        (
            "% of experts idle in a batch",
            lambda one, facts: (
                100 * one.statistics[facts.name].inactive,
                100 * one.statistics[facts.name].inactive_if_even,
            ),
        ),
        ("Gini of a batch's load", lambda one, facts: (one.statistics[facts.name].gini, None)),
        (
            "% of a batch at its busiest expert",
            lambda one, facts: (100 * one.statistics[facts.name].max_share, 100 / facts.num_experts),
        ),
    )
    for axes, (label, read) in zip(panels, wanted, strict=True):
        for place, one in enumerate(profile.inputs):
            offset = 0.7 * ((place + 0.5) / len(profile.inputs) - 0.5)
            points = [(x, *read(one, facts)) for x, facts in enumerate(layers) if facts.name in one.statistics]
            colour = _INPUT_COLOURS[place % len(_INPUT_COLOURS)]
            width = 0.7 / len(profile.inputs)
            axes.bar(
                [x + offset for x, _, _ in points], [y for _, y, _ in points], width, color=colour, label=one.label
            )
            for x, _, even in points:
                if even is not None:
                    axes.hlines(even, x + offset - width / 2, x + offset + width / 2, "black", "dashed", linewidth=1)
        axes.set_ylabel(label, fontsize="small")
        axes.set_ylim(bottom=0)
    panels[-1].set_xticks(range(len(names)), names)
    panels[0].legend(fontsize="small", title="dashes: even choices")
    said = [findings.idle_finding(profile, phase) for phase in profile.phases]
    _headline(figure, "; ".join(one for one in said if one is not None))
    return figure


def reuse_picture(profile: Profile) -> Figure:
    """How soon an expert is needed again, and how much of a batch's set the next one keeps, by layer."""
    layers = [one for one in profile.layers if profile.inputs_of(one.name)]
    figure = new_figure(9, 4.4)
    distance, sticky = figure.subplots(1, 2)
    for place, facts in enumerate(layers):
        found = [one.statistics[facts.name] for one in profile.inputs_of(facts.name)]
        colour = _INPUT_COLOURS[place % len(_INPUT_COLOURS)]
        label = f"{facts.phase} {short_name(facts)}"
        used = [one.reuse_within for one in found if one.median_reuse is not None]
        if used:
            shares = [100 * float(np.mean([one[limit] for one in used])) for limit in DISTANCES]
            distance.plot(DISTANCES, shares, ".-" if facts.phase == "decoder" else ".:", color=colour, label=label)
        sticky.scatter(
            [100 * one.stickiness_by_chance for one in found],
            [100 * one.stickiness for one in found],
            color=colour,
            label=label,
        )
    distance.set_xscale("log", base=2)
    distance.set_xticks(DISTANCES, [str(one) for one in DISTANCES])
    distance.set_xlabel("batches since an expert was needed before, at most")
    distance.set_ylabel("% of repeated uses")
    distance.set_ylim(0, 102)
    sticky.axline((0, 0), slope=1, color="black", linestyle="--", linewidth=1)
    sticky.set(xlim=(0, 102), ylim=(0, 102))
    sticky.set_xlabel("% kept if batches had no memory")
    sticky.set_ylabel("% of a batch's experts that the next keeps")
    sticky.legend(fontsize="small")
    said = [findings.reuse_finding(profile, phase) for phase in profile.phases]
    _headline(figure, "; ".join(one for one in said if one is not None))
    return figure


def correlation_picture(profile: Profile, phase: str, layers: Sequence[LayerFacts]) -> Figure:
    """Correlation of experts' shares over batches, a row of panels a layer."""
    return _panels(
        profile,
        layers,
        lambda facts, one: correlation(one.counts[facts.name]),
        (-1, 1, "RdBu_r", "correlation"),
        findings.correlation_finding(profile, phase),
        ("expert", "expert"),
    )


def experts_picture(profile: Profile) -> Figure:
    """Time of each expert run alone against its rows, a panel a layer."""
    layers = [one for one in profile.layers if any(expert.layer == one.name for expert in profile.experts)]
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = new_figure(2.6 * columns + 0.6, 1 + 2.4 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in panels.flat[len(layers) :]:
        axes.set_axis_off()
    for axes, facts in zip(panels.flat, layers, strict=False):
        here = [one for one in profile.experts if one.layer == facts.name]
        axes.scatter([one.rows for one in here], [1e6 * one.seconds for one in here], s=14)
        for one in here:
            if one.is_slow:
                axes.annotate(f"expert {one.expert}", (one.rows, 1e6 * one.seconds), fontsize="small")
        axes.set_title(f"{facts.phase} {short_name(facts)}", fontsize="small")
        axes.set_xlabel("rows a forward")
        axes.set_yscale("log")
    for axes in panels[:, 0]:
        axes.set_ylabel("microseconds a forward")
    _headline(figure, findings.experts_finding(profile))
    return figure


def _panels(
    profile: Profile,
    layers: Sequence[LayerFacts],
    values: Callable[[LayerFacts, InputProfile], Floats],
    scale: tuple[float, float, str, str],
    headline: str | None,
    labels: tuple[str, str],
) -> Figure:
    """A grid of images, layers down and inputs across, over one colour scale."""
    low, high, colours, unit = scale
    inputs = profile.inputs
    figure = new_figure(1.8 + 2.4 * len(inputs), 1.2 + 2.0 * len(layers))
    panels = figure.subplots(len(layers), len(inputs), squeeze=False)
    image = None
    for row, facts in zip(panels, layers, strict=True):
        for axes, one in zip(row, inputs, strict=True):
            if facts.name not in one.statistics:
                axes.set_axis_off()
                continue
            image = axes.imshow(
                values(facts, one), aspect="auto", interpolation="nearest", cmap=colours, vmin=low, vmax=high
            )
            axes.set_title(f"{one.label}, {short_name(facts)}", fontsize="small")
            axes.tick_params(labelsize="x-small")
            axes.locator_params(integer=True)
        row[0].set_ylabel(labels[1])
    for axes in panels[-1]:
        axes.set_xlabel(labels[0])
    if image is not None:
        figure.colorbar(image, ax=list(panels.flat), label=unit)
    _headline(figure, headline)
    return figure


def _headline(figure: Figure, text: str | None) -> None:
    width = int(figure.get_figwidth() * 12)
    figure.suptitle("\n".join(textwrap.wrap(text or "", width)), fontsize="medium")


def _title(axes: Axes, text: str | None) -> None:
    axes.set_title("\n".join(textwrap.wrap(text or "", 100)), fontsize="medium", loc="left")
