"""The size of a model's weights from its ``config.json`` alone: the model is built without storage."""

from __future__ import annotations

from pathlib import Path

import torch

from fairseq_moe_opt.buffering import LayerSize
from hf_integration.families import paired_family_of
from hf_integration.families.paired import num_experts, phase_of
from hf_integration.loading import MODEL_CLASSES, read_config


def model_sizes(folder: Path, item_bytes: int) -> tuple[int, tuple[LayerSize, ...]]:
    """Bytes of everything but experts, and the sparse layers, with ``item_bytes`` a parameter.

    Raises CheckpointError or NoMoELayerError for a folder without the configuration of a known model.
    """
    config = read_config(folder)
    with torch.device("meta"):
        model = MODEL_CLASSES[config.model_type](config)
    model.tie_weights()
    layers = []
    family = paired_family_of(model)
    for name, block in family.sparse_blocks(model).items():
        one = sum(tensor.numel() for module in family.expert_pairs(block)[0] for tensor in module.parameters())
        layers.append(LayerSize(phase_of(name), num_experts(block), one * item_bytes))
    total = sum(parameter.numel() for parameter in model.parameters()) * item_bytes
    return total - sum(layer.num_experts * layer.expert_bytes for layer in layers), tuple(layers)
