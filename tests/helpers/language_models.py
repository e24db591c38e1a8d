"""Tiny random language models behind Transformers' ``ExpertsInterface``, one a family: no file, no network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 64
_SMALL: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.4,
    "num_experts_per_tok": 2,
}

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "Mixtral": {"intermediate_size": 24, "num_local_experts": 8},
    "Qwen2Moe": {
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "intermediate_size": 48,
        "num_experts": 8,
    },
    "Qwen3Moe": {"moe_intermediate_size": 24, "intermediate_size": 48, "num_experts": 8, "head_dim": 8},
    "Olmoe": {"intermediate_size": 24, "num_experts": 8},
    "DeepseekV2": {
        "moe_intermediate_size": 24,
        "intermediate_size": 48,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "topk_method": "greedy",
    },
    "DeepseekV3": {
        "moe_intermediate_size": 24,
        "intermediate_size": 48,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "n_group": 2,
        "topk_group": 1,
    },
    "GptOss": {"intermediate_size": 24, "num_local_experts": 8, "head_dim": 8, "sliding_window": 8},
    "GraniteMoe": {"intermediate_size": 24, "num_local_experts": 8},
    "Phimoe": {"intermediate_size": 24, "num_local_experts": 8},
    "NemotronH": {
        "layers_block_type": ["attention", "moe", "attention", "moe"],
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 40,
        "intermediate_size": 48,
        "n_routed_experts": 8,
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 8,
    },
}
"""Class prefix in Transformers to what its configuration needs besides the common part; every E is 8."""


def language_model(family: str, seed: int = 5) -> PreTrainedModel:
    """A model of ``family`` whose every parameter is random, biases too, with experts far enough apart to matter."""
    torch.manual_seed(seed)
    settings = {**_SMALL, **FAMILIES[family]}
    if family == "NemotronH":
        settings.pop("num_hidden_layers")
    config = getattr(transformers, f"{family}Config")(**settings)
    model: PreTrainedModel = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" in name:
                continue
            parameter.normal_(0, 0.6 if "expert" in name else 0.3)
    model.generation_config.eos_token_id = None
    return model


def prompts() -> dict[str, Tensor]:
    """Three prompts of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 4, 2)):
        ids[row, :padding] = 0
        mask[row, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits_of(model: PreTrainedModel) -> Tensor:
    """(B, T, V) of the prompts."""
    with torch.no_grad():
        result: Tensor = model(**prompts()).logits
    return result


def greedy(model: PreTrainedModel, new_tokens: int = 8) -> Tensor:
    """Prompts and what follows them."""
    result: Tensor = model.generate(**prompts(), max_new_tokens=new_tokens, do_sample=False)  # type: ignore[attr-defined]
    return result


def letters_tokenizer() -> Any:
    """A tokenizer of that vocabulary, a token a word: a, b ... z, a26 ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"{chr(97 + i % 26)}{'' if i < 26 else i}": i + 2 for i in range(VOCABULARY - 2)}
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, **words}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", padding_side="left"
    )
