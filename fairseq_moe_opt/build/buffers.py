"""The experts of a checkpoint's files and the options in, slots with everything that fills them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, cycle

import torch
from torch import Tensor

from fairseq_moe_opt.buffering import (
    DEFAULT_POLICY,
    GLOBAL,
    OFF,
    ROUTER,
    BufferedExperts,
    ExpertPool,
    HostCompute,
    HostTier,
    PooledLayer,
    Prefetcher,
    RouterGuess,
    SlotLayout,
    find_policy,
    link_to,
    measure_layers,
    slot_bytes_for,
)
from fairseq_moe_opt.checkpoints import ExpertFiles, ExpertRecords, TensorRecord
from fairseq_moe_opt.moe.cache_report import BufferReport, CacheCounters
from fairseq_moe_opt.moe.experts import compute_dtype
from fairseq_moe_opt.moe.host_waves import host_ffn
from fairseq_moe_opt.moe.kernels import get_kernel
from fairseq_moe_opt.moe.layer import MoELayer
from fairseq_moe_opt.moe.protocols import ExpertSource
from fairseq_moe_opt.moe.trace import Trace, TraceLayer, check_trace, read_trace
from fairseq_moe_opt.moe.types import ExpertKey, ExpertWeights
from fairseq_moe_opt.options import PAGE_CACHE, MoEOptions
from fairseq_moe_opt.sizes import num_slots

_RECALLED_VISITS = 20_000
"""Of a trace, how many of the last forwards a warm start looks at."""


@dataclass(frozen=True)
class ExpertLayer:
    """Where the experts of one layer lie in a checkpoint's files.

    Attributes:
        name: the layer's name in its model.
        phase: ``encoder`` or ``decoder``.
        experts: of expert ``e``, at place ``e``: field of ``ExpertWeights`` to the tensor's record.
        share: where ranks share the experts, those of this one, in slot order; None for all.
    """

    name: str
    phase: str
    experts: tuple[ExpertRecords, ...]
    share: tuple[int, ...] | None = None

    @property
    def held(self) -> tuple[int, ...]:
        """The experts that the layer computes here."""
        return tuple(range(len(self.experts))) if self.share is None else self.share


@dataclass(frozen=True)
class ExpertBuffer:
    """The stores of all layers over one pool, and what the report says of it."""

    stores: Mapping[str, BufferedExperts]
    report: BufferReport
    prefetcher: Prefetcher | None


def build_buffer(
    layers: Sequence[ExpertLayer],
    options: MoEOptions,
    device: torch.device,
    dtype: torch.dtype,
    expert_dtype: torch.dtype | None = None,
) -> ExpertBuffer:
    """Slots for the experts of ``layers`` on ``device``, as ``options`` say; no expert is waited for.

    ``dtype`` is the model's, ``expert_dtype`` that of the experts' matrices in their slots where it is another one:
    with int8, floats in the files are quantised as they are read. Raises OptionError when the memory allowed is too
    small, naming the smallest possible, and CheckpointError when the trace of ``warm_start`` is of another model.
    """
    slot_dtypes = (expert_dtype or dtype, dtype)
    pooled = [_pooled(layer, *slot_dtypes, device) for layer in layers]
    trace = None if options.warm_start is None else _trace_for(pooled, options.warm_start)
    policy = DEFAULT_POLICY if options.eviction == "auto" else options.eviction
    pool_kind = GLOBAL if options.expert_pool == "auto" else options.expert_pool
    slots = slots_of(pooled, options.expert_memory, pool_kind, trace)
    source = _source(layers, options, device, *slot_dtypes)
    pool = ExpertPool(pooled, slots, source.top, find_policy(policy), device=device, link=link_to(device))
    for layer in pooled:
        layer.counters.resident = partial(pool.resident, layer.name)
    host_compute = _host_compute(pool, source, options, compute_dtype(slot_dtypes[0], dtype))
    if trace is not None:
        pool.recall(trace.visits[-_RECALLED_VISITS:])
    report = BufferReport(
        slots=sum(slots),
        experts=sum(layer.num_experts for layer in pooled),
        slot_bytes=pool.arena.slot_bytes,
        arena_bytes=pool.arena.nbytes,
        workspace_bytes=pool.num_readers * source.scratch_bytes,
        host_bytes=0 if source.tier is None else source.tier.arena.nbytes,
        host_compute_rows=0 if host_compute is None else host_compute.most_rows,
        policy=policy,
        pool=pool_kind,
    )
    prefetcher = _prefetcher(pool, options.prefetch, device)
    stores = {layer.name: BufferedExperts(pool, layer, prefetcher, host_compute) for layer in pooled}
    return ExpertBuffer(stores, report, prefetcher)


@dataclass(frozen=True)
class _Source:
    """Where misses come from, bytes of a reader's scratch space, and the tier in main memory if there is one."""

    top: ExpertSource
    scratch_bytes: int
    tier: HostTier | None


def _source(
    layers: Sequence[ExpertLayer],
    options: MoEOptions,
    device: torch.device,
    expert_dtype: torch.dtype,
    dtype: torch.dtype,
) -> _Source:
    """The files, behind a tier in main memory where ``options`` ask for one."""
    pinned = device.type == "cuda"
    files = ExpertFiles(
        {ExpertKey(layer.name, e): records for layer in layers for e, records in enumerate(layer.experts)},
        keep_pages=options.host_memory == PAGE_CACHE,
        pinned=pinned,
    )
    if options.host_memory in (PAGE_CACHE, "0"):
        wanted = {layer.name: _template(layer.experts[0], expert_dtype, dtype, device) for layer in layers}
        return _Source(files, files.scratch_bytes_for(wanted, on_cpu=not pinned), None)
    wanted = {layer.name: _host_template(layer.experts[0], expert_dtype, dtype, device) for layer in layers}
    layouts = {name: SlotLayout.of(template) for name, template in wanted.items()}
    slot_bytes, experts = slot_bytes_for(layouts.values()), sum(len(layer.held) for layer in layers)
    slots = num_slots("host_memory", options.host_memory, experts * slot_bytes, slot_bytes, at_least=1, at_most=experts)
    tier = HostTier(files, layouts, slots, pinned=pinned)
    return _Source(tier, files.scratch_bytes_for(wanted, on_cpu=True), tier)


def _host_compute(pool: ExpertPool, source: _Source, options: MoEOptions, row_dtype: torch.dtype) -> HostCompute | None:
    """What has experts computed in main memory, its costs timed here; None where every expert is copied."""
    if options.host_compute == "off" or source.tier is None or pool.arena.device.type == "cpu":
        return None
    # What the layer computes host waves with: the kernel that auto takes for experts apart beside a GPU.
    ffn = partial(host_ffn, get_kernel("loop" if options.kernel == "auto" else options.kernel))
    return HostCompute(source.tier, measure_layers(pool.layers.values(), source.tier, pool.arena, row_dtype, ffn))


def _pooled(layer: ExpertLayer, expert_dtype: torch.dtype, dtype: torch.dtype, device: torch.device) -> PooledLayer:
    layout = SlotLayout.of(_template(layer.experts[0], expert_dtype, dtype, device))
    return PooledLayer(layer.name, layer.phase, layer.held, layout, CacheCounters())


def _trace_for(layers: Sequence[PooledLayer], path: str) -> Trace:
    trace = read_trace(path)
    own = [TraceLayer(layer.name, layer.phase, layer.num_experts) for layer in layers]
    check_trace(trace, own, path)
    return trace.named_as(own)


def _prefetcher(pool: ExpertPool, how: str, device: torch.device) -> Prefetcher | None:
    """Beside a GPU fetching ahead costs idle bandwidth; on a CPU it takes slots, and cores that would compute."""
    if how == "auto":
        how = OFF if device.type == "cpu" else ROUTER
    return None if how == OFF else Prefetcher(pool, how)


def connect_routers(
    layers: Sequence[MoELayer], gates: Sequence[Callable[[Tensor], Tensor]], buffer: ExpertBuffer
) -> None:
    """Let each of a model's ``layers`` apply the router of the next one early, where the buffer predicts by routers.

    ``gates`` map tokens to logits like the layers' own, without any trace of it in the host model.
    """
    prefetcher = buffer.prefetcher
    if prefetcher is None or prefetcher.predictor != ROUTER:
        return
    for layer, gate in zip(layers, gates, strict=True):
        name = layer.counters.name
        prefetcher.set_router(name, RouterGuess(gate, layer.router.top_k))
        layer.look_ahead = buffer.stores[name].look_ahead


def slots_of(layers: Sequence[PooledLayer], memory: str, pool: str, trace: Trace | None = None) -> tuple[int, ...]:
    """Slots of each group that the size ``memory`` gives: one group for all layers, or one a layer.

    Layers get equal numbers, or with a ``trace`` as many as they have among its most often needed experts, but one.
    Raises OptionError when there is not one slot a group, naming the smallest size possible.
    """
    slot_bytes = slot_bytes_for(layer.layout for layer in layers)
    experts = sum(layer.num_experts for layer in layers)
    at_least = 1 if pool == GLOBAL else len(layers)
    total = num_slots("expert_memory", memory, experts * slot_bytes, slot_bytes, at_least=at_least, at_most=experts)
    if pool == GLOBAL:
        return (total,)
    # One slot each, then experts in this order until all slots are given away.
    order = [] if trace is None else [key.layer for key in trace.hottest()]
    shares = {layer.name: 1 for layer in layers}
    sizes = {layer.name: layer.num_experts for layer in layers}
    for name in chain(order, cycle(shares)):
        if sum(shares.values()) == total:
            break
        if shares[name] < sizes[name]:
            shares[name] += 1
    return tuple(shares.values())


def _template(
    records: ExpertRecords, expert_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
) -> ExpertWeights:
    """An expert as it is in a slot, without storage: of the shapes in ``records``, in a model of ``dtype``."""
    ffn_width, width = records["fc1_weight"].shape
    expert = ExpertWeights.empty(
        width,
        ffn_width,
        dtype=expert_dtype,
        bias_dtype=dtype if expert_dtype == torch.int8 else None,
        device="meta",
        bias="fc1_bias" in records,
        gated="gate_weight" in records,
        gate_bias="gate_bias" in records,
    )
    return expert if expert_dtype == torch.int8 else _lying_as_stored(expert, records, device)


def _lying_as_stored(expert: ExpertWeights, records: ExpertRecords, device: torch.device) -> ExpertWeights:
    """``expert`` with those matrices transposed, and interleaved, that are so in the files, where a CPU computes.

    Sums are then added up in the same order as those of a model with all experts in memory, where they lie so too.
    """
    first, gate, second = expert.fc1_weight, expert.gate_weight, expert.fc2_weight
    if device.type != "cpu":
        return expert
    stored, other = records["fc1_weight"], records.get("gate_weight")
    if _is_transposed(records["fc2_weight"], 1):
        second = torch.empty_like(second.t(), memory_format=torch.contiguous_format).t()
    if _is_transposed(stored, 1) and (gate is None or (other is not None and _is_transposed(other, 1))):
        first = torch.empty_like(first.t(), memory_format=torch.contiguous_format).t()
        gate = None if gate is None else torch.empty_like(first)
    elif other is not None and _take_turns(other, stored):
        both = first.new_empty(first.shape[1], 2 * first.shape[0]).t()
        gate, first = both[::2], both[1::2]
    return replace(expert, fc1_weight=first, gate_weight=gate, fc2_weight=second)


def _take_turns(gate: TensorRecord, up: TensorRecord) -> bool:
    """Whether two matrices are the even and the odd rows of one that lies transposed."""
    alike = gate.path == up.path and gate.stride == up.stride
    return alike and _is_transposed(up, 2) and up.offset - gate.offset == up.dtype.itemsize


def _is_transposed(record: TensorRecord, apart: int) -> bool:
    """Whether a matrix has the elements of a column beside each other, or so far ``apart``."""
    return not record.is_contiguous and record.stride[0] == apart and record.stride[1] >= apart * record.shape[0]


def _host_template(
    records: ExpertRecords, expert_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
) -> ExpertWeights:
    """An expert as it is in main memory: as it is stored, or as in a slot where that is int8 or smaller."""
    fields: dict[str, Tensor | None] = {"fc1_bias": None, "fc2_bias": None}
    for name, record in records.items():
        fields[name] = torch.empty(record.shape, dtype=record.dtype, device="meta")
    stored = _lying_as_stored(ExpertWeights(**fields), records, device)  # type: ignore[arg-type]
    slot = _template(records, expert_dtype, dtype, device)
    return slot if expert_dtype == torch.int8 or slot.nbytes < stored.nbytes else stored
