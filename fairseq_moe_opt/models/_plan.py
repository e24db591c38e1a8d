"""From a model's configuration to its sparse layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fairseq.distributed import fsdp_wrap
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch import nn

from fairseq_moe_opt.build import AnyRouter, LayerSpec
from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.models._arguments import MoEArguments, read_arguments, read_batch_sizes, read_options
from fairseq_moe_opt.models._block import BlockSpec, MoEBlock
from fairseq_moe_opt.models._layers import (
    SparseDecoderLayer,
    SparseEncoderLayer,
    SparseFeedForward,
    WideDecoderLayer,
    WideEncoderLayer,
)
from fairseq_moe_opt.models._recomputing import recompute
from fairseq_moe_opt.models._sharing import current_sharing
from fairseq_moe_opt.moe import CapacityRule, ExpertDropout, GShardTop2Router, Top1Router
from fairseq_moe_opt.options import MoEOptions

_ACTIVATIONS: Mapping[str, str] = {"relu": "relu", "gelu": "gelu", "swish": "silu"}
"""fairseq's names of the activations that the engine computes."""


@dataclass(frozen=True)
class SparsePlan:
    """Everything that the sparse layers of a model are built from, beside fairseq's own configuration.

    Attributes:
        arguments: what the checkpoint says.
        options: how the runtime is asked to run.
        batch_sizes: sentences that a batch is padded to in training and in validation; 0 for none.
        apart: whether the experts are going to be on several ranks.
    """

    arguments: MoEArguments
    options: MoEOptions
    batch_sizes: tuple[int, int] = (0, 0)
    apart: bool = False

    @classmethod
    def of(cls, cfg: Any) -> SparsePlan | None:
        """The plan of a model's configuration; None for a dense model. OptionError names what is wrong in it."""
        arguments = read_arguments(cfg)
        if not arguments.any_sparse:
            return None
        options, sharing = read_options(cfg), current_sharing()
        if sharing is not None:
            options = sharing.settled(options)
        plan = cls(arguments, options, read_batch_sizes(cfg), apart=sharing is not None)
        for side in ("encoder", "decoder"):
            if arguments.frequency(side) and not arguments.alternate_width(side) and arguments.moe_expert_count < 1:
                raise OptionError(
                    "moe_expert_count", f"{arguments.moe_expert_count} experts; a sparse layer needs some"
                )
        return plan

    def encoder_layer(self, cfg: Any, index: int, return_fc: bool) -> nn.Module | None:
        """Encoder layer ``index`` (from 0) if it is one of the special ones; ``cfg`` is fairseq's TransformerConfig."""
        if not self.arguments.is_sparse("encoder", index):
            return None
        width = self.arguments.alternate_width("encoder")
        if width > 0:
            return _wrapped(cfg, WideEncoderLayer(cfg, width, return_fc))
        layer = SparseEncoderLayer(cfg, self.arguments.moe_cmr, return_fc)
        self._fill(layer, cfg, "encoder", index, cfg.max_source_positions)
        return _wrapped(cfg, layer)

    def decoder_layer(self, cfg: Any, index: int, no_encoder_attn: bool) -> nn.Module | None:
        """The same for the decoder."""
        if not self.arguments.is_sparse("decoder", index):
            return None
        width = self.arguments.alternate_width("decoder")
        if width > 0:
            return _wrapped(cfg, WideDecoderLayer(cfg, width, no_encoder_attn))
        layer = SparseDecoderLayer(cfg, self.arguments.moe_cmr, no_encoder_attn)
        self._fill(layer, cfg, "decoder", index, cfg.max_target_positions)
        return _wrapped(cfg, layer)

    def _fill(
        self, layer: SparseEncoderLayer | SparseDecoderLayer, cfg: Any, side: str, index: int, max_positions: int
    ) -> None:
        given, section = self.arguments, getattr(cfg, side)
        spec = LayerSpec(
            name=f"{side}.layers.{index}.moe_layer",
            phase=side,
            router=self._router(),
            activation=_activation(cfg.activation_fn),
            expert_masking=given.moe_eom,
            # CMR masks the mixture, not the experts' part of it.
            final_masking=0.0 if given.moe_cmr else given.moe_fom,
            dropout=_dropout(layer),
        )
        length = max_positions if given.moe_eval_capacity_max_seqlen else None
        shape = BlockSpec(spec, section.embed_dim, section.ffn_embed_dim, length, *self.batch_sizes)
        block = MoEBlock(shape, self.options, self.apart)
        layer.install(
            block,
            cmr_dropout=given.cmr_gate_drop if given.moe_cmr else None,
            final_masking=given.moe_fom,
            masks_padding=given.use_moe_pad_mask,
        )

    def _router(self) -> AnyRouter:
        given = self.arguments
        capacity = CapacityRule(given.moe_eval_capacity_token_fraction)
        if given.moe_top1_expert:
            return Top1Router(given.moe_expert_count, capacity, given.moe_gating_use_fp32)
        return GShardTop2Router(
            num_experts=given.moe_expert_count,
            capacity=capacity,
            second_expert_policy=given.moe_second_expert_policy,
            normalize_before_dropping=given.moe_normalize_gate_prob_before_dropping,
            batch_prioritized=given.moe_batch_prioritized_routing,
            fp32_gating=given.moe_gating_use_fp32,
        )


def _dropout(layer: Any) -> ExpertDropout:
    """What fairseq's layer would apply in its own feed-forward network."""
    return ExpertDropout(layer.activation_dropout_module.p, layer.dropout_module.p)


def _activation(name: str) -> str:
    known = _ACTIVATIONS.get(str(name))
    if known is None:
        raise OptionError("activation_fn", f"{name!r}: experts compute {', '.join(_ACTIVATIONS)}")
    return known


def _wrapped(cfg: Any, layer: nn.Module) -> nn.Module:
    """What fairseq's own ``build_*_layer`` put around a layer."""
    if cfg.checkpoint_activations:
        around = recompute if isinstance(layer, SparseFeedForward) else checkpoint_wrapper
        layer = around(layer, cfg.offload_activations)
    wrapped: nn.Module = fsdp_wrap(layer, min_num_params=0 if cfg.checkpoint_activations else cfg.min_params_to_wrap)
    return wrapped
