"""The oracle: one row at a time through its expert, a loop a reader can check by eye."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fairseq_moe_opt.moe.experts import expert_ffn
from fairseq_moe_opt.moe.quantization import dequantize
from fairseq_moe_opt.moe.types import ExpertWave, Segment


class NaiveKernel:
    """Slow on purpose: shares no batching, no workspace and no threading with the kernels it is compared to."""

    name = "naive"
    needs_packed = False

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Runs everywhere."""
        return None

    def run(self, rows: Tensor, segments: Sequence[Segment], wave: ExpertWave, activation: str, out: Tensor) -> None:
        """Row ``i`` of a segment is ``expert_ffn(rows[i])``; of an int8 expert, in float32 whatever the rows are."""
        for segment in segments:
            weights = wave.weights[wave.experts.index(segment.expert)]
            if weights.is_quantized:
                weights = dequantize(weights, torch.float32)
            for row in range(segment.start, segment.stop):
                out[row] = expert_ffn(rows[row : row + 1].to(weights.fc1_weight.dtype), weights, activation)[0]
