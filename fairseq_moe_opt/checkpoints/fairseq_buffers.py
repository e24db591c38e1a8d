"""The few numbers of a fairseq checkpoint that are no weights, kept in ``config.json`` so that the way back is exact.

They say how old the names are (``version``) and in which dtype positions are wanted (``_float_tensor``, whose value
fairseq never sets).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fairseq_moe_opt.checkpoints.records import CheckpointIndex, read_tensor
from fairseq_moe_opt.checkpoints.writers import bytes_of

CONFIG_KEY = "fairseq_buffers"
_NAME = re.compile(r"(?:encoder|decoder)\.(?:version|embed_positions\._float_tensor)")
_VERSION = 3.0
_DTYPES: Mapping[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def buffers_for_config(index: CheckpointIndex) -> dict[str, list[str]]:
    """Name to dtype and bytes (hexadecimal, little-endian) of each such tensor of one number."""
    found = {}
    for name, record in index.items():
        code = str(record.dtype).removeprefix("torch.")
        if _NAME.fullmatch(name) and record.shape == (1,) and code in _DTYPES:
            found[name] = [code, bytes(bytes_of(read_tensor(record))).hex()]
    return found


def buffers_of(side: str, kept: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The two tensors of a ``side`` (encoder, decoder): as ``kept``, else as fairseq makes them for ``dtype``."""
    made = {
        f"{side}.version": torch.tensor([_VERSION]),
        f"{side}.embed_positions._float_tensor": torch.zeros(1, dtype=dtype),
    }
    return {name: _kept(kept, name, default) for name, default in made.items()}


def _kept(kept: Any, name: str, default: Tensor) -> Tensor:
    """What ``config.json`` says of one; the default where it says nothing that can be understood."""
    try:
        code, digits = kept[name]
        return torch.frombuffer(bytearray.fromhex(digits), dtype=_DTYPES[code]).reshape(1)
    except (KeyError, TypeError, ValueError, RuntimeError):
        return default
