"""What all pictures share: matplotlib, loaded only when something is drawn, and one colour a side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairseq_moe_opt.errors import MoEError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS: Mapping[str, str] = {"dense": "#7f7f7f", "static": "#d95f02", "dynamic": "#1b6ca8"}
GIB, MIB = 2**30, 2**20


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches; MoEError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MoEError("pictures need matplotlib: pip install 'fairseq-moe-opt[plots]', or give --no-plots") from error
    return Figure(figsize=(width, height), layout="constrained")


def variant_bars(axes: Any, values: Mapping[str, float], numbers: str, unit: str, title: str) -> None:
    """A bar a variant with its value, formatted as ``numbers``, above it."""
    bars = axes.bar(list(values), list(values.values()), color=[COLOURS[name] for name in values])
    axes.bar_label(bars, [format(value, numbers) for value in values.values()])
    axes.set_ylabel(unit)
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` as PNG."""
    figure.savefig(path, format="png", dpi=110)
