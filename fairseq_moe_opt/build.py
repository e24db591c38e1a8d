"""The composition root: options and a layer's description in, a layer out. Cross-checks happen here, before weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fairseq_moe_opt.buffering import (
    DEFAULT_POLICY,
    GLOBAL,
    OFF,
    ROUTER,
    BufferedExperts,
    ExpertPool,
    PooledLayer,
    Prefetcher,
    RouterGuess,
    SlotLayout,
    find_policy,
    link_to,
)
from fairseq_moe_opt.checkpoints import ExpertFiles, ExpertRecords
from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.moe.cache_report import BufferReport, CacheCounters
from fairseq_moe_opt.moe.kernels import choose_kernel
from fairseq_moe_opt.moe.layer import LayerConfig, MoELayer
from fairseq_moe_opt.moe.protocols import ExpertStore, RoutingObserver
from fairseq_moe_opt.moe.report import LayerCounters
from fairseq_moe_opt.moe.routing import GShardTop2Router, SoftmaxTopKRouter, Top1Router
from fairseq_moe_opt.moe.types import ExpertKey, ExpertWeights
from fairseq_moe_opt.options import PAGE_CACHE, MoEOptions
from fairseq_moe_opt.sizes import num_slots

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
    """

    name: str
    phase: str
    router: AnyRouter
    activation: str = "relu"
    expert_masking: float = 0.0
    final_masking: float = 0.0


def needs_packed_experts(options: MoEOptions, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel for such weights computes from one tensor of all experts instead of the experts' own tensors.

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
) -> MoELayer:
    """The layer that ``spec`` describes, run as ``options`` say, over ``gate`` and ``store``."""
    if store.num_experts != spec.router.num_experts:
        raise OptionError(
            "num_experts",
            f"{spec.name} routes to {spec.router.num_experts} experts but has {store.num_experts}",
        )
    buffered = isinstance(store, BufferedExperts)
    if options.buffered and not buffered:
        raise OptionError(
            "expert_memory",
            f"all experts of {spec.name} are in memory already: nothing would be saved by buffering them",
        )
    config = LayerConfig(
        activation=spec.activation,
        gating=options.gating,
        # Of the kernels that auto may choose, only this one computes from experts kept apart.
        kernel="loop" if buffered and options.kernel == "auto" else options.kernel,
        expert_masking=spec.expert_masking,
        final_masking=spec.final_masking,
    )
    cache = store.layer.counters if isinstance(store, BufferedExperts) else None
    counters = LayerCounters(spec.name, spec.phase, spec.router.num_experts, options.profile, cache)
    return MoELayer(gate, _router(spec.router, options), store, config, counters, observers)


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
    layers: Sequence[ExpertLayer], options: MoEOptions, device: torch.device, dtype: torch.dtype
) -> ExpertBuffer:
    """Slots for the experts of ``layers`` on ``device``, as ``options`` say; nothing is read yet.

    ``dtype`` is what floating-point weights are computed in; others stay as they are stored. Raises OptionError when
    the memory allowed is too small, naming the smallest possible.
    """
    pooled = [
        PooledLayer(
            layer.name,
            layer.phase,
            len(layer.experts),
            SlotLayout.of(_template(layer.experts[0], dtype)),
            CacheCounters(),
        )
        for layer in layers
    ]
    policy = DEFAULT_POLICY if options.eviction == "auto" else options.eviction
    pool_kind = GLOBAL if options.expert_pool == "auto" else options.expert_pool
    slots = slots_of(pooled, options.expert_memory, pool_kind)
    source = ExpertFiles(
        {ExpertKey(layer.name, e): records for layer in layers for e, records in enumerate(layer.experts)},
        keep_pages=options.host_memory == PAGE_CACHE,
        pinned=device.type == "cuda",
    )
    pool = ExpertPool(
        pooled,
        slots,
        source,
        find_policy(policy),
        device=device,
        link=link_to(device),
    )
    for layer in pooled:
        layer.counters.resident = partial(pool.resident, layer.name)
    report = BufferReport(
        slots=sum(slots),
        experts=sum(layer.num_experts for layer in pooled),
        slot_bytes=pool.arena.slot_bytes,
        arena_bytes=pool.arena.nbytes,
        workspace_bytes=pool.num_readers * source.scratch_bytes,
        host_bytes=0,
        policy=policy,
        pool=pool_kind,
    )
    prefetcher = _prefetcher(pool, options.prefetch)
    return ExpertBuffer({layer.name: BufferedExperts(pool, layer, prefetcher) for layer in pooled}, report, prefetcher)


def _prefetcher(pool: ExpertPool, how: str) -> Prefetcher | None:
    return None if how == OFF else Prefetcher(pool, ROUTER if how == "auto" else how)


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


def slots_of(layers: Sequence[PooledLayer], memory: str, pool: str) -> tuple[int, ...]:
    """Slots of each group that the size ``memory`` gives: one group for all layers, or one a layer.

    Raises OptionError when there is not one slot a group, naming the smallest size possible.
    """
    slot_bytes = max(layer.layout.nbytes for layer in layers)
    experts = sum(layer.num_experts for layer in layers)
    at_least = 1 if pool == GLOBAL else len(layers)
    total = num_slots("expert_memory", memory, experts * slot_bytes, slot_bytes, at_least=at_least, at_most=experts)
    if pool == GLOBAL:
        return (total,)
    share, left = divmod(total, len(layers))
    return tuple(min(share + (place < left), layer.num_experts) for place, layer in enumerate(layers))


def _template(records: ExpertRecords, dtype: torch.dtype) -> ExpertWeights:
    """An expert without storage, of the shapes in ``records`` and the dtypes it is computed in."""
    tensors: dict[str, Tensor | None] = {"fc1_bias": None, "fc2_bias": None}
    for name, record in records.items():
        kept = dtype if record.dtype.is_floating_point else record.dtype
        tensors[name] = torch.empty(record.shape, dtype=kept, device="meta")
    return ExpertWeights(**tensors)  # type: ignore[arg-type]
