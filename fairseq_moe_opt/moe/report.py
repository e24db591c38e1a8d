"""Counters a caller reads: what each Mixture-of-Experts layer did since they were last reset."""

from __future__ import annotations

import copy
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager as Context
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fairseq_moe_opt.moe.cache_report import BufferReport, CacheCounters, CacheReport
from fairseq_moe_opt.moe.dense_report import DenseReport
from fairseq_moe_opt.moe.device_counts import DeviceCounts
from fairseq_moe_opt.moe.exchange_report import ExchangeCounters, ExchangeReport, RebalanceReport
from fairseq_moe_opt.moe.types import Dispatch

STEPS = ("routing", "dispatch", "experts", "combine")
"""The steps of a layer that are timed when profiling is on."""

FETCH = "fetch"
"""Waiting for weights, within ``experts``: only told to a watch."""

Watch = Callable[[str], Context[None]]
"""Gives the context to run a step in, by the step's name."""

T = TypeVar("T")


@dataclass(frozen=True)
class LayerReport:
    """What one layer did.

    Attributes:
        name: the layer's name in its model.
        phase: ``encoder`` or ``decoder``.
        calls: forwards.
        tokens: rows it was given on this rank, padding included, over all calls.
        routed_rows: expert rows the router asked for (padding not counted).
        dropped_rows: those of them lost to capacity.
        computed_rows: expert rows that went through an FFN on this rank; static gating computes E * C a call.
        active_experts: mean over calls of the experts with at least one row.
        max_active_experts: the largest of them.
        expert_rows: rows of each expert over all calls, length E.
        seconds: wall time by step, empty unless profiling was on.
        kernels: what ran: names of kernels, ``static``, or ``autograd`` where gradients were wanted.
        exchange: what was sent to and received from other ranks; None where all experts are on this one.
        cache: what the expert cache did; None where all experts stay in memory.
    """

    name: str
    phase: str
    calls: int
    tokens: int
    routed_rows: int
    dropped_rows: int
    computed_rows: int
    active_experts: float
    max_active_experts: int
    expert_rows: tuple[int, ...]
    seconds: dict[str, float]
    kernels: tuple[str, ...]
    exchange: ExchangeReport | None = None
    cache: CacheReport | None = None

    def to_dict(self) -> dict[str, object]:
        """Plain values, ready for ``json.dump``."""
        return {**asdict(self), "cache": None if self.cache is None else self.cache.to_dict()}


@dataclass
class LayerCounters:
    """Running sums of one layer; safe to add to from several threads.

    Attributes:
        watch: is told of every step in place of the sums of seconds, which then stay empty; None while nobody looks.
        expert_watch: runs experts one at a time, each in the context that it gives for ``str(expert)``.
    """

    name: str
    phase: str
    num_experts: int
    profile: bool = False
    exchange: ExchangeCounters | None = None
    cache: CacheCounters | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        self.watch: Watch | None = None
        self.expert_watch: Watch | None = None
        self._on_device: dict[tuple[torch.device, str], DeviceCounts] = {}
        self.reset()

    def reset(self) -> None:
        """Forget everything counted so far."""
        with self._lock:
            self._calls = self._tokens = self._routed = self._dropped = self._computed = 0
            self._active = self._max_active = 0
            self._rows = [0] * self.num_experts
            self._seconds = dict.fromkeys(STEPS, 0.0) if self.profile else {}
            self._kernels: dict[str, None] = {}
            for counts in self._on_device.values():
                counts.reset()
        if self.exchange is not None:
            self.exchange.reset()
        if self.cache is not None:
            self.cache.reset()

    def add(self, num_tokens: int, dispatch: Dispatch, computed_rows: int, kernel: str) -> None:
        """Count one forward of ``num_tokens`` tokens."""
        active = sum(1 for count in dispatch.counts if count)
        with self._lock:
            self._calls += 1
            self._tokens += num_tokens
            self._routed += dispatch.num_rows + dispatch.dropped
            self._dropped += dispatch.dropped
            self._computed += computed_rows
            self._active += active
            self._max_active = max(self._max_active, active)
            self._kernels[kernel] = None
            for expert, count in enumerate(dispatch.counts):
                if count:
                    self._rows[expert] += count

    def add_later(self, num_tokens: int, counts: Tensor, dropped: Tensor | None, kernel: str) -> None:
        """Count one forward whose (E,) ``counts`` and ``dropped`` only their device knows, without asking it."""
        with self._lock:
            key = (counts.device, kernel)
            if key not in self._on_device:
                self._on_device[key] = DeviceCounts(self.num_experts, counts.device)
            self._on_device[key].add(num_tokens, counts, dropped)

    def _collect(self) -> None:
        """Take over what devices have counted."""
        for (_, kernel), counts in self._on_device.items():
            counted = counts.read()
            if not counted.calls:
                continue
            counts.reset()
            routed = sum(counted.rows)
            self._calls += counted.calls
            self._tokens += counted.tokens
            self._routed += routed + counted.dropped
            self._dropped += counted.dropped
            self._computed += routed
            self._active += counted.active
            self._max_active = max(self._max_active, counted.max_active)
            self._kernels[kernel] = None
            self._rows = [mine + theirs for mine, theirs in zip(self._rows, counted.rows, strict=True)]

    def timed(self, step: str, device: torch.device) -> Context[None]:
        """Add the time of the ``with`` block to ``step``; does nothing unless profiling is on."""
        if self.watch is not None:
            return self.watch(step)
        return self._timed(step, device) if self.profile else nullcontext()

    def fetching(self, waves: Iterator[T]) -> Iterator[T]:
        """``waves``, and waiting for each of them is told to the watch."""
        return waves if self.watch is None else _watched(waves, self.watch)

    @contextmanager
    def _timed(self, step: str, device: torch.device) -> Iterator[None]:
        _finish(device)
        start = time.perf_counter()
        yield
        _finish(device)
        with self._lock:
            self._seconds[step] += time.perf_counter() - start

    def __deepcopy__(self, memo: dict[int, object]) -> LayerCounters:
        # The copied exchange adds to the same copy of its counters: deepcopy remembers it. Buffered experts, and what
        # they count, are shared by copies.
        exchange = copy.deepcopy(self.exchange, memo)
        return LayerCounters(self.name, self.phase, self.num_experts, self.profile, exchange, self.cache)

    def __reduce__(self) -> tuple[type[LayerCounters], tuple[str, str, int, bool, ExchangeCounters | None]]:
        # A copied or pickled model starts counting afresh; a lock cannot travel anyway.
        return LayerCounters, (self.name, self.phase, self.num_experts, self.profile, self.exchange)

    def snapshot(self) -> LayerReport:
        """The sums so far."""
        exchange = None if self.exchange is None else self.exchange.snapshot()
        cache = None if self.cache is None else self.cache.snapshot()
        with self._lock:
            self._collect()
            return LayerReport(
                self.name,
                self.phase,
                self._calls,
                self._tokens,
                self._routed,
                self._dropped,
                self._computed,
                self._active / self._calls if self._calls else 0.0,
                self._max_active,
                tuple(self._rows),
                dict(self._seconds),
                tuple(self._kernels),
                exchange=exchange,
                cache=cache,
            )


def _watched(waves: Iterator[T], watch: Watch) -> Iterator[T]:
    while True:
        with watch(FETCH):
            wave = next(waves, None)
        if wave is None:
            return
        yield wave


def _finish(device: torch.device) -> None:
    """Wait for the device, so that a step's time is its own; only ever called while profiling."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Report:
    """What an optimised model did, since the counters were reset.

    Attributes:
        family: of the model, as ``nllb-moe``.
        options: the options it runs with.
        layers: one report a Mixture-of-Experts layer, in the model's order.
        tokens: rows that went through each phase, padding included (every layer of a phase sees the same).
        expert_bytes: bytes of all expert weights.
        peak_memory_bytes: the peak named by ``peak_memory_kind``.
        peak_memory_kind: ``cuda allocated`` since the reset, or ``process resident`` since the process started.
        seconds: wall time of the generate call, 0 when there was none.
        buffer: the memory that experts share; None where all of them stay.
        rebalancing: what moving experts between ranks took since the model was loaded, for it happens between calls;
            None where one process has them all.
        notes: sentences on what the host framework's release made different; mostly none.
        dense: what computed the rest of the model; None where the host model does that as it is.
    """

    family: str
    options: dict[str, object]
    layers: tuple[LayerReport, ...]
    tokens: dict[str, int]
    expert_bytes: int
    peak_memory_bytes: int
    peak_memory_kind: str
    seconds: float
    buffer: BufferReport | None = None
    rebalancing: RebalanceReport | None = None
    notes: tuple[str, ...] = ()
    dense: DenseReport | None = None

    @property
    def step_seconds(self) -> dict[str, float]:
        """Time by step, summed over layers; empty unless profiling was on."""
        total: dict[str, float] = {}
        for layer in self.layers:
            for step, seconds in layer.seconds.items():
                total[step] = total.get(step, 0.0) + seconds
        return total

    def to_dict(self) -> dict[str, object]:
        """Plain values, ready for ``json.dump``."""
        layers = [layer.to_dict() for layer in self.layers]
        return {**asdict(self), "layers": layers, "step_seconds": self.step_seconds}


def tokens_by_phase(layers: Iterable[LayerReport]) -> dict[str, int]:
    """Rows that went through each phase: what its busiest layer saw."""
    tokens: dict[str, int] = {}
    for layer in layers:
        tokens[layer.phase] = max(tokens.get(layer.phase, 0), layer.tokens)
    return tokens


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Peak bytes and what they are: the CUDA allocator's since its last reset, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "cuda allocated"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak * (1 if sys.platform == "darwin" else 1024), "process resident"


def write_report(report: Report, path: str | os.PathLike[str]) -> None:
    """Write ``report`` as JSON, to a temporary name first, so that a reader never sees half of it."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    partial.replace(target)
