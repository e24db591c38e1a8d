"""NLLB-MoE (``NllbMoeModel``, ``NllbMoeForConditionalGeneration``).

Transformers 5 computes this family wrongly: ``NllbMoeExperts.forward`` takes the router's 0/1 mask for expert indices,
so only experts 0 and 1 ever run. Here the whole of ``NllbMoeSparseMLP.forward`` is replaced. Routing follows
Transformers 4.57: classifier and softmax in ``router_dtype``, probabilities rounded to the model's dtype before the
choice, outputs scaled by ``1 - moe_token_dropout`` at evaluation. In training, whole expert rows are masked with that
probability, as fairseq's expert output masking does (Transformers applies element-wise dropout, with rescaling).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from transformers.models.nllb_moe.configuration_nllb_moe import NllbMoeConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeForConditionalGeneration, NllbMoeSparseMLP

from fairseq_moe_opt.build import LayerSpec
from fairseq_moe_opt.moe import CapacityRule, GShardTop2Router, MoELayer
from hf_integration.families.pairs_of_linears import PairsOfLinears, RouterForward, phase_of
from hf_integration.padding import PaddingMasks


class NllbMoe(PairsOfLinears):
    """The family; ``FAMILY`` is the only one there is."""

    NAME = "nllb-moe"
    MODEL_TYPE = "nllb-moe"
    model_class = NllbMoeForConditionalGeneration
    block_class = NllbMoeSparseMLP
    linears = ("fc1", "fc2")

    def layer_spec(self, name: str, config: NllbMoeConfig) -> LayerSpec:
        """See ``PairsOfLinears``."""
        router = GShardTop2Router(
            num_experts=config.num_experts,
            capacity=CapacityRule(config.moe_eval_capacity_token_fraction, fixed=config.expert_capacity),
            second_expert_policy=config.second_expert_policy,
            normalize_before_dropping=config.normalize_router_prob_before_dropping,
            batch_prioritized=config.batch_prioritized_routing,
            fp32_gating=config.router_dtype == "float32",
            round_early=True,
        )
        return LayerSpec(name, phase_of(name), router, config.activation_function, float(config.moe_token_dropout))

    def router_forward(self, router: nn.Module) -> Callable[..., tuple[Any, Any, Tensor]]:
        """See ``PairsOfLinears``."""
        return _RouterForward(router)

    def block_forward(
        self, block: nn.Module, layer: MoELayer, masks: PaddingMasks, phase: str
    ) -> Callable[..., Tensor]:
        """See ``PairsOfLinears``."""
        return _BlockForward(cast(NllbMoeSparseMLP, block), layer, masks, phase)


FAMILY = NllbMoe()


class _RouterForward(RouterForward):
    def __call__(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[None, None, Tensor]:
        return None, None, self.logits(hidden_states)


class _BlockForward:
    """``NllbMoeSparseMLP.forward`` through the engine: (B, T, D) to (B, T, D)."""

    def __init__(self, block: NllbMoeSparseMLP, layer: MoELayer, masks: PaddingMasks, phase: str) -> None:
        self._block, self._layer, self._masks, self._phase = block, layer, masks, phase
        self.__wrapped__ = type(block).forward.__get__(block)

    def __call__(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        batch, length, width = hidden_states.shape
        # router_ignore_padding_tokens=False means that padding is not routed, whatever its name suggests.
        not_routed = self._masks.not_routed(
            padding_mask,
            hidden_states,
            self._phase,
            skip_padding=not self._block.router.router_ignore_padding_tokens,
        )
        tokens = hidden_states.reshape(batch * length, width)
        result = self._layer(tokens, not_routed, training=self._block.training)
        return result.output.view(batch, length, width)
