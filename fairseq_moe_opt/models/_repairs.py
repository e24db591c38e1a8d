"""What fairseq 0.12.3 needs to run on Python 3.11, torch 2.6 and later and NumPy 2."""

from __future__ import annotations

import argparse
import types
from typing import Any

import numpy as np
import torch
from fairseq.data import bucket_pad_length_dataset, data_utils


def repair() -> None:
    """Put everything right; a second call changes nothing."""
    # Checkpoints of encoder-decoder models hold their configuration as a Namespace, which torch.load refuses.
    torch.serialization.add_safe_globals([argparse.Namespace])
    # fairseq asks for np.compat.long (token_block_dataset, language_pair_dataset), np.int and np.float.
    for name, value in (("compat", types.SimpleNamespace(long=int)), ("int", int), ("float", float)):
        if name not in vars(np):
            setattr(np, name, value)
    for module in (data_utils, bucket_pad_length_dataset):
        module.get_buckets = _get_buckets


def _get_buckets(sizes: Any, num_buckets: int) -> Any:
    """fairseq's ``get_buckets`` with NumPy 2's name for the interpolation."""
    return np.unique(np.percentile(sizes, np.linspace(0, 100, num_buckets + 1), method="lower")[1:])
