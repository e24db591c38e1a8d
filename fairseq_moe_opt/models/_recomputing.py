"""``--checkpoint-activations`` for sparse layers: what is recomputed in the backward pass must give the losses too.

fairseq's wrapper computes a layer without gradients first and again in the backward pass, and knows nothing but its
arguments and outputs. A loss handed over on the way, in the first pass, would have no gradient; so the losses leave the
wrapped layer as further outputs, and are handed over outside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch import nn

from fairseq_moe_opt.models._losses import collect_gate_losses, hand_over


def recompute(layer: nn.Module, offload: bool) -> nn.Module:
    """``layer`` with fairseq's activation checkpointing around it; activations go to the CPU where ``offload``."""
    plain = layer.forward
    layer.forward = functools.partial(_with_losses, plain)
    checkpoint_wrapper(layer, offload_to_cpu=offload)
    # Where fairseq takes its wrapper off again, nothing of this one stays.
    vars(layer)["precheckpoint_forward"] = plain
    layer.forward = functools.partial(_handing_over, layer.forward)
    return layer


def _with_losses(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """What ``forward`` gives, and one layer's losses: ``l_aux``, the CMR gate's sum and its number of tokens."""
    with collect_gate_losses() as losses:
        result = forward(*args, **kwargs)
    outputs = result if isinstance(result, tuple) else (result,)
    share, tokens = (next(iter(found), None) for found in (losses.cmr_share, losses.cmr_tokens))
    return (*outputs, losses.balance[0], share, tokens)


def _handing_over(forward: Callable[..., tuple[Any, ...]], *args: Any, **kwargs: Any) -> Any:
    """The outputs alone."""
    *outputs, balance, share, tokens = forward(*args, **kwargs)
    hand_over(balance, share, tokens)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)
