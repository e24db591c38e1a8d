"""Slices of the sorted rows, expert by expert, written into one output; on CPU, experts are spread over the cores."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fairseq_moe_opt.moe.experts import activate, expert_ffn
from fairseq_moe_opt.moe.kernels.threads import SingleCoreThreads
from fairseq_moe_opt.moe.types import ExpertWave, ExpertWeights, Segment

_WIDE_ROWS = 256
"""Rows from which one expert's GEMM keeps every core busy by itself."""

_PADDED_ROWS = range(2, 4)
_PAD_TO = 4
"""Two or three float32 rows are computed as four: MKL's GEMM reads the weights at half the speed otherwise."""

_KEPT_BYTES = 64 * 2**20
"""Largest scratch space a thread keeps between calls; a larger one is given back after use."""


class LoopKernel:
    """One FFN an active expert.

    On CPU, experts run on different cores, each GEMM on one core; an expert with more than an equal share of the rows
    (and at least 256), or with all of them, runs first, on all cores. Which of the two an expert does depends on the
    rows of the whole call only, never on the wave it comes in, because the number of cores changes the rounding.
    Elsewhere they run in order on the caller's stream.
    """

    name = "loop"
    needs_packed = False

    def __init__(self) -> None:
        self._threads = SingleCoreThreads()
        self._workspaces = threading.local()

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Runs everywhere."""
        return None

    def run(self, rows: Tensor, segments: Sequence[Segment], wave: ExpertWave, activation: str, out: Tensor) -> None:
        """Write every segment's result into its slice of ``out``."""
        weights = dict(zip(wave.experts, wave.weights, strict=True))
        if rows.device.type != "cpu":
            for segment in segments:
                here = slice(segment.start, segment.stop)
                out[here] = expert_ffn(rows[here], weights[segment.expert], activation)
            return

        def compute(segment: Segment) -> None:
            here = slice(segment.start, segment.stop)
            self._ffn(rows[here], weights[segment.expert], activation, out[here])

        by_size = sorted(segments, key=lambda segment: segment.start - segment.stop)
        fair_share = len(rows) / torch.get_num_threads()
        wide = [s for s in by_size if s.stop - s.start >= min(max(fair_share, _WIDE_ROWS), len(rows))]
        with torch.inference_mode():
            for segment in wide:
                compute(segment)
        self._threads.for_each(compute, by_size[len(wide) :])

    def _ffn(self, rows: Tensor, expert: ExpertWeights, activation: str, out: Tensor) -> None:
        """``expert_ffn`` into ``out``, the hidden layer in this thread's workspace."""
        num_rows = rows.shape[0]
        if num_rows in _PADDED_ROWS and rows.dtype == torch.float32:
            padded = functional.pad(rows, (0, 0, 0, _PAD_TO - num_rows))
            results = torch.empty_like(padded)
            self._ffn(padded, expert, activation, results)
            out.copy_(results[:num_rows])
            return
        hidden = self._hidden(rows, expert.fc1_weight.shape[0])
        _linear(rows, expert.fc1_weight, expert.fc1_bias, hidden)
        if expert.gate_weight is not None:
            hidden.mul_(activate(activation, torch.mm(rows, expert.gate_weight.t())))
        elif activation == "relu":
            hidden.relu_()
        else:
            hidden = activate(activation, hidden)
        _linear(hidden, expert.fc2_weight, expert.fc2_bias, out)

    def _hidden(self, rows: Tensor, width: int) -> Tensor:
        """(r, ``width``) scratch space of this thread.

        Kept between calls: the allocator returns large blocks to the system at once, and touching fresh pages costs
        more than a small GEMM.
        """
        numel = rows.shape[0] * width
        kept: Tensor | None = getattr(self._workspaces, "buffer", None)
        if kept is None or kept.dtype != rows.dtype or kept.numel() < numel:
            kept = torch.empty(numel, dtype=rows.dtype)
            if kept.numel() * kept.element_size() <= _KEPT_BYTES:
                self._workspaces.buffer = kept
        return kept[:numel].view(rows.shape[0], width)


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)
