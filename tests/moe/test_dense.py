"""The dense part of a model on a CPU: results as torch's, and who computes what."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fairseq_moe_opt.moe import available_kernels
from fairseq_moe_opt.moe.dense import FUSED, ONEDNN, TORCH, feed_forward, gains, linear, onednn_refusal
from fairseq_moe_opt.moe.dense_report import DenseCounters, DenseReport
from fairseq_moe_opt.moe.types import ExpertWeights
from tests.helpers.compare import assert_close_relative

needs_onednn = pytest.mark.skipif(onednn_refusal() is not None, reason=str(onednn_refusal()))
needs_fused = pytest.mark.skipif("fused" not in available_kernels(), reason="the compiled kernel is not built")


def matrices(out: int, into: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, into, generator=generator) / into**0.5
    return weight.to(dtype), torch.randn(out, generator=generator).to(dtype)


def network(
    width: int = 48, hidden: int = 80, dtype: torch.dtype = torch.float32, *, bias: bool = True
) -> ExpertWeights:
    first, second = matrices(hidden, width, dtype, 1), matrices(width, hidden, dtype, 2)
    return ExpertWeights(first[0], first[1] if bias else None, second[0], second[1] if bias else None)


def as_torch(rows: Tensor, ffn: ExpertWeights) -> Tensor:
    hidden = functional.relu(functional.linear(rows, ffn.fc1_weight, ffn.fc1_bias))
    return functional.linear(hidden, ffn.fc2_weight, ffn.fc2_bias)


@needs_onednn
@pytest.mark.parametrize("shape", [(1, 24), (32, 24), (2, 5, 24), (3, 1, 24)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_float32_linears_go_through_onednn(shape: tuple[int, ...], with_bias: bool) -> None:
    weight, bias = matrices(40, 24)
    rows = torch.randn(shape)
    given = bias if with_bias else None
    with torch.no_grad():
        output, backend = linear(rows, weight, given, compiled=False)
    assert backend == ONEDNN and output.shape == (*shape[:-1], 40)
    assert_close_relative(output, functional.linear(rows, weight, given), 1e-6)


def test_a_hand_worked_product() -> None:
    weight, bias = torch.tensor([[1.0, 2.0], [3.0, 4.0], [-1.0, 0.0]]), torch.tensor([10.0, 0.0, 0.0])
    for compiled in (True, False):
        output, _ = linear(torch.tensor([[1.0, 1.0], [2.0, -1.0]]), weight, bias, compiled=compiled)
        assert output.tolist() == [[13.0, 7.0, -1.0], [10.0, 2.0, -2.0]]
    ffn = ExpertWeights(weight, bias, torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 2.0]]), torch.tensor([0.0, 1.0]))
    for compiled in (True, False):
        found = feed_forward(torch.tensor([[1.0, 1.0], [2.0, -1.0]]), ffn, "relu", compiled=compiled)
        if found is not None:  # a machine with neither oneDNN nor the compiled kernel
            assert found[0].tolist() == [[20.0, 1.0], [12.0, 1.0]]


@needs_fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "into"), [(40, 24), (1, 7), (131, 65), (512, 48)])
@pytest.mark.parametrize("threads", [1, 3])
def test_few_rows_of_a_linear_are_the_compiled_kernels(dtype: torch.dtype, out: int, into: int, threads: int) -> None:
    weight, bias = matrices(out, into, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape, given in (((1, into), bias), ((4, 1, into), None), ((2, 2, into), bias)):
            rows = torch.randn(shape).to(dtype)
            output, backend = linear(rows, weight, given, compiled=True)
            assert backend == FUSED and output.shape == (*shape[:-1], out) and output.dtype == dtype
            exact = functional.linear(rows.double(), weight.double(), None if given is None else given.double())
            # Half a unit in the last of bfloat16's 8 places is what rounding the result costs.
            error = (output.double() - exact).abs() / exact.abs().clamp(min=1)
            assert float(error.max()) <= (1e-5 if dtype == torch.float32 else 2**-8)
    finally:
        torch.set_num_threads(before)


@needs_fused
def test_a_row_of_a_linear_is_the_same_whatever_rows_are_beside_it() -> None:
    weight, bias = matrices(100, 60)
    rows = torch.randn(4, 60)
    together, _ = linear(rows, weight, bias, compiled=True)
    apart = torch.cat([linear(row[None], weight, bias, compiled=True)[0] for row in rows])
    assert torch.equal(together, apart)


@needs_onednn
@needs_fused
def test_many_rows_of_a_linear_are_onednns() -> None:
    weight, bias = matrices(16, 12)
    assert linear(torch.randn(65, 12), weight, bias, compiled=True)[1] == ONEDNN
    assert linear(torch.randn(5, 13, 12), weight, bias, compiled=True)[1] == ONEDNN


def test_what_gains_is_said_by_dtype() -> None:
    compiled = "fused" in available_kernels()
    assert gains(torch.bfloat16, compiled=True) is compiled and not gains(torch.bfloat16, compiled=False)
    assert gains(torch.float32, compiled=False) is (onednn_refusal() is None)
    assert not gains(torch.float64, compiled=True) and not gains(torch.float16, compiled=True)


@needs_onednn
def test_columns_of_a_wider_tensor_are_rows_like_any() -> None:
    weight, bias = matrices(16, 12)
    wide = torch.randn(4, 30)
    output, backend = linear(wide[:, 5:17], weight, bias, compiled=False)
    assert backend == ONEDNN
    assert_close_relative(output, functional.linear(wide[:, 5:17], weight, bias), 1e-6)


def test_whoever_wants_gradients_gets_torch() -> None:
    weight, bias = matrices(16, 12)
    weight.requires_grad_()
    rows = torch.randn(4, 12)
    output, backend = linear(rows, weight, bias, compiled=True)
    assert backend == TORCH and output.requires_grad
    with torch.no_grad():
        assert linear(rows, weight, bias, compiled=False)[1] == (TORCH if onednn_refusal() else ONEDNN)
    assert linear(rows.requires_grad_(), weight.detach(), bias, compiled=True)[1] == TORCH


def test_other_dtypes_autocast_and_no_rows_are_torchs() -> None:
    weight, bias = matrices(16, 12)
    for dtype, compiled in ((torch.bfloat16, False), (torch.float16, True), (torch.float64, True)):
        output, backend = linear(torch.ones(2, 12, dtype=dtype), weight.to(dtype), bias.to(dtype), compiled=compiled)
        assert (backend, output.dtype) == (TORCH, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, backend = linear(torch.ones(2, 12), weight, bias, compiled=True)
    assert (backend, output.dtype) == (TORCH, torch.bfloat16)
    output, backend = linear(torch.ones(0, 12), weight, bias, compiled=True)
    assert (backend, output.shape) == (TORCH, (0, 16))


@needs_fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_are_the_compiled_kernels(dtype: torch.dtype, bias: bool) -> None:
    ffn = network(dtype=dtype, bias=bias)
    rows = torch.randn(2, 2, 48).to(dtype)
    found = feed_forward(rows, ffn, "relu", compiled=True)
    assert found is not None and found[1] == FUSED
    exact = as_torch(rows.double(), ExpertWeights(*(None if t is None else t.double() for t in _fields(ffn))))
    tolerance = 1e-5 if dtype == torch.float32 else 2 * float((as_torch(rows, ffn).double() - exact).abs().max())
    assert float((found[0].double() - exact).abs().max()) <= max(tolerance, 1e-5)


def _fields(ffn: ExpertWeights) -> tuple[Tensor | None, ...]:
    return ffn.fc1_weight, ffn.fc1_bias, ffn.fc2_weight, ffn.fc2_bias


@needs_onednn
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_many_rows_and_a_kernel_that_is_not_wanted_are_onednns(activation: str) -> None:
    ffn = network()
    for count, compiled in ((200, True), (3, False)):
        rows = torch.randn(count, 48)
        found = feed_forward(rows, ffn, activation, compiled=compiled)
        assert found is not None and found[1] == ONEDNN
        hidden = functional.linear(rows, ffn.fc1_weight, ffn.fc1_bias)
        hidden = functional.relu(hidden) if activation == "relu" else functional.gelu(hidden)
        assert_close_relative(found[0], functional.linear(hidden, ffn.fc2_weight, ffn.fc2_bias), 1e-5)


def test_where_nothing_is_faster_the_host_model_computes() -> None:
    many = torch.randn(200, 48)
    assert feed_forward(many.bfloat16(), network(dtype=torch.bfloat16), "relu", compiled=True) is None
    assert feed_forward(many.double(), network(dtype=torch.float64), "relu", compiled=True) is None
    trainable = network()
    trainable.fc2_weight.requires_grad_()
    assert feed_forward(many, trainable, "relu", compiled=True) is None


def test_weights_of_another_kind_are_left_alone() -> None:
    class Quantised(nn.Parameter):
        pass

    weight, bias = matrices(16, 12)
    assert linear(torch.ones(2, 12), Quantised(weight, requires_grad=False), bias, compiled=True)[1] == TORCH


def test_counters_count_by_backend_and_copies_start_afresh() -> None:
    counters = DenseCounters()
    counters.linears, counters.feed_forwards = 3, 1
    for backend in (FUSED, ONEDNN, FUSED):
        counters.add(backend)
    assert counters.snapshot() == DenseReport(3, 1, {"fused": 2, "onednn": 1})
    for other in (copy.deepcopy(counters), pickle.loads(pickle.dumps(counters))):
        assert other.snapshot() == DenseReport(3, 1, {})
        other.add(TORCH)
    assert counters.snapshot().calls == {"fused": 2, "onednn": 1}
    counters.reset()
    assert counters.snapshot().to_dict() == {"linears": 3, "feed_forwards": 1, "calls": {}}
