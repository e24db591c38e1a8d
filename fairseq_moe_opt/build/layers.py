"""A layer's description and the options in, a layer out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fairseq_moe_opt.buffering import BufferedExperts
from fairseq_moe_opt.build.spread import require_ranks
from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.moe.experts import NO_DROPOUT, ExpertDropout
from fairseq_moe_opt.moe.kernels import choose_kernel
from fairseq_moe_opt.moe.layer import LayerConfig, MoELayer
from fairseq_moe_opt.moe.protocols import ExpertStore, PaddedExchange, RoutingObserver, TokenExchange
from fairseq_moe_opt.moe.report import LayerCounters
from fairseq_moe_opt.moe.routing import GivenRouting, GShardTop2Router, SoftmaxTopKRouter, Top1Router
from fairseq_moe_opt.options import MoEOptions

EXPERT_DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "int8": torch.int8}
"""Values of the option ``expert_dtype`` to the dtype that an expert's matrices then have."""

AnyRouter = GShardTop2Router | Top1Router | SoftmaxTopKRouter


@dataclass(frozen=True)
class LayerSpec:
    """What a checkpoint says of one layer.

    Attributes:
        name: the layer's name in its model.
        phase: ``encoder`` or ``decoder``.
        router: with the checkpoint's own capacity rule, or a place holder where the host model routes.
        activation: of the experts.
        expert_masking: EOM probability.
        final_masking: FOM probability.
        dropout: inside each expert, in training.
    """

    name: str
    phase: str
    router: AnyRouter | GivenRouting
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
    if used is None:
        require_ranks(options)
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
        kernel=options.kernel,
        expert_masking=spec.expert_masking,
        final_masking=spec.final_masking,
        dropout=spec.dropout,
        checkpoint_capacity=capacity_fraction(spec.router),
    )
    counters = LayerCounters(
        spec.name,
        spec.phase,
        spec.router.num_experts,
        options.profile is True,
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


def _require_expert_dtype(layer: str, option: str, dtype: torch.dtype) -> None:
    """Experts get their dtype where they are read; asking for another one later would have no effect."""
    if option in EXPERT_DTYPES and EXPERT_DTYPES[option] != dtype:
        raise OptionError(
            "expert_dtype",
            f"{option!r} takes effect where weights are read (hf_integration.from_pretrained, moe-opt convert), but "
            f"the experts of {layer} are here as {str(dtype).removeprefix('torch.')}; leave it at 'checkpoint'",
        )


def capacity_fraction(router: AnyRouter | GivenRouting) -> float | None:
    """C of the checkpoint's own rule as a share of a batch's rows; None where it depends on something else."""
    if (
        isinstance(router, (SoftmaxTopKRouter, GivenRouting))
        or router.capacity is None
        or router.capacity.eval_length is not None
    ):
        return None
    if router.capacity.eval_token_fraction > 0:
        return router.capacity.eval_token_fraction
    return router.top_k / router.num_experts if router.capacity.fixed is None else None


def _router(router: AnyRouter | GivenRouting, options: MoEOptions) -> AnyRouter | GivenRouting:
    if options.capacity == "none" and not isinstance(router, (SoftmaxTopKRouter, GivenRouting)):
        return replace(router, capacity=None)
    return router
