"""Make the random model that every side loads: ``python _weights.py '{"d_model": 512, ...}' SEED FOLDER``.

Run in a process of its own, so that what measures stays small.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

# Standard deviation of a weight, times the root of its inputs, by a part of its name. Wide awake on purpose:
# Transformers' own initialisation (0.02 everywhere) makes all tokens alike, which sends them to the same experts and
# decodes one token over and over. Much larger embeddings would drown what the layers add.
_SPREAD = {"shared": 2.0, "lm_head": 2.0, ".experts.": 2.0, "classifier": 1.0, ".fc": 1.2, "_proj": 0.8}


def spread_of(name: str, width: int) -> float:
    """Standard deviation of a weight with ``width`` inputs; the embeddings are scaled by the model again."""
    return next(spread for part, spread in _SPREAD.items() if part in name) / math.sqrt(width)


def fill(model: nn.Module, seed: int, skew: float) -> None:
    """Random weights from ``seed``, parameter by parameter in the order of their names; routers' biases of ``skew``."""
    stream = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() > 1:
            parameter.normal_(0.0, spread_of(name, parameter.shape[-1]), generator=stream)
        elif name.endswith("classifier.bias"):
            parameter.normal_(0.0, skew, generator=stream)
        elif name == "model.decoder.layer_norm.weight":
            # Random signs: with tied embeddings a positive gain makes every token predict itself.
            parameter.bernoulli_(0.5, generator=stream).mul_(2).sub_(1)
        elif name.endswith("layer_norm.weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.1, generator=stream)


def build(shape: dict[str, Any]) -> NllbMoeForConditionalGeneration:
    """The model, its values still arbitrary; nothing is dropped at the default capacity fraction of 1."""
    config = NllbMoeConfig(
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
    # Without Transformers' own initialisation, which takes longer than all else here.
    with torch.device("meta"):
        model = NllbMoeForConditionalGeneration(config)
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
