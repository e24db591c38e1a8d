"""int8 experts in a layer: every way of computing them against the naive one, and what refuses them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fairseq_moe_opt.build import LayerSpec, build_layer, needs_packed_experts
from fairseq_moe_opt.errors import KernelError, NoMoELayerError, OptionError
from fairseq_moe_opt.moe import (
    ExpertWeights,
    GShardTop2Router,
    ResidentExperts,
    available_kernels,
)
from fairseq_moe_opt.moe.int8_linear import Int8Linear
from fairseq_moe_opt.moe.kernels import get_kernel
from fairseq_moe_opt.moe.module_experts import Int8ModuleExperts, ModuleExperts
from fairseq_moe_opt.moe.quantization import dequantize, quantize_rows_into
from fairseq_moe_opt.moe.types import Segment
from fairseq_moe_opt.options import MoEOptions
from tests.helpers.layers import int8_expert, int8_layer

CPU = torch.device("cpu")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}


def run(kernel: str, expert: ExpertWeights, rows: Tensor, activation: str = "relu") -> Tensor:
    (wave,) = ResidentExperts(1, lambda _: expert).waves((0,))
    out = torch.full((len(rows), expert.fc2_weight.shape[0]), float("nan"), dtype=rows.dtype)
    with torch.no_grad():
        get_kernel(kernel).run(rows, [Segment(0, 0, len(rows))], wave, activation, out)
    return out


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 300])
@pytest.mark.parametrize("widths", [(24, 40), (7, 13), (64, 128)], ids=str)
def test_loop_equals_naive(dtype: torch.dtype, count: int, widths: tuple[int, int]) -> None:
    torch.manual_seed(count)
    expert, rows = int8_expert(*widths, dtype=dtype), torch.randn(count, widths[0]).to(dtype)
    expected = run("naive", expert, rows)
    atol = TOLERANCES[dtype] * float(expected.abs().max())
    torch.testing.assert_close(run("loop", expert, rows), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("shift", [1, 4, 8, 16])
def test_memory_that_torchs_kernel_cannot_read(shift: int) -> None:
    """Its loads are aligned ones: rows or codes that begin elsewhere would crash it."""
    torch.manual_seed(shift)
    expert, rows = int8_expert(32, 48, dtype=torch.bfloat16), torch.randn(3, 32).bfloat16()
    expected = run("loop", expert, rows)
    odd_rows = torch.empty(shift + rows.numel(), dtype=rows.dtype)[shift:].view_as(rows).copy_(rows)
    odd_codes = torch.empty(shift + 32 * 48, dtype=torch.int8)[shift:].view(48, 32).copy_(expert.fc1_weight)
    for some in (expert, dataclasses.replace(expert, fc1_weight=odd_codes)):
        torch.testing.assert_close(run("loop", some, odd_rows), expected, rtol=0, atol=3e-2)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_gated_experts(activation: str) -> None:
    torch.manual_seed(0)
    expert, rows = int8_expert(gated=True), torch.randn(9, 24)
    torch.testing.assert_close(
        run("loop", expert, rows, activation), run("naive", expert, rows, activation), rtol=0, atol=1e-5
    )


def test_naive_is_the_arithmetic_itself() -> None:
    torch.manual_seed(1)
    expert, rows = int8_expert(), torch.randn(4, 24)
    assert expert.fc1_scale is not None and expert.fc1_bias is not None
    assert expert.fc2_scale is not None and expert.fc2_bias is not None
    first = expert.fc1_weight.double() * expert.fc1_scale.double()[:, None]
    second = expert.fc2_weight.double() * expert.fc2_scale.double()[:, None]
    hidden = (rows.double() @ first.t() + expert.fc1_bias.double()).clamp(min=0)
    expected = hidden @ second.t() + expert.fc2_bias.double()
    torch.testing.assert_close(run("naive", expert, rows).double(), expected, rtol=0, atol=1e-5)


def test_matrices_of_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    expert, rows = int8_expert(32, 70), torch.randn(5, 32)
    whole = run("loop", expert, rows)
    # Seven rows of 32 floats a block: the last block of 70 rows is whole, the last of 32 is not.
    monkeypatch.setattr("fairseq_moe_opt.moe.kernels.int8._BLOCK_BYTES", 7 * 32 * 4)
    torch.testing.assert_close(run("loop", expert, rows), whole, rtol=0, atol=1e-5)


def test_float16_sums_do_not_overflow() -> None:
    expert = ExpertWeights.empty(64, 64, dtype=torch.int8, bias=False)
    expert.fc1_weight.fill_(127)
    expert.fc2_weight.fill_(127)
    for scale in (expert.fc1_scale, expert.fc2_scale):
        assert scale is not None
        scale.fill_(1 / 127 / 64)
    # The sum of codes is 127 * 64 * 100; what it stands for is 100.
    rows = torch.full((2, 64), 100.0, dtype=torch.float16)
    for kernel in available_kernels("cpu", torch.int8):
        assert run(kernel, expert, rows).float().sub(100).abs().max() < 0.2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_every_way_of_a_layer_agrees(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    experts = [int8_expert(dtype=dtype) for _ in range(6)]
    tokens = torch.randn(50, 24).to(dtype)
    results = {}
    with torch.no_grad():
        for kernel in available_kernels("cpu", torch.int8):
            results[kernel] = int8_layer(experts, kernel=kernel)(tokens).output
        results["static"] = int8_layer(experts, gating="static")(tokens).output
    assert [name for name in results if name != "fused"] == ["naive", "loop", "static"]
    atol = TOLERANCES[dtype] * float(results["naive"].abs().max())
    for result in results.values():
        torch.testing.assert_close(result, results["naive"], rtol=0, atol=atol)


def test_gradients_pass_through_int8_experts() -> None:
    torch.manual_seed(5)
    experts = [int8_expert() for _ in range(3)]
    floats = [dequantize(expert, torch.float32) for expert in experts]
    gradients = []
    for some in (experts, floats):
        tokens = torch.linspace(-1, 1, 24 * 10).view(10, 24).requires_grad_()
        int8_layer(some)(tokens).output.square().sum().backward()
        gradients.append(tokens.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


def test_bf16_experts_compute_rows_of_a_float32_model() -> None:
    """The result is that of rows rounded to bfloat16, in the tokens' dtype, whichever way it is computed."""
    torch.manual_seed(6)
    experts = [dequantize(int8_expert(), torch.bfloat16) for _ in range(4)]
    tokens = torch.randn(30, 24)
    wanted = int8_layer([dequantize_bf16(expert) for expert in experts], kernel="naive")(tokens).output
    for options in ({"kernel": "naive"}, {"kernel": "loop"}, {"gating": "static"}):
        output = int8_layer(experts, **options)(tokens).output
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, wanted, rtol=0, atol=3e-2 * float(wanted.abs().max()))
    output = int8_layer(experts)(tokens.clone().requires_grad_()).output
    torch.testing.assert_close(output, wanted, rtol=0, atol=3e-2 * float(wanted.abs().max()))


def dequantize_bf16(expert: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(*(None if one is None else one.float() for one in vars(expert).values()))


def test_grouped_mm_refuses_int8_and_names_loop() -> None:
    assert [name for name in available_kernels("cpu", torch.int8) if name != "fused"] == ["naive", "loop"]
    with pytest.raises(KernelError, match=r"'grouped_mm' cannot run here: .*not int8.*use kernel='loop'"):
        needs_packed_experts(MoEOptions(kernel="grouped_mm"), CPU, torch.int8)
    with pytest.raises(KernelError, match=r"not int8.*use kernel='loop'"):
        int8_layer([int8_expert()] * 2, kernel="grouped_mm")(torch.randn(3, 24))
    with pytest.raises(KernelError, match=r"not int8.*use kernel='loop'"):
        run("grouped_mm", int8_expert(), torch.randn(3, 24))


def test_asking_for_a_dtype_that_is_not_there_is_an_error() -> None:
    router = GShardTop2Router(2)
    floats = dequantize(int8_expert(), torch.float32)
    store = ResidentExperts(2, lambda _: floats)
    for wanted in ("int8", "bf16"):
        with pytest.raises(OptionError, match=rf"'expert_dtype': '{wanted}' takes effect where.* a.layer .* float32"):
            build_layer(LayerSpec("a.layer", "encoder", router), MoEOptions(expert_dtype=wanted), nn.Identity(), store)
    quantized = ResidentExperts(2, lambda _: int8_expert())
    for wanted in ("int8", "checkpoint"):
        build_layer(LayerSpec("a", "encoder", router), MoEOptions(expert_dtype=wanted), nn.Identity(), quantized)
    with pytest.raises(OptionError, match=r"expert_dtype.*'int4' is not one of checkpoint, bf16, int8"):
        MoEOptions(expert_dtype="int4")


@pytest.fixture
def linear() -> Int8Linear:
    torch.manual_seed(7)
    layer = Int8Linear(6, 4)
    quantize_rows_into(torch.randn(4, 6), layer.weight, layer.weight_scale)
    nn.init.normal_(layer.bias)
    return layer


def test_a_linear_layer_computes_what_its_weights_stand_for(linear: Int8Linear) -> None:
    rows = torch.randn(2, 3, 6)
    expected = functional.linear(rows, linear.weight.float() * linear.weight_scale[:, None], linear.bias)
    torch.testing.assert_close(linear(rows), expected)
    assert list(linear.state_dict()) == ["bias", "weight", "weight_scale"]
    assert [name for name, _ in linear.named_parameters()] == ["bias"]
    assert "in_features=6, out_features=4, bias=True" in repr(linear)
    assert list(Int8Linear(6, 4, bias=False).state_dict()) == ["weight", "weight_scale"]


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.bfloat16, copy.deepcopy], ids=["half", "bf16", "copy"])
def test_casting_a_model_keeps_codes_and_scales(linear: Int8Linear, change: Callable[[Int8Linear], Int8Linear]) -> None:
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    changed = change(linear)
    assert torch.equal(changed.weight, before["weight"])
    assert changed.weight_scale.dtype == torch.float32
    assert torch.equal(changed.weight_scale, before["weight_scale"])
    rows = torch.randn(2, 6).to(changed.bias.dtype)
    assert changed(rows).dtype == rows.dtype


def test_stores_take_only_their_own_layers(linear: Int8Linear) -> None:
    pair = (linear, Int8Linear(4, 6))
    store = Int8ModuleExperts([pair, pair])
    assert (store.num_experts, store.dtype, store.nbytes) == (2, torch.int8, 2 * (2 * 24 + 2 * 4 * (4 + 6)))
    assert store.weights(1).fc1_weight is linear.weight
    assert store.weights(1).fc1_scale is linear.weight_scale
    for wrong, pairs in ((ModuleExperts, [pair]), (Int8ModuleExperts, [(nn.Linear(6, 4), nn.Linear(4, 6))])):
        with pytest.raises(NoMoELayerError, match=r"is a \w*Linear, not \w*Linear"):
            wrong(pairs)
