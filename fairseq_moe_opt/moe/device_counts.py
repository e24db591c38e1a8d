"""Counts of a layer that the device sums up itself, for forwards in which the host learns no count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_moe_opt.errors import KernelError

_TOTALS = ("calls", "tokens", "dropped", "active", "max_active")


@dataclass(frozen=True)
class CountedForwards:
    """What was counted: as the fields of ``LayerReport``, with ``active`` summed over calls."""

    rows: tuple[int, ...]
    calls: int
    tokens: int
    dropped: int
    active: int
    max_active: int


class DeviceCounts:
    """Running sums on one device; nothing waits for it until they are asked for.

    Every change is made in place, so a CUDA graph that holds a forward counts it again at each replay.
    """

    def __init__(self, num_experts: int, device: torch.device) -> None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # Sums made by the graph would be set to zero by each replay.
            raise KernelError("a CUDA graph is captured of a layer that has not run yet; run it once before")
        with torch.inference_mode(False):
            self._sums = torch.zeros(num_experts + len(_TOTALS), dtype=torch.int64, device=device)

    def add(self, num_tokens: int, counts: Tensor, dropped: Tensor | None) -> None:
        """Count a forward of ``num_tokens`` tokens: (E,) rows of each expert, and choices lost to capacity."""
        rows, totals = self._sums[: -len(_TOTALS)], self._sums[-len(_TOTALS) :]
        active = (counts > 0).sum()
        with torch.no_grad():
            rows += counts
            totals[0] += 1
            totals[1] += num_tokens
            if dropped is not None:
                totals[2] += dropped
            totals[3] += active
            torch.maximum(totals[4], active, out=totals[4])

    def reset(self) -> None:
        """Forget everything; the sums stay where they are, for graphs that hold them."""
        self._sums.zero_()

    def read(self) -> CountedForwards:
        """The sums so far; waits for the device."""
        numbers = self._sums.tolist()
        return CountedForwards(tuple(numbers[: -len(_TOTALS)]), *numbers[-len(_TOTALS) :])
