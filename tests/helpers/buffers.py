"""Buffered layers over experts in memory, with sources that are slow or fail on purpose."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fairseq_moe_opt.buffering import (
    GLOBAL,
    BufferedExperts,
    DeviceLink,
    ExpertPool,
    HostCompute,
    PooledLayer,
    Prefetcher,
    SlotLayout,
    find_policy,
    link_to,
)
from fairseq_moe_opt.errors import CheckpointError
from fairseq_moe_opt.moe import PackedExperts
from fairseq_moe_opt.moe.cache_report import CacheCounters
from fairseq_moe_opt.moe.experts import expert_ffn
from fairseq_moe_opt.moe.protocols import ExpertSource
from fairseq_moe_opt.moe.types import ExpertKey, ExpertRead, ExpertWeights

CPU = torch.device("cpu")


class MemorySource:
    """Copies experts out of memory after a random delay; experts in ``broken`` fail half-way."""

    def __init__(self, experts: Mapping[str, PackedExperts], longest_delay: float = 0.0, seed: int = 0) -> None:
        self._experts = experts
        self._longest_delay = longest_delay
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self.broken: set[ExpertKey] = set()
        self.loads: list[ExpertKey] = []

    def load(self, key: ExpertKey, into: ExpertWeights) -> ExpertRead:
        with self._lock:
            self.loads.append(key)
            delay = self._random.random() * self._longest_delay
        time.sleep(delay)
        stored = self._experts[key.layer].expert(key.expert)
        into.fc1_weight.copy_(stored.fc1_weight)
        if key in self.broken:
            into.fc2_weight.fill_(float("nan"))
            raise CheckpointError("model.bin", f"{key} cannot be read")
        for mine, theirs in zip(into.tensors(), stored.tensors(), strict=True):
            mine.copy_(theirs)
        return ExpertRead("memory", stored.nbytes)


def pool_over(
    experts: Mapping[str, PackedExperts],
    slots: int | Sequence[int],
    policy: str = "reuse",
    *,
    source: ExpertSource | None = None,
    link: DeviceLink | None = None,
    readers: int = 2,
    depth: int = 4,
    prefetch: str | None = None,
    phases: Mapping[str, str] | None = None,
    host_compute: HostCompute | None = None,
) -> dict[str, BufferedExperts]:
    """A store a layer, all over one pool of ``slots``, or over as many slots each as the sequence says."""
    layers = [
        PooledLayer(
            name,
            (phases or {}).get(name, "decoder"),
            tuple(range(packed.num_experts)),
            SlotLayout.of(packed.expert(0)),
            CacheCounters(),
        )
        for name, packed in experts.items()
    ]
    pool = ExpertPool(
        layers,
        [slots] if isinstance(slots, int) else slots,
        source or MemorySource(experts),
        find_policy(policy),
        device=CPU,
        link=link or link_to(CPU),
        readers=readers,
        depth=depth,
    )
    prefetcher = None if prefetch is None else Prefetcher(pool, prefetch)
    return {layer.name: BufferedExperts(pool, layer, prefetcher, host_compute) for layer in layers}


def compute(
    store: BufferedExperts,
    needed: Sequence[int],
    rows: Tensor,
    between: Callable[[], None] = lambda: None,
    routed: int | None = None,
) -> dict[int, Tensor]:
    """``rows`` through every expert of ``needed``, wave by wave; ``between`` runs before each wave is computed.

    ``routed`` is the number of rows that the store is told.
    """
    results: dict[int, Tensor] = {}
    for wave in store.waves(needed, routed):
        between()
        for expert, weights in zip(wave.experts, wave.weights, strict=True):
            assert expert not in results
            results[expert] = expert_ffn(rows, weights, "relu")
    return results


__all__ = ["CPU", "GLOBAL", "MemorySource", "compute", "pool_over"]
