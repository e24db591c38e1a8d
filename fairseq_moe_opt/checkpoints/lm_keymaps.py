"""fairseq's names and options for decoder-only language models next to this project's own Transformers model.

The model (``hf_integration.fairseq_lm``) has fairseq's names but for those of the tables below.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fairseq_moe_opt.errors import CheckpointError

MODEL_TYPE = "fairseq_moe_lm"
EMBEDDING, OUTPUT = "decoder.embed_tokens.weight", "decoder.output_projection.weight"
EOS_ID, BOS_ID = 2, 0

# (pattern of a whole fairseq name, this project's name); the first match counts.
RENAMED: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"decoder\.layers\.(\d+)\.(fc[12])\.(weight|bias)", r"decoder.layers.\1.ffn.\2.\3"),
        (r"decoder\.output_projection\.weight", "lm_head.weight"),
    )
)
# What is called the same on both sides.
KEPT = re.compile(
    r"decoder\.(?:"
    r"(?:embed_tokens|embed_positions|project_in_dim|project_out_dim)\.weight"
    r"|(?:layernorm_embedding|layer_norm)\.(?:weight|bias)"
    r"|layers\.\d+\.self_attn\.(?:[kvq]|out)_proj\.(?:weight|bias)"
    r"|layers\.\d+\.(?:self_attn|final)_layer_norm\.(?:weight|bias)"
    r"|layers\.\d+\.moe_layer\.(?:gate\.wg\.weight|experts\.\d+\.fc[12]\.(?:weight|bias))"
    r")"
)
# A format number, and one that only tells a dtype.
DROPPED = re.compile(r"decoder\.(?:version|embed_positions\._float_tensor)")

# (option of fairseq's cfg.model, the value this project assumes, what it cannot express).
REQUIRED: tuple[tuple[str, object, str], ...] = (
    ("moe_cmr", False, "conditional MoE routing (moe_cmr)"),
    ("base_layers", 0, "BASE layers (base_layers)"),
    ("scale_fc", False, "NormFormer (scale_fc)"),
    ("scale_attn", False, "NormFormer (scale_attn)"),
    ("scale_heads", False, "NormFormer (scale_heads)"),
    ("scale_resids", False, "NormFormer (scale_resids)"),
    ("alibi", False, "ALiBi positions (alibi)"),
    ("use_stable_embedding", False, "a stable embedding (use_stable_embedding)"),
    ("character_embeddings", False, "character embeddings (character_embeddings)"),
    ("adaptive_input", False, "adaptive input embeddings (adaptive_input)"),
    ("adaptive_softmax_cutoff", None, "adaptive softmax (adaptive_softmax_cutoff)"),
    ("alternate_decoder_ffn_embed_dim", 0, "alternate dense layers (alternate_decoder_ffn_embed_dim)"),
)
# fairseq's names of the activations that experts can have to Transformers'.
ACTIVATIONS: Mapping[str, str] = {"relu": "relu", "gelu": "gelu", "swish": "silu"}
_SIZES = ("decoder_layers", "decoder_embed_dim", "decoder_ffn_embed_dim", "decoder_attention_heads")


def is_language_model(names: Iterable[str]) -> bool:
    """Whether a fairseq checkpoint with tensors of these ``names`` is a decoder without an encoder."""
    known = set(names)
    return EMBEDDING in known and not any(name.startswith("encoder.") for name in known)


def lm_names(names: Iterable[str], path: Path) -> dict[str, str]:
    """fairseq name to this project's for all that have one; CheckpointError for any unknown name."""
    found: dict[str, str] = {}
    for name in names:
        renamed = next((match.expand(new) for pattern, new in RENAMED if (match := pattern.fullmatch(name))), None)
        if renamed is not None or KEPT.fullmatch(name):
            found[name] = renamed or name
        elif not DROPPED.fullmatch(name):
            raise CheckpointError(path, f"tensor {name!r} has no place in a language model's folder")
    return found


def lm_config(cfg: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path, dtype: str) -> dict[str, Any]:
    """``config.json`` for fairseq's ``cfg`` and the ``shapes`` of its tensors; CheckpointError where there is none.

    Widths are those of the tensors: options of a language model may say what its architecture did not follow.
    """
    model = cfg.get("model")
    if not isinstance(model, Mapping):
        raise CheckpointError(path, "its cfg has no model section, so the network's sizes are unknown")
    for option, expected, what in REQUIRED:
        value = model.get(option, expected)
        if value != expected and not (expected in (None, False) and not value):
            raise CheckpointError(path, f"a language model's folder cannot express {what}")
    if missing := [option for option in _SIZES if not isinstance(model.get(option), int)]:
        raise CheckpointError(path, f"its cfg.model lacks {missing[0]}: not a language model of fairseq")
    activation = str(model.get("activation_fn", "relu"))
    if activation not in ACTIVATIONS:
        raise CheckpointError(path, f"a language model's folder cannot express activation_fn {activation!r}")
    first = BOS_ID if _adds_bos(cfg) else EOS_ID
    return {
        "architectures": ["FairseqMoELMForCausalLM"],
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        **_sizes(model, shapes),
        **_positions(model, shapes),
        "activation_function": ACTIVATIONS[activation],
        "pre_norm": bool(model.get("decoder_normalize_before", False)),
        "final_norm": not model.get("no_decoder_final_norm", False),
        "layernorm_embedding": bool(model.get("layernorm_embedding", False)),
        "scale_embedding": not model.get("no_scale_embedding", False),
        "dropout": model.get("dropout", 0.1),
        "attention_dropout": model.get("attention_dropout", 0.0),
        "activation_dropout": model.get("activation_dropout", 0.0) or model.get("relu_dropout", 0.0),
        "layerdrop": model.get("decoder_layerdrop", 0.0),
        **_routing(model),
        "add_bos_token": _adds_bos(cfg),
        "tie_word_embeddings": bool(model.get("share_decoder_input_output_embed", False)),
        "use_cache": True,
        "bos_token_id": first,
        "pad_token_id": 1,
        "eos_token_id": EOS_ID,
    }


def lm_generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``generation_config.json``: as fairseq generates, ``</s>`` ends a text and padding is never chosen."""
    symbols = {name: config[name] for name in ("bos_token_id", "pad_token_id", "eos_token_id")}
    return {**symbols, "suppress_tokens": [config["pad_token_id"]]}


def _adds_bos(cfg: Mapping[str, Any]) -> bool:
    """Whether texts begin with ``<s>``: an option of the task, which the model's configuration repeats."""
    sections = (cfg.get("task"), cfg.get("model"))
    return any(bool(section.get("add_bos_token")) for section in sections if isinstance(section, Mapping))


def _sizes(model: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    width = model["decoder_embed_dim"]
    vocab_size, embedding = shapes[EMBEDDING]
    output = shapes["decoder.project_out_dim.weight"][0] if "decoder.project_out_dim.weight" in shapes else width
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "embedding_size": None if embedding == width else embedding,
        "output_size": None if output == width else output,
        "num_hidden_layers": model["decoder_layers"],
        "num_attention_heads": model["decoder_attention_heads"],
        "ffn_dim": model["decoder_ffn_embed_dim"],
    }


def _positions(model: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    table = shapes.get("decoder.embed_positions.weight")
    limit = model.get("max_target_positions") or model.get("tokens_per_sample") or 1024
    return {
        "use_positions": not model.get("no_token_positional_embeddings", False),
        "learned_positions": table is not None,
        # Its first rows, up to that of padding (1), are no positions.
        "max_position_embeddings": int(limit) if table is None else table[0] - 2,
    }


def _routing(model: Mapping[str, Any]) -> dict[str, Any]:
    """The router's options; the frequency is the larger of the decoder's own and the common one, as in fairseq."""
    return {
        "moe_freq": max(int(model.get("moe_freq") or 0), int(model.get("decoder_moe_freq") or 0)),
        "num_experts": int(model.get("moe_expert_count") or 0),
        "top1": bool(model.get("moe_top1_expert", False)),
        "fp32_gating": bool(model.get("moe_gating_use_fp32", False)),
        "second_expert_policy": model.get("moe_second_expert_policy", "sampling"),
        "normalize_before_dropping": bool(model.get("moe_normalize_gate_prob_before_dropping", False)),
        "batch_prioritized": bool(model.get("moe_batch_prioritized_routing", False)),
        "route_padding": not model.get("use_moe_pad_mask", False),
        "expert_masking": float(model.get("moe_eom") or 0.0),
        "final_masking": float(model.get("moe_fom") or 0.0),
        "eval_capacity_token_fraction": float(model.get("moe_eval_capacity_token_fraction", 0.25)),
        "eval_capacity_max_length": bool(model.get("moe_eval_capacity_max_seqlen", False)),
    }
