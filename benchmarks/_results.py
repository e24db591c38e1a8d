"""From timings to rows: medians, ratios of the same rounds, whose tokens are right; then a table and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from _rounds import Measured
from _sides import REFERENCE, STOCK, Case, Timing
from rich.table import Table

WRONG = "WRONG"
EQUAL = "equal"
PHASES = ("encoder", "decoder")
BOTH = "generate"
"""Encoding and decoding together: what a call of ``generate`` takes."""


@dataclass(frozen=True)
class Baseline:
    """The tokens taken as right: whose they are, and (batch, new_tokens) ids by batch size."""

    name: str
    tokens: dict[int, list[list[int]]]


def baseline_of(measured: Sequence[Measured], cases: Sequence[Case]) -> Baseline | None:
    """The first side that ran every case: 4.57.1 where it is there, else this project's first kernel; None if none."""
    for one in measured:
        if all(timing.error is None for timing in one.timings):
            tokens = {case.batch: timing.tokens for case, timing in zip(cases, one.timings, strict=True)}
            return Baseline(f"{one.side.name}, {one.side.dtype}", tokens)
    return None


@dataclass(frozen=True)
class Row:
    """One side on one case.

    Attributes:
        side: its name.
        transformers: the release it ran on.
        dtype: of its weights.
        batch: sentences at once.
        compared_with: the side whose tokens are taken as right, and its dtype.
        token_agreement: share of positions with the same token as that side.
        verdict: ``equal`` or ``WRONG`` in float32; empty in bfloat16, which may round to another token.
        tokens_per_second: by phase, median over rounds.
        ratios: label to phase, or ``generate`` for both, to the median over rounds of how many times
            faster it is than the labelled side.
        seconds: by phase, every round.
        peak_bytes: of its process, while it ran this case.
        load_peak_bytes: of its process, while it loaded the model.
        error: why it could not run, or None.
    """

    side: str
    transformers: str
    dtype: str
    batch: int
    compared_with: str
    token_agreement: float
    verdict: str
    tokens_per_second: dict[str, float]
    ratios: dict[str, dict[str, float]]
    seconds: dict[str, list[float]]
    peak_bytes: int
    load_peak_bytes: int
    error: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for ``json.dump``."""
        return asdict(self)


def agreement(tokens: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> float:
    """Share of positions where two (batch, new_tokens) lists hold the same token; 0 when their shapes differ."""
    if [len(row) for row in tokens] != [len(row) for row in expected]:
        return 0.0
    pairs = [
        one == two for left, right in zip(tokens, expected, strict=True) for one, two in zip(left, right, strict=True)
    ]
    return sum(pairs) / len(pairs) if pairs else 0.0


def verdict(dtype: str, share: float) -> str:
    """Whether a side is right: in float32 every token must be the same."""
    if dtype != "float32":
        return ""
    return EQUAL if share == 1.0 else WRONG


def speedup(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """Median over rounds of ``baseline / seconds``: both sides of each quotient ran one after the other."""
    return median(theirs / ours for ours, theirs in zip(seconds, baseline, strict=True))


def seconds_of(timing: Timing, phase: str) -> list[float]:
    """Seconds of every round, of one phase or of both together."""
    if phase != BOTH:
        return timing.seconds[phase]
    return [sum(parts) for parts in zip(*(timing.seconds[one] for one in PHASES), strict=True)]


def rows_of(measured: Sequence[Measured], cases: Sequence[Case], baseline: Baseline | None) -> list[Row]:
    """Rows in the order of cases, then sides; without a ``baseline`` no side ran, and none is right."""
    right = baseline or Baseline("none", {})
    return [_row(one, index, case, measured, right) for index, case in enumerate(cases) for one in measured]


def _row(one: Measured, index: int, case: Case, measured: Sequence[Measured], baseline: Baseline) -> Row:
    timing = one.timings[index]
    share = agreement(timing.tokens, baseline.tokens.get(case.batch, []))
    return Row(
        side=one.side.name,
        transformers=one.facts.get("transformers", ""),
        dtype=one.side.dtype,
        batch=case.batch,
        compared_with=baseline.name,
        token_agreement=share,
        verdict="" if timing.error else verdict(one.side.dtype, share),
        tokens_per_second=_throughput(timing, case),
        ratios=dict(_ratios(one, index, measured)),
        seconds=timing.seconds,
        peak_bytes=timing.peak_bytes,
        load_peak_bytes=one.facts.get("load_peak_bytes", 0),
        error=timing.error,
    )


def _throughput(timing: Timing, case: Case) -> dict[str, float]:
    if timing.error:
        return {}
    return {phase: case.tokens[phase] / median(timing.seconds[phase]) for phase in PHASES}


def _ratios(one: Measured, index: int, measured: Sequence[Measured]) -> Iterator[tuple[str, dict[str, float]]]:
    """Against 4.57.1 in each dtype it ran in, and against 5.x as shipped."""
    seconds = one.timings[index]
    for other in measured:
        theirs = other.timings[index]
        if other.side.name not in (REFERENCE, STOCK) or seconds.error or theirs.error:
            continue
        yield (
            ratio_label(other.side.name, one.side.dtype, other.side.dtype),
            {phase: speedup(seconds_of(seconds, phase), seconds_of(theirs, phase)) for phase in (*PHASES, BOTH)},
        )


def ratio_label(name: str, dtype: str, other_dtype: str) -> str:
    """What a ratio is against; one between dtypes says so."""
    short = "4.57.1" if name == REFERENCE else "5.x"
    return short if dtype == other_dtype else f"{short} {other_dtype} (cross-dtype)"


def table_of(rows: Sequence[Row], dtype: str) -> Table:
    """The rows measured together with ``dtype`` sides, a block a batch size."""
    labels = list(dict.fromkeys(label for row in rows for label in row.ratios if row.dtype == dtype))
    table = Table(title=f"{dtype}: tokens a second, and how many times faster (encoder / decoder / both)")
    table.add_column("batch", justify="right")
    table.add_column("side", no_wrap=True)
    for heading in (*PHASES, *(f"x {label}".replace(" (", "\n(") for label in labels), "peak GiB"):
        table.add_column(heading, justify="right")
    table.add_column(f"tokens, against\n{rows[0].compared_with}" if rows else "tokens")
    last = None
    for row in rows:
        if last not in (None, row.batch):
            table.add_section()
        table.add_row("" if row.batch == last else str(row.batch), *_cells(row, dtype, labels))
        last = row.batch
    return table


def _cells(row: Row, dtype: str, labels: Sequence[str]) -> list[str]:
    name = row.side if row.dtype == dtype else f"{row.side}, {row.dtype}"
    if row.error is not None:
        return [name, "-", "-", *("" for _ in labels), "-", f"failed: {row.error}"]
    speeds = [f"{row.tokens_per_second[phase]:,.1f}" for phase in PHASES]
    ratios = [" / ".join(f"{ratio:.2f}" for ratio in row.ratios.get(label, {}).values()) for label in labels]
    return [name, *speeds, *ratios, f"{row.peak_bytes / 2**30:.2f}", _tokens_cell(row)]


def _tokens_cell(row: Row) -> str:
    share = f"{row.token_agreement:.1%} the same"
    if row.verdict == EQUAL:
        return EQUAL
    return f"[bold red]{WRONG}[/] ({share})" if row.verdict == WRONG else share
