"""Tiny random NLLB-MoE models whose routing spreads over all experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

VOCABULARY = 96


def tiny_config(**changes: Any) -> NllbMoeConfig:
    """2 + 2 layers, the second of each side sparse with 8 experts."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "num_experts": 8,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "max_position_embeddings": 64,
    }
    return NllbMoeConfig(**{**values, **changes})


def tiny_model(seed: int = 0, **changes: Any) -> NllbMoeForConditionalGeneration:
    """A random model in evaluation mode."""
    torch.manual_seed(seed)
    model = NllbMoeForConditionalGeneration(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model


def batch(seed: int = 0, left_padded: bool = False) -> dict[str, Tensor]:
    """Three sentences of 9, 6 and 3 tokens and decoder inputs of length 5."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 6, 3)):
        padding = slice(0, 9 - length) if left_padded else slice(length, 9)
        ids[row, padding], mask[row, padding] = 1, 0
    decoder = torch.randint(4, VOCABULARY, (3, 5), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder}


def logits(model: NllbMoeForConditionalGeneration, inputs: dict[str, Tensor]) -> Tensor:
    """(3, 5, V), without gradients."""
    with torch.no_grad():
        result: Tensor = model(**inputs).logits
    return result
