"""The device code of the triton kernel, run by Triton's interpreter; started by ``test_triton_kernel.py``."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_moe_opt.errors import KernelError
from fairseq_moe_opt.moe import GShardTop2Router, PackedExperts, ResidentExperts, ResidentPackedExperts, Routing
from fairseq_moe_opt.moe.kernels import available_kernels, get_kernel
from fairseq_moe_opt.moe.kernels.triton_grouped import TritonKernel
from fairseq_moe_opt.moe.types import Segment
from hf_integration import optimize
from tests.helpers import nllb
from tests.helpers.language_models import language_model, logits_of
from tests.helpers.layers import layer_of, random_experts

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
WIDTH, HIDDEN = 20, 75


def make_experts(
    num_experts: int, dtype: torch.dtype, *, width: int = WIDTH, bias: bool = True, gated: bool = False
) -> PackedExperts:
    experts = random_experts(num_experts, width, HIDDEN, dtype)
    if not bias:
        experts = replace(experts, fc1_bias=None, fc2_bias=None)
    if gated:
        gate = torch.randn(num_experts, HIDDEN, width).div(width**0.5).to(dtype)
        experts = replace(experts, gate_weight=gate)
        if bias:
            experts = replace(experts, gate_bias=torch.randn(num_experts, HIDDEN).to(dtype))
    return experts


def by_kernel(name: str, experts: PackedExperts, sizes: tuple[int, ...], rows: Tensor, activation: str) -> Tensor:
    stops = list(accumulate(sizes))
    segments = [Segment(e, stop - size, stop) for e, (size, stop) in enumerate(zip(sizes, stops, strict=True)) if size]
    (wave,) = ResidentPackedExperts(experts).waves([segment.expert for segment in segments])
    out = torch.full_like(rows, float("nan"))
    get_kernel(name).run(rows, segments, wave, activation, out)
    return out


def wanted(experts: PackedExperts, tokens: Tensor, index: Tensor, weight: Tensor, activation: str = "relu") -> Tensor:
    """What the oracle kernel makes of every choice, weighted and summed in float64."""
    total = torch.zeros(tokens.shape, dtype=torch.float64)
    for expert in range(experts.num_experts):
        token, choice = (index == expert).nonzero(as_tuple=True)
        if len(token):
            sizes = tuple(len(token) if e == expert else 0 for e in range(experts.num_experts))
            result = by_kernel("naive", experts, sizes, tokens[token], activation)
            total.index_add_(0, token, result.double() * weight[token, choice].double()[:, None])
    return total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("sizes", [(3, 0, 17, 1), (1,)], ids=str)
def test_segments_agree_with_naive(sizes: tuple[int, ...], bias: bool, gated: bool, dtype: torch.dtype) -> None:
    experts = make_experts(len(sizes), dtype, bias=bias, gated=gated)
    rows, activation = torch.randn(sum(sizes), WIDTH).to(dtype), "silu" if gated else "relu"
    expected = by_kernel("naive", experts, sizes, rows, activation)
    actual = by_kernel("triton", experts, sizes, rows, activation)
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 1), (9, 2), (20, 3)])
def test_a_routing_agrees_with_naive(num_tokens: int, top_k: int, gated: bool, dtype: torch.dtype) -> None:
    """Some experts have no rows; some choices, with weights that are no numbers, are not computed."""
    experts = make_experts(5, dtype, gated=gated)
    tokens, weight = torch.randn(num_tokens, WIDTH).to(dtype), torch.rand(num_tokens, top_k).to(dtype)
    index = torch.randint(0, 4, (num_tokens, top_k))
    index[num_tokens // 2 :, -1] = 5
    weight[index == 5] = float("nan")
    activation = "silu" if gated else "relu"
    result = TritonKernel().run_routed(tokens, index, weight, experts, activation)
    expected = wanted(experts, tokens, index, weight, activation)
    assert result.counts.tolist() == [int((index == expert).sum()) for expert in range(5)]
    assert result.output.dtype == dtype
    torch.testing.assert_close(result.output.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_no_tokens_and_no_computed_choices() -> None:
    experts, kernel = make_experts(3, torch.float32), TritonKernel()
    none = kernel.run_routed(
        torch.empty(0, WIDTH), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2), experts, "relu"
    )
    assert (none.output.shape, none.counts.tolist()) == ((0, WIDTH), [0, 0, 0])
    index, weight = torch.full((4, 2), 3), torch.full((4, 2), float("nan"))
    dropped = kernel.run_routed(torch.randn(4, WIDTH), index, weight, experts, "relu")
    assert torch.equal(dropped.output, torch.zeros(4, WIDTH))


@pytest.mark.parametrize("activation", sorted(TritonKernel.activations))
def test_activations(activation: str) -> None:
    experts, rows = make_experts(2, torch.float32), torch.randn(5, WIDTH) * 3
    expected = by_kernel("naive", experts, (2, 3), rows, activation)
    torch.testing.assert_close(by_kernel("triton", experts, (2, 3), rows, activation), expected, rtol=1e-5, atol=1e-5)


def test_not_a_number_stays_one() -> None:
    rows = torch.randn(2, WIDTH)
    rows[1, 3] = float("nan")
    out = by_kernel("triton", make_experts(1, torch.float32), (2,), rows, "relu")
    assert out[0].isfinite().all() and out[1].isnan().all()


def test_stacks_of_any_strides() -> None:
    """Transposed, and gate and up by turns, as model families keep them."""
    experts = make_experts(3, torch.float32, gated=True)
    halves = torch.stack((experts.gate_weight, experts.fc1_weight), 2)  # type: ignore[arg-type]
    biases = torch.stack((experts.gate_bias, experts.fc1_bias), 2)  # type: ignore[arg-type]
    strided = replace(
        experts,
        gate_weight=halves[:, :, 0],
        fc1_weight=halves[:, :, 1],
        gate_bias=biases[:, :, 0],
        fc1_bias=biases[:, :, 1],
        fc2_weight=experts.fc2_weight.transpose(1, 2).contiguous().transpose(1, 2),
    )
    rows = torch.randn(7, WIDTH)
    expected = by_kernel("triton", experts, (3, 0, 4), rows, "silu")
    assert torch.equal(by_kernel("triton", strided, (3, 0, 4), rows, "silu"), expected)


@pytest.mark.parametrize("width", [1, 64, 1030])
def test_widths_beside_the_blocks(width: int) -> None:
    experts, tokens = make_experts(2, torch.float32, width=width), torch.randn(3, width)
    index, weight = torch.tensor([[0, 1], [1, 2], [1, 0]]), torch.rand(3, 2)
    actual = TritonKernel().run_routed(tokens, index, weight, experts, "relu").output.double()
    torch.testing.assert_close(actual, wanted(experts, tokens, index, weight), rtol=1e-5, atol=1e-5)


def test_refusals() -> None:
    assert "triton" in available_kernels()
    experts, rows = make_experts(1, torch.float32), torch.randn(1, WIDTH)
    (apart,) = ResidentExperts(1, experts.expert).waves((0,))
    with pytest.raises(KernelError, match="packed"):
        get_kernel("triton").run(rows, [Segment(0, 0, 1)], apart, "relu", torch.empty_like(rows))
    with pytest.raises(KernelError, match="not the activation 'tanh'; use kernel='loop'"):
        by_kernel("triton", experts, (1,), rows, "tanh")


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a CUDA device, or has a shape that depends on values."""

    WAITS = ("_local_scalar_dense", "bincount", "nonzero", "masked_select", "unique", "repeat_interleave.Tensor")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert not any(f"aten.{one}" in name for one in self.WAITS), name
        return func(*args, **(kwargs or {}))


def test_a_layer_asks_the_device_nothing() -> None:
    experts, gate, tokens = random_experts(6, WIDTH, HIDDEN), torch.randn(6, WIDTH), torch.randn(11, WIDTH)
    layers = [layer_of(GShardTop2Router(6), experts, gate=gate, kernel=name) for name in ("naive", "triton")]
    padding = torch.arange(11) % 4 == 0
    with torch.inference_mode():
        expected = layers[0](tokens, padding).output
        with NoWaiting():
            actual = layers[1](tokens, padding).output
        with pytest.raises(AssertionError, match="bincount"), NoWaiting():
            layers[0](tokens, padding)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    reports = [layer.counters.snapshot() for layer in layers]
    assert reports[1].kernels == ("triton",)
    assert replace(reports[0], kernels=()) == replace(reports[1], kernels=())


def test_observers_are_told_as_ever() -> None:
    class Seen:
        counts: tuple[int, ...] = ()

        def observe(self, layer: str, routing: Routing, dispatch: Any) -> None:
            self.counts = dispatch.counts

    layer, seen = layer_of(GShardTop2Router(6), random_experts(6), kernel="triton"), Seen()
    layer.observe(seen)
    with torch.inference_mode():
        layer(torch.randn(5, 8))
    report = layer.counters.snapshot()
    assert (seen.counts, sum(seen.counts), report.kernels) == (report.expert_rows, 10, ("triton",))


def test_a_stack_has_no_field_that_is_not_computed() -> None:
    """One that is added to the type has to be added to the kernel."""
    names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "gate_weight", "gate_bias")
    assert tuple(field.name for field in fields(PackedExperts)) == names


@pytest.mark.parametrize("family", ["NLLB-MoE", "Mixtral"])
def test_models_take_the_way_that_never_waits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over modules packed by the engine, and over the stacks that Transformers keeps."""
    model = nllb.tiny_model() if family == "NLLB-MoE" else language_model(family)
    run = (lambda: nllb.logits(model, nllb.batch())) if family == "NLLB-MoE" else (lambda: logits_of(model))
    handle = optimize(model, kernel="loop")
    expected, rows = run(), [layer.expert_rows for layer in handle.report().layers]
    handle.undo()
    monkeypatch.delattr(TritonKernel, "run")
    handle = optimize(model, kernel="triton")
    torch.testing.assert_close(run(), expected, rtol=1e-5, atol=1e-5)
    layers = handle.report().layers
    assert [layer.expert_rows for layer in layers] == rows
    assert {layer.kernels for layer in layers} == {("triton",)}
