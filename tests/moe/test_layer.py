"""The layer: every kernel and the static baseline against a float64 oracle, from the same routing."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_moe_opt.moe import (
    CapacityRule,
    GShardTop2Router,
    LayerCounters,
    Routing,
    SoftmaxTopKRouter,
    Top1Router,
    available_kernels,
)
from fairseq_moe_opt.moe.kernels import choose_kernel
from fairseq_moe_opt.moe.routing import first_come_slots
from tests.helpers.layers import layer_of, oracle, random_experts

WAYS = [*(("dynamic", name) for name in available_kernels()), ("static", "auto")]


def explain(what: object, message: str) -> str:
    return f"{what}: {message}"


def outputs(tokens: torch.Tensor, routing: Routing, experts: object, way: tuple[str, str]) -> torch.Tensor:
    gating, kernel = way
    layer = layer_of(SoftmaxTopKRouter(routing.num_experts, 1), experts, gating=gating, kernel=kernel)
    with torch.no_grad():
        return layer.apply(tokens, routing)


def with_slots(index: torch.Tensor, weight: torch.Tensor, num_experts: int, capacity: int | None = None) -> Routing:
    slots = first_come_slots(index, num_experts)
    if capacity is not None:
        index = index.masked_fill(slots >= capacity, num_experts)
    return Routing(index, weight * (index != num_experts), num_experts, capacity, slots)


def check(tokens: torch.Tensor, routing: Routing, num_experts: int) -> None:
    experts = random_experts(num_experts)
    expected = oracle(tokens, routing, experts)
    for way in WAYS:
        actual = outputs(tokens, routing, experts, way)
        scale = max(expected.abs().max().item(), 1e-6) if expected.numel() else 1.0
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5 * scale, msg=partial(explain, way))


CASES = {
    "empty experts": ([[0, 1], [1, 0], [0, 1]], 6, None),
    "one expert": ([[0], [0], [0]], 1, None),
    "one token": ([[2, 1]], 3, None),
    "all experts": ([[0, 1, 2], [2, 1, 0]], 3, None),
    "all tokens to one expert": ([[1], [1], [1], [1]], 4, None),
    "padding": ([[3, 3], [0, 1], [3, 3], [2, 0]], 3, None),
    "nothing routed": ([[3, 3], [3, 3]], 3, None),
    "capacity binds": ([[0, 1], [0, 1], [0, 2], [1, 0]], 3, 2),
    "capacity does not bind": ([[0, 1], [0, 1], [0, 2], [1, 0]], 3, 4),
    "no capacity at all": ([[0, 1], [1, 0]], 2, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_every_way_equals_the_oracle(case: str) -> None:
    index, num_experts, capacity = CASES[case]
    weight = torch.rand(len(index), len(index[0]))
    routing = with_slots(torch.tensor(index), weight, num_experts, capacity)
    check(torch.randn(len(index), 8), routing, num_experts)


def test_no_tokens() -> None:
    routing = with_slots(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2), 3)
    for way in WAYS:
        assert outputs(torch.empty(0, 8), routing, random_experts(3), way).shape == (0, 8)


@given(st.data())
def test_every_way_equals_the_oracle_drawn(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 9), "E")
    top_k = data.draw(st.integers(1, min(3, num_experts)), "K")
    num_tokens = data.draw(st.integers(1, 14), "T")
    skew = data.draw(st.sampled_from([0.0, 1.0, 4.0]), "skew")
    seed = data.draw(st.integers(0, 2**16), "seed")
    capacity = data.draw(st.none() | st.integers(1, num_tokens), "C")
    generator = torch.Generator().manual_seed(seed)
    popularity = torch.randn(num_experts, generator=generator) * skew
    scores = torch.randn(num_tokens, num_experts, generator=generator) + popularity
    index = scores.topk(top_k, dim=1).indices
    padded = torch.rand(num_tokens, generator=generator) < data.draw(st.sampled_from([0.0, 0.4]), "padding")
    index = index.masked_fill(padded.unsqueeze(1), num_experts)
    weight = torch.rand(num_tokens, top_k, generator=generator)
    tokens = torch.randn(num_tokens, 8, generator=generator)
    check(tokens, with_slots(index, weight, num_experts, capacity), num_experts)


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.1, -1.0])
@pytest.mark.parametrize("bpr", [False, True])
def test_static_and_dynamic_agree_through_their_own_routers(fraction: float, bpr: bool) -> None:
    experts, gate = random_experts(8), torch.randn(8, 8)
    router = GShardTop2Router(8, CapacityRule(fraction), batch_prioritized=bpr)
    tokens, padding = torch.randn(40, 8), torch.arange(40) % 5 == 0
    with torch.no_grad():
        dynamic = layer_of(router, experts, gate=gate)(tokens, padding)
        static = layer_of(router, experts, gate=gate, gating="static")(tokens, padding)
    torch.testing.assert_close(dynamic.output, static.output, rtol=0, atol=1e-5)
    assert not dynamic.output[padding].any()


def test_without_capacity_a_token_does_not_depend_on_its_batch() -> None:
    layer = layer_of(GShardTop2Router(8), random_experts(8))
    tokens = torch.randn(30, 8)
    with torch.no_grad():
        together = layer(tokens).output
        alone = torch.cat([layer(tokens[i : i + 1]).output for i in range(30)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_masking_factors_scale_the_output_at_evaluation() -> None:
    experts, gate, tokens = random_experts(4), torch.randn(4, 8), torch.randn(9, 8)
    with torch.no_grad():
        plain = layer_of(GShardTop2Router(4), experts, gate=gate)(tokens).output
        expert = layer_of(GShardTop2Router(4), experts, gate=gate, expert_masking=0.2)(tokens).output
        final = layer_of(GShardTop2Router(4), experts, gate=gate, final_masking=0.5)(tokens).output
    torch.testing.assert_close(expert, plain * 0.8)
    torch.testing.assert_close(final, plain * 0.5)


def test_expert_masking_zeroes_whole_rows_in_training() -> None:
    layer = layer_of(Top1Router(4), random_experts(4), expert_masking=0.5)
    torch.manual_seed(0)
    with torch.no_grad():
        zero = (layer(torch.randn(600, 8), training=True).output == 0).all(dim=1).float().mean().item()
    assert zero == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_agree_for_every_activation_and_dtype(activation: str, dtype: torch.dtype) -> None:
    experts, gate, tokens = random_experts(6, dtype=dtype), torch.randn(6, 8), torch.randn(33, 8).to(dtype)
    results = {}
    for kernel in available_kernels(dtype=dtype):
        layer = layer_of(GShardTop2Router(6), experts, gate=gate, kernel=kernel, activation=activation)
        with torch.inference_mode():
            results[kernel] = layer(tokens).output
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for kernel, result in results.items():
        torch.testing.assert_close(result, results["naive"], rtol=0, atol=tolerance, msg=partial(explain, kernel))


def test_gradients_flow_and_equal_those_of_the_oracle() -> None:
    experts = random_experts(4, dtype=torch.float64)
    weights = [t for t in (experts.fc1_weight, experts.fc1_bias, experts.fc2_weight, experts.fc2_bias) if t is not None]
    for tensor in weights:
        tensor.requires_grad_()
    gate = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    layer = layer_of(GShardTop2Router(4, fp32_gating=False), experts, gate=gate)
    tokens = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x).output, (tokens, gate, *weights), atol=1e-6)


def test_report_counts_what_happened() -> None:
    router = GShardTop2Router(4, CapacityRule(0.25))
    layer = layer_of(router, random_experts(4), profile=True, gate=torch.zeros(4, 8))
    padding = torch.tensor([False] * 6 + [True] * 2)
    with torch.no_grad():
        layer(torch.randn(8, 8), padding)  # ties: every row chooses e0 then e1; C = 2
    report = layer.counters.snapshot()
    assert (report.tokens, report.routed_rows, report.dropped_rows, report.computed_rows) == (8, 12, 8, 4)
    assert report.expert_rows == (2, 2, 0, 0) and report.active_experts == 2.0
    assert report.kernels == (choose_kernel("auto", torch.device("cpu"), torch.float32).name,)
    assert set(report.seconds) == {
        "routing",
        "dispatch",
        "experts",
        "combine",
    }
    layer.counters.reset()
    assert layer.counters.snapshot().tokens == 0


def test_static_counts_its_padding_as_computed() -> None:
    layer = layer_of(GShardTop2Router(4), random_experts(4), gating="static")
    with torch.no_grad():
        layer(torch.randn(8, 8))
    report = layer.counters.snapshot()
    assert report.computed_rows == 4 * 8 and report.routed_rows == 16 and report.kernels == ("static",)


def test_counters_can_be_copied_and_pickled() -> None:
    counters = LayerCounters("a", "encoder", 3)
    for again in (copy.deepcopy(counters), pickle.loads(pickle.dumps(counters))):
        assert again.snapshot() == counters.snapshot()
