"""fairseq's names and options for NLLB-MoE next to Transformers' own: tables, and one function to apply each.

Both describe the same network; what Transformers cannot express is refused by name, never dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fairseq_moe_opt.errors import CheckpointError

# (pattern of a whole fairseq name, Transformers' name); the first match counts.
FAIRSEQ_TO_HF: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"encoder\.embed_tokens\.weight", "model.shared.weight"),
        (r"(encoder|decoder)\.layer_norm\.(weight|bias)", r"model.\1.layer_norm.\2"),
        (
            r"(encoder|decoder)\.layers\.(\d+)\.self_attn\.([kvq]|out)_proj\.(weight|bias)",
            r"model.\1.layers.\2.self_attn.\3_proj.\4",
        ),
        (
            r"decoder\.layers\.(\d+)\.encoder_attn\.([kvq]|out)_proj\.(weight|bias)",
            r"model.decoder.layers.\1.cross_attention.\2_proj.\3",
        ),
        (
            r"(encoder|decoder)\.layers\.(\d+)\.self_attn_layer_norm\.(weight|bias)",
            r"model.\1.layers.\2.self_attn_layer_norm.\3",
        ),
        (
            r"decoder\.layers\.(\d+)\.encoder_attn_layer_norm\.(weight|bias)",
            r"model.decoder.layers.\1.cross_attention_layer_norm.\2",
        ),
        (
            r"(encoder|decoder)\.layers\.(\d+)\.final_layer_norm\.(weight|bias)",
            r"model.\1.layers.\2.ff_layer_norm.\3",
        ),
        (r"(encoder|decoder)\.layers\.(\d+)\.(fc[12])\.(weight|bias)", r"model.\1.layers.\2.ffn.\3.\4"),
        (
            r"(encoder|decoder)\.layers\.(\d+)\.moe_layer\.gate\.wg\.weight",
            r"model.\1.layers.\2.ffn.router.classifier.weight",
        ),
        (
            r"(encoder|decoder)\.layers\.(\d+)\.moe_layer\.experts\.(\d+)\.(fc[12])\.(weight|bias)",
            r"model.\1.layers.\2.ffn.experts.expert_\3.\4.\5",
        ),
    )
)

# (pattern, why the tensor has no counterpart).
DROPPED: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"(encoder|decoder)\.version", "a format number"),
        (r"(encoder|decoder)\.embed_positions\._float_tensor", "only tells a dtype; positions are computed"),
        (r"decoder\.embed_tokens\.weight", "tied to encoder.embed_tokens.weight"),
        (r"decoder\.output_projection\.weight", "tied to encoder.embed_tokens.weight"),
    )
)

# The tensors that Transformers holds once: equal in the checkpoint, or it cannot be expressed.
TIED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight")

# (option of fairseq's cfg.model, the value Transformers assumes, what it cannot express).
REQUIRED: tuple[tuple[str, object, str], ...] = (
    ("moe_cmr", False, "conditional MoE routing (moe_cmr)"),
    ("moe_top1_expert", False, "top-1 routing (moe_top1_expert)"),
    ("moe_fom", 0.0, "final output masking (moe_fom)"),
    ("encoder_normalize_before", True, "post-LN layers (encoder_normalize_before False)"),
    ("decoder_normalize_before", True, "post-LN layers (decoder_normalize_before False)"),
    ("share_all_embeddings", True, "untied embeddings (share_all_embeddings False)"),
    ("scale_fc", False, "NormFormer (scale_fc)"),
    ("scale_attn", False, "NormFormer (scale_attn)"),
    ("scale_heads", False, "NormFormer (scale_heads)"),
    ("scale_heads_inside", False, "NormFormer (scale_heads_inside)"),
    ("scale_resids", False, "NormFormer (scale_resids)"),
    ("encoder_learned_pos", False, "learned positions (encoder_learned_pos)"),
    ("decoder_learned_pos", False, "learned positions (decoder_learned_pos)"),
    ("no_token_positional_embeddings", False, "a model without positions (no_token_positional_embeddings)"),
    ("alibi", False, "ALiBi positions (alibi)"),
    ("layernorm_embedding", False, "a layer norm after the embedding (layernorm_embedding)"),
    ("adaptive_input", False, "adaptive input embeddings (adaptive_input)"),
    ("adaptive_softmax_cutoff", None, "adaptive softmax (adaptive_softmax_cutoff)"),
    ("no_cross_attention", False, "a decoder without cross attention (no_cross_attention)"),
    ("cross_self_attention", False, "cross+self attention (cross_self_attention)"),
    ("alternate_ffn_embed_dim", 0, "alternate dense layers (alternate_ffn_embed_dim)"),
    ("alternate_decoder_ffn_embed_dim", 0, "alternate dense layers (alternate_decoder_ffn_embed_dim)"),
)

# fairseq's activation names that mean the same function under Transformers' name.
ACTIVATIONS: Mapping[str, str] = {"relu": "relu", "gelu": "gelu", "swish": "silu", "tanh": "tanh"}


def hf_name(name: str) -> str | None:
    """Transformers' name of a fairseq tensor; None for one that is dropped on purpose.

    Raises KeyError for a tensor that neither table knows.
    """
    for pattern, replacement in FAIRSEQ_TO_HF:
        match = pattern.fullmatch(name)
        if match:
            return match.expand(replacement)
    if any(pattern.fullmatch(name) for pattern, _ in DROPPED):
        return None
    raise KeyError(name)


def hf_names(names: Iterable[str], path: Path) -> dict[str, str]:
    """fairseq name to Transformers name for all that have one; CheckpointError for any unknown name."""
    found: dict[str, str] = {}
    for name in names:
        try:
            target = hf_name(name)
        except KeyError:
            raise CheckpointError(
                path, f"tensor {name!r} has no place in Transformers' NLLB-MoE: it cannot express this model"
            ) from None
        if target is not None:
            found[name] = target
    return found


def hf_config(cfg: Mapping[str, Any], vocab_size: int, path: Path, dtype: str) -> dict[str, Any]:
    """``config.json`` of Transformers' NLLB-MoE for fairseq's ``cfg``; CheckpointError where it cannot."""
    model = cfg.get("model")
    if not isinstance(model, Mapping):
        raise CheckpointError(path, "its cfg has no model section, so the network's sizes are unknown")
    _require_expressible(model, path)
    return {
        "architectures": ["NllbMoeForConditionalGeneration"],
        "model_type": "nllb-moe",
        "dtype": dtype,
        "vocab_size": vocab_size,
        **_sizes(model, path),
        **_routing(model),
        "dropout": model.get("dropout", 0.1),
        "attention_dropout": model.get("attention_dropout", 0.0),
        "activation_dropout": model.get("activation_dropout", 0.0),
        "encoder_layerdrop": model.get("encoder_layerdrop", 0.0),
        "decoder_layerdrop": model.get("decoder_layerdrop", 0.0),
        "scale_embedding": not model.get("no_scale_embedding", False),
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
        "use_cache": True,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    }


def hf_generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``generation_config.json``: decoding starts from ``</s>`` and goes at most to the trained positions."""
    return {
        "bos_token_id": config["bos_token_id"],
        "pad_token_id": config["pad_token_id"],
        "eos_token_id": config["eos_token_id"],
        "decoder_start_token_id": config["decoder_start_token_id"],
        "max_length": config["max_position_embeddings"],
    }


def _require_expressible(model: Mapping[str, Any], path: Path) -> None:
    for option, expected, what in REQUIRED:
        value = model.get(option, expected)
        if value != expected and not (expected in (None, False) and not value):
            raise CheckpointError(path, f"Transformers' NLLB-MoE cannot express {what}")
    if float(model.get("moe_eval_capacity_token_fraction", 0.25)) <= 0:
        raise CheckpointError(
            path,
            "Transformers' NLLB-MoE cannot express fairseq's training capacity at evaluation "
            "(moe_eval_capacity_token_fraction <= 0)",
        )


def _sizes(model: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Layers and widths; both sides share one model width in Transformers."""
    missing = [
        option
        for side in ("encoder", "decoder")
        for option in (
            f"{side}_layers",
            f"{side}_embed_dim",
            f"{side}_ffn_embed_dim",
            f"{side}_attention_heads",
        )
        if not isinstance(model.get(option), int)
    ]
    if missing:
        raise CheckpointError(path, f"its cfg.model lacks {missing[0]}: not an encoder-decoder transformer")
    widths = {model[f"{side}_embed_dim"] for side in ("encoder", "decoder")}
    widths |= {model.get(f"decoder_{end}_dim") or model["decoder_embed_dim"] for end in ("input", "output")}
    if len(widths) != 1:
        raise CheckpointError(path, f"Transformers' NLLB-MoE cannot express several widths {sorted(widths)}")
    activation = str(model.get("activation_fn", "relu"))
    if activation not in ACTIVATIONS:
        raise CheckpointError(path, f"Transformers' NLLB-MoE cannot express activation_fn {activation!r}")
    positions = [int(model.get(f"max_{side}_positions") or 1024) for side in ("source", "target")]
    return {
        "d_model": widths.pop(),
        "encoder_layers": model["encoder_layers"],
        "decoder_layers": model["decoder_layers"],
        "encoder_ffn_dim": model["encoder_ffn_embed_dim"],
        "decoder_ffn_dim": model["decoder_ffn_embed_dim"],
        "encoder_attention_heads": model["encoder_attention_heads"],
        "decoder_attention_heads": model["decoder_attention_heads"],
        "max_position_embeddings": max(positions),
        "activation_function": ACTIVATIONS[activation],
    }


def _routing(model: Mapping[str, Any]) -> dict[str, Any]:
    """The router's options; a side's frequency is the larger of its own and the common one, as in fairseq."""
    freq = int(model.get("moe_freq") or 0)
    return {
        "num_experts": int(model.get("moe_expert_count") or 0),
        "encoder_sparse_step": max(freq, int(model.get("encoder_moe_freq") or 0)),
        "decoder_sparse_step": max(freq, int(model.get("decoder_moe_freq") or 0)),
        "second_expert_policy": model.get("moe_second_expert_policy", "sampling"),
        "normalize_router_prob_before_dropping": bool(model.get("moe_normalize_gate_prob_before_dropping", False)),
        "batch_prioritized_routing": bool(model.get("moe_batch_prioritized_routing", False)),
        "moe_eval_capacity_token_fraction": float(model.get("moe_eval_capacity_token_fraction", 0.25)),
        "moe_token_dropout": float(model.get("moe_eom") or 0.0),
        # The name says the opposite of what it does: False means that padding is not routed.
        "router_ignore_padding_tokens": not model.get("use_moe_pad_mask", False),
        "router_bias": False,
        "router_dtype": "float32",
    }
