"""Switch Transformers (``google/switch-*``): a token goes to one expert, scaled by the router's probability of it.

Of a sequence, an expert serves ``expert_capacity`` tokens in their order; those beyond get nothing from this layer.
Transformers does that from 5.18 on, as 4.57 did; its releases from 5.0 to 5.17 drop nothing, whatever the capacity.
Here ``capacity="checkpoint"`` is the former, ``capacity="none"`` the latter, on every release.

Padding is routed like any token and takes up capacity, as in Transformers, which never reads
``router_ignore_padding_tokens``; where that is True, padding is not routed here. In training, the router's jitter
multiplies what the router is given; Transformers multiplies in place, so that in float32 the experts get it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.switch_transformers.configuration_switch_transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersForConditionalGeneration,
    SwitchTransformersSparseMLP,
)

from fairseq_moe_opt.build import LayerSpec
from fairseq_moe_opt.moe import CapacityRule, MoELayer
from fairseq_moe_opt.moe.experts import ExpertDropout
from fairseq_moe_opt.moe.routing import Top1Router
from hf_integration.families.pairs_of_linears import PairsOfLinears, RouterForward, phase_of
from hf_integration.padding import PaddingMasks

_ACTIVATIONS: Mapping[str, str] = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}
"""Transformers' names of activations that the engine has under another one."""


class SwitchTransformers(PairsOfLinears):
    """The family; ``FAMILY`` is the only one there is."""

    NAME = "switch-transformers"
    MODEL_TYPE = "switch_transformers"
    model_class = SwitchTransformersForConditionalGeneration
    block_class = SwitchTransformersSparseMLP
    linears = ("wi", "wo")

    def layer_spec(self, name: str, config: SwitchTransformersConfig) -> LayerSpec:
        """See ``PairsOfLinears``."""
        router = Top1Router(
            num_experts=config.num_experts,
            capacity=CapacityRule(eval_token_fraction=0.0, fixed=config.expert_capacity, per_sequence=True),
            fp32_gating=config.router_dtype == "float32",
            round_early=True,
        )
        activation = _ACTIVATIONS.get(config.dense_act_fn, config.dense_act_fn)
        return LayerSpec(
            name, phase_of(name), router, activation, dropout=ExpertDropout(hidden=float(config.dropout_rate))
        )

    def router_forward(self, router: nn.Module) -> Callable[..., tuple[Any, Any, Tensor]]:
        """See ``PairsOfLinears``."""
        return _RouterForward(router)

    def block_forward(
        self, block: nn.Module, layer: MoELayer, masks: PaddingMasks, phase: str
    ) -> Callable[..., Tensor]:
        """See ``PairsOfLinears``."""
        return _BlockForward(cast(SwitchTransformersSparseMLP, block), layer, masks, phase)


FAMILY = SwitchTransformers()


class _RouterForward(RouterForward):
    def __call__(self, hidden_states: Tensor) -> tuple[None, None, Tensor]:
        router = self._router
        if router.training and router.jitter_noise > 0:
            low, high = 1.0 - router.jitter_noise, 1.0 + router.jitter_noise
            hidden_states = hidden_states.to(router.dtype)
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(low, high)
        return None, None, self.logits(hidden_states)


class _BlockForward:
    """``SwitchTransformersSparseMLP.forward`` through the engine: (B, T, D) to (B, T, D)."""

    def __init__(self, block: SwitchTransformersSparseMLP, layer: MoELayer, masks: PaddingMasks, phase: str) -> None:
        self._block, self._layer, self._masks, self._phase = block, layer, masks, phase
        self.__wrapped__ = type(block).forward.__get__(block)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        batch, length, width = hidden_states.shape
        skip_padding = self._block.router.ignore_padding_tokens
        not_routed = self._masks.not_routed(None, hidden_states, self._phase, skip_padding=skip_padding)
        tokens = hidden_states.reshape(batch * length, width)
        result = self._layer(tokens, not_routed, training=self._block.training, sequences=batch)
        return result.output.view(batch, length, width)
