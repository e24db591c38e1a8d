"""Encoder-decoder and decoder-only transformers whose every k-th layer is sparse.

Checkpoints of the branches call themselves ``transformer`` and ``transformer_lm...``, so these classes stand in for
fairseq's own under those names. A configuration without sparse layers is handed to fairseq's own class untouched.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import MutableMapping
from typing import Any, cast

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models.transformer import TransformerConfig, TransformerDecoderBase, TransformerEncoderBase
from fairseq.models.transformer.transformer_legacy import TransformerModel
from fairseq.models.transformer_lm import TransformerLanguageModel
from torch import Tensor, nn

from fairseq_moe_opt.checkpoints.lazy import LazyStateDict
from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.models._arguments import IMPLIED_BY, MoEArguments
from fairseq_moe_opt.models._placing import read_in_place
from fairseq_moe_opt.models._plan import SparsePlan
from fairseq_moe_opt.models._report import attach

_DEFAULT_TARGET_POSITIONS = 1024
"""fairseq's own, for language models that say nothing."""


class _LayerCounter:
    """fairseq builds layers in a list comprehension and tells none its index."""

    def __init__(self) -> None:
        self._next = 0

    def take(self) -> int:
        """0, 1, 2 ..."""
        self._next += 1
        return self._next - 1


class _TakesTurns:
    """A stack that other ranks' experts take part in; comes before fairseq's class among the bases."""

    def _take_turn(self) -> None:
        """Wait until all ranks are about to run this stack, or to take part in it."""
        wait = self.__dict__.get("take_turn")
        if wait is not None:
            wait()


class SparseEncoder(_TakesTurns, TransformerEncoderBase):
    """fairseq's encoder, some layers of which ``plan`` builds."""

    def __init__(self, plan: SparsePlan, cfg: Any, dictionary: Any, embed_tokens: nn.Module) -> None:
        # Before nn.Module.__init__, because fairseq's constructor calls build_encoder_layer.
        self.__dict__.update(plan=plan, counter=_LayerCounter())
        super().__init__(cfg, dictionary, embed_tokens)

    def build_encoder_layer(self, cfg: Any) -> nn.Module:
        """The next layer."""
        sparse = self.__dict__["plan"].encoder_layer(cfg, self.__dict__["counter"].take(), self.return_fc)
        layer: nn.Module = super().build_encoder_layer(cfg) if sparse is None else sparse
        return layer

    def forward_scriptable(self, *args: Any, **kwargs: Any) -> Any:
        """fairseq's own, which runs all layers."""
        self._take_turn()
        return super().forward_scriptable(*args, **kwargs)


class SparseDecoder(_TakesTurns, TransformerDecoderBase):
    """fairseq's decoder, some layers of which ``plan`` builds."""

    def __init__(
        self, plan: SparsePlan, cfg: Any, dictionary: Any, embed_tokens: nn.Module, no_encoder_attn: bool = False
    ) -> None:
        self.__dict__.update(plan=plan, counter=_LayerCounter())
        super().__init__(cfg, dictionary, embed_tokens, no_encoder_attn=no_encoder_attn)

    def build_decoder_layer(self, cfg: Any, no_encoder_attn: bool = False) -> nn.Module:
        """The next layer."""
        sparse = self.__dict__["plan"].decoder_layer(cfg, self.__dict__["counter"].take(), no_encoder_attn)
        layer: nn.Module = super().build_decoder_layer(cfg, no_encoder_attn) if sparse is None else sparse
        return layer

    def extract_features_scriptable(self, *args: Any, **kwargs: Any) -> Any:
        """fairseq's own, which runs all layers."""
        self._take_turn()
        return super().extract_features_scriptable(*args, **kwargs)


class _LoadsInPlace:
    """Loading of both kinds of model; comes before fairseq's class among the bases."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, model_cfg: Any = None, args: Any = None) -> Any:
        """fairseq's own; but tensors that are still in their files are read straight into the model's memory.

        So a checkpoint is never held twice. ``model.moe.checkpoint`` remembers where its tensors lie.
        """
        handle = self.__dict__.get("moe")  # a copied model has none
        if not isinstance(state_dict, LazyStateDict) or _keeps_some_layers(model_cfg):
            if handle is not None and handle.sharing is not None:
                raise OptionError("path", "experts are spread over ranks from a sparse checkpoint's files, all layers")
            if handle is not None and handle.options.buffered:
                raise OptionError(
                    "moe_expert_memory",
                    f"{handle.options.expert_memory!r}: buffered experts are read from a checkpoint's own files, all "
                    "layers as they are there; load this with moe_expert_memory='all'",
                )
            return super().load_state_dict(state_dict, strict, model_cfg, args)  # type: ignore[misc]
        self.upgrade_state_dict(state_dict)
        if handle is not None:
            handle.loading(state_dict)
        result = read_in_place(cast(nn.Module, self), state_dict, strict)
        if handle is not None:
            handle.loaded(state_dict)
        return result

    def upgrade_state_dict(self, state_dict: MutableMapping[str, Tensor]) -> None:
        """fairseq's upgrade of old names; OptionError when the embeddings are of another number of symbols."""
        super().upgrade_state_dict(state_dict)  # type: ignore[misc]
        for name, parameter in cast(nn.Module, self).named_parameters():
            if name.endswith("embed_tokens.weight") and name in state_dict:
                stored = state_dict.shape_of(name) if isinstance(state_dict, LazyStateDict) else state_dict[name].shape
                have, want = stored[0], len(parameter)
                if have != want:
                    raise OptionError(
                        "data",
                        f"{name} of the checkpoint has {have} rows, but the dictionary has {want} symbols: use the "
                        "checkpoint's own dict.*.txt, language list and --add-data-source-prefix-tags",
                    )


class MoETransformerModel(_LoadsInPlace, TransformerModel):
    """``transformer`` and every architecture of it."""

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """fairseq's own flags and the sparse layers'."""
        super().add_args(parser)
        gen_parser_from_dataclass(parser, MoEArguments(), delete_default=True)

    @classmethod
    def build_model(cls, args: Namespace, task: Any) -> Any:
        """The model that ``args`` describe: fairseq's own class when no layer is sparse."""
        plan = SparsePlan.of(args)
        if plan is None:
            return TransformerModel.build_model(args, task)
        return attach(super().build_model(args, task), plan.options, getattr(args, IMPLIED_BY, None))

    @classmethod
    def build_encoder(cls, args: Any, src_dict: Any, embed_tokens: nn.Module) -> Any:
        """Called with a TransformerConfig that carries the sparse layers' arguments as extra attributes."""
        return SparseEncoder(_plan_of(args), TransformerConfig.from_namespace(args), src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, args: Any, tgt_dict: Any, embed_tokens: nn.Module) -> Any:
        """The same for the decoder."""
        cfg = TransformerConfig.from_namespace(args)
        return SparseDecoder(_plan_of(args), cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention)


class MoELanguageModel(_LoadsInPlace, TransformerLanguageModel):
    """``transformer_lm`` and every architecture of it."""

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """fairseq's own flags and the sparse layers'."""
        TransformerLanguageModel.add_args(parser)
        gen_parser_from_dataclass(parser, MoEArguments(), delete_default=True)

    @classmethod
    def build_model(cls, args: Any, task: Any) -> Any:
        """The model that ``args`` describe: fairseq's own class when no layer is sparse."""
        plan = SparsePlan.of(args)
        if plan is None:
            return TransformerLanguageModel.build_model(args, task)
        for name in ("adaptive_input", "character_embeddings", "decoder_layers_to_keep"):
            if getattr(args, name, None):
                raise OptionError(name, "is not supported together with sparse layers (moe_freq above 0)")
        if getattr(args, "max_target_positions", None) is None:
            args.max_target_positions = getattr(args, "tokens_per_sample", _DEFAULT_TARGET_POSITIONS)
        embed_tokens = cls.build_embedding(args, task.source_dictionary, args.decoder_input_dim)
        # from_namespace keeps only what fairseq declares, so the plan goes beside the configuration.
        cfg = TransformerConfig.from_namespace(args)
        decoder = SparseDecoder(plan, cfg, task.target_dictionary, embed_tokens, no_encoder_attn=True)
        return attach(cls(decoder), plan.options, getattr(args, IMPLIED_BY, None))


def _plan_of(args: Any) -> SparsePlan:
    plan = SparsePlan.of(args)
    if plan is None:
        raise OptionError("moe_freq", "is 0: a dense model is fairseq's own, not this class")
    return plan


def _keeps_some_layers(model_cfg: Any) -> bool:
    """Whether fairseq is to prune layers while loading, which gives them other numbers."""
    return any(getattr(model_cfg, f"{side}_layers_to_keep", None) for side in ("encoder", "decoder"))
