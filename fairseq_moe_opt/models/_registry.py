"""Puts the models into fairseq's registries, under fairseq's names and under new ones."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import field, make_dataclass
from typing import Any, Optional

import fairseq.models as registry
from fairseq.models.transformer.transformer_legacy import TransformerModel, base_architecture
from fairseq.models.transformer_lm import (
    TransformerLanguageModel,
    TransformerLanguageModelConfig,
    transformer_lm_gpt,
)
from hydra.core.config_store import ConfigStore
from omegaconf import II

from fairseq_moe_opt.models._arguments import BATCH_SIZES, MoEArguments, RuntimeArguments
from fairseq_moe_opt.models._transformer import MoELanguageModel, MoETransformerModel

LanguageModelConfig = make_dataclass(
    "MoELanguageModelConfig",
    # Without a help text, so that fairseq takes them for what another group of flags sets.
    [(name, Optional[int], field(default=II(f"dataset.{name}"))) for name in BATCH_SIZES],  # noqa: UP045
    bases=(RuntimeArguments, MoEArguments, TransformerLanguageModelConfig),
)
"""fairseq's language model configuration with the sparse layers' arguments: what it does not declare gets lost."""

NLLB_200_54B: Mapping[str, Any] = {
    "encoder_layers": 24,
    "decoder_layers": 24,
    "encoder_embed_dim": 2048,
    "encoder_ffn_embed_dim": 8192,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "encoder_normalize_before": True,
    "decoder_normalize_before": True,
    "share_all_embeddings": True,
    "attention_dropout": 0.1,
    "dropout": 0.3,
    "max_source_positions": 512,
    "max_target_positions": 512,
    "moe_freq": 4,
    "moe_expert_count": 128,
    "moe_eom": 0.2,
    "moe_second_expert_policy": "all",
    "moe_gating_use_fp32": True,
    "use_moe_pad_mask": True,
    "moe_eval_capacity_token_fraction": 1.0,
}
"""NLLB-200's 54B model as its recipe trains it (fairseq, branch nllb, examples/nllb/modeling)."""

LANGUAGE_MODELS: Mapping[str, tuple[int, int]] = {
    "15b": (12, 768),
    "52b": (24, 1024),
    "207b": (24, 2048),
    "1_1t": (32, 4096),
}
"""Layers and width of the published sparse language models (fairseq, branch moe, examples/moe_lm)."""

LANGUAGE_MODEL_HEADS: Mapping[str, int] = {"15b": 12, "52b": 16, "207b": 32, "1_1t": 32}
"""Attention heads, from the paper; the repository does not say."""


def register_models() -> None:
    """Put everything in; a second call changes nothing."""
    if registry.MODEL_REGISTRY["transformer"] is MoETransformerModel:
        return
    _stand_in("transformer", TransformerModel, MoETransformerModel)
    _stand_in("transformer_lm", TransformerLanguageModel, MoELanguageModel)
    _declare("transformer_lm")
    registry.register_model("transformer_moe")(MoETransformerModel)
    registry.register_model_architecture("transformer_moe", "transformer_moe")(_defaults({}, base_architecture))
    registry.register_model_architecture("transformer_moe", "transformer_moe_nllb200_54b")(
        _defaults(NLLB_200_54B, base_architecture)
    )
    registry.register_model("transformer_lm_moe", dataclass=LanguageModelConfig)(MoELanguageModel)
    for size, (layers, width) in LANGUAGE_MODELS.items():
        preset = _language_model(layers, width, LANGUAGE_MODEL_HEADS[size])
        name = f"transformer_lm_moe_{size}"
        registry.register_model_architecture("transformer_lm_moe", name)(_defaults(preset, transformer_lm_gpt))


def _stand_in(name: str, stock: type, ours: type) -> None:
    """Every entry of exactly fairseq's class becomes ours; models derived from it by others stay theirs."""
    registry.MODEL_REGISTRY[name] = ours
    for architecture, model in list(registry.ARCH_MODEL_REGISTRY.items()):
        if model is stock:
            registry.ARCH_MODEL_REGISTRY[architecture] = ours


def _declare(name: str) -> None:
    """The configuration of ``name`` for checkpoints, command lines and hydra."""
    registry.MODEL_DATACLASS_REGISTRY[name] = LanguageModelConfig
    # fairseq looks for this very name, two underscores and all, on the class of an architecture.
    setattr(MoELanguageModel, "__dataclass", LanguageModelConfig)
    node = LanguageModelConfig()
    node._name = name
    ConfigStore.instance().store(name=name, group="model", node=node, provider="fairseq")


def _defaults(values: Mapping[str, Any], base: Callable[[Any], Any]) -> Callable[[Any], None]:
    """An architecture function: what the user left out is taken from ``values``, then from ``base``."""

    def architecture(args: Namespace) -> None:
        for name, value in values.items():
            if getattr(args, name, None) is None:
                setattr(args, name, value)
        base(args)

    return architecture


def _language_model(layers: int, width: int, heads: int) -> dict[str, Any]:
    return {
        "decoder_layers": layers,
        "decoder_embed_dim": width,
        "decoder_ffn_embed_dim": 4 * width,
        "decoder_attention_heads": heads,
        "share_decoder_input_output_embed": True,
        "moe_freq": 2,
        "moe_expert_count": 512,
        "moe_gating_use_fp32": True,
        "moe_second_expert_policy": "all",
        "moe_normalize_expert_grad": "sqrt_world_size",
        "moe_eval_capacity_token_fraction": -1.0,
    }
