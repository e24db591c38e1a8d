"""Label-smoothed cross entropy in one pass over the logits.

fairseq composes it of a log-softmax, a gather and a sum, whose backward passes build four more tensors of the logits'
size: half of a training step of a small model on CPU. Here the gradient is made together with the loss, some rows at
a time, so that what is computed between stays in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 2**19
"""Logits computed at a time: 2 MiB in float32."""


def label_smoothed_cross_entropy(
    logits: Tensor, target: Tensor, smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """fairseq's ``label_smoothed_nll_loss`` (sums, 0-dim float32) of (N, V) ``logits`` and (N,) ``target``.

    Returns the smoothed loss, which is differentiable once, and the plain negative log-likelihood, which is not.
    Rows whose target is ``ignore_index`` count nothing. Computed in float32 whatever the logits' dtype.
    """
    loss, nll_loss = _LabelSmoothedCrossEntropy.apply(logits, target, smoothing, ignore_index)
    return loss, nll_loss


class _LabelSmoothedCrossEntropy(torch.autograd.Function):
    """loss = a * nll - b * sum(log p), a = 1 - smoothing - b, b = smoothing / (V - 1); so d loss / d logits =
    (a + b * V) * p - b, and a less at the target."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, smoothing: float, ignore_index: int) -> tuple[Tensor, Tensor]:
        rows, vocabulary = logits.shape
        uniform = smoothing / (vocabulary - 1)
        sharp = 1.0 - smoothing - uniform
        gradient = torch.empty_like(logits) if logits.requires_grad else None
        nll_loss, smooth_loss = logits.new_zeros((), dtype=torch.float32), logits.new_zeros((), dtype=torch.float32)
        counts = (target != ignore_index).unsqueeze(1)
        safe_target = target.masked_fill(target == ignore_index, 0).unsqueeze(1)
        step = max(1, _CHUNK_ELEMENTS // vocabulary)
        for start in range(0, rows, step):
            here = slice(start, start + step)
            log_p = torch.log_softmax(logits[here], dim=-1, dtype=torch.float32)
            nll_loss -= (log_p.gather(1, safe_target[here]) * counts[here]).sum()
            smooth_loss -= (log_p.sum(dim=1, keepdim=True) * counts[here]).sum()
            if gradient is not None:
                part = log_p.exp_().mul_(sharp + uniform * vocabulary).sub_(uniform)
                part.scatter_add_(1, safe_target[here], part.new_full((), -sharp).expand(part.shape[0], 1))
                gradient[here] = part.mul_(counts[here])
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(nll_loss)
        return sharp * nll_loss + uniform * smooth_loss, nll_loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_nll: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss.to(gradient.dtype), None, None, None
