"""The module that takes the place of an expert's ``nn.Linear`` when its weights are int8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fairseq_moe_opt.moe.quantization import dequantize_rows


class Int8Linear(nn.Module):
    """A linear layer with int8 weights; its state dict has the names and dtypes of converted checkpoints.

    ``weight`` (out, in) int8 and ``weight_scale`` (out,) float32 are buffers: they take no gradients. ``bias`` (out,)
    or None is a parameter of ``dtype``. New ones are uninitialised.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty(out_features, dtype=torch.float32, device=device))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        )

    def forward(self, rows: Tensor) -> Tensor:
        """(..., in) to (..., out) through the floats that the weights stand for, where a host model's own code runs."""
        weight = dequantize_rows(self.weight, self.weight_scale, rows.dtype)
        return functional.linear(rows, weight, self.bias)

    def extra_repr(self) -> str:
        """As ``nn.Linear`` has it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """``model.half()`` and the like move the scales, but leave them float32."""
        scale = self.weight_scale
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        return result
