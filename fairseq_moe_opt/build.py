"""The composition root: options and a layer's description in, a layer out. Cross-checks happen here, before weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
from fairseq_moe_opt.checkpoints import ExpertFiles, ExpertRecords
from fairseq_moe_opt.errors import OptionError, PlacementError
from fairseq_moe_opt.moe.cache_report import BufferReport, CacheCounters
from fairseq_moe_opt.moe.experts import NO_DROPOUT, ExpertDropout, compute_dtype
from fairseq_moe_opt.moe.host_waves import host_ffn
from fairseq_moe_opt.moe.kernels import choose_kernel, get_kernel
from fairseq_moe_opt.moe.layer import LayerConfig, MoELayer
from fairseq_moe_opt.moe.protocols import ExpertSource, ExpertStore, PaddedExchange, RoutingObserver, TokenExchange
from fairseq_moe_opt.moe.report import LayerCounters
from fairseq_moe_opt.moe.routing import GShardTop2Router, SoftmaxTopKRouter, Top1Router
from fairseq_moe_opt.moe.trace import Trace, TraceLayer, check_trace, read_trace
from fairseq_moe_opt.moe.types import ExpertKey, ExpertWeights
from fairseq_moe_opt.options import PAGE_CACHE, MoEOptions
from fairseq_moe_opt.parallel import Collectives, ExpertSpread, SlotMap
from fairseq_moe_opt.placement import Placement, check_made_for
from fairseq_moe_opt.sizes import num_slots

_RECALLED_VISITS = 20_000
"""Of a trace, how many of the last forwards a warm start looks at."""

EXPERT_DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "int8": torch.int8}
"""Values of the option ``expert_dtype`` to the dtype that an expert's matrices then have."""

AnyRouter = GShardTop2Router | Top1Router | SoftmaxTopKRouter


@dataclass(frozen=True)
class LayerSpec:
    """What a checkpoint says of one layer.

    Attributes:
        name: the layer's name in its model.
        phase: ``encoder`` or ``decoder``.
        router: with the checkpoint's own capacity rule.
        activation: of the experts.
        expert_masking: EOM probability.
        final_masking: FOM probability.
        dropout: inside each expert, in training.
    """

    name: str
    phase: str
    router: AnyRouter
    activation: str = "relu"
    expert_masking: float = 0.0
    final_masking: float = 0.0
    dropout: ExpertDropout = NO_DROPOUT


def needs_packed_experts(options: MoEOptions, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel for experts of such weights computes from one tensor of them all instead of each one's own.

    Raises KernelError when the kernel asked for cannot run on them.
    """
    if options.gating != "dynamic" or options.buffered:
        return False
    return choose_kernel(options.kernel, device, dtype).needs_packed


def build_layer(
    spec: LayerSpec,
    options: MoEOptions,
    gate: Callable[[Tensor], Tensor],
    store: ExpertStore,
    observers: Iterable[RoutingObserver] = (),
    *,
    exchange: TokenExchange | None = None,
    padded_exchange: PaddedExchange | None = None,
) -> MoELayer:
    """The layer that ``spec`` describes, run as ``options`` say, over ``gate`` and ``store``.

    With experts spread over ranks, ``exchange`` (``padded_exchange`` for static gating) reaches them, and ``store``
    holds this rank's, by slot.
    """
    used = padded_exchange if options.gating == "static" else exchange
    num_slots = spec.router.num_experts if used is None else used.num_slots
    if store.num_experts != num_slots:
        where = "" if used is None else f", {num_slots} of them on this rank,"
        raise OptionError(
            "num_experts",
            f"{spec.name} routes to {spec.router.num_experts} experts{where} but has {store.num_experts}",
        )
    _require_expert_dtype(spec.name, options.expert_dtype, store.dtype)
    cache = store.layer.counters if isinstance(store, BufferedExperts) else None
    if options.buffered and cache is None:
        raise OptionError(
            "expert_memory",
            f"all experts of {spec.name} are in memory already: nothing would be saved by buffering them",
        )
    config = LayerConfig(
        activation=spec.activation,
        gating=options.gating,
        kernel=options.kernel if cache is None else _buffered_kernel(options),
        expert_masking=spec.expert_masking,
        final_masking=spec.final_masking,
        dropout=spec.dropout,
    )
    counters = LayerCounters(
        spec.name,
        spec.phase,
        spec.router.num_experts,
        options.profile,
        exchange=None if used is None else used.counters,
        cache=cache,
    )
    return MoELayer(
        gate,
        _router(spec.router, options),
        store,
        config,
        counters,
        observers,
        exchange=exchange,
        padded_exchange=padded_exchange,
    )


def _buffered_kernel(options: MoEOptions) -> str:
    """Of the kernels that auto may choose, only one computes from experts kept apart."""
    return "loop" if options.kernel == "auto" else options.kernel


def _require_expert_dtype(layer: str, option: str, dtype: torch.dtype) -> None:
    """Experts get their dtype where they are read; asking for another one later would have no effect."""
    if option in EXPERT_DTYPES and EXPERT_DTYPES[option] != dtype:
        raise OptionError(
            "expert_dtype",
            f"{option!r} takes effect where weights are read (hf_integration.from_pretrained, moe-opt convert), but "
            f"the experts of {layer} are here as {str(dtype).removeprefix('torch.')}; leave it at 'checkpoint'",
        )


def _router(router: AnyRouter, options: MoEOptions) -> AnyRouter:
    if options.capacity == "none" and not isinstance(router, SoftmaxTopKRouter):
        return replace(router, capacity=None)
    return router


@dataclass(frozen=True)
class ExpertLayer:
    """Where the experts of one layer lie in a checkpoint's files.

    Attributes:
        name: the layer's name in its model.
        phase: ``encoder`` or ``decoder``.
        experts: of expert ``e``, at place ``e``: field of ``ExpertWeights`` to the tensor's record.
    """

    name: str
    phase: str
    experts: tuple[ExpertRecords, ...]


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
    pooled = [_pooled(layer, *slot_dtypes) for layer in layers]
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
        wanted = {layer.name: _template(layer.experts[0], expert_dtype, dtype) for layer in layers}
        return _Source(files, files.scratch_bytes_for(wanted, on_cpu=not pinned), None)
    wanted = {layer.name: _host_template(layer.experts[0], expert_dtype, dtype) for layer in layers}
    layouts = {name: SlotLayout.of(template) for name, template in wanted.items()}
    slot_bytes, experts = slot_bytes_for(layouts.values()), sum(len(layer.experts) for layer in layers)
    slots = num_slots("host_memory", options.host_memory, experts * slot_bytes, slot_bytes, at_least=1, at_most=experts)
    tier = HostTier(files, layouts, slots, pinned=pinned)
    return _Source(tier, files.scratch_bytes_for(wanted, on_cpu=True), tier)


def _host_compute(pool: ExpertPool, source: _Source, options: MoEOptions, row_dtype: torch.dtype) -> HostCompute | None:
    """What has experts computed in main memory, its costs timed here; None where every expert is copied."""
    if options.host_compute == "off" or source.tier is None or pool.arena.device.type == "cpu":
        return None
    ffn = partial(host_ffn, get_kernel(_buffered_kernel(options)))
    return HostCompute(source.tier, measure_layers(pool.layers.values(), source.tier, pool.arena, row_dtype, ffn))


def _pooled(layer: ExpertLayer, expert_dtype: torch.dtype, dtype: torch.dtype) -> PooledLayer:
    layout = SlotLayout.of(_template(layer.experts[0], expert_dtype, dtype))
    return PooledLayer(layer.name, layer.phase, len(layer.experts), layout, CacheCounters())


def _trace_for(layers: Sequence[PooledLayer], path: str) -> Trace:
    trace = read_trace(path)
    check_trace(trace, [TraceLayer(layer.name, layer.phase, layer.num_experts) for layer in layers], path)
    return trace


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


def _template(records: ExpertRecords, expert_dtype: torch.dtype, dtype: torch.dtype) -> ExpertWeights:
    """An expert as it is in a slot, without storage: of the shapes in ``records``, in a model of ``dtype``."""
    ffn_width, width = records["fc1_weight"].shape
    return ExpertWeights.empty(
        width,
        ffn_width,
        dtype=expert_dtype,
        bias_dtype=dtype if expert_dtype == torch.int8 else None,
        device="meta",
        bias="fc1_bias" in records,
        gated="gate_weight" in records,
    )


def _host_template(records: ExpertRecords, expert_dtype: torch.dtype, dtype: torch.dtype) -> ExpertWeights:
    """An expert as it is in main memory: as it is stored, or as in a slot where that is int8 or smaller."""
    fields: dict[str, Tensor | None] = {"fc1_bias": None, "fc2_bias": None}
    for name, record in records.items():
        fields[name] = torch.empty(record.shape, dtype=record.dtype, device="meta")
    stored = ExpertWeights(**fields)  # type: ignore[arg-type]
    slot = _template(records, expert_dtype, dtype)
    return slot if expert_dtype == torch.int8 or slot.nbytes < stored.nbytes else stored


def spread_experts(
    layers: Sequence[TraceLayer], ranks: Collectives, options: MoEOptions, placement: Placement | None = None
) -> ExpertSpread:
    """Give every rank its experts of ``layers``: as ``placement`` says, or in ascending equal parts.

    Raises PlacementError when ``placement`` is of another model or number of ranks, or gives a rank no expert of a
    layer; OptionError for options that cannot be had on several ranks.
    """
    _check_spreadable(options)
    if placement is None:
        maps = {layer.name: SlotMap.contiguous(layer.num_experts, ranks.size) for layer in layers}
    else:
        fingerprint = Trace(tuple(layers), ()).fingerprint
        check_made_for(placement, fingerprint, layers[0].num_experts, ranks.size)
        unplaced = [layer.name for layer in layers if layer.name not in placement.layers]
        if unplaced:
            raise PlacementError(f"does not place the layer {unplaced[0]!r} of this model")
        maps = {layer.name: _slot_map(placement, layer) for layer in layers}
    for name, slots in maps.items():
        for rank, experts in enumerate(slots.by_rank):
            if not experts:
                raise PlacementError(f"rank {rank} holds no expert of {name!r}: fewer ranks, or another placement")
    return ExpertSpread(ranks, maps)


def _slot_map(placement: Placement, layer: TraceLayer) -> SlotMap:
    """Replicas that a strategy put on one rank are one there: a second copy would take memory for nothing."""
    by_rank = tuple(tuple(dict.fromkeys(experts)) for experts in placement.layers[layer.name])
    return SlotMap(layer.num_experts, by_rank)


def _check_spreadable(options: MoEOptions) -> None:
    if options.gating == "static":
        raise OptionError("gating", "'static' runs on one rank only; leave it at 'dynamic' where ranks share experts")
    if options.warm_start is not None:
        raise OptionError("warm_start", "has no effect where ranks share experts: a trace is of all of them")
    if options.prefetch == ROUTER:
        raise OptionError(
            "prefetch",
            "'router' knows this rank's tokens only, not what others will send; 'previous' predicts from those",
        )
