"""The dense part of a model on a CPU: linear layers and feed-forward networks that every token goes through.

Between two sparse layers there are several that are dense, and the projections of attention. They are memory's and
GEMMs' work as experts are, so the same means help:

* a feed-forward network for few rows is one expert of one, and the compiled kernel computes it (``fused``), as it does
  a linear layer for few rows;
* other float32 GEMMs go through oneDNN, which torch has but does not use for them (``onednn``): of the same matrices,
  with no copy of them. In bfloat16, torch uses it itself.

Where neither is known to be faster, torch computes what it always does (``torch``). Results are the same to rounding.
How fast each is, and up to how many rows, was measured where ``docs/benchmarks.md`` says.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from fairseq_moe_opt.moe.activations import activate
from fairseq_moe_opt.moe.kernels import get_kernel
from fairseq_moe_opt.moe.kernels.extension import load
from fairseq_moe_opt.moe.kernels.fused import FusedKernel
from fairseq_moe_opt.moe.kernels.limits import row_limit
from fairseq_moe_opt.moe.types import ExpertWave, ExpertWeights, Segment

FUSED, ONEDNN, TORCH = "fused", "onednn", "torch"

_FUSED_ROWS: Mapping[torch.dtype, int] = {torch.float32: 64, torch.bfloat16: 32}
"""Up to so many rows the compiled kernel is faster than a GEMM over all cores, which it is not for one expert alone
with as many rows as it takes among others."""

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_X86 = ("x86_64", "AMD64", "amd64")


@cache
def onednn_refusal() -> str | None:
    """Why float32 GEMMs are left to torch here, or None; decided once a process."""
    if platform.machine() not in _X86:
        return f"only measured on x86, this is {platform.machine()}"
    if not (torch._C._has_mkldnn and torch.backends.mkldnn.enabled):
        return "this torch is without oneDNN"
    rows, weight, bias = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)
    try:
        # The operator that torch.compile uses. It is private: a release without it, or with another signature, is one
        # where torch computes.
        result = _onednn(rows, weight, bias, "relu")
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"this torch lacks the operator ({type(error).__name__})"
    return None if torch.equal(result, torch.full((2, 4), 4.0)) else "this torch's operator does something else"


def gains(dtype: torch.dtype, *, compiled: bool) -> bool:
    """Whether a linear layer of this dtype, for some number of rows, is anyone's but torch's here.

    ``compiled``: whether the compiled kernel may.
    """
    by_kernel = compiled and dtype in _FUSED_ROWS and not isinstance(load(), str)
    return by_kernel or (dtype == torch.float32 and onednn_refusal() is None)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None, *, compiled: bool) -> tuple[Tensor, str]:
    """(..., in) ``rows`` times (out, in) ``weight``, plus ``bias``; and what computed it.

    ``compiled``: whether the compiled kernel may.
    """
    if rows.dtype in _FUSED_ROWS and _plain(rows, weight, bias):
        if compiled and rows.numel() <= _fused_rows(weight, "relu") * rows.shape[-1]:
            flat = rows.reshape(-1, rows.shape[-1]).contiguous()
            out = cast(FusedKernel, get_kernel(FUSED)).linear(flat, weight, bias)
            return out.view(*rows.shape[:-1], len(weight)), FUSED
        if rows.dtype == torch.float32 and onednn_refusal() is None:
            return _onednn(rows.contiguous(), weight, bias, "none"), ONEDNN
    return functional.linear(rows, weight, bias), TORCH


def feed_forward(rows: Tensor, ffn: ExpertWeights, activation: str, *, compiled: bool) -> tuple[Tensor, str] | None:
    """``fc2(act(fc1 x))`` of (..., D) ``rows``, and what computed it; None where nothing here is faster than torch.

    ``compiled``: whether the compiled kernel may.
    """
    if rows.dtype not in _FUSED_ROWS or not _plain(rows, *ffn.tensors()):
        return None
    flat = rows.reshape(-1, rows.shape[-1]).contiguous()
    if compiled and flat.shape[0] <= _fused_rows(ffn.fc1_weight, activation):
        out = torch.empty_like(flat)
        get_kernel(FUSED).run(flat, (Segment(0, 0, len(flat)),), ExpertWave((0,), (ffn,)), activation, out)
        return out.view(rows.shape), FUSED
    if rows.dtype != torch.float32 or onednn_refusal() is not None:
        return None
    in_one = activation if activation == "relu" else "none"
    hidden = _onednn(flat, ffn.fc1_weight, ffn.fc1_bias, in_one)
    if in_one == "none":
        hidden = activate(activation, hidden)
    return _onednn(hidden, ffn.fc2_weight, ffn.fc2_bias, "none").view(rows.shape), ONEDNN


def _fused_rows(fc1_weight: Tensor, activation: str) -> int:
    """The most rows that the compiled kernel is to compute; 0 where it cannot."""
    extension = load()
    if isinstance(extension, str) or activation not in FusedKernel.activations:
        return 0
    dtype, (ffn_width, model_width) = fc1_weight.dtype, fc1_weight.shape
    return min(_FUSED_ROWS[dtype], row_limit(dtype, dtype, model_width, ffn_width, extension.level))


def _plain(rows: Tensor, *tensors: Tensor | None) -> bool:
    """Whether all are ordinary matrices and vectors of one dtype on the CPU, and no gradient is wanted."""
    if torch.is_autocast_enabled("cpu") or not rows.numel():
        return False
    wanted = torch.is_grad_enabled()
    for tensor in (rows, *tensors):
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN_TYPES or tensor.device.type != "cpu" or tensor.dtype != rows.dtype:
            return False
        if (wanted and tensor.requires_grad) or (tensor is not rows and not tensor.is_contiguous()):
            return False
    return True


def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None, then: str) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, then, [], "")
    return result
