"""Products of floating-point rows with int8 weights on CPU, through torch's own operations.

Measured in microseconds, torch 2.13, one core of an AMD EPYC with AVX512 and 32 MiB of cache, weights (512, 2048):

=========================================  ======  ======  =======  =======  ========
rows                                            1       4       16       64       256
=========================================  ======  ======  =======  =======  ========
float32 GEMM of float32 weights               153     277      472     1380      4841
codes to float32, then GEMM                   106     199      401     1230      4793
``torch._weight_int8pack_mm`` in float32      630    2597    18625    62973    260680
bfloat16 GEMM of bfloat16 weights              70      70      116      314      1057
codes to bfloat16, then GEMM                  172     172      215      395      1136
``torch._weight_int8pack_mm`` in bfloat16      54      54      194      723      2795
=========================================  ======  ======  =======  =======  ========

So torch's int8 kernel is taken where it is vectorised (bfloat16) and rows are few; elsewhere the codes become floats, a
block that fits the cache at a time, and a GEMM does the rest. torchao's weight-only int8 linear is the same two
operations, so it would add nothing but a dependency.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fairseq_moe_opt.moe.kernels.workspace import ThreadWorkspace

_FEW_ROWS = 16
"""Up to so many bfloat16 rows torch's int8 kernel beats the conversion of all codes; at 32 it no longer does."""

_KERNEL_WIDTH = 16
_KERNEL_ALIGNMENT: Mapping[torch.dtype, int] = {torch.bfloat16: 32, torch.int8: 16}
"""torch's kernel reads 16 columns at a time by aligned loads, unchecked: else it reads past the end, or crashes."""

_BLOCK_BYTES = 4 * 2**20
"""Codes are converted into blocks of this size: smaller ones pay for more calls, larger ones leave the cache."""


def int8_linear(
    rows: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor, workspace: ThreadWorkspace
) -> None:
    """Write ``rows @ (codes * scale[:, None]).T + bias`` into ``out``.

    Args:
        rows: (r, in) float32, bfloat16, float16 or float64, contiguous; all CPU.
        codes: (out, in) int8; scale: (out,) float32; bias: (out,) in the rows' dtype, or None.
        out: (r, out) in the rows' dtype; the scale is applied to the sums, in float32 or the rows' dtype.
        workspace: scratch space of this thread.
    """
    if rows.dtype == torch.float16:
        # Sums of codes reach past float16's largest number, and CPUs compute it through float32 anyway.
        result = torch.empty(out.shape, dtype=torch.float32)
        int8_linear(rows.float(), codes, scale, None if bias is None else bias.float(), result, workspace)
        out.copy_(result)
        return
    if _suits_torch_kernel(rows, codes):
        out.copy_(torch._weight_int8pack_mm(rows, codes, scale.to(rows.dtype)))
    else:
        _by_blocks(rows, codes, out, workspace)
        out.mul_(scale)
    if bias is not None:
        out.add_(bias)


def _suits_torch_kernel(rows: Tensor, codes: Tensor) -> bool:
    """Whether ``torch._weight_int8pack_mm`` is faster here, and safe.

    torch aligns what it allocates, and so do the slots of a buffer: an expert takes the same way wherever it lies.
    """
    if rows.dtype != torch.bfloat16 or rows.shape[0] > _FEW_ROWS or codes.shape[1] % _KERNEL_WIDTH:
        return False
    return all(
        tensor.is_contiguous() and tensor.data_ptr() % _KERNEL_ALIGNMENT[tensor.dtype] == 0 for tensor in (rows, codes)
    )


def _by_blocks(rows: Tensor, codes: Tensor, out: Tensor, workspace: ThreadWorkspace) -> None:
    """``rows @ codes.T``: every code is a float of any dtype here exactly."""
    channels, width = codes.shape
    step = min(channels, max(1, _BLOCK_BYTES // (width * rows.element_size())))
    block = workspace.take("int8_block", step, width, rows.dtype)
    for first in range(0, channels, step):
        some = codes[first : first + step]
        floats = block[: some.shape[0]].copy_(some)
        torch.mm(rows, floats.t(), out=out[:, first : first + step])
