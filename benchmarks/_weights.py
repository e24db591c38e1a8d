"""Make the random model that every side loads: ``python _weights.py '{"d_model": 512, ...}' SEED FOLDER``.

Run in a process of its own, so that what measures stays small.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from _random_weights import fill
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration
from transformers.utils.logging import disable_progress_bar


def configuration(shape: Mapping[str, Any]) -> NllbMoeConfig:
    """Of ``shape``, all else as released; nothing is dropped at the default capacity fraction of 1."""
    return NllbMoeConfig(
        vocab_size=shape["vocabulary"],
        d_model=shape["d_model"],
        encoder_layers=shape["layers"],
        decoder_layers=shape["layers"],
        encoder_ffn_dim=shape["ffn_dim"],
        decoder_ffn_dim=shape["ffn_dim"],
        encoder_attention_heads=shape["heads"],
        decoder_attention_heads=shape["heads"],
        encoder_sparse_step=shape["sparse_step"],
        decoder_sparse_step=shape["sparse_step"],
        num_experts=shape["experts"],
        max_position_embeddings=shape["positions"],
        router_bias=shape["skew"] > 0,
    )


def build(shape: Mapping[str, Any]) -> NllbMoeForConditionalGeneration:
    """The model, its values still arbitrary."""
    # Without Transformers' own initialisation, which takes longer than all else here.
    with torch.device("meta"):
        model = NllbMoeForConditionalGeneration(configuration(shape))
    model.to_empty(device="cpu")
    model.tie_weights()
    return model


def main() -> None:
    """Write the model that the command line describes."""
    shape, seed, folder = sys.argv[1:]
    disable_progress_bar()
    sizes = json.loads(shape)
    model = build(sizes).eval()
    with torch.no_grad():
        fill(model, int(seed), sizes["skew"])
    model.save_pretrained(Path(folder))


if __name__ == "__main__":
    main()
