"""``experts_implementation="moe_opt"``: the engine's kernels for every model behind Transformers' ``ExpertsInterface``.

The function is told no layer, so it gives speed alone; ``hf_integration.from_pretrained`` and ``optimize`` know the
layers, and give buffering, traces, reports and placement too. Transformers up to 5.6 takes no name but its own: there
only these two are left.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from fairseq_moe_opt.errors import MoEError
from fairseq_moe_opt.moe import LayerConfig, LayerCounters, MoELayer, Routing
from fairseq_moe_opt.moe.routing import GivenRouting
from fairseq_moe_opt.moe.stacked_experts import StackedExperts
from hf_integration.experts_module import ExpertsModule

NAME = "moe_opt"
_LAYER = "_moe_opt_layer"
_NO_MODEL: Any = None  # the check looks at the model for names of Transformers' own only


def register_experts_function() -> bool:
    """Make ``moe_opt`` a name of Transformers' registry; False where the release has no such registry."""
    try:
        interface = importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS
    except (ImportError, AttributeError):
        return False
    interface.register(NAME, experts_forward)
    return True


@cache
def name_is_taken() -> bool:
    """Whether this release lets ``experts_implementation="moe_opt"`` through, once it is registered.

    It is asked, not told by its number: its check gets the name, as it would from ``from_pretrained``.
    """
    try:
        PreTrainedModel.get_correct_experts_implementation(_NO_MODEL, NAME)
    except (AttributeError, ValueError):
        return False
    return True


def name_refused() -> str:
    """What to tell where :func:`name_is_taken` says no."""
    return (
        f"Transformers {transformers.__version__} takes no experts_implementation but its own, so {NAME!r} is not to "
        "be had by name"
    )


def experts_forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """(T, D) hidden states through the experts that (T, K) indices name, weighted and summed.

    An index that is E or more is of an expert elsewhere, and costs nothing. Raises NoMoELayerError for experts that the
    engine's kernels cannot compute.
    """
    layer = vars(experts).get(_LAYER)
    if not isinstance(layer, MoELayer):
        layer = _layer_of(experts)
        setattr(experts, _LAYER, layer)
    return run_layer(layer, hidden_states, top_k_index, top_k_weights, training=experts.training)


def run_layer(
    layer: MoELayer, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, training: bool = False
) -> Tensor:
    """The same through ``layer``, whose routing is the host's: ``top_k_index`` and ``top_k_weights`` are (T, K)."""
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    num_experts = layer.router.num_experts
    elsewhere = top_k_index >= num_experts
    index = top_k_index.masked_fill(elsewhere, num_experts).long()
    routing = Routing(index, top_k_weights.masked_fill(elsewhere, 0), num_experts)
    return layer.apply(tokens, routing, training=training).view_as(hidden_states)


def _layer_of(module: nn.Module) -> MoELayer:
    """A layer over ``module``'s own parameters, which are read at every call."""
    experts = ExpertsModule.of(module)
    router = GivenRouting(experts.num_experts, 1)
    counters = LayerCounters(NAME, "decoder", router.num_experts)
    return MoELayer(
        no_gate, router, StackedExperts(experts.layout, experts.stacks), LayerConfig(experts.activation), counters
    )


def no_gate(tokens: Tensor) -> Tensor:
    """Never asked: the host routes."""
    raise MoEError("the host model routes, this layer is given its choices")
