"""The fused label-smoothed loss against fairseq's own composition of it."""

from __future__ import annotations

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss

from fairseq_moe_opt.models._cross_entropy import label_smoothed_cross_entropy

PAD = 1


def composed(logits: torch.Tensor, target: torch.Tensor, smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
    """fairseq's two sums."""
    return label_smoothed_nll_loss(torch.log_softmax(logits, -1), target, smoothing, ignore_index=PAD)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
# 30,000 symbols: 17 rows at a time; 40: all rows together.
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 3), (7, 40), (40, 30_000), (0, 5)])
def test_equals_fairseqs_loss_and_gradient(smoothing: float, rows: int, vocabulary: int) -> None:
    torch.manual_seed(rows)
    logits = (3 * torch.randn(rows, vocabulary)).requires_grad_()
    # In float64, because fairseq's own gradient of many symbols is not accurate to 1e-5 in float32.
    reference = logits.detach().double().requires_grad_()
    target = torch.randint(vocabulary, (rows,))
    if rows > 2:
        target[1] = PAD
    loss, nll_loss = label_smoothed_cross_entropy(logits, target, smoothing, PAD)
    wanted, wanted_nll = composed(reference, target, smoothing)
    (loss * 0.7).backward()
    (wanted * 0.7).backward()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nll_loss.double(), wanted_nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.grad.double(), reference.grad, rtol=1e-5, atol=1e-6)


def test_a_row_without_a_target_counts_nothing() -> None:
    logits = torch.randn(4, 9, requires_grad=True)
    loss, nll_loss = label_smoothed_cross_entropy(logits, torch.tensor([2, PAD, PAD, 8]), 0.1, PAD)
    kept, kept_nll = label_smoothed_cross_entropy(logits[[0, 3]], torch.tensor([2, 8]), 0.1, PAD)
    loss.backward()
    assert torch.equal(loss, kept)
    assert torch.equal(nll_loss, kept_nll)
    assert torch.equal(logits.grad[[1, 2]], torch.zeros(2, 9))
    assert logits.grad[[0, 3]].abs().sum() > 0


def test_bfloat16_logits_give_a_float32_loss_and_a_bfloat16_gradient() -> None:
    torch.manual_seed(0)
    exact = torch.randn(6, 50, dtype=torch.bfloat16).float().requires_grad_()
    logits = exact.detach().bfloat16().requires_grad_()
    target = torch.arange(2, 8)
    loss, _ = label_smoothed_cross_entropy(logits, target, 0.1, PAD)
    wanted, _ = label_smoothed_cross_entropy(exact, target, 0.1, PAD)
    loss.backward()
    wanted.backward()
    assert torch.equal(loss, wanted)
    assert torch.equal(logits.grad, exact.grad.bfloat16())


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    loss, nll_loss = label_smoothed_cross_entropy(torch.randn(3, 5), torch.tensor([0, 2, 3]), 0.1, PAD)
    assert not loss.requires_grad
    assert not nll_loss.requires_grad
