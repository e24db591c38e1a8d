"""From what the sides did to rows: are the outputs the same, and how many times faster is dynamic gating."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from _fairseq_work import ALL, ENCODER, Outputs, Work
from _results import EQUAL, WRONG, agreement, speedup
from _turns import Measured
from rich.table import Table

TRANSLATION, LANGUAGE_MODEL = "translation", "language model"
TOLERANCE = 1e-4
"""How far the sides may be apart, relative to the largest value: float32 summed in two orders."""


@dataclass(frozen=True)
class Row:
    """One workload: a dynamic side beside static gating.

    Attributes:
        model: ``translation`` or ``language model``.
        experts: of each sparse layer.
        batch, tokens, beam, new_tokens: the workload.
        capacity: the dynamic side's capacity option; static gating's is always ``checkpoint``.
        static_dropped, dynamic_dropped: shares of routed rows lost to capacity.
        outputs: ``equal`` or ``WRONG``; empty where they differ by design or static gating gave none.
        differences: share of equal tokens, and the largest differences of scores and encoder states, relative to
            the largest value.
        sentences_per_second: by side and phase, medians over rounds.
        times_faster: dynamic against static gating by phase, median over rounds of quotients within a round.
        at_least: whether that is only a lower bound, because static gating was given up.
        active_experts: dynamic gating's, by side of the model: mean over calls of experts with a row.
        seconds: by side and phase, every round.
        rounds: how many; 0 when the only run is the first one, which is for comparing.
        note: why static gating did not run to its end, or None.
    """

    model: str
    experts: int
    batch: int
    tokens: int
    beam: int
    new_tokens: int
    capacity: str
    static_dropped: float | None
    dynamic_dropped: float
    outputs: str
    differences: dict[str, float]
    sentences_per_second: dict[str, dict[str, float]]
    times_faster: dict[str, float]
    at_least: bool
    active_experts: dict[str, float]
    seconds: dict[str, dict[str, list[float]]]
    rounds: int
    note: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for ``json.dump``."""
        return asdict(self)


def row_of(model: str, experts: int, work: Work, capacity: str, static: Measured, dynamic: Measured) -> Row:
    """Compare ``dynamic``, run with ``capacity``, with ``static``. RuntimeError when dynamic gating did not run."""
    if dynamic.outputs is None:
        raise RuntimeError(f"dynamic gating did not run: {dynamic.failure}")
    same_rule = capacity == "checkpoint"
    differences = {} if static.outputs is None or not same_rule else compare(dynamic.outputs, static.outputs)
    sides = {"static": static, "dynamic": dynamic}
    return Row(
        model=model,
        experts=experts,
        batch=work.batch,
        tokens=work.tokens,
        beam=work.beam,
        new_tokens=work.new_tokens,
        capacity=capacity,
        static_dropped=None if static.outputs is None else static.outputs.dropped,
        dynamic_dropped=dynamic.outputs.dropped,
        outputs=verdict(differences),
        differences=differences,
        sentences_per_second={name: throughput(side, work) for name, side in sides.items()},
        times_faster=times_faster(static, dynamic),
        at_least=static.stopped_after is not None,
        active_experts=dynamic.outputs.active_experts,
        seconds={name: side.seconds for name, side in sides.items()},
        rounds=dynamic.rounds,
        note=static.failure,
    )


def compare(ours: Outputs, theirs: Outputs) -> dict[str, float]:
    """Share of equal tokens, and how far scores and states are apart (infinitely when shapes differ)."""
    found = {"tokens": agreement(ours.tokens, theirs.tokens), "scores": _apart(ours.scores, theirs.scores)}
    if ours.states is not None and theirs.states is not None:
        found["states"] = _apart(ours.states, theirs.states)
    return found


def _apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.abs().max())


def verdict(differences: Mapping[str, float]) -> str:
    """``equal``: every token is, and the rest to rounding. Empty where nothing was compared."""
    if not differences:
        return ""
    close = all(value <= TOLERANCE for name, value in differences.items() if name != "tokens")
    return EQUAL if differences["tokens"] == 1.0 and close else WRONG


def throughput(side: Measured, work: Work) -> dict[str, float]:
    """Sentences a second by phase; empty for a side without a complete run."""
    return {phase: work.batch / median(values) for phase, values in side.seconds.items()}


def times_faster(static: Measured, dynamic: Measured) -> dict[str, float]:
    """Of ``dynamic``, by phase; a lower bound for all of it when static gating was given up."""
    if static.stopped_after is not None:
        return {ALL: static.stopped_after / median(dynamic.seconds[ALL])}
    return {phase: speedup(dynamic.seconds[phase], values) for phase, values in static.seconds.items()}


def table_of(rows: Sequence[Row]) -> Table:
    """The rows of one model, a block a number of experts."""
    translates = rows[0].model == TRANSLATION
    table = Table(title=_title(rows[0]))
    headings = ["experts", "batch", "rows", *(["beam"] if translates else ["capacity"])]
    for phase in ("encoder", "all of it") if translates else ("scoring",):
        headings += [f"{phase}:\nstatic", "\ndynamic", "\ntimes"]
    for heading in (*headings, "active\nexperts", "rounds"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("outputs")
    last = None
    for row in rows:
        if last not in (None, row.experts):
            table.add_section()
        table.add_row("" if row.experts == last else str(row.experts), *_cells(row))
        last = row.experts
    return table


def _title(row: Row) -> str:
    if row.model == TRANSLATION:
        return f"fairseq, translation: sentences a second (sources of {row.tokens} tokens, {row.new_tokens} generated)"
    return f"fairseq, language model: blocks of {row.tokens} tokens scored a second"


def _cells(row: Row) -> list[str]:
    translates = row.model == TRANSLATION
    cells = [str(row.batch), f"{row.batch * row.tokens:,}", str(row.beam) if translates else row.capacity]
    for phase in (ENCODER, ALL) if translates else (ALL,):
        for side in ("static", "dynamic"):
            speed = row.sentences_per_second[side].get(phase)
            cells.append("-" if speed is None else f"{speed:,.2f}")
        ratio = row.times_faster.get(phase)
        cells.append("-" if ratio is None else f"{'> ' if row.at_least else ''}{ratio:.1f} x")
    active = " / ".join(f"{value:.0f}" for value in row.active_experts.values())
    return [*cells, active, str(row.rounds), _outputs_cell(row)]


def _outputs_cell(row: Row) -> str:
    if row.note is not None:
        return f"static: {row.note}"
    if row.outputs == WRONG:
        return f"[bold red]{WRONG}[/] ({', '.join(f'{name} {value:.3g}' for name, value in row.differences.items())})"
    dropped = f"{row.static_dropped:.1%} dropped" if row.static_dropped else ""
    if row.outputs == EQUAL:
        return f"{EQUAL}, {dropped}" if dropped else EQUAL
    return f"static: {dropped or 'nothing dropped'}"
