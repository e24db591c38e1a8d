"""Which rank gets which experts, as the options and a placement say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fairseq_moe_opt.buffering import ROUTER
from fairseq_moe_opt.errors import OptionError, PlacementError
from fairseq_moe_opt.moe.trace import Trace, TraceLayer, portable_name
from fairseq_moe_opt.options import MoEOptions
from fairseq_moe_opt.parallel import ALL_TO_ALL, Collectives, ExpertSpread, SlotMap
from fairseq_moe_opt.placement import Placement, RankSlots, check_made_for


def spread_experts(
    layers: Sequence[TraceLayer],
    ranks: Collectives,
    options: MoEOptions,
    placement: Placement | None = None,
    exchange: str = ALL_TO_ALL,
) -> ExpertSpread:
    """Give every rank its experts of ``layers``: as ``placement`` says, or in ascending equal parts.

    ``exchange`` is a name of ``parallel.EXCHANGES``.

    Raises PlacementError when ``placement`` is of another model or number of ranks, or gives a rank no expert of a
    layer; OptionError for options that cannot be had on several ranks.
    """
    _check_spreadable(options, exchange)
    return ExpertSpread(ranks, slot_maps_for(layers, ranks.size, placement), exchange)


def slot_maps_for(layers: Sequence[TraceLayer], num_ranks: int, placement: Placement | None) -> Mapping[str, SlotMap]:
    """Which rank holds which expert of every one of ``layers``, by its name; PlacementError as above."""
    if placement is None:
        maps = {layer.name: SlotMap.contiguous(layer.num_experts, num_ranks) for layer in layers}
    else:
        fingerprint = Trace(tuple(layers), ()).fingerprint
        check_made_for(placement, fingerprint, layers[0].num_experts, num_ranks)
        placed = {portable_name(name): slots for name, slots in placement.layers.items()}
        unplaced = [layer.name for layer in layers if portable_name(layer.name) not in placed]
        if unplaced:
            raise PlacementError(f"does not place the layer {unplaced[0]!r} of this model")
        maps = {layer.name: _slot_map(placed[portable_name(layer.name)], layer) for layer in layers}
    for name, slots in maps.items():
        for rank, experts in enumerate(slots.by_rank):
            if not experts:
                raise PlacementError(f"rank {rank} holds no expert of {name!r}: fewer ranks, or another placement")
    return maps


def layer_placement(layers: Sequence[TraceLayer], maps: Mapping[str, SlotMap]) -> Placement:
    """The inverse: what ``maps`` are as a placement."""
    fingerprint = Trace(tuple(layers), ()).fingerprint
    slots = {name: one.by_rank for name, one in maps.items()}
    return Placement(slots, layers[0].num_experts, next(iter(maps.values())).num_ranks, "running", fingerprint)


def require_ranks(options: MoEOptions) -> None:
    """Raise OptionError for options that only ranks that share experts have a use for."""
    if options.rebalance_every:
        raise OptionError(
            "rebalance_every", f"{options.rebalance_every} has no effect: one process has all experts; leave it out"
        )


def _slot_map(slots: RankSlots, layer: TraceLayer) -> SlotMap:
    """Replicas that a file puts on one rank are one there: a second copy would take memory for nothing."""
    return SlotMap(layer.num_experts, tuple(tuple(dict.fromkeys(experts)) for experts in slots))


def _check_spreadable(options: MoEOptions, exchange: str) -> None:
    if options.rebalance_every and exchange != ALL_TO_ALL:
        raise OptionError("rebalance_every", f"experts move between ranks of the {ALL_TO_ALL} exchange only")
    if options.gating == "static":
        raise OptionError("gating", "'static' runs on one rank only; leave it at 'dynamic' where ranks share experts")
    if options.warm_start is not None:
        raise OptionError("warm_start", "has no effect where ranks share experts: a trace is of all of them")
    if options.prefetch == ROUTER:
        raise OptionError(
            "prefetch",
            "'router' knows this rank's tokens only, not what others will send; 'previous' predicts from those",
        )
