"""The int8 rule: integers worked out by hand, the error bound for anything, and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.moe import ExpertWeights
from fairseq_moe_opt.moe.quantization import dequantize, dequantize_rows, quantize_into, quantize_rows


def test_integers_by_hand() -> None:
    # Channel 0: scale 254 / 127 = 2; 3 / 2 = 1.5 and 5 / 2 = 2.5 go to the even neighbour.
    # Channel 1: scale 1.27 / 127 = 0.01. Channel 2: zeros.
    weight = torch.tensor([[254.0, -254.0, 3.0, 5.0, 0.0], [1.27, -0.004, 0.006, -0.633, 1.0], [0.0] * 5])
    codes, scale = quantize_rows(weight)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert codes.tolist() == [[127, -127, 2, 2, 0], [127, 0, 1, -63, 100], [0] * 5]
    assert scale[:2].tolist() == pytest.approx([2.0, 0.01])
    assert float(scale[2]) > 0
    assert dequantize_rows(codes, scale)[0].tolist() == [254.0, -254.0, 4.0, 4.0, 0.0]
    assert dequantize_rows(codes, scale)[2].tolist() == [0.0] * 5


@st.composite
def _matrices(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    exponent = draw(st.integers(-30, 30))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    if dtype == torch.float16:
        exponent = max(-10, min(exponent, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, columns, generator=generator) * 2.0**exponent
    return (weight * (torch.rand(rows, columns, generator=generator) < 0.8)).to(dtype)


@settings(max_examples=100, deadline=None)
@given(_matrices())
def test_no_element_is_off_by_more_than_half_a_scale(weight: Tensor) -> None:
    codes, scale = quantize_rows(weight)
    assert int(codes.min()) >= -127
    error = (weight.double() - codes.double() * scale.double().unsqueeze(1)).abs()
    assert bool((error <= scale.double().unsqueeze(1) * (0.5 + 1e-5)).all())


@settings(max_examples=50, deadline=None)
@given(_matrices())
def test_quantising_again_changes_nothing(weight: Tensor) -> None:
    codes, scale = quantize_rows(weight)
    again, _ = quantize_rows(dequantize_rows(codes, scale))
    assert torch.equal(again, codes)


def test_numbers_without_a_scale_are_refused() -> None:
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(OptionError, match=r"'expert_dtype': weights that are infinite or not a number"):
            quantize_rows(torch.tensor([[1.0, wrong]]))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_an_expert_is_quantised_in_place(gated: bool, bias: bool) -> None:
    expert = ExpertWeights.empty(6, 10, dtype=torch.bfloat16, bias=bias, gated=gated)
    for tensor in expert.tensors():
        tensor.normal_()
    into = ExpertWeights.empty(6, 10, dtype=torch.int8, bias_dtype=torch.bfloat16, bias=bias, gated=gated)
    places = [tensor.data_ptr() for tensor in into.tensors()]
    quantize_into(expert, into)
    assert [tensor.data_ptr() for tensor in into.tensors()] == places
    assert into.is_quantized and not expert.is_quantized
    assert torch.equal(into.fc1_weight, quantize_rows(expert.fc1_weight)[0])
    back = dequantize(into, torch.float32)
    assert not back.is_quantized
    pairs = zip(back.tensors(), expert.tensors(), strict=True)
    assert all(torch.allclose(one, other.float(), atol=0.02, rtol=0) for one, other in pairs)
    if bias:
        assert into.fc2_bias is not None and expert.fc2_bias is not None
        assert torch.equal(into.fc2_bias, expert.fc2_bias)
    # One byte a weight, four a channel's scale, two a bias.
    channels = 10 + 6 + (10 if gated else 0)
    assert into.nbytes == 60 * (3 if gated else 2) + 4 * channels + (2 * 16 if bias else 0)


def test_floats_are_no_int8_expert() -> None:
    with pytest.raises(ValueError, match="not int8"):
        dequantize(ExpertWeights.empty(2, 2, dtype=torch.float32), torch.float32)
