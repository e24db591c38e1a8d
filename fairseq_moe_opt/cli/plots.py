"""What all plots share: matplotlib, loaded only when something is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fairseq_moe_opt.errors import MoEError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches; MoEError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MoEError("--plot needs matplotlib: pip install 'fairseq-moe-opt[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")
