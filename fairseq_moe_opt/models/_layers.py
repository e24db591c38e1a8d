"""fairseq's transformer layers with a sparse (or wider) feed-forward network in the place of their own.

fairseq's layers have no method for the feed-forward network alone: their forward calls ``fc1``, an activation and
``fc2`` in turn. Here ``fc1`` is a callable that computes all of it, and the other steps do nothing. The padding mask
comes to it by a context variable, because ``fc1`` is called with one argument.

As in the branches, dropout is inside each expert and inside the dense network, before they are weighted and added up;
the layer's own dropout after ``fc2`` lets pass what they give.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, cast

from fairseq.modules import LayerNorm
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import Tensor, nn

from fairseq_moe_opt.models._block import CMRLayer, MoEBlock

_PADDING: ContextVar[Tensor | None] = ContextVar("padding_of_the_layer", default=None)


_COMPLETE = "holds_all_of_the_network"
"""Attribute of the tensor that a sparse network returns: its dropout is done."""


def _same(value: Tensor) -> Tensor:
    return value


class SparseFeedForward(nn.Module):
    """What encoder and decoder layers share; comes before fairseq's class among the bases.

    Attributes:
        moe_layer: the experts.
        cmr_layer: there under conditional MoE routing, when the layer keeps its dense network too.
        masks_padding: whether padding is kept from the experts.
    """

    moe_layer: MoEBlock
    cmr_layer: CMRLayer | None
    masks_padding: bool
    _dense_steps: dict[str, Any]

    def build_fc1(self, input_dim: int, output_dim: int, *noise: Any) -> Any:
        """The dense network's first matrix, which only a CMR layer has."""
        return super().build_fc1(input_dim, output_dim, *noise) if self._is_cmr() else None  # type: ignore[misc]

    def build_fc2(self, input_dim: int, output_dim: int, *noise: Any) -> Any:
        """Its second matrix."""
        return super().build_fc2(input_dim, output_dim, *noise) if self._is_cmr() else None  # type: ignore[misc]

    def install(self, block: MoEBlock, cmr_dropout: float | None, final_masking: float, masks_padding: bool) -> None:
        """Put the experts in; ``cmr_dropout`` is None without CMR, ``final_masking`` counts with CMR only."""
        self.moe_layer = block
        self.cmr_layer = None if cmr_dropout is None else CMRLayer(block, cmr_dropout)
        self.masks_padding, self._cmr_final_masking = masks_padding, final_masking
        steps = ("activation_fn", "activation_dropout_module", "ffn_layernorm", "dropout_module")
        self._dense_steps = {step: getattr(self, step, None) for step in steps}
        # In the instance's dictionary they hide modules of the same names, which keep their keys in the state dict.
        self.__dict__.update(fc1=self._feed_forward, fc2=_same, activation_fn=_same, activation_dropout_module=_same)
        self.__dict__["dropout_module"] = self._dropout
        if cmr_dropout is None:
            self._modules.pop("ffn_layernorm", None)
        self.__dict__["ffn_layernorm"] = None

    def with_padding(self, padding: Tensor | None, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Call fairseq's ``forward`` with ``padding`` (B, T) known to the experts."""
        token = _PADDING.set(padding if self.masks_padding else None)
        try:
            return forward(*args, **kwargs)
        finally:
            _PADDING.reset(token)

    def upgrade_state_dict_named(self, state_dict: dict[str, Tensor], name: str) -> None:
        """Drop what the branches only log with, and give NormFormer's residual scale stock fairseq's name."""
        upgrade = getattr(super(), "upgrade_state_dict_named", None)
        if upgrade is not None:
            upgrade(state_dict, name)
        state_dict.pop(f"{name}.cmr_layer.lang_idx", None)
        if f"{name}.alpha2" in state_dict:
            state_dict[f"{name}.w_resid"] = state_dict.pop(f"{name}.alpha2")

    def _is_cmr(self) -> bool:
        return bool(self.__dict__["builds_dense"])

    def _feed_forward(self, hidden: Tensor) -> Tensor:
        padding = _PADDING.get()
        if self.cmr_layer is None:
            output = cast(Tensor, self.moe_layer(hidden, padding))
        else:
            mixed = cast(Tensor, self.cmr_layer(hidden, self._dense, padding))
            output = _mask_output(mixed, self._cmr_final_masking, self.training)
        setattr(output, _COMPLETE, True)
        return output

    def _dropout(self, hidden: Tensor) -> Tensor:
        """The layer's dropout, which fairseq calls after attention and after ``fc2`` alike."""
        if self.training and hasattr(hidden, _COMPLETE):
            return hidden
        # At evaluation it does nothing, unless --retain-dropout asks for it.
        return cast(Tensor, self._dense_steps["dropout_module"](hidden))

    def _dense(self, hidden: Tensor) -> Tensor:
        first, second = cast(nn.Module, self._modules["fc1"]), cast(nn.Module, self._modules["fc2"])
        hidden = self._dense_steps["activation_fn"](first(hidden))
        hidden = self._dense_steps["activation_dropout_module"](hidden)
        if self._dense_steps["ffn_layernorm"] is not None:
            hidden = self._dense_steps["ffn_layernorm"](hidden)
        hidden = second(hidden)
        return cast(Tensor, self._dense_steps["dropout_module"](hidden) if self.training else hidden)


def _mask_output(output: Tensor, probability: float, training: bool) -> Tensor:
    """Final output masking of (T, B, D): a factor at evaluation, whole tokens in training."""
    if probability == 0:
        return output
    if training:
        return output * (output.new_empty(output.shape[:2]).uniform_().unsqueeze(-1) >= probability)
    return output * (1 - probability)


class SparseEncoderLayer(SparseFeedForward, TransformerEncoderLayerBase):
    """fairseq's encoder layer over experts."""

    def __init__(self, cfg: Any, builds_dense: bool, return_fc: bool = False) -> None:
        self.__dict__["builds_dense"] = builds_dense
        super().__init__(cfg, return_fc=return_fc)

    def forward(self, x: Tensor, encoder_padding_mask: Tensor | None, attn_mask: Tensor | None = None) -> Any:
        """(T, B, D) to (T, B, D); ``encoder_padding_mask`` is (B, T), True where a token is padding."""
        return self.with_padding(encoder_padding_mask, super().forward, x, encoder_padding_mask, attn_mask)


class SparseDecoderLayer(SparseFeedForward, TransformerDecoderLayerBase):
    """fairseq's decoder layer over experts."""

    def __init__(self, cfg: Any, builds_dense: bool, no_encoder_attn: bool = False) -> None:
        self.__dict__["builds_dense"] = builds_dense
        super().__init__(cfg, no_encoder_attn)

    def forward(self, x: Tensor, *args: Any, self_attn_padding_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """(T, B, D) to fairseq's ``(x, attention, None)``; ``self_attn_padding_mask`` is (B, T) or None."""
        kwargs["self_attn_padding_mask"] = self_attn_padding_mask
        return self.with_padding(self_attn_padding_mask, super().forward, x, *args, **kwargs)


class WideEncoderLayer(TransformerEncoderLayerBase):
    """A dense encoder layer of another FFN width: the branches' baseline of equal work (alternate_ffn_embed_dim)."""

    def __init__(self, cfg: Any, width: int, return_fc: bool = False) -> None:
        self.__dict__["alternate_width"] = width
        super().__init__(cfg, return_fc=return_fc)

    def build_fc1(self, input_dim: int, output_dim: int, *noise: Any) -> Any:
        """(D to the alternate width)."""
        return super().build_fc1(input_dim, self.__dict__["alternate_width"], *noise)

    def build_fc2(self, input_dim: int, output_dim: int, *noise: Any) -> Any:
        """(the alternate width to D)."""
        return super().build_fc2(self.__dict__["alternate_width"], output_dim, *noise)


class WideDecoderLayer(TransformerDecoderLayerBase):
    """The same for the decoder (alternate_decoder_ffn_embed_dim)."""

    def __init__(self, cfg: Any, width: int, no_encoder_attn: bool = False) -> None:
        self.__dict__["alternate_width"] = width
        super().__init__(cfg, no_encoder_attn)
        if self._modules.get("ffn_layernorm") is not None:
            self.add_module("ffn_layernorm", LayerNorm(width))

    def build_fc1(self, input_dim: int, output_dim: int, *noise: Any) -> Any:
        """(D to the alternate width)."""
        return super().build_fc1(input_dim, self.__dict__["alternate_width"], *noise)

    def build_fc2(self, input_dim: int, output_dim: int, *noise: Any) -> Any:
        """(the alternate width to D)."""
        return super().build_fc2(self.__dict__["alternate_width"], output_dim, *noise)
