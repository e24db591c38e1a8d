"""Grouped GEMMs: on CUDA ``torch.nn.functional.grouped_mm``, two calls a layer, whatever the number of experts.

On a CPU torch's function is a loop over the groups, each product on all cores, that asks for aligned rows. The same
loop is here, without that condition; everything between the products is done for all rows at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fairseq_moe_opt.errors import KernelError
from fairseq_moe_opt.moe.activations import activate, apply_gate
from fairseq_moe_opt.moe.types import ExpertWave, PackedExperts, Segment

_NO_INT8 = "grouped_mm computes floating-point experts, not int8 ones; use kernel='loop'"

_ALIGNMENT_BYTES = 16
"""Rows of every operand must start on such a boundary."""


class GroupedMMKernel:
    """Computes all experts of a packed layer at once, matrix by matrix."""

    name = "grouped_mm"
    needs_packed = True

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Needs floats and torch >= 2.10; on CUDA bfloat16 and compute capability 8.0 or more."""
        if dtype == torch.int8:
            return _NO_INT8
        if not hasattr(functional, "grouped_mm"):
            return f"torch {torch.__version__} has no grouped_mm (2.10 brings it); use kernel='loop'"
        if device.type == "cpu":
            return None
        if device.type != "cuda":
            return f"grouped_mm runs on cpu and cuda, not {device.type}; use kernel='loop'"
        if dtype != torch.bfloat16:
            return f"grouped_mm on CUDA takes bfloat16, not {dtype}; use kernel='loop'"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "grouped_mm needs a GPU of compute capability 8.0 or more; use kernel='loop'"
        return None

    def run(self, rows: Tensor, segments: Sequence[Segment], wave: ExpertWave, activation: str, out: Tensor) -> None:
        """One grouped product a matrix; biases are added by row."""
        packed = wave.packed
        if any(expert.is_quantized for expert in wave.weights):
            raise KernelError(f"kernel 'grouped_mm' cannot run: {_NO_INT8}")
        if packed is None:
            raise KernelError("kernel 'grouped_mm' needs experts packed in one tensor; this store keeps them apart")
        row_bytes = rows.element_size()
        unaligned = any(width * row_bytes % _ALIGNMENT_BYTES for width in packed.fc1_weight.shape[1:])
        if unaligned and rows.device.type != "cpu":
            raise KernelError(
                f"kernel 'grouped_mm' needs rows of a multiple of {_ALIGNMENT_BYTES} bytes; experts are "
                f"{tuple(packed.fc1_weight.shape[1:])} of {row_bytes} bytes: use kernel='loop'"
            )
        product = _Products(rows, segments, packed.num_experts)
        if packed.gate_weight is None:
            hidden = activate(activation, product(rows, packed.fc1_weight, packed.fc1_bias))
        else:
            hidden = apply_gate(activation, *product.gate_and_up(rows, packed))
        out.copy_(product(hidden, packed.fc2_weight, packed.fc2_bias))


class _Products:
    """Grouped products of rows that are sorted into ``segments``."""

    def __init__(self, rows: Tensor, segments: Sequence[Segment], num_experts: int) -> None:
        counts = [0] * num_experts
        for segment in segments:
            counts[segment.expert] = segment.stop - segment.start
        self._segments = segments
        self._counts = torch.tensor(counts, device=rows.device)
        self._offsets = self._counts.cumsum(0).to(torch.int32)

    def __call__(self, left: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(R, in) rows times their experts' (E, out, in), plus (E, out)."""
        if left.device.type == "cpu":
            result = left.new_empty(left.shape[0], weight.shape[1])
            for segment in self._segments:
                here = slice(segment.start, segment.stop)
                torch.mm(left[here], weight[segment.expert].t(), out=result[here])
        else:
            result = functional.grouped_mm(left, weight.transpose(1, 2), offs=self._offsets)
        return self._plus(result, bias)

    def gate_and_up(self, rows: Tensor, packed: PackedExperts) -> tuple[Tensor, Tensor]:
        """Both halves: in one product where they lie in one tensor."""
        if packed.gate_weight is None:
            raise ValueError("experts without a gate")
        if packed.joined is None:
            gate = self(rows, packed.gate_weight, packed.gate_bias)
            return gate, self(rows, packed.fc1_weight, packed.fc1_bias)
        gate, up = packed.joined.split(self(rows, packed.joined.matrix, None))
        return self._plus(gate, packed.gate_bias), self._plus(up, packed.fc1_bias)

    def _plus(self, products: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return products
        return products.add_(bias.repeat_interleave(self._counts, 0, output_size=len(products)))
