"""The tier in main memory: what it keeps, that it stays within its size, and that faults leave it as it was."""

from __future__ import annotations

import threading

import pytest
import torch

from fairseq_moe_opt.buffering import HostTier, SlotLayout
from fairseq_moe_opt.errors import CheckpointError
from fairseq_moe_opt.moe.types import ExpertKey, ExpertWeights
from tests.helpers.buffers import MemorySource, compute, pool_over
from tests.helpers.layers import random_experts


def tier_of(slots: int, delay: float = 0.0) -> tuple[HostTier, MemorySource, ExpertWeights]:
    experts = {"a": random_experts(6, dtype=torch.float16)}
    source = MemorySource(experts, longest_delay=delay)
    layout = SlotLayout.of(experts["a"].expert(0))
    return HostTier(source, {"a": layout}, slots), source, random_experts(1).expert(0)


def check(tier: HostTier, source: MemorySource, expert: int, into: ExpertWeights) -> str:
    read = tier.load(ExpertKey("a", expert), into)
    stored = source._experts["a"].expert(expert)
    assert all(torch.equal(mine, theirs.float()) for mine, theirs in zip(into.tensors(), stored.tensors(), strict=True))
    assert read.nbytes == stored.nbytes
    return read.tier


def test_what_was_read_is_kept_as_it_is_stored() -> None:
    tier, source, into = tier_of(3)
    tiers = [check(tier, source, expert, into) for expert in (0, 1, 0, 2, 1)]
    assert tiers == ["memory", "memory", "host", "memory", "host"]
    assert tier.arena.nbytes == 3 * SlotLayout.of(source._experts["a"].expert(0)).nbytes


def test_only_what_is_wanted_more_often_makes_something_go() -> None:
    tier, source, into = tier_of(2)
    for _ in range(3):  # a scan that does not fit: two of five stay, instead of none
        for expert in range(5):
            check(tier, source, expert, into)
    assert tier.resident() == {ExpertKey("a", 0), ExpertKey("a", 1)}
    for _ in range(2):
        check(tier, source, 4, into)
    assert ExpertKey("a", 4) in tier.resident()


def test_counts_are_forgotten() -> None:
    tier, source, into = tier_of(1)
    for _ in range(40):
        check(tier, source, 0, into)
    for _ in range(40):
        check(tier, source, 1, into)
    assert tier.resident() == {ExpertKey("a", 1)}


def test_a_fault_leaves_the_tier_as_it_was() -> None:
    tier, source, into = tier_of(2)
    check(tier, source, 0, into)
    source.broken = {ExpertKey("a", 1)}
    for _ in range(3):
        with pytest.raises(CheckpointError, match="expert 1 of a"):
            tier.load(ExpertKey("a", 1), into)
    source.broken = set()
    assert [check(tier, source, expert, into) for expert in (0, 1, 0, 1)] == ["host", "memory", "host", "host"]


def test_several_readers_at_once() -> None:
    tier, source, _ = tier_of(2, delay=0.002)
    wrong: list[BaseException] = []

    def run(seed: int) -> None:
        into = random_experts(1).expert(0)
        try:
            for step in range(40):
                check(tier, source, (seed * 7 + step * step) % 6, into)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(tier.resident()) <= 2


def test_misses_of_the_slots_are_served_from_it() -> None:
    experts = {"a": random_experts(6)}
    tier = HostTier(MemorySource(experts), {"a": SlotLayout.of(experts["a"].expert(0))}, 6)
    store = pool_over(experts, 2, source=tier)["a"]
    for _ in range(3):
        compute(store, range(6), torch.randn(2, 8))
    assert set(store.layer.counters.snapshot().bytes_read) == {"memory", "host"}
    assert store.layer.counters.snapshot().bytes_read["memory"] == 6 * experts["a"].expert(0).nbytes
