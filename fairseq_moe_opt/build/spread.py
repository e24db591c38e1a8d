"""Which rank gets which experts, as the options and a placement say."""

from __future__ import annotations

from collections.abc import Sequence

from fairseq_moe_opt.buffering import ROUTER
from fairseq_moe_opt.errors import OptionError, PlacementError
from fairseq_moe_opt.moe.trace import Trace, TraceLayer
from fairseq_moe_opt.options import MoEOptions
from fairseq_moe_opt.parallel import Collectives, ExpertSpread, SlotMap
from fairseq_moe_opt.placement import Placement, check_made_for


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
