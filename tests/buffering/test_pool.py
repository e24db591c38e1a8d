"""The pool at work: whatever the budget, the policy, the routing and the timing, experts are the right ones."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_moe_opt.buffering import POLICIES, simulate
from fairseq_moe_opt.errors import CheckpointError
from fairseq_moe_opt.moe import PackedExperts
from fairseq_moe_opt.moe.experts import expert_ffn
from fairseq_moe_opt.moe.trace import TraceVisit
from fairseq_moe_opt.moe.types import ExpertKey
from tests.helpers.buffers import MemorySource, compute, pool_over
from tests.helpers.layers import random_experts

ROWS = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))


def expected(packed: PackedExperts, needed: list[int]) -> dict[int, torch.Tensor]:
    return {expert: expert_ffn(ROWS, packed.expert(expert), "relu") for expert in needed}


def equal(one: dict[int, torch.Tensor], other: dict[int, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[expert], other[expert]) for expert in one)


@st.composite
def situations(draw: st.DrawFn) -> tuple[dict[str, int], list[TraceVisit], int | dict[str, int]]:
    """Layers with their E, forwards in any order (cyclic scans and sudden changes among them), and slots."""
    sizes = {f"layer{index}": draw(st.integers(1, 7)) for index in range(draw(st.integers(1, 3)))}
    visits = []
    for _ in range(draw(st.integers(1, 12))):
        name = draw(st.sampled_from(sorted(sizes)))
        needed = draw(st.sets(st.integers(0, sizes[name] - 1), min_size=1))
        visits += [TraceVisit(name, tuple(sorted(needed)))] * draw(st.integers(1, 2))
    if draw(st.booleans()):
        return sizes, visits, draw(st.integers(1, sum(sizes.values())))
    return sizes, visits, {name: draw(st.integers(1, size)) for name, size in sizes.items()}


@settings(max_examples=150)
@given(situations(), st.sampled_from(sorted(POLICIES)), st.integers(1, 5), st.integers(0, 2**16))
def test_any_budget_policy_and_routing_gives_the_same_bits(
    situation: tuple[dict[str, int], list[TraceVisit], int | dict[str, int]], policy: str, depth: int, seed: int
) -> None:
    """And the simulator says beforehand how often the runtime will miss, layer by layer."""
    sizes, visits, slots = situation
    experts = {name: random_experts(size) for name, size in sizes.items()}
    source = MemorySource(experts, longest_delay=0.0005, seed=seed)
    counts = slots if isinstance(slots, int) else list(slots.values())
    stores = pool_over(experts, counts, policy, source=source, depth=depth)
    for visit in visits:
        needed = list(visit.experts)
        assert equal(compute(stores[visit.layer], needed, ROWS), expected(experts[visit.layer], needed))
    foretold = simulate(visits, slots, policy, depth=depth)
    for name, layer in foretold.items():
        report = stores[name].layer.counters.snapshot()
        assert (report.hits, report.misses) == (layer.hits, layer.misses)
    assert len(source.loads) == sum(layer.misses for layer in foretold.values())


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_nothing_that_is_still_to_be_computed_is_evicted(policy: str, slots: int) -> None:
    """While a forward computes, its other experts stay; a slow computation gives the readers time to do harm."""
    experts = {"a": random_experts(6)}
    store = pool_over(experts, slots, policy)["a"]
    for needed in ([0, 1, 2, 3, 4, 5], [5], [0, 2, 4, 5], [1, 3], [0, 1, 2, 3, 4, 5]):
        results = compute(store, needed, ROWS, between=lambda: time.sleep(0.005))
        assert equal(results, expected(experts["a"], needed))


def test_what_is_resident_comes_first() -> None:
    experts = {"a": random_experts(6)}
    store = pool_over(experts, 4)["a"]
    compute(store, [3, 5], ROWS)
    first, *_ = [wave.experts for wave in store.waves([0, 3, 5])]
    assert first == (3, 5)
    report = store.layer.counters.snapshot()
    assert (report.hits, report.misses, report.evictions) == (2, 3, 0)
    assert store.pool.resident("a") == (0, 3, 5)


def test_the_papers_example() -> None:
    """Section 3.1: four experts, two slots, 1, 2 and 3 needed: loading 3 evicts 2, because 1 is needed again sooner."""
    store = pool_over({"a": random_experts(4)}, 2, "lifo", depth=1)["a"]
    compute(store, [1, 2, 3], ROWS)
    assert store.pool.resident("a") == (1, 3)


def test_a_wave_is_valid_until_the_next_is_asked_for() -> None:
    experts = {"a": random_experts(5)}
    store = pool_over(experts, 2, readers=4)["a"]
    for wave in store.waves(range(5)):
        time.sleep(0.01)
        for expert, weights in zip(wave.experts, wave.weights, strict=True):
            assert torch.equal(weights.fc2_weight, experts["a"].expert(expert).fc2_weight)


def test_a_failed_fetch_says_what_failed_and_the_next_call_works() -> None:
    experts = {"a": random_experts(6)}
    source = MemorySource(experts)
    store = pool_over(experts, 3, source=source)["a"]
    compute(store, [0, 1], ROWS)
    source.broken = {ExpertKey("a", 4)}
    for _ in range(3):
        with pytest.raises(CheckpointError, match=r"model\.bin: expert 4 of a cannot be read"):
            compute(store, [0, 1, 2, 3, 4, 5], ROWS)
    assert equal(compute(store, [0, 1, 5], ROWS), expected(experts["a"], [0, 1, 5]))
    source.broken = set()
    assert equal(compute(store, list(range(6)), ROWS), expected(experts["a"], list(range(6))))


def test_a_forward_that_is_given_up_leaves_its_slots() -> None:
    experts = {"a": random_experts(6)}
    store = pool_over(experts, 2)["a"]
    for stop in range(4):
        waves = store.waves(range(6))
        for _ in range(stop):
            next(waves)
        waves.close()
    with pytest.raises(ValueError, match="kernel"):
        for _ in store.waves(range(6)):
            raise ValueError("kernel")
    assert equal(compute(store, list(range(6)), ROWS), expected(experts["a"], list(range(6))))


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 8])
def test_forwards_in_several_threads_share_a_pool(slots: int) -> None:
    experts = {"a": random_experts(6), "b": random_experts(5)}
    stores = pool_over(experts, slots, source=MemorySource(experts, longest_delay=0.001))
    wrong: list[str] = []

    def run(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for step in range(25):
            name = "ab"[(seed + step) % 2]
            size = experts[name].num_experts
            chosen = torch.rand(size, generator=generator) < 0.5
            needed = [expert for expert in range(size) if chosen[expert]]
            if not equal(compute(stores[name], needed, ROWS), expected(experts[name], needed)):
                wrong.append(f"thread {seed}, step {step}")

    threads = [threading.Thread(target=run, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert all(not slot.pins for store in stores.values() for slot in store.pool.group(store.layer).resident.values())


def test_a_slot_that_was_promised_is_not_promised_again() -> None:
    """Others hold both residents when a forward has computed them, and give back one: it has to plan for 2 and 3 anew,
    while 4 is still to follow 2 in its slot."""
    experts = {"a": random_experts(5)}
    store = pool_over(experts, 2, depth=2)["a"]
    compute(store, [0, 1], ROWS)
    first, second = store.waves([0]), store.waves([1])
    started = threading.Event()
    results: dict[int, torch.Tensor] = {}

    def hold() -> None:
        if not started.is_set():
            next(first), next(second)
            started.set()

    thread = threading.Thread(target=lambda: results.update(compute(store, range(5), ROWS, between=hold)), daemon=True)
    thread.start()
    assert started.wait(timeout=60)
    while store.pool.group(store.layer).resident[ExpertKey("a", 0)].pins > 1:
        time.sleep(0.001)
    first.close()
    thread.join(timeout=60)
    second.close()
    assert not thread.is_alive()
    assert equal(results, expected(experts["a"], list(range(5))))


def test_the_arena_is_all_that_is_allocated() -> None:
    experts = {"a": random_experts(6), "b": random_experts(6, 8, 32)}
    store = pool_over(experts, 5)["a"]
    assert store.pool.arena.nbytes == 5 * store.pool.arena.slot_bytes
    start = store.pool.arena.view(0, store.layer.layout).fc1_weight.data_ptr()
    for needed in ([0, 1, 2, 3, 4, 5], [2, 3]):
        for wave in store.waves(needed):
            for weights in wave.weights:
                for tensor in weights.tensors():
                    offset = tensor.data_ptr() - start
                    assert offset >= 0 and offset + tensor.numel() * 4 <= store.pool.arena.nbytes
                    assert offset % 64 == 0
