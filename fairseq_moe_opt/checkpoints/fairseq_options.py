"""Transformers' names and options for NLLB-MoE as fairseq's own: the way back of ``keymaps``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fairseq_moe_opt.checkpoints.keymaps import ACTIVATIONS
from fairseq_moe_opt.errors import CheckpointError

# (pattern of a whole Transformers name, fairseq's name); a base model's names lack the prefix "model.".
HF_TO_FAIRSEQ: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(r"(?:model\.)?" + pattern), name)
    for pattern, name in (
        (r"(encoder|decoder)\.layer_norm\.(weight|bias)", r"\1.layer_norm.\2"),
        (
            r"(encoder|decoder)\.layers\.(\d+)\.self_attn\.([kvq]|out)_proj\.(weight|bias)",
            r"\1.layers.\2.self_attn.\3_proj.\4",
        ),
        (
            r"decoder\.layers\.(\d+)\.cross_attention\.([kvq]|out)_proj\.(weight|bias)",
            r"decoder.layers.\1.encoder_attn.\2_proj.\3",
        ),
        (
            r"(encoder|decoder)\.layers\.(\d+)\.self_attn_layer_norm\.(weight|bias)",
            r"\1.layers.\2.self_attn_layer_norm.\3",
        ),
        (
            r"decoder\.layers\.(\d+)\.cross_attention_layer_norm\.(weight|bias)",
            r"decoder.layers.\1.encoder_attn_layer_norm.\2",
        ),
        (r"(encoder|decoder)\.layers\.(\d+)\.ff_layer_norm\.(weight|bias)", r"\1.layers.\2.final_layer_norm.\3"),
        (r"(encoder|decoder)\.layers\.(\d+)\.ffn\.(fc[12])\.(weight|bias)", r"\1.layers.\2.\3.\4"),
        (
            r"(encoder|decoder)\.layers\.(\d+)\.ffn\.router\.classifier\.weight",
            r"\1.layers.\2.moe_layer.gate.wg.weight",
        ),
        (
            r"(encoder|decoder)\.layers\.(\d+)\.ffn\.experts\.expert_(\d+)\.(fc[12])\.(weight|bias)",
            r"\1.layers.\2.moe_layer.experts.\3.\4.\5",
        ),
    )
)
SHARED_EMBEDDING = re.compile(r"(?:model\.)?shared\.weight")
# Names of the one embedding that older files repeat.
HF_TIED = re.compile(r"lm_head\.weight|(?:model\.)?(?:encoder|decoder)\.embed_tokens\.weight")
# Tables of positions, which older files hold and both sides compute.
_COMPUTED = re.compile(r"(?:model\.)?(?:encoder|decoder)\.embed_positions\.weights")

# (key of config.json, the value fairseq assumes, what it cannot express).
_REQUIRED: tuple[tuple[str, object, str], ...] = (
    ("tie_word_embeddings", True, "untied embeddings (tie_word_embeddings false)"),
    ("router_bias", False, "a router with a bias (router_bias)"),
    ("bos_token_id", 0, "another begin-of-sentence id than 0 (bos_token_id)"),
    ("pad_token_id", 1, "another padding id than 1 (pad_token_id)"),
    ("eos_token_id", 2, "another end-of-sentence id than 2 (eos_token_id)"),
    ("decoder_start_token_id", 2, "another first token of the decoder than </s> (decoder_start_token_id)"),
)
_SIZES = (
    "d_model",
    *(f"{side}_{what}" for side in ("encoder", "decoder") for what in ("layers", "ffn_dim", "attention_heads")),
)
# What Transformers takes for keys that config.json leaves out.
_DEFAULTS: Mapping[str, Any] = {
    "num_experts": 128,
    "encoder_sparse_step": 4,
    "decoder_sparse_step": 4,
    "second_expert_policy": "all",
    "normalize_router_prob_before_dropping": False,
    "batch_prioritized_routing": False,
    "moe_eval_capacity_token_fraction": 1.0,
    "moe_token_dropout": 0.2,
    "router_ignore_padding_tokens": False,
    "router_dtype": "float32",
    "max_position_embeddings": 1024,
    "activation_function": "relu",
    "scale_embedding": True,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.05,
    "decoder_layerdrop": 0.05,
}
# Options that fairseq's architecture functions would fill in; without them old readers of cfg.model fail.
_ARCHITECTURE: Mapping[str, Any] = {
    "_name": "transformer",
    "arch": "transformer",
    "share_all_embeddings": True,
    "share_decoder_input_output_embed": True,
    "encoder_normalize_before": True,
    "decoder_normalize_before": True,
    "encoder_embed_path": None,
    "decoder_embed_path": None,
    "encoder_learned_pos": False,
    "decoder_learned_pos": False,
    "adaptive_softmax_cutoff": None,
    "adaptive_softmax_dropout": 0,
    "adaptive_input": False,
    "tie_adaptive_weights": False,
    "no_token_positional_embeddings": False,
    "no_cross_attention": False,
    "cross_self_attention": False,
    "layernorm_embedding": False,
    "checkpoint_activations": False,
    "offload_activations": False,
    "encoder_layers_to_keep": None,
    "decoder_layers_to_keep": None,
    "quant_noise_pq": 0,
    "quant_noise_pq_block_size": 8,
    "quant_noise_scalar": 0,
    "moe_top1_expert": False,
    "moe_cmr": False,
    "moe_fom": 0.0,
}


def fairseq_name(name: str) -> str | None:
    """fairseq's name of a Transformers tensor; None for the embeddings and computed tables, which need no table.

    Raises KeyError for a tensor that is in no table.
    """
    for pattern, replacement in HF_TO_FAIRSEQ:
        match = pattern.fullmatch(name)
        if match:
            return match.expand(replacement)
    if any(pattern.fullmatch(name) for pattern in (SHARED_EMBEDDING, HF_TIED, _COMPUTED)):
        return None
    raise KeyError(name)


def fairseq_names(names: Iterable[str], path: Path) -> dict[str, str]:
    """Transformers name to fairseq name for all but the embeddings; CheckpointError for any unknown name."""
    found: dict[str, str] = {}
    for name in names:
        try:
            target = fairseq_name(name)
        except KeyError:
            raise CheckpointError(
                path, f"tensor {name!r} has no place in fairseq's transformer: it cannot express this model"
            ) from None
        if target is not None:
            found[name] = target
    return found


def fairseq_model_options(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """``cfg.model`` of fairseq's ``transformer`` for ``config.json``'s content; CheckpointError where it cannot."""
    _require_expressible(config, path)
    known = {**_DEFAULTS, **{key: value for key, value in config.items() if value is not None}}
    return {**_ARCHITECTURE, **_sizes(known, path), **_regularisation(known), **_routing(known)}


def _require_expressible(config: Mapping[str, Any], path: Path) -> None:
    kind = config.get("model_type")
    if kind != "nllb-moe":
        raise CheckpointError(path, f"has model_type {kind!r}; only nllb-moe becomes a fairseq model")
    for key, expected, what in _REQUIRED:
        if config.get(key) not in (None, expected):
            raise CheckpointError(path, f"fairseq's transformer cannot express {what}")
    for key in _SIZES:
        if not isinstance(config.get(key), int):
            raise CheckpointError(path, f"lacks {key}: not the configuration of an NLLB-MoE model")


def _sizes(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    width, positions = config["d_model"], config["max_position_embeddings"]
    activations = {hf: own for own, hf in ACTIVATIONS.items()}
    if config["activation_function"] not in activations:
        raise CheckpointError(
            path, f"fairseq's transformer cannot express activation_function {config['activation_function']!r}"
        )
    sizes: dict[str, Any] = {"decoder_input_dim": width, "decoder_output_dim": width}
    for side, where in (("encoder", "source"), ("decoder", "target")):
        sizes |= {
            f"{side}_layers": config[f"{side}_layers"],
            f"{side}_embed_dim": width,
            f"{side}_ffn_embed_dim": config[f"{side}_ffn_dim"],
            f"{side}_attention_heads": config[f"{side}_attention_heads"],
            f"max_{where}_positions": positions,
        }
    return {**sizes, "activation_fn": activations[config["activation_function"]]}


def _regularisation(config: Mapping[str, Any]) -> dict[str, Any]:
    same = ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop")
    return {**{key: config[key] for key in same}, "no_scale_embedding": not config["scale_embedding"]}


def _routing(config: Mapping[str, Any]) -> dict[str, Any]:
    """The router's options; ``moe_freq``, by which fairseq's trainer knows of experts, is set when both sides have."""
    steps = {side: int(config[f"{side}_sparse_step"]) for side in ("encoder", "decoder")}
    common = min(steps.values())
    own = {f"{side}_moe_freq": step if step > common else 0 for side, step in steps.items()}
    return {
        "moe_freq": common,
        **own,
        "moe_expert_count": config["num_experts"],
        "moe_gating_use_fp32": config["router_dtype"] == "float32",
        "moe_second_expert_policy": config["second_expert_policy"],
        "moe_normalize_gate_prob_before_dropping": config["normalize_router_prob_before_dropping"],
        "moe_batch_prioritized_routing": config["batch_prioritized_routing"],
        "moe_eval_capacity_token_fraction": config["moe_eval_capacity_token_fraction"],
        "moe_eom": config["moe_token_dropout"],
        # The name says the opposite of what it does: False means that padding is not routed.
        "use_moe_pad_mask": not config["router_ignore_padding_tokens"],
    }
