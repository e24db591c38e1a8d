"""The dtype of a model's experts where it is not the model's own: decided before weights are read, and read into."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from fairseq_moe_opt.build import EXPERT_DTYPES
from fairseq_moe_opt.checkpoints import CheckpointIndex, read_tensor
from fairseq_moe_opt.checkpoints.expert_dtypes import NOTE, has_int8_experts, scale_of
from fairseq_moe_opt.errors import CheckpointError, OptionError
from fairseq_moe_opt.moe.int8_linear import Int8Linear
from fairseq_moe_opt.moe.quantization import quantize_rows_into
from hf_integration.families import family_of


def resolve_expert_dtype(option: str, config: Any, index: CheckpointIndex) -> str | None:
    """``int8`` or ``bf16`` where the experts have that dtype of their own, None where they have the model's.

    ``checkpoint`` follows the files: int8 matrices stay int8, and a note of ``moe-opt convert`` in ``config.json`` says
    bf16. Raises OptionError where int8 experts are asked to become floats again.
    """
    stored = "int8" if has_int8_experts((name, record.dtype) for name, record in index.items()) else None
    if option == "bf16" and stored == "int8":
        raise OptionError(
            "expert_dtype", f"the experts of {index.path} are int8, 'bf16' would not give back what was lost"
        )
    if option != "checkpoint":
        return option
    return stored or ("bf16" if getattr(config, NOTE, None) == "bf16" else None)


def require_scales(model: nn.Module) -> None:
    """CheckpointError for int8 experts that were loaded by Transformers, which takes codes for weights."""
    config = getattr(model, "config", None)
    if getattr(config, NOTE, None) == "int8" and not any(isinstance(module, Int8Linear) for module in model.modules()):
        raise CheckpointError(
            getattr(config, "_name_or_path", "") or type(model).__name__,
            "its experts are int8, and Transformers has loaded them without their scales; "
            "load it with hf_integration.from_pretrained",
        )


def prepare_experts(model: nn.Module, expert_dtype: str | None) -> frozenset[str]:
    """Names of the layers of a ``model`` without storage that have a dtype of their own; int8 ones are exchanged."""
    if expert_dtype is None:
        return frozenset()
    layers = dict(family_of(model).expert_linears(model))
    if EXPERT_DTYPES[expert_dtype] == torch.int8:
        for name, layer in layers.items():
            linear = cast(nn.Linear, layer)
            has_bias = linear.bias is not None
            model.set_submodule(name, Int8Linear(linear.in_features, linear.out_features, has_bias, device="meta"))
    return frozenset(layers)


def read_int8(layer: Int8Linear, index: CheckpointIndex, name: str, device: torch.device) -> None:
    """Give ``layer`` its weights, the tensor ``name``: as they are stored, or quantised when they are floats.

    Memory holds one matrix of floats beside the codes.
    """
    record = index[name]
    layer.weight = torch.empty(record.shape, dtype=torch.int8, device=device)
    layer.weight_scale = torch.empty(record.shape[:1], dtype=torch.float32, device=device)
    if record.dtype == torch.int8:
        read_tensor(record, out=layer.weight)
        read_tensor(scale_of(index, name), out=layer.weight_scale)
    else:
        quantize_rows_into(read_tensor(record), layer.weight, layer.weight_scale)
