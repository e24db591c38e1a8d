"""The engine on a CUDA device: every kernel that can run there against the naive one, and a whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fairseq_moe_opt import build
from fairseq_moe_opt.buffering import MissCosts
from fairseq_moe_opt.moe import GShardTop2Router, PackedExperts, available_kernels
from hf_integration import from_pretrained, optimize
from tests.helpers.layers import int8_expert, int8_layer, layer_of, moved_expert, random_experts
from tests.helpers.nllb import batch, logits, tiny_model

pytestmark = pytest.mark.gpu


def moved(experts: PackedExperts, device: torch.device) -> PackedExperts:
    fields = (experts.fc1_weight, experts.fc1_bias, experts.fc2_weight, experts.fc2_bias)
    return PackedExperts(*(None if tensor is None else tensor.to(device) for tensor in fields))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_agree_with_naive(device: torch.device, dtype: torch.dtype) -> None:
    experts = moved(random_experts(6, 32, 64, dtype=dtype), device)
    gate, tokens = torch.randn(6, 32, device=device), torch.randn(50, 32, device=device, dtype=dtype)
    results = {}
    for kernel in available_kernels(device, dtype):
        layer = layer_of(GShardTop2Router(6), experts, gate=gate, kernel=kernel)
        with torch.inference_mode():
            results[kernel] = layer(tokens).output
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for result in results.values():
        torch.testing.assert_close(result, results["naive"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gating", ["dynamic", "static"])
def test_int8_experts_agree_with_naive(device: torch.device, dtype: torch.dtype, gating: str) -> None:
    torch.manual_seed(0)
    experts = [moved_expert(int8_expert(32, 64, dtype=dtype), device) for _ in range(6)]
    tokens = torch.randn(50, 32, device=device, dtype=dtype)
    assert available_kernels(device, torch.int8) == ("naive", "loop")
    with torch.inference_mode():
        expected = int8_layer(experts, kernel="naive")(tokens).output
        actual = int8_layer(experts, gating=gating)(tokens).output
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_an_int8_model_on_the_gpu_equals_itself_on_the_cpu(device: torch.device, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    inputs = batch()
    expected = logits(from_pretrained(tmp_path, expert_dtype="int8"), inputs)
    model = from_pretrained(tmp_path, expert_dtype="int8", device=device)
    actual = logits(model, {name: tensor.to(device) for name, tensor in inputs.items()})
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=1e-4)


def test_a_model_on_the_gpu_equals_itself_on_the_cpu(device: torch.device) -> None:
    model, inputs = tiny_model(), batch()
    optimize(model)
    expected = logits(model, inputs)
    model.to(device)
    actual = logits(model, {name: tensor.to(device) for name, tensor in inputs.items()})
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=1e-4)
    assert model.moe.report().peak_memory_kind == "cuda allocated"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("host_memory", ["0", "50%"])
def test_buffered_experts_equal_resident_ones(
    device: torch.device, dtype: str, host_memory: str, tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path)
    inputs = {name: tensor.to(device) for name, tensor in batch().items()}
    expected = logits(from_pretrained(tmp_path, device=device, dtype=dtype, kernel="loop"), inputs)
    for expert_memory in ("100%", "25%", "6400B" if dtype == "bfloat16" else "12800B"):
        model = from_pretrained(
            tmp_path, device=device, dtype=dtype, expert_memory=expert_memory, host_memory=host_memory
        )
        for _ in range(3):
            assert torch.equal(logits(model, inputs), expected)
        assert (model.moe.report().buffer.host_bytes > 0) == (host_memory != "0")


@pytest.mark.parametrize("expert_dtype", ["checkpoint", "bf16", "int8"])
def test_experts_computed_in_main_memory_agree(
    device: torch.device, expert_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At costs that make it worth while, which those of so small a model are not."""
    monkeypatch.setattr(
        build, "measure_layers", lambda layers, *_: {one.name: MissCosts(1.0, 0, 0.01) for one in layers}
    )
    tiny_model().save_pretrained(tmp_path)
    inputs = {name: tensor.to(device) for name, tensor in batch().items()}
    expected = logits(from_pretrained(tmp_path, device=device, expert_dtype=expert_dtype, kernel="loop"), inputs)
    model = from_pretrained(
        tmp_path,
        device=device,
        expert_dtype=expert_dtype,
        expert_memory="25%",
        host_memory="100%",
        host_compute="auto",
        prefetch="off",
    )
    tolerance = 1e-4 if expert_dtype == "checkpoint" else 3e-2
    for _ in range(4):
        torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=tolerance)
    report = model.moe.report()
    assert report.buffer.host_compute_rows in (99, 100)
    assert sum(layer.cache.on_host for layer in report.layers) > 0


def test_costs_are_measured_on_the_gpu(device: torch.device, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    inputs = {name: tensor.to(device) for name, tensor in batch().items()}
    expected = logits(from_pretrained(tmp_path, device=device, kernel="loop"), inputs)
    model = from_pretrained(tmp_path, device=device, expert_memory="25%", host_memory="50%", host_compute="auto")
    for _ in range(3):
        torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=1e-4)
    assert model.moe.report().buffer.host_compute_rows >= 0
