"""Slices of the sorted rows, expert by expert, written into one output; on CPU, experts are spread over the cores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fairseq_moe_opt.moe.activations import activate, apply_gate
from fairseq_moe_opt.moe.experts import expert_ffn
from fairseq_moe_opt.moe.kernels.int8 import int8_linear
from fairseq_moe_opt.moe.kernels.threads import SingleCoreThreads
from fairseq_moe_opt.moe.kernels.workspace import ThreadWorkspace
from fairseq_moe_opt.moe.types import ExpertWave, ExpertWeights, Segment

_WIDE_ROWS = 256
"""Rows from which one expert's GEMM keeps every core busy by itself."""

_PADDED_ROWS = range(2, 4)
_PAD_TO = 4
"""Two or three float32 rows are computed as four: MKL's GEMM reads the weights at half the speed otherwise."""


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
        self._workspace = ThreadWorkspace()

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
        if num_rows in _PADDED_ROWS and rows.dtype == torch.float32 and not expert.is_quantized:
            padded = functional.pad(rows, (0, 0, 0, _PAD_TO - num_rows))
            results = torch.empty_like(padded)
            self._ffn(padded, expert, activation, results)
            out.copy_(results[:num_rows])
            return
        if expert.gate_weight is not None:
            hidden = self._gated(rows, expert, expert.gate_weight, activation)
        else:
            hidden = self._workspace.take("hidden", num_rows, expert.fc1_weight.shape[0], rows.dtype)
            self._linear(rows, expert.fc1_weight, expert.fc1_scale, expert.fc1_bias, hidden)
            if activation == "relu":
                hidden.relu_()
            else:
                hidden = activate(activation, hidden)
        self._linear(hidden, expert.fc2_weight, expert.fc2_scale, expert.fc2_bias, out)

    def _gated(self, rows: Tensor, expert: ExpertWeights, gate_weight: Tensor, activation: str) -> Tensor:
        """(r, F) of both halves: from one product where they lie in one matrix."""
        ffn_width = expert.fc1_weight.shape[0]
        halves = self._workspace.take("halves", rows.shape[0], 2 * ffn_width, rows.dtype)
        if expert.joined is not None and not expert.is_quantized:
            self._linear(rows, expert.joined.matrix, None, None, halves)
            gate, up = expert.joined.split(halves)
            for half, bias in ((gate, expert.gate_bias), (up, expert.fc1_bias)):
                if bias is not None:
                    half.add_(bias)
        else:
            gate, up = halves.view(2, rows.shape[0], ffn_width)
            self._linear(rows, gate_weight, expert.gate_scale, expert.gate_bias, gate)
            self._linear(rows, expert.fc1_weight, expert.fc1_scale, expert.fc1_bias, up)
        return apply_gate(activation, gate, up)

    def _linear(self, rows: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
        if scale is not None:
            int8_linear(rows, weight, scale, bias, out, self._workspace)
        elif bias is None:
            torch.mm(rows, weight.t(), out=out)
        else:
            torch.addmm(bias, rows, weight.t(), out=out)
