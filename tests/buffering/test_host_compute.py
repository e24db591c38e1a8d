"""Missing experts computed in main memory: the right results, each expert in one place only, nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fairseq_moe_opt.buffering import HostCompute, HostTier, MissCosts, SlotArena, SlotLayout, measure_layers
from fairseq_moe_opt.buffering.store import BufferedExperts
from fairseq_moe_opt.moe import (
    GShardTop2Router,
    LayerConfig,
    LayerCounters,
    MoELayer,
    PackedExperts,
    ResidentExperts,
)
from fairseq_moe_opt.moe.host_waves import host_ffn
from fairseq_moe_opt.moe.kernels import get_kernel
from fairseq_moe_opt.moe.protocols import ExpertStore
from fairseq_moe_opt.moe.types import ExpertKey, ExpertRead, ExpertWave, ExpertWeights, Segment
from tests.helpers.buffers import CPU, MemorySource, pool_over
from tests.helpers.layers import int8_expert, random_experts

ALWAYS = MissCosts(copy=1e9, compute_fixed=0.0, compute_per_row=1.0)
UP_TO_TWO_ROWS = MissCosts(copy=6.0, compute_fixed=2.0, compute_per_row=2.0)


class CountingTier(HostTier):
    """Notes what is copied out of it."""

    def __init__(self, experts: PackedExperts, slots: int) -> None:
        layout = SlotLayout.of(experts.expert(0))
        super().__init__(MemorySource({"a": experts}), {"a": layout}, slots)
        for expert in range(slots):
            self.load(ExpertKey("a", expert), ExpertWeights.empty(8, 16, dtype=torch.float32))
        self.copied: list[int] = []

    def load(self, key: ExpertKey, into: ExpertWeights) -> ExpertRead:
        if hasattr(self, "copied"):
            self.copied.append(key.expert)
        return super().load(key, into)

    def readers(self) -> int:
        return sum(entry.readers for entry in self._entries.values())


def buffered(
    experts: PackedExperts, slots: int, costs: MissCosts, in_tier: int = 6
) -> tuple[BufferedExperts, CountingTier]:
    tier = CountingTier(experts, in_tier)
    return pool_over({"a": experts}, slots, source=tier, host_compute=HostCompute(tier, {"a": costs}))["a"], tier


def layer_over(store: ExpertStore, gate: Tensor) -> MoELayer:
    counters = LayerCounters("a", "decoder", store.num_experts, False)
    router, config = GShardTop2Router(store.num_experts), LayerConfig(kernel="loop")
    return MoELayer(lambda x: x @ gate, router, store, config, counters)


def visit(store: BufferedExperts, needed: Sequence[int], counts: Sequence[int]) -> list[tuple[bool, tuple[int, ...]]]:
    """The waves of a forward: whether on the host, and which experts."""
    return [(wave.on_host, wave.experts) for wave in store.waves(needed, sum(counts), counts)]


@pytest.mark.parametrize("costs", [ALWAYS, UP_TO_TWO_ROWS], ids=["always", "up to two rows"])
@pytest.mark.parametrize("slots", [1, 3, 6])
@pytest.mark.parametrize("in_tier", [2, 6])
def test_the_output_is_that_of_the_resident_layer(costs: MissCosts, slots: int, in_tier: int) -> None:
    torch.manual_seed(1)
    experts, gate = random_experts(6), torch.randn(8, 6)
    store, tier = buffered(experts, slots, costs, in_tier)
    resident, layer = layer_over(ResidentExperts(6, experts.expert), gate), layer_over(store, gate)
    for step in range(12):
        tokens = torch.randn(1 + step % 4, 8)
        with torch.inference_mode():
            torch.testing.assert_close(layer(tokens).output, resident(tokens).output, rtol=0, atol=1e-6)
    report = store.layer.counters.snapshot()
    assert 0 < report.on_host <= report.on_host_rows
    assert report.on_host + len(tier.copied) == report.misses  # each miss is one or the other
    assert tier.readers() == 0


@pytest.mark.parametrize("stored", [torch.float16, torch.int8])
def test_experts_are_computed_as_they_are_stored(stored: torch.dtype) -> None:
    expert = int8_expert(8, 16) if stored == torch.int8 else random_experts(1, dtype=stored).expert(0)
    floats = [tensor if tensor.dtype == torch.int8 else tensor.float() for tensor in expert.tensors()]
    slot = ExpertWeights(*floats[:4], None, *floats[4:])
    rows = torch.randn(3, 8)
    wave = ExpertWave((0,), (slot,))
    out = torch.empty_like(rows)
    get_kernel("loop").run(rows, (Segment(0, 0, 3),), wave, "relu", out)
    assert torch.equal(host_ffn(get_kernel("loop"), rows, expert), out)


def test_residents_come_first_then_the_host_then_copies() -> None:
    store, tier = buffered(random_experts(6), 3, UP_TO_TWO_ROWS)
    visit(store, [0, 1], [9, 9])
    assert sorted(tier.copied) == [0, 1]
    waves = visit(store, [0, 2, 3, 4], [1, 2, 9, 1])
    assert waves == [(False, (0,)), (True, (2, 4)), (False, (3,))]
    report = store.layer.counters.snapshot()
    assert (report.hits, report.misses, report.on_host, report.on_host_rows) == (1, 5, 2, 3)
    assert sorted(tier.copied) == [0, 1, 3]


def test_the_host_does_not_wait_for_copies() -> None:
    """The reader is held up until the forward has been given its share in main memory."""
    store, tier = buffered(random_experts(6), 3, UP_TO_TWO_ROWS)
    go_on, plain = threading.Event(), tier.load

    def held_up(key: ExpertKey, into: ExpertWeights) -> ExpertRead:
        assert go_on.wait(timeout=20)
        return plain(key, into)

    tier.load = held_up  # type: ignore[method-assign]
    given = []
    for wave in store.waves([1, 2], 10, [9, 1]):
        given.append((wave.on_host, wave.experts))
        go_on.set()
    assert given == [(True, (2,)), (False, (1,))]


def test_an_expert_that_comes_back_gets_a_slot() -> None:
    """A row takes 3 of a copy's 10: the fourth forward copies, and the fifth finds it there."""
    store, tier = buffered(random_experts(6), 2, MissCosts(copy=10.0, compute_fixed=2.0, compute_per_row=1.0))
    waves = [visit(store, [4], [1]) for _ in range(5)]
    assert waves == [[(True, (4,))]] * 3 + [[(False, (4,))]] * 2
    assert tier.copied == [4]


def test_what_the_tier_does_not_hold_is_fetched() -> None:
    store, tier = buffered(random_experts(6), 2, ALWAYS, in_tier=3)
    assert visit(store, [2, 5], [1, 1]) == [(True, (2,)), (False, (5,))]
    assert tier.copied == [5]


def test_who_cannot_compute_there_is_never_asked_to() -> None:
    store, _ = buffered(random_experts(6), 2, ALWAYS)
    assert not any(wave.on_host for wave in store.waves(range(6), 6))


def test_a_fault_in_main_memory_is_the_forward_s_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    experts, gate, tokens = random_experts(6), torch.randn(8, 6), torch.randn(3, 8)
    store, tier = buffered(experts, 3, ALWAYS)
    layer = layer_over(store, gate)

    def fail(*_: object) -> None:
        raise RuntimeError("no memory for the rows")

    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr("fairseq_moe_opt.moe.host_waves.HostWaves.run", fail)
        with pytest.raises(RuntimeError, match="no memory for the rows"):
            layer(tokens)
    assert tier.readers() == 0
    assert all(not slot.pins for slot in store.pool.group(store.layer).resident.values())
    with torch.inference_mode():
        expected = layer_over(ResidentExperts(6, experts.expert), gate)(tokens).output
        torch.testing.assert_close(layer(tokens).output, expected, rtol=0, atol=1e-6)


def test_what_is_borrowed_stays_in_the_tier() -> None:
    experts = random_experts(6)
    tier = CountingTier(experts, 1)
    borrowed = tier.borrow(ExpertKey("a", 0))
    assert borrowed is not None
    into = ExpertWeights.empty(8, 16, dtype=torch.float32)
    for _ in range(5):
        tier.load(ExpertKey("a", 1), into)
    assert torch.equal(borrowed.fc1_weight, experts.expert(0).fc1_weight)
    tier.give_back(ExpertKey("a", 0))
    tier.load(ExpertKey("a", 1), into)
    assert tier.resident() == {ExpertKey("a", 1)}
    assert tier.borrow(ExpertKey("a", 0)) is None


def test_layers_laid_out_alike_are_timed_once() -> None:
    experts = {"a": random_experts(4), "b": random_experts(3), "wide": random_experts(2, ffn_width=32)}
    stores = pool_over(experts, 2)
    layers = [store.layer for store in stores.values()]
    layouts = {layer.name: layer.layout for layer in layers}
    tier = HostTier(MemorySource(experts), layouts, 3)
    seen: list[tuple[int, int]] = []

    def ffn(rows: Tensor, expert: ExpertWeights) -> Tensor:
        seen.append((rows.shape[0], expert.fc1_weight.shape[0]))
        return host_ffn(get_kernel("loop"), rows, expert)

    slots = SlotArena(1, max(layout.nbytes for layout in layouts.values()), CPU)
    costs = measure_layers(layers, tier, slots, torch.float32, ffn)
    assert costs["a"] is costs["b"] is not costs["wide"]
    assert all(one.copy > 0 and one.compute(1) > 0 for one in costs.values())
    assert seen == [(rows, width) for width in (16, 32) for rows in [1] * 6 + [16] * 6]
    assert tier.resident() == frozenset()
