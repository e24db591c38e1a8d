"""Random weights that behave like trained ones where it matters: tokens are told apart and spread over experts."""

from __future__ import annotations

import math

import torch
from torch import nn

# Standard deviation of a weight, times the root of its inputs, by a part of its name. Wide awake on purpose:
# Transformers' own initialisation (0.02 everywhere) makes all tokens alike, which sends them to the same experts and
# decodes one token over and over. Much larger embeddings would drown what the layers add.
# Names are Transformers' and fairseq's.
_SPREAD = {
    "shared": 2.0,
    "lm_head": 2.0,
    "embed_tokens": 2.0,
    ".experts.": 2.0,
    "classifier": 1.0,
    "gate.wg": 1.0,
    ".fc": 1.2,
    "_proj": 0.8,
}


def spread_of(name: str, width: int) -> float:
    """Standard deviation of a weight with ``width`` inputs; the embeddings are scaled by the model again."""
    return next(spread for part, spread in _SPREAD.items() if part in name) / math.sqrt(width)


def fill(model: nn.Module, seed: int, skew: float = 0.0) -> None:
    """Random weights from ``seed``, parameter by parameter in the order of their names; routers' biases of ``skew``."""
    stream = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() > 1:
            parameter.normal_(0.0, spread_of(name, parameter.shape[-1]), generator=stream)
        elif name.endswith("classifier.bias"):
            parameter.normal_(0.0, skew, generator=stream)
        elif name.endswith("decoder.layer_norm.weight"):
            # Random signs: with tied embeddings a positive gain makes every token predict itself.
            parameter.bernoulli_(0.5, generator=stream).mul_(2).sub_(1)
        elif name.endswith("layer_norm.weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.1, generator=stream)
