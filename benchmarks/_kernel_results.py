"""What ``kernels.py`` measured: its rows, their table, and a file that several runs add to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

DTYPES = ("float32", "bfloat16", "int8")
"""In the order of the table."""


class BenchmarkError(Exception):
    """A side computes something else."""


@dataclass(frozen=True)
class Row:
    """One side in one case.

    Attributes:
        shape, dtype, rows_dtype, experts, rows: of the case; ``rows`` an expert.
        side: a kernel, or Transformers' function.
        difference: of its output from float32's, relative in the norm.
        seconds: of every round.
        bandwidth: bytes a second of the plain reads around it, by round.
        dense_seconds: of the dense FFN, by round; empty when decoding.
        weight_bytes: of the matrices that are read.
        of_bandwidth: how fast weights are read, as a share of the plain read.
        of_dense: speed as a share of the dense FFN's; 0 when decoding.
    """

    shape: str
    dtype: str
    rows_dtype: str
    experts: int
    rows: int
    side: str
    difference: float
    seconds: list[float]
    bandwidth: list[float]
    dense_seconds: list[float]
    weight_bytes: int
    of_bandwidth: float
    of_dense: float


def table_of(rows: Sequence[Row]) -> Table:
    """A line a side, a block a case."""
    table = Table(title="experts on CPU: reading weights as a share of a plain read, prefill as a share of a dense FFN")
    for heading in ("shape", "dtype", "rows\nan expert", "side"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "GB/s", "of plain\nread", "of dense", "difference"):
        table.add_column(heading, justify="right")
    last = None
    for row in rows:
        case = (row.shape, f"{row.dtype}, {row.rows_dtype} rows" if row.dtype == "int8" else row.dtype, str(row.rows))
        if last not in (None, case):
            table.add_section()
        seconds = median(row.seconds)
        table.add_row(
            *(case if case != last else ("", "", "")),
            row.side,
            f"{seconds * 1e3:.2f}",
            f"{row.weight_bytes / seconds / 1e9:.1f}",
            f"{row.of_bandwidth:.0%}",
            f"{row.of_dense:.0%}" if row.of_dense else "",
            f"{row.difference:.0e}",
        )
        last = case
    return table


def case_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What was measured, whatever the side."""
    return row["shape"], row["dtype"], row["rows_dtype"], row["rows"]


def add_to(
    path: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], shapes: Sequence[str]
) -> list[Mapping[str, Any]]:
    """Rows of the file that were not measured again, and ``rows``; BenchmarkError when it is of another setting.

    Args:
        path: of the results; need not be there.
        rows: measured now.
        facts: that must be the same in the file, by name.
        shapes: in which order.
    """
    if not path.exists():
        return list(rows)
    former = json.loads(path.read_text(encoding="utf-8"))
    for name, value in facts.items():
        if former.get(name) != value:
            raise BenchmarkError(f"{path} cannot be added to: its {name} is {former.get(name)}, now it is {value}")
    again = {case_of(row) for row in rows}
    both = [*(row for row in former["rows"] if case_of(row) not in again), *rows]
    return sorted(
        both,
        key=lambda row: (
            shapes.index(row["shape"]),
            *(DTYPES.index(row[one]) for one in ("dtype", "rows_dtype")),
            row["rows"],
        ),
    )
