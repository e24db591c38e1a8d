"""The triton kernel on a CUDA device: against the naive one, and captured in a CUDA graph."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from fairseq_moe_opt.errors import KernelError
from fairseq_moe_opt.moe import GShardTop2Router, MoELayer, PackedExperts, available_kernels
from tests.helpers.layers import layer_of, random_experts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
EXPERTS, WIDTH, HIDDEN = 16, 192, 328


def experts_on(device: torch.device, dtype: torch.dtype, *, gated: bool = False) -> PackedExperts:
    experts = random_experts(EXPERTS, WIDTH, HIDDEN, dtype)
    parts = {name: tensor.to(device) for name, tensor in vars(experts).items() if isinstance(tensor, torch.Tensor)}
    if gated:
        parts["gate_weight"] = torch.randn(EXPERTS, HIDDEN, WIDTH, device=device).div(WIDTH**0.5).to(dtype)
    return replace(experts, **parts)


def layers(device: torch.device, dtype: torch.dtype, *, gated: bool = False) -> tuple[MoELayer, MoELayer]:
    """One of the naive kernel, one of triton; alike otherwise."""
    if "triton" not in available_kernels(device, dtype):
        pytest.skip(f"this GPU is too old for triton with {dtype}")
    experts, gate = experts_on(device, dtype, gated=gated), torch.randn(EXPERTS, WIDTH, device=device)
    naive, triton = (
        layer_of(GShardTop2Router(EXPERTS), experts, gate=gate, kernel=name, activation="silu" if gated else "relu")
        for name in ("naive", "triton")
    )
    return naive, triton


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("num_tokens", [1, 4, 100, 1200])
def test_a_layer_agrees_with_naive_and_never_waits(
    device: torch.device, dtype: torch.dtype, gated: bool, num_tokens: int
) -> None:
    naive, triton = layers(device, dtype, gated=gated)
    tokens = torch.randn(num_tokens, WIDTH, device=device, dtype=dtype)
    padding = torch.arange(num_tokens, device=device) % 5 == 3
    with torch.inference_mode():
        expected = naive(tokens, padding).output
        triton(tokens, padding)  # compiles
        with no_waiting():
            actual = triton(tokens, padding).output
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    one, two = naive.counters.snapshot(), triton.counters.snapshot()
    assert tuple(2 * rows for rows in one.expert_rows) == two.expert_rows
    assert two.kernels == ("triton",)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_graph_computes_and_counts_other_tokens(device: torch.device, dtype: torch.dtype) -> None:
    naive, triton = layers(device, dtype)
    tokens = torch.randn(8, WIDTH, device=device, dtype=dtype)
    with torch.inference_mode():
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            triton(tokens)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = triton(tokens).output
        triton.counters.reset()
        for _ in range(3):
            tokens.copy_(torch.randn_like(tokens))
            graph.replay()
            expected = naive(tokens).output
            torch.testing.assert_close(output, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    one, two = naive.counters.snapshot(), triton.counters.snapshot()
    assert replace(one, kernels=()) == replace(two, kernels=())
    assert (two.calls, two.kernels) == (3, ("triton",))


def test_a_layer_runs_once_before_it_is_captured(device: torch.device) -> None:
    _, triton = layers(device, torch.float32)
    _, compiles = layers(device, torch.float32)
    tokens = torch.randn(8, WIDTH, device=device)
    with torch.inference_mode():
        compiles(tokens)
        with pytest.raises(KernelError, match="run it once before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            triton(tokens)
