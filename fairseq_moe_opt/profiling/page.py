"""One HTML page with every picture and table in it: nothing is loaded from anywhere, so it can be sent around."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from fairseq_moe_opt.profiling.clock import COMPONENTS
from fairseq_moe_opt.profiling.findings import findings
from fairseq_moe_opt.profiling.profile import Profile, waste_of
from fairseq_moe_opt.sizes import readable

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; margin: 0.8rem 0; display: block; overflow-x: auto }
td { font-variant-numeric: tabular-nums }
th, td { padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #999 }
img { max-width: 100%; height: auto } figure { margin: 1rem 0 } .note { color: #555; font-size: 0.9rem }
"""

_SECTIONS: Mapping[str, str] = {
    "time": "Time",
    "memory": "Memory",
    "heat": "Which expert gets how much of each batch",
    "loads": "Which experts each input uses",
    "skew": "Idle experts and uneven load",
    "reuse": "From one batch to the next",
    "correlation": "Experts that rise and fall together",
    "experts": "Experts run one at a time",
}


def page(profile: Profile, pictures: Mapping[str, bytes]) -> str:
    """The page; ``pictures`` are PNG files by name."""
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>Profile of {escape(str(profile.about.get('model', 'a model')))}</title>",
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>Profile of {escape(str(profile.about.get('model', 'a model')))}</h1>",
        _facts(profile),
        "<h2>What it shows</h2><ul>",
        *(f"<li>{escape(sentence)}</li>" for sentence in findings(profile)),
        "</ul>",
    ]
    tables = {"time": _times, "memory": _memory, "skew": _activity, "loads": _comparison, "experts": _experts}
    for kind, heading in _SECTIONS.items():
        here = [name for name in pictures if name == kind or name.startswith(f"{kind}-")]
        if not here:
            continue
        parts.append(f"<h2>{escape(heading)}</h2>")
        parts += [_picture(name, pictures[name]) for name in here]
        if kind in tables:
            parts.append(tables[kind](profile))
    parts.append("</body></html>")
    return "\n".join(parts) + "\n"


def _picture(name: str, content: bytes) -> str:
    data = base64.b64encode(content).decode("ascii")
    return f'<figure><img alt="{escape(name)}" src="data:image/png;base64,{data}"></figure>'


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["<table><thead><tr>", *(f"<th>{escape(one)}</th>" for one in head), "</tr></thead><tbody>"]
    for row in rows:
        lines.append("<tr>" + "".join(f"<td>{escape(str(one))}</td>" for one in row) + "</tr>")
    return "".join([*lines, "</tbody></table>"])


def _facts(profile: Profile) -> str:
    options = profile.about.get("options")
    lines = [(name, value) for name, value in profile.about.items() if name != "options"]
    if isinstance(options, Mapping):
        lines.append(("options", ", ".join(f"{name}={value}" for name, value in options.items() if value is not None)))
    facts = _table(("", ""), lines)
    layers = _table(
        ("layer", "phase", "experts E", "choices K", "capacity C", "waste of static gating E C / K"),
        (
            (
                one.name,
                one.phase,
                one.num_experts,
                one.top_k,
                "none" if one.capacity_fraction is None else f"{one.capacity_fraction:g}",
                "" if (waste := waste_of(one)) is None else f"{waste:.1f}",
            )
            for one in profile.layers
        ),
    )
    return facts + layers


def _times(profile: Profile) -> str:
    used = [
        name
        for name in COMPONENTS
        if any(one.times.components(phase)[name] for one in profile.inputs for phase in profile.phases)
    ]
    rows = []
    for phase in profile.phases:
        for one in profile.inputs:
            parts = one.milliseconds(phase)
            if parts:
                forwards = one.times.forwards[phase]
                whole = 1000 * sum(forwards) / len(forwards)
                difference = f"{100 * one.difference(phase):+.2f} %"
                rows.append(
                    (
                        phase,
                        one.label,
                        len(forwards),
                        f"{whole:.3f}",
                        *(f"{parts[name]:.3f}" for name in used),
                        difference,
                    )
                )
    note = (
        '<p class="note">Milliseconds of a mean forward. The last column is how far the sum of the components is from '
        "the whole, which is read apart from them.</p>"
    )
    return (
        _table(("phase", "input", "forwards", "whole", *used, "sum against whole"), rows)
        + note
        + _layer_times(profile, used)
    )


def _layer_times(profile: Profile, used: Sequence[str]) -> str:
    rows = []
    for facts in profile.layers:
        for one in profile.inputs_of(facts.name):
            seconds, calls = one.times.of_layer(facts.name), one.statistics[facts.name].batches
            shown = (f"{1000 * seconds[name] / calls:.3f}" if name in seconds else "" for name in used)
            rows.append((facts.name, one.label, *shown))
    return _table(("layer", "input", *used), rows)


def _memory(profile: Profile) -> str:
    weights = profile.weights
    static = _table(
        ("weights", "dense", "experts", "together"),
        [("bytes on the device", readable(weights.dense), readable(weights.experts), readable(weights.total))],
    )
    phases = _table(
        ("one forward of the", "peak above the weights", "in", "weights and peak"),
        (
            (phase, readable(one.peak.nbytes), one.peak.component, readable(weights.total + one.peak.nbytes))
            for phase, one in profile.timelines.items()
        ),
    )
    return static + phases


def _activity(profile: Profile) -> str:
    rows = []
    for facts in profile.layers:
        for one in profile.inputs_of(facts.name):
            found = one.statistics[facts.name]
            rows.append(
                (
                    facts.name,
                    one.label,
                    found.batches,
                    f"{found.mean_rows:.1f}",
                    f"{100 * found.inactive:.1f} %",
                    f"{100 * found.inactive_if_even:.1f} %",
                    len(found.never_used),
                    f"{found.gini:.2f}",
                    f"{100 * found.max_share:.1f} %",
                    f"{100 * found.worst_share:.1f} % (expert {found.worst_expert})",
                    f"{100 * found.stickiness:.1f} %",
                    f"{100 * found.stickiness_by_chance:.1f} %",
                    "" if found.median_reuse is None else f"{found.median_reuse:g}",
                    f"{found.mean_correlation:.2f}",
                )
            )
    head = (
        "layer",
        "input",
        "batches",
        "rows a batch",
        "idle",
        "idle if even",
        "never used",
        "Gini",
        "busiest expert",
        "at worst",
        "kept by the next batch",
        "kept by chance",
        "median reuse distance",
        "mean |correlation|",
    )
    return _table(head, rows)


def _comparison(profile: Profile) -> str:
    rows = []
    for name, found in profile.comparison.items():
        if len(found.overlap) < 2:
            continue
        specific = ", ".join(f"{one.expert} ({one.input}, {100 * one.share:.0f} %)" for one in found.specific)
        own = sum(found.self_overlap) / len(found.self_overlap)
        rows.append((name, f"{100 * found.mean_overlap:.1f} %", f"{100 * own:.1f} %", specific or "none"))
    if not rows:
        return ""
    return _table(
        ("layer", "load in common of two inputs", "of two halves of one", "experts mainly of one input"), rows
    )


def _experts(profile: Profile) -> str:
    rows = (
        (
            one.layer,
            one.expert,
            f"{one.rows:.1f}",
            f"{1e6 * one.seconds:.0f}",
            f"{1e6 * one.expected:.0f}",
            "slow" * one.is_slow,
        )
        for one in profile.experts
    )
    return _table(("layer", "expert", "rows a forward", "microseconds", "expected for these rows", ""), rows)
