"""Experts in stacks of every layout: the same results from all kernels, from the parameters as they are now."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.moe.activations import ClampedSwiglu, apply_gate, check_activation
from fairseq_moe_opt.moe.kernels import get_kernel
from fairseq_moe_opt.moe.stacked_experts import StackedExperts, StackLayout, Stacks
from fairseq_moe_opt.moe.types import ExpertWeights, Segment

E, F, D = 3, 8, 16
LAYOUTS = [StackLayout(True, *flags) for flags in itertools.product((False, True), (False, True))]
LAYOUTS += [StackLayout(False, transposed) for transposed in (False, True)]
GATES = ["silu", "gelu_tanh", ClampedSwiglu(1.702, 0.7, 1.0).name]


def stacks_of(layout: StackLayout, *, bias: bool = True) -> Stacks:
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / 4

    width = 2 * F if layout.gated else F
    first, second = new(E, width, D), new(E, D, F)
    if layout.transposed:
        first, second = first.transpose(1, 2).contiguous(), second.transpose(1, 2).contiguous()
    return Stacks(first, second, new(E, width) if bias else None, new(E, D) if bias else None)


def by_hand(rows: Tensor, stacks: Stacks, layout: StackLayout, expert: int, activation: str) -> Tensor:
    """One expert as Transformers' eager code computes it, whole matrices at once."""
    first, second = stacks.first[expert], stacks.second[expert]
    both = rows @ (first if layout.transposed else first.t())
    if stacks.first_bias is not None:
        both = both + stacks.first_bias[expert]
    if layout.gated:
        gate, up = (both[:, ::2], both[:, 1::2]) if layout.interleaved else both.chunk(2, dim=1)
        hidden = apply_gate(activation, gate, up)
    else:
        hidden = torch.relu(both).square()
    result = hidden @ (second if layout.transposed else second.t())
    return result if stacks.second_bias is None else result + stacks.second_bias[expert]


@pytest.mark.parametrize("kernel", ["naive", "loop", "grouped_mm"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_through_every_kernel(layout: StackLayout, bias: bool, kernel: str) -> None:
    stacks = stacks_of(layout, bias=bias)
    store = StackedExperts(layout, lambda: stacks)
    segments = [Segment(0, 0, 5), Segment(2, 5, 7)]
    (wave,) = store.waves((0, 2))
    rows = torch.randn(7, D)
    for activation in GATES if layout.gated else ["relu2"]:
        out = torch.empty_like(rows)
        get_kernel(kernel).run(rows, segments, wave, activation, out)
        for segment in segments:
            here = slice(segment.start, segment.stop)
            torch.testing.assert_close(
                out[here], by_hand(rows[here], stacks, layout, segment.expert, activation), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.gated], ids=str)
def test_gate_and_up_are_one_matrix_in_every_layout(layout: StackLayout) -> None:
    (wave,) = StackedExperts(layout, lambda: stacks_of(layout)).waves((1,))
    joined = wave.weights[0].joined
    assert joined is not None
    assert joined.interleaved == layout.interleaved
    assert joined.matrix.shape == (2 * F, D)


def test_halves_that_lie_apart_are_not_joined() -> None:
    expert = ExpertWeights.empty(D, F, dtype=torch.float32, gated=True, gate_bias=True)
    assert expert.gate_bias is not None
    assert expert.joined is None
    both = torch.randn(2, F, D)
    assert ExpertWeights(both[0], None, torch.empty(D, F), None, both[1]).joined is None  # up before gate


def test_parameters_are_read_as_they_are_now() -> None:
    layout = StackLayout()
    held = [stacks_of(layout)]
    store = StackedExperts(layout, lambda: held[0])
    (before,) = store.waves((0,))
    held[0].first.zero_()
    assert before.weights[0].fc1_weight.abs().sum() == 0
    held[0] = stacks_of(layout)
    (after,) = store.waves((0,))
    assert torch.equal(after.weights[0].fc1_weight, held[0].first[0, F:])
    (again,) = store.waves((0,))
    assert again.weights[0] is after.weights[0]
    assert copy.deepcopy(store).layout == layout


def test_gradients_reach_the_stack() -> None:
    layout = StackLayout(interleaved=True, transposed=True)
    stacks = stacks_of(layout)
    stacks.first.requires_grad_()
    (wave,) = StackedExperts(layout, lambda: stacks).waves((1,))
    wave.weights[0].fc1_weight.sum().backward()
    assert stacks.first.grad is not None
    assert stacks.first.grad[1, :, 1::2].eq(1).all()
    assert stacks.first.grad.sum() == F * D


def test_names_of_gates() -> None:
    gate = ClampedSwiglu(1.702, 7.0, 1.0)
    assert ClampedSwiglu.parse(gate.name) == gate
    assert check_activation(gate.name) == gate.name
    for wrong in ("swiglu", "swiglu(alpha=x,limit=7.0,offset=1.0)", "tanh"):
        with pytest.raises(OptionError, match="is not one of relu"):
            check_activation(wrong)
    # 7 and -7 after clamping: 7 * sigmoid(1.702 * 7) * (-7 + 1).
    value = gate(torch.tensor([[9.0]]), torch.tensor([[-9.0]]))
    torch.testing.assert_close(value, torch.tensor([[-42.0]]), rtol=1e-4, atol=0)
