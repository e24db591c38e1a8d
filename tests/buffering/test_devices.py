"""The order of things on a device that computes behind its caller's back, shown with a device made of a list."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import cast

import pytest
import torch

from fairseq_moe_opt.buffering import HostCompute, HostTier, MissCosts, SlotLayout
from fairseq_moe_opt.buffering.devices import CpuLink, Mark, link_to
from fairseq_moe_opt.moe.experts import expert_ffn
from fairseq_moe_opt.moe.protocols import ExpertSource
from fairseq_moe_opt.moe.types import ExpertKey, ExpertRead, ExpertWeights
from tests.helpers.buffers import MemorySource, compute, pool_over
from tests.helpers.layers import random_experts

ROWS = torch.randn(2, 8, generator=torch.Generator().manual_seed(3))


class FakeDevice:
    """Work is only noted down when it is asked for, and done when a copy has to wait for it or at the end."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.queue: list[tuple[int, torch.Tensor, ExpertWeights]] = []
        self.results: dict[int, torch.Tensor] = {}
        self.done = 0
        self.waited_for: list[int] = []

    def enqueue(self, expert: int, weights: ExpertWeights) -> None:
        with self.lock:
            self.queue.append((expert, ROWS, weights))

    # The link.

    def fetch(self, source: ExpertSource, key: ExpertKey, into: ExpertWeights, after: Iterable[Mark]) -> ExpertRead:
        for mark in after:
            self.waited_for.append(cast(int, mark.event))
            self.drain(cast(int, mark.event))
        return source.load(key, into)

    def mark(self) -> Mark:
        with self.lock:
            return Mark(0, cast(torch.cuda.Event, self.done + len(self.queue)))

    def drain(self, until: int) -> None:
        """Do what was asked for before the mark ``until``."""
        with self.lock:
            while self.done < until and self.queue:
                expert, rows, weights = self.queue.pop(0)
                self.results[expert] = expert_ffn(rows, weights, "relu")
                self.done += 1


@pytest.mark.parametrize("slots", [1, 2, 3, 6])
def test_a_slot_is_not_filled_before_the_device_has_read_it(slots: int) -> None:
    """The device is as far behind as it may be: it computes only when a copy insists, with what is in the slot then."""
    experts, device = {"a": random_experts(6)}, FakeDevice()
    store = pool_over(experts, slots, link=device)["a"]
    for _ in range(2):
        for wave in store.waves(range(6)):
            for expert, weights in zip(wave.experts, wave.weights, strict=True):
                device.enqueue(expert, weights)
        device.drain(1 << 30)
        for expert in range(6):
            assert torch.equal(device.results[expert], expert_ffn(ROWS, experts["a"].expert(expert), "relu"))
    assert bool(device.waited_for) == (slots < 6)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_the_host_computes_its_share_while_the_device_is_behind(slots: int) -> None:
    """One row takes as long as a copy in main memory and two take longer: the even experts, while they miss."""
    experts, device = {"a": random_experts(6)}, FakeDevice()
    tier = HostTier(MemorySource(experts), {"a": SlotLayout.of(experts["a"].expert(0))}, 6)
    costs = MissCosts(copy=1.0, compute_fixed=0.0, compute_per_row=1.0)
    store = pool_over(experts, slots, link=device, source=tier, host_compute=HostCompute(tier, {"a": costs}))["a"]
    on_host = []
    for _ in range(4):
        for wave in store.waves(range(6), 9, [1, 2] * 3):
            for expert, weights in zip(wave.experts, wave.weights, strict=True):
                if wave.on_host:
                    device.results[expert] = expert_ffn(ROWS, weights, "relu")
                    on_host.append(expert)
                else:
                    device.enqueue(expert, weights)
        device.drain(1 << 30)
        for expert in range(6):
            assert torch.equal(device.results.pop(expert), expert_ffn(ROWS, experts["a"].expert(expert), "relu"))
    assert on_host and all(expert % 2 == 0 for expert in on_host)
    assert device.waited_for


def test_a_device_that_ignored_the_marks_would_be_caught() -> None:
    class Careless(FakeDevice):
        def fetch(self, source: ExpertSource, key: ExpertKey, into: ExpertWeights, after: Iterable[Mark]) -> ExpertRead:
            return source.load(key, into)

    experts, device = {"a": random_experts(6)}, Careless()
    for wave in pool_over(experts, 1, link=device)["a"].waves(range(6)):
        for expert, weights in zip(wave.experts, wave.weights, strict=True):
            device.enqueue(expert, weights)
    device.drain(1 << 30)
    wrong = [
        e for e in range(6) if not torch.equal(device.results[e], expert_ffn(ROWS, experts["a"].expert(e), "relu"))
    ]
    assert len(wrong) == 5


def test_a_cpu_needs_no_marks() -> None:
    link = link_to(torch.device("cpu"))
    assert isinstance(link, CpuLink) and link.mark() is None
    experts = {"a": random_experts(3)}
    store = pool_over(experts, 1)["a"]
    compute(store, range(3), ROWS)
    assert all(not slot.marks for slot in store.pool.group(store.layer).resident.values())
