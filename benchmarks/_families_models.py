"""A random model of every family: experts are most of its weights, and it is small enough to run in seconds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from _random_weights import fill
from torch import nn
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSinusoidalPositionalEmbedding

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Size:
    """Widths D and F, E experts of which a token goes to K, layers that all are sparse, and the vocabulary."""

    width: int = 512
    ffn_width: int = 256
    experts: int = 32
    top_k: int = 4
    layers: int = 2
    vocabulary: int = 1024

    @property
    def heads(self) -> int:
        """Of attention."""
        return max(self.width // 64, 2)

    def to_dict(self) -> dict[str, int]:
        """All of it by name."""
        return asdict(self)


QUICK = Size(width=32, ffn_width=24, experts=8, top_k=2, vocabulary=64)
"""Small enough to run in the tests."""


def _mixtral(size: Size) -> Config:
    return {"intermediate_size": size.ffn_width, "num_local_experts": size.experts}


def _olmoe(size: Size) -> Config:
    return {"intermediate_size": size.ffn_width, "num_experts": size.experts}


def _qwen3(size: Size) -> Config:
    head = {"head_dim": size.width // size.heads}
    return {"moe_intermediate_size": size.ffn_width, "num_experts": size.experts, **head}


def _qwen2(size: Size) -> Config:
    shared = {"shared_expert_intermediate_size": size.ffn_width}
    return {"moe_intermediate_size": size.ffn_width, "num_experts": size.experts, **shared}


def _deepseek(size: Size) -> dict[str, Any]:
    head = size.width // size.heads
    ranks = {"kv_lora_rank": size.width // 4, "q_lora_rank": size.width // 4}
    heads = {"qk_nope_head_dim": head, "qk_rope_head_dim": head // 2, "v_head_dim": head}
    experts = {"n_routed_experts": size.experts, "n_shared_experts": 1, "moe_intermediate_size": size.ffn_width}
    return {**ranks, **heads, **experts, "first_k_dense_replace": 0, "num_key_value_heads": size.heads}


def _deepseek_v2(size: Size) -> Config:
    return {**_deepseek(size), "topk_method": "greedy"}


def _deepseek_v3(size: Size) -> Config:
    return {**_deepseek(size), "n_group": 2, "topk_group": 1}


def _gpt_oss(size: Size) -> Config:
    # So many positions go with the scaling of them that its configuration has by default; there is no table of them.
    positions = {"max_position_embeddings": 131072, "sliding_window": 128}
    return {**_mixtral(size), **positions, "head_dim": size.width // size.heads}


def _nemotron_h(size: Size) -> Config:
    shared = {"moe_shared_expert_intermediate_size": size.ffn_width, "moe_intermediate_size": size.ffn_width}
    groups = {"n_routed_experts": size.experts, "n_group": 1, "topk_group": 1, "head_dim": size.width // size.heads}
    return {"layers_block_type": ["attention", "moe"] * size.layers, **shared, **groups}


LANGUAGE_MODELS: Mapping[str, Callable[[Size], Config]] = {
    "Mixtral": _mixtral,
    "Qwen2Moe": _qwen2,
    "Qwen3Moe": _qwen3,
    "Olmoe": _olmoe,
    "DeepseekV2": _deepseek_v2,
    "DeepseekV3": _deepseek_v3,
    "GptOss": _gpt_oss,
    "GraniteMoe": _mixtral,
    "Phimoe": _mixtral,
    "NemotronH": _nemotron_h,
}
"""Models behind the ``ExpertsInterface``: class prefix to what its configuration needs besides the common part."""

TRANSLATORS = ("SwitchTransformers", "NllbMoe")
"""Encoder-decoder models, whose layers Transformers computes in one way only."""

FAMILIES = (*LANGUAGE_MODELS, *TRANSLATORS)


def model_of(family: str, size: Size) -> Any:
    """A model in evaluation mode and float32 with random weights, whose tokens differ and spread over the experts."""
    # With 0, two experts of Switch are so close for one token that rounding decides which it goes to.
    torch.manual_seed(2 if family == "SwitchTransformers" else 0)
    build = _translator if family in TRANSLATORS else _language_model
    model = build(family, size).eval().requires_grad_(False)
    if family == "NllbMoe":
        fill(model, 0)
    for name, parameter in model.named_parameters():
        if family != "NllbMoe" and parameter.dim() > 1:
            # Sums of so many terms then have about the size of one, and tokens stay apart.
            wide = any(part in name for part in ("router", ".gate.", "embed", "shared.", "lm_head"))
            parameter.normal_(0, (2.0 if wide else 1.3) * parameter.shape[-1] ** -0.5)
            if name.endswith("Attention.q.weight"):
                parameter.mul_((size.width // size.heads) ** -0.5)  # T5's attention does not divide by that
    model.generation_config.eos_token_id = None
    return model


def _language_model(family: str, size: Size) -> Any:
    common = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "intermediate_size": size.ffn_width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "max_position_embeddings": 512,
        "num_experts_per_tok": size.top_k,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "NemotronH":
        del common["num_hidden_layers"]
    config = getattr(transformers, f"{family}Config")(**{**common, **LANGUAGE_MODELS[family](size)})
    return getattr(transformers, f"{family}ForCausalLM")(config)


def _translator(family: str, size: Size) -> Any:
    common = {"vocab_size": size.vocabulary, "d_model": size.width, "num_experts": size.experts}
    if family == "SwitchTransformers":
        layers = ("num_layers", "num_decoder_layers", "num_sparse_encoder_layers", "num_sparse_decoder_layers")
        kinds = {
            "d_kv": size.width // size.heads,
            "d_ff": size.ffn_width,
            "num_heads": size.heads,
            "expert_capacity": 4096,
            "decoder_start_token_id": 0,
            "tie_word_embeddings": False,
        }
    else:
        layers = ("encoder_layers", "decoder_layers")
        kinds = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in _nllb_side(size).items()}
    counts = dict.fromkeys(layers, size.layers)
    config = getattr(transformers, f"{family}Config")(**common, **counts, **kinds)
    return getattr(transformers, f"{family}ForConditionalGeneration")(config)


def _nllb_side(size: Size) -> Config:
    return {"ffn_dim": size.ffn_width, "attention_heads": size.heads, "sparse_step": 1}


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """All weights to ``dtype``, as loading in it does: tables of positions too, frequencies of rotary ones not."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, NllbMoeSinusoidalPositionalEmbedding):
            module.to(dtype)


def twin(model: Any) -> Any:
    """Another model over the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def expert_share(model: nn.Module) -> float:
    """The part of all weights that is experts'."""
    numbers = {name: parameter.numel() for name, parameter in model.named_parameters()}
    experts = sum(count for name, count in numbers.items() if ".experts." in name)
    return experts / sum(numbers.values())
