"""Weight-only int8: symmetric, one scale an output channel, round to nearest. Pure functions over tensors.

An expert's matrix ``w`` (out, in) becomes codes ``q`` (out, in) int8 in -127...127 and scales ``s`` (out,) float32 with
``s[i] = max|w[i]| / 127``, and stands for ``q[i] * s[i]``. Then ``|w - q s| <= s / 2`` for every element, up to the
float32 rounding of ``w / s`` (1e-5 of ``s``). Activations are never quantised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.moe.types import ExpertWeights

MAX_CODE = 127
"""-128 is not used: codes are symmetric, so that the sign of a weight costs no accuracy."""

_MATRICES = ("fc1", "fc2", "gate")


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (out, in) int8 and scales (out,) float32 of a floating-point ``weight`` (out, in).

    Raises OptionError when a weight is not finite: no scale covers it.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[:1], dtype=torch.float32, device=weight.device)
    quantize_rows_into(weight, codes, scale)
    return codes, scale


def quantize_rows_into(weight: Tensor, codes: Tensor, scale: Tensor) -> None:
    """The same into memory that is there: ``codes`` (out, in) int8 and ``scale`` (out,) float32, on any device."""
    with torch.no_grad():
        values = weight.float()
        largest = torch.linalg.vector_norm(values, ord=float("inf"), dim=1)
        if not bool(torch.isfinite(largest).all()):
            raise OptionError("expert_dtype", "weights that are infinite or not a number cannot become int8")
        # A channel of zeros has no scale of its own; any positive one stands for it.
        scales = (largest / MAX_CODE).clamp_(min=torch.finfo(torch.float32).tiny)
        codes.copy_(values.div(scales.unsqueeze(1)).round_())
        scale.copy_(scales)


def dequantize_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The (out, in) floats that ``codes`` and ``scale`` stand for: computed in float32, rounded to ``dtype`` once."""
    return (codes.float() * scale.float().unsqueeze(1)).to(dtype)


def quantize_into(expert: ExpertWeights, into: ExpertWeights) -> None:
    """Fill the int8 expert ``into`` (see ``ExpertWeights.empty``) from the floating-point ``expert``, biases copied.

    Raises OptionError when a weight is not finite.
    """
    for name in _MATRICES:
        weight, codes = getattr(expert, f"{name}_weight"), getattr(into, f"{name}_weight")
        if weight is not None:
            quantize_rows_into(weight, codes, getattr(into, f"{name}_scale"))
    with torch.no_grad():
        for name in ("fc1_bias", "fc2_bias", "gate_bias"):
            bias = getattr(expert, name)
            if bias is not None:
                getattr(into, name).copy_(bias)


def dequantize(expert: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    """The floating-point expert of ``dtype``, biases too, that an int8 ``expert`` stands for; no scales any more."""
    if expert.fc1_scale is None or expert.fc2_scale is None:
        raise ValueError("the expert is not int8")
    gate = expert.gate_weight
    if gate is not None and expert.gate_scale is not None:
        gate = dequantize_rows(gate, expert.gate_scale, dtype)
    return ExpertWeights(
        dequantize_rows(expert.fc1_weight, expert.fc1_scale, dtype),
        _cast(expert.fc1_bias, dtype),
        dequantize_rows(expert.fc2_weight, expert.fc2_scale, dtype),
        _cast(expert.fc2_bias, dtype),
        gate,
        gate_bias=_cast(expert.gate_bias, dtype),
    )


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
